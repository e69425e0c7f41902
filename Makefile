# `make help` lists what there is. Everything is set up below .venv/; a bare machine needs g++, make and Python 3.11+
# with its headers and venv (Debian, Ubuntu: apt-get install g++ make python3-dev python3-venv).

PYTHON ?= python3
VENV ?= .venv
# More options for pip, e.g. an index with the CPU builds of torch.
PIP_OPTIONS ?=
# More options for pytest, e.g. -k NAME.
PYTEST_OPTIONS ?=
DEMO_OPTIONS ?=
SOAK_OPTIONS ?=
SIM_OPTIONS ?=
BENCH_OPTIONS ?=
SOAK_CLUSTER_OPTIONS ?=
BENCH_CLUSTER_OPTIONS ?=
BENCH_GPU_OPTIONS ?=

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
NATIVE_SOURCES := $(shell find csrc/include csrc/src csrc/bind -type f)
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.hpp')
TEST_FOLDERS := $(wildcard tests/unit tests/property tests/sim tests/conformance tests/fault tests/e2e tests/cluster)
RUFF_FOLDERS := $(wildcard snapd client csrc/bind demo bench scripts tests tools)

.DEFAULT_GOAL := help
.PHONY: help venv demo test sim sim-tiers soak-tiers chaos-tiers power-cut check format proto proto-check soak soak-cluster bench bench-cluster gpu-check bench-gpu native-test native-sanitize clean

help:
	@sed -n 's/^## //p' Makefile

## venv             set up .venv/ (once; again when pyproject.toml, constraints.txt or csrc/ change)
venv: $(STAMP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(VENV)/bin/python pyproject.toml constraints.txt CMakeLists.txt $(NATIVE_SOURCES)
	$(RUN) -m pip install --quiet $(PIP_OPTIONS) -c constraints.txt -e '.[torch,dev]'
	@touch $@

## demo             train, kill -9, resume, and prove that nothing changed
demo: $(STAMP)
	$(RUN) demo/run_demo.py $(DEMO_OPTIONS)

## test             all tests but the slow ones
test: $(STAMP)
	$(RUN) -m pytest -m 'not slow' $(PYTEST_OPTIONS) $(TEST_FOLDERS)

## sim              2,000 seeds of the cluster in virtual time, 100,000 node-faults; then every planted bug must be found
sim: $(STAMP)
	$(RUN) -m snapd.sim --seeds 1..2000 --faults 52 $(SIM_OPTIONS)
	$(RUN) -m snapd.sim --bugs --seeds 1..2000

## check            style, types, drift of generated files, unit tests
check: $(STAMP)
	$(VENV)/bin/ruff check $(RUFF_FOLDERS)
	$(VENV)/bin/ruff format --check $(RUFF_FOLDERS)
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(RUN) scripts/generate_proto.py --check
	$(RUN) -m pytest -q -m 'not slow' $(PYTEST_OPTIONS) tests/unit

## format           rewrite the sources in the project's style
format: $(STAMP)
	$(VENV)/bin/ruff check --fix-only --quiet $(RUFF_FOLDERS)
	$(VENV)/bin/ruff format --quiet $(RUFF_FOLDERS)
	$(VENV)/bin/clang-format -i $(CXX_FILES)

## proto            generate proto/snapd_proto/ from proto/snapd/v1/
proto: $(STAMP)
	$(RUN) scripts/generate_proto.py

## proto-check      fail if the generated files have drifted
proto-check: $(STAMP)
	$(RUN) scripts/generate_proto.py --check

## soak             kills at named points and at random moments, many times
soak: $(STAMP)
	$(RUN) tests/soak/run.py $(SOAK_OPTIONS)

## soak-cluster     8 nodes, 6+2: any 2 lose everything, 50 times; then 4, 3 and 2 nodes, 10 times each
soak-cluster: $(STAMP)
	$(RUN) tests/soak_cluster/run.py --nodes 8 --code 6+2 --rounds 50 $(SOAK_CLUSTER_OPTIONS)
	$(RUN) tests/soak_cluster/run.py --nodes 4 --code 2+2 --rounds 10 $(SOAK_CLUSTER_OPTIONS)
	$(RUN) tests/soak_cluster/run.py --nodes 3 --code 2+1 --rounds 10 $(SOAK_CLUSTER_OPTIONS)
	$(RUN) tests/soak_cluster/run.py --nodes 2 --code 1+1 --rounds 10 $(SOAK_CLUSTER_OPTIONS)

## sim-tiers        every interleaving of writers and a collector in small tiers, long seeded runs, every planted bug found
sim-tiers: $(STAMP)
	$(RUN) -m snapd.sim.tiers $(SIM_OPTIONS)

## soak-tiers       kill -9 of daemon, trainer and a real S3 server while snapshots become durable
soak-tiers: $(STAMP)
	$(RUN) tests/soak_tiers/run.py --points 5 --moments 300 $(SOAK_OPTIONS)

## chaos-tiers      ckpt-chaos over a tier in a directory: a crash at every file event; and a planted bug that it must find
chaos-tiers: $(STAMP)
	PATH="$(abspath $(VENV))/bin:$$PATH" tests/chaos/run.sh

## power-cut        power cuts under a tier on xfs behind nbdkit; root, Debian's nbdkit, nbdfuse, xfsprogs
power-cut: $(STAMP)
	$(RUN) tests/soak_tiers/power_cut.py --cuts 20 $(SOAK_OPTIONS)

## bench            snapd beside torch.save and DCP async
bench: $(STAMP)
	$(RUN) bench/run.py $(BENCH_OPTIONS)

## bench-cluster    what protection costs, and how fast a lost node comes back
bench-cluster: $(STAMP)
	$(RUN) bench/cluster.py --out bench-out/cluster.json $(BENCH_CLUSTER_OPTIONS)

## gpu-check        what needs a CUDA device: streams, fences, graphs, kills and resumes of nine ways to train
gpu-check: $(STAMP)
	$(RUN) -m snapd_client.gpu_check
	$(RUN) bench/gpu_resume.py

## bench-gpu        what snapshots cost on a CUDA device, beside plain copies into pinned memory
bench-gpu: $(STAMP)
	$(RUN) bench/gpu.py $(BENCH_GPU_OPTIONS)

## native-test      the C++ tests
native-test: $(STAMP)
	$(RUN) scripts/native_test.py

## native-sanitize  the C++ tests under ThreadSanitizer, then AddressSanitizer and UndefinedBehaviorSanitizer
native-sanitize: $(STAMP)
	$(RUN) scripts/native_test.py --sanitize thread
	$(RUN) scripts/native_test.py --sanitize address,undefined

## clean            remove what was built, .venv/ too
clean:
	rm -rf $(VENV) build dist *.egg-info demo-out bench-out .mypy_cache .ruff_cache .pytest_cache .hypothesis
