"""Exported directories: read back with safetensors and json only, equal bit for bit; bad bytes are named."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from snapd_proto import format_pb2

from snapd.errors import ConfigError, IntegrityError
from snapd.export.contents import contents_of
from snapd.export.directory import export_nbytes, working_folder, write_directory
from snapd.export.shard_bytes import ShardBytes
from snapd.export.shard_view import ShardView, contents_of_chunk, open_shard
from tests.support.shard_builder import BuiltShard, ShardBuilder

EXACT = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(
        0, 2 if dtype is torch.bool else 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8
    )
    return raw.view(dtype)


@contextlib.contextmanager
def _open(folder: Path, *shards: BuiltShard) -> Iterator[dict[int, ShardView]]:
    descriptors = {(shard.record.rank, 0): shard.open_descriptor(folder) for shard in shards}
    try:
        yield {s.record.rank: open_shard(ShardBytes(s.record, descriptors)) for s in shards}
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _export(folder: Path, *shards: BuiltShard, ranks: list[int] | None = None) -> Path:
    target = folder / "out"
    with _open(folder, *shards) as views:
        write_directory(target, views, ranks if ranks is not None else sorted(views))
    return target


def _load(target: Path, rank: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    rest = json.loads((target / f"rank-{rank:05d}.json").read_text())
    with safe_open(target / rest["tensors_file"], framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, rest  # noqa: SIM118


def _set_skeleton(builder: ShardBuilder, **tensors: int) -> None:
    mapping = format_pb2.Mapping(
        type=format_pb2.Mapping.DICT,
        keys=[format_pb2.Value(text=name) for name in tensors],
        values=[format_pb2.Value(tensor=number) for number in tensors.values()],
    )
    builder.layout.skeleton.mapping.CopyFrom(mapping)


def test_every_type_comes_back_bit_for_bit(tmp_path: Path) -> None:
    builder = ShardBuilder()
    tensors = {f"t.{_name(dtype)}": _random(dtype, 33, 7) for dtype in EXACT}
    for name, tensor in tensors.items():
        builder.plain(name, _name(tensor.dtype), list(tensor.shape), _raw(tensor))
    found, rest = _load(_export(tmp_path, builder.build()))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert _raw(found[name]) == _raw(tensor), name
    assert rest["tensors"]["t.bfloat16"]["stored"] == {
        "name": "t.bfloat16",
        "dtype": "BF16",
        "shape": [33, 7],
    }


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2])
def test_types_that_safetensors_lacks_are_bytes_with_their_name(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = _random(dtype, 3, 5)
    builder = ShardBuilder()
    builder.plain("x", _name(dtype), [3, 5], _raw(tensor))
    found, rest = _load(_export(tmp_path, builder.build()))
    assert rest["tensors"]["x"]["dtype"] == _name(dtype)
    assert found["x"].dtype is torch.uint8
    again = found["x"].view(dtype).reshape(rest["tensors"]["x"]["shape"])
    assert _raw(again) == _raw(tensor)


def test_views_are_written_row_major(tmp_path: Path) -> None:
    base = torch.randn(40, 30)
    builder = ShardBuilder()
    region = builder.region(_raw(base))
    builder.tensor("transposed", "float32", [30, 40], region, strides=[1, 30], nbytes=4800)
    column = base[:, 3]
    builder.tensor(
        "column", "float32", [40], region, strides=[30], region_offset=12, nbytes=4 * (39 * 30 + 1)
    )
    found, rest = _load(_export(tmp_path, builder.build()))
    assert torch.equal(found["transposed"], base.t())
    assert torch.equal(found["column"], column)
    assert rest["overlapping"] == [["transposed", "column"]]


def test_the_same_view_twice_is_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(10, 10)
    builder = ShardBuilder()
    region = builder.region(_raw(weight))
    first = builder.tensor("embedding.weight", "float32", [10, 10], region, nbytes=400)
    second = builder.tensor("head.weight", "float32", [10, 10], region, nbytes=400)
    _set_skeleton(builder, a=first, b=second)
    found, rest = _load(_export(tmp_path, builder.build()))
    assert set(found) == {"embedding.weight"}
    assert rest["aliases"] == {"head.weight": "embedding.weight"}
    assert rest["tensors"]["head.weight"]["stored"]["name"] == "embedding.weight"
    assert rest["tree"] == {"a": {"$tensor": "embedding.weight"}, "b": {"$tensor": "head.weight"}}
    assert rest["overlapping"] == []


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    builder = ShardBuilder()
    builder.plain("scalar", "float32", [], _raw(torch.tensor([2.5])))
    builder.tensor("empty", "float32", [0, 4], 0, nbytes=0)
    found, _ = _load(_export(tmp_path, builder.build()))
    assert found["scalar"].shape == () and found["scalar"].item() == 2.5
    assert found["empty"].shape == (0, 4)


def test_components_of_subclasses_go_by_name_and_attribute(tmp_path: Path) -> None:
    codes, scale = _random(torch.uint8, 16), torch.randn(2)
    local = torch.randn(4, 3)
    builder = ShardBuilder()
    wrapper = builder.layout.tensors.add(name="exp_avg", dtype="float32", shape=[16], strides=[1])
    wrapper.subclass.type_name = "torchao.optim:OptimState8bit"
    wrapper.subclass.components.add(attribute="codes", tensor=1)
    wrapper.subclass.components.add(attribute="scale", tensor=2)
    wrapper.subclass.context.sequence.CopyFrom(
        format_pb2.Sequence(type=format_pb2.Sequence.LIST, items=[format_pb2.Value(boolean=True)])
    )
    builder.plain("exp_avg.codes", "uint8", [16], _raw(codes))
    builder.plain("exp_avg.scale", "float32", [2], _raw(scale))
    sharded = builder.layout.tensors.add(name="weight", dtype="float32", shape=[4, 3], strides=[3, 1])
    sharded.global_shape.extend([8, 3])
    sharded.local_offset.extend([4, 0])
    sharded.distributed.placements.append("S(0)")
    sharded.distributed.mesh_shape.append(2)
    sharded.subclass.components.add(attribute="_local_tensor", tensor=4)
    builder.plain("weight._local_tensor", "float32", [4, 3], _raw(local))
    found, rest = _load(_export(tmp_path, builder.build()))
    assert set(found) == {"exp_avg:codes", "exp_avg:scale", "weight"}
    assert torch.equal(found["exp_avg:codes"], codes) and torch.equal(found["exp_avg:scale"], scale)
    assert torch.equal(found["weight"], local)
    assert rest["tensors"]["exp_avg"]["class"] == "torchao.optim:OptimState8bit"
    assert rest["tensors"]["exp_avg"]["context"] == [True]
    assert rest["tensors"]["exp_avg"]["components"]["codes"]["stored"]["name"] == "exp_avg:codes"
    assert rest["tensors"]["weight"]["global_shape"] == [8, 3]
    assert rest["tensors"]["weight"]["local_offset"] == [4, 0]
    assert rest["tensors"]["weight"]["distributed"]["placements"] == ["S(0)"]
    assert set(rest["tensors"]) == {"exp_avg", "weight"}


def test_bytes_that_another_rank_holds_are_fetched_there_by_name(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    holder = ShardBuilder(rank=0, world_size=2)
    holder.plain("other", "float32", [100], bytes(400))
    holder.plain("w", "float32", [64, 64], _raw(weight))
    other = ShardBuilder(rank=1, world_size=2)
    other.tensor("w", "float32", [64, 64], other.remote_region(0, 16384), nbytes=16384)
    target = _export(tmp_path, holder.build(), other.build(), ranks=[1])
    found, _ = _load(target, rank=1)
    assert torch.equal(found["w"], weight)
    assert not (target / "rank-00000.json").exists()


@pytest.mark.parametrize(("name", "shape"), [("w", [32, 128]), ("v", [64, 64])])
def test_a_holder_that_has_it_otherwise_is_refused(tmp_path: Path, name: str, shape: list[int]) -> None:
    holder = ShardBuilder(rank=0, world_size=2)
    holder.plain(name, "float32", shape, bytes(16384))
    other = ShardBuilder(rank=1, world_size=2)
    other.tensor("w", "float32", [64, 64], other.remote_region(0, 16384), nbytes=16384)
    with pytest.raises(IntegrityError, match="'w' should lie in the shard of rank 0"):
        _export(tmp_path, holder.build(), other.build(), ranks=[1])


def test_snapshot_json_names_every_file_with_its_hash(tmp_path: Path) -> None:
    shards = []
    for rank in range(2):
        builder = ShardBuilder(rank=rank, world_size=2, generation=3, step=70)
        builder.plain("w", "float32", [1000], _raw(torch.randn(1000)))
        shards.append(builder.build())
        shards[-1].record.has_parent, shards[-1].record.parent_generation = True, 2
        shards[-1].record.parent_step = 65
    target = _export(tmp_path, *shards)
    whole = json.loads((target / "snapshot.json").read_text())
    facts = {key: whole[key] for key in ("job", "generation", "step", "world_size", "ranks", "parent")}
    parent = {"generation": 2, "step": 65}
    assert facts == {
        "job": "job",
        "generation": 3,
        "step": 70,
        "world_size": 2,
        "ranks": [0, 1],
        "parent": parent,
    }
    names = {file["name"] for file in whole["files"]}
    assert names | {"snapshot.json"} == {path.name for path in target.iterdir()}
    for file in whole["files"]:
        data = (target / file["name"]).read_bytes()
        assert (file["nbytes"], file["xxh3_128"]) == (len(data), xxhash.xxh3_128_hexdigest(data))


def test_early_values_stand_in_the_state(tmp_path: Path) -> None:
    builder = ShardBuilder()
    builder.early.scalars.add(integer=41)
    builder.layout.skeleton.mapping.type = format_pb2.Mapping.DICT
    builder.layout.skeleton.mapping.keys.add(text="epoch")
    builder.layout.skeleton.mapping.values.add(scalar=0)
    _, rest = _load(_export(tmp_path, builder.build()))
    assert rest["tree"] == {"epoch": 41}


def _two_tensors() -> BuiltShard:
    builder = ShardBuilder()
    builder.plain("first", "float32", [3000], _raw(torch.randn(3000)))
    builder.plain("second", "float32", [3000], _raw(torch.randn(3000)))
    return builder.build()


def test_one_flipped_bit_in_any_chunk_is_found_named_and_leaves_nothing(tmp_path: Path) -> None:
    chunk_count = len(_two_tensors().record.chunks)
    assert chunk_count > 6
    for chunk in range(chunk_count):
        shard = _two_tensors()
        shard.flip_bit(chunk, byte=17)
        folder = tmp_path / str(chunk)
        folder.mkdir()
        with pytest.raises(IntegrityError) as caught:
            _export(folder, shard)
        assert caught.value.context == {"rank": 0, "chunk": chunk}
        expected = contents_of_chunk(shard.layout, shard.record, chunk)
        assert expected
        assert all(name in str(caught.value) for name in expected if not name.startswith("<"))
        left = {path.name for path in folder.iterdir()} - {"segment-0-1-10"}
        assert left == set()


def test_what_lies_in_a_chunk(tmp_path: Path) -> None:
    shard = _two_tensors()
    named = [contents_of_chunk(shard.layout, shard.record, i) for i in range(len(shard.record.chunks))]
    assert named == [
        ["<layout>"], ["<early values>"], ["first"], ["first"], ["first", "second"], ["second"], ["second"],
        ["second"],
    ][: len(named)]  # fmt: skip


def test_targets_that_could_lose_something_are_refused(tmp_path: Path) -> None:
    shard = _two_tensors()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep me")
    link = tmp_path / "link"
    link.symlink_to(full)
    file = tmp_path / "file"
    file.write_text("x")
    with _open(tmp_path, shard) as views:
        for target in (full, link, file, tmp_path / "no" / "parent"):
            with pytest.raises(ConfigError, match=str(target.parent if target.name == "parent" else target)):
                write_directory(target, views, [0])
        empty = tmp_path / "empty"
        empty.mkdir()
        write_directory(empty, views, [0])
    assert (full / "mine.txt").read_text() == "keep me"
    assert (empty / "snapshot.json").exists()


def test_interrupted_by_the_user_nothing_is_left(tmp_path: Path) -> None:
    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with _open(tmp_path, _two_tensors()) as views, pytest.raises(KeyboardInterrupt):
        write_directory(tmp_path / "out", views, [0], progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["segment-0-1-10"]


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path: Path) -> None:
    left, mine, busy = (tmp_path / f".out.{name}.partial" for name in ("11", "my own", "12"))
    for folder in (left, mine, busy):
        folder.mkdir()
        (folder / "rank-00000.safetensors").write_bytes(b"x")
    descriptor = os.open(busy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as the process that writes there
    try:
        with working_folder(tmp_path / "out", "partial") as working:
            assert sorted(tmp_path.iterdir()) == sorted([mine, busy, working])
            with working_folder(tmp_path / "other", "partial"):
                assert working.exists()
    finally:
        os.close(descriptor)
    assert sorted(tmp_path.iterdir()) == sorted([mine, busy])


def test_another_that_tidies_before_the_folder_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, taken = Path.mkdir, list[str]()

    def make_and_lose(folder: Path, mode: int = 0o777) -> None:
        make(folder, mode)
        if not taken:
            taken.append(folder.name)
            folder.rmdir()  # as a process that took it for one that a killed process left

    monkeypatch.setattr(Path, "mkdir", make_and_lose)
    with working_folder(tmp_path / "out", "partial") as working:
        assert taken == [working.name]
        (working / "file").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    counted: list[int] = []
    with _open(tmp_path, _two_tensors()) as views:
        write_directory(tmp_path / "out", views, [0], progress=counted.append)
        assert sum(counted) == export_nbytes(views, [0]) == 24_000


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda shard: setattr(shard.record, "chunk_bytes", 0), "chunk_bytes 0"),
        (lambda shard: setattr(shard.record, "layout_nbytes", 1 << 40), "layout_nbytes"),
        (lambda shard: setattr(shard.record.chunks[1], "nbytes", 1 << 30), "a chunk of 1073741824 bytes"),
        (lambda shard: setattr(shard.record.chunks[2], "xxh3_128", bytes(16)), "shard_xxh3_128"),
        (lambda shard: setattr(shard.record, "step", 11), "early values are of generation 1 step 10"),
        (lambda shard: setattr(shard.record.chunks[0], "segment", 9), "segment 9 of rank 0"),
        (lambda shard: setattr(shard.record.chunks[0], "frame", 1000), "ends before byte"),
        (
            lambda shard: setattr(shard.record, "layout_nbytes", shard.record.layout_nbytes - 3),
            "layout cannot be parsed",
        ),
    ],
)
def test_contradicting_records_are_refused(tmp_path: Path, break_it: object, text: str) -> None:
    shard = _two_tensors()
    break_it(shard)  # type: ignore[operator]
    with pytest.raises(IntegrityError, match=text), _open(tmp_path, shard):
        pass


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("region", 7, "region 7 of 1"),
        ("region_offset", 4000, "ends at byte"),
        ("nbytes", 399, "399 bytes for a span of 100"),
        ("nbytes", 0, "0 bytes for a span"),
    ],
)
def test_tensors_that_point_outside_are_refused(tmp_path: Path, field: str, value: int, text: str) -> None:
    builder = ShardBuilder()
    number = builder.plain("w", "float32", [100], bytes(400))
    setattr(builder.layout.tensors[number], field, value)
    with pytest.raises(IntegrityError, match=text), _open(tmp_path, builder.build()):
        pass


def test_a_span_of_another_element_size_is_refused() -> None:
    builder = ShardBuilder()
    builder.plain("w", "float32", [100], bytes(800))
    with pytest.raises(IntegrityError, match="8 bytes per element of type float32"):
        contents_of(builder.build().layout)
