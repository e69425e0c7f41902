"""The checks of `snapd doctor` that concern many nodes: certificates, the coordinator, failure domains, protection."""

from __future__ import annotations

import ssl
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from snapd_proto import admin_pb2

from snapd.cli.checks import Finding, Verdict
from snapd.config_cluster import ClusterConfig, ClusterPlan, plan_cluster
from snapd.errors import ConfigError, SnapdError
from snapd.peer.trust import TrustFiles, load
from snapd.rpc.local_client import LocalClient

EXPIRY_DAYS_MIN = 14
DAY_S = 86400


def cluster_findings(
    config: ClusterConfig, runtime: Path, connect: Callable[[Path], LocalClient] = LocalClient
) -> list[Finding]:
    """Nothing where no coordinator is configured."""
    try:
        plan = plan_cluster(config)
    except ConfigError as error:
        return [Finding(check="cluster", verdict=Verdict.BAD, found=error.message, hint=error.hint)]
    if plan is None:
        return []
    found = [check_certificate(config, plan, time.time())]
    if not (runtime / "handshake.sock").exists():
        return found
    try:
        with connect(runtime) as client:
            reply = client.status(ask_peers=True)
    except SnapdError:
        return found  # the check of the daemon says so
    if not reply.HasField("cluster"):
        hint = "start the daemon again with the same settings as this command"
        return [*found, Finding(check="cluster", verdict=Verdict.BAD, found="the daemon is alone", hint=hint)]
    return [*found, *judge_cluster(reply.cluster)]


def check_certificate(config: ClusterConfig, plan: ClusterPlan, now_s: float) -> Finding:
    """Whether peers would accept this node's files, and for how long."""
    check = "certificate"
    if plan.is_plaintext:
        hint = "`snapd certs` makes certificates; without them anyone on the network can read and forge snapshots"
        return Finding(
            check=check, verdict=Verdict.WARNING, found="none: peers speak in the clear", hint=hint
        )
    try:
        material = load(plan.node, TrustFiles(Path(config.cert), Path(config.key), Path(config.ca)))
    except (ConfigError, ssl.SSLError) as error:
        hint = error.hint if isinstance(error, ConfigError) else "snapd certs show tells more"
        return Finding(check=check, verdict=Verdict.BAD, found=str(error), hint=hint)
    days = (material.not_after_s - now_s) / DAY_S
    found = f"for {', '.join(material.names)}, valid for {days:.0f} days"
    if days < EXPIRY_DAYS_MIN:
        hint = "make a new one with `snapd certs node`; the daemon takes it up without a restart"
        return Finding(check=check, verdict=Verdict.WARNING, found=found, hint=hint)
    return Finding(check=check, verdict=Verdict.GOOD, found=found)


def judge_cluster(cluster: admin_pb2.ClusterStatus) -> list[Finding]:
    """What the daemon's own view of the cluster says."""
    return [_coordinator(cluster), _peers(cluster), _domains(cluster), _protection(cluster)]


def _coordinator(cluster: admin_pb2.ClusterStatus) -> Finding:
    if cluster.distrust:
        hint = "it is rebuilt from the daemons that are alive; `snapd status` names those that are missing"
        return Finding(check="coordinator", verdict=Verdict.BAD, found=cluster.distrust, hint=hint)
    if cluster.is_away:
        found = f"away for {cluster.away_s:.0f} s: {cluster.away_reason}"
        hint = "capturing goes on; nothing new is protected until it answers"
        return Finding(check="coordinator", verdict=Verdict.BAD, found=found, hint=hint)
    found = f"cluster {cluster.cluster_id}, epoch {cluster.epoch}"
    return Finding(check="coordinator", verdict=Verdict.GOOD, found=found)


def _peers(cluster: admin_pb2.ClusterStatus) -> Finding:
    silent = [row for row in cluster.nodes if row.state == "living" and not row.answered]
    if silent:
        found = f"{silent[0].node}: {silent[0].trouble}" + (
            f" and {len(silent) - 1} more" if silent[1:] else ""
        )
        hint = "its address, its port (cluster.listen, and the next for chunks), a firewall, its certificate"
        return Finding(check="peers", verdict=Verdict.BAD, found=found, hint=hint)
    return Finding(
        check="peers", verdict=Verdict.GOOD, found=f"{len(cluster.nodes)} nodes, all that live answer"
    )


def _domains(cluster: admin_pb2.ClusterStatus) -> Finding:
    counts = Counter(row.domain for row in cluster.nodes if row.state == "living")
    found = f"{len(counts)} for {sum(counts.values())} nodes"
    if len(counts) == 1 and sum(counts.values()) > 1:
        hint = "set cluster.domain to the rack: nodes of one domain are expected to fail together"
        return Finding(
            check="failure domains", verdict=Verdict.WARNING, found=f"only {next(iter(counts))}", hint=hint
        )
    return Finding(check="failure domains", verdict=Verdict.GOOD, found=found)


def _protection(cluster: admin_pb2.ClusterStatus) -> Finding:
    if cluster.degraded:
        hint = "add nodes, or ask for a smaller code"
        return Finding(check="protection", verdict=Verdict.WARNING, found=cluster.degraded, hint=hint)
    codes = sorted({group.code for group in cluster.groups})
    groups = f"{len(cluster.groups)} group{'s' * (len(cluster.groups) != 1)}"
    found = f"{groups} with {', '.join(codes) or 'none'}"
    return Finding(check="protection", verdict=Verdict.GOOD, found=found)
