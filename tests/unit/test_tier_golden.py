"""The golden tier of format version 1 is read, written and checked as ever, by snapd and by the reader that only knows
the document.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from snapd_proto import format_pb2, tier_pb2

from snapd.codec.compress import ChunkDecoder
from snapd.core.stored import Encoding
from snapd.core.tier_keys import TierKeys
from snapd.errors import IntegrityError
from snapd.tier import manifests as m
from snapd.tier.notes import decode_void, encode_void
from snapd.tier.packs import PACK_HEAD_BYTES, TAIL_BYTES, check_header, footer_nbytes, parse_footer
from tests.support.tier_golden import DROPPED, FIRST, JOB, SECOND, golden_tier, made_by, shard
from tests.support.tier_scene import TierScene, built_bytes

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tier_v1"
READER = ROOT / "tools" / "read_snapshot.py"
OBJECTS = {
    str(path.relative_to(GOLDEN / "tier")): path.read_bytes()
    for path in sorted((GOLDEN / "tier").rglob("*"))
    if path.is_file()
}
KEYS = TierKeys(JOB)
PACKS = sorted(key for key in OBJECTS if key.endswith(".pack"))
OTHERS = sorted(key for key in OBJECTS if not key.endswith(".pack"))
VOID = KEYS.snapshot(DROPPED, 2)
CODECS: dict[str, tuple[Callable[..., Any], Callable[..., bytes]]] = {
    "shard": (m.decode_shard, m.encode_shard),
    "snapshot": (m.decode_snapshot, m.encode_snapshot),
    "intent": (m.decode_intent, m.encode_intent),
    "condemned": (m.decode_condemned, m.encode_condemned),
    "pin": (m.decode_pin, m.encode_pin),
}


def codec(key: str) -> tuple[Callable[..., Any], Callable[..., bytes]]:
    return (decode_void, encode_void) if key == VOID else CODECS[key.rpartition(".")[2]]


def run_reader(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Without anything of snapd in reach: isolated mode ignores PYTHONPATH and the current folder."""
    command = [sys.executable, "-I", str(READER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def read_pack(data: bytes, key: str) -> None:
    """Everything of a pack: header, index, every chunk."""
    name = KEYS.pack_name(key)
    assert name is not None
    check_header(data[:PACK_HEAD_BYTES], key=key, name=name)
    nbytes = footer_nbytes(data[-TAIL_BYTES:], key=key, pack_nbytes=len(data))
    decoder = ChunkDecoder()
    for chunk in parse_footer(data[-nbytes:], key=key, name=name, pack_nbytes=len(data)):
        out = memoryview(bytearray(chunk.nbytes))
        decoder.decode(data[chunk.offset : chunk.offset + chunk.stored_nbytes], chunk, out)


def test_the_golden_tier_has_what_it_should_have() -> None:
    assert len(OTHERS) >= 12 and len(PACKS) >= 10 and sum(map(len, OBJECTS.values())) < 400_000
    shards = [m.decode_shard(OBJECTS[key], key=key, job=JOB) for key in OTHERS if key.endswith(".shard")]
    assert {chunk.encoding for one in shards for chunk in one.chunks} == set(Encoding)
    assert {chunk.element_nbytes for one in shards for chunk in one.chunks} >= {1, 2, 4, 8}
    packs = [
        set(m.decode_snapshot(OBJECTS[KEYS.snapshot(i)], key=KEYS.snapshot(i), job=JOB).packs)
        for i in (FIRST, SECOND)
    ]
    assert packs[0] & packs[1] and packs[1] - packs[0]  # shared, and new ones


@pytest.mark.parametrize("key", OTHERS)
def test_an_object_means_what_it_meant_and_is_written_as_it_was(key: str) -> None:
    decode, encode = codec(key)
    assert encode(decode(OBJECTS[key], key=key, job=JOB)) == OBJECTS[key]


@pytest.mark.parametrize("key", OTHERS)
def test_every_flipped_bit_of_a_manifest_is_found_and_named(key: str) -> None:
    decode, _ = codec(key)
    data = bytearray(OBJECTS[key])
    for index in range(len(data)):
        for bit in range(8):
            data[index] ^= 1 << bit
            with pytest.raises(IntegrityError, match=re.escape(key)):
                decode(bytes(data), key=key, job=JOB)
            data[index] ^= 1 << bit


@pytest.mark.parametrize("key", PACKS)
def test_flipped_bits_of_a_pack_are_found_and_named(key: str) -> None:
    whole = OBJECTS[key]
    read_pack(whole, key)
    rng = random.Random(key)
    name = KEYS.pack_name(key)
    assert name is not None
    ends = [*range(0, 64, 5), *range(len(whole) - 60, len(whole), 7)]
    for index in [*ends, *(rng.randrange(len(whole)) for _ in range(60))]:
        data = bytearray(whole)
        data[index] ^= 1 << rng.randrange(8)
        with pytest.raises(IntegrityError, match=name):
            read_pack(bytes(data), key)


def scene_of(objects: dict[str, bytes]) -> TierScene:
    return TierScene(job=JOB, objects=objects)


@pytest.mark.parametrize(("snapshot", "revision"), [(FIRST, 0), (FIRST, 1), (SECOND, 0)])
@pytest.mark.parametrize("rank", [0, 1])
def test_shards_come_back_to_the_byte(snapshot: Any, revision: int, rank: int) -> None:
    built, _ = shard(snapshot, rank)
    assert scene_of(OBJECTS).shard_bytes(snapshot, rank, revision) == built_bytes(built)


def test_what_is_written_today_is_the_golden_tier() -> None:
    objects, expected = golden_tier()
    assert expected == json.loads((GOLDEN / "expected.json").read_text())
    assert sorted(objects) == sorted(OBJECTS)
    if made_by() == (GOLDEN / "MADE_BY").read_text():
        assert objects == OBJECTS
    for snapshot in (FIRST, SECOND):  # another zstd may pack otherwise; what is in it is the same
        for rank in range(2):
            assert scene_of(objects).shard_bytes(snapshot, rank) == scene_of(OBJECTS).shard_bytes(
                snapshot, rank
            )


# The reader that only knows the document


def test_the_reader_knows_nothing_of_snapd() -> None:
    text = READER.read_text()
    assert re.search(r"^\s*(import|from)\s+(snapd|google|numpy)", text, re.MULTILINE) is None
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) == {"xxhash", "zstandard"}


def test_the_document_knows_every_field() -> None:
    """Who adds a field says in docs/format.md what it means, then here."""
    newest = {
        name: max(descriptor.fields_by_number)
        for file in (format_pb2, tier_pb2)
        for name, descriptor in file.DESCRIPTOR.message_types_by_name.items()
        if descriptor.fields_by_number
    }
    # Chunk and ShardRecord lie in memory only: a tier has StoredChunks and StoredShard.
    assert newest == {
        "Chunk": 7, "Component": 2, "Complex": 2, "Condemned": 5, "Distributed": 5, "EarlyValues": 4, "Intent": 9,
        "Mapping": 4, "Named": 2, "Opaque": 3, "PackIndex": 7, "ParameterName": 4, "Pin": 5, "Quantisation": 3,
        "Range": 3, "Region": 5, "ReplicaSet": 1, "Sequence": 4, "ShardEntry": 6, "ShardLayout": 14, "ShardRecord": 16,
        "SnapshotName": 2, "StoredChunks": 8, "StoredShard": 16, "StoredSnapshot": 14, "Subclass": 3, "Tensor": 23,
        "Value": 16, "VoidRecord": 7,
    }  # fmt: skip


def test_the_document_knows_how_every_object_is_written() -> None:
    """What the client calls its ways to write objects, and the types of its named values, stand in docs/format.md."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "client/snapd_client/state").glob("*.py")))
    hows = set(
        re.findall(
            r"""(?:\.how = type_name\(.*?\), |Producer\(|opaque\(value, out, |return |how == )"(\w+)"[,:]""",
            sources,
        )
    )
    named = set(
        re.findall(r'"((?:torch|builtins|datetime|decimal|fractions|uuid|pathlib|numpy|snapd):\w+)"', sources)
    )
    assert {"module", "optimizer", "loader", "packed", "array", "python_random"} <= hows and len(named) >= 18
    page = (ROOT / "docs" / "format.md").read_text()
    inner = {"rng", "extra_state"}  # of a scalar, not of an object
    assert [how for how in sorted(hows - inner) if f"| `{how}` |" not in page] == []
    factories = {f"builtins:{name}" for name in ("dict", "float", "int", "list", "set", "tuple")}
    named -= factories  # of a defaultdict
    whole = {re.sub("^(datetime|pathlib):.*", r"\1:...", name) for name in named}
    assert [name for name in sorted(whole) if f"`{name}`" not in page] == []


def test_the_example_in_the_document_is_the_golden_pin() -> None:
    [block] = re.findall(r"```\n(89 53.*?)```", (ROOT / "docs" / "format.md").read_text(), re.DOTALL)
    shown = "".join(re.match(r"(?:[0-9a-f]{2} +)+", line)[0] for line in block.splitlines())  # type: ignore[index]
    assert bytes.fromhex(shown) == OBJECTS[KEYS.pin("best")]


def test_the_reader_knows_the_own_disk_of_a_node(tmp_path: Path) -> None:
    (tmp_path / ".snapd-node").write_text("0" * 32 + "\n")
    done = run_reader("list", tmp_path)
    assert done.returncode == 2 and "own disk of a node" in done.stderr


def test_the_reader_lists_and_verifies() -> None:
    listed = run_reader("list", GOLDEN / "tier")
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert [line.split(" ", 2)[1] for line in lines] == [
        "0000000004-000000000000250",
        "0000000003-000000000000100",
        "0000000003-000000000000090",
    ]
    assert "revision 1" in lines[1] and lines[2].endswith(" dropped")
    verified = run_reader("verify", GOLDEN / "tier")
    assert (verified.returncode, verified.stdout.splitlines()[-1]) == (0, "2 good, 0 bad"), verified.stdout


@pytest.mark.parametrize("snapshot", [FIRST, SECOND])
def test_the_reader_gives_every_tensor_to_the_bit(snapshot: Any, tmp_path: Path) -> None:
    name = f"{snapshot.generation:010d}-{snapshot.step:015d}"
    done = run_reader("extract", GOLDEN / "tier", "--job", JOB, "--snapshot", name, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    expected = json.loads((GOLDEN / "expected.json").read_text())[KEYS.snapshot(snapshot)]
    for rank in range(2):
        folder = tmp_path / name / f"rank-{rank:05d}"
        state = json.loads((folder / "state.json").read_text())
        found = {
            tensor["name"]: {
                "dtype": tensor["dtype"],
                "shape": tensor["shape"],
                "xxh3_128": xxhash.xxh3_128_hexdigest(elements(folder / tensor["file"])),
            }
            for tensor in state["tensors"]
            if "file" in tensor
        }
        # Two are parts of wrappers, known by their own names.
        assert found.pop("moment.codes") == expected[rank].pop("moment.codes")
        assert found == expected[rank]
        check_tree(state, snapshot.step)


def elements(path: Path) -> bytes:
    data = path.read_bytes()
    return data[10 + int.from_bytes(data[8:10], "little") :] if path.suffix == ".npy" else data


def check_tree(state: dict[str, Any], step: int) -> None:
    assert state["scalars"] == [["int", step], ["float", "nan", "7ff8000000000000"], ["none"]]
    kind, factory, pairs = state["state"]
    tree = {key[1]: value for key, value in pairs}
    assert (kind, factory, tree["step"], tree["weight"]) == ("dict", "", ["scalar", 0], ["tensor", 0])
    assert (
        tree["negative"] == ["int", -5]
        and tree["big"] == ["int", 2**100]
        and tree["raw"] == ["bytes", "AP8="]
    )
    assert tree["flag"] == ["bool", True] and tree["named"] == ["named", "torch:dtype", "bfloat16"]
    assert tree["list"] == ["deque", "", 7, [["text", "ä"], ["same_as", 0]]]
    fields = ["ordered_dict", "", [[["int", 1], ["parameter", 0]]]]
    assert tree["object"] == ["object", "package.module:Class", "fields", fields]
    by_name = {tensor["name"]: tensor for tensor in state["tensors"]}
    assert by_name["moment"]["components"] == {"codes": by_name["moment.codes"]["number"]}
    assert by_name["box"]["mesh"]["placements"] == ["S(0)"] and by_name["box"]["global_shape"] == [4, 3]
    assert "file" not in by_name["nowhere"]


def needed_places() -> dict[str, list[int]]:
    """Some places in each object that the two snapshots, at the revisions that count, cannot do without."""
    rng = random.Random(5)
    places: dict[str, list[int]] = {}
    for record_key in (KEYS.snapshot(FIRST, 1), KEYS.snapshot(SECOND)):
        record = m.decode_snapshot(OBJECTS[record_key], key=record_key, job=JOB)
        for key in (record_key, *(entry.key for entry in record.shards)):
            places[key] = [rng.randrange(len(OBJECTS[key]))]
        for entry in record.shards:
            for chunk in m.decode_entry(OBJECTS[entry.key], entry, record).chunks:
                key = KEYS.pack(chunk.pack)
                own = places.setdefault(key, [rng.randrange(64), len(OBJECTS[key]) - 1 - rng.randrange(60)])
                if len(own) < 4:
                    own.append(chunk.offset + rng.randrange(chunk.stored_nbytes))
    return places


@pytest.fixture
def verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Any]:
    """`read_snapshot.py verify tmp_path` in this process; (exit status, what it printed)."""
    spec = importlib.util.spec_from_file_location("read_snapshot", READER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "read_snapshot", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["read_snapshot.py", "verify", str(tmp_path)])
    return lambda: (module.main(), capsys.readouterr().out)


def test_the_reader_finds_and_names_what_is_damaged(tmp_path: Path, verify: Callable[[], Any]) -> None:
    for key, data in OBJECTS.items():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
    spoilt = needed_places()
    assert sum(key.endswith(".pack") for key in spoilt) >= 8
    for key, places in spoilt.items():
        whole = OBJECTS[key]
        changed = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in places]
        for bad in [*changed, whole[: len(whole) // 2], None]:
            (tmp_path / key).unlink() if bad is None else (tmp_path / key).write_bytes(bad)
            code, text = verify()
            if bad is None and key == KEYS.snapshot(SECOND):
                assert (code, "1 good, 0 bad" in text) == (0, True)  # then there is none
            elif bad is None and key == KEYS.snapshot(FIRST, 1):
                assert (code, "2 good, 0 bad" in text) == (0, True)  # revision 0 is as good
            else:
                name = Path(key).name.removesuffix(".pack")
                assert code == 1 and name in text, (key, text)
        (tmp_path / key).write_bytes(whole)


def test_the_reader_refuses_what_it_is_not_meant_for(tmp_path: Path) -> None:
    assert run_reader("verify", tmp_path / "none").returncode == 2
    assert run_reader("extract", GOLDEN / "tier", "--job", "../x", "--out", tmp_path).returncode == 2
    assert run_reader("verify", tmp_path).returncode == 1  # nothing there
    assert run_reader("extract", GOLDEN / "tier", "--job", "none", "--out", tmp_path).returncode == 1
