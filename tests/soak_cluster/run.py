"""`make soak-cluster`: m of k + m nodes lose daemon, trainer and memory at random moments, over and over.

    python tests/soak_cluster/run.py --nodes 8 --code 6+2 --rounds 50 --seed 1

Exit status 0: every promise held. Each round is a line; what broke is told with the daemons' logs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from snapd.core.cluster import Code
from tests.cluster.harness.cluster import cluster
from tests.cluster.harness.observer import Observer, runtimes_of
from tests.cluster.harness.rounds import Rounds, make_recipes


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--code", default="6+2", help="K+M")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=240, help="length of a job; a new one follows")
    parser.add_argument("--even", action="store_true", help="no rank has more bytes than the others")
    parser.add_argument("--one-job", action="store_true", help="no second job beside the first")
    parser.add_argument("--plaintext", action="store_true", help="no certificates")
    parser.add_argument(
        "--leader", action="store_true", help="no etcd: the first host's daemon leads, and is spared"
    )
    parser.add_argument("--loopback", action="store_true", help="no network namespaces")
    parser.add_argument(
        "--without-excess", action="store_true", help="do not end with the loss of m + 1 nodes"
    )
    return parser.parse_args()


def main() -> int:
    args = arguments()
    code = Code.parse(args.code)
    recipes = make_recipes(
        args.nodes, args.steps, args.seed, is_uneven=not args.even, is_double=not args.one_job
    )
    with cluster(
        args.nodes, args.code, is_tls=not args.plaintext, is_etcd=not args.leader,
        is_namespaced=False if args.loopback else None,
    ) as made, Observer(runtimes_of(made)) as observer:  # fmt: skip
        where = "namespaces" if made.hosts.is_namespaced else "loopback"
        say(f"{args.nodes} nodes, {args.code}, {where}: {made.folder}")
        made.start()
        made.wait_settled()
        rounds = Rounds(made, observer, recipes, m=code.m, seed=args.seed, say=say)
        try:
            play(rounds, args)
        except BaseException:
            say(made.tails())
            raise
        say(f"all promises held; status was read {observer.report_count} times")
    return 0


def play(rounds: Rounds, args: argparse.Namespace) -> None:
    rounds.prepare()
    for number in range(1, args.rounds + 1):
        began = time.monotonic()
        outcome = rounds.play()
        steps = ", ".join(f"{job}: protected {p}, restored {r}" for job, (p, r) in outcome.steps.items())
        times = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in outcome.seconds.items())
        lost = "+".join(outcome.lost) + (", and their replacements" if outcome.is_twice else "")
        say(f"round {number}/{args.rounds}: lost {lost}; {steps}; {times}; {time.monotonic() - began:.0f} s")
    if not args.without_excess:
        say(f"one more than m is refused: {rounds.lose_too_many()[0].splitlines()[0]}")


if __name__ == "__main__":
    sys.exit(main())
