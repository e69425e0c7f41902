"""Bounds of the bulk transport. Each is there so that a peer that is slow, broken or hostile costs a bounded amount."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLimits:
    """All times in seconds."""

    body_bytes_max: int = 64 << 20
    """Of one chunk or fragment; nothing larger is received."""
    connections_max: int = 256
    """Of a server, from all peers together. Each has a thread."""
    connections_per_peer: int = 2
    """Of a client to one peer; more callers wait."""
    requests_ahead: int = 16
    """Requests that a client sends before the first of them is answered."""
    hello_s: float = 10.0
    """For connecting, the TLS handshake and the first frames."""
    idle_s: float = 120.0
    """A server closes a connection on which nothing was asked for so long."""
    stall_s: float = 15.0
    """A frame may take this long, and what its body takes at `bytes_per_s_min`."""
    bytes_per_s_min: float = 1 << 20
    backoff_first_s: float = 0.05
    backoff_max_s: float = 2.0
    """After a failed connection no other is tried for so long, doubling from the first to the most."""

    def frame_s(self, body_bytes: int) -> float:
        """How long a frame may take once it has begun."""
        return self.stall_s + body_bytes / self.bytes_per_s_min
