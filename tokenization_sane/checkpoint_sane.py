"""Checkpoints of any format to read from, headers first and values on demand; and the writer that does the reverse.

| source | header read without values | a slice is read without the rest |
|---|---|---|
| `nn.Module`, state dict | yes | yes |
| `.safetensors`, folder of shards with an index | yes | yes, mapped |
| Hub repository | yes, by ranged requests | after the file is downloaded, on the first value |
| `.npz` | yes | yes where stored; a compressed tensor is unpacked alone |
| Keras `.h5` | yes | yes |
| `.pt`, `.pth`, `.bin`, `.ckpt` (pickles, `allow_pickle=True`) | yes | yes, mapped (files of torch < 1.6 are read as a whole) |

What a file claims is checked against its size before anything is allocated; errors name the file, and the tensor where there is
one. Formats are told by content, not by the file's ending. In NumPy and Keras names, `/` becomes `.`, as it is in state dicts.
"""

import json
import math
import os
import re
import secrets
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .layout_sane import CheckpointLayout, TensorLayout, TensorSpec, check_name, copy_exactly

try:
    import h5py
except ImportError:  # only readers of Keras files need it
    h5py = None

SAFETENSORS_NAME = "model.safetensors"
SAFETENSORS_INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
KERAS_SUFFIXES = (".h5", ".hdf5")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
FIRST_REQUEST_BYTES = 100_000  # most headers on the Hub are shorter, so that one request is enough

# bits of a value and torch's dtype; of the 4-bit floats, torch keeps two in one element
_SAFETENSORS_DTYPES = {
    "F64": (64, "float64"), "F32": (32, "float32"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E5M2": (8, "float8_e5m2"), "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"), "F8_E8M0": (8, "float8_e8m0fnu"), "F4": (4, "float4_e2m1fn_x2"),
    "C64": (64, "complex64"), "I64": (64, "int64"), "I32": (32, "int32"), "I16": (16, "int16"), "I8": (8, "int8"),
    "U64": (64, "uint64"), "U32": (32, "uint32"), "U16": (16, "uint16"), "U8": (8, "uint8"), "BOOL": (8, "bool"),
}  # fmt: skip
_SAFETENSORS_NAMES = {dtype: name for name, (_, dtype) in _SAFETENSORS_DTYPES.items()}
_NUMPY_DTYPES = {
    "float64", "float32", "float16", "complex64", "complex128", "bool",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
}  # fmt: skip
_PACKED = "float4_e2m1fn_x2"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---------------------------------------------------------------------------------------------------- reading
class CheckpointFiles:
    """The tensors of a checkpoint, whatever it is stored in, read one piece at a time.

    Args:
        source (`nn.Module`, `Mapping`, `str` or `Path`): a network, a state dict, a file, a folder, or a Hub repository
            (`"namespace/name"`, with `"@revision"` if another than main is meant). In a folder or repository, safetensors go
            before `.npz` and `.h5`, and those before pickles.
        allow_pickle (`bool`): True opens pickles too, with `weights_only=True`. Dictionaries and lists in them become names
            with dots.

    Attributes:
        specs (`list[TensorSpec]`): what the headers say, tied names left out.
        ties (`dict[str, str]`): tied name to the name that is stored.
        ignored (`dict[str, str]`): what is no tensor (in pickles and Keras files): name to type.
        files (`list[str]`): names of the files that are read.
        skipped (`list[str]`): other weight files in the folder that are not.

    Raises:
        ValueError: If there is no such source, a file is damaged or lies about its content, a shard is missing, a name
            stands twice or is no tensor name, or a pickle is not allowed. File and tensor are named.

    Example:
    ```python
    with CheckpointFiles("folder_with_shards") as files:
        print(files.specs[0])  # no value has been read
        tensors = files.read()
    ```
    """

    def __init__(self, source: Any, allow_pickle: bool = False):
        self._tensors = source.state_dict() if isinstance(source, nn.Module) else source
        self._readers: dict[str, Any] = {}
        self.ignored: dict[str, str] = {}
        self.files, self.skipped = [], []
        if isinstance(self._tensors, Mapping):
            self.specs, self.ties = module_specs(source) if isinstance(source, nn.Module) else state_dict_specs(source)
            return
        self._tensors = None
        self.specs, self.ties = [], {}
        opened, self.skipped = _open(source, allow_pickle)
        for reader in opened:
            self._add(reader)
        self.ties = {k: v for k, v in self.ties.items() if v in self._readers and k not in self._readers}
        if any(reader.is_sorted for reader in opened):  # by the writing library: by dtype, and layer10 before layer2
            self.specs.sort(key=lambda spec: _natural(spec.name))
        self.specs = _with_recurrent(self.specs)

    def _add(self, reader: Any) -> None:
        self.files.append(Path(reader.where).name)
        for name in [*(spec.name for spec in reader.specs), *reader.ties]:
            try:
                check_name(name)
            except ValueError as error:
                raise ValueError(f"{reader.where}: {error}") from error
            if name in self._readers and name not in reader.ties:
                raise ValueError(
                    f"{name} stands in {self._readers[name].where} and in {reader.where}; give the file you mean."
                )
        self._readers |= {spec.name: reader for spec in reader.specs}
        self.specs += reader.specs
        self.ties |= reader.ties
        self.ignored |= reader.ignored

    def __enter__(self) -> "CheckpointFiles":
        return self

    def __exit__(self, *_: Any) -> None:
        for reader in {id(reader): reader for reader in self._readers.values()}.values():
            reader.close()
        self._readers.clear()

    def read(self) -> dict[str, torch.Tensor]:
        """All tensors; those of a file without the tied names."""
        if self._tensors is not None:
            return dict(self._tensors)
        return {spec.name: self._readers[spec.name].take(spec.name) for spec in self.specs}

    def rows(
        self, tensor: TensorLayout, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Rows `start:stop` of one tensor along its row axis, as real numbers; nothing else of it is read.

        Args:
            tensor ([`TensorLayout`]): which tensor, and its row axis.
            start (`int`): first row.
            stop (`int`): end row, not included.
            columns (`tuple[int, int]`, *optional*): first and end column of its table; all by default.

        Returns:
            `torch.Tensor`: the tensor's `real_shape` with `stop - start` in place of the row axis, or `(rows, columns)` of its
            table if columns are given; where possible a view.
        """
        if self._tensors is not None:
            return tensor.read(self._tensors[tensor.name].__getitem__, start, stop, columns)
        reader = self._readers[tensor.name]
        return tensor.read(lambda index: reader.take(tensor.name, index), start, stop, columns)


def read_checkpoint(source: Any, allow_pickle: bool = False) -> Mapping[str, torch.Tensor]:
    """All tensors of a source under all their names, without copying those in memory.

    Args:
        source (checkpoint): as for [`CheckpointFiles`].
        allow_pickle (`bool`): True opens pickles too, with `weights_only=True`.
    """
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    with CheckpointFiles(source, allow_pickle) as files:
        tensors = files.read()
        return tensors | {name: tensors[kept] for name, kept in files.ties.items()}


def _natural(name: str) -> list:
    """Sort key that puts layer2 before layer10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


# ---------------------------------------------------------------------------------------------------- which files
def _open(source: Any, allow_pickle: bool) -> tuple[list, list[str]]:
    """Readers of a source's files, and the names of the weight files beside them that are not read."""
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"a checkpoint is a network, a state dict, a path or a Hub repository, this is a {type(source).__name__}."
        )
    path = Path(source)
    if path.is_dir():
        return _open_folder(_Folder(path), allow_pickle)
    if path.is_file() and path.name.endswith(".index.json"):
        return _open_folder(_Folder(path.parent), allow_pickle, index=path.name)
    if path.is_file():
        return [_open_file(path, allow_pickle)], []
    if isinstance(source, str) and _may_be_repository(source):
        return _open_folder(_Repository(source), allow_pickle)
    raise ValueError(f"{source} does not exist; give a state dict, a checkpoint file, or a folder that holds one.")


def _may_be_repository(source: str) -> bool:
    known = (".safetensors", ".npz", ".json", *KERAS_SUFFIXES, *PICKLE_SUFFIXES)
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(@[^@\s]+)?", source, re.ASCII) is not None
    return is_name and not source.lower().endswith(known)


class _Folder:
    """A folder on disk."""

    num_connections = 1

    def __init__(self, path: Path):
        self.where = str(path)
        self.names = sorted(file.name for file in path.iterdir() if file.is_file())

    def path(self, name: str) -> Path:
        return Path(self.where) / name

    def open(self, name: str, allow_pickle: bool) -> Any:
        return _open_file(self.path(name), allow_pickle)


class _Repository:
    """A model repository on the Hub, or what the cache has of it where the Hub cannot be reached."""

    num_connections = 8

    def __init__(self, source: str):
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

        self.where = source
        self.repo_id, _, revision = source.partition("@")
        self._cached: Path | None = None
        try:
            info = HfApi().model_info(self.repo_id, revision=revision or None, files_metadata=True)
        except (HfHubHTTPError, ValueError) as error:
            raise ValueError(
                f"{source} is neither a file or folder here nor a model repository that can be read: "
                f"{_first_line(error)}"
            ) from error
        except (HTTPError, OfflineModeIsEnabled, OSError) as error:
            try:
                self._cached = Path(snapshot_download(self.repo_id, revision=revision or None, local_files_only=True))
            except (OSError, ValueError):
                raise ValueError(
                    f"{source} is no file or folder here, the Hub cannot be reached ({_first_line(error)}), and it is "
                    "not in the cache."
                ) from error
            self.names = _Folder(self._cached).names
            return
        self.revision = info.sha
        self._sizes = {file.rfilename: file.size for file in info.siblings or [] if "/" not in file.rfilename}
        self.names = sorted(self._sizes)

    def path(self, name: str) -> Path:
        """The file itself; it is downloaded if the cache lacks it."""
        from huggingface_hub import hf_hub_download

        if self._cached is not None:
            return self._cached / name
        return Path(hf_hub_download(self.repo_id, name, revision=self.revision))

    def open(self, name: str, allow_pickle: bool) -> Any:
        if self._cached is None and name.endswith(".safetensors"):
            return _RemoteSafetensors(self, name)
        if name.endswith(PICKLE_SUFFIXES) and not allow_pickle:  # before it is downloaded
            raise ValueError(_pickle_refused(f"{self.where}/{name}"))
        return _open_file(self.path(name), allow_pickle)

    def size(self, name: str) -> int:
        if self._sizes[name] is None:
            raise ValueError(f"{self.where}: the Hub does not tell the size of {name}.")
        return self._sizes[name]

    def first_bytes(self, name: str, count: int) -> bytes:
        """The first bytes of a file, and no more, even from a server that does not know ranges."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.repo_id, name, revision=self.revision)
        headers = build_hf_headers() | {"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
        found = bytearray()
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                found += chunk
                if len(found) >= count:
                    break
        return bytes(found[:count])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _open_folder(folder: Any, allow_pickle: bool, index: str | None = None) -> tuple[list, list[str]]:
    names = folder.names
    if index is None:
        index, files = _choose_files(names, folder.where)
    if index is None:
        return [folder.open(name, allow_pickle) for name in files], _weight_files(names, files)
    if index.endswith(".bin.index.json") and not allow_pickle:
        raise ValueError(_pickle_refused(f"the files of {folder.path(index)}", plural=True))
    where = str(folder.path(index))
    weight_map = _read_weight_map(Path(where))
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if name not in names]
    if missing:
        raise ValueError(f"{where} names {missing[0]}, which is not there; download the checkpoint again.")
    with ThreadPoolExecutor(folder.num_connections) as pool:
        readers = [*pool.map(lambda name: folder.open(name, allow_pickle), files)]
    _check_weight_map(weight_map, dict(zip(files, readers, strict=True)), where)
    return readers, _weight_files(names, files)


def _choose_files(names: list[str], where: str) -> tuple[str | None, list[str]]:
    """The index, or the files themselves, that hold the checkpoint of a folder."""
    for single, index_name, suffixes in (
        (SAFETENSORS_NAME, SAFETENSORS_INDEX_NAME, (".safetensors",)),
        (None, None, (".npz", *KERAS_SUFFIXES)),
        (PICKLE_NAME, f"{PICKLE_NAME}.index.json", PICKLE_SUFFIXES),
    ):
        files = [name for name in names if name.lower().endswith(suffixes)]
        indices = [name for name in names if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        if single in files:
            return None, [single]
        if index_name in indices or len(indices) == 1:
            return (index_name if index_name in indices else indices[0]), []
        if len(indices) > 1:
            raise ValueError(f"{where} holds several checkpoints ({', '.join(indices)}); give the one you mean.")
        if suffixes == (".safetensors",) and files:
            return None, files
        if len(files) == 1:
            return None, files
        if files:
            raise ValueError(f"{where} holds several checkpoints ({', '.join(files)}); give the one you mean.")
    raise ValueError(f"{where} holds no .safetensors file, and no .npz, .h5, .bin, .pt or .pth either.")


def _weight_files(names: list[str], read: list[str]) -> list[str]:
    suffixes = (".safetensors", ".npz", *KERAS_SUFFIXES, *PICKLE_SUFFIXES)
    return [name for name in names if name.lower().endswith(suffixes) and name not in read]


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
        weight_map = dict(content["weight_map"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no index of shards: {_reason(error)}.") from error
    for name, file in weight_map.items():
        # a name with a folder in it could lead anywhere
        if not isinstance(file, str) or not file or Path(file).name != file or "\\" in file:
            raise ValueError(f"{path} puts {name} into {file!r}, expected the name of a file beside it.")
    if not weight_map:
        raise ValueError(f"{path} names no tensors.")
    return weight_map


def _check_weight_map(weight_map: Mapping[str, str], readers: Mapping[str, Any], where: str) -> None:
    """Index and shards must tell the same."""
    held = {file: {spec.name for spec in reader.specs} | {*reader.ties} for file, reader in readers.items()}
    for name, file in weight_map.items():
        if name not in held[file]:
            raise ValueError(
                f"{where} puts {name} into {file}, which does not have it; download the checkpoint again."
            )
    for file, names in held.items():
        for name in sorted(names - {*readers[file].ties}):
            if weight_map.get(name) != file:
                found = f"puts it into {weight_map[name]}" if name in weight_map else "does not list it"
                raise ValueError(f"{file} holds {name}, but {where} {found}; download the checkpoint again.")


def _open_file(path: Path, allow_pickle: bool) -> Any:
    """The reader that fits what is in the file."""
    with path.open("rb") as file:
        head = file.read(512)
    start = head.lstrip().lower()
    if not head:
        raise ValueError(f"{path} is empty.")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the file it stands for; run `git lfs pull` to get that.")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{path} is a web page, no checkpoint; download it again.")
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _Keras(path)
    if head.startswith(b"PK\x03\x04"):
        names = _zip_names(path)
        if any(name.endswith("/data.pkl") for name in names):
            return _Pickle(path, allow_pickle)
        if names and all(name.endswith(".npy") for name in names):
            return _Numpy(path)
        inner = next((name for name in names if name.endswith(KERAS_SUFFIXES)), None)
        what = f"unzip it and give {inner}" if inner else "expected the arrays of an .npz file or a torch pickle in it"
        raise ValueError(f"{path} is a zip archive; {what}.")
    suffix = path.suffix.lower()
    if suffix == ".safetensors" or head[8:9] == b"{":
        return _Safetensors(path)
    if suffix in PICKLE_SUFFIXES or (head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return _Pickle(path, allow_pickle)
    if suffix == ".npz" or suffix in KERAS_SUFFIXES:
        raise ValueError(f"{path} is damaged: it does not begin like a {suffix} file; download it again.")
    raise ValueError(f"{path} is no checkpoint that can be read; expected safetensors, .npz, .h5 or a torch pickle.")


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged: {error}; download it again.") from error


# ---------------------------------------------------------------------------------------------------- values in bytes
class _Place(NamedTuple):
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


def _map_bytes(path: Path, size: int) -> torch.Tensor:
    """A file as uint8 `(size,)`; pages are read when they are looked at, and writing to them leaves the file alone."""
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------------- safetensors
class _Safetensors:
    """One safetensors file. Its header is checked here, since the library keeps the last of two equal names in silence."""

    is_sorted = True
    ignored: Mapping[str, str] = {}

    def __init__(self, path: Path):
        self.where = str(path)
        self._path, self._size = path, path.stat().st_size
        self._raw: torch.Tensor | None = None
        with path.open("rb") as file:
            length = _header_length(file.read(8), self._size, self.where)
            self._parse(file.read(length))

    def _parse(self, header: bytes) -> None:
        self._places, metadata = _parse_header(header, self._size, self.where)
        self.specs = [TensorSpec(name, place.shape, place.dtype) for name, place in self._places.items()]
        self.ties = {
            k: v for k, v in metadata.items() if v in self._places and k not in self._places and k != "format"
        }
        self._header = header

    def take(self, name: str, index: tuple = ()) -> torch.Tensor:
        if self._raw is None:
            self._raw = _map_bytes(self._path, self._size)
        place = self._places[name]
        return place.take(self._raw[place.start : place.stop], index)

    def close(self) -> None:
        self._raw = None


class _RemoteSafetensors(_Safetensors):
    """A safetensors file on the Hub: the header is fetched by ranged requests, the file when the first value is read."""

    def __init__(self, repository: _Repository, name: str):
        self.where = f"{repository.where}/{name}"
        self._repository, self._name = repository, name
        self._size, self._raw = repository.size(name), None
        head = repository.first_bytes(name, min(FIRST_REQUEST_BYTES, max(self._size, 1)))
        length = _header_length(head[:8], self._size, self.where)
        if len(head) < 8 + length:
            head = repository.first_bytes(name, 8 + length)
        self._parse(head[8 : 8 + length])

    def take(self, name: str, index: tuple = ()) -> torch.Tensor:
        if self._raw is None:
            self._path = self._repository.path(self._name)
            whole = _Safetensors(self._path)  # the file is checked again, since another may have come
            if whole._header != self._header:
                raise ValueError(f"{self.where} is not the file whose header was read; open it again.")
        return super().take(name, index)


def _header_length(first: bytes, size: int, where: str) -> int:
    if len(first) < 8 or size < 10:
        raise ValueError(f"{where} is no safetensors file: it has only {size} bytes; download it again.")
    (length,) = struct.unpack("<Q", first)
    if length > MAX_HEADER_BYTES or length > size - 8:
        raise ValueError(
            f"{where} is no valid safetensors file: its header claims {length} bytes, the file has {size} "
            f"(and {MAX_HEADER_BYTES} is the limit); it is damaged or truncated."
        )
    return length


def _parse_header(header: bytes, size: int, where: str) -> tuple[dict[str, _Place], dict[str, str]]:
    """Places of the tensors and the metadata, after checking that the tensors fill the file without hole or overlap.

    Args:
        header (`bytes`): the JSON, without the eight bytes of its length.
        size (`int`): bytes of the whole file.
        where (`str`): the file, for errors.
    """
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no valid safetensors file: {_reason(error)}.") from error
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


def _parse_entry(name: str, entry: Any, data_start: int, where: str) -> _Place:
    try:
        code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: the header does not tell dtype, shape and data_offsets of {name}.") from error
    if not isinstance(shape, list) or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(
            f"{where}: {name} has shape {shape} and data_offsets {[start, stop]}, expected sizes of 0 or more."
        )
    bits, dtype = _SAFETENSORS_DTYPES.get(code, (0, "")) if isinstance(code, str) else (0, "")
    if not hasattr(torch, dtype):
        raise ValueError(f"{where}: {name} has dtype {code!r}, which this version of torch does not know.")
    if 8 * (stop - start) != math.prod(shape) * bits:
        raise ValueError(
            f"{where}: {name} has {stop - start} bytes from data_offsets {[start, stop]}, its shape {shape} of {code} "
            f"needs {math.prod(shape) * bits // 8}; the header lies."
        )
    if dtype == _PACKED:
        if not shape or shape[-1] % 2:
            raise ValueError(
                f"{where}: {name} has shape {shape} of {code}; torch holds pairs, so the last size must be even."
            )
        shape = [*shape[:-1], shape[-1] // 2]
    return _Place(data_start + start, data_start + stop, dtype, tuple(shape))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands twice in it")
        found[name] = value
    return found


def _reason(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else _first_line(error).rstrip(".")


# ---------------------------------------------------------------------------------------------------- NumPy
class _Numpy:
    """An `.npz` archive. Stored arrays are mapped; a compressed one is unpacked when asked for, and the last one is kept."""

    is_sorted = False
    ignored: Mapping[str, str] = {}
    ties: Mapping[str, str] = {}

    def __init__(self, path: Path):
        self.where = str(path)
        self._path, self._size = path, path.stat().st_size
        self._raw: torch.Tensor | None = None
        self._unpacked: tuple[str, torch.Tensor | None] = ("", None)
        self._places: dict[str, _Place] = {}
        self._members: dict[str, str] = {}  # of the compressed arrays
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    self._add(archive, info)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:  # RuntimeError: encrypted
            raise ValueError(f"{path} is damaged or not written by NumPy: {error}.") from error
        self.specs = [TensorSpec(name, place.shape, place.dtype) for name, place in self._places.items()]

    def _add(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        name = info.filename.removesuffix(".npy").replace("/", ".")
        if name in self._places:
            raise ValueError(f"{self.where}: {name} stands twice in it.")
        with archive.open(info) as file:
            shape, is_fortran, dtype = self._header(name, file)
            start = file.tell()
        dtype_name = _numpy_dtype(dtype, name, self.where)
        stop = start + math.prod(shape) * dtype.itemsize
        if info.file_size != stop or (info.compress_type == zipfile.ZIP_STORED and info.compress_size != stop):
            raise ValueError(
                f"{self.where}: {name} has {info.file_size} bytes, its shape {list(shape)} of {dtype} needs {stop}; the "
                "header lies."
            )
        if info.compress_type == zipfile.ZIP_STORED:
            offset = self._data_offset(name, info)
            start, stop = start + offset, stop + offset
        elif info.file_size > 1100 * info.compress_size + 1000:  # deflate reaches 1,032 to 1
            raise ValueError(
                f"{self.where}: {name} claims to grow from {info.compress_size} to {info.file_size} bytes."
            )
        else:
            self._members[name] = info.filename
        is_swapped = dtype.newbyteorder("=") != dtype
        self._places[name] = _Place(start, stop, dtype_name, shape, is_fortran, is_swapped)

    def _header(self, name: str, file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"it has format {version}, expected (1, 0) or (2, 0)")
            shape, is_fortran, dtype = readers[version](file)
        except (ValueError, TypeError, SyntaxError) as error:
            raise ValueError(f"{self.where}: {name} is no NumPy array: {_reason(error)}.") from error
        if any(size < 0 for size in shape):
            raise ValueError(f"{self.where}: {name} has shape {list(shape)}, expected sizes of 0 or more.")
        return shape, is_fortran, dtype

    def _data_offset(self, name: str, info: zipfile.ZipInfo) -> int:
        """Where a stored member begins; only the header that stands before it tells."""
        with self._path.open("rb") as file:
            file.seek(info.header_offset)
            head = file.read(30)
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30])) if len(head) == 30 else self._size
        if offset + info.file_size > self._size:
            raise ValueError(f"{self.where} is truncated: {name} does not fit into its {self._size} bytes.")
        return offset

    def take(self, name: str, index: tuple = ()) -> torch.Tensor:
        place = self._places[name]
        if name in self._members:
            return place.take(self._unpack(name), index)
        if self._raw is None:
            self._raw = _map_bytes(self._path, self._size)
        return place.take(self._raw[place.start : place.stop], index)

    def _unpack(self, name: str) -> torch.Tensor:
        if self._unpacked[0] != name:
            self._unpacked = ("", None)  # the one before is let go first
            place = self._places[name]
            raw = torch.empty(place.stop - place.start, dtype=torch.uint8)
            try:
                with zipfile.ZipFile(self._path) as archive, archive.open(self._members[name]) as file:
                    file.read(place.start)
                    target, done = memoryview(raw.numpy()), 0
                    while done < len(target) and (count := file.readinto(target[done:])):
                        done += count
                    file.read()  # reading to the end checks the checksum
            except (zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
                raise ValueError(f"{self.where}: {name} is damaged: {error}.") from error
            if done < len(target):
                raise ValueError(f"{self.where}: {name} is truncated.")
            self._unpacked = (name, raw)
        return self._unpacked[1]

    def close(self) -> None:
        self._raw, self._unpacked = None, ("", None)


def _numpy_dtype(dtype: np.dtype, name: str, where: str) -> str:
    if dtype.hasobject:
        raise ValueError(f"{where}: {name} holds Python objects, which are pickles; only numbers are read.")
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None and dtype.subdtype is None:
        return "bfloat16"  # what NumPy makes of JAX' bfloat16 arrays
    if dtype.name not in _NUMPY_DTYPES:
        raise ValueError(f"{where}: {name} has dtype {dtype}, expected one of {', '.join(sorted(_NUMPY_DTYPES))}.")
    return dtype.name


# ---------------------------------------------------------------------------------------------------- Keras
class _Keras:
    """An HDF5 file as Keras writes it. Its kernels are `(..., in, out)`, so the last axis gives the rows of a table."""

    is_sorted = True

    def __init__(self, path: Path):
        if h5py is None:
            raise ValueError(f'{path} is a Keras file; install h5py to read it: pip install "sane-hub[keras]".')
        self.where = str(path)
        self.ignored: dict[str, str] = {}
        self.ties: dict[str, str] = {}
        self._datasets: dict[str, Any] = {}
        self._dtypes: dict[str, str] = {}
        self._seen: dict[Any, str] = {}
        try:
            self._file = h5py.File(path, "r")
            self._walk(self._file, "")
        except ValueError:
            raise
        except (OSError, RuntimeError, KeyError) as error:  # h5py raises all of them for damaged files
            raise ValueError(f"{path} is a damaged HDF5 file: {_reason(error)}.") from error
        self.specs = [
            TensorSpec(
                name, data.shape, self._dtypes[name], None, len(data.shape) - 1 if len(data.shape) > 1 else None
            )
            for name, data in self._datasets.items()
        ]

    def _walk(self, group: Any, prefix: str) -> None:
        for key in group:
            name = prefix + key.split(":")[0] if re.search(r":[0-9]+$", key) else prefix + key
            link = group.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):  # such a link may lead into any other file
                self.ignored[name] = type(link).__name__
                continue
            item = group[key]
            identity = h5py.h5o.get_info(item.id).addr
            if isinstance(item, h5py.Group):
                if identity not in self._seen:
                    self._seen[identity] = name
                    self._walk(item, f"{name}.")
            elif not isinstance(item, h5py.Dataset) or item.shape is None or item.dtype.kind in "SUOMm":
                self.ignored[name] = str(getattr(item, "dtype", type(item).__name__))
            elif name in self._datasets or name in self.ties:
                raise ValueError(f"{self.where}: {name} stands twice in it.")
            elif identity in self._seen:
                self.ties[name] = self._seen[identity]
            else:
                if item.external or item.is_virtual:
                    raise ValueError(f"{self.where}: {name} keeps its values in another file; that is not followed.")
                self._seen[identity] = name
                self._datasets[name] = item
                self._dtypes[name] = _numpy_dtype(item.dtype, name, self.where)

    def take(self, name: str, index: tuple = ()) -> torch.Tensor:
        try:
            values = np.asarray(self._datasets[name][index])
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.where}: {name} is damaged: {_reason(error)}.") from error
        values = np.array(values, dtype=values.dtype.newbyteorder("="), order="C", ndmin=0)
        if self._dtypes[name] == "bfloat16":
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(values)

    def close(self) -> None:
        self._file.close()


# ---------------------------------------------------------------------------------------------------- pickles
class _Pickle:
    """A file of `torch.save`, opened with `weights_only=True`: tensors and plain containers, nothing that runs."""

    is_sorted = False

    def __init__(self, path: Path, allow_pickle: bool):
        if not allow_pickle:
            raise ValueError(_pickle_refused(path))
        self.where = str(path)
        self.ignored: dict[str, str] = {}
        try:
            # older files are no zip archives and cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # unpickling what is damaged can raise anything
            raise ValueError(f"{path} cannot be read with weights_only=True: {_first_line(error)}") from error
        if not isinstance(content, (Mapping, list, tuple)):
            raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors.")
        self._tensors: dict[str, torch.Tensor] = {}
        for name, value in _leaves(content):
            if name in self._tensors or name in self.ignored:
                raise ValueError(f"{path}: {name} stands twice in it.")
            if isinstance(value, torch.Tensor):
                self._tensors[name] = value
            else:
                self.ignored[name] = type(value).__name__
        try:
            self.specs, self.ties = state_dict_specs(self._tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def take(self, name: str, index: tuple = ()) -> torch.Tensor:
        return self._tensors[name].detach()[index]

    def close(self) -> None:
        self._tensors = {}


def _pickle_refused(what: Any, plural: bool = False) -> str:
    return (
        f"{what} {'are pickles, which' if plural else 'is a pickle, which'} can hold code; pass --allow-pickle "
        "(allow_pickle=True in Python) to read the tensors in it, with weights_only=True."
    )


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of everything in nested containers, names joined by dots; an empty container is a leaf."""
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, (Mapping, list, tuple)) and len(value):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


# ---------------------------------------------------------------------------------------------------- specs
def _spec(name: str, tensor: torch.Tensor, kind: str | None = None, row_axis: int | None = None) -> TensorSpec:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(
            f"{name} is a {type(tensor).__name__}, a state dict holds tensors; give the inner state dict itself."
        )
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        raise ValueError(
            f"{name} has no shape yet; run the network on an input first, so that its lazy layers get theirs."
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is {tensor.layout}, a state dict holds dense tensors; call its to_dense() first.")
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), kind, row_axis)


def state_dict_specs(
    tensors: Mapping[str, torch.Tensor], types: Mapping | None = None
) -> tuple[list[TensorSpec], dict]:
    """Specs of a state dict, and its ties: names whose tensor is the very same piece of memory as an earlier one.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): the state dict.
        types (`Mapping`, *optional*): name to (kind, row axis), where more than the shape is known.
    """
    specs, ties, seen = [], {}, {}
    for name, tensor in tensors.items():
        spec = _spec(name, tensor, *(types or {}).get(name, ()))
        # neighbours in one flat buffer differ in their address; tensors without memory (meta) are told apart by identity
        if tensor.numel() and tensor.device.type != "meta":
            key = (tensor.device, tensor.data_ptr(), spec.shape, tensor.stride(), tensor.dtype)
            key = (*key, tensor.is_conj(), tensor.is_neg())
        else:
            key = id(tensor)
        if key in seen:
            ties[name] = seen[key]
        else:
            seen[key] = name
            specs.append(spec)
    return _with_recurrent(specs), ties


def module_specs(module: nn.Module) -> tuple[list[TensorSpec], dict]:
    """As [`state_dict_specs`], with the layer kinds and row axes that the types of the modules tell."""
    types = {}
    children = dict(module.named_modules(remove_duplicate=False))
    for prefix, child in children.items():
        typed = child
        if isinstance(child, nn.utils.parametrize.ParametrizationList):  # `x.parametrizations.weight` belongs to `x`
            typed = children[prefix.rpartition(".")[0].rpartition(".")[0]]
        named = [
            *child.named_parameters(recurse=False, remove_duplicate=False),
            *child.named_buffers(recurse=False, remove_duplicate=False),
        ]
        vectors = {len(tensor) for _, tensor in named if _dim(tensor) == 1}
        for name, tensor in named:
            types[f"{prefix}.{name}" if prefix else name] = _module_type(typed, tensor, vectors)
    return state_dict_specs(module.state_dict(keep_vars=True), types)


def _dim(tensor: torch.Tensor) -> int:
    return 0 if isinstance(tensor, nn.parameter.UninitializedTensorMixin) else tensor.dim()


def _module_type(module: nn.Module, tensor: torch.Tensor, vectors: set[int]) -> tuple[str | None, int | None]:
    """Layer kind and row axis that a module's type implies for its tensor; None leaves them to the shapes.

    Args:
        module (`nn.Module`): that holds the tensor.
        tensor (`torch.Tensor`): a parameter or buffer of it.
        vectors (`set[int]`): lengths of the 1-d tensors that stand beside it.
    """
    dim = _dim(tensor)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # stored as (in, out / groups, ...): with groups, no axis holds the output channels
        return "conv", None if dim < 2 else 1 if module.groups == 1 else 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv", 0 if dim >= 2 else None
    if isinstance(module, nn.MultiheadAttention) and dim == 3:  # extra key and value: tokens, no matrices
        return "other", None
    if isinstance(module, (nn.Linear, nn.Bilinear, nn.MultiheadAttention)):
        return "linear", 0 if dim >= 2 else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers': a Linear stored as (in, out)
        return "linear", 1 if dim >= 2 else None
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return "norm", None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding", 0 if dim >= 2 else None
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent", 0 if dim >= 2 else None
    if dim < 2:
        return None, None  # scales, shifts and statistics of whatever it is: the shape says enough
    has_children = next(module.children(), None) is not None
    if has_children or dim > 2 or tensor.shape[0] not in vectors:
        return "other", None  # a loose parameter: class tokens, position tables
    return None, None  # a matrix with its bias, of a linear layer that torch does not know


def _with_recurrent(specs: list[TensorSpec]) -> list[TensorSpec]:
    """Mark the tables of LSTMs and GRUs, which their shapes give away where no module tells.

    All tensors of such a prefix are matrices of R rows and vectors of R, as many of each; half of the matrices (those of the
    hidden state) have R / 4 columns (LSTM) or R / 3 (GRU). Keras has one vector for two matrices.
    """
    groups: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.name.rpartition(".")[0], []).append(spec)
    found = {spec.name for members in groups.values() if _is_recurrent(members) for spec in members}
    return [spec._replace(kind="recurrent") if spec.name in found else spec for spec in specs]


def _is_recurrent(members: list[TensorSpec]) -> bool:
    matrices = [spec for spec in members if len(spec.shape) == 2]
    vectors = [spec for spec in members if len(spec.shape) == 1]
    if len(matrices) + len(vectors) != len(members) or any(spec.kind is not None for spec in members):
        return False
    rows = {spec.shape[spec.row_axis or 0] for spec in matrices} | {spec.shape[0] for spec in vectors}
    is_keras = any(spec.row_axis == 1 for spec in matrices)
    expected = 1 if is_keras else len(matrices)
    if (
        len(rows) != 1
        or 0 in rows
        or len(matrices) % 2
        or (is_keras and len(matrices) != 2)
        or len(vectors) != expected
    ):
        return False
    (size,) = rows
    columns = [spec.shape[1 - (spec.row_axis or 0)] for spec in matrices]
    return any(size == gates * hidden and 2 * columns.count(hidden) >= len(columns)
               for gates in (3, 4) for hidden in set(columns))  # fmt: skip


# ---------------------------------------------------------------------------------------------------- writing
class CheckpointWriter:
    """Writes tokens back into a safetensors file, window by window in any order; the reverse of [`CheckpointFiles`].

    The values go straight to their places in a file beside the target, so that memory holds a window and never the model. Only
    when every token has come, that file takes the target's name; if anything fails, it is removed.

    Args:
        path (`str` or `Path`): the file to write.
        layout ([`CheckpointLayout`]): what stands where, in which dtype.
        passthrough (`Mapping[str, torch.Tensor]`, *optional*): the tensors that are no floating point numbers.
        overwrite (`bool`): True replaces a file that is there.
        metadata (`Mapping[str, str]`, *optional*): more text for the file's header, beside `format` and the ties.

    Raises:
        ValueError: If the file is there, passthrough does not fit the layout, or safetensors cannot hold a tensor.
        OSError: If there is no room for the file; it is reserved before the first value.

    Example:
    ```python
    with CheckpointWriter("copy.safetensors", layout, passthrough) as writer:
        for window in tokenizer.iter_windows(path):
            writer.write(window["start"], window["token_values"])
    ```
    """

    def __init__(
        self,
        path: str | Path,
        layout: CheckpointLayout,
        passthrough: Mapping[str, torch.Tensor] | None = None,
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
    ):
        self.path, self.layout = Path(path), layout
        self._passthrough = dict(passthrough or {})
        _check_passthrough(layout, self._passthrough)
        if self.path.exists() and not overwrite:
            raise ValueError(f"{self.path} is there already; pass overwrite=True to replace it.")
        self._header, self._places = _make_header(layout, metadata or {})
        self._size = max([len(self._header), *(place.stop for place in self._places.values())])
        self._partial: Path | None = None
        self._raw: Any = None
        self._tables: dict[str, torch.Tensor] = {}
        self._covered: list[tuple[int, int]] = []  # token ranges, sorted, apart from each other

    def __enter__(self) -> "CheckpointWriter":
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")
        try:
            with self._partial.open("xb") as file:
                _reserve(file, self._size)
                file.seek(0)
                file.write(self._header)
            self._raw = np.memmap(self._partial, dtype=np.uint8, mode="r+")
            values = torch.from_numpy(self._raw)
            for name, place in self._places.items():
                raw = values[place.start : place.stop]
                if name in self._passthrough:
                    # a clone, since the strides of what has only one value may be anything
                    tensor = self._passthrough[name].detach().cpu().clone(memory_format=torch.contiguous_format)
                    raw.copy_(tensor.reshape(-1).view(torch.uint8))
                else:
                    tensor = self.layout.tensors[name]
                    # integers of the same width: the bits are what matters, and all of torch's indexing knows them
                    integers = raw.view(_INTEGERS[tensor.torch_dtype.to_real().itemsize]).view(tensor.real_shape)
                    self._tables[name] = integers.movedim(tensor.row_axis, 0) if tensor.real_shape else integers[None]
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, start: int, token_values: torch.Tensor) -> None:
        """Put tokens into their places; tokens may come twice, the last ones stay.

        Args:
            start (`int`): position of the first token in the sequence.
            token_values (`torch.Tensor` of shape `(tokens, token_size)` or `(1, tokens, token_size)`): values as stored, not
                normalised. What stands on padding is ignored.

        Raises:
            ValueError: If the tokens do not fit the sequence, or float64 tensors come as anything less.
        """
        if self._raw is None:
            raise ValueError("the writer is not open; use it in a with statement.")
        values = token_values.detach()
        values = values[0] if values.dim() == 3 and len(values) == 1 else values
        if values.dim() != 2 or values.shape[1] != self.layout.token_size:
            raise ValueError(
                f"token_values has shape {tuple(token_values.shape)}, expected (tokens, {self.layout.token_size})."
            )
        stop = start + len(values)
        if start < 0 or stop > self.layout.num_tokens:
            raise ValueError(
                f"tokens {start} to {stop} do not stand in a sequence of {self.layout.num_tokens} tokens."
            )
        values = values.cpu().contiguous()
        for _, layer, first, end in self.layout.layers_between(start, stop):
            place = layer.first_token + first - start
            for piece in layer.pieces(values[place : place + end - first], first):
                for tensor, columns in piece.tensors(layer.tensors):
                    self._write_block(tensor, piece.start, columns[0] - tensor.column, piece.columns(columns))
        self._covered = _joined([*self._covered, (start, stop)])

    def _write_block(self, tensor: TensorLayout, row: int, column: int, block: torch.Tensor) -> None:
        """Values `(..., rows, columns)` to their place in a tensor's table, which is never laid out as such."""
        dtype = tensor.torch_dtype.to_real()
        if dtype == torch.float64 and block.dtype != torch.float64:
            raise ValueError(
                f"{tensor.name} is {tensor.dtype}; {block.dtype} tokens would round it. Write float64 tokens."
            )
        stored = torch.empty(block.shape, dtype=dtype)
        copy_exactly(stored, block)
        bits = stored.view(_INTEGERS[dtype.itemsize]).flatten(0, -2)  # (rows, columns)
        target = self._tables[tensor.name][row : row + len(bits)]  # (rows, *rest)
        if bits.shape[1] == tensor.columns:
            target.copy_(bits.view(target.shape))
        elif target.dim() == 2:
            target[:, column : column + bits.shape[1]] = bits
        else:  # a part of a single row that has several axes
            places = torch.arange(column, column + bits.shape[1])
            target[0][torch.unravel_index(places, target.shape[1:])] = bits[0]

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._check_complete()
                self._raw.flush()
                self._close()
                self._partial.replace(self.path)
        finally:
            self._discard()

    def _check_complete(self) -> None:
        edges = [0, *(edge for span in self._covered for edge in span), self.layout.num_tokens]
        missing = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        if missing:
            ranges = ", ".join(f"{a} to {b - 1}" for a, b in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(f"{self.path} is not written: of {self.layout.num_tokens} tokens, {ranges} never came.")

    def _close(self) -> None:
        self._tables, self._raw = {}, None  # the mapping goes with the last of its views

    def _discard(self) -> None:
        self._close()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)


def _check_passthrough(layout: CheckpointLayout, passthrough: Mapping[str, torch.Tensor]) -> None:
    expected = {spec.name: spec for spec in layout.passthrough}
    for name in [*expected, *passthrough]:
        if name not in passthrough:
            raise ValueError(
                f"{name} is not in the tokens (it holds no floating point numbers); give it as passthrough."
            )
        if name not in expected:
            raise ValueError(f"{name} is given as passthrough, the layout has no such tensor beside its tokens.")
        found = _spec(name, passthrough[name])
        if found[:3] != expected[name][:3]:
            raise ValueError(
                f"{name} is {found.dtype} of shape {found.shape}, the layout expects {expected[name].dtype} of shape "
                f"{tuple(expected[name].shape)}."
            )


def _make_header(layout: CheckpointLayout, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, _Place]]:
    """The first bytes of the file, and where each tensor will stand: wide dtypes first, so that all are aligned."""
    texts = {"format": "pt"}
    for name, value in [*metadata.items(), *layout.ties.items()]:
        if name in texts:
            raise ValueError(f"the header cannot hold {name!r} twice; rename it in metadata.")
        if name in metadata and value in layout.order:
            raise ValueError(f"metadata {name!r} is the name of a tensor, {value!r}; readers would take it for a tie.")
        texts[name] = value
    places = []
    specs: Iterable = [*layout.tensors.values(), *layout.passthrough]
    for spec in specs:
        if spec.dtype not in _SAFETENSORS_NAMES or spec.name == "__metadata__":
            raise ValueError(f"{spec.name} is {spec.dtype}, which a safetensors file cannot hold.")
        places.append((getattr(torch, spec.dtype).itemsize, spec))
    header: dict[str, Any] = {"__metadata__": texts}
    relative, end = {}, 0
    for size, spec in sorted(places, key=lambda pair: -pair[0]):
        shape = list(spec.shape)
        start, end = end, end + math.prod(shape) * size
        stored = [*shape[:-1], shape[-1] * 2] if spec.dtype == _PACKED else shape
        header[spec.name] = {"dtype": _SAFETENSORS_NAMES[spec.dtype], "shape": stored, "data_offsets": [start, end]}
        relative[spec.name] = _Place(start, end, spec.dtype, tuple(shape))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    moved = {n: p._replace(start=p.start + first, stop=p.stop + first) for n, p in relative.items()}
    return struct.pack("<Q", len(text)) + text, moved


def _reserve(file: Any, size: int) -> None:
    """Claim the room for a file: a mapped write to a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, 2**24):
        file.write(bytes(min(2**24, size - start)))


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that touch or overlap as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
