"""`[cluster]`: many nodes that protect one another. Without a coordinator nothing of it is started."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from snapd.core.addresses import PORT_MAX, is_loopback, join, split
from snapd.core.cluster import Code, Seed, checked_node_name
from snapd.errors import ConfigError
from snapd.settings import setting
from snapd.units import MIB

ETCD = ("etcd://", "etcds://")
LEADER = "leader"
DNS = "dns:"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Many nodes that protect one another."""

    coordinator: str = setting(
        "",
        "text",
        "Where the cluster agrees: `etcd://HOST:PORT,...` (`etcds://` with TLS); `leader` (this daemon keeps it,"
        " for a few nodes); or where the leader is: [NODE@]HOST:PORT of one or several daemons (comma-separated), or"
        " `dns:NAME:PORT` for all addresses of a name. Empty: one machine, alone. etcd survives any node.",
    )
    name: str = setting(
        "snapd",
        "text",
        "Name of the cluster in the coordinator's store. Several clusters can share one store.",
    )
    node: str = setting("", "text", "This node's name, one of a kind. Empty: the host's name.")
    host: str = setting(
        "", "text", "Name of the machine: two daemons of one host share its fate. Empty: the host's name."
    )
    domain: str = setting(
        "",
        "text",
        "Failure domain: what fails together, a rack or a switch. Empty: the host. Groups take one node per domain"
        " where they can.",
    )
    code: str = setting(
        "6+2",
        "text",
        "K+M: groups of K + M nodes lose nothing when any M of them are lost, at M/K of the state in memory. Fewer"
        " nodes get the best that they allow, and `status` says so.",
    )
    listen: str = setting(
        "", "text", "HOST:PORT for other daemons. Empty: port 7421 on the address that `advertise` names."
    )
    advertise: str = setting(
        "", "text", "HOST under which others reach this node. Empty: that of `listen`, or the host's name."
    )
    bulk_port: int = setting(
        0, "port", "Port of the side channel for chunks; 0: the port after `listen`'s.", low=0, high=PORT_MAX
    )
    bulk: str = setting(
        "tls",
        "choice",
        "How chunks travel: `tls`; `plain` (no encryption: a trusted fabric, several times faster); `grpc` (slow,"
        " through one port only).",
        choices=("tls", "plain", "grpc"),
    )
    cert: str = setting("", "text", "This node's certificate (PEM). Its names must contain the node's.")
    key: str = setting("", "text", "The certificate's private key (PEM, mode 0600).")
    ca: str = setting("", "text", "The cluster's certificate authority (PEM).")
    etcd_user: str = setting(
        "", "text", "User at etcd, where it asks for one; its role needs the cluster's prefix."
    )
    etcd_password_file: str = setting("", "text", "File with that user's password.")
    plaintext: str = setting(
        "no",
        "switch",
        "Speak without certificates also beyond loopback. Anyone on the network can then read and forge snapshots.",
        choices=("no", "yes"),
    )
    allow_same_host: str = setting(
        "no", "switch", "Several daemons of one host in a cluster, for tests only.", choices=("no", "yes")
    )
    lease: float = setting(
        5.0,
        "duration",
        "A node that is silent for so long counts as absent. Shorter notices sooner and costs the coordinator more.",
        low=0.5,
        high=600,
    )
    lost_after: float = setting(
        30.0,
        "duration",
        "An absent node is given up after so long: its place goes to another, restores do not wait for it.",
        low=1,
        high=86400,
    )
    rate: int = setting(
        256 * MIB,
        "size",
        "Bytes a second that protection may send from this node, and receive; 0: as many as there are. Less leaves"
        " the network to training, more protects sooner.",
        low=0,
        high=1 << 40,
    )
    restore_wait: float = setting(
        60.0,
        "duration",
        "How long a restore waits for nodes that do not answer and may hold a newer snapshot, before it fails and"
        " names them.",
        low=0,
        high=86400,
    )
    inflight: int = setting(
        256 * MIB,
        "size",
        "Memory beside the arena that coding may use at once. More keeps more peers busy.",
        low=16 * MIB,
        high=1 << 36,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """A checked ClusterConfig: what the daemon starts."""

    coordinator: str
    etcd_endpoints: tuple[str, ...]
    seeds: tuple[Seed, ...]
    is_leader: bool
    name: str
    node: str
    host: str
    domain: str
    code: Code
    listen_host: str
    port: int
    bulk_port: int
    advertise: str
    bulk: str
    is_plaintext: bool

    @property
    def address(self) -> str:
        return join(self.advertise, self.port)

    @property
    def bulk_address(self) -> str:
        return join(self.advertise, self.bulk_port)


DEFAULT_PORT = 7421


def plan_cluster(config: ClusterConfig, hostname: str | None = None) -> ClusterPlan | None:
    """Check `[cluster]`; None when there is no coordinator.

    Raises:
        ConfigError: one clear line on what is wrong.
    """
    if not config.coordinator:
        return None
    own = socket.gethostname() if hostname is None else hostname
    host, port = (
        split(config.listen, "cluster.listen") if config.listen else (config.advertise or own, DEFAULT_PORT)
    )
    bulk_port = config.bulk_port or port + 1
    if bulk_port > PORT_MAX or bulk_port == port:
        raise ConfigError(f"cluster.bulk_port = {bulk_port}: must be another port", kind="address")
    node = checked_node_name(config.node or own)
    machine = config.host or own
    is_plain = not (config.cert or config.key or config.ca)
    plan = ClusterPlan(
        coordinator=config.coordinator,
        etcd_endpoints=_endpoints(config.coordinator),
        seeds=_seeds(config.coordinator),
        is_leader=config.coordinator == LEADER,
        name=checked_node_name(config.name),
        node=node,
        host=machine,
        domain=config.domain or machine,
        code=Code.parse(config.code),
        listen_host=host,
        port=port,
        bulk_port=bulk_port,
        advertise=config.advertise or (own if host in ("0.0.0.0", "::") else host),
        bulk="plain" if is_plain and config.bulk == "tls" else config.bulk,
        is_plaintext=is_plain,
    )
    _check_trust(config, plan)
    return plan


def _endpoints(coordinator: str) -> tuple[str, ...]:
    if not coordinator.startswith(ETCD):
        return ()
    endpoints = tuple(filter(None, coordinator.partition("://")[2].split(",")))
    for endpoint in endpoints:
        split(endpoint, "cluster.coordinator")
    if not endpoints:
        raise ConfigError(
            "cluster.coordinator names no etcd endpoint", kind="address", hint="etcd://HOST:PORT,..."
        )
    return endpoints


def _seeds(coordinator: str) -> tuple[Seed, ...]:
    """Daemons that may be the leader: `[NODE@]HOST:PORT,...`, `dns:NAME:PORT`.

    A seed's certificate must name its node, by default its host.
    """
    if coordinator == LEADER or coordinator.startswith(ETCD):
        return ()
    found: list[Seed] = []
    for item in filter(None, (part.strip() for part in coordinator.split(","))):
        is_dns = item.startswith(DNS)
        node, _, address = item.removeprefix(DNS).rpartition("@")
        host, _ = split(address, "cluster.coordinator")
        found.append(Seed(checked_node_name(node) if node else host, address, is_dns))
    if not found:
        raise ConfigError("cluster.coordinator names nobody", kind="address", hint="HOST:PORT of the leader")
    return tuple(found)


def _check_trust(config: ClusterConfig, plan: ClusterPlan) -> None:
    if not plan.is_plaintext and not (config.cert and config.key and config.ca):
        missing = [name for name in ("cert", "key", "ca") if not getattr(config, name)]
        raise ConfigError(
            f"cluster.{' and cluster.'.join(missing)} missing: certificate, key and authority go together",
            kind="tls",
            hint="`snapd certs` makes them",
        )
    if plan.is_plaintext and config.plaintext != "yes" and not is_loopback(plan.advertise):
        raise ConfigError(
            f"node {plan.node} would speak without certificates on {plan.address}",
            kind="plaintext",
            hint="give cluster.cert, cluster.key and cluster.ca (`snapd certs` makes them), or cluster.plaintext=yes"
            " on a network that nobody else can reach",
        )
