"""The golden tier of format version 1: what it consists of. scripts/make_golden_tier.py writes it, tests read it.

Two ranks, two snapshots; the second shares what did not change; the first was rewritten by a collector (revision 1);
one was dropped. All encodings, wrappers, views, a tensor that another rank keeps, values of every kind.
"""

from __future__ import annotations

import random
import struct
from typing import Any

import xxhash
import zstandard
from snapd_proto import format_pb2

from snapd.codec.compress import ChunkEncoder
from snapd.core.ids import SnapshotId
from snapd.core.stored import Condemned, Intent, Pin, VoidRecord
from snapd.core.tier_keys import TierKeys, pack_name
from snapd.tier.notes import encode_condemned, encode_intent, encode_pin, encode_void
from tests.support.shard_builder import BuiltShard, ShardBuilder
from tests.support.tier_scene import WRITE_ID, TierScene

JOB = "golden"
FIRST, SECOND, DROPPED = SnapshotId(3, 100), SnapshotId(4, 250), SnapshotId(3, 90)
Expected = dict[
    str, dict[str, Any]
]  # by tensor name: dtype, shape, XXH3-128 of its elements in row-major order


def floats(seed: int, count: int, form: str = "f") -> bytes:
    """Of few exponents, as weights are. No function of the C library is used, so they are the same everywhere."""
    rng = random.Random(seed)
    return struct.pack(f"<{count}{form}", *((rng.random() - 0.5) / 16 for _ in range(count)))


def bfloat16s(seed: int, count: int) -> bytes:
    wide = floats(seed, count)
    return b"".join(wide[at + 2 : at + 4] for at in range(0, len(wide), 4))


def _values(early: format_pb2.EarlyValues, layout: format_pb2.ShardLayout, step: int) -> None:
    early.wall_time_s = 1_700_000_000.0
    early.scalars.add(integer=step)
    early.scalars.add(real=float("nan"))
    early.scalars.add().none.SetInParent()
    tree = layout.skeleton.mapping
    tree.type = format_pb2.Mapping.DICT

    def put(name: str) -> format_pb2.Value:
        tree.keys.add(text=name)
        return tree.values.add()

    put("step").scalar = 0
    put("nan").scalar = 1
    put("nothing").scalar = 2
    put("flag").boolean = True
    put("negative").integer = -5
    put("big").big_integer = (2**100).to_bytes(14, "little", signed=True)
    put("raw").raw = b"\x00\xff"
    put("weight").tensor = 0
    put("named").named.CopyFrom(format_pb2.Named(type_name="torch:dtype", text="bfloat16"))
    number = put("complex").complex
    number.re, number.im = 1.5, -2.0
    items = put("list").sequence
    items.type = format_pb2.Sequence.DEQUE
    items.deque_maxlen = 7
    items.items.add(text="ä")
    items.items.add(alias=0)
    thing = put("object").opaque
    thing.type_name, thing.how = "package.module:Class", "fields"
    thing.fields.mapping.type = format_pb2.Mapping.ORDERED_DICT
    thing.fields.mapping.keys.add(integer=1)
    thing.fields.mapping.values.add(parameter=0)
    layout.parameters.add(name="weight", optimizer=0, group=0, index=0)


def shard(snapshot: SnapshotId, rank: int) -> tuple[BuiltShard, Expected]:
    """A shard, and what its tensors hold."""
    builder = ShardBuilder(
        job=JOB, generation=snapshot.generation, step=snapshot.step, rank=rank, world_size=2
    )
    expected: Expected = {}
    seed = snapshot.step * 10 + rank

    def note(name: str, dtype: str, shape: list[int], data: bytes) -> None:
        expected[name] = {"dtype": dtype, "shape": shape, "xxh3_128": xxhash.xxh3_128_hexdigest(data)}

    def plain(name: str, dtype: str, shape: list[int], data: bytes, range_name: str) -> int:
        note(name, dtype, shape, data)
        return builder.plain(name, dtype, shape, data, range_name)

    plain("weight", "float32", [40, 100], floats(seed, 4000), "parameters")
    plain("half", "bfloat16", [3000], bfloat16s(seed + 1, 3000), "parameters")
    plain("frozen", "float32", [2048], floats(1, 2048), "frozen")  # of both ranks and both snapshots
    plain("wide", "float64", [600], floats(seed + 2, 600, "d"), "wide")
    plain("text", "uint8", [5000], (b"words that come again and again " * 160)[:5000], "text")
    plain("noise", "int8", [5000], random.Random(seed + 3).randbytes(5000), "noise")
    plain("scalar", "int64", [], struct.pack("<q", snapshot.step), "rest")
    plain("empty", "float16", [0, 3], b"", "rest")
    plain("one_byte_floats", "float8_e4m3fn", [7], bytes(range(7)), "rest")
    # A transposed view of every second column: 5 x 4 in a span of 4 rows of 10.
    span = floats(seed + 4, 40)[: (3 * 10 + 4 * 2 + 1) * 4]
    note(
        "view",
        "float32",
        [5, 4],
        b"".join(span[(j * 10 + i * 2) * 4 :][:4] for i in range(5) for j in range(4)),
    )
    builder.tensor("view", "float32", [5, 4], builder.region(span, "rest"), nbytes=len(span), strides=[2, 10])
    shared = floats(snapshot.step, 64)  # replicas hold the same; rank 0 keeps it
    note("shared", "float32", [64], shared)
    if rank == 0:
        builder.plain("shared", "float32", [64], shared, "rest")
    else:
        builder.tensor("shared", "float32", [64], builder.remote_region(0, len(shared)), nbytes=len(shared))
    codes = plain("moment.codes", "uint8", [64], bytes(range(64)), "rest")
    wrapper = builder.layout.tensors.add(
        name="moment", dtype="float32", shape=[64], strides=[1], device="cpu"
    )
    wrapper.subclass.type_name = "torchao.optim:OptimState8bit"
    wrapper.subclass.components.add(attribute="codes", tensor=codes)
    local = plain("box.local", "float32", [2, 3], floats(seed + 5, 6), "rest")
    box = builder.layout.tensors.add(
        name="box",
        dtype="float32",
        shape=[2, 3],
        strides=[3, 1],
        global_shape=[4, 3],
        local_offset=[2 * rank, 0],
    )
    box.distributed.mesh_shape.append(2)
    box.distributed.placements.append("S(0)")
    box.distributed.mesh_coordinate.append(rank)
    box.distributed.mesh_ranks.extend([0, 1])
    box.subclass.components.add(attribute="_local_tensor", tensor=local)
    builder.layout.tensors.add(name="nowhere", dtype="float32", shape=[3], strides=[1], device="meta")
    _values(builder.early, builder.layout, snapshot.step)
    return builder.build(), expected


def golden_tier() -> tuple[dict[str, bytes], dict[str, list[Expected]]]:
    """(objects by key, expected tensors by snapshot and rank)."""
    scene = TierScene(job=JOB, encoder=ChunkEncoder("always"), chunks_per_pack=8)
    expected: dict[str, list[Expected]] = {}
    built = {}
    for snapshot, parent in ((FIRST, None), (SECOND, FIRST)):
        made = [shard(snapshot, rank) for rank in range(2)]
        built[snapshot] = [one for one, _ in made]
        expected[scene.keys.snapshot(snapshot)] = [what for _, what in made]
        scene.store(built[snapshot], parent)
    # A collector moved the first one to packs of its own, uncompressed.
    moved = TierScene(job=JOB, encoder=ChunkEncoder("off"), chunks_per_pack=16, pack_count=scene.pack_count)
    moved.store(built[FIRST], None, revision=1)
    expected[scene.keys.snapshot(FIRST, 1)] = expected[scene.keys.snapshot(FIRST)]
    return {**scene.objects, **moved.objects, **_notes(scene.keys)}, expected


def _notes(keys: TierKeys) -> dict[str, bytes]:
    other = "fedcba9876543210" * 2
    return {
        keys.snapshot(DROPPED, 2): encode_void(VoidRecord(JOB, DROPPED, 2, True, other)),
        keys.intent(WRITE_ID): encode_intent(Intent(JOB, WRITE_ID, "node-1", SECOND, (FIRST,), 3)),
        keys.condemned_round(7): encode_condemned(
            Condemned(
                JOB, 7, other, (keys.snapshot(FIRST), keys.shard(FIRST, 0), keys.pack(pack_name(other, 0)))
            )
        ),
        keys.pin("best"): encode_pin(Pin(JOB, "best", FIRST)),
    }


def made_by() -> str:
    """What the compressed bytes depend on."""
    return "zstd " + ".".join(map(str, zstandard.ZSTD_VERSION)) + "\n"
