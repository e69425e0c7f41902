"""What `snapd plan` computes for a cluster and a code: the best intervals, goodput, memory, network, what survives.

Pure: numbers in, numbers out. The formulas of intervals and survival are in files of their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from snapd.core.cluster import Code, Member
from snapd.core.placement import place
from snapd.core.planning_intervals import TwoLevels
from snapd.core.planning_survival import domain_survival, loss_rate, survival
from snapd.errors import ConfigError

DAY_S = 86_400.0
NODES_MAX = 65_536
LOSSES = (1, 2, 4, 8, 16, 32)
DOMAIN_LOSSES = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """How nodes fail. `memory_loss_share`: of the failures, those that lose the memory of a node."""

    per_1000_node_days: float
    memory_loss_share: float
    source: str


PRESETS: Mapping[str, Failures] = {
    "llama3": Failures(
        per_1000_node_days=3.79,
        memory_loss_share=0.126,
        source="Llama 3 405B, 2,048 nodes, 54 days: 419 unexpected interruptions, 53 of them lost a host's memory",
    ),
    "rsc1": Failures(
        per_1000_node_days=6.50,
        memory_loss_share=0.126,
        source="Meta RSC-1: 6.5 per 1,000 node-days; share of lost memory as in llama3",
    ),
    "ft-hsdp": Failures(
        per_1000_node_days=2.3,
        memory_loss_share=0.126,
        source="Meta FT-HSDP at 32,000 GPUs: 2.3 per 1,000 node-days; share of lost memory as in llama3",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What there is. Sizes in bytes, times in seconds; `state_bytes` and `storage_bytes_per_s` of all nodes together,
    the other bandwidths of one node, each direction.

    `wipe_share`: of the failures, those after which no memory is left (a job removed, power, a fault of ours).
    `restart_s`: from a failure until a restore can begin, where memory is used; `storage_restart_s`: where storage is.
    `window_s`: from the loss of a node until its group has all parity again; 0: estimated.
    """

    nodes: int
    nodes_per_domain: int
    failures: Failures
    wipe_share: float
    domain_losses_per_1000_days: float
    state_bytes: float
    slots: int
    copy_bytes_per_s: float
    network_bytes_per_s: float
    storage_bytes_per_s: float
    step_s: float
    stall_s: float
    storage_stall_s: float
    restart_s: float
    storage_restart_s: float
    detect_s: float
    window_s: float

    @property
    def node_bytes(self) -> float:
        return self.state_bytes / self.nodes

    @property
    def failure_rate(self) -> float:
        """Failures of the job a second, without losses of whole domains."""
        return self.nodes * self.failures.per_1000_node_days / 1000 / DAY_S

    @property
    def domain_count(self) -> int:
        return -(-self.nodes // self.nodes_per_domain)

    @property
    def domain_rate(self) -> float:
        return self.domain_count * self.domain_losses_per_1000_days / 1000 / DAY_S

    @property
    def copy_s(self) -> float:
        return self.node_bytes / self.copy_bytes_per_s

    @property
    def flush_s(self) -> float:
        return self.state_bytes / self.storage_bytes_per_s

    def check(self) -> None:
        """Raise ConfigError (kind `plan`) for the first number that cannot be."""
        if not 1 <= self.nodes <= NODES_MAX:
            raise _wrong("nodes", self.nodes, f"1 to {NODES_MAX}")
        if not 1 <= self.nodes_per_domain <= self.nodes:
            raise _wrong("nodes_per_domain", self.nodes_per_domain, f"1 to the number of nodes, {self.nodes}")
        if not 2 <= self.slots <= 8:
            raise _wrong("slots", self.slots, "2 to 8")
        shares = {"memory_loss_share": self.failures.memory_loss_share, "wipe_share": self.wipe_share}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise _wrong(name, share, "0 to 1")
        positive = ("state_bytes", "copy_bytes_per_s", "network_bytes_per_s", "storage_bytes_per_s", "step_s")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise _wrong(name, getattr(self, name), "more than 0")
        times = ("stall_s", "storage_stall_s", "restart_s", "storage_restart_s", "detect_s", "window_s")
        for name in (*times, "domain_losses_per_1000_days"):
            if not 0 <= getattr(self, name) < math.inf:
                raise _wrong(name, getattr(self, name), "0 or more")
        if not 0 < self.failures.per_1000_node_days < 1e6:
            raise _wrong("failures", self.failures.per_1000_node_days, "more than 0 per 1,000 node-days")


def _wrong(name: str, value: float, allowed: str) -> ConfigError:
    return ConfigError(f"{name} is {value:g}, not {allowed}", kind="plan")


def check_code(code: Code, nodes: int) -> None:
    """Raise ConfigError (kind `plan`) for a code whose groups are larger than the cluster."""
    if code.size > nodes:
        raise ConfigError(
            f"groups of {code} are larger than the cluster of {nodes} nodes",
            kind="plan",
            hint=f"choose k+m of at most {nodes}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hazard:
    """A class of failures: its rate a second, how long until training goes on, and which snapshots help: one every
    `interval_s`, usable `latency_s` after its stall.
    """

    name: str
    rate: float
    restart_s: float
    latency_s: float
    interval_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a code gives and costs. Bytes are of one node; `code` None: own memory only, or storage only.

    `losses_per_30_days`: how often the job goes back to storage. `domain_survival`: (probability, is exact).
    """

    name: str
    code: Code | None
    snapshot_bytes: float
    parity_bytes: float
    network_bytes: float
    transfer_s: float
    memory_interval_s: float
    storage_interval_s: float
    goodput: float
    losses_per_30_days: float
    hazards: tuple[Hazard, ...]
    levels: TwoLevels
    survival: Mapping[int, float]
    domain_survival: Mapping[int, tuple[float, bool]]
    group_sizes: Mapping[int, int]

    @property
    def protected_interval_s(self) -> float:
        """Every so often a snapshot is protected: all are, unless the network takes longer than the interval."""
        return self.hazards[1].interval_s if self.code is not None else 0.0

    def goodput_at(self, interval_s: float) -> float:
        """Goodput with another interval between snapshots."""
        has_memory = self.levels.memory_rate > 0
        return self.levels.goodput(
            interval_s, max(interval_s, self.storage_interval_s if has_memory else 0.0)
        )


def plan_code(cluster: Cluster, code: Code | None, draw: Callable[[], float]) -> Plan:
    """The best intervals with this code, and what comes of them. None: each node's own memory, and storage.

    Args:
        draw: uniform numbers in [0, 1), for domains that are neither aligned nor few.
    """
    sets = _domain_sets(cluster, code)
    sizes = [sum(group.values()) for group in sets]
    node_bytes = cluster.node_bytes
    m = code.m if code is not None else 0
    shares = [(size - m, m) for size in sizes]
    parity = sum(node_bytes * (k + m) * m / k for k, m in shares) / cluster.nodes
    network = sum(node_bytes * (k + m) * (k + m - 1) / k for k, m in shares) / cluster.nodes if m else 0.0
    transfer_s = network / cluster.network_bytes_per_s
    hazards = _hazards(cluster, code, sets, transfer_s)
    levels = _levels(cluster, hazards, 0.0)
    low_s = max(cluster.step_s, cluster.copy_s)
    memory_s = low_s
    for _ in range(3):  # what a lost node costs depends on the interval, a little
        levels = _levels(cluster, hazards, max(0.0, transfer_s - memory_s) / 2)
        memory_s, storage_s = levels.best(memory_min_s=low_s, storage_min_s=cluster.flush_s)
    memory_s = _whole(memory_s, cluster.step_s, at_least=low_s)
    storage_s = _whole(storage_s, memory_s, at_least=cluster.flush_s)
    return Plan(
        name=str(code) if code is not None else "own memory",
        code=code,
        snapshot_bytes=cluster.slots * node_bytes,
        parity_bytes=parity,
        network_bytes=network,
        transfer_s=transfer_s,
        memory_interval_s=memory_s,
        storage_interval_s=storage_s,
        goodput=levels.goodput(memory_s, storage_s),
        losses_per_30_days=levels.storage_rate * 30 * DAY_S,
        levels=levels,
        hazards=_timed(hazards, memory_s, _whole(transfer_s, memory_s, at_least=transfer_s), storage_s),
        survival={n: float(survival(sizes, m, n)) for n in LOSSES if m and n <= cluster.nodes},
        domain_survival=_domain_survival(cluster, code, sets, draw),
        group_sizes=dict(sorted(Counter(sizes).items())),
    )


def _whole(interval_s: float, unit_s: float, *, at_least: float) -> float:
    """The multiple of a unit that is nearest and not below."""
    return unit_s * max(1, round(interval_s / unit_s), math.ceil(at_least / unit_s - 1e-9))


def plan_storage(cluster: Cluster, *, is_synchronous: bool) -> Plan:
    """Storage only: training waits for the whole write, or for a copy that is written behind its back."""
    stall_s = cluster.flush_s if is_synchronous else cluster.stall_s + cluster.storage_stall_s
    latency_s = 0.0 if is_synchronous else cluster.flush_s
    rate = cluster.failure_rate + cluster.domain_rate
    restart_s = cluster.storage_restart_s + cluster.flush_s
    levels = TwoLevels(
        memory_rate=0.0,
        storage_rate=rate,
        memory_stall_s=0.0,
        storage_stall_s=stall_s,
        memory_restart_s=0.0,
        storage_restart_s=restart_s + latency_s,
    )
    low_s = max(cluster.step_s, latency_s)
    interval_s = levels.best(memory_min_s=low_s, storage_min_s=low_s)[1]
    interval_s = _whole(interval_s, cluster.step_s, at_least=low_s)
    hazard = Hazard(
        name="any failure", rate=rate, restart_s=restart_s, latency_s=latency_s, interval_s=interval_s
    )
    return Plan(
        name="storage, synchronous" if is_synchronous else "storage, asynchronous",
        code=None,
        snapshot_bytes=0.0 if is_synchronous else cluster.node_bytes,
        parity_bytes=0.0,
        network_bytes=0.0,
        transfer_s=0.0,
        memory_interval_s=interval_s,
        storage_interval_s=interval_s,
        goodput=levels.goodput(interval_s, interval_s),
        losses_per_30_days=rate * 30 * DAY_S,
        levels=levels,
        hazards=(hazard,),
        survival={},
        domain_survival={},
        group_sizes={},
    )


def _domain_sets(cluster: Cluster, code: Code | None) -> list[dict[str, int]]:
    """Of each group how many nodes each domain has, as the real placement makes them; no code: a group a node."""
    domain_of = {f"n{i:05}": f"d{i // cluster.nodes_per_domain}" for i in range(cluster.nodes)}
    if code is None:
        return [{domain: 1} for domain in domain_of.values()]
    members = [
        Member(node=node, host=node, domain=domain, address="", bulk_address="", arena_id="", version="")
        for node, domain in domain_of.items()
    ]
    groups = place(None, members, code).groups
    return [dict(Counter(domain_of[node] for node in group.nodes)) for group in groups]


def _domain_survival(
    cluster: Cluster, code: Code | None, sets: Sequence[Mapping[str, int]], draw: Callable[[], float]
) -> dict[int, tuple[float, bool]]:
    """Nothing where every node is a domain of its own."""
    if code is None or cluster.nodes_per_domain == 1:
        return {}
    names = [f"d{i}" for i in range(cluster.domain_count)]
    losses = [lost for lost in DOMAIN_LOSSES if lost <= len(names)]
    return {lost: domain_survival(_distinct(sets), code, names, lost, draw) for lost in losses}


def _distinct(sets: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    return [dict(items) for items in sorted({tuple(sorted(group.items())) for group in sets})]


def _hazards(
    cluster: Cluster, code: Code | None, sets: Sequence[Mapping[str, int]], transfer_s: float
) -> tuple[Hazard, Hazard, Hazard]:
    """Failures that leave all memory, that lose what parity gives back, and that leave storage only."""
    rate, m = cluster.failure_rate, code.m if code is not None else 0
    wiped = rate * cluster.wipe_share
    lost = (rate - wiped) * cluster.failures.memory_loss_share
    killed = rate - wiped - lost
    pull_s = cluster.node_bytes * (code.k if code is not None else 0) / cluster.network_bytes_per_s
    if code is None:
        beyond, lost = lost + cluster.domain_rate, 0.0
    else:
        window_s = cluster.window_s or cluster.detect_s + pull_s + transfer_s
        sizes = [sum(group.values()) for group in sets]
        beyond = min(lost, loss_rate(sizes, m, node_rate=lost / cluster.nodes, window_s=window_s))
        # A domain that has more of some group than its parity bears takes the memory with it.
        fatal = {domain for group in sets for domain, count in group.items() if count > m}
        fatal_rate = cluster.domain_rate * len(fatal) / cluster.domain_count
        lost += cluster.domain_rate - fatal_rate - beyond
        beyond += fatal_rate
    flush_s = cluster.flush_s
    own = Hazard(
        name="memory stays",
        rate=killed,
        restart_s=cluster.restart_s + cluster.copy_s,
        latency_s=cluster.copy_s,
        interval_s=0.0,
    )
    decoded = Hazard(
        name="parity gives it back",
        rate=max(0.0, lost),
        restart_s=cluster.restart_s + pull_s + cluster.copy_s,
        latency_s=cluster.copy_s + transfer_s,
        interval_s=0.0,
    )
    stored = Hazard(
        name="back to storage",
        rate=wiped + beyond,
        restart_s=cluster.storage_restart_s + flush_s,
        latency_s=flush_s,
        interval_s=0.0,
    )
    return own, decoded, stored


def _timed(
    hazards: tuple[Hazard, Hazard, Hazard], memory_s: float, protected_s: float, storage_s: float
) -> tuple[Hazard, ...]:
    return tuple(
        Hazard(
            name=hazard.name,
            rate=hazard.rate,
            restart_s=hazard.restart_s,
            latency_s=hazard.latency_s,
            interval_s=interval_s,
        )
        for hazard, interval_s in zip(hazards, (memory_s, protected_s, storage_s), strict=True)
    )


def _levels(cluster: Cluster, hazards: tuple[Hazard, Hazard, Hazard], behind_s: float) -> TwoLevels:
    """The two levels of the formula. `behind_s`: how much older than the newest a protected snapshot is on average."""
    own, decoded, stored = hazards
    rate = own.rate + decoded.rate
    own_s = own.restart_s + own.latency_s
    decoded_s = decoded.restart_s + decoded.latency_s + behind_s
    return TwoLevels(
        memory_rate=rate,
        storage_rate=stored.rate,
        memory_stall_s=cluster.stall_s,
        storage_stall_s=cluster.storage_stall_s,
        memory_restart_s=(own.rate * own_s + decoded.rate * decoded_s) / rate if rate else 0.0,
        storage_restart_s=stored.restart_s + stored.latency_s,
    )
