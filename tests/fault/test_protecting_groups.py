"""Protection and recovery between nodes: any m of a group are lost, and every shard comes back byte for byte."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from snapd.core.ids import SnapshotId
from snapd.core.rows import expected_bytes
from snapd.runtime.protecting import drop_protection
from tests.support.cluster_nodes import CHUNK, Network, group_of, network_of, protect, sources_now, until


def names(count: int) -> list[str]:
    return [f"n{i}" for i in range(count)]


def sizes(count: int, last: int = 0) -> list[int]:
    return [CHUNK] * count + ([last] if last else [])


async def capture_all(
    network: Network, job: str, step: int, shards: dict[str, list[tuple[int, list[int]]]]
) -> dict:
    """{node: [(rank, sizes)]}; returns the bytes of each (rank)."""
    kept = {}
    for node, ranks in shards.items():
        for rank, of in ranks:
            await network.nodes[node].capture(job, step, rank, of)
            kept[rank] = network.nodes[node].shard(job, step, rank)
    return kept


def uneven(nodes: Sequence[str]) -> dict[str, list[tuple[int, list[int]]]]:
    """One rank each, the first three times as large; short ends; a second small rank on the last node."""
    shards = {node: [(rank, sizes(6, 1000 + 7 * rank))] for rank, node in enumerate(nodes)}
    shards[nodes[0]] = [(0, sizes(18, 33))]
    shards[nodes[-1]].append((len(nodes), sizes(2, 5)))
    return shards


async def lose_and_bring(
    network: Network, job: str, step: int, group, kept: dict, lost: Sequence[str]
) -> None:
    """Lose nodes; an empty one brings every shard, from memory where it is and from parity where it is not."""
    for name in lost:
        await network.lose(name)
    fresh = network.add("fresh")
    sources = sources_now(network, job, step, group)
    for rank in kept:
        await fresh.bring(job, step, rank, sources)
        assert fresh.shard(job, step, rank) == kept[rank], f"rank {rank}"
    await network.lose("fresh")


@pytest.mark.parametrize(("code", "count"), [("2+1", 3), ("2+2", 4), ("1+1", 2), ("6+2", 8)])
def test_any_m_nodes_may_be_lost(folder: Path, code: str, count: int) -> None:
    async def run(lost: Sequence[str], where: Path) -> None:
        nodes = names(count)
        async with network_of(where, nodes) as network:
            group = group_of(nodes, code)
            kept = await capture_all(network, "a", 5, uneven(nodes))
            await protect(network, "a", 5, group)
            await lose_and_bring(network, "a", 5, group, kept, lost)

    m = int(code[-1])
    choices = list(itertools.combinations(names(count), m))
    chosen = choices if len(choices) <= 6 else [choices[0], choices[len(choices) // 2], choices[-1]]
    for number, lost in enumerate(chosen):
        where = folder / str(number)
        where.mkdir(mode=0o700)
        asyncio.run(run(lost, where))


def test_more_than_m_nodes_lost_is_refused_with_what_is_missing(folder: Path) -> None:
    async def run() -> None:
        nodes = names(3)
        async with network_of(folder, nodes) as network:
            group = group_of(nodes, "2+1")
            await capture_all(network, "a", 5, uneven(nodes))
            await protect(network, "a", 5, group)
            await network.lose("n0")
            await network.lose("n1")
            fresh = network.add("fresh")
            with pytest.raises(Exception, match=r"row \d+ has \d of the 2 fragments") as caught:
                await fresh.bring("a", 5, 0, sources_now(network, "a", 5, group))
            assert caught.value.kind == "shard_sources"
            assert not fresh.jobs["a"].ledger.snapshots
            pool = fresh.jobs["a"].arena(0).pool
            assert pool.free_count == pool.total_count

    asyncio.run(run())


@pytest.mark.parametrize(("code", "count"), [("2+1", 3), ("2+2", 4), ("1+1", 2), ("6+2", 8)])
def test_memory_and_bytes_are_those_of_the_plan(folder: Path, code: str, count: int) -> None:
    """What moved and what is held is what `core.rows.expected_bytes` counts, to the byte; even shards: m/k each."""

    async def run() -> None:
        nodes = names(count)
        async with network_of(folder, nodes) as network:
            group = group_of(nodes, code)
            k, m = group.code.k, group.code.m
            per_node = 6 * k
            await capture_all(network, "a", 5, {n: [(r, sizes(per_node))] for r, n in enumerate(nodes)})
            await protect(network, "a", 5, group)
            plan = network.nodes["n0"].jobs["a"].parity.plan(SnapshotId(1, 5), 1)
            expected = expected_bytes(nodes, plan.rows)
            data = per_node * CHUNK
            for name in nodes:
                parity = network.nodes[name].jobs["a"].parity
                assert parity.used_bytes == expected[name].parity_frames * CHUNK
                assert parity.nbytes <= data * m / k * 1.03 + CHUNK
                received = sum(n for (_, to), n in network.counts.moved.items() if to == name)
                assert received == expected[name].received_nbytes
            assert network.counts.total <= count * data * (k + m - 1) / k * 1.05
            for node in network.nodes.values():
                assert node.pipeline.buffers.bytes_lent_max <= node.bytes_max
                assert node.pipeline.buffers.pieces_lent_max > 0

    asyncio.run(run())


def test_unchanged_chunks_cause_no_transfer(folder: Path) -> None:
    async def run() -> None:
        nodes = names(4)
        async with network_of(folder, nodes) as network:
            group = group_of(nodes, "2+2")
            of, frozen = sizes(12), 8
            for step in (5, 6):
                versions = [5] * frozen + [step] * (12 - frozen)
                for rank, name in enumerate(nodes):
                    await network.nodes[name].capture(
                        "a", step, rank, of, versions=[5] * 12 if step == 5 else versions
                    )
            await protect(network, "a", 5, group)
            first = network.counts.total
            await protect(network, "a", 6, group)
            second = network.counts.total - first
            plan = network.nodes["n0"].jobs["a"].parity.plan(SnapshotId(1, 6), 1)
            held = {row.id for row in network.nodes["n0"].jobs["a"].parity.plan(SnapshotId(1, 5), 1).rows}
            again = [row for row in plan.rows if row.id not in held]
            assert 0 < len(again) < len(plan.rows)
            assert second == sum(
                e.received_nbytes for e in expected_bytes(nodes, plan.rows, held=held).values()
            )
            kept = {rank: network.nodes[name].shard("a", 6, rank) for rank, name in enumerate(nodes)}
            for name in nodes:
                drop_protection(network.nodes[name].jobs["a"], SnapshotId(1, 5))
                parity = network.nodes[name].jobs["a"].parity
                assert parity.used_bytes == len(plan.given_to(name)) * CHUNK
            await lose_and_bring(network, "a", 6, group, kept, ["n0", "n2"])

    asyncio.run(run())


def test_the_same_snapshot_again_moves_nothing(folder: Path) -> None:
    async def run() -> None:
        nodes = names(3)
        async with network_of(folder, nodes) as network:
            group = group_of(nodes, "2+1")
            await capture_all(network, "a", 5, uneven(nodes))
            await protect(network, "a", 5, group)
            before = network.counts.total
            await protect(network, "a", 5, group, epoch=2)
            assert network.counts.total == before
            for node in network.nodes.values():
                drop_protection(node.jobs["a"], SnapshotId(1, 5), below_epoch=2)
                assert [plan.map.epoch for plan in node.jobs["a"].parity.plans()] == [2]
                led = node.jobs["a"].parity.plans()[0].led_by(node.name)
                count = len({(row.id, row.parity_nodes) for row in led})
                await until(lambda n=node, c=count: n.protectors["a"].state.rows_shared == c)
            assert network.counts.total == before

    asyncio.run(run())


def test_two_jobs_in_one_group(folder: Path) -> None:
    async def run() -> None:
        nodes = names(4)
        async with network_of(folder, nodes) as network:
            group = group_of(nodes, "2+2")
            kept = {job: await capture_all(network, job, 5, uneven(nodes)) for job in ("a", "b")}
            await asyncio.gather(*(protect(network, job, 5, group) for job in kept))
            await network.lose("n1")
            await network.lose("n3")
            fresh = network.add("fresh")
            for job in kept:
                sources = sources_now(network, job, 5, group)
                await asyncio.gather(*(fresh.bring(job, 5, rank, sources) for rank in kept[job]))
                assert {rank: fresh.shard(job, 5, rank) for rank in kept[job]} == kept[job]

    asyncio.run(run())


def test_equal_rows_are_one(folder: Path) -> None:
    """A fresh optimizer's moments are zeros: many equal rows, one fragment each wherever they are held."""

    async def run() -> None:
        nodes = names(3)
        async with network_of(folder, nodes) as network:
            group = group_of(nodes, "2+1")
            for rank, name in enumerate(nodes):
                await network.nodes[name].capture("a", 5, rank, sizes(20), is_blank=True)
            await protect(network, "a", 5, group)
            plan = network.nodes["n0"].jobs["a"].parity.plan(SnapshotId(1, 5), 1)
            assert len(plan.rows) == 30 and len({row.id for row in plan.rows}) == 1
            for name in nodes:
                assert network.nodes[name].jobs["a"].parity.used_bytes == CHUNK
            assert network.counts.total == 3 * 2 * CHUNK
            kept = {rank: network.nodes[name].shard("a", 5, rank) for rank, name in enumerate(nodes)}
            await lose_and_bring(network, "a", 5, group, kept, ["n1"])

    asyncio.run(run())
