"""Which failures of a tier pass by themselves, and which stay until a person mends something. Pure.

Whoever has little time left (a daemon that got SIGTERM) asks it: waiting helps against the first kind only. Every kind
that a flush may end with stands here; a test fails when one is missing.
"""

from __future__ import annotations

# Waiting may help: the network, load, other writers, room that a collector makes, memory that is mended.
PASSING = frozenset(
    {
        "store_unreachable", "store_slow", "store_throttled", "store_failing", "store_full", "store_bytes", "object",
        "tier_condemned", "tier_void", "tier_failed", "chunk_digest", "snapshot", "stopping",
    }
)  # fmt: skip

# Waiting cannot help: rights, names, settings, certificates, clocks, what a store is not able to do, objects of others.
LASTING = frozenset(
    {
        "store", "store_library", "store_conditional", "store_tls", "store_credentials", "store_denied",
        "store_clock", "bucket", "disk_in_use", "disk_shared",
        "tier_conflict", "tier_version", "tier_job", "tier_manifest", "tier_manifest_size",
    }
)  # fmt: skip


def may_pass(kind: str) -> bool:
    """Whether another try, seconds later, may go well. Of what is not known it is hoped."""
    return kind not in LASTING
