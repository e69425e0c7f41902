"""The cluster and a job's protection, as `snapd status` asks for them."""

from __future__ import annotations

from snapd_proto import admin_pb2

from snapd.core.cluster import checked_node_name
from snapd.errors import NotFoundError, SnapdError
from snapd.runtime.cluster import Cluster
from snapd.runtime.job import Job
from snapd.runtime.peers import NodeFacts


async def cluster_status(cluster: Cluster, *, ask_peers: bool) -> admin_pb2.ClusterStatus:
    """What this daemon knows; with `ask_peers` also what each member says of itself."""
    state, table = cluster.state, cluster.state.table
    now_s = state.environment.monotonic_s()
    status = admin_pb2.ClusterStatus(
        node=cluster.name,
        cluster_id=cluster.cluster_id,
        epoch=cluster.epoch,
        is_away=state.away is not None,
        away_s=max(0.0, now_s - state.away.since_s) if state.away else 0.0,
        away_reason=state.away.reason if state.away else "",
        distrust=state.distrust,
        asked_code=str(state.settings.asked),
        degraded=table.degraded if table else "",
        reason=table.reason if table else "no group table yet",
        is_leader=cluster.kv_server is not None,
    )
    for group in table.groups if table else ():
        status.groups.append(
            admin_pb2.GroupRow(
                number=group.number, nodes=group.nodes, code=str(group.code) if group.code else "none"
            )
        )
    answers = await cluster.all_facts() if ask_peers else {}
    for name in sorted({*state.members, *state.absent}):
        status.nodes.append(_node_row(cluster, name, answers.get(name), now_s))
    return status


def _node_row(
    cluster: Cluster, name: str, answer: NodeFacts | SnapdError | None, now_s: float
) -> admin_pb2.NodeRow:
    state = cluster.state
    member, since_s = state.members.get(name), state.absent.get(name)
    group = state.table.group_of(name) if state.table else None
    row = admin_pb2.NodeRow(
        node=name,
        state=_state_of(cluster, name),
        group=group.number if group else -1,
        absent_s=now_s - since_s if since_s is not None else 0.0,
    )
    if member is not None:
        row.domain, row.host = member.domain, member.host
        row.address, row.version = member.address, member.version
    if isinstance(answer, NodeFacts):
        row.answered = True
        row.arena_bytes, row.parity_bytes = answer.arena_bytes, answer.parity_bytes
        row.sent_bytes, row.received_bytes = answer.sent_bytes, answer.received_bytes
        row.trouble, row.exposure_byte_s = answer.trouble, answer.exposure_byte_s
    elif answer is not None:
        row.trouble = f"does not answer: {answer.message}"
    return row


def _state_of(cluster: Cluster, name: str) -> str:
    if name in cluster.state.drains:
        return "draining"
    if name in cluster.state.members:
        return "living"
    return "lost" if name in cluster.state.lost else "absent"


def add_protection(status: admin_pb2.JobStatus, job: Job, cluster: Cluster) -> None:
    """What is protected of a job, and what is being done."""
    world = cluster.worlds.get(job.name)
    if world is None:
        return
    orders = world.orders
    status.is_clustered = True
    status.parity_bytes = job.parity.nbytes
    status.collector = world.collector
    status.protection = world.protection_reason()
    if orders.complete is not None:
        status.has_complete = True
        status.complete_generation, status.complete_step = orders.complete.generation, orders.complete.step
    if orders.protected is not None:
        status.has_protected = True
        status.protected_generation = orders.protected.generation
        status.protected_step = orders.protected.step
    if orders.target is not None:
        status.has_target = True
        status.target_generation, status.target_step = orders.target.generation, orders.target.step


async def drain(cluster: Cluster, request: admin_pb2.DrainRequest) -> admin_pb2.DrainReply:
    """Have a node emptied or not, and say how far it is.

    Raises:
        NotFoundError: kind `node`. UnavailableError: the coordinator is away.
    """
    node, state = checked_node_name(request.node), cluster.state
    if node not in state.members and node not in state.absent and node not in state.view.drains:
        raise NotFoundError(f"no node {node!r} in the cluster", kind="node", hint="`snapd status` lists them")
    if not request.is_question:
        await state.set_drain(node, not request.undo)
    is_asked = node in state.view.drains if request.is_question else not request.undo
    reply = admin_pb2.DrainReply(node=node, is_asked=is_asked, is_member=node in state.members)
    if not reply.is_member:
        if is_asked:
            reply.waits_for = "it is away and loses its place; what only it had cannot be asked for"
        return reply
    try:
        facts = await cluster.node_facts(node)
    except SnapdError as error:
        reply.waits_for = f"it does not answer: {error.message}"
        return reply
    reply.answered = True
    reply.is_drained = is_asked and facts.is_draining and not facts.drain_waits_for
    if is_asked:
        reply.waits_for = facts.drain_waits_for if facts.is_draining else "it has not heard of it yet"
    if is_asked and node == cluster.name and cluster.kv_server is not None:
        reply.warning = "it is the cluster's coordinator: while it is away nothing new is protected"
    return reply
