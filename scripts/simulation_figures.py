"""Writes the tables of docs/simulation.md: planted bugs, time of one decision, writes to the coordinator's store."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from snapd.core.cluster import Code, GroupTable, Member
from snapd.core.collector import Collector
from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.placement import place
from snapd.core.protection import PlacedRecord, RowMap, make_plan
from snapd.core.recovery import HeldRows, Inventory, RowSet, Situation, choose_among_nodes
from snapd.core.reports import Held, NodeReport
from snapd.sim.__main__ import find_bug
from snapd.sim.bugs import MIXES, Bug
from snapd.sim.runs import crowd_settings
from snapd.sim.simulation import Simulation

DOCS = Path(__file__).resolve().parents[1] / "docs" / "simulation.md"
ASKED = Code(6, 2)
CHUNKS = 16  # of each shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", choices=["bugs", "decisions", "writes"], action="append")
    parser.add_argument("--seeds", type=int, default=2000)
    options = parser.parse_args()
    tables = {
        "bugs": lambda: bugs(options.seeds),
        "decisions": lambda: decisions((64, 512, 4096)),
        "writes": lambda: writes((8, 512, 4096)),
    }
    for name in options.table or list(tables):
        text = tables[name]()
        print(text)
        put(name, text)


def put(name: str, table: str) -> None:
    """Replace what stands between the marks of a table."""
    text = DOCS.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    DOCS.write_text(pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text))


def bugs(seed_count: int) -> str:
    lines = ["| planted bug | what it breaks | faults | found at seed | promise |", "|---|---|---|---|---|"]
    for bug in Bug:
        outcome = find_bug(bug, range(1, seed_count + 1))
        found = f"{outcome.seed} | {outcome.promise}" if outcome else f"not within {seed_count} | "
        mix = ", ".join(MIXES.get(bug, ("all kinds",)))
        lines.append(f"| {bug.name.lower().replace('_', ' ')} | {bug.value} | {mix} | {found} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def members(count: int) -> list[Member]:
    return [
        Member(
            node=f"n{i:04}",
            host=f"h{i}",
            domain=f"rack{i % max(8, count // 16)}",
            address="",
            bulk_address="",
            arena_id="a",
            version="",
        )
        for i in range(count)
    ]


def record(rank: int, world_size: int) -> ShardRecord:
    chunks = tuple(
        Chunk(1 << 22, rank.to_bytes(8, "little") + i.to_bytes(8, "little"), Place(0, i))
        for i in range(CHUNKS)
    )
    return ShardRecord(
        "job", SnapshotId(1, 1), rank, world_size, 1 << 22, 0, 0, 0, chunks, None, 0.0, bytes(16)
    )  # fmt: skip


def milliseconds(work: object) -> float:
    """Of processor time, the least of three."""
    assert callable(work)
    spent_s = []
    for _ in range(3):
        began_s = time.process_time()
        work()
        spent_s.append(time.process_time() - began_s)
    return min(spent_s) * 1e3


def decisions(sizes: tuple[int, ...]) -> str:
    """One of each, at its worst: all reports are new, all nodes are placed anew or one is lost."""
    lines = [
        "| nodes | place all | place, one lost | collector settles | rows of one group | choose, one lost |",
        "|---|---|---|---|---|---|",
    ]
    for count in sizes:
        nodes = members(count)
        first = place(None, nodes, ASKED)
        table = first.table(1, ASKED)
        placed_ms = milliseconds(lambda nodes=nodes: place(None, nodes, ASKED))
        moved_ms = milliseconds(lambda nodes=nodes, table=table: place(table, nodes[1:], ASKED))
        collector = collector_of(nodes, count)
        settled_ms = milliseconds(lambda collector=collector, table=table: collector.settle(table))
        group = table.groups[0]
        assert group.code is not None
        row_map = RowMap(SnapshotId(1, 1), 1, 0, group.nodes, group.code)
        records = [PlacedRecord(node, record(i, count)) for i, node in enumerate(group.nodes)]
        rows_ms = milliseconds(lambda row_map=row_map, records=records: make_plan(row_map, records))
        situation = situation_of(nodes, table, count, lost=group.nodes[0])
        choice = choose_among_nodes(situation)
        assert any(source.row_set is not None for source in choice.sources), choice.decision.reason
        chosen_ms = milliseconds(lambda situation=situation: choose_among_nodes(situation))
        cells = [f"{ms:.1f} ms" for ms in (placed_ms, moved_ms, settled_ms, rows_ms, chosen_ms)]
        lines.append(f"| {count:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def collector_of(nodes: list[Member], count: int) -> Collector:
    collector = Collector(4)
    for rank, member in enumerate(nodes):
        held = tuple(Held(SnapshotId(1, step), rank, count, 1 << 26) for step in (1, 2, 3))
        collector.take(
            NodeReport(
                node=member.node,
                instance=1,
                serial=1,
                epoch=1,
                generation=1,
                world_size=count,
                held=held,
                passed={rank: 3},
                served=(rank,),
                closed_below=1,
                keep_complete=2,
                is_capturing=True,
            )
        )
    return collector


def situation_of(nodes: list[Member], table: GroupTable, count: int, *, lost: str) -> Situation:
    """Every node holds its rank's shard and its part of the parity, and one of them is lost."""
    ranks = {member.node: rank for rank, member in enumerate(nodes)}
    inventories: list[Inventory] = []
    row_sets: list[RowSet] = []
    for group in table.groups:
        assert group.code is not None
        row_map = RowMap(SnapshotId(1, 1), 1, group.number, group.nodes, group.code)
        rows = make_plan(
            row_map, [PlacedRecord(node, record(ranks[node], count)) for node in group.nodes]
        ).rows
        covered = frozenset(ranks[node] for node in group.nodes)
        for node in group.nodes:
            parity = frozenset(
                (row.id, row.parity_nodes.index(node)) for row in rows if node in row.parity_nodes
            )
            held_rows = HeldRows(row_map.id, group.number, 1, group.nodes, group.code, parity, covered)
            held = (Held(row_map.id, ranks[node], count, 1),)
            if node != lost:
                inventories.append(Inventory(node=node, held=held, rows=(held_rows,)))
        if lost in group.nodes:
            living = tuple(node for node in group.nodes if node != lost)
            row_sets.append(RowSet(row_map.id, group.number, 1, group.nodes, group.code, rows, living, count))
    return Situation(
        inventories=inventories, row_sets=row_sets, world_size=count, newest_known=SnapshotId(1, 1)
    )


def writes(sizes: tuple[int, ...]) -> str:
    """Counted in the simulated store while a job of one rank a node trains, one step a second, all of it protected."""
    lines = [
        "| nodes | snapshots | writes per s beside leases | writes per snapshot | lease renewals per s |",
        "|---|---|---|---|---|",
    ]
    for count in sizes:
        sim = Simulation(1, crowd_settings(count))
        sim.boot()
        sim.run_for(300.0, lambda sim=sim: sim.truth.announced is not None)
        before, at_s, step = dict(sim.store.writes), sim.loop.now_s, sim.training.step
        sim.run_for(10.0)
        newest = sim.truth.announced
        assert newest is not None and newest.step >= step + 5, "protection fell behind"
        seconds, snapshots = sim.loop.now_s - at_s, sim.training.step - step
        counted = {key: value - before.get(key, 0) for key, value in sim.store.writes.items()}
        renewals = counted.pop("lease renewals", 0)
        transactions = counted.pop("transactions", 0)
        sim.close()
        lines.append(
            f"| {count:,} | {snapshots} | {transactions / seconds:.2f} | {transactions / max(1, snapshots):.2f}"
            f" | {renewals / seconds:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
