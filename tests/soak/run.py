"""`make soak`: every named point several times, and random kills until every phase was hit often enough.

    python tests/soak/run.py --seed 1 --points 5 --moments 100

Exit status 0: every promise held. The histogram of the phases hit is printed at the end, in either case.
"""

from __future__ import annotations

import argparse
import sys
import time

from rounds import Random, client_point, daemon_point, is_once, named_points
from scene import Scene, open_scene

HITS_MIN = 5
PHASES = (
    "starting", "restoring", "handing over", "updating",
    "computing, copy under way", "computing, daemon recording", "computing, all captured",
)  # fmt: skip
COUNTS = (1, 2, 3, 5, 8)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def all_points(scene: Scene, times: int) -> None:
    """Each point `times` times: at its first, second, third, ... passage where it is passed that often."""
    for side in ("client", "daemon"):
        for point in named_points(side):
            for turn in range(times):
                count = 1 if is_once(point) else COUNTS[turn % len(COUNTS)]
                if side == "client":
                    client_point(scene, point, count=count, ranks=1 + turn % 2, victim=turn % 2)
                else:
                    daemon_point(scene, point, count=count, ranks=1 + turn % 2)
            if side == "client":
                client_point(scene, point, count=1, action="stop")
            say(f"{point}: killed {times} times")


def one_moment(rounds: Random, turn: int) -> str:
    kinds = (
        rounds.kill_all, rounds.kill_one, rounds.kill_daemon, lambda: rounds.kill_all(during="restore"),
        lambda: rounds.kill_all(during="start"), lambda: rounds.stop_and_continue("one"), rounds.kill_all,
        lambda: rounds.kill_one(during="restore"), rounds.kill_daemon, lambda: rounds.stop_and_continue("daemon"),
        lambda: rounds.stop_and_continue("all"), rounds.zombie,
    )  # fmt: skip
    return kinds[turn % len(kinds)]()


def random_moments(scene: Scene, seed: int, moments: int) -> None:
    """`moments` of them, then more, up to three times as many, until each phase was hit HITS_MIN times."""
    rounds = Random(scene, seed)
    for turn in range(moments * 3):
        if turn >= moments and not missing(scene):
            return
        phase = one_moment(rounds, turn)
        if turn % 10 == 9:
            say(f"{turn + 1} moments, the last one in: {phase}")


def missing(scene: Scene) -> list[str]:
    return [phase for phase in PHASES if scene.phases[phase] < HITS_MIN]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--points", type=int, default=5, help="kills per named point (0: none)")
    parser.add_argument("--moments", type=int, default=100, help="random moments")
    parser.add_argument("--steps", type=int, default=1000, help="steps of one job's life")
    args = parser.parse_args()
    began = time.monotonic()
    with open_scene(steps=args.steps) as scene:
        try:
            if args.moments:
                random_moments(scene, args.seed, args.moments)
            if args.points:
                all_points(scene, args.points)
        finally:
            say(f"{scene.restores} restores judged, {scene.observer.report_count} reports remembered; hit:")
            for name, count in sorted(scene.phases.items()):
                print(f"  {count:5d}  {name}")
        left = missing(scene) if args.moments else []
    say(
        f"{time.monotonic() - began:.0f} s"
        + (f"; NOT HIT {HITS_MIN} TIMES: {left}" if left else "; every promise held")
    )
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
