"""`snapd drain`: empty a node of the cluster before its maintenance; or have a job's newest snapshot become durable."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from snapd_proto import admin_pb2

from snapd.cli.connect import connected
from snapd.cli.options import JsonOption, RuntimeDirOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import print_json
from snapd.errors import ConfigError
from snapd.rpc.local_client import LocalClient

POLL_S = 0.5
FLUSH_ASK_S = 2.0


def drain(
    node: Annotated[
        str, typer.Option("--node", help="The node, as `snapd status` names it.", show_default=False)
    ] = "",
    job: Annotated[
        str,
        typer.Option(
            "--job",
            help="Have this job's newest snapshot become durable in the shared tier.",
            show_default=False,
        ),
    ] = "",
    timeout: Annotated[
        float,
        typer.Option("--timeout", help="With --job: seconds to wait for it; 0 only asks for it.", min=0),
    ] = 600.0,
    undo: Annotated[bool, typer.Option("--undo", help="It stays after all, and gets a place again.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the node may be taken away.")] = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Move a node's share to the others, and say when it may be taken away; asked again, it says how far it is. With
    --job: have the job's newest complete snapshot become durable now.
    """
    if bool(node) == bool(job):
        raise ConfigError("either --node or --job is needed, and not both", kind="arguments")
    if job:
        with connected(runtime_dir) as client:
            return _flush(client, job, timeout, as_json=as_json)
    with connected(runtime_dir) as client:
        reply = client.drain(node, undo=undo)
        if wait and not undo:
            reply = _wait(client, reply, is_telling=not as_json)
    if as_json:
        print_json(drain_json(reply))
    else:
        print(drain_line(reply))
        if reply.warning:
            typer.echo(f"snapd: {reply.warning}", err=True)
    if not reply.is_member and reply.is_asked:
        return ExitCode.UNREACHABLE
    return ExitCode.DONE


def _flush(client: LocalClient, job: str, timeout_s: float, *, as_json: bool) -> ExitCode:
    """Until the snapshot is durable, the tier refuses it in a way that waiting does not mend, or the time is over; says
    what it waits for whenever that changes.
    """
    until_s = time.monotonic() + timeout_s
    told, is_again = "", False
    while True:
        left_s = max(0.0, until_s - time.monotonic())
        reply = client.flush(job, timeout_s=min(left_s, FLUSH_ASK_S), is_again=is_again)
        if reply.is_durable or reply.is_refused or left_s <= FLUSH_ASK_S:
            break
        is_again = True
        if not as_json and reply.reason != told:
            told = reply.reason
            typer.echo(f"step {reply.step} is not durable yet: {told}", err=True)
    if as_json:
        print_json(flush_reply_json(job, reply))
    elif reply.is_durable:
        print(f"step {reply.step} (generation {reply.generation}) of {job} is durable")
    else:
        state = "does not become durable" if reply.is_refused else "is not durable yet"
        print(f"step {reply.step} (generation {reply.generation}) of {job} {state}: {reply.reason}")
    return ExitCode.DONE if reply.is_durable or not timeout_s else ExitCode.UNREACHABLE


def flush_reply_json(job: str, reply: admin_pb2.FlushReply) -> dict[str, object]:
    """What `--job --json` prints."""
    return {
        "job": job,
        "is_durable": reply.is_durable,
        "generation": reply.generation,
        "step": reply.step,
        "reason": reply.reason,
        "pause": reply.pause or None,
        "is_refused": reply.is_refused,
    }


def _wait(client: LocalClient, reply: admin_pb2.DrainReply, *, is_telling: bool) -> admin_pb2.DrainReply:
    """Until it is drained, gone, or has been told to stay; says what it waits for whenever that changes."""
    told = ""
    while not reply.is_drained and reply.is_member and reply.is_asked:
        if is_telling and reply.waits_for != told:
            told = reply.waits_for
            typer.echo(drain_line(reply), err=True)
        time.sleep(POLL_S)
        reply = client.drain(reply.node, is_question=True)
    return reply


def drain_line(reply: admin_pb2.DrainReply) -> str:
    """How far the node is, on one line."""
    if not reply.is_asked:
        return f"{reply.node} stays"
    if reply.is_drained:
        return f"{reply.node} is drained: it may be taken away"
    return f"{reply.node} is draining, do not take it away yet; it waits for: {reply.waits_for}"


def drain_json(reply: admin_pb2.DrainReply) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "node": reply.node,
        "is_draining": reply.is_asked,
        "is_member": reply.is_member,
        "is_drained": reply.is_drained,
        "waits_for": reply.waits_for or None,
        "warning": reply.warning or None,
    }
