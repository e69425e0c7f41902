"""Objects that keep their state inside: generators of random numbers, arrays, small tensors.

Each is written as an `Opaque` whose `how` says which reader below takes it; the mutable ones are put back in
place when the live object is of the same kind.
"""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import torch

from ..errors import CaptureError, IntegrityError
from .tensors import component_names, dtype_names, dtypes

Fields = dict[str, object]


def tensor_fields(tensor: torch.Tensor) -> Fields:
    """A tensor by value; for small ones only."""
    if component_names(tensor):
        raise CaptureError(
            "a tensor subclass inside a state_dict() value cannot be captured", type=type(tensor).__name__
        )
    dense = tensor.detach().cpu().contiguous().reshape(-1)
    raw = dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b""
    return {
        "dtype": dtype_names[tensor.dtype],
        "shape": tuple(tensor.shape),
        "device": str(tensor.device),
        "raw": raw,
    }


def read_tensor(fields: Fields) -> torch.Tensor:
    dtype, shape, raw = fields["dtype"], fields["shape"], fields["raw"]
    if not (
        isinstance(dtype, str) and dtype in dtypes and isinstance(shape, tuple) and isinstance(raw, bytes)
    ):
        raise IntegrityError("a tensor value of the snapshot is malformed")
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtypes[dtype]).reshape(shape)
    return tensor.to(torch.device(str(fields["device"])))


def array_fields(array: np.ndarray[Any, Any]) -> Fields:
    if array.dtype.hasobject or array.dtype.names is not None:
        raise CaptureError("a numpy array of this dtype cannot be captured", dtype=array.dtype)
    return {"dtype": array.dtype.str, "shape": tuple(array.shape), "raw": array.tobytes()}


def read_array(fields: Fields) -> np.ndarray[Any, Any]:
    dtype, shape, raw = fields["dtype"], fields["shape"], fields["raw"]
    if not (isinstance(dtype, str) and isinstance(shape, tuple) and isinstance(raw, bytes)):
        raise IntegrityError("an array value of the snapshot is malformed")
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise IntegrityError("a numpy array of objects is refused", dtype=dtype)
    return np.frombuffer(bytearray(raw), dtype=kind).reshape(shape)


def python_random_fields(generator: random.Random) -> Fields:
    try:
        version, words, gauss = generator.getstate()
    except NotImplementedError as error:
        raise CaptureError(
            "this source of random numbers has no state", type=type(generator).__name__
        ) from error
    return {"version": version, "words": struct.pack("<625I", *words), "gauss": gauss}


def set_python_random(generator: random.Random, fields: Fields) -> None:
    words = fields["words"]
    if not isinstance(words, bytes) or len(words) != 2500:
        raise IntegrityError("the state of a random.Random is malformed")
    generator.setstate((fields["version"], struct.unpack("<625I", words), fields["gauss"]))


def torch_generator_fields(generator: torch.Generator) -> Fields:
    return {"device": str(generator.device), "state": generator.get_state().numpy().tobytes()}


def set_torch_generator(generator: torch.Generator, fields: Fields) -> None:
    state = fields["state"]
    if not isinstance(state, bytes):
        raise IntegrityError("the state of a torch.Generator is malformed")
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def numpy_random_fields(source: np.random.Generator | np.random.RandomState) -> Fields:
    if isinstance(source, np.random.Generator):
        return {"state": source.bit_generator.state}
    return {"state": source.get_state(legacy=False)}


def set_numpy_random(source: np.random.Generator | np.random.RandomState, fields: Fields) -> None:
    state: Any = fields["state"]
    if isinstance(source, np.random.Generator):
        source.bit_generator.state = state
    else:
        source.set_state(state)


def new_numpy_random(type_name: str, fields: Fields) -> np.random.Generator | np.random.RandomState:
    state: Any = fields["state"]
    kinds = {"PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"}
    name = state.get("bit_generator") if isinstance(state, dict) else None
    if name not in kinds:
        raise IntegrityError("an unknown bit generator", name=name)
    bits = getattr(np.random, name)()
    made = np.random.RandomState(bits) if type_name.endswith("RandomState") else np.random.Generator(bits)
    set_numpy_random(made, fields)
    return made
