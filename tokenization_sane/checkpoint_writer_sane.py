"""The reverse of reading: windows of tokens in any order become a safetensors file, which is whole or not there."""

import json
import math
import os
import secrets
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .layout_sane import CheckpointLayout, TensorLayout, copy_exactly
from .safetensors_sane import DTYPE_NAMES, INTEGERS, PACKED, Place
from .specs_sane import tensor_spec


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
                    integers = raw.view(INTEGERS[tensor.torch_dtype.to_real().itemsize]).view(tensor.real_shape)
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
        bits = stored.view(INTEGERS[dtype.itemsize]).flatten(0, -2)  # (rows, columns)
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
        found = tensor_spec(name, passthrough[name])
        if found[:3] != expected[name][:3]:
            raise ValueError(
                f"{name} is {found.dtype} of shape {found.shape}, the layout expects {expected[name].dtype} of shape "
                f"{tuple(expected[name].shape)}."
            )


def _make_header(layout: CheckpointLayout, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Place]]:
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
        if spec.dtype not in DTYPE_NAMES or spec.name == "__metadata__":
            raise ValueError(f"{spec.name} is {spec.dtype}, which a safetensors file cannot hold.")
        places.append((getattr(torch, spec.dtype).itemsize, spec))
    header: dict[str, Any] = {"__metadata__": texts}
    relative, end = {}, 0
    for size, spec in sorted(places, key=lambda pair: -pair[0]):
        shape = list(spec.shape)
        start, end = end, end + math.prod(shape) * size
        stored = [*shape[:-1], shape[-1] * 2] if spec.dtype == PACKED else shape
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": stored, "data_offsets": [start, end]}
        relative[spec.name] = Place(start, end, spec.dtype, tuple(shape))
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
