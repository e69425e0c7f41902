"""The daemon's wiring: folders, lock, node, services, signals. Nothing is decided here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from snapd import __version__
from snapd.config import Config, MetricsConfig, Paths, node_settings, paths, unknown_variables
from snapd.config_cluster import plan_cluster
from snapd.config_tiers import (
    TierConfig,
    check_tier,
    collect_rules,
    hurried,
    node_folder,
    read_threads,
    store_of,
)
from snapd.core.flushing import FlushRules
from snapd.core.scrubbing import ScrubRules
from snapd.errors import ConfigError, ConflictError, IntegrityError, SnapdError
from snapd.memory.folders import ArenaFolder, FolderLock, private_folder
from snapd.memory.shortage import raise_open_files
from snapd.obs.disk_metrics import DiskMetrics
from snapd.obs.log import BoundedFile, EventLog, LogStream, configure_logging
from snapd.obs.metrics import Metrics
from snapd.obs.tier_metrics import TierMetrics
from snapd.rpc.handshake import HandshakeServer
from snapd.rpc.server import RpcServer
from snapd.runtime import faultpoints
from snapd.runtime.context import Context, Environment
from snapd.runtime.disk_node import NodeDisks
from snapd.runtime.disk_tier import DiskSettings, DiskTier
from snapd.runtime.hash_threads import hash_threads
from snapd.runtime.leaving import finish_levels
from snapd.runtime.node import Node
from snapd.runtime.tier_look import TierLook
from snapd.runtime.tier_opening import open_at_start
from snapd.runtime.tier_restoring import TierRestores
from snapd.runtime.tiers import NodeTier, TierSettings
from snapd.store.directory import DirectoryStore
from snapd.store.surroundings import Surroundings
from snapd.units import MIB

if TYPE_CHECKING:
    from snapd.clustering import Clustering

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_UNUSABLE = 3
EXIT_BUG = 70
TIER_CLOSE_S = 3.0
SCRUB_RATE_MAX = 64 * MIB  # where nothing bounds what goes to the node's own disk
SOCKET_PATH_MAX = 107


def run_daemon(config: Config, *, is_embedded: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; a second one ends at once. Returns the exit code, after one line on what
    is wrong.
    """
    where = paths(config)
    os.umask(0o077)
    raise_open_files()
    with contextlib.ExitStack() as stack:
        try:
            faultpoints.arm(config.fault.points)
            log = configure_logging(_log_stream(config, stack), config.log.level)
            arena = _take_folders(where, stack)
            return asyncio.run(serve(config, where, arena, log, is_embedded=is_embedded))
        except (ConfigError, ConflictError, IntegrityError) as error:
            print(f"snapd: {error}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr)
            return EXIT_UNUSABLE if isinstance(error, IntegrityError) else EXIT_USAGE


def _log_stream(config: Config, stack: contextlib.ExitStack) -> LogStream:
    if not config.log.file:
        return sys.stderr
    try:
        return stack.enter_context(BoundedFile(config.log.file))
    except OSError as error:
        raise ConfigError(
            f"cannot write the log {config.log.file}: {error.strerror}", kind="log_file"
        ) from error


def _take_folders(where: Paths, stack: contextlib.ExitStack) -> ArenaFolder:
    """Check both folders and lock both: a second daemon on either is refused."""
    if len(str(where.handshake_socket)) > SOCKET_PATH_MAX:
        raise ConfigError(f"the path of the sockets is too long: {where.runtime}", kind="folder")
    private_folder(where.runtime)
    stack.callback(FolderLock.take(where.lock).close)
    arena = ArenaFolder.open(where.arena)
    stack.callback(FolderLock.take(where.arena / "daemon.lock").close)
    for path in (where.grpc_socket, where.handshake_socket):
        path.unlink(missing_ok=True)  # stale: we hold the lock
    return arena


def real_environment() -> Environment:
    """The clock, randomness and identity of this machine."""
    return Environment(
        monotonic_s=time.monotonic,
        monotonic_ns=time.monotonic_ns,
        wall_s=time.time,
        random_id=lambda: 1 + secrets.randbelow((1 << 48) - 1),
        random_secret=lambda: secrets.token_bytes(16),
        random_token=lambda: secrets.token_hex(16),
    )


async def serve(
    config: Config, where: Paths, arena: ArenaFolder, log: EventLog, *, is_embedded: bool = False
) -> int:
    """Run until a signal or a fatal error; the arena stays as it is. Returns the exit code."""
    stop = asyncio.Event()
    failures: list[BaseException] = []
    loop, is_hanging = asyncio.get_running_loop(), False

    def fatal(error: BaseException) -> None:
        failures.append(error)
        stop.set()

    _on_signals(stop, log)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: _unhandled(context, log, fatal))
    settings = node_settings(config)
    with (
        hash_threads(settings.hash_threads) as hashing,
        ThreadPoolExecutor(1, thread_name_prefix="snapd-back") as blocking,
    ):
        context = Context(
            settings,
            arena,
            log,
            Metrics(),
            real_environment(),
            hashing,
            blocking,
            fatal,
            held_by_job=dict,
            quarantine=fatal,
        )
        _serve_metrics(config.metrics, context.metrics)
        for problem in unknown_variables():
            log.warning("variable.unknown", reason=problem)
        node = Node(context, is_embedded=is_embedded)
        clustering: Clustering | None = None
        try:
            clustering = await _join_cluster(config, node)
            node.tier = _tier(config.tier, node)
            _restore_from(config.tier, node)
            node.disks = await _disks(config.tier, node)
            node.start()
            if node.tier is not None:
                context.spawn(open_at_start(node.tier, log), "open the tier")
            if clustering is not None:
                clustering.cluster.start()
            await _serve_node(config, where, node, stop, is_failing=lambda: bool(failures))
        finally:
            if clustering is not None:
                await clustering.stop()
            node.stop()
            if node.tier is not None:
                is_hanging = not await loop.run_in_executor(None, node.tier.close, TIER_CLOSE_S)
            if node.tier_restores is not None:
                is_hanging |= not await loop.run_in_executor(None, node.tier_restores.close, TIER_CLOSE_S)
            if node.disks is not None:
                is_hanging |= not await loop.run_in_executor(None, node.disks.tier.close, TIER_CLOSE_S)
    refused = next((error for error in failures if isinstance(error, (ConfigError, ConflictError))), None)
    if refused is not None:
        raise refused  # its name is taken, its host has a daemon already, ...: one line, not a bug of ours
    for error in failures:
        log.error("daemon.failed", exception=error, reason=str(error))
    log.info("daemon.stopped", pid=os.getpid())
    code = EXIT_BUG if failures else EXIT_OK
    if is_hanging:  # nothing in the arena, and nothing in the tier, needs the thread that waits for a store
        log.warning("daemon.killed", reason="a request to a tier hangs")
        os._exit(code)
    return code


def _serve_metrics(config: MetricsConfig, metrics: Metrics) -> None:
    """
    Raises:
        ConfigError: kind `address`: nobody can listen there.
    """
    if not config.port:
        return
    try:
        metrics.serve(config.address, config.port)
    except OSError as error:
        raise ConfigError(
            f"metrics cannot be served on {config.address}:{config.port}: {error.strerror or error}",
            kind="address",
            hint="another metrics.port, or the address of this machine in metrics.address",
        ) from error


async def _join_cluster(config: Config, node: Node) -> Clustering | None:
    """Start what other daemons need of this one, if there is a coordinator."""
    plan = plan_cluster(config.cluster)
    if plan is None:
        return None
    from snapd.clustering import start_cluster  # a daemon alone needs none of it

    return await start_cluster(config, plan, node)


def _tier(config: TierConfig, node: Node) -> NodeTier | None:
    """The shared tier, if there is one; nothing is asked of it yet.

    Raises:
        ConfigError: the settings do not go together.
    """
    if not config.shared:
        return None
    check_tier(config)
    context = node.context
    environment = context.environment
    surroundings = _surroundings(environment)
    settings = TierSettings(
        url=config.shared,
        open=lambda: store_of(config, surroundings),
        open_hurried=lambda: store_of(hurried(config), surroundings),
        rules=FlushRules(every_steps=config.every_steps, every_s=config.every),
        compression=config.compression,
        rate=config.rate,
        single_writer=config.single_writer == "yes",
        intent_ttl_s=config.intent_ttl,
        gc_every_s=config.gc_every,
        grace_s=config.grace,
        collect=collect_rules(config),
    )
    return NodeTier(
        settings, environment, context.log, TierMetrics(context.metrics.registry), _name(node)[:200]
    )


def _restore_from(config: TierConfig, node: Node) -> None:
    """The shared tier, if there is one, is a source of restores, too."""
    if node.tier is None:
        return
    node.tier_restores = TierRestores(
        config.shared,
        node.tier.settings.open,
        wait_s=config.restore_wait,
        read_threads=read_threads(config, config.shared),
    )
    if node.cluster is not None:
        node.cluster.tier_look = TierLook(node.tier_restores, node.jobs.get)


async def _disks(config: TierConfig, node: Node) -> NodeDisks | None:
    """The node's own disk, if there is one, and which generations it has.

    Raises:
        ConfigError, ConflictError: the settings do not go together, or the folder is somebody else's.
    """
    if not config.node:
        return None
    check_tier(config)
    context, cluster = node.context, node.cluster
    surroundings, folder = _surroundings(context.environment), node_folder(config)
    settings = DiskSettings(
        path=folder,
        open=lambda: DirectoryStore(folder, surroundings, single_writer=True),
        rules=FlushRules(every_s=config.node_every),
        rate=config.node_rate,
        keep=config.node_keep,
        scrub=ScrubRules(config.node_scrub, config.node_rate / 2 if config.node_rate else SCRUB_RATE_MAX),
        is_alone=cluster is None,
        wait_s=config.restore_wait,
    )
    metrics = DiskMetrics(context.metrics.registry)
    tier = DiskTier(settings, context.environment, context.log, metrics, _name(node)[:200])

    def saw_generation(job: str, generation: int) -> None:
        if cluster is not None:
            cluster.state.saw_generation(job, generation)

    disks = NodeDisks(tier, context, node.job_for, saw_generation)
    if cluster is not None:
        cluster.check_disk = disks.check_brought
        cluster.disk_troubles = disks.troubles
    try:
        await disks.begin()
    except SnapdError:
        tier.close(TIER_CLOSE_S)
        raise
    return disks


def _name(node: Node) -> str:
    return node.cluster.name if node.cluster is not None else os.uname().nodename


def _surroundings(environment: Environment) -> Surroundings:
    return Surroundings(
        monotonic_s=environment.monotonic_s,
        wall_s=environment.wall_s,
        chance=lambda: secrets.randbelow(1 << 53) / (1 << 53),
        random_token=environment.random_token,
    )


def _unhandled(context: dict[str, Any], log: EventLog, fatal: Callable[[BaseException], None]) -> None:
    """An error that left a callback: ours are fatal; gRPC's poller may find its descriptor empty, which is
    nothing.
    """
    error = context.get("exception")
    if isinstance(error, BlockingIOError):
        log.once("poller", "poller.empty", reason=str(context.get("message")))
    else:
        fatal(error or RuntimeError(str(context.get("message"))))


async def _serve_node(
    config: Config, where: Paths, node: Node, stop: asyncio.Event, *, is_failing: Callable[[], bool]
) -> None:
    """Start in order, stop in reverse; a service that ends by itself is fatal."""
    context = node.context
    handshakes = HandshakeServer(node, where.handshake_socket, connections_max=config.runtime.connections)
    rpc = RpcServer(node, where.grpc_socket, calls_max=2 * config.runtime.connections)
    await rpc.start()
    handshakes.listen()
    tasks = [
        context.spawn(handshakes.run(), "handshakes"),
        context.spawn(_poll(node), "poll"),
    ]
    context.log.info(
        "daemon.started",
        pid=os.getpid(),
        version=__version__,
        runtime=str(where.runtime),
        arena=str(where.arena),
        jobs=len(node.jobs),
    )
    await stop.wait()
    until_s = context.environment.monotonic_s() + config.runtime.stop_grace
    if not is_failing():
        await finish_levels(
            node, config.runtime.stop_grace, tier_grace_s=config.tier.grace, is_failing=is_failing
        )
    where.handshake_socket.unlink(missing_ok=True)
    await rpc.stop(max(0.0, until_s - context.environment.monotonic_s()))
    for task in [*tasks, *context.tasks]:
        task.cancel()
    await asyncio.gather(*tasks, *context.tasks, return_exceptions=True)
    where.grpc_socket.unlink(missing_ok=True)


async def _poll(node: Node) -> None:
    while True:
        await asyncio.sleep(node.context.settings.poll_interval_s)
        node.poll()


def _on_signals(stop: asyncio.Event, log: EventLog) -> None:
    told: list[str] = []

    def on_signal(name: str) -> None:
        told.append(name)
        if len(told) > 1:
            log.warning("daemon.killed", reason=f"a second {name}")
            os._exit(1)  # the arena needs no farewell: a kill -9 must do it no harm either
        log.info("daemon.stopping", reason=name)
        stop.set()

    def on_hangup() -> None:
        # a login manager sends it beside SIGTERM: never the second signal that ends at once
        if not stop.is_set():
            log.info("daemon.stopping", reason="SIGHUP")
            stop.set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal, signal.Signals(signum).name)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
