"""Writing one safetensors file, a tensor at a time.

The library's own writer wants every tensor in memory at once and at one address each; tensors in the arena
lie in chunks. The format is small: 8 bytes little-endian header length, a JSON header padded with blanks to a
multiple of 8, then the bytes. Files are read back with the library in the tests.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

HEADER_BYTES_MAX = 100_000_000  # what the safetensors library accepts
_METADATA_KEY = "__metadata__"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor to be written: its name and form, and the number of its bytes."""

    name: str
    dtype: str  # safetensors' name
    shape: Sequence[int]
    nbytes: int


def header_bytes(entries: Sequence[Entry], metadata: dict[str, str]) -> bytes:
    """The file's beginning: length and JSON; the tensors' bytes follow in the order of `entries`.

    Raises:
        ValueError: two entries of one name, a name that the format reserves, or a header longer than readers
            accept.
    """
    header: dict[str, object] = {_METADATA_KEY: metadata} if metadata else {}
    offset = 0
    for entry in entries:
        if entry.name in header or entry.name == _METADATA_KEY:
            raise ValueError(f"tensor name {entry.name!r} is reserved or given twice")
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_BYTES_MAX:
        raise ValueError(f"header of {len(text)} bytes; readers accept {HEADER_BYTES_MAX}")
    return len(text).to_bytes(8, "little") + text


def write_file(
    path: Path,
    entries: Sequence[Entry],
    pieces_of: Callable[[int], Iterable[bytes | bytearray | memoryview]],
    *,
    metadata: dict[str, str],
    sync: Callable[[int], None],
) -> tuple[int, str]:
    """Write a new file and sync it; returns its size in bytes and the hex XXH3-128 of its contents.

    Args:
        pieces_of: gives the bytes of entry number i, in order, in pieces of any size.
        sync: called with the descriptor before the file is closed (os.fsync).
    Raises:
        ValueError: an entry gave more or fewer bytes than it said; the file is then incomplete.
        FileExistsError, OSError: from the file system.
    """
    digest = xxhash.xxh3_128()
    written = 0
    with path.open("xb") as file:
        head = header_bytes(entries, metadata)
        file.write(head)
        digest.update(head)
        written += len(head)
        for index, entry in enumerate(entries):
            count = 0
            for piece in pieces_of(index):
                file.write(piece)
                digest.update(piece)
                count += len(piece)
            if count != entry.nbytes:
                raise ValueError(f"tensor {entry.name!r} gave {count} bytes instead of {entry.nbytes}")
            written += count
        file.flush()
        sync(file.fileno())
    return written, digest.hexdigest()
