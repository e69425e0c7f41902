"""`[tier]`: where snapshots become durable. Without `tier.shared` nothing of it is started."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from snapd.core.condemning import CollectRules
from snapd.core.retention import KeepRules
from snapd.errors import ConfigError
from snapd.settings import setting
from snapd.store.base import Store
from snapd.store.opening import S3, StoreOptions, open_store, parsed_url
from snapd.store.surroundings import Surroundings
from snapd.tier.streaming import THREADS
from snapd.units import MIB

HURRIED_S = 5.0
HURRIED_CONNECT_S = 2.5
COMPRESSION_AUTO, COMPRESSION_ALWAYS, COMPRESSION_OFF = "auto", "always", "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """Durable copies of snapshots: in a directory or in S3, and on the node's own disk."""

    shared: str = setting(
        "",
        "text",
        "Where all nodes of a job keep what survives them: `/path` or `file:///path` of a file system that all of them"
        " see (on one machine any disk), or `s3://bucket/prefix`. Empty: nothing becomes durable.",
    )
    every_steps: int = setting(
        0,
        "count",
        "Snapshots of every so many steps become durable, besides those of `tier.every`. 0: none because of its step.",
        low=0,
        high=1 << 40,
    )
    every: float = setting(
        600.0,
        "duration",
        "How often the newest complete snapshot becomes durable. More often loses less with the cluster and writes"
        " more. 0: none because of the time.",
        low=0,
        high=30 * 86400,
    )
    rate: int = setting(
        256 * MIB,
        "size",
        "Bytes a second that a node reads from its memory for the tier; 0: as many as there are. Less leaves disk and"
        " network to training, more is durable sooner.",
        low=0,
        high=1 << 40,
    )
    compression: str = setting(
        COMPRESSION_AUTO,
        "choice",
        "`auto` compresses where it does not make the tier slower; `always` saves most bytes and costs CPU; `off`"
        " costs nothing.",
        choices=(COMPRESSION_AUTO, COMPRESSION_ALWAYS, COMPRESSION_OFF),
    )
    concurrency: int = setting(
        4,
        "count",
        "Requests in flight for a large object; a restore from S3 has twice as many. More fills a long line; each"
        " costs 16 MiB of memory, 24 where chunks are compressed.",
        low=1,
        high=32,
    )
    grace: float = setting(
        20.0,
        "duration",
        "How long after SIGTERM the newest snapshot may still become durable. Less frees the machine sooner; it must"
        " fit into what the scheduler grants.",
        low=0,
        high=3600,
    )
    endpoint: str = setting(
        "",
        "text",
        "URL of an S3 server that is not AWS's, as `https://HOST:PORT`. Empty: AWS, or AWS_ENDPOINT_URL.",
    )
    region: str = setting(
        "", "text", "Region of the bucket. Empty: from the usual AWS chain, else us-east-1."
    )
    ca: str = setting(
        "", "text", "Authority (PEM) that signed the server's certificate. Empty: the system's."
    )
    path_style: str = setting(
        "auto",
        "choice",
        "`yes`: the bucket is in the path, as most servers other than AWS want it; `no`: in the host's name; `auto`:"
        " in the path where `tier.endpoint` is set.",
        choices=("auto", "yes", "no"),
    )
    sse: str = setting(
        "off",
        "choice",
        "Encryption by the server: `s3` with keys of the store, `kms` with a key of the key service, `off`: what the"
        " bucket does by itself.",
        choices=("off", "s3", "kms"),
    )
    sse_kms_key: str = setting("", "text", "Key of `tier.sse = kms`; empty: the account's default.")
    single_writer: str = setting(
        "no",
        "switch",
        "Accept a store that overwrites what it was asked to create only if it is not there. Two daemons that write"
        " the same job there can destroy one another's commits.",
        choices=("no", "yes"),
    )
    connect: float = setting(
        5.0, "duration", "How long a connection to the store may take to be made.", low=0.1, high=600
    )
    stall: float = setting(
        20.0,
        "duration",
        "How long the store may send and take nothing before a request is given up and tried again.",
        low=0.1,
        high=3600,
    )
    deadline: float = setting(
        120.0,
        "duration",
        "How long one request is tried again before the level pauses and says why. It goes on by itself.",
        low=1,
        high=86400,
    )
    restore_wait: float = setting(
        60.0,
        "duration",
        "How long a restore waits for a tier that does not answer and may have a newer snapshot than memory, before it"
        " fails and says so.",
        low=0,
        high=86400,
    )
    node: str = setting(
        "",
        "text",
        "Folder on a disk of this node alone, as `/mnt/nvme/snapd`, where the daemon keeps this node's shards of the"
        " newest snapshots: they survive a reboot and a power cut, not the loss of the disk. Each daemon needs one of"
        " its own. Empty: none.",
    )
    node_every: float = setting(
        60.0,
        "duration",
        "How often the newest complete snapshot goes to the node's own disk. More often loses less with the node's"
        " memory and wears the disk more. 0: on demand and before the end only.",
        low=0,
        high=30 * 86400,
    )
    node_rate: int = setting(
        128 * MIB,
        "size",
        "Bytes a second that go to the node's own disk at most; 0: as many as it takes. It bounds the wear: 128 MiB/s"
        " all day are 11 TB.",
        low=0,
        high=1 << 40,
    )
    node_keep: int = setting(
        2,
        "count",
        "So many whole snapshots stay on the node's own disk. The disks of a cluster may differ by one, so that 2 have"
        " one in common.",
        low=1,
        high=64,
    )
    node_scrub: float = setting(
        86400.0,
        "duration",
        "How often all that is kept on the node's own disk is read again and verified: a chunk that snapshots share is"
        " written once, and no other read would find it bad. Half of `tier.node_rate` at most. 0: never.",
        low=0,
        high=365 * 86400,
    )
    keep_last: int = setting(
        5, "count", "So many of the newest durable snapshots stay; 0: all of them.", low=0, high=1 << 30
    )
    keep_every: int = setting(
        0,
        "count",
        "Snapshots of every so many steps stay, too; 0: none because of its step.",
        low=0,
        high=1 << 40,
    )
    keep_hourly: int = setting(
        0, "count", "For so many hours back the last snapshot of each hour stays, too.", low=0, high=1 << 20
    )
    keep_daily: int = setting(
        0, "count", "For so many days back the last snapshot of each day stays, too.", low=0, high=1 << 20
    )
    gc_every: float = setting(
        3600.0,
        "duration",
        "Length of a collector's round: what nobody names any more is deleted after one to two of them. Shorter frees"
        " room sooner and asks more of the store; it must be far longer than clocks and requests are late.",
        low=1,
        high=30 * 86400,
    )
    intent_ttl: float = setting(
        3600.0,
        "duration",
        "A writer that gave no sign of life for so long is dead to the collector, and what it left is deleted.",
        low=4,
        high=30 * 86400,
    )


def check_tier(config: TierConfig) -> None:
    """See that the settings go together.

    Raises:
        ConfigError: kind `store`, one clear line.
    """
    if config.node:
        _check_node(config)
    if not config.shared:
        return
    url = parsed_url(config.shared)
    for_s3 = [name for name in ("endpoint", "region", "ca", "sse_kms_key") if getattr(config, name)]
    if url.scheme != S3 and for_s3:
        raise ConfigError(f"tier.{for_s3[0]} is for S3, and tier.shared is {config.shared}", kind="store")
    if config.sse_kms_key and config.sse != "kms":
        raise ConfigError("tier.sse_kms_key needs tier.sse = kms", kind="store")
    if config.endpoint and not config.endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"tier.endpoint = {config.endpoint!r} must begin with http:// or https://", kind="store"
        )


def node_folder(config: TierConfig) -> Path:
    """The folder of the node's own disk. Raises ConfigError, kind `store`."""
    url = parsed_url(config.node)
    if url.scheme == S3:
        raise ConfigError(f"tier.node = {config.node}: it must be a folder of this node", kind="store")
    return url.path


def _check_node(config: TierConfig) -> None:
    folder = node_folder(config)
    shared = parsed_url(config.shared) if config.shared else None
    if shared is None or shared.scheme == S3:
        return
    own, others = os.path.realpath(folder), os.path.realpath(shared.path)
    if own == others or own.startswith(f"{others}/") or others.startswith(f"{own}/"):
        raise ConfigError(
            f"tier.node ({config.node}) and tier.shared ({config.shared}) need folders that are apart: the one is this"
            " node's alone, the other all nodes' together",
            kind="store",
        )


def store_options(config: TierConfig) -> StoreOptions:
    return StoreOptions(
        endpoint=config.endpoint,
        region=config.region,
        ca=config.ca,
        path_style=None if config.path_style == "auto" else config.path_style == "yes",
        sse=config.sse,
        sse_kms_key=config.sse_kms_key,
        concurrency=config.concurrency,
        connect_s=config.connect,
        stall_s=config.stall,
        deadline_s=config.deadline,
        single_writer=config.single_writer == "yes",
    )


def read_threads(config: TierConfig, url: str) -> int:
    """Of a restore from `url`. A request to S3 costs a round of tens of milliseconds, and one connection has a bounded
    pace: only more of them at once are faster.
    """
    return max(THREADS, 2 * config.concurrency) if parsed_url(url).scheme == S3 else THREADS


def hurried(config: TierConfig) -> TierConfig:
    """The same tier, for somebody who waits for the answer: a request has `HURRIED_S` seconds in all."""
    return replace(
        config,
        connect=min(config.connect, HURRIED_CONNECT_S),
        stall=min(config.stall, HURRIED_S),
        deadline=min(config.deadline, HURRIED_S),
    )


def collect_rules(config: TierConfig) -> CollectRules:
    """What a collector keeps, and how long its rounds are."""
    return CollectRules(
        keep=KeepRules(
            last=config.keep_last,
            every_steps=config.keep_every,
            hourly=config.keep_hourly,
            daily=config.keep_daily,
        ),
        round_s=config.gc_every,
        intent_ttl_s=config.intent_ttl,
        void_ttl_s=24 * max(config.gc_every, config.intent_ttl),
    )


def store_of(config: TierConfig, surroundings: Surroundings, *, url: str = "") -> Store:
    """The shared tier's store, or the one at `url` with the same settings. The caller closes it.

    Raises:
        ConfigError: kinds `store`, `store_library`.
    """
    if not url:
        check_tier(config)
    return open_store(url or config.shared, store_options(config), surroundings)
