"""`snapd drain`: empty a node of the cluster before its maintenance."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from snapd_proto import admin_pb2

from snapd.cli.connect import connected
from snapd.cli.options import JsonOption, RuntimeDirOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import print_json
from snapd.rpc.local_client import LocalClient

POLL_S = 0.5


def drain(
    node: Annotated[str, typer.Option("--node", help="The node, as `snapd status` names it.")],
    undo: Annotated[bool, typer.Option("--undo", help="It stays after all, and gets a place again.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the node may be taken away.")] = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Move a node's share to the others, and say when it may be taken away. Asked again, it says how far it is."""
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
