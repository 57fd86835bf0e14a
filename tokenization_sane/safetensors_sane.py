"""The safetensors format: dtypes, and a header that is checked against the size of its file before anything is allocated."""

import json
import math
import struct
from typing import Any, NamedTuple

import torch

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
# bits of a value and torch's dtype; of the 4-bit floats, torch keeps two in one element
DTYPES = {
    "F64": (64, "float64"), "F32": (32, "float32"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E5M2": (8, "float8_e5m2"), "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"), "F8_E8M0": (8, "float8_e8m0fnu"), "F4": (4, "float4_e2m1fn_x2"),
    "C64": (64, "complex64"), "I64": (64, "int64"), "I32": (32, "int32"), "I16": (16, "int16"), "I8": (8, "int8"),
    "U64": (64, "uint64"), "U32": (32, "uint32"), "U16": (16, "uint16"), "U8": (8, "uint8"), "BOOL": (8, "bool"),
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, (_, dtype) in DTYPES.items()}
PACKED = "float4_e2m1fn_x2"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Place(NamedTuple):
    """Where the bytes of a tensor stand in a file, and how they are to be read."""

    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]
    is_fortran: bool = False
    is_swapped: bool = False  # True where the most significant byte comes first

    def take(self, raw: torch.Tensor, index: tuple = ()) -> torch.Tensor:
        """The values at `index`, a view of the bytes `raw` `(stop - start,)` if those stand as values do in memory."""
        dtype = getattr(torch, self.dtype)
        size = dtype.itemsize
        shape = self.shape[::-1] if self.is_fortran else self.shape
        axes = tuple(range(len(shape))[::-1] if self.is_fortran else range(len(shape)))
        if raw.storage_offset() % size == 0 and not self.is_swapped:
            return raw.view(dtype).view(shape).permute(axes)[index]
        pieces = raw.view(*shape, size).permute(*axes, len(shape))[index]  # the bytes of a value are the last axis
        if self.is_swapped:
            parts = 2 if dtype.is_complex else 1
            pieces = pieces.unflatten(-1, (parts, size // parts)).flip(-1).flatten(-2)
        return pieces.clone(memory_format=torch.contiguous_format).view(dtype).squeeze(-1)


def header_length(first: bytes, size: int, where: str) -> int:
    """Bytes of the header, from the first eight bytes of a file of so many bytes."""
    if len(first) < 8 or size < 10:
        raise ValueError(f"{where} is no safetensors file: it has only {size} bytes; download it again.")
    (length,) = struct.unpack("<Q", first)
    if length > MAX_HEADER_BYTES or length > size - 8:
        raise ValueError(
            f"{where} is no valid safetensors file: its header claims {length} bytes, the file has {size} "
            f"(and {MAX_HEADER_BYTES} is the limit); it is damaged or truncated."
        )
    return length


def parse_header(header: bytes, size: int, where: str) -> tuple[dict[str, Place], dict[str, str]]:
    """Places of the tensors and the metadata, after checking that the tensors fill the file without hole or overlap.

    Args:
        header (`bytes`): the JSON, without the eight bytes of its length.
        size (`int`): bytes of the whole file.
        where (`str`): the file, for errors.
    """
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no valid safetensors file: {reason(error)}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} is no valid safetensors file: its header is no JSON object.")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{where} is no valid safetensors file: its __metadata__ does not map text to text.")
    data_start = 8 + len(header)
    places = {name: _parse_entry(name, entry, data_start, where) for name, entry in content.items()}
    end, before = data_start, "the header"
    for name, place in sorted(places.items(), key=lambda pair: pair[1][:2]):
        if place.stop > size:
            raise ValueError(
                f"{where} is truncated: {name} should end at byte {place.stop}, the file has {size}; download it again."
            )
        if place.start != end:
            what = "a hole" if place.start > end else "an overlap"
            raise ValueError(f"{where} is no valid safetensors file: there is {what} between {before} and {name}.")
        end, before = place.stop, name
    if end != size:
        raise ValueError(f"{where} is no valid safetensors file: {size - end} bytes follow {before}, the last tensor.")
    return places, metadata


def _parse_entry(name: str, entry: Any, data_start: int, where: str) -> Place:
    try:
        code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: the header does not tell dtype, shape and data_offsets of {name}.") from error
    if not isinstance(shape, list) or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(
            f"{where}: {name} has shape {shape} and data_offsets {[start, stop]}, expected sizes of 0 or more."
        )
    bits, dtype = DTYPES.get(code, (0, "")) if isinstance(code, str) else (0, "")
    if not hasattr(torch, dtype):
        raise ValueError(f"{where}: {name} has dtype {code!r}, which this version of torch does not know.")
    if 8 * (stop - start) != math.prod(shape) * bits:
        raise ValueError(
            f"{where}: {name} has {stop - start} bytes from data_offsets {[start, stop]}, its shape {shape} of {code} "
            f"needs {math.prod(shape) * bits // 8}; the header lies."
        )
    if dtype == PACKED:
        if not shape or shape[-1] % 2:
            raise ValueError(
                f"{where}: {name} has shape {shape} of {code}; torch holds pairs, so the last size must be even."
            )
        shape = [*shape[:-1], shape[-1] // 2]
    return Place(data_start + start, data_start + stop, dtype, tuple(shape))


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object with a name twice is refused, where Python would keep the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands twice in it")
        found[name] = value
    return found


def reason(error: Exception) -> str:
    """What is wrong, for the middle of a sentence."""
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else first_line(error).rstrip(".")


# ---------------------------------------------------------------------------------------------------- NumPy


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
