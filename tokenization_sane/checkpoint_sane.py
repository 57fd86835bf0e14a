"""Checkpoints of any format to read from, headers first and values on demand.

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
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .layout_sane import TensorLayout, TensorSpec, check_name
from .safetensors_sane import Place, first_line, header_length, parse_header, reason, without_duplicates
from .specs_sane import module_specs, state_dict_specs, with_recurrent

try:
    import h5py
except ImportError:  # only readers of Keras files need it
    h5py = None

SAFETENSORS_NAME = "model.safetensors"
SAFETENSORS_INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
KERAS_SUFFIXES = (".h5", ".hdf5")
FIRST_REQUEST_BYTES = 100_000  # most headers on the Hub are shorter, so that one request is enough

_NUMPY_DTYPES = {
    "float64", "float32", "float16", "complex64", "complex128", "bool",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
}  # fmt: skip


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
            self.specs.sort(key=lambda spec: natural_key(spec.name))
        self.specs = with_recurrent(self.specs)

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


def natural_key(name: Any) -> list:
    """Sort key that puts layer2 before layer10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", str(name))]


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
                f"{first_line(error)}"
            ) from error
        except (HTTPError, OfflineModeIsEnabled, OSError) as error:
            try:
                self._cached = Path(snapshot_download(self.repo_id, revision=revision or None, local_files_only=True))
            except (OSError, ValueError):
                raise ValueError(
                    f"{source} is no file or folder here, the Hub cannot be reached ({first_line(error)}), and it is "
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
            raise ValueError(pickle_refused(f"{self.where}/{name}"))
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


def _open_folder(folder: Any, allow_pickle: bool, index: str | None = None) -> tuple[list, list[str]]:
    names = folder.names
    if index is None:
        index, files = _choose_files(names, folder.where)
    if index is None:
        return [folder.open(name, allow_pickle) for name in files], _weight_files(names, files)
    if index.endswith(".bin.index.json") and not allow_pickle:
        raise ValueError(pickle_refused(f"the files of {folder.path(index)}", plural=True))
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
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
        weight_map = dict(content["weight_map"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no index of shards: {reason(error)}.") from error
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
            length = header_length(file.read(8), self._size, self.where)
            self._parse(file.read(length))

    def _parse(self, header: bytes) -> None:
        self._places, metadata = parse_header(header, self._size, self.where)
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
        length = header_length(head[:8], self._size, self.where)
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
        self._places: dict[str, Place] = {}
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
        self._places[name] = Place(start, stop, dtype_name, shape, is_fortran, is_swapped)

    def _header(self, name: str, file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"it has format {version}, expected (1, 0) or (2, 0)")
            shape, is_fortran, dtype = readers[version](file)
        except (ValueError, TypeError, SyntaxError) as error:
            raise ValueError(f"{self.where}: {name} is no NumPy array: {reason(error)}.") from error
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
            raise ValueError(f"{path} is a damaged HDF5 file: {reason(error)}.") from error
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
            raise ValueError(f"{self.where}: {name} is damaged: {reason(error)}.") from error
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
            raise ValueError(pickle_refused(path))
        self.where = str(path)
        self.ignored: dict[str, str] = {}
        try:
            # older files are no zip archives and cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # unpickling what is damaged can raise anything
            raise ValueError(f"{path} cannot be read with weights_only=True: {first_line(error)}") from error
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


def pickle_refused(what: Any, plural: bool = False) -> str:
    """Why a pickle is not opened, and what to do."""
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
