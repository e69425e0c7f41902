"""Seeds: each stands for a cluster, a schedule of faults, and the demand for progress after them."""

from __future__ import annotations

import random
import traceback
from dataclasses import replace

from snapd.core.cluster import Code
from snapd.errors import SnapdError
from snapd.sim.facts import BegunAnew
from snapd.sim.faults import Faults
from snapd.sim.settings import Clock, SimSettings
from snapd.sim.simulation import BrokenPromise, Outcome, Simulation

SHAPES = (
    SimSettings(nodes=3, ranks=3, code=Code(2, 1)),
    SimSettings(nodes=4, ranks=4, code=Code(2, 2), chunks=(3, 2)),
    SimSettings(nodes=5, ranks=4, code=Code(2, 1), chunks=(2, 2, 2)),
    SimSettings(nodes=6, ranks=4, code=Code(2, 1), chunks=(3, 2)),
    SimSettings(nodes=6, ranks=6, code=Code(4, 2), chunks=(3, 2, 2)),
    SimSettings(nodes=2, ranks=2, code=Code(1, 1), chunks=(3, 2)),
    SimSettings(nodes=8, ranks=4, code=Code(6, 2), chunks=(3, 2), racks=4),
)


def settings_of(seed: int, **changes: object) -> SimSettings:
    """The cluster of a seed. One in ten loses more than its code bears."""
    rng = random.Random(f"shape {seed}")
    shape = rng.choice(SHAPES)
    shape = replace(shape, beyond_code=rng.random() < 0.1, step_s=rng.choice((0.7, 1.0, 1.5)))
    return replace(shape, **changes)  # type: ignore[arg-type]


def crowd_settings(nodes: int, **changes: object) -> SimSettings:
    """Many nodes, one rank on each, all of them there from the start; times as in a real cluster."""
    settings = SimSettings(
        nodes=nodes,
        ranks=nodes,
        code=Code(6, 2),
        chunks=(2,),
        racks=max(8, nodes // 8),
        lease_s=5.0,
        lost_after_s=30.0,
        start_timeout_s=600.0,
        restore_settle_s=60.0,
        restore_finish_s=60.0,
        is_crowd=True,
        kinds=("crash", "lose", "trainer"),
    )
    return replace(settings, **changes)  # type: ignore[arg-type]


def run_seed(seed: int, settings: SimSettings | None = None, *, clock: Clock | None = None) -> Outcome:
    """One seed from the first boot to the demanded progress. Never raises for what the simulated system does."""
    sim = Simulation(seed, settings or settings_of(seed), clock=clock)
    outcome = Outcome(seed)
    faults = Faults(sim)
    try:
        _run(sim, faults)
    except BegunAnew as error:
        sim.note("*", str(error))
    except BrokenPromise as error:
        outcome.promise, outcome.broken = error.promise, str(error)
    except (SnapdError, AssertionError, LookupError, ValueError, TypeError, AttributeError) as error:
        outcome.promise, outcome.broken = "crash", f"{type(error).__name__}: {error}"
        for line in traceback.format_exception(error)[-8:]:
            sim.note("!", line.rstrip())
    outcome.trace = [str(line) for line in sim.trace]
    outcome.node_faults, outcome.by_kind = faults.node_faults, faults.by_kind
    outcome.events, outcome.virtual_s = sim.loop.events, sim.loop.now_s
    outcome.steps, outcome.worlds = sim.training.steps_done, sim.training.worlds
    outcome.restores, outcome.refusals = sim.truth.restores, sim.truth.refusals
    outcome.fresh_starts = sim.training.fresh_starts
    sim.close()
    return outcome


def _run(sim: Simulation, faults: Faults) -> None:
    settings = sim.settings
    sim.boot()
    sim.run_for(60.0, lambda: sim.truth.announced is not None)
    if sim.truth.announced is None:
        raise BrokenPromise("P6", "nothing was protected within 60 s of a quiet start")
    sim.start(faults.run())
    sim.run_for(settings.faults * settings.fault_every_s * 20 + 60, lambda: faults.is_over)
    if not faults.is_over:
        raise BrokenPromise("P6", "the faults did not end")
    healed_s = sim.loop.now_s
    sim.run_for(settings.progress_s, lambda: sim.is_protected_after(healed_s))
    if not sim.is_protected_after(healed_s):
        text = f"nothing newer was protected {settings.progress_s:.0f} s after the faults: {_where_it_stands(sim)}"
        raise BrokenPromise("P6", text)


def _where_it_stands(sim: Simulation) -> str:
    """What each collector thinks, and who is not well."""
    words = []
    for machine in sim.machines.values():
        daemon = machine.daemon
        if daemon is None or not daemon.life.is_alive:
            words.append(f"{machine.name} is down")
            continue
        if daemon.state.distrust:
            words.append(f"{machine.name} distrusts: {daemon.state.distrust}")
        collector = daemon.collector
        if collector is not None:
            orders, table = collector.orders, daemon.table
            target = orders.target or orders.complete
            ranks = collector.core.holders().get(target) if target is not None else None
            lack = collector.core.missing_parts(target, ranks, table) if target and ranks and table else ""
            words.append(
                f"{machine.name} collects: complete {orders.complete}, target {orders.target}, protected"
                f" {orders.protected}, {orders.reason}; {lack}"
            )
    return "; ".join(words) or "nobody collects"
