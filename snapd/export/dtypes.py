"""Names of element types: torch's, as manifests hold them, and safetensors'.

A type that safetensors (0.8) cannot hold, or that its torch reader does not know, is stored as U8, with one
more dimension when an element is longer than a byte; its real name stands in the JSON beside the file.
"""

from dataclasses import dataclass

# What the torch reader of safetensors gives back under the same type.
_SAFETENSORS_NAME = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
    "U16": 2, "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
_ITEMSIZE_OF_OTHERS = {"complex128": 16, "complex32": 4}  # the rest that torch has are one byte long


@dataclass(frozen=True, kw_only=True)
class StoredType:
    """How elements of one torch type are held in a safetensors file."""

    name: str
    itemsize: int  # bytes of one torch element
    is_exact: bool  # False: as U8, one more dimension when itemsize > 1

    def stored_shape(self, shape: list[int]) -> list[int]:
        return shape if self.is_exact or self.itemsize == 1 else [*shape, self.itemsize]


def stored_type(dtype: str) -> StoredType:
    """How to store elements of the torch type `dtype` ("bfloat16", without the "torch.")."""
    name = _SAFETENSORS_NAME.get(dtype)
    if name is not None:
        return StoredType(name=name, itemsize=_ITEMSIZE[name], is_exact=True)
    return StoredType(name="U8", itemsize=_ITEMSIZE_OF_OTHERS.get(dtype, 1), is_exact=False)
