"""The shared tier is opened when the daemon starts, so that a mistake is seen then, not at the first flush."""

from __future__ import annotations

import asyncio

from snapd.errors import SnapdError
from snapd.obs.log import EventLog
from snapd.runtime.tiers import NodeTier, Trouble, retry_s

SILENT_S = 8.0  # longer than a hurried listing takes


async def open_at_start(tier: NodeTier, log: EventLog) -> None:
    """Until it is open, by us or by a job: say why it is not. Nobody waits for it."""
    failures = 0
    while tier.store is None and not tier.is_closing:
        try:
            await _open(tier, log)
        except SnapdError as error:
            if error.kind == "stopping":
                return
            failures += 1
            _tell(tier, log, Trouble.of(error))
            await asyncio.sleep(retry_s(failures))
    tier.trouble = None


async def _open(tier: NodeTier, log: EventLog) -> None:
    """First by a request that is soon given up, then with all patience. A file system that hangs is told, too."""
    for ask in (tier.try_listing, tier.opened):
        asking = asyncio.ensure_future(tier.ask(ask))
        try:
            if not (await asyncio.wait([asking], timeout=SILENT_S))[0]:
                _tell(tier, log, Trouble("store_slow", f"no answer in {SILENT_S:g} s, waiting on"))
            await asking
        finally:
            asking.cancel()


def _tell(tier: NodeTier, log: EventLog, trouble: Trouble) -> None:
    """In the status, and once for each kind in the log."""
    tier.trouble = trouble
    fields = {"url": tier.settings.url, "kind": trouble.kind, "reason": trouble.reason}
    log.once(f"tier unusable {trouble.kind}", "tier.unusable", **fields)
