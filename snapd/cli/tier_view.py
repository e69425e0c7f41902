"""The shared tier and the jobs' way to it, as `snapd status` and `snapd top` show them."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import RenderableType
from snapd_proto import admin_pb2

from snapd.cli.output import format_age, table
from snapd.units import format_size

FLUSH_HEADINGS = ("JOB", "DURABLE", "BEHIND", "LAST", "STORED", "REUSED", "REQUESTS", "PER GB", "TIER")
FLUSH_RIGHT = ("BEHIND", "LAST", "STORED", "REUSED", "REQUESTS", "PER GB")


def tier_facts(tier: admin_pb2.TierStatus) -> dict[str, str]:
    """The tier itself, as names and values."""
    asked = sum(tier.requests.values())
    traffic = (
        f"{asked} requests, {format_size(tier.sent_nbytes)} sent, {format_size(tier.received_nbytes)} received"
        if tier.is_open
        else f"CANNOT BE OPENED: {tier.trouble} [{tier.trouble_kind}]"
        if tier.trouble
        else "not opened yet"
    )
    repeated = f", {tier.retries} repeated" if tier.retries else ""
    return {"tier": f"{tier.url}; {traffic}{repeated}", "compression": tier.compression}


def flush_parts(reply: admin_pb2.StatusReply) -> list[RenderableType]:
    """A table with a row for each job; nothing where there is no shared tier."""
    jobs = [job for job in reply.jobs if job.HasField("flush")]
    return ["", table(FLUSH_HEADINGS, [_row(job) for job in jobs], right=FLUSH_RIGHT)] if jobs else []


def _row(job: admin_pb2.JobStatus) -> tuple[str, ...]:
    flush = job.flush
    durable = (
        f"step {flush.durable_step} (generation {flush.durable_generation})" if flush.has_durable else "none"
    )
    last = flush.last
    text = flush.reason
    if flush.nbytes_total:
        text += f", {format_size(flush.nbytes_done)} of {format_size(flush.nbytes_total)}"
    if not flush.HasField("last"):
        return (job.job, durable, format_age(flush.behind_s), "", "", "", "", "", text)
    return (
        job.job,
        durable,
        format_age(flush.behind_s),
        f"{last.seconds:.1f} s",
        format_size(last.stored_nbytes),
        format_size(last.reused_nbytes),
        str(sum(last.requests.values())),
        f"{last.requests_per_gb:.1f}",
        text,
    )


def tier_json(tier: admin_pb2.TierStatus) -> dict[str, object]:
    """The tier part of the JSON."""
    return {
        "url": tier.url,
        "is_open": tier.is_open,
        "trouble": {"kind": tier.trouble_kind, "reason": tier.trouble} if tier.trouble else None,
        "compression": tier.compression,
        "requests": _counts(tier.requests),
        "retries": tier.retries,
        "sent_nbytes": tier.sent_nbytes,
        "received_nbytes": tier.received_nbytes,
    }


def flush_json(flush: admin_pb2.FlushStatus) -> dict[str, object]:
    """What a job's JSON says of its way to the tier; sizes in bytes, durations in seconds."""
    last = flush.last
    return {
        "durable": {"generation": flush.durable_generation, "step": flush.durable_step}
        if flush.has_durable
        else None,
        "reason": flush.reason,
        "pause": flush.pause or None,
        "behind_s": flush.behind_s,
        "nbytes_done": flush.nbytes_done,
        "nbytes_total": flush.nbytes_total,
        "last": {
            "generation": last.generation,
            "step": last.step,
            "written_nbytes": last.written_nbytes,
            "stored_nbytes": last.stored_nbytes,
            "reused_nbytes": last.reused_nbytes,
            "packs": last.packs,
            "seconds": last.seconds,
            "requests": _counts(last.requests),
            "requests_per_gb": last.requests_per_gb,
        }
        if flush.HasField("last")
        else None,
    }


def _counts(requests: Mapping[str, int]) -> dict[str, int]:
    return {kind: requests[kind] for kind in sorted(requests)}
