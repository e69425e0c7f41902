"""`snapd status`: what the daemon holds and whom it serves."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import RenderableType
from snapd_proto import admin_pb2

from snapd.cli.cluster_view import cluster_json, cluster_parts, protection_json
from snapd.cli.connect import connected
from snapd.cli.options import JsonOption, RuntimeDirOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import facts, format_age, print_json, print_parts, table
from snapd.cli.tier_view import (
    disk_facts,
    disk_json,
    flush_json,
    flush_parts,
    job_disk_json,
    tier_facts,
    tier_json,
)
from snapd.errors import NotFoundError
from snapd.units import format_size

JOB_HEADINGS = ("JOB", "GEN", "COMPLETE", "ARENA", "IN USE", "TRAINERS", "PROBLEM")
SESSION_HEADINGS = (
    "JOB", "RANK", "GEN", "PID", "STATE", "CAPTURED", "CHUNKS", "SET ASIDE", "SKIPPED", "DISCARDED",
    "WINDOW",
)  # fmt: skip
RIGHT = (
    "GEN", "ARENA", "IN USE", "TRAINERS", "RANK", "PID", "CAPTURED", "CHUNKS", "SET ASIDE", "SKIPPED",
    "DISCARDED", "WINDOW",
)  # fmt: skip


def status(
    job: Annotated[str, typer.Argument(help="Only this job.", show_default=False)] = "",
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Show the daemon, its jobs, and the trainers that are attached."""
    with connected(runtime_dir) as client:
        reply = client.status(job, ask_peers=True)
    if job and not reply.jobs:
        raise NotFoundError(f"no job {job!r} here", hint="snapd ls shows what there is")
    if as_json:
        print_json(status_json(reply))
        return ExitCode.DONE
    print_parts(*status_tables(reply))
    return ExitCode.DONE


def status_tables(reply: admin_pb2.StatusReply) -> list[RenderableType]:
    """What `snapd status` prints."""
    parts: list[RenderableType] = [facts(daemon_facts(reply))]
    parts += cluster_parts(reply)
    parts += flush_parts(reply)
    if not reply.jobs:
        return [*parts, "", "no jobs"]
    parts += ["", table(JOB_HEADINGS, [job_row(job) for job in reply.jobs], right=RIGHT)]
    rows = [session_row(session) for job in reply.jobs for session in job.sessions]
    if rows:
        parts += ["", table(SESSION_HEADINGS, rows, right=RIGHT)]
    return parts


def daemon_facts(reply: admin_pb2.StatusReply) -> dict[str, str]:
    """The daemon itself, as names and values."""
    limit = f" of at most {format_size(reply.arena_bytes_limit)}" if reply.arena_bytes_limit else ""
    return {
        "daemon": f"snapd {reply.version}, pid {reply.pid}, up {format_age(reply.uptime_s)}",
        "arena": f"{format_size(reply.arena_bytes)}{limit} in {reply.arena_path}",
        "memory": f"{format_size(reply.anonymous_bytes)} beside the arena" if reply.anonymous_bytes else "",
        **(tier_facts(reply.tier) if reply.HasField("tier") else {}),
        **(disk_facts(reply.disk) if reply.HasField("disk") else {}),
    }


def job_row(job: admin_pb2.JobStatus) -> tuple[str, ...]:
    """A row under JOB_HEADINGS."""
    complete = (
        f"step {job.complete_step} (generation {job.complete_generation})" if job.has_complete else "none"
    )
    attached = sum(session.state == "attached" for session in job.sessions)
    return (
        job.job,
        str(job.generation),
        complete,
        format_size(job.arena_bytes),
        format_size(job.arena_bytes_in_use),
        str(attached),
        job.problem,
    )


def session_row(session: admin_pb2.SessionStatus) -> tuple[str, ...]:
    """A row under SESSION_HEADINGS."""
    return (
        session.job,
        f"{session.rank}/{session.world_size}",
        str(session.generation),
        str(session.pid),
        session.state,
        str(session.newest_captured_step) if session.has_captured else "none",
        str(session.chunks_in_use),
        str(session.chunks_set_aside),
        str(session.skipped_steps),
        str(session.discarded_steps),
        f"{session.last_window_s * 1000:.0f} ms" if session.last_window_s > 0 else "",
    )


def status_json(reply: admin_pb2.StatusReply) -> dict[str, object]:
    """What `snapd status --json` prints; sizes in bytes, durations in seconds."""
    return {
        "version": reply.version,
        "pid": reply.pid,
        "uptime_s": reply.uptime_s,
        "arena_bytes": reply.arena_bytes,
        "arena_bytes_limit": reply.arena_bytes_limit or None,
        "arena_path": reply.arena_path,
        "anonymous_bytes": reply.anonymous_bytes,
        "jobs": [job_json(job) for job in reply.jobs],
        "cluster": cluster_json(reply.cluster) if reply.HasField("cluster") else None,
        "tier": tier_json(reply.tier) if reply.HasField("tier") else None,
        "disk": disk_json(reply.disk) if reply.HasField("disk") else None,
    }


def job_json(job: admin_pb2.JobStatus) -> dict[str, object]:
    """One job of the JSON."""
    complete = (
        {"generation": job.complete_generation, "step": job.complete_step} if job.has_complete else None
    )
    return {
        "job": job.job,
        "generation": job.generation,
        "complete": complete,
        "arena_bytes": job.arena_bytes,
        "arena_bytes_in_use": job.arena_bytes_in_use,
        "problem": job.problem or None,
        "sessions": [session_json(session) for session in job.sessions],
        **(protection_json(job) if job.is_clustered else {}),
        **({"flush": flush_json(job.flush)} if job.HasField("flush") else {}),
        **({"disk": job_disk_json(job.disk)} if job.HasField("disk") else {}),
    }


def session_json(session: admin_pb2.SessionStatus) -> dict[str, object]:
    """One session of the JSON."""
    return {
        "session_id": session.session_id,
        "rank": session.rank,
        "world_size": session.world_size,
        "generation": session.generation,
        "pid": session.pid,
        "state": session.state,
        "newest_captured_step": session.newest_captured_step if session.has_captured else None,
        "chunks_in_use": session.chunks_in_use,
        "chunks_set_aside": session.chunks_set_aside,
        "skipped_steps": session.skipped_steps,
        "discarded_steps": session.discarded_steps,
        "last_window_s": session.last_window_s,
    }
