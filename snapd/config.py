"""Settings of the daemon: default < TOML file < SNAPD_* environment < flags, read once, in `main`.

Each field says what it trades, its unit and its bound. `load` collects every problem before it refuses. A
field `section.name` is `[section] name = ...` in the file, `SNAPD_SECTION_NAME` in the environment,
`--section-name` as a flag.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapd.config_cluster import ClusterConfig
from snapd.config_tiers import TierConfig
from snapd.core.geometry import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, LANES_MAX, SLOTS_MIN, is_chunk_size
from snapd.errors import ConfigError
from snapd.runtime.context import NodeSettings
from snapd.settings import ALIKE_MIN, checked_value, did_you_mean, setting, shown
from snapd.units import MIB

PREFIX = "SNAPD_"
VERY_ALIKE = 0.85  # where not even the section is one of ours
# Variables that are no settings: the trainer's and the commands' own.
OTHER_VARIABLES = frozenset({"SNAPD_JOB", "SNAPD_CONFIG", "SNAPD_AUTOSTART", "SNAPD_COPY_KERNEL"})
# What Kubernetes sets in every container for a service whose name begins with snapd.
_OF_SERVICES = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT(_\d+_(TCP|UDP)(_\w+)?)?$")

SLOTS_ALONE = 2
SLOTS_CLUSTERED = 3
SLOTS_FOR_TIER = (
    1  # more for each tier that is configured, a shared one and the node's own: one is being flushed
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Sockets, lock and log."""

    dir: str = setting(
        "",
        "text",
        "Folder of the sockets, 0700. Empty: $XDG_RUNTIME_DIR/snapd-train, else /tmp/snapd-train-UID. A path"
        " that every trainer of this user sees; Unix socket paths end at 107 characters.",
    )
    connections: int = setting(
        1024,
        "count",
        "Handshake connections served at once. Each costs a descriptor; one per rank and command.",
        low=8,
        high=65536,
    )
    stop_grace: float = setting(
        5.0,
        "duration",
        "How long captures, protection and calls may go on after SIGTERM. Less frees the machine sooner.",
        low=0,
        high=600,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaConfig:
    """The shared memory."""

    dir: str = setting(
        "",
        "text",
        "Folder of the arena, 0700, on a tmpfs. Empty: /dev/shm/snapd-train-UID. Snapshots die with it.",
    )
    bytes: int = setting(
        0,
        "size",
        "Upper bound of all segments; 0: what the file system, the cgroup and the machine leave. A bound"
        " keeps"
        " room for others, and refuses a job that would not fit beside them.",
        low=0,
        high=1 << 50,
    )
    headroom: int = setting(
        256 * MIB,
        "size",
        "Memory left free beside the arena (cgroup and machine). More protects the trainer from the"
        " out-of-memory killer, less lets larger states in.",
        low=0,
        high=1 << 40,
    )
    chunk_bytes: int = setting(
        4 * MIB,
        "size",
        "Largest chunk, a power of two; small states get smaller ones. Larger costs less bookkeeping,"
        " smaller shares more between snapshots.",
        low=CHUNK_BYTES_MIN,
        high=CHUNK_BYTES_MAX,
    )
    slots: int = setting(
        0,
        "count",
        "Shards that fit per rank: one being captured, the others complete. Each more costs one state of"
        " memory and keeps one more complete snapshot. 0: 2 alone, 3 in a cluster (one is being protected), one"
        " more for each of `tier.shared` and `tier.node` (one is being flushed).",
        low=0,
        high=LANES_MAX,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureConfig:
    """Taking up what trainers hand over."""

    hash_threads: int = setting(
        2,
        "count",
        "Threads that hash, each shard on all of them, on cores of their own while trainers leave one free."
        " More shortens the window, and takes cores from training.",
        low=1,
        high=64,
    )
    poll_interval: float = setting(
        0.5,
        "duration",
        "How often pages are looked at without a wake-up. Shorter finds a lost wake-up sooner and costs"
        " idle CPU.",
        low=0.05,
        high=60,
    )
    interval_factor_max: int = setting(
        64,
        "count",
        "How far the capture interval is widened when ranks find no free slot. 1 never widens: each step"
        " then waits its `wait_max`.",
        low=1,
        high=1 << 16,
    )
    grow_retry: float = setting(
        5.0, "duration", "Pause before an arena that was refused is tried again.", low=0.1, high=3600
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreConfig:
    """Agreeing on a snapshot."""

    settle: float = setting(
        60.0,
        "duration",
        "How long a restore waits for captures of older trainers, and for ranks of a rollback that are"
        " late. Shorter fails earlier.",
        low=1,
        high=3600,
    )
    finish: float = setting(
        600.0,
        "duration",
        "How long the first rank that has restored waits for the last. It must cover the slowest"
        " rank's copy.",
        low=1,
        high=86400,
    )
    wait_max: float = setting(
        600.0, "duration", "Longest wait for a level in one call; clients ask again.", low=1, high=86400
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Structured lines, one event each."""

    level: str = setting(
        "info", "choice", "debug also tells of drops.", choices=("debug", "info", "warning", "error")
    )
    file: str = setting("", "text", "Append to this file; empty: standard error.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Prometheus over HTTP; off unless a port is given."""

    address: str = setting(
        "127.0.0.1", "text", "Address to listen on; others than loopback show the metrics to others."
    )
    port: int = setting(
        0, "port", "Port of the metrics; 0: not served, and nothing listens.", low=0, high=65535
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultConfig:
    """For tests only."""

    points: str = setting(
        "", "text", "Points at which the daemon kills or stops itself: see runtime/faultpoints.py."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything, as configured. `paths` and `node_settings` derive what the parts need."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    arena: ArenaConfig = field(default_factory=ArenaConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    restore: RestoreConfig = field(default_factory=RestoreConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tier: TierConfig = field(default_factory=TierConfig)
    log: LogConfig = field(default_factory=LogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)


@dataclass(frozen=True, slots=True)
class Paths:
    """Where this daemon's files are."""

    runtime: Path
    arena: Path

    @property
    def grpc_socket(self) -> Path:
        return self.runtime / "snapd.sock"

    @property
    def handshake_socket(self) -> Path:
        return self.runtime / "handshake.sock"

    @property
    def lock(self) -> Path:
        return self.runtime / "daemon.lock"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid configuration, and where each value came from (dotted path -> source)."""

    config: Config
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Explained:
    """One row of `snapd config explain`."""

    path: str
    value: str
    source: str
    default: str
    unit: str
    bound: str
    doc: str


def fields_of(config: Config) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(dotted path, field, value) of every setting, in order."""
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for described in dataclasses.fields(part):
            yield f"{section.name}.{described.name}", described, getattr(part, described.name)


def env_name(path: str) -> str:
    """The environment variable of a setting: arena.dir -> SNAPD_ARENA_DIR."""
    return PREFIX + path.replace(".", "_").upper()


def unknown_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Variables that look as if they were meant as settings and are none, each with the one that may be meant.

    They are no errors: another program's, or another version's, may be among them.
    """
    environment = os.environ if environ is None else environ
    known = {env_name(path) for path, _, _ in fields_of(Config())} | OTHER_VARIABLES
    sections = tuple(f"{PREFIX}{section.name.upper()}_" for section in dataclasses.fields(Config))
    found: list[str] = []
    for name in sorted(environment):
        if not name.startswith(PREFIX) or name in known or _OF_SERVICES.search(name):
            continue
        is_meant = name.startswith(sections)
        words = [one.removeprefix(PREFIX) for one in known]
        meant = did_you_mean(
            name.removeprefix(PREFIX), words, alike_min=ALIKE_MIN if is_meant else VERY_ALIKE
        )
        if meant or is_meant:
            found.append(f"{name}: no such setting{meant.replace('mean ', f'mean {PREFIX}')}")
    return found


def load(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Loaded:
    """Put the configuration together. `flags`: dotted path -> value; None values are not set.

    Raises:
        ConfigError: kind `settings`; lists every problem with its path, value and source.
    """
    environment = os.environ if environ is None else environ
    problems: list[str] = []
    from_file = _file_values(file, problems)
    given = {path: value for path, value in (flags or {}).items() if value is not None}
    sources: dict[str, str] = {}
    values: dict[str, dict[str, Any]] = {}
    known = {path for path, _, _ in fields_of(Config())}
    for paths_given, origin in ((from_file, str(file)), (given, "flags")):
        problems.extend(
            f"{path}: no such setting (from {origin}){did_you_mean(path, known)}"
            for path in paths_given
            if path not in known
        )
    for path, described, default in fields_of(Config()):
        raw, source = default, "default"
        for candidate, name in (
            (from_file.get(path), str(file)),
            (environment.get(env_name(path)), env_name(path)),
            (given.get(path), "flag"),
        ):
            if candidate is not None:
                raw, source = candidate, name
        value = default
        if source != "default":
            try:
                value = checked_value(described, raw)
            except ValueError as error:
                problems.append(f"{path} = {raw!r} (from {source}): {error}")
        section, _, name = path.partition(".")
        values.setdefault(section, {})[name] = value
        sources[path] = source
    config = Config(
        **{s.name: type(getattr(Config(), s.name))(**values[s.name]) for s in dataclasses.fields(Config)}
    )
    if not is_chunk_size(config.arena.chunk_bytes):
        problems.append(f"arena.chunk_bytes = {config.arena.chunk_bytes}: must be a power of two")
    if 0 < config.arena.slots < SLOTS_MIN:
        bound = f"must be 0, or {SLOTS_MIN} to {LANES_MAX}"
        problems.append(f"arena.slots = {config.arena.slots} (from {sources['arena.slots']}): {bound}")
    if problems:
        raise ConfigError(
            "; ".join(problems), kind="settings", hint="`snapd config explain` shows every setting"
        )
    return Loaded(config, sources)


def _file_values(file: Path | None, problems: list[str]) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{file}: {error.strerror}")
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{file}: {error}")
        return {}
    found: dict[str, Any] = {}
    for section, part in tree.items():
        if not isinstance(part, dict):
            problems.append(f"{section}: must be a section (from {file})")
            continue
        found.update({f"{section}.{name}": value for name, value in part.items()})
    return found


def explain(loaded: Loaded) -> list[Explained]:
    """Every setting with its value, which source won, unit, bound, and what it trades."""
    defaults = {path: value for path, _, value in fields_of(Config())}
    rows: list[Explained] = []
    for path, described, value in fields_of(loaded.config):
        meta = described.metadata
        kind = meta["kind"]
        unit = {"size": "bytes", "duration": "seconds", "count": "count", "port": "port"}.get(kind, "")
        bound = " | ".join(meta["choices"]) if meta["choices"] else ""
        if unit:
            bound = f"{shown(kind, meta['low'])} .. {shown(kind, meta['high'])}"
        now, default = shown(kind, value), shown(kind, defaults[path])
        rows.append(Explained(path, now, loaded.sources[path], default, unit, bound, meta["doc"]))
    return rows


def paths(config: Config, environ: Mapping[str, str] | None = None, uid: int | None = None) -> Paths:
    """The folders, with the defaults of ARCHITECTURE.md."""
    environment = os.environ if environ is None else environ
    user = os.getuid() if uid is None else uid
    base = environment.get("XDG_RUNTIME_DIR", "")
    fallback = Path(base) / "snapd-train" if base else Path(f"/tmp/snapd-train-{user}")
    runtime = Path(config.runtime.dir) if config.runtime.dir else fallback
    arena = Path(config.arena.dir) if config.arena.dir else Path(f"/dev/shm/snapd-train-{user}")
    return Paths(runtime.absolute(), arena.absolute())


def node_settings(config: Config) -> NodeSettings:
    """What the running node needs of it."""
    return NodeSettings(
        chunk_bytes=config.arena.chunk_bytes,
        slots=config.arena.slots or _default_slots(config),
        arena_bytes=config.arena.bytes,
        headroom_bytes=config.arena.headroom,
        poll_interval_s=config.capture.poll_interval,
        interval_factor_max=config.capture.interval_factor_max,
        restore_settle_s=config.restore.settle,
        restore_finish_s=config.restore.finish,
        grow_retry_s=config.capture.grow_retry,
        hash_threads=config.capture.hash_threads,
        sessions_max=config.runtime.connections,
        wait_max_s=config.restore.wait_max,
    )


def _default_slots(config: Config) -> int:
    slots = SLOTS_CLUSTERED if config.cluster.coordinator else SLOTS_ALONE
    return slots + SLOTS_FOR_TIER * (bool(config.tier.shared) + bool(config.tier.node))
