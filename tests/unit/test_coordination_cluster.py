"""A cluster of daemons on the embedded store, in virtual time: who is in it, who plans, whom it believes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from snapd.errors import ConflictError
from tests.support.clusters import member, settled
from tests.support.kv_scene import Client, kill, scene, virtually
from tests.support.virtual_time import pass_time


def test_daemons_find_one_another_and_agree_on_a_table() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            daemons = [cluster.start(member(name)) for name in "abcd"]
            table = await settled(daemons, *"abcd")
            assert table.epoch <= 2
            assert sum(daemon.state.is_planner for daemon in daemons) == 1
            assert {daemon.state.token for daemon in daemons} == {daemons[0].state.token}
            assert all(sorted(daemon.state.members) == list("abcd") for daemon in daemons)
            late = cluster.start(member("e"))
            newer = await settled([*daemons, late], *"abcde")
            assert newer.epoch == table.epoch + 1
            before = stores.server.revision
            await pass_time(120)
            assert stores.server.revision == before, "an idle cluster writes nothing"

    virtually(work())


def test_what_is_written_does_not_grow_with_anything_but_members() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            daemons = [cluster.start(member(f"n{i:02}")) for i in range(40)]
            await settled(daemons, *(daemon.state.member.node for daemon in daemons))
            assert stores.server.revision <= 40 + 2 * 2 + 2, (
                "a write each, the id, an election, a table or two"
            )
            before = stores.server.revision
            await kill(daemons[7])
            rest = [daemon for daemon in daemons if daemon is not daemons[7]]
            await settled(rest, *(daemon.state.member.node for daemon in rest))
            assert stores.server.revision - before <= 2 + 2, (
                "its lease, a table, perhaps an election and another"
            )

    virtually(work())


def test_an_absent_member_keeps_its_place_until_it_is_lost() -> None:
    async def work() -> None:
        async with scene() as (_, cluster):
            daemons = [cluster.start(member(name)) for name in "abc"]
            table = await settled(daemons, *"abc")
            clock = asyncio.get_running_loop().time
            await kill(daemons[2])
            killed_s = clock()
            await daemons[0].until(lambda state: "c" in state.absent)
            assert 4.0 <= clock() - killed_s <= 6.0, "the lease is 5 s"
            assert daemons[0].state.table == table and "c" not in daemons[0].state.lost
            newer = await settled(daemons[:2], "a", "b")
            assert 33.0 <= clock() - killed_s <= 38.0, "lost 30 s after its lease had ended"
            assert newer.epoch == table.epoch + 1 and "c" in daemons[0].state.lost
            back = cluster.start(member("c", arena="arena-2"))
            await settled([*daemons[:2], back], *"abc")
            assert daemons[0].state.members["c"].arena_id == "arena-2" and not daemons[0].state.absent

    virtually(work())


def test_a_daemon_that_leaves_is_seen_at_once_and_another_plans() -> None:
    async def work() -> None:
        async with scene() as (_, cluster):
            daemons = [cluster.start(member(name)) for name in "abc"]
            await settled(daemons, *"abc")
            planner = next(daemon for daemon in daemons if daemon.state.is_planner)
            others = [daemon for daemon in daemons if daemon is not planner]
            began_s = asyncio.get_running_loop().time()
            await planner.stop()
            await others[0].until(lambda _: any(each.state.is_planner for each in others), 2.0)
            assert asyncio.get_running_loop().time() - began_s < 2.0
            await settled(others, *(each.state.member.node for each in others))

    virtually(work())


def test_a_planner_that_is_cut_off_is_replaced_and_does_not_write_when_it_returns() -> None:
    async def work() -> None:
        async with scene() as (_, cluster):
            daemons = [cluster.start(member(name)) for name in "abc"]
            await settled(daemons, *"abc")
            planner = next(daemon for daemon in daemons if daemon.state.is_planner)
            others = [daemon for daemon in daemons if daemon is not planner]
            client = planner.state.store
            assert isinstance(client, Client)
            client.cut(True)
            await planner.until(lambda state: state.away is not None)
            assert not planner.state.is_planner and planner.state.table is not None
            await others[0].until(lambda _: any(each.state.is_planner for each in others), 12.0)
            client.cut(False)
            await settled(daemons, *"abc")
            assert not planner.state.is_planner
            assert sum(each.state.is_planner for each in daemons) == 1

    virtually(work())


def test_drains_empty_a_node() -> None:
    async def work() -> None:
        async with scene() as (_, cluster):
            daemons = [cluster.start(member(name)) for name in "abc"]
            table = await settled(daemons, *"abc")
            await daemons[0].state.set_drain("b", True)
            await daemons[1].until(lambda state: "b" in state.view.drains)
            assert daemons[0].state.table == table  # it keeps its place until it says that it is empty
            daemons[1].state.set_leaving(True)
            await settled(daemons, "a", "c")
            await daemons[0].state.set_drain("b", False)
            daemons[1].state.set_leaving(False)
            await settled(daemons, *"abc")
            leaving = cluster.start(replace(member("d"), is_draining=True))
            await leaving.until(lambda state: "d" in state.drains and state.is_trusted)

    virtually(work())


def test_another_daemon_of_the_same_name_is_one_clear_error() -> None:
    async def work() -> None:
        async with scene() as (_, cluster):
            first = cluster.start(member("a"))
            await settled([first], "a")
            twin = cluster.start(member("a", host="elsewhere"))
            with pytest.raises(ConflictError, match="another living daemon's name") as error:
                await twin.until(lambda _: False)
            assert error.value.kind == "duplicate_node"
            assert len(twin.events("member.conflict")) == 1
            await settled([first], "a")

    virtually(work())


def test_two_daemons_of_one_host_are_refused_unless_allowed() -> None:
    async def work() -> None:
        async with scene() as (_, cluster):
            first = cluster.start(member("a", host="one"))
            await settled([first], "a")
            second = cluster.start(member("b", host="one", address="one:8000"))
            with pytest.raises(ConflictError, match="has a daemon already") as error:
                await second.until(lambda _: False)
            assert error.value.kind == "same_host"
            allowed = cluster.start(member("b", host="one", address="one:8000"), allow_same_host=True)
            await settled([first, allowed], "a", "b")

    virtually(work())


def test_a_node_that_lost_its_arena_takes_its_own_place_again() -> None:
    async def work() -> None:
        async with scene() as (_, cluster):
            daemons = [cluster.start(member(name)) for name in "ab"]
            table = await settled(daemons, "a", "b")
            began_s = asyncio.get_running_loop().time()
            await kill(daemons[1])
            again = cluster.start(member("b", arena="arena-2"))
            await again.until(lambda state: state.is_trusted and state.away is None)
            assert asyncio.get_running_loop().time() - began_s < 1.0, "same host and address: no need to wait"
            await daemons[0].until(lambda state: state.members["b"].arena_id == "arena-2")
            await pass_time(20)
            assert daemons[0].state.table == table and "b" in daemons[0].state.members

    virtually(work())


def test_while_the_store_is_away_token_and_table_stay_and_nobody_is_lost() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            daemons = [cluster.start(member(name)) for name in "abc"]
            table = await settled(daemons, *"abc")
            tokens = [daemon.state.token for daemon in daemons]
            for client in stores.clients:
                client.cut(True)
            for daemon in daemons:
                await daemon.until(lambda state: state.away is not None)
            await pass_time(600)
            assert [daemon.state.token for daemon in daemons] == tokens
            assert all(daemon.state.table == table and not daemon.state.lost for daemon in daemons)
            assert all(daemon.state.away and daemon.state.away.kind == "cut" for daemon in daemons)
            assert all(len(daemon.events("coordination.away")) == 1 for daemon in daemons)
            for client in stores.clients:
                client.cut(False)
            assert (await settled(daemons, *"abc")).epoch == table.epoch

    virtually(work())


def test_a_wiped_store_is_rebuilt_above_all_that_was_seen() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            daemons = [cluster.start(member(name)) for name in "abcd"]
            table = await settled(daemons, *"abcd")
            daemons[1].state.saw_generation("job", 7)
            await kill(daemons[3])
            stores.replace()
            for daemon in daemons[:3]:
                await daemon.until(lambda state: bool(state.distrust), 20.0)
                assert not daemon.state.is_trusted and daemon.state.table == table
            newer = await settled(daemons[:3], *"abcd")
            assert newer.epoch > table.epoch
            assert "rebuilt above epoch" in newer.reason and "not heard: d" in newer.reason
            assert newer.groups == table.groups, "nobody moves because the store was lost"
            assert all(daemon.state.generation_seen("job") == 7 for daemon in daemons[:3])
            await settled(daemons[:3], *"abc")

    virtually(work())


def test_a_store_that_went_back_is_rebuilt_above_all_that_was_seen() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            daemons = [cluster.start(member(name)) for name in "ab"]
            await settled(daemons, "a", "b")
            old = stores.copy()
            daemons += [cluster.start(member("c"))]
            await settled(daemons, *"abc")
            daemons += [cluster.start(member("d"))]
            table = await settled(daemons, *"abcd")
            stores.replace(old)
            newcomer = cluster.start(member("e"))
            newer = await settled([*daemons, newcomer], *"abcde")
            assert newer.epoch > table.epoch + 1 or "rebuilt" in newer.reason
            assert all(daemon.events("cluster.distrusted") for daemon in daemons)
            for daemon in daemons:
                epochs = [fields["epoch"] for fields in daemon.events("epoch.changed")]
                assert epochs == sorted(epochs), "nobody ever went back"

    virtually(work())


def test_a_daemon_that_slept_through_a_wipe_is_not_led_astray() -> None:
    """It has seen more than all who rebuilt: they must rebuild again above it."""

    async def work() -> None:
        async with scene() as (stores, cluster):
            daemons = [cluster.start(member(name)) for name in "abc"]
            table = await settled(daemons, *"abc")
            sleeper = daemons[0]
            sleeper.state.saw_generation("job", 9)
            client = sleeper.state.store
            assert isinstance(client, Client)
            client.cut(True)
            for daemon in daemons[1:]:
                await daemon.stop()
            stores.replace()
            fresh = [cluster.start(member(name, arena="arena-2")) for name in "bc"]
            between = await settled(fresh, "b", "c")
            assert between.epoch <= table.epoch
            client.cut(False)
            newer = await settled([sleeper, *fresh], *"abc")
            assert newer.epoch > table.epoch
            assert all(daemon.state.generation_seen("job") == 9 for daemon in [sleeper, *fresh])

    virtually(work())


def test_a_restarted_daemon_remembers_what_it_had_seen() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            first = cluster.start(member("a"))
            table = await settled([first], "a")
            await kill(first)
            stores.replace()
            again = cluster.start(member("a"), first.highwater)
            assert again.state.table == table
            newer = await settled([again], "a")
            assert newer.epoch > table.epoch and again.events("cluster.distrusted")

    virtually(work())
