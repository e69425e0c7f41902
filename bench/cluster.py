"""What protection costs and how fast a lost node comes back, on this machine: `python bench/cluster.py --help`.

    traffic   seconds until protected, CPU per protected GB against the same bytes through the same transport without
              coding, bytes on the network and parity in memory against the formulas
    rebuild   a lost node's shard decoded from the others, against the same bytes pulled with no decoding
    steps     what protection adds to the steps of a real FSDP2 job, in alternating pairs

Each part says what it did and how; figures are medians of several turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cluster_scene as scene
import cluster_steps

from snapd.core.cluster import Code
from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.light import LightWorld

GB = 1e9
TURNS = 4
BACK_S = 3.0  # the empty node backs its arena when the job opens: over before what is measured begins


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["traffic", "rebuild", "steps"])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--code", default="2+2")
    parser.add_argument("--megabytes", type=int, default=1500, help="of state, all nodes together")
    parser.add_argument(
        "--chunk-kib", type=int, default=0, help="size of chunks; 0: as the daemons choose for that state"
    )
    parser.add_argument("--step-megabytes", type=int, default=48, help="of state in the part `steps`")
    parser.add_argument("--step-code", default="3+1")
    parser.add_argument("--step-interval", type=int, default=25, help="steps between snapshots")
    parser.add_argument("--step-window", type=float, default=20.0, help="seconds of each half of a pair")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--bulk", choices=["tls", "plain", "both"], default="both")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    results: dict[str, Any] = {}
    for bulk in ["tls", "plain"] if args.bulk == "both" else [args.bulk]:
        found: dict[str, Any] = {}
        if {"traffic", "rebuild"} & set(args.parts):
            with scene.measured_cluster(args.code, args.nodes, is_tls=bulk == "tls") as made:
                world = scene.world_of(made, "bench", args.megabytes * 1_000_000, args.chunk_kib << 10)
                try:
                    if "traffic" in args.parts:
                        found["traffic"] = traffic(made, world, Code.parse(args.code))
                    if "rebuild" in args.parts:
                        found["rebuild"] = rebuild(made, world)
                finally:
                    world.kill()
        if "steps" in args.parts:
            found["steps"] = cluster_steps.measure(
                args.step_code,
                args.nodes,
                args.step_megabytes * 1_000_000,
                pairs=args.pairs,
                interval=args.step_interval,
                is_tls=bulk == "tls",
                window_s=args.step_window,
            )
        results[bulk] = found
        show(bulk, found)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def show(bulk: str, found: dict[str, Any]) -> None:
    for part, figures in found.items():
        for name, value in figures.items():
            shown = f"{value:.3f}" if isinstance(value, float) else value
            print(f"{bulk:6} {part:8} {name:44} {shown}", flush=True)


def protect_once(made: Cluster, world: LightWorld) -> tuple[scene.Reading, scene.Reading, float]:
    """Capture a step and protect it: readings when it is complete and when it is protected; the hand-over's seconds."""
    step = world.last + 1
    held_s = world.capture(step)
    scene.wait_complete(made, world.job, step)
    before = scene.read(made)
    scene.wait_protected(made, world.job, step)
    return before, scene.read(made), held_s


def traffic(made: Cluster, world: LightWorld, code: Code) -> dict[str, Any]:
    """All chunks but one per rank are new at each step."""
    protect_once(made, world)  # segments are backed in the first turn
    protect_once(made, world)
    turns = [protect_once(made, world) for _ in range(TURNS)]
    state = world.chunk_count * world.chunk_bytes * len(world.ranks)
    moved = (
        (world.chunk_count - 3) * world.chunk_bytes * len(world.ranks)
    )  # without layout, early values, frozen chunk
    seconds = statistics.median(after.t - before.t for before, after, _ in turns)
    cpu = statistics.median(after.cpu_s - before.cpu_s for before, after, _ in turns)
    sent = statistics.median(after.sent_bytes - before.sent_bytes for before, after, _ in turns)
    time.sleep(1.0)  # what is no longer needed has been dropped
    used, backed = scene.parity_bytes(made, world.job)
    at, peers = made.daemons[0], made.daemons[1:]
    formula = (code.k + code.m - 1) / code.k
    pulls = [scene.pull(made, world.job, at=at, peers=peers, nbytes=int(moved * formula)) for _ in range(2)]
    plain = statistics.median((p["cpu_s"] + p["daemons_cpu_s"]) / (p["nbytes"] / GB) for p in pulls)
    return {
        "chunk_KiB": world.chunk_bytes >> 10,
        "state_GB": state / GB,
        "changed_GB": moved / GB,
        "seconds_until_protected": seconds,
        "GB_per_s": moved / GB / seconds,
        "cpu_s_per_protected_GB": cpu / (moved / GB),
        "plain_cpu_s_for_the_same_bytes": plain * formula,
        "cpu_ratio_at_most_1.5": cpu / (moved / GB) / (plain * formula),
        "network_bytes_per_state_byte": sent / moved,
        "network_formula": formula,
        "network_over_formula_percent": 100 * (sent / moved / formula - 1),
        "parity_in_use_over_formula": used / (state * code.m / code.k),
        "parity_backed_over_formula": backed / (state * code.m / code.k),
        "plain_pull_GB_per_s": statistics.median(p["nbytes"] / GB / p["seconds"] for p in pulls),
    }


def rebuild(made: Cluster, world: LightWorld) -> dict[str, Any]:
    """The last node loses all; its rank's shard is decoded there when the job starts again."""
    found: list[dict[str, Any]] = []
    protect_once(made, world)
    for _ in range(3):
        protect_once(made, world)
        for rank in world.ranks:
            rank.kill()
        lost = made.daemons[-1]
        lost.kill()
        lost.wipe()
        lost.start()
        made.wait_settled()
        again = LightWorld(
            made.daemons, world.job, state_bytes=world.state_bytes, chunk_bytes=world.asked_chunk_bytes
        )
        world.ranks = again.ranks  # the caller ends what it began
        world.open()
        time.sleep(BACK_S)
        world.restore()
        brought = lost.events("shard.brought")[-1]
        pulled = scene.pull(
            made, world.job, at=lost, peers=made.daemons[:-1], nbytes=brought["fetched_bytes"]
        )
        found.append(brought | {"pull_seconds": pulled["seconds"], "pull_nbytes": pulled["nbytes"]})
        time.sleep(1.0)
    decode = statistics.median(one["fetched_bytes"] / one["seconds"] for one in found)
    plain = statistics.median(one["pull_nbytes"] / one["pull_seconds"] for one in found)
    return {
        "shard_GB": found[-1]["nbytes"] / GB,
        "decoded_GB": found[-1]["decoded_bytes"] / GB,
        "fetched_GB": found[-1]["fetched_bytes"] / GB,
        "seconds": statistics.median(one["seconds"] for one in found),
        "shard_GB_per_s": statistics.median(one["nbytes"] / GB / one["seconds"] for one in found),
        "fetched_GB_per_s": decode / GB,
        "plain_pull_GB_per_s": plain / GB,
        "ratio_at_least_0.6": decode / plain,
    }


if __name__ == "__main__":
    sys.exit(main())
