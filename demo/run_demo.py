"""`make demo`: train, kill every rank with SIGKILL, start again, and prove that nothing changed, to the bit.

Exit status 0: every loss, parameter, optimizer tensor, RNG state and data position equals the
uninterrupted run's. Exit status 1: something differs (the first difference is printed), or the demo could
not be carried out.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import verdict
from node import Node
from picture import draw
from world import Kill, Launch, RunLog, Watch, kill_ranks, read_run

JOB = "demo"
RANKS = 2


class DemoFailed(Exception):
    """The demo could not be carried out, or its claim did not hold."""


def say(text: str) -> None:
    print(text, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="training steps (default 40)")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the training and of the kill's step and moment"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where logs and the picture go")
    return parser.parse_args()


def uninterrupted(args: argparse.Namespace) -> RunLog:
    """The reference: the same seed, no snapshots, no kill."""
    out = args.out / "reference"
    say(f"[1/4] reference run: {RANKS} ranks, {args.steps} steps, uninterrupted, without snapd")
    with Launch(out, steps=args.steps, seed=args.seed, ranks=RANKS) as launch:
        launch.wait(timeout_s=600)
    return read_run(out, RANKS)


def until_killed(args: argparse.Namespace, node: Node, watch: Watch, step_s: float) -> Kill:
    """Start the run with a snapshot after every step and kill all ranks somewhere in a step."""
    chance = random.Random(args.seed)
    step = chance.randrange(args.steps // 4, args.steps - args.steps // 5)
    delay_s = chance.random() * step_s
    say(f"[2/4] the same run, a snapshot after every step; SIGKILL {delay_s * 1e3:.0f} ms into step {step}")
    with Launch(
        args.out / "interrupted", steps=args.steps, seed=args.seed, ranks=RANKS, job=JOB, node=node
    ) as launch:
        launch.wait_for_step(step, timeout_s=300)
        time.sleep(delay_s)
        kill = kill_ranks(launch, newest_reported=watch.newest)
        if launch.wait_end(timeout_s=60) == 0:
            raise DemoFailed("the run ended well although its ranks were killed")
    where = ", ".join(f"rank {rank}: step {beat.step}, {beat.phase}" for rank, beat in enumerate(kill.beats))
    say(f"      killed ({where}); newest complete snapshot reported: {kill.newest_reported}")
    return kill


def started_again(args: argparse.Namespace, node: Node, kill: Kill) -> RunLog:
    say("[3/4] the ranks start again and go on from the newest complete snapshot")
    out = args.out / "interrupted"
    with Launch(out, steps=args.steps, seed=args.seed, ranks=RANKS, job=JOB, node=node) as launch:
        launch.wait(timeout_s=600)
    run = read_run(out, RANKS)
    run.restarted_t = launch.started_t
    starts = {event["start"] for event in run.of("restored") if event["t"] > kill.t}
    if len(starts) != 1:
        raise DemoFailed(f"the ranks went on from different steps: {sorted(starts)}")
    run.start = starts.pop()
    if run.start <= 0:
        raise DemoFailed("the second start found no snapshot")
    if kill.newest_reported is not None and run.start < kill.newest_reported[1]:
        raise DemoFailed(
            f"went on from step {run.start}, but {kill.newest_reported[1]} had been reported complete"
        )
    return run


def demo(args: argparse.Namespace) -> None:
    if args.out.exists():
        shutil.rmtree(args.out)
    args.out.mkdir(parents=True)
    began = time.monotonic()
    reference = uninterrupted(args)
    step_s = reference.step_seconds()
    with Node("snapd-demo") as node:
        try:
            with Watch(node, JOB) as watch:
                kill = until_killed(args, node, watch, step_s)
                run = started_again(args, node, kill)
        finally:
            shutil.copyfile(node.log, args.out / "daemon.log")
    say("[4/4] comparing with the reference, bit by bit")
    found = verdict.compare(args.out, reference, run, kill, RANKS, args.steps)
    say("")
    say(verdict.table(reference, run, kill, watch, found))
    draw(args.out, reference, run, kill, watch)
    say(f"\npicture: {args.out}/demo.png ({time.monotonic() - began:.0f} s in all)")
    if found.difference:
        raise DemoFailed(f"NOT equal: {found.difference}")
    say(
        f"\nEQUAL TO THE BIT: {found.losses} losses, {found.tensors} tensors (parameters, moments, RNG, data)"
    )
    say(f"of {RANKS} ranks, after SIGKILL in step {kill.step} and a restart from step {run.start}.")


def interrupted_by_signal(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, interrupted_by_signal)  # the same clean-up as for Ctrl-C
    try:
        demo(arguments())
    except (DemoFailed, verdict.RunFailed) as error:
        say(f"\nFAILED: {error}")
        return 1
    except KeyboardInterrupt:
        say("\nstopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
