"""What a commit rests upon, tried out when a store is opened; and which stores are refused for it."""

from __future__ import annotations

from collections.abc import Callable

from snapd.errors import ConfigError
from snapd.store.base import Created, Probe, Store

PROBE = "probe/"


def probe_conditional(
    store: Store, token: str, create: Callable[[str, bytes], Created] | None = None
) -> tuple[bool, list[str]]:
    """(a second creation of a key is refused and changes nothing, problems in words).

    `create`: as the store itself does it, where `store.create` looks before it asks.
    """
    create = create or store.create
    key = f"{PROBE}{token}"
    first, second = f"{token} first".encode(), f"{token} second".encode()
    try:
        if create(key, first) is not Created.OURS:
            return False, [f"{store.description} says that a key which nobody else can know is taken"]
        refused = create(key, second) is Created.ANOTHERS
        is_unchanged = store.read(key, max_nbytes=4096) == first
    finally:
        store.delete([key])
    if refused and is_unchanged:
        return True, []
    return False, [
        f"{store.description} overwrites objects that it was asked to create only if they are not there:"
        " two writers could overwrite one another's commits"
    ]


def check_probe(store: Store, probe: Probe, *, single_writer: bool) -> None:
    """Refuse a store on which commits would not be safe.

    Raises:
        ConfigError: kind `store_conditional`.
    """
    if probe.refuses_existing or single_writer:
        return
    raise ConfigError(
        f"{store.description} cannot hold commits: {probe.problems[0]}",
        kind="store_conditional",
        hint="another store, or tier.single_writer=yes if no two daemons ever write there",
    )
