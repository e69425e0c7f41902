"""Who a daemon is towards its peers, and how it judges them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from snapd.core.cluster import NODE_NAME, Token
from snapd.errors import AuthError, FencedError
from snapd.peer.framing import Hello, bad_frame

URI_PREFIX = "snapd-node:"


@dataclass(frozen=True, slots=True)
class Identity:
    """A node and its token, as of now."""

    node: str
    token: Token


class Admit(Protocol):
    """Judges the other end, once its names are checked; at a server before every request."""

    def __call__(self, hello: Hello, certificate_names: tuple[str, ...] | None) -> None:
        """Raise AuthError or FencedError to refuse. Called on the transport's threads."""


class LogOnce(Protocol):
    """`EventLog.once`: tells of a condition on its first occurrence."""

    def __call__(self, key: str, event: str, **fields: str) -> None: ...


def admit_token(current: Callable[[], Token]) -> Admit:
    """The usual `Admit` of a server: refuses another cluster, and epochs older than ours."""

    def admit(hello: Hello, certificate_names: tuple[str, ...] | None) -> None:
        token = current()
        check_cluster(hello, token)
        if hello.epoch < token.epoch:
            raise FencedError(
                f"{hello.node} has an older epoch",
                kind="stale_epoch",
                hint="it catches up when it reads the groups again",
                epoch=hello.epoch,
                current_epoch=token.epoch,
            )

    return admit


def check_cluster(hello: Hello, token: Token) -> None:
    """Raise AuthError (kind `cluster`) for a node of another cluster."""
    if hello.cluster_id != token.cluster_id:
        raise AuthError(
            f"{hello.node} belongs to another cluster",
            kind="cluster",
            hint="one of the two has the address of a machine that is not its own cluster's",
            cluster_id=hello.cluster_id[:64],
            ours=token.cluster_id,
        )


def check_names(hello: Hello, own_node: str, certificate_names: tuple[str, ...] | None) -> None:
    """That the other end means us, and is whom its certificate names.

    Raises:
        AuthError: kind `peer_name`. RemoteProtocolError: kind `frame`: that cannot name a node.
    """
    if NODE_NAME.fullmatch(hello.node) is None:
        raise bad_frame("that cannot name a node")
    if hello.to != own_node:
        raise AuthError(
            f"{hello.node} looks for {hello.to} and found {own_node}",
            kind="peer_name",
            hint="do two nodes announce the same address?",
        )
    check_certificate(hello.node, certificate_names)


def check_certificate(node: str, certificate_names: tuple[str, ...] | None) -> None:
    """Raise AuthError (kind `peer_name`) if there is a certificate and it is not `node`'s."""
    if certificate_names is not None and node not in certificate_names:
        raise AuthError(
            f"the certificate of what calls itself {node} is for {', '.join(certificate_names) or 'nobody'}",
            kind="peer_name",
            hint=f"a node's certificate has its name as DNS name, or {URI_PREFIX}NAME as URI",
        )
