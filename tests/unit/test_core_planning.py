"""The planner's formulas: published figures, brute force for small cases, and its own Monte Carlo."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from snapd.core.cluster import Code
from snapd.core.planning import PRESETS, Cluster, Failures, check_code, plan_code, plan_storage
from snapd.core.planning_check import Estimate, simulate_goodput, simulate_survival
from snapd.core.planning_intervals import (
    TwoLevels,
    daly_interval_s,
    exact_interval_s,
    goodput,
    young_interval_s,
)
from snapd.core.planning_survival import domain_survival, loss_rate, survival
from snapd.errors import ConfigError

MTBF_S = 3.09 * 3600  # Llama 3 on 16,384 GPUs
CLUSTER = Cluster(
    nodes=2048,
    nodes_per_domain=32,
    failures=PRESETS["llama3"],
    wipe_share=0.01,
    domain_losses_per_1000_days=0.0,
    state_bytes=6.5e12,
    slots=3,
    copy_bytes_per_s=10e9,
    network_bytes_per_s=5e9,
    storage_bytes_per_s=200e9,
    step_s=5.0,
    stall_s=0.1,
    storage_stall_s=1.0,
    restart_s=180.0,
    storage_restart_s=600.0,
    detect_s=30.0,
    window_s=0.0,
)


def sizes(nodes: int, size: int) -> list[int]:
    return [size] * (nodes // size) + ([nodes % size] if nodes % size else [])


@pytest.mark.parametrize(
    ("stall_s", "restart_s", "interval_s", "expected"),
    [(300, 600, 2389, 0.744), (60, 600, 1116, 0.853), (60, 180, 1116, 0.885), (2, 420, 211, 0.945)],
)
def test_one_level(stall_s: float, restart_s: float, interval_s: float, expected: float) -> None:
    best_s = exact_interval_s(stall_s, MTBF_S)
    assert best_s == pytest.approx(interval_s, rel=0.01)
    assert daly_interval_s(stall_s, MTBF_S) == pytest.approx(best_s, rel=0.001)
    found = goodput(best_s, stall_s=stall_s, restart_s=restart_s, mtbf_s=MTBF_S)
    assert found == pytest.approx(expected, abs=0.001)
    for other_s in (best_s * 0.9, best_s * 1.1):
        assert goodput(other_s, stall_s=stall_s, restart_s=restart_s, mtbf_s=MTBF_S) < found


def test_extremes_of_one_level() -> None:
    assert daly_interval_s(100, 50) == 50
    assert goodput(1, stall_s=1, restart_s=1e6, mtbf_s=10) == 0
    assert young_interval_s(2, 100) == 20


@pytest.mark.parametrize(
    ("stall_s", "restart_s", "interval_s", "expected"),
    [(0.5, 60, 106, 0.983), (0.5, 180, 106, 0.972), (0.05, 60, 34, 0.989), (2, 60, 212, 0.973)],
)
def test_two_levels(stall_s: float, restart_s: float, interval_s: float, expected: float) -> None:
    """1 % of failures need storage: 600 s restart, 300 s latency; memory has 5 s latency."""
    levels = TwoLevels(
        memory_rate=0.99 / MTBF_S,
        storage_rate=0.01 / MTBF_S,
        memory_stall_s=stall_s,
        storage_stall_s=1,
        memory_restart_s=restart_s + 5,
        storage_restart_s=900,
    )
    memory_s, storage_s = levels.best(memory_min_s=1, storage_min_s=300)
    assert memory_s == pytest.approx(interval_s, rel=0.02)
    assert storage_s == pytest.approx(1485, rel=0.02)
    assert levels.goodput(memory_s, storage_s) == pytest.approx(expected, abs=0.001)
    for factor in (0.7, 1.4):
        assert levels.goodput(memory_s * factor, storage_s) < levels.goodput(memory_s, storage_s)
        assert levels.goodput(memory_s, storage_s * factor) < levels.goodput(memory_s, storage_s)


@pytest.mark.parametrize("interval_s", [30.0, 600.0, 5000.0])
def test_two_levels_contain_one(interval_s: float) -> None:
    """Storage alone, every snapshot stored; and memory alone."""
    expected = goodput(interval_s, stall_s=7, restart_s=300, mtbf_s=MTBF_S)
    stored = TwoLevels(
        memory_rate=0,
        storage_rate=1 / MTBF_S,
        memory_stall_s=0,
        storage_stall_s=7,
        memory_restart_s=0,
        storage_restart_s=300,
    )
    assert stored.goodput(interval_s, interval_s) == pytest.approx(expected, rel=1e-9)
    kept = TwoLevels(
        memory_rate=1 / MTBF_S,
        storage_rate=0,
        memory_stall_s=7,
        storage_stall_s=0,
        memory_restart_s=300,
        storage_restart_s=0,
    )
    assert kept.goodput(interval_s, 1e6) == pytest.approx(expected, rel=1e-9)


SURVIVAL = {
    (2, 1): (0.9995, 0.9971, 0.9864, 0.9427, 0.7819),
    (3, 2): (1, 0.999998, 0.99997, 0.9997, 0.9976),
    (4, 1): (0.9985, 0.9912, 0.9596, 0.8369, 0.4743),
    (8, 1): (0.9966, 0.9796, 0.9078, 0.6572, 0.1688),
    (8, 2): (1, 0.99996, 0.9994, 0.9945, 0.9537),
    (11, 3): (1, 1, 0.999994, 0.99985, 0.9972),
    (16, 4): (1, 1, 1, 0.99999, 0.9997),
}


@pytest.mark.parametrize(("size", "m"), SURVIVAL)
def test_survival_of_2048_nodes(size: int, m: int) -> None:
    found = [float(survival(sizes(2048, size), m, lost)) for lost in (2, 4, 8, 16, 32)]
    assert found == pytest.approx(SURVIVAL[size, m], abs=6e-5)


@pytest.mark.parametrize("groups", [[3, 3, 3], [2, 4, 5], [8], [1, 1, 6]])
@pytest.mark.parametrize("m", [1, 2])
def test_survival_counts_all_cases(groups: list[int], m: int) -> None:
    of = [number for number, size in enumerate(groups) for _ in range(size)]
    for lost in range(len(of) + 1):
        cases = list(itertools.combinations(range(len(of)), lost))
        good = sum(all([of[n] for n in case].count(g) <= m for g in range(len(groups))) for case in cases)
        assert float(survival(groups, m, lost)) == pytest.approx(good / len(cases), abs=1e-12)
    with pytest.raises(ValueError, match="cannot be lost"):
        survival(groups, m, len(of) + 1)


def test_survival_agrees_with_its_monte_carlo() -> None:
    draw = random.Random(3).random
    for size, m, lost in ((8, 2, 32), (4, 1, 16), (2, 1, 8)):
        found = simulate_survival(sizes(2048, size), m, lost, trials=4000, draw=draw)
        assert abs(found.mean - float(survival(sizes(2048, size), m, lost))) < 2 * found.half_width


def test_aligned_racks() -> None:
    """64 racks in sets of eight."""
    names = [f"d{i}" for i in range(64)]
    sets = [dict.fromkeys(names[i : i + 8], 1) for i in range(0, 64, 8)]

    def of(m: int, lost: int) -> float:
        found, is_exact = domain_survival(sets, Code(8 - m, m), names, lost, random.Random(1).random)
        assert is_exact
        return found

    assert [of(1, 2), of(1, 3)] == pytest.approx([0.889, 0.688], abs=5e-4)
    assert [of(2, 2), of(2, 3), of(2, 4)] == pytest.approx([1, 0.989, 0.960], abs=5e-4)


def test_racks_that_are_not_aligned_are_counted_or_sampled() -> None:
    names = [f"d{i}" for i in range(9)]
    sets = [{names[(i + j) % 9]: 1 + (j == 0) for j in range(4)} for i in range(9)]
    counted, is_exact = domain_survival(sets, Code(3, 2), names, 2, random.Random(1).random)
    pairs = list(itertools.combinations(range(9), 2))
    # A group has two nodes of its first rack: with that rack another one of its four is too many.
    good = sum(1 for a, b in pairs if min((a - b) % 9, (b - a) % 9) > 3)
    assert (counted, is_exact) == (good / len(pairs), True)
    wide = [f"d{i}" for i in range(300)]
    sets = [{wide[(i + j) % 300]: 1 for j in range(8)} for i in range(0, 300, 4)]
    sampled, is_exact = domain_survival(sets, Code(7, 1), wide, 2, random.Random(1).random)
    close = sum(
        1
        for a, b in itertools.combinations(range(300), 2)
        if any(wide[a] in s and wide[b] in s for s in sets)
    )
    assert not is_exact
    assert sampled == pytest.approx(1 - close / math.comb(300, 2), abs=0.004)
    with pytest.raises(ValueError, match="cannot be lost"):
        domain_survival(sets, Code(7, 1), wide, 301, random.Random(1).random)


@pytest.mark.parametrize(
    ("size", "m", "window_s", "per_54_days"),
    [(2, 1, 300, 5e-4), (8, 1, 300, 3.5e-3), (8, 1, 1800, 2.1e-2), (8, 2, 300, 4e-8), (8, 2, 1800, 1.5e-6)],
)
def test_independent_losses(size: int, m: int, window_s: float, per_54_days: float) -> None:
    node_rate = 0.3 * 3.79 / 1000 / 86_400
    found = loss_rate(sizes(2048, size), m, node_rate=node_rate, window_s=window_s) * 54 * 86_400
    assert found == pytest.approx(per_54_days, rel=0.04)


def test_presets_give_the_published_time_between_failures() -> None:
    assert 1 / CLUSTER.failure_rate == pytest.approx(3.09 * 3600, rel=0.01)
    rsc = replace(CLUSTER, failures=PRESETS["rsc1"])
    assert 1 / rsc.failure_rate == pytest.approx(1.8 * 3600, rel=0.02)
    ft_hsdp = replace(CLUSTER, nodes=4096, failures=PRESETS["ft-hsdp"])
    assert 1 / ft_hsdp.failure_rate == pytest.approx(2.6 * 3600, rel=0.03)


def simulated(cluster: Cluster, code: Code | None, seed: int) -> tuple[float, Estimate]:
    draw = random.Random(seed).random
    plan = plan_code(cluster, code, draw)
    found = simulate_goodput(
        plan.hazards,
        memory_stall_s=cluster.stall_s,
        storage_stall_s=cluster.storage_stall_s,
        failure_count=8_000,
        draw=draw,
    )
    return plan.goodput, found


@pytest.mark.parametrize("code", [None, Code(1, 1), Code(6, 2)], ids=str)
@pytest.mark.parametrize("rate", [3.79, 38.0])
def test_goodput_agrees_with_its_monte_carlo(code: Code | None, rate: float) -> None:
    """Down to a failure every 18 minutes."""
    failures = Failures(per_1000_node_days=rate, memory_loss_share=0.126, source="")
    formula, found = simulated(replace(CLUSTER, failures=failures), code, 5)
    assert found.half_width < 0.01
    assert abs(formula - found.mean) < 0.006 + 1.5 * found.half_width


def test_a_slow_network_makes_protected_snapshots_older() -> None:
    slow = replace(CLUSTER, network_bytes_per_s=20e6)
    plan = plan_code(slow, Code(6, 2), random.Random(1).random)
    assert plan.protected_interval_s >= plan.transfer_s > plan.memory_interval_s
    formula, found = simulated(slow, Code(6, 2), 2)
    assert formula < plan_code(CLUSTER, Code(6, 2), random.Random(1).random).goodput
    assert abs(formula - found.mean) < 0.01 + 1.5 * found.half_width


def test_what_a_plan_costs() -> None:
    plan = plan_code(CLUSTER, Code(6, 2), random.Random(1).random)
    node_bytes = 6.5e12 / 2048
    assert plan.parity_bytes == pytest.approx(node_bytes / 3)
    assert plan.network_bytes == pytest.approx(node_bytes * 7 / 6)
    assert plan.snapshot_bytes == 3 * node_bytes
    assert plan.memory_interval_s % CLUSTER.step_s == pytest.approx(0, abs=1e-6)
    assert plan.group_sizes == {8: 256}
    assert plan.domain_survival[2] == (1.0, True)
    alone = plan_code(CLUSTER, None, random.Random(1).random)
    assert alone.survival == {} and alone.parity_bytes == 0
    assert alone.losses_per_30_days > 10 * plan.losses_per_30_days
    order = [
        plan_storage(CLUSTER, is_synchronous=True),
        plan_storage(CLUSTER, is_synchronous=False),
        alone,
        plan,
    ]
    assert [p.goodput for p in order] == sorted(p.goodput for p in order)


def test_racks_that_take_more_than_parity_bears_send_the_job_to_storage() -> None:
    racks = replace(CLUSTER, nodes=32, nodes_per_domain=8, domain_losses_per_1000_days=1.0)
    draw = random.Random(1).random
    domain_losses = 4 * 30 / 1000
    bears, fails = (plan_code(racks, code, draw) for code in (Code(6, 2), Code(7, 1)))
    wiped = racks.failure_rate * racks.wipe_share * 30 * 86_400
    assert bears.losses_per_30_days == pytest.approx(wiped, rel=0.05)
    assert fails.losses_per_30_days == pytest.approx(wiped + domain_losses, rel=0.05)


def test_failures_that_only_storage_heals() -> None:
    plan = plan_code(replace(CLUSTER, wipe_share=1.0), Code(6, 2), random.Random(1).random)
    stored = plan_storage(CLUSTER, is_synchronous=False)
    assert plan.goodput == pytest.approx(stored.goodput, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "nodes is 0, not 1 to 65536"),
        ({"nodes_per_domain": 4096}, "not 1 to the number of nodes, 2048"),
        ({"slots": 1}, "slots is 1, not 2 to 8"),
        ({"wipe_share": -0.1}, "wipe_share is -0.1, not 0 to 1"),
        ({"state_bytes": 0}, "state_bytes is 0, not more than 0"),
        ({"network_bytes_per_s": math.inf}, "network_bytes_per_s is inf, not more than 0"),
        ({"stall_s": math.nan}, "stall_s is nan, not 0 or more"),
        ({"restart_s": -1}, "restart_s is -1, not 0 or more"),
        ({"domain_losses_per_1000_days": -2}, "domain_losses_per_1000_days is -2, not 0 or more"),
        (
            {"failures": Failures(per_1000_node_days=0, memory_loss_share=0, source="")},
            "failures is 0, not more",
        ),
        (
            {"failures": Failures(per_1000_node_days=1, memory_loss_share=2, source="")},
            "memory_loss_share is 2",
        ),
    ],
)
def test_numbers_that_cannot_be(changes: dict[str, object], message: str) -> None:
    CLUSTER.check()
    with pytest.raises(ConfigError, match=message) as caught:
        replace(CLUSTER, **changes).check()
    assert caught.value.kind == "plan"


def test_groups_larger_than_the_cluster() -> None:
    check_code(Code(6, 2), 8)
    with pytest.raises(ConfigError, match=r"groups of 6\+2 are larger than the cluster of 7 nodes"):
        check_code(Code(6, 2), 7)
