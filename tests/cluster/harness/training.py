"""A real torchrun over the hosts: started, watched, killed; and what its ranks wrote."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.harness.hosts import Host, kill_all, pids_with
from tests.support.waiting import wait_for

MARKER = "SNAPD_TEST_TRAINING"
TRAINER = Path(__file__).with_name("trainer.py")
REFERENCE = Path(__file__).with_name("reference.py")
START_S = 180.0


class TrainingFailed(Exception):
    """A rank ended that should not have; the message has its last lines."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained. The reference of a recipe is that of every run of it, whatever its job's name."""

    ranks: int
    steps: int
    seed: int = 1
    width: int = 192
    layers: int = 2
    heavy: int = -1

    def arguments(self) -> list[str]:
        named = {"steps": self.steps, "seed": self.seed, "width": self.width, "layers": self.layers}
        return [*(f"--{name}={value}" for name, value in named.items()), f"--heavy={self.heavy}"]


@dataclass(frozen=True)
class Restored:
    """What a rank went on from."""

    step: int
    digest: str
    generation: int
    seconds: float


def read_events(out: Path, rank: int) -> list[dict[str, Any]]:
    path = out / f"rank-{rank}.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the kill came inside this line
            found.append(json.loads(line))
    return found


def read_digests(out: Path, rank: int) -> dict[int, str]:
    return {event["step"]: event["digest"] for event in read_events(out, rank) if event.get("digest")}


class Training:
    """One start of all ranks, rank i on hosts[i]."""

    def __init__(
        self,
        recipe: Recipe,
        hosts: Sequence[Host],
        envs: Sequence[Mapping[str, str]],
        out: Path,
        *,
        job: str = "",
        step_s: float = 0.0,
        options: Sequence[str] = (),
    ) -> None:
        """`envs`: per host. An empty job: the reference."""
        out.mkdir(parents=True)
        self.recipe, self.hosts, self.out, self.job = recipe, list(hosts), out, job
        self.marker = f"{hosts[0].marker}/{out.name}"
        scratch = out / "tmp"  # killed processes leave their temporary files here
        scratch.mkdir()
        port = hosts[0].free_port()
        self.agents = []
        for number, (host, env) in enumerate(zip(self.hosts, envs, strict=True)):
            command = [
                sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", str(len(self.hosts)),
                "--nproc-per-node", "1", "--node-rank", str(number), "--master-addr", hosts[0].address,
                "--master-port", str(port), "--local-addr", host.address, "--monitor-interval", "0.2",
                str(TRAINER), "--out", str(out), "--job", job, "--step-seconds", str(step_s),
                *recipe.arguments(), *options,
            ]  # fmt: skip
            mine = {
                "GLOO_SOCKET_IFNAME": host.interface,
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "ignore",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                "TMPDIR": str(scratch),
                MARKER: self.marker,
            }
            self.agents.append(host.start(command, env={**env, **mine}, log=out / f"torchrun-{number}.log"))

    def events(self, rank: int, what: str = "") -> list[dict[str, Any]]:
        return [event for event in read_events(self.out, rank) if what in ("", event["what"])]

    def step(self) -> int:
        """The newest step that some rank has ended."""
        last = [(self.events(rank, "step") or [{"step": 0}])[-1]["step"] for rank in range(self.recipe.ranks)]
        return max(last)

    def failures(self) -> list[str]:
        ranks = range(self.recipe.ranks)
        return [f"rank {r}: {e['type']}: {e['error']}" for r in ranks for e in self.events(r, "failed")]

    @property
    def is_running(self) -> bool:
        return any(agent.poll() is None for agent in self.agents)

    def wait_restored(self, timeout_s: float = START_S) -> list[Restored]:
        """What each rank restored; TrainingFailed as soon as one says that it could not."""

        def all_restored() -> list[Restored]:
            found = [self.events(rank, "restored") for rank in range(self.recipe.ranks)]
            if failures := self.failures():
                raise TrainingFailed("\n".join(failures))
            self._check_agents()
            if not all(found):
                return []
            return [
                Restored(e[-1]["step"], e[-1]["digest"], e[-1]["generation"], e[-1]["seconds"]) for e in found
            ]

        return wait_for(all_restored, f"all ranks of {self.job} restored", timeout_s, self.tail, every_s=0.1)

    def wait_failed(self, timeout_s: float = START_S) -> list[str]:
        """Wait until every rank has said why it could not go on."""

        def all_failed() -> list[str]:
            found = self.failures()
            return found if len(found) == self.recipe.ranks or (found and not self.is_running) else []

        return wait_for(all_failed, f"the ranks of {self.job} refuse", timeout_s, self.tail, every_s=0.1)

    def wait_step(self, step: int, timeout_s: float = START_S) -> None:
        def reached() -> bool:
            self._check_agents()
            return self.step() >= step

        wait_for(reached, f"step {step} of {self.job or 'the reference'}", timeout_s, self.tail, every_s=0.1)

    def wait_ended(self, timeout_s: float) -> None:
        wait_for(lambda: not self.is_running, f"the end of {self.job}", timeout_s, self.tail, every_s=0.2)
        self._check_agents()

    def _check_agents(self) -> None:
        fallen = [number for number, agent in enumerate(self.agents) if agent.poll() not in (None, 0)]
        if fallen:
            raise TrainingFailed(f"torchrun ended on hosts {fallen}\n{self.tail()}")

    def kill(self) -> int:
        """SIGKILL to launchers and ranks on all hosts; returns how many processes there were."""
        return kill_all(lambda: pids_with(MARKER, self.marker), self._reap)

    def _reap(self) -> None:
        for host in self.hosts:
            host.reap()

    def digests(self) -> list[dict[int, str]]:
        """Per rank: step -> digest, as far as this start came."""
        return [read_digests(self.out, rank) for rank in range(self.recipe.ranks)]

    def tail(self, nbytes: int = 1500) -> str:
        parts = []
        for number in range(len(self.hosts)):
            log = self.out / f"torchrun-{number}.log"
            last = self.events(number)[-1:]
            parts.append(f"--- host {number}, exit {self.agents[number].poll()}, {last}")
            if log.exists():
                parts.append(log.read_bytes()[-nbytes:].decode(errors="replace"))
        return "\n".join(parts)


def run_reference(recipe: Recipe, env: Mapping[str, str], out: Path) -> list[dict[int, str]]:
    """Digests of the uninterrupted run: per rank, step -> digest; step 0 is the state before the first update."""
    out.mkdir(parents=True)
    with (out / "reference.log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(REFERENCE), "--out", str(out), *recipe.arguments()],
            env={**os.environ, **env, "WORLD_SIZE": str(recipe.ranks), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=START_S + recipe.steps,
        )  # fmt: skip
    assert done.returncode == 0, (out / "reference.log").read_text()[-3000:]
    found = [read_digests(out, rank) for rank in range(recipe.ranks)]
    for rank, digests in enumerate(found):
        assert sorted(digests) == list(range(recipe.steps + 1)), f"rank {rank}'s reference is not whole"
        assert len(set(digests.values())) == recipe.steps + 1, "the state stands still"
    return found
