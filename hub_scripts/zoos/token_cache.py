"""Tokens of a split in one memory-mapped file, made once and shared by all processes that train on it.

Any number of processes, of one run or of several, fill the file together without talking to each other: the rows of one parquet
file are read by the process that holds its lock, a mark says that they are done, and whoever finds all marks gives the file its
name. A process that is killed loses the rows of one parquet file.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from hub_scripts.outputs import cache_folder, read_json, write_json
from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import CheckpointLayout, merge_moments, moments_of
from tokenization_sane.layout_sane import as_real

# NumPy has no bfloat16, so its bits stand in the file as whole numbers
STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}
BYTES_AT_ONCE = 64_000_000


class TokenCache:
    """Raw tokens of the checkpoints of a split that have one layout; raw, so that they serve every tokenizer.

    Args:
        raw (`np.ndarray` of shape `(checkpoints, tokens, token_size)`): float32, or uint16 that holds the bits of bfloat16.
        layout ([`CheckpointLayout`]): what stands where.
        moments (`dict[str, torch.Tensor]`): by tensor, count, mean and sum of squared deviations of all its values.
    """

    def __init__(self, raw: np.ndarray, layout: CheckpointLayout, moments: dict[str, torch.Tensor] | None = None):
        self.layout, self.moments = layout, moments or {}
        self._raw = raw
        self._file = _RandomFile(raw) if isinstance(raw, np.memmap) and hasattr(os, "preadv") else None
        # a plain view of the file: every slice of a np.memmap makes a new one, which takes microseconds
        self._flat = np.asarray(raw).reshape(len(raw), -1)

    def __len__(self) -> int:
        return len(self._flat)

    def window(self, row: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start:stop` of a checkpoint: float32 `(stop - start, token_size)`, a copy."""
        size = self.layout.token_size
        values = self._flat[row, start * size : stop * size]
        return _as_float(self._file.read(values) if self._file else values.copy()).reshape(stop - start, size)

    def take(self, row: int, places: np.ndarray) -> np.ndarray:
        """Values at some places of a checkpoint's flattened tokens: float32, of the shape of `places`."""
        return _as_float(self._flat[row].take(places))

    def tokens(self, rows: np.ndarray | slice) -> torch.Tensor:
        """All tokens of some checkpoints: float32 `(checkpoints, tokens, token_size)`."""
        return torch.from_numpy(_as_float(np.array(self._raw[rows])))

    def __getstate__(self) -> dict:
        if not isinstance(self._raw, np.memmap):
            return self.__dict__
        # workers open the file themselves
        return {"file": self._raw.filename, "layout": self.layout, "moments": self.moments}

    def __setstate__(self, state: dict) -> None:
        if "file" not in state:
            self.__dict__.update(state)
        else:
            self.__init__(np.load(state["file"], mmap_mode="r"), state["layout"], state["moments"])


def token_cache(
    zoo: Zoo,
    split: str,
    token_size: int,
    packing: str,
    dtype: str = "float32",
    rank: int = 0,
    world_size: int = 1,
) -> TokenCache:
    """The tokens of a split; reads the zoo if they are not in the cache yet.

    Args:
        zoo ([`Zoo`]): of one layout.
        split (`str`): which rows.
        token_size (`int`): values in a token.
        packing (`str`): how the layout is cut into tokens.
        dtype (`str`): `"float32"`, or `"bfloat16"` for half the space and three digits.
        rank (`int`): this process.
        world_size (`int`): how many there are; each begins with its own share of the files.

    Raises:
        ValueError: If a row is damaged, not finite or does not fit the layout; the row is named.
    """
    if dtype not in STORED:
        raise ValueError(f"tokens cannot be kept as {dtype!r}, expected {' or '.join(STORED)}.")
    layout = zoo.layout.repack(token_size, packing)
    folder = _folder(zoo, split, layout, dtype)
    path = folder / f"{split}.npy"
    if not path.is_file():
        _fill(zoo, split, layout, path, dtype, rank, world_size)
    moments = read_json(folder / f"{split}.json")
    raw = np.load(path, mmap_mode="r")
    expected = (len(zoo.rows(split)), layout.num_tokens, layout.token_size)
    if raw.shape != expected:
        raise ValueError(f"{path} holds tokens of shape {raw.shape}, expected {expected}. Remove {folder}.")
    return TokenCache(raw, layout, {k: torch.tensor(v, dtype=torch.float64) for k, v in moments.items()})


def _folder(zoo: Zoo, split: str, layout: CheckpointLayout, dtype: str) -> Path:
    """Where the tokens are kept, by what they depend on."""
    numbers = hashlib.sha256(np.ascontiguousarray(zoo.row_numbers[split]).tobytes()).hexdigest()
    key = json.dumps([zoo.source.identity, split, numbers, layout.to_json(), dtype])
    return cache_folder("tokens") / hashlib.sha256(key.encode()).hexdigest()[:16]


def _fill(zoo: Zoo, split: str, layout: CheckpointLayout, path: Path, dtype: str, rank: int, world_size: int) -> None:
    folder, partial = path.parent, path.with_suffix(".partial.npy")
    folder.mkdir(parents=True, exist_ok=True)
    files = len(zoo.files[split].files)
    marks = [folder / f"{split}.{number:05d}.json" for number in range(files)]
    with FileLock(folder / f"{split}.lock"):
        if not path.exists() and not partial.exists():
            new = path.with_suffix(".new.npy")
            shape = (len(zoo.rows(split)), layout.num_tokens, layout.token_size)
            np.lib.format.open_memmap(new, "w+", STORED[dtype], shape).flush()
            new.rename(partial)
    # its own files first, then those that nobody has begun
    order = sorted(range(files), key=lambda number: (number % world_size != rank, number))
    for number in tqdm(order, desc=f"tokenize {split}", unit="file", leave=False, disable=rank > 0):
        with FileLock(folder / f"{split}.{number:05d}.lock"):
            if not marks[number].exists() and not path.exists():
                write_json(marks[number], _fill_file(zoo, split, number, layout, partial))
    with FileLock(folder / f"{split}.lock"):
        if not path.exists():
            moments: dict[str, torch.Tensor] = {}
            for mark in marks:
                for name, values in read_json(mark).items():
                    moments[name] = merge_moments(moments.get(name), torch.tensor(values, dtype=torch.float64))
            write_json(folder / f"{split}.json", moments)
            partial.rename(path)
            for mark in marks:
                mark.unlink()


def _fill_file(zoo: Zoo, split: str, number: int, layout: CheckpointLayout, path: Path) -> dict[str, torch.Tensor]:
    """Write the rows of one parquet file; gives the moments of their tensors."""
    tokens = np.load(path, mmap_mode="r+")
    at_once = max(1, BYTES_AT_ONCE // (4 * layout.num_tokens * layout.token_size))
    moments: dict[str, torch.Tensor] = {}
    rows: list[int] = []
    state_dicts: list[dict[str, torch.Tensor]] = []

    def write() -> None:
        stacked = {name: torch.stack([one[name] for one in state_dicts]) for name in layout.tensors}
        tokens[rows] = _stored(layout.pack(stacked), tokens.dtype)
        for name, tensor in stacked.items():
            moments[name] = merge_moments(moments.get(name), moments_of(as_real(tensor).double()))
        rows.clear()
        state_dicts.clear()

    for row, state_dict in zoo.read_file(split, number):
        rows.append(row)
        state_dicts.append(state_dict)
        if len(rows) == at_once:
            write()
    if rows:
        write()
    tokens.flush()
    return moments


def _stored(tokens: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    if dtype == STORED["float32"]:
        return tokens.numpy()
    return tokens.to(torch.bfloat16).view(torch.uint16).numpy()


class _RandomFile:
    """Reads what is asked for and nothing around it.

    Through the memory map, the first touch of a page makes the system read megabytes ahead, which is waste where the next window
    is another one's. Permuted views touch all of a layer, so they are read through the map.

    Args:
        mapped (`np.memmap`): the file.
    """

    def __init__(self, mapped: np.memmap):
        self._handle = os.open(mapped.filename, os.O_RDONLY)
        self._start = mapped.offset - mapped.ctypes.data  # from an address in the map to a place in the file
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, mapped: np.ndarray) -> np.ndarray:
        """A copy of a contiguous piece of the map."""
        values = np.empty(mapped.shape, mapped.dtype)
        place, view = self._start + mapped.ctypes.data, memoryview(values).cast("B")
        while view:
            count = os.preadv(self._handle, [view], place)
            if not count:
                raise ValueError("the token cache was cut while it was in use; remove it and start again.")
            view, place = view[count:], place + count
        return values

    def __del__(self):
        os.close(self._handle)


def _as_float(values: np.ndarray) -> np.ndarray:
    """Stored values as float32."""
    if values.dtype == STORED["float32"]:
        return values
    # the bits of a bfloat16 are the upper half of a float32's
    return (values.astype(np.uint32) << 16).view(np.float32)
