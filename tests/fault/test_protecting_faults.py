"""What goes wrong between members while they protect: wrong bytes, silence, death, restarts, a new epoch."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from snapd.core.ids import SnapshotId
from snapd.errors import NotRestorable, UnavailableError
from snapd.peer.base import ChunkName, FragmentName, Name
from snapd.runtime.protecting import drop_protection
from tests.support.cluster_nodes import (
    CHUNK,
    FakeNode,
    Network,
    group_of,
    network_of,
    protect,
    sources_now,
    stall,
    target,
    until,
)

NODES = ["n0", "n1", "n2"]
GROUP = group_of(NODES, "2+1")
SNAPSHOT = SnapshotId(1, 5)


async def captured(network: Network, step: int = 5, chunks: int = 8) -> dict[int, list[bytes]]:
    for rank, name in enumerate(NODES):
        await network.nodes[name].capture("a", step, rank, [CHUNK] * chunks + [77])
    return {rank: network.nodes[name].shard("a", step, rank) for rank, name in enumerate(NODES)}


def state(network: Network, name: str):
    return network.nodes[name].protectors["a"].state


def aim_all(network: Network, step: int = 5, epoch: int = 1) -> None:
    for name in NODES:
        network.nodes[name].protector("a").aim(target(step, GROUP, epoch))


def all_done(network: Network) -> bool:
    return all(state(network, name).is_done for name in NODES)


def logged(node: FakeNode, caplog: pytest.LogCaptureFixture, event: str) -> list[dict]:
    return [
        record.fields
        for record in caplog.records
        if record.name == f"test.{node.name}" and record.getMessage() == event
    ]


class Once:
    """True for the first matching names, `count` times."""

    def __init__(self, count: int) -> None:
        self.left, self.hits, self.lock = count, [], threading.Lock()

    def __call__(self, name: Name) -> bool:
        with self.lock:
            if self.left <= 0 or not isinstance(name, ChunkName):
                return False
            self.left -= 1
            self.hits.append(name)
            return True


def test_wrong_bytes_are_named_counted_and_asked_for_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with network_of(folder, NODES) as network:
            kept = await captured(network)
            wrong = network.corrupt["n0", "n1"] = Once(1)
            await protect(network, "a", 5, GROUP)
            assert len(wrong.hits) == 1
            await until(lambda: bool(logged(network.nodes["n0"], caplog, "peer.wrong_bytes")))
            (entry,) = logged(network.nodes["n0"], caplog, "peer.wrong_bytes")
            assert entry["job"] == "a" and entry["step"] == 5
            assert f"peer n1 sent wrong bytes for chunk {wrong.hits[0].index} of rank 1" in entry["reason"]
            assert network.nodes["n0"].metrics.wrong_bytes._value.get() == 1
            await network.lose("n1")
            fresh = network.add("fresh")
            await fresh.bring("a", 5, 1, sources_now(network, "a", 5, GROUP))
            assert fresh.shard("a", 5, 1) == kept[1]

    asyncio.run(run())


def test_a_peer_that_keeps_sending_wrong_bytes_is_trouble_and_nothing_is_done(folder: Path) -> None:
    async def run() -> None:
        async with network_of(folder, NODES) as network:
            await captured(network)
            wrong = network.corrupt["n0", "n1"] = Once(1 << 30)
            aim_all(network)
            await until(lambda: "wrong bytes" in state(network, "n0").trouble)
            assert state(network, "n0").trouble.startswith("n1: wrong bytes for chunk")
            assert not state(network, "n0").is_done and len(wrong.hits) >= 2
            del network.corrupt["n0", "n1"]
            await until(lambda: all_done(network))
            assert state(network, "n0").trouble == ""

    asyncio.run(run())


def test_a_peer_that_is_silent_holds_up_its_rows_only(folder: Path) -> None:
    """All rows that do not take the silent peer are coded meanwhile; when it is back, the rest."""

    async def run() -> None:
        nodes = ["n0", "n1", "n2", "n3"]
        group = group_of(nodes, "2+2")
        async with network_of(folder, nodes) as network:
            for rank, (name, chunks) in enumerate(zip(nodes, (12, 9, 7, 11), strict=True)):
                await network.nodes[name].capture("a", 5, rank, [CHUNK] * chunks)
            network.faults["n2", "n0"] = stall(0.2, what="fetch")
            for name in nodes:
                network.nodes[name].protector("a").aim(target(5, group))
            await until(lambda: "n0: did not answer" in state(network, "n2").trouble)
            parity = network.nodes["n2"].jobs["a"].parity
            plan = parity.plan(SNAPSHOT, 1)
            free = [row for row in plan.led_by("n2") if all(chunk.node != "n0" for chunk in row.chunks)]
            held_up = [row for row in plan.led_by("n2") if row not in free]
            assert free and held_up
            await until(lambda: all(parity.has(row.id, 0) for row in free))
            assert not any(parity.has(row.id, 0) for row in held_up)
            del network.faults["n2", "n0"]
            await until(lambda: all(network.nodes[n].protectors["a"].state.is_done for n in nodes))

    asyncio.run(run())


def test_a_member_that_dies_in_the_middle_and_comes_back_ends_its_part(folder: Path) -> None:
    async def run() -> None:
        async with network_of(folder, NODES, bytes_max=4 * CHUNK) as network:
            kept = await captured(network, chunks=16)
            fetched = []

            def die(what: str, name: Name | None) -> None:
                if what == "fetch":
                    fetched.append(name)
                    if len(fetched) > 5:
                        raise UnavailableError("the connection is reset")

            network.faults["n0", "n1"] = network.faults["n2", "n1"] = die
            aim_all(network)
            await until(lambda: "reset" in state(network, "n0").trouble + state(network, "n2").trouble)
            await network.nodes["n1"].restart()
            network.faults.clear()
            assert not all_done_but(network, "n1")
            network.nodes["n1"].protector("a").aim(target(5, GROUP))
            await until(lambda: all_done(network))
            await network.lose("n2")
            fresh = network.add("fresh")
            await fresh.bring("a", 5, 2, sources_now(network, "a", 5, GROUP))
            assert fresh.shard("a", 5, 2) == kept[2]

    asyncio.run(run())


def all_done_but(network: Network, name: str) -> bool:
    return all(state(network, other).is_done for other in NODES if other != name)


def test_a_restart_keeps_what_was_recorded_and_moves_nothing_again(folder: Path) -> None:
    async def run() -> None:
        async with network_of(folder, NODES) as network:
            await captured(network)
            await protect(network, "a", 5, GROUP)
            moved = network.counts.total
            used = {n: network.nodes[n].jobs["a"].parity.used_bytes for n in NODES}
            for name in NODES:
                await network.nodes[name].restart()
                job = network.nodes[name].jobs["a"]
                job.parity.check()
                assert job.parity.used_bytes == used[name] > 0
                assert [plan.map.id for plan in job.parity.plans()] == [SNAPSHOT]
            await protect(network, "a", 5, GROUP)
            assert network.counts.total == moved

    asyncio.run(run())


def test_a_fragment_that_changed_in_memory_is_found_and_made_anew(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with network_of(folder, NODES) as network:
            kept = await captured(network)
            await protect(network, "a", 5, GROUP)
            node = network.nodes["n0"]
            plan = node.jobs["a"].parity.plan(SNAPSHOT, 1)
            (row, number), *_ = plan.given_to("n0")
            with node.jobs["a"].parity.read(row.id, number) as (view, _):
                view[3] ^= 4
            await node.restart()
            moved = network.counts.total
            await protect(network, "a", 5, GROUP)
            assert [entry["row"] for entry in logged(node, caplog, "parity.bad")] == [row.id.hex()]
            assert 0 < network.counts.total - moved <= 3 * CHUNK
            await network.lose("n1")
            fresh = network.add("fresh")
            await fresh.bring("a", 5, 1, sources_now(network, "a", 5, GROUP))
            assert fresh.shard("a", 5, 1) == kept[1]

    asyncio.run(run())


def test_a_new_epoch_in_the_middle_keeps_the_old_parity_until_it_is_dropped(folder: Path) -> None:
    """Step 5 is protected under epoch 1; the target is 6 when epoch 2 comes, and 6 is protected under that one."""

    async def run() -> None:
        async with network_of(folder, NODES) as network:
            kept = await captured(network, 5)
            await protect(network, "a", 5, GROUP)
            await captured(network, 6)
            begun = threading.Event()

            def slow(what: str, name: Name | None) -> None:
                if what == "fetch":
                    begun.set()
                    raise UnavailableError("a partition")

            network.faults["n0", "n1"] = network.faults["n1", "n2"] = network.faults["n2", "n0"] = slow
            aim_all(network, 6)
            await until(begun.is_set)
            aim_all(network, 6, epoch=2)
            network.faults.clear()
            await until(lambda: all_done(network))
            for name in NODES:
                parity = network.nodes[name].jobs["a"].parity
                epochs = [(plan.map.id.step, plan.map.epoch) for plan in parity.plans()]
                assert (5, 1) in epochs and (6, 2) in epochs
            # what was protected stays restorable until it is dropped
            await network.lose("n1")
            fresh = network.add("fresh")
            await fresh.bring("a", 5, 1, sources_now(network, "a", 5, GROUP))
            assert fresh.shard("a", 5, 1) == kept[1]
            for name in ("n0", "n2"):
                job = network.nodes[name].jobs["a"]
                drop_protection(job, SnapshotId(1, 5))
                drop_protection(job, SnapshotId(1, 6), below_epoch=2)
                (plan,) = job.parity.plans()
                assert job.parity.used_bytes == len({(r.id, j) for r, j in plan.given_to(name)}) * CHUNK

    asyncio.run(run())


def test_the_target_can_be_given_up_at_any_moment(folder: Path) -> None:
    async def run() -> None:
        async with network_of(folder, NODES, bytes_max=3 * CHUNK) as network:
            await captured(network, chunks=16)
            for delay_s in (0.0, 0.002, 0.005, 0.01, 0.02, 0.04):
                aim_all(network)
                await asyncio.sleep(delay_s)
                for name in NODES:
                    network.nodes[name].protector("a").aim(None)
                    network.nodes[name].jobs["a"].parity.check()
            await protect(network, "a", 5, GROUP)
            for name in NODES:
                buffers = network.nodes[name].pipeline.buffers
                assert buffers.bytes_lent_max <= 3 * CHUNK

    asyncio.run(run())


def test_a_push_that_nobody_planned_is_refused(folder: Path) -> None:
    async def run() -> None:
        async with network_of(folder, NODES) as network:
            await captured(network)
            store = network.nodes["n0"].store
            name = FragmentName("a", bytes(16), 0)

            def push() -> None:
                with store.write(name, CHUNK, bytes(16)):
                    pass

            with pytest.raises(UnavailableError) as caught:
                await asyncio.to_thread(push)
            assert caught.value.kind == "not_planned"

    asyncio.run(run())


# recovery


def test_a_bad_source_falls_to_the_next(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """n1 has the shard, and sends one chunk wrong every time: that chunk is decoded, the others are taken whole."""

    caplog.set_level("INFO")

    async def run() -> None:
        async with network_of(folder, NODES) as network:
            kept = await captured(network)
            await protect(network, "a", 5, GROUP)
            network.corrupt["fresh", "n1"] = lambda name: isinstance(name, ChunkName) and name.index == 3
            fresh = network.add("fresh")
            await fresh.bring("a", 5, 1, sources_now(network, "a", 5, GROUP))
            assert fresh.shard("a", 5, 1) == kept[1]
            (entry,) = {e["reason"]: e for e in logged(fresh, caplog, "peer.wrong_bytes")}.values()
            assert "peer n1 sent wrong bytes for chunk 3 of rank 1" in entry["reason"]
            (brought,) = logged(fresh, caplog, "shard.brought")
            assert brought["decoded_bytes"] == CHUNK

    asyncio.run(run())


def test_wrong_parity_falls_to_other_fragments(folder: Path) -> None:
    async def run() -> None:
        nodes = ["n0", "n1", "n2", "n3"]
        group = group_of(nodes, "2+2")
        async with network_of(folder, nodes) as network:
            for rank, name in enumerate(nodes):
                await network.nodes[name].capture("a", 5, rank, [CHUNK] * 6)
            kept = network.nodes["n1"].shard("a", 5, 1)
            await protect(network, "a", 5, group)
            await network.lose("n1")
            hit = []

            def is_parity(name: Name) -> bool:
                hit.extend([name] if isinstance(name, FragmentName) else [])
                return isinstance(name, FragmentName)

            network.corrupt["fresh", "n2"] = is_parity
            fresh = network.add("fresh")
            await fresh.bring("a", 5, 1, sources_now(network, "a", 5, group))
            assert fresh.shard("a", 5, 1) == kept and hit

    asyncio.run(run())


def test_what_does_not_answer_is_not_called_unrestorable(folder: Path) -> None:
    async def run() -> None:
        async with network_of(folder, NODES) as network:
            await captured(network)
            await protect(network, "a", 5, GROUP)
            await network.lose("n1")
            network.faults["fresh", "n0"] = stall(0.01, what="fetch")
            fresh = network.add("fresh")
            sources = sources_now(network, "a", 5, GROUP)
            with pytest.raises(UnavailableError, match="n0 does not answer") as caught:
                await fresh.bring("a", 5, 1, sources)
            assert caught.value.kind == "shard_sources"
            pool = fresh.jobs["a"].arena(1).pool
            pool.check()
            assert pool.free_count == pool.total_count
            await network.lose("n0")
            del network.faults["fresh", "n0"]
            gone = {rank: source for rank, source in sources.items() if rank != 0}
            with pytest.raises((NotRestorable, UnavailableError)):
                await fresh.bring("a", 5, 1, gone)

    asyncio.run(run())


def test_what_the_arena_has_already_is_not_fetched(folder: Path) -> None:
    async def run() -> None:
        async with network_of(folder, [*NODES, "fresh"]) as network:
            old, new = [5] * 10, [5] * 7 + [6] * 3
            await network.nodes["n1"].capture("a", 5, 1, [CHUNK] * 10, versions=old)
            await network.nodes["n1"].capture("a", 6, 1, [CHUNK] * 10, versions=new)
            fresh = network.nodes["fresh"]
            await fresh.bring("a", 5, 1, sources_now(network, "a", 5, GROUP))
            before = network.counts.total
            job = fresh.jobs["a"]
            damaged = job.ledger.snapshots[SNAPSHOT].shards[1].record.chunks[2].place
            with_hole = job.arena(1).memory.segments[damaged.segment].map_for_writing()
            with_hole.view(damaged.frame * CHUNK, CHUNK)[9] ^= 1
            await fresh.bring("a", 6, 1, sources_now(network, "a", 6, GROUP))
            assert network.counts.total - before == 4 * CHUNK  # the changed ones, and the damaged one
            assert fresh.shard("a", 6, 1) == network.nodes["n1"].shard("a", 6, 1)
            await fresh.restart()
            assert fresh.shard("a", 6, 1) == network.nodes["n1"].shard("a", 6, 1)

    asyncio.run(run())
