"""What a collector and its nodes tell one another, over the wire and back; also from a version before."""

from __future__ import annotations

import pytest
from snapd_proto import peer_pb2

from snapd.core.cluster import Code
from snapd.core.recovery import HeldRows, Inventory
from snapd.core.reports import FlushNews, Held, NodeReport, Orders
from snapd.errors import RemoteProtocolError
from snapd.rpc import peer_convert
from tests.support.collector_reports import snap

ROWS = HeldRows(
    snap(1), 0, 3, ("a", "b", "c", "d"), Code(2, 2), frozenset({(b"r" * 16, 1), (b"s" * 16, 0)}), frozenset({0, 1})
)  # fmt: skip


def through(inventory: Inventory) -> peer_pb2.InventoryReply:
    sender = peer_pb2.Sender(node=inventory.node)
    return peer_pb2.InventoryReply.FromString(
        peer_convert.inventory_to_proto(sender, inventory).SerializeToString()
    )


@pytest.mark.parametrize("found", [None, (snap(2), 7)])
def test_orders_come_through_with_what_is_being_recorded(found: tuple[object, int] | None) -> None:
    orders = Orders(
        number=3, generation=1, complete=snap(2), protected=snap(1), protected_epoch=6, found=found
    )  # type: ignore[arg-type]
    message = peer_pb2.Orders.FromString(peer_convert.orders_to_proto(orders).SerializeToString())
    back = peer_convert.orders_from_proto(message)
    assert back == orders and back.found == orders.found


def test_orders_and_reports_say_what_is_flushed_and_what_is_durable() -> None:
    orders = Orders(number=3, generation=1, complete=snap(5), flush=snap(5), durable=snap(2))
    message = peer_pb2.Orders.FromString(peer_convert.orders_to_proto(orders).SerializeToString())
    assert peer_convert.orders_from_proto(message) == orders
    for flush in (FlushNews(), FlushNews(snap(2), snap(5), "the store is away", True)):
        report = NodeReport(node="a", instance=1, serial=1, epoch=0, generation=1, world_size=1, flush=flush)
        sender = peer_pb2.Sender(node="a")
        sent = peer_convert.report_to_proto(sender, "job", report, known_orders=0, hold_s=0.0)
        assert peer_convert.report_from_proto(sent).flush == flush


def test_inventories_come_through_with_the_numbers_of_fragments() -> None:
    inventory = Inventory(node="a", held=(Held(snap(1), 0, 2, 10),), rows=(ROWS,), is_here=True)
    assert peer_convert.inventory_from_proto(through(inventory)) == inventory


def test_a_version_before_does_not_say_which_fragments_it_has() -> None:
    message = through(Inventory(node="a", rows=(ROWS,)))
    del message.rows[0].fragment_numbers[:]
    rows = peer_convert.inventory_from_proto(message).rows[0]
    assert rows.fragments == {(row * 16, number) for row in (b"r", b"s") for number in (0, 1)}


@pytest.mark.parametrize("numbers", [[0], [0, 2], [0, 1, 1]])
def test_fragments_that_do_not_exist_are_refused(numbers: list[int]) -> None:
    message = through(Inventory(node="a", rows=(ROWS,)))
    del message.rows[0].fragment_numbers[:]
    message.rows[0].fragment_numbers.extend(numbers)
    with pytest.raises(RemoteProtocolError):
        peer_convert.inventory_from_proto(message)
