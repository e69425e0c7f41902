"""The shared tier and the jobs' way to it, as `snapd status` and `snapd top` show them."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import RenderableType
from snapd_proto import admin_pb2

from snapd.cli.output import format_age, table
from snapd.units import format_size

FLUSH_HEADINGS = ("JOB", "DURABLE", "BEHIND", "LAST", "STORED", "REUSED", "REQUESTS", "PER GB", "TIER")
DISK_HEADINGS = ("JOB", "ON DISK", "BEHIND", "LAST", "STORED", "REUSED", "DISK")
DISK_RIGHT = ("BEHIND", "LAST", "STORED", "REUSED")
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


def disk_facts(disk: admin_pb2.TierStatus) -> dict[str, str]:
    """The node's own disk, as a name and a value."""
    if not disk.is_open:
        why = f"CANNOT BE ASKED: {disk.trouble} [{disk.trouble_kind}]" if disk.trouble else "not opened yet"
        return {"node's disk": f"{disk.url}; {why}"}
    return {"node's disk": f"{disk.url}; {scrub_text(disk.scrub)}"}


def scrub_text(scrub: admin_pb2.DiskScrub) -> str:
    """How long ago what is kept was read again, and what was bad."""
    if not scrub.period_s:
        text = "never read again (tier.node_scrub = 0)"
    elif scrub.has_oldest:
        text = f"all of {format_size(scrub.nbytes)} verified within the last {format_age(scrub.oldest_s)}"
    elif scrub.nbytes:
        text = f"{format_size(scrub.fresh_nbytes)} of {format_size(scrub.nbytes)} verified since the start"
    else:
        text = "nothing is kept"
    return f"{text}; {_damaged(scrub.bad_count)}" if scrub.bad_count else text


def _damaged(count: int) -> str:
    return f"DAMAGED in {count} place{'s' * (count != 1)}"


def flush_parts(reply: admin_pb2.StatusReply) -> list[RenderableType]:
    """A table for each tier, with a row for each job; nothing where there is no tier."""
    parts: list[RenderableType] = []
    jobs = [job for job in reply.jobs if job.HasField("flush")]
    if jobs:
        parts += ["", table(FLUSH_HEADINGS, [_row(job) for job in jobs], right=FLUSH_RIGHT)]
    jobs = [job for job in reply.jobs if job.HasField("disk")]
    if jobs:
        parts += ["", table(DISK_HEADINGS, [_disk_row(job) for job in jobs], right=DISK_RIGHT)]
    return parts


def _disk_row(job: admin_pb2.JobStatus) -> tuple[str, ...]:
    durable, text = _said(job.disk)
    if job.disk.bad_count:
        text = f"{_damaged(job.disk.bad_count)}: {job.disk.bad_reason}; {text}"
    last, behind = job.disk.last, format_age(job.disk.behind_s)
    if not job.disk.HasField("last"):
        return (job.job, durable, behind, "", "", "", text)
    stored, reused = format_size(last.stored_nbytes), format_size(last.reused_nbytes)
    return (job.job, durable, behind, f"{last.seconds:.1f} s", stored, reused, text)


def _said(flush: admin_pb2.FlushStatus) -> tuple[str, str]:
    """(what is there, what is being done or why not)."""
    durable = (
        f"step {flush.durable_step} (generation {flush.durable_generation})" if flush.has_durable else "none"
    )
    text = flush.reason
    if flush.nbytes_total:
        text += f", {format_size(flush.nbytes_done)} of {format_size(flush.nbytes_total)}"
    return durable, text


def _row(job: admin_pb2.JobStatus) -> tuple[str, ...]:
    flush = job.flush
    durable, text = _said(flush)
    last = flush.last
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


def disk_json(disk: admin_pb2.TierStatus) -> dict[str, object]:
    """The node's own disk in the JSON."""
    scrub = disk.scrub
    return {
        "folder": disk.url,
        "is_open": disk.is_open,
        "trouble": {"kind": disk.trouble_kind, "reason": disk.trouble} if disk.trouble else None,
        "scrub": {
            "period_s": scrub.period_s or None,
            "nbytes": scrub.nbytes,
            "fresh_nbytes": scrub.fresh_nbytes,
            "oldest_s": scrub.oldest_s if scrub.has_oldest else None,
            "bad_count": scrub.bad_count,
        },
    }


def job_disk_json(disk: admin_pb2.FlushStatus) -> dict[str, object]:
    """What a job's JSON says of the node's own disk."""
    return {**flush_json(disk), "bad_count": disk.bad_count, "bad_reason": disk.bad_reason or None}


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
