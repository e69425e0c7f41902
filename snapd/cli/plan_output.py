"""Rows, facts and JSON of `snapd plan`."""

from __future__ import annotations

from collections.abc import Sequence

from snapd.cli.plan_trial import Agreement
from snapd.core.planning import DOMAIN_LOSSES, LOSSES, Cluster, Plan
from snapd.units import format_size

PLAN_HEADINGS = (
    "SCHEME", "SNAPSHOTS", "PARITY", "NETWORK", "EVERY", "STEPS", "PROTECTED", "STORED", "GOODPUT", "TO STORAGE",
)  # fmt: skip
CHECK_HEADINGS = ("SCHEME", "QUANTITY", "FORMULA", "MONTE CARLO", "+/-", "")


def cluster_facts(cluster: Cluster) -> dict[str, str]:
    """What was assumed."""
    rate = cluster.failures.per_1000_node_days
    mtbf_s = 1 / (cluster.failure_rate + cluster.domain_rate)
    share = f"{100 * cluster.failures.memory_loss_share:.3g} % lose a node's memory"
    return {
        "nodes": f"{cluster.nodes} in {cluster.domain_count} domains of {cluster.nodes_per_domain}",
        "failures": f"{rate:g} per 1,000 node-days, one every {format_time(mtbf_s)}; {share}, "
        f"{100 * cluster.wipe_share:.3g} % all memory",
        "source": cluster.failures.source,
        "state": f"{format_size(round(cluster.state_bytes))}, {format_size(round(cluster.node_bytes))} a node",
        "copy": f"{format_time(cluster.copy_s)} a snapshot; storing one takes {format_time(cluster.flush_s)}",
    }


def plan_row(cluster: Cluster, plan: Plan) -> tuple[str, ...]:
    """A row under PLAN_HEADINGS: sizes of one node, NETWORK sent by one node for each snapshot."""
    return (
        plan.name,
        format_size(round(plan.snapshot_bytes)) if plan.snapshot_bytes else "",
        format_size(round(plan.parity_bytes)) if plan.parity_bytes else "",
        f"{format_size(round(plan.network_bytes))} in {format_time(plan.transfer_s)}"
        if plan.network_bytes
        else "",
        format_time(plan.memory_interval_s),
        str(round(plan.memory_interval_s / cluster.step_s)),
        format_time(plan.protected_interval_s) if plan.protected_interval_s else "",
        format_time(plan.storage_interval_s),
        f"{plan.goodput:.4f}",
        f"{plan.losses_per_30_days:.3g} in 30 d",
    )


def survival_headings(plans: Sequence[Plan]) -> tuple[str, ...]:
    """Only what some plan has a figure for."""
    nodes = [_lost(lost, "node") for lost in LOSSES if any(lost in plan.survival for plan in plans)]
    domains = [
        _lost(lost, "domain") for lost in DOMAIN_LOSSES if any(lost in plan.domain_survival for plan in plans)
    ]
    return ("CODE", "GROUPS", *nodes, *domains)


def _lost(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count > 1)}"


def survival_row(plan: Plan, headings: Sequence[str]) -> tuple[str, ...]:
    """A row under these headings."""
    groups = ", ".join(f"{count} of {size}" for size, count in plan.group_sizes.items())
    figures = {_lost(lost, "node"): format_probability(p) for lost, p in plan.survival.items()}
    figures |= {
        _lost(lost, "domain"): ("" if is_exact else "~") + format_probability(p)
        for lost, (p, is_exact) in plan.domain_survival.items()
    }
    return (plan.name, groups, *(figures.get(heading, "") for heading in headings[2:]))


def agreement_row(found: Agreement) -> tuple[str, ...]:
    """A row under CHECK_HEADINGS."""
    return (
        found.plan,
        found.quantity,
        f"{found.formula:.4f}",
        f"{found.found.mean:.4f}",
        f"{found.found.half_width:.4f}",
        "agrees" if found.agrees else "DIFFERS",
    )


def format_probability(p: float) -> str:
    """Four digits; near 1 what is missing: "0.9945", "1-4e-05"."""
    if 0 < 1 - p < 1e-4:
        return f"1-{1 - p:.0e}"
    return f"{p:.4g}" if p in (0.0, 1.0) else f"{p:.4f}"


def format_time(seconds: float) -> str:
    """Three digits or so: "0.63 s", "47 s", "24.6 min", "3.09 h"."""
    for limit, unit, size in ((120.0, "s", 1.0), (7200.0, "min", 60.0), (172_800.0, "h", 3600.0)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} d"


def plan_json(cluster: Cluster, plan: Plan) -> dict[str, object]:
    """One plan of the JSON: bytes of one node, seconds, probabilities by number of losses."""
    return {
        "name": plan.name,
        "code": str(plan.code) if plan.code is not None else None,
        "snapshot_bytes": round(plan.snapshot_bytes),
        "parity_bytes": round(plan.parity_bytes),
        "network_bytes": round(plan.network_bytes),
        "transfer_s": plan.transfer_s,
        "interval_s": plan.memory_interval_s,
        "interval_steps": round(plan.memory_interval_s / cluster.step_s),
        "protected_interval_s": plan.protected_interval_s or None,
        "storage_interval_s": plan.storage_interval_s,
        "goodput": plan.goodput,
        "storage_restores_per_30_days": plan.losses_per_30_days,
        "groups": {str(size): count for size, count in plan.group_sizes.items()},
        "survival_by_nodes_lost": {str(lost): p for lost, p in plan.survival.items()},
        "survival_by_domains_lost": {
            str(lost): {"probability": p, "is_exact": is_exact}
            for lost, (p, is_exact) in plan.domain_survival.items()
        },
    }


def agreement_json(found: Agreement) -> dict[str, object]:
    """One comparison of the JSON."""
    return {
        "name": found.plan,
        "quantity": found.quantity,
        "formula": found.formula,
        "monte_carlo": found.found.mean,
        "half_width": found.found.half_width,
        "agrees": found.agrees,
    }
