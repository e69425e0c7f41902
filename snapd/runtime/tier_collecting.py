"""One job's garbage in the shared tier, collected in the background by one daemon: the only one of a machine, or where
worlds span nodes the one that is the job's collector.

A second daemon that collects by mistake, or `snapd gc`, does no harm (core/condemning.py). Nobody waits for this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from snapd.errors import InternalError, SnapdError
from snapd.obs.collect_metrics import CollectMetrics
from snapd.peer.deadline import Deadline
from snapd.runtime.faultpoints import point
from snapd.runtime.job import Job
from snapd.runtime.tiers import NodeTier, Trouble, retry_s
from snapd.tier.collecting import Collector, Pass
from snapd.tier.rewriting import RewriteMeans, Rewriter, Rewritten

FIRST_AFTER_S = 30.0  # a daemon that has just begun has more urgent things to do
PAUSE_MIN_S = 0.5


@dataclass(slots=True)
class _Tools:
    """What works on the store as it was opened; what they have read is kept from pass to pass."""

    collector: Collector
    rewriter: Rewriter


class TierCollecting:
    """Of one job on this node. `may_collect`: whether this node does it just now."""

    def __init__(
        self, job: Job, tier: NodeTier, metrics: CollectMetrics, may_collect: Callable[[], bool]
    ) -> None:
        self.job, self.tier = job, tier
        self.trouble: Trouble | None = None
        self.last: Pass | None = None
        self._metrics = metrics
        self._may_collect = may_collect
        self._tools: _Tools | None = None
        self._failures = 0

    async def run(self) -> None:
        """Until the job is removed."""
        rules = self.tier.settings.collect
        pause_s = min(FIRST_AFTER_S, rules.round_s / 4)
        while True:
            await self.job.changes.wait_until(lambda: self.job.is_removed, pause_s)
            if self.job.is_removed:
                return
            if not self._may_collect():
                pause_s = rules.round_s / 4
                continue
            try:
                done, rewritten = await self.tier.flush(self._pass)
            except InternalError:
                raise
            except SnapdError as error:
                if error.kind == "stopping":
                    await asyncio.sleep(PAUSE_MIN_S)
                self._failed(error)
                pause_s = max(retry_s(self._failures), min(60.0, rules.round_s / 4))
                continue
            self._note(done, rewritten)
            await self._doubt(done)
            pause_s = max(PAUSE_MIN_S, min(done.next_s or rules.round_s, rules.round_s))

    async def _doubt(self, done: Pass) -> None:
        """What is called durable was not seen: either it came after the look, or the tier went back in time."""
        flusher, newest = self.job.flusher, max(done.judgement.current, default=None)
        if (
            flusher is not None
            and flusher.durable is not None
            and (newest is None or newest < flusher.durable)
        ):
            await flusher.confirm()

    def _pass(self) -> tuple[Pass, Rewritten]:
        """In a thread of the tier."""
        tools = self._tools = self._tools or self._made()
        done = tools.collector.run()
        return done, tools.rewriter.run(done.sight, done.judgement)

    def _made(self) -> _Tools:
        environment, rules = self.job.context.environment, self.tier.settings.collect
        store, pacer = self.tier.opened(), self.tier.flush_means().write.pacer

        def take(nbytes: int) -> None:
            if pacer is not None:
                pacer.wait_take(nbytes, Deadline(environment.monotonic_s, rules.intent_ttl_s))

        token = environment.random_token()
        means = RewriteMeans(
            store=store,
            random_token=environment.random_token,
            wall_s=environment.wall_s,
            monotonic_s=environment.monotonic_s,
            take=take,
            point=point,
        )
        collector = Collector(store, self.job.name, rules, write_id=token, point=point)
        return _Tools(collector, Rewriter(means, self.job.name, rules))

    def _failed(self, error: SnapdError) -> None:
        self._failures += 1
        self._tools = None
        self._metrics.failures.labels(kind=error.kind).inc()
        if self.trouble is None or self.trouble.kind != error.kind:
            self.job.context.log.warning("gc.paused", job=self.job.name, kind=error.kind, reason=str(error))
        self.trouble = Trouble.of(error)

    def _note(self, done: Pass, rewritten: Rewritten) -> None:
        log, metrics, name = self.job.context.log, self._metrics, self.job.name
        if self.trouble is not None:
            log.info("gc.goes_on", job=name)
        self.trouble, self.last, self._failures = None, done, 0
        metrics.passes.inc()
        metrics.condemned.inc(len(done.condemned))
        metrics.deleted.inc(len(done.deleted))
        metrics.deleted_bytes.inc(done.deleted_nbytes)
        metrics.aborted.inc(done.aborted)
        metrics.rewritten_bytes.inc(rewritten.nbytes)
        metrics.requests.inc(done.requests)
        metrics.stored_bytes.labels(job=name).set(done.stored_nbytes)
        metrics.named_bytes.labels(job=name).set(done.live_nbytes)
        metrics.snapshots.labels(job=name).set(len(done.judgement.current))
        if done.deleted or done.condemned or done.aborted:
            log.info(
                "gc.pass",
                job=name,
                deleted=len(done.deleted),
                deleted_bytes=done.deleted_nbytes,
                condemned=len(done.condemned),
                aborted=done.aborted,
                stored_bytes=done.stored_nbytes,
                requests=done.requests,
            )
        if rewritten.snapshots:
            log.info(
                "gc.rewritten",
                job=name,
                snapshots=len(rewritten.snapshots),
                packs=rewritten.packs,
                bytes=rewritten.nbytes,
                reason=rewritten.plan.reason,
            )
        for problem in (*done.judgement.problems, *rewritten.problems, *filter(None, (done.ended_early,))):
            log.once(f"gc {name} {problem}", "gc.problem", job=name, reason=problem)
