"""Values without parts: numbers, text, bytes, and small immutable types of torch, numpy and the standard library.

Every function here is exact: integers of any size, floats by their bits (NaN payloads, signed zero), text as
UTF-8 with lone surrogates kept.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import pathlib
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from snapd_proto.format_pb2 import Value

from ..errors import CaptureError, IntegrityError
from .classes import find_class, type_name
from .tensors import dtype_names, dtypes

_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1


def _write_none(value: object, out: Value) -> None:
    out.none.SetInParent()


def _write_bool(value: bool, out: Value) -> None:
    out.boolean = value


def _write_int(value: int, out: Value) -> None:
    if _INT64_MIN <= value <= _INT64_MAX:
        out.integer = value
    else:
        out.big_integer = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)


def _write_float(value: float, out: Value) -> None:
    out.real = value


def _write_complex(value: complex, out: Value) -> None:
    out.complex.re, out.complex.im = value.real, value.imag


def write_text(value: str, out: Value) -> None:
    try:
        out.text = value
    except (UnicodeEncodeError, ValueError):  # lone surrogates are not UTF-8
        out.named.type_name = "builtins:str"
        out.named.text = value.encode("utf-8", "surrogatepass").hex()


def _write_bytes(value: bytes, out: Value) -> None:
    out.raw = value


def _named(name: str, to_text: Callable[[Any], str]) -> Callable[[Any, Value], None]:
    def write(value: object, out: Value) -> None:
        out.named.type_name, out.named.text = name, to_text(value)

    return write


ATOM_WRITERS: dict[type, Callable[[Any, Value], None]] = {
    type(None): _write_none,
    bool: _write_bool,
    int: _write_int,
    float: _write_float,
    complex: _write_complex,
    str: write_text,
    bytes: _write_bytes,
    torch.dtype: _named("torch:dtype", lambda value: dtype_names[value]),
    torch.device: _named("torch:device", str),
    torch.layout: _named("torch:layout", lambda value: str(value).removeprefix("torch.")),
    torch.memory_format: _named("torch:memory_format", lambda value: str(value).removeprefix("torch.")),
    type(NotImplemented): _named("builtins:NotImplemented", lambda value: ""),
    type(Ellipsis): _named("builtins:Ellipsis", lambda value: ""),
    datetime.datetime: _named("datetime:datetime", datetime.datetime.isoformat),
    datetime.date: _named("datetime:date", datetime.date.isoformat),
    datetime.timedelta: _named(
        "datetime:timedelta", lambda value: f"{value.days},{value.seconds},{value.microseconds}"
    ),
    decimal.Decimal: _named("decimal:Decimal", str),
    fractions.Fraction: _named("fractions:Fraction", str),
    uuid.UUID: _named("uuid:UUID", str),
    pathlib.PosixPath: _named("pathlib:PosixPath", str),
    pathlib.PurePosixPath: _named("pathlib:PurePosixPath", str),
    slice: _named("builtins:slice", lambda value: f"{value.start},{value.stop},{value.step}"),
    range: _named("builtins:range", lambda value: f"{value.start},{value.stop},{value.step}"),
}


def _write_enum(value: enum.Enum, out: Value) -> None:
    out.named.type_name = "enum:" + type_name(type(value))
    name = value.name
    # a combination of flags has no name, or one that cannot be looked up
    out.named.text = name if name in type(value).__members__ else f"={value.value}"
    if out.named.text.startswith("=") and not isinstance(value.value, int):
        raise CaptureError("an enum member without a name cannot be captured", type=type_name(type(value)))


def _write_numpy_scalar(value: np.generic, out: Value) -> None:
    if value.dtype.hasobject or value.dtype.names is not None:
        raise CaptureError("a numpy scalar of this dtype cannot be captured", dtype=value.dtype)
    out.named.type_name = "numpy:generic"
    out.named.text = f"{value.dtype.str}:{value.tobytes().hex()}"


def _write_numpy_dtype(value: np.dtype[Any], out: Value) -> None:
    if value.hasobject or value.names is not None:
        raise CaptureError("this numpy dtype cannot be captured", dtype=value)
    out.named.type_name, out.named.text = "numpy:dtype", value.str


def atom_writer(cls: type) -> Callable[[Any, Value], None] | None:
    """What writes values of the class, if they are atoms. The answer is remembered."""
    writer = ATOM_WRITERS.get(cls)
    if writer is None:
        if issubclass(cls, enum.Enum):
            writer = _write_enum
        elif issubclass(cls, np.generic):
            writer = _write_numpy_scalar
        elif issubclass(cls, np.dtype):
            writer = _write_numpy_dtype
        if writer is not None:
            ATOM_WRITERS[cls] = writer
    return writer


def is_atom(value: object) -> bool:
    return type(value) in ATOM_WRITERS or atom_writer(type(value)) is not None


def _read_range(kind: Callable[..., object]) -> Callable[[str], object]:
    def read(text: str) -> object:
        parts = [None if part == "None" else int(part) for part in text.split(",")]
        return kind(*parts)

    return read


def _read_numpy_scalar(text: str) -> object:
    name, _, digits = text.partition(":")
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise IntegrityError("a numpy scalar of objects is refused", dtype=name)
    return np.frombuffer(bytes.fromhex(digits), dtype=dtype)[0]


_NAMED_READERS: dict[str, Callable[[str], object]] = {
    "torch:dtype": dtypes.__getitem__,
    "torch:device": torch.device,
    "torch:layout": lambda text: getattr(torch, text),
    "torch:memory_format": lambda text: getattr(torch, text),
    "builtins:NotImplemented": lambda text: NotImplemented,
    "builtins:Ellipsis": lambda text: Ellipsis,
    "datetime:datetime": datetime.datetime.fromisoformat,
    "datetime:date": datetime.date.fromisoformat,
    "datetime:timedelta": lambda text: datetime.timedelta(*map(int, text.split(","))),
    "decimal:Decimal": decimal.Decimal,
    "fractions:Fraction": fractions.Fraction,
    "uuid:UUID": uuid.UUID,
    "pathlib:PosixPath": pathlib.PosixPath,
    "pathlib:PurePosixPath": pathlib.PurePosixPath,
    "builtins:slice": _read_range(slice),
    "builtins:range": _read_range(range),
    "builtins:str": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "numpy:generic": _read_numpy_scalar,
    "numpy:dtype": np.dtype,
}


def read_named(name: str, text: str) -> object:
    """The value that `Named` stands for.

    Raises:
        IntegrityError: no such type or member here.
    """
    try:
        if name.startswith("enum:"):
            cls = find_class(name.removeprefix("enum:"))
            if cls is None or not issubclass(cls, enum.Enum):
                raise IntegrityError("an enum class of the snapshot has not been imported here", type=name)
            return cls(int(text[1:])) if text.startswith("=") else cls.__members__[text]
        if name == "snapd:class":
            found = find_class(text)
            if found is None:
                raise IntegrityError("a class of the snapshot has not been imported here", type=text)
            return found
        return _NAMED_READERS[name](text)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise IntegrityError(
            "a value of the snapshot cannot be read here", type=name, text=text[:80]
        ) from error
