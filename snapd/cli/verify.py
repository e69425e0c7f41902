"""`snapd verify`: hash every chunk again and name those that are bad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from snapd_proto import admin_pb2, trainer_pb2

from snapd.cli.connect import connected
from snapd.cli.options import GenerationOption, JsonOption, RuntimeDirOption, StepOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import print_json, progress_bar
from snapd.cli.shards import read_layouts
from snapd.cli.tier_source import FromOption
from snapd.cli.tier_verify import verify_stored
from snapd.errors import NotFoundError
from snapd.export.shard_view import contents_of_chunk
from snapd.rpc.local_client import LocalClient
from snapd.units import format_size

_NAMES_SHOWN_MAX = 8


@dataclass(frozen=True, kw_only=True)
class BadChunk:
    """A chunk that is not what its hash says, and what lies in it."""

    rank: int
    chunk: int
    what: str
    contents: Sequence[str]  # names; empty when the layout cannot be read either


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What verifying one snapshot gave."""

    job: str
    generation: int
    step: int
    nbytes: int
    bad: Sequence[BadChunk] = ()
    repaired: Sequence[BadChunk] = ()  # brought back from `source`
    source: str = ""
    why: str = ""  # the bad ones were not brought back
    is_waiting: bool = False  # they may still be: a node does not answer
    fragments: tuple[int, int] = (0, 0)  # parity on this node: hashed, of it bad
    is_gone: bool = False  # a newer one was complete before this one was read


def verify(
    job: Annotated[str, typer.Argument(help="Only this job.", show_default=False)] = "",
    step: StepOption = None,
    generation: GenerationOption = None,
    from_url: FromOption = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="With --from: read and hash every chunk, not only manifests and sizes."),
    ] = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Hash every chunk again; name every bad one: rank, chunk, and the tensors that lie in it."""
    if from_url is not None:
        return verify_stored(from_url, job, step=step, generation=generation, is_deep=deep, as_json=as_json)
    with connected(runtime_dir) as client:
        chosen = [
            snapshot
            for snapshot in client.list_snapshots(job)
            if step in (None, snapshot.step) and generation in (None, snapshot.generation)
        ]
        if not chosen:
            raise NotFoundError("no such snapshot here", hint="snapd ls shows what there is")
        verdicts = [verify_snapshot(client, snapshot, show_progress=not as_json) for snapshot in chosen]
    if as_json:
        print_json([verdict_json(verdict) for verdict in verdicts])
    else:
        for verdict in verdicts:
            print("\n".join(verdict_lines(verdict)))
    if any(verdict.bad for verdict in verdicts):
        return ExitCode.UNUSABLE
    return ExitCode.FOUND_NOTHING if all(verdict.is_gone for verdict in verdicts) else ExitCode.DONE


def verify_snapshot(
    client: LocalClient, summary: admin_pb2.SnapshotSummary, *, show_progress: bool
) -> Verdict:
    """Verify one snapshot, with a progress bar on a terminal."""
    job, generation, step = summary.job, summary.generation, summary.step
    bad: list[BadChunk] = []
    repaired: list[BadChunk] = []
    last = admin_pb2.VerifyProgress()
    try:
        with progress_bar(is_wanted=show_progress) as bar:
            task = bar.add_task(f"verifying {job} step {step}", total=summary.nbytes)
            for message in client.verify(job, step=step, generation=generation):
                last = message
                bar.update(task, completed=last.nbytes_done)
                if last.bad_chunks or last.repaired_chunks:
                    reply = client.get_snapshot(job, step=step, generation=generation)
                    bad += name_bad_chunks(client, reply, last.bad_chunks)
                    repaired += name_bad_chunks(client, reply, last.repaired_chunks)
    except NotFoundError:
        if not bad and not repaired:
            return Verdict(job=job, generation=generation, step=step, nbytes=last.nbytes_done, is_gone=True)
    return Verdict(
        job=job,
        generation=generation,
        step=step,
        nbytes=last.nbytes_done,
        bad=bad,
        repaired=repaired,
        source=last.repaired_from or "other nodes",  # a daemon of before that was known had no other
        why=last.repair,
        is_waiting=last.repair_waits,
        fragments=(last.fragments_checked, last.fragments_bad),
    )


def name_bad_chunks(
    client: LocalClient, reply: admin_pb2.GetSnapshotReply, chunks: Sequence[trainer_pb2.BadChunk]
) -> list[BadChunk]:
    """Say for each bad chunk what lies in it, as far as the layouts can still be read."""
    records = {record.rank: record for record in reply.shards}
    ranks = {chunk.rank for chunk in chunks}
    layouts, _ = read_layouts(client, [records[rank] for rank in ranks if rank in records])
    return [
        BadChunk(
            rank=chunk.rank,
            chunk=chunk.chunk_index,
            what=chunk.what,
            contents=contents_of_chunk(layouts[chunk.rank], records[chunk.rank], chunk.chunk_index)
            if chunk.rank in layouts
            else [],
        )
        for chunk in chunks
    ]


def verdict_lines(verdict: Verdict) -> list[str]:
    """What is printed for one snapshot."""
    head = f"{verdict.job} generation {verdict.generation} step {verdict.step}: "
    if verdict.is_gone:
        return [head + "given up meanwhile, a newer one is complete"]
    head += f"{format_size(verdict.nbytes)} hashed, "
    lines = [head + ("all good" if not verdict.bad and not verdict.repaired else "")]
    if verdict.repaired:
        lines[0] += f"{_chunks(verdict.repaired)} brought back from {verdict.source}"
    if verdict.bad:
        lines[0] += ("; " if verdict.repaired else "") + _chunks(verdict.bad)
    lines += [bad_chunk_line(bad) for bad in [*verdict.repaired, *verdict.bad]]
    if verdict.why:
        lines.append(f"  {'not yet' if verdict.is_waiting else 'not to be'} brought back: {verdict.why}")
    checked, bad_fragments = verdict.fragments
    if checked:
        found = f"{bad_fragments} bad, forgotten and coded again" if bad_fragments else "all good"
        lines.append(f"  {checked} parity fragments on this node hashed, {found}")
    return lines


def _chunks(bad: Sequence[BadChunk]) -> str:
    return f"{len(bad)} bad chunk{'' if len(bad) == 1 else 's'}"


def bad_chunk_line(bad: BadChunk) -> str:
    """One bad chunk: where, what, and whose bytes."""
    names = ", ".join(bad.contents[:_NAMES_SHOWN_MAX]) or "unknown, for the layout cannot be read"
    more = f" and {len(bad.contents) - _NAMES_SHOWN_MAX} more" if len(bad.contents) > _NAMES_SHOWN_MAX else ""
    return f"  rank {bad.rank} chunk {bad.chunk}: {bad.what}; in it: {names}{more}"


def verdict_json(verdict: Verdict) -> dict[str, object]:
    """One snapshot of the JSON."""
    return {
        "job": verdict.job,
        "generation": verdict.generation,
        "step": verdict.step,
        "nbytes": verdict.nbytes,
        "is_gone": verdict.is_gone,
        "bad_chunks": [_chunk_json(bad) for bad in verdict.bad],
        "repaired_chunks": [_chunk_json(bad) for bad in verdict.repaired],
        "repaired_from": verdict.source if verdict.repaired else None,
        "not_repaired": verdict.why or None,
        "repair_waits": verdict.is_waiting,
        "fragments_checked": verdict.fragments[0],
        "fragments_bad": verdict.fragments[1],
    }


def _chunk_json(bad: BadChunk) -> dict[str, object]:
    return {"rank": bad.rank, "chunk": bad.chunk, "what": bad.what, "contents": list(bad.contents)}
