"""The node's shared tier: its store, opened and probed beside the loop, its threads, and what they may take.

A store that is away, full or refuses us never reaches training: whatever waits for it waits here, in its own threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from snapd.codec.compress import Mode
from snapd.core.condemning import CollectRules
from snapd.core.flushing import FlushRules
from snapd.core.ids import SnapshotId
from snapd.core.tier_keys import TierKeys
from snapd.errors import SnapdError, UnavailableError
from snapd.obs.log import EventLog
from snapd.obs.tier_metrics import TierMetrics
from snapd.peer.rate import Pacer
from snapd.runtime.context import Environment
from snapd.runtime.faultpoints import point
from snapd.runtime.tier_threads import TierThreads
from snapd.store.base import Store
from snapd.store.probing import PROBE, check_probe
from snapd.tier.flush import FlushMeans
from snapd.tier.known_chunks import committed_snapshots, newest_good
from snapd.tier.writing import Compressing, WriteMeans
from snapd.units import MIB

PACKERS = 2  # packs at once; each upload has `tier.concurrency` requests in flight
BURST_BYTES = 16 * MIB
SKEW_TOLD_S = 60.0
RETRY_FIRST_S = 0.5
RETRY_MAX_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSettings:
    """What the node needs of `[tier]`. `open`: makes the store, asks nothing of it; `open_hurried`: one whose requests
    are given up within seconds. `rate`: bytes a second, 0: any.
    """

    url: str
    open: Callable[[], Store]
    open_hurried: Callable[[], Store]
    rules: FlushRules
    compression: str
    rate: int
    single_writer: bool
    intent_ttl_s: float
    gc_every_s: float
    grace_s: float
    collect: CollectRules


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a level does not go on: a stable kind, and words."""

    kind: str
    reason: str

    @classmethod
    def of(cls, error: SnapdError) -> Trouble:
        return cls(error.kind, error.message + (f" ({error.hint})" if error.hint else ""))


@dataclass(frozen=True, slots=True)
class TierView:
    """What a tier has of a job. `highest_generation`: of anything, committed or not; 0: nothing."""

    highest_generation: int
    newest: SnapshotId | None


class NodeTier(TierThreads):
    """One per daemon with a shared tier. On the event loop; what blocks runs in its threads."""

    def __init__(
        self, settings: TierSettings, environment: Environment, log: EventLog, metrics: TierMetrics, node: str
    ) -> None:
        super().__init__("tier", "tier.failed", log, packers=PACKERS)
        self.settings = settings
        self.metrics = metrics
        self.compressing = Compressing(Mode(settings.compression))
        self._environment, self.node = environment, node
        self._pacer = (
            Pacer(environment.monotonic_s, float(settings.rate), BURST_BYTES) if settings.rate else None
        )
        self._opening = threading.Lock()
        self._store: Store | None = None
        self._hurried: Store | None = None
        self.trouble: Trouble | None = None  # of a store that was not opened yet: see tier_opening.py
        self.is_closing = False

    @property
    def store(self) -> Store | None:
        """None: it was not opened yet, or could not be."""
        return self._store

    @property
    def compression(self) -> str:
        """Whether chunks are compressed now, and why, in words."""
        is_on, reason = self.compressing.decide()
        return f"{'on' if is_on else 'off'}: {reason}"

    # the store

    def opened(self) -> Store:
        """The store, opened and probed. Blocking; from the tier's own threads.

        Raises: ConfigError: kind `store_conditional`, ...; and what a store raises.
        """
        with self._opening:
            if self._store is not None:
                return self._store
            if self.is_closing:
                raise UnavailableError("the daemon is stopping", kind="stopping")
            store = self.settings.open()
            try:
                probe = store.probe()
                check_probe(store, probe, single_writer=self.settings.single_writer)
            except SnapdError:
                store.close()
                raise
            self._store = store
        self._log.info(
            "tier.opened",
            store=store.description,
            refuses_existing=probe.refuses_existing,
            keeps_checksums=probe.keeps_checksums,
            skew_s=round(probe.skew_s, 3),
        )
        for problem in probe.problems:
            self._log.once(f"tier {problem}", "tier.warning", store=store.description, reason=problem)
        if abs(probe.skew_s) > SKEW_TOLD_S:
            reason = f"the store's clock is {probe.skew_s:.0f} s off ours: it is the store's that counts"
            self._log.once("tier skew", "tier.warning", store=store.description, reason=reason)
        return store

    def try_listing(self) -> None:
        """See whether the store answers, without the patience of `opened`. Blocking, for seconds.

        Raises: what a store raises.
        """
        self._hurried = store = self.settings.open_hurried()
        try:
            next(iter(store.list(PROBE)), None)
        finally:
            store.close()

    def flush_means(self) -> FlushMeans:
        """Blocking, as `opened`."""
        environment = self._environment
        write = WriteMeans(
            store=self.opened(),
            packers=self.packing,
            packers_max=PACKERS,
            compressing=self.compressing,
            pacer=self._pacer,
            monotonic_s=environment.monotonic_s,
            point=point,
        )
        return FlushMeans(
            write=write,
            ttl_s=self.settings.intent_ttl_s,
            round_s=self.settings.gc_every_s,
            wall_s=environment.wall_s,
            random_token=environment.random_token,
        )

    def view(self, job: str) -> TierView:
        """What the tier has of a job. Blocking."""
        store, keys = self.opened(), TierKeys(job)
        committed = committed_snapshots(store, keys)
        manifests = (keys.shard_of(info.key) for info in store.list(keys.shards))
        generations = [each[0].generation for each in manifests if each is not None]
        record = newest_good(store, keys, committed)
        return TierView(
            max([*generations, *(snapshot.generation for snapshot in committed)], default=0),
            record.id if record is not None else None,
        )

    def newest_listed(self, job: str) -> SnapshotId | None:
        """The newest snapshot of a job that has a commit record, good or not. One listing, blocking."""
        return max(committed_snapshots(self.opened(), TierKeys(job)), default=None)

    def count_requests(self) -> dict[str, int]:
        """By kind, since the store was opened; the metrics follow."""
        store = self._store
        if store is None:
            return {}
        requests = store.requests
        count = dict(requests.count)
        self.metrics.tell_requests(
            count,
            sent_nbytes=requests.sent_nbytes,
            received_nbytes=requests.received_nbytes,
            retries=requests.retries,
        )
        return count

    def close(self, wait_s: float) -> bool:
        """Let go of the store, so that nobody waits for it any more, and join the threads. Blocking, for at most
        `wait_s`; False: some still hang in a request that cannot be called off.
        """
        self.is_closing = True
        for store in (self._store, self._hurried):
            if store is not None:
                store.close()
        return super().close(wait_s)


def retry_s(failures: int) -> float:
    """How long to wait after so many failures in a row (>= 1)."""
    return min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(failures - 1, 16))
