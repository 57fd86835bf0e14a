"""What stands where: the correspondence between the tensors of a checkpoint and a sequence of weight tokens.

A layer is a table of `rows` (output channels) by `columns` (the weights that feed one channel). Every floating tensor of a
checkpoint is a block of columns of exactly one such table, whatever its name. The vectors of a module (scale, shift and running
statistics of a norm; the bias of a convolution) are the columns of a table of their own. The tables are cut into tokens:

* `dense`: a row wider than a token is cut into ⌈columns / token_size⌉ tokens; of narrower rows, ⌊token_size / columns⌋ whole
  rows share a token. A row that fits is never split.
* `flat`: the rows of a layer are laid end to end across token borders; only the last token of a layer has padding.
* `paper`: as in Schürholt et al., "Towards Scalable and Versatile Weight Space Learning" (ICML 2024), arXiv 2406.09997: each row
  starts a new token, the bias is the last column of its matrix, and running statistics have tables of their own.

Why biases stand apart in `dense` and `flat`: among the weights they drown. On a zoo of small CNNs, statistics of the tokens of
each layer then predict a network's accuracy far better than with the bias as a last column.

A layout holds names, shapes and dtypes only; it is made without reading a weight.
"""

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

LAYER_KINDS = ("conv", "linear", "norm", "embedding", "recurrent", "other")
PACKINGS = ("dense", "flat", "paper")
LAYOUT_FORMAT = 1
MAX_VALUES = 2**48  # a thousand times the largest network; sums and products of positions stay far inside int64
MAX_AXES = 64  # as many as torch's own operations take


class TensorSpec(NamedTuple):
    """What a checkpoint's header says of one tensor and, where the module is at hand, what its type adds.

    Args:
        name (`str`): key in the state dict.
        shape (`tuple[int, ...]`): shape as stored.
        dtype (`str`): torch dtype without the prefix, e.g. `"bfloat16"`.
        kind (`str`, *optional*): one of `LAYER_KINDS`; `None` lets the shape decide.
        row_axis (`int`, *optional*): axis of the output channels; `None` lets the shape decide.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str | None = None
    row_axis: int | None = None


@dataclass(frozen=True)
class TensorLayout:
    """One tensor as a block of columns in the table of its layer.

    Args:
        name (`str`): key in the state dict.
        shape (`tuple[int, ...]`): shape as stored.
        dtype (`str`): torch dtype without the prefix.
        row_axis (`int`): the axis that gives the rows of the table (0 for 0-d tensors).
        column (`int`): first column of the block.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    row_axis: int = 0
    column: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype as stored."""
        return getattr(torch, self.dtype)

    @property
    def real_shape(self) -> tuple[int, ...]:
        """Shape of the real numbers that are stored: complex numbers get a last axis of 2."""
        return (*self.shape, 2) if self.torch_dtype.is_complex else self.shape

    @property
    def numel(self) -> int:
        """Number of real values."""
        return math.prod(self.real_shape)

    @property
    def rows(self) -> int:
        """Size of the row axis; 1 for a 0-d tensor."""
        return self.real_shape[self.row_axis] if self.real_shape else 1

    @property
    def columns(self) -> int:
        """Real values of one row."""
        return self.numel // self.rows if self.rows else 0

    @property
    def rest(self) -> tuple[int, ...]:
        """Sizes of the axes that give the columns, in order."""
        return self.real_shape[: self.row_axis] + self.real_shape[self.row_axis + 1 :]

    def to_table(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lay out `(..., *real_shape)` as `(..., rows, columns)`. A part of the rows may be given instead of all."""
        axes = len(self.real_shape)
        if axes < 2:
            return tensor.reshape(*tensor.shape[: tensor.dim() - axes], -1, 1)
        first = tensor.dim() - axes
        return tensor.movedim(first + self.row_axis, first).flatten(first + 1)

    def from_table(self, table: torch.Tensor) -> torch.Tensor:
        """Undo [`~TensorLayout.to_table`]: `(..., rows, columns)` to `(..., *real_shape)`."""
        first = table.dim() - 2
        if not self.real_shape:
            return table.reshape(table.shape[:first])
        return table.reshape(*table.shape[: first + 1], *self.rest).movedim(first, first + self.row_axis)

    def read(self, take: Callable, start: int, stop: int, columns: tuple[int, int] | None = None) -> torch.Tensor:
        """A part of the table, taken as rectangles out of the tensor as stored; nothing is taken twice or for naught.

        Args:
            take (`Callable`): gives the piece of the tensor that a tuple of slices cuts out, such as `tensor.__getitem__`.
            start (`int`): first row.
            stop (`int`): end row, not included.
            columns (`tuple[int, int]`, *optional*): first and end column; all by default.

        Returns:
            `torch.Tensor`: real numbers, `real_shape` with the row axis cut (a view if `take` gives one), or `(rows, columns)` if
            columns are given.
        """
        if columns is None:
            piece = as_real(take((slice(None),) * self.row_axis + (slice(start, stop),) if self.shape else ()))
            return (
                piece[start:stop] if self.real_shape and not self.shape else piece
            )  # the parts of a 0-d complex number
        sizes = self.shape[: self.row_axis] + self.shape[self.row_axis + 1 :]
        width = 2 if self.torch_dtype.is_complex else 1  # columns that stand in one stored value
        low, high = columns[0] // width, -(-columns[1] // width)
        parts = []
        for box in _boxes(sizes, low, high):
            index = (*box[: self.row_axis], slice(start, stop), *box[self.row_axis :]) if self.shape else ()
            parts.append(self.to_table(as_real(take(index))))
        return torch.cat(parts, 1)[:, columns[0] - low * width : columns[1] - low * width]

    def chunks(self, size: int) -> Iterator[tuple[int, int, tuple[int, int] | None]]:
        """The table in parts of at most `size` values, as arguments of [`~TensorLayout.read`]: whole rows, or parts of one."""
        width = self.columns
        if 0 < width <= size:
            step = size // width
            yield from ((start, min(start + step, self.rows), None) for start in range(0, self.rows, step))
        elif width:
            for row in range(self.rows):
                yield from ((row, row + 1, (first, min(first + size, width))) for first in range(0, width, size))


def _boxes(sizes: tuple[int, ...], first: int, end: int) -> Iterator[tuple[slice, ...]]:
    """Slices of axes of these sizes that together cut out their values `first:end`, counted row by row, in order."""
    if not sizes:
        yield ()
        return
    inner = math.prod(sizes[1:])
    (low, begin), (high, rest) = divmod(first, inner), divmod(end, inner)
    if low == high:
        yield from ((slice(low, low + 1), *box) for box in _boxes(sizes[1:], begin, rest))
        return
    if begin:
        yield from ((slice(low, low + 1), *box) for box in _boxes(sizes[1:], begin, inner))
        low += 1
    if low < high:
        yield (slice(low, high), *(slice(None) for _ in sizes[1:]))
    if rest:
        yield from ((slice(high, high + 1), *box) for box in _boxes(sizes[1:], 0, rest))


@dataclass(frozen=True)
class LayerLayout:
    """The table of one layer and the tokens that it is cut into.

    Args:
        name (`str`): prefix that its tensors share, or the name of its only tensor.
        kind (`str`): one of `LAYER_KINDS`.
        rows (`int`), columns (`int`): size of the table.
        tensors (`tuple[TensorLayout, ...]`): its blocks of columns, in order.
        token_size (`int`), packing (`str`): how it is cut.
        first_token (`int`): position of its first token in the sequence.
    """

    name: str
    kind: str
    rows: int
    columns: int
    tensors: tuple[TensorLayout, ...]
    token_size: int
    packing: str
    first_token: int = 0

    @property
    def rows_per_token(self) -> int:
        """Whole rows that share one token (`dense`, narrow rows), else 1."""
        return max(1, self.token_size // max(1, self.columns)) if self.packing == "dense" else 1

    @property
    def tokens_per_row(self) -> int:
        """Tokens that one row is cut into; has no meaning for `flat`."""
        return -(-self.columns // self.token_size)

    @property
    def num_tokens(self) -> int:
        """Tokens that the table is cut into."""
        if self.packing == "flat":
            return -(-self.rows * self.columns // self.token_size)
        return -(-self.rows // self.rows_per_token) * self.tokens_per_row

    @property
    def numel(self) -> int:
        """Number of real values, padding not counted."""
        return self.rows * self.columns

    @property
    def row_stride(self) -> int:
        """Values from the begin of one row to the begin of the next, where a row does not share its token."""
        return self.columns if self.packing == "flat" else self.tokens_per_row * self.token_size

    def row_offsets(self) -> torch.Tensor:
        """Where each row begins in the flattened tokens of the whole sequence: `(rows,)` int64."""
        row = torch.arange(self.rows)
        first = self.first_token * self.token_size
        if self.packing == "flat" or self.rows_per_token == 1:
            return first + row * self.row_stride
        token, place = row // self.rows_per_token, row % self.rows_per_token
        return first + token * self.token_size + place * self.columns

    def first_rows(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The first row that stands in each of the layer's tokens `start:stop`: `(tokens,)` int64, the channel index `k`."""
        token = torch.arange(start, self.num_tokens if stop is None else stop)
        if self.packing == "flat":
            return (token * self.token_size).div_(self.columns, rounding_mode="floor")
        if self.rows_per_token > 1:
            return token * self.rows_per_token
        return token if self.tokens_per_row == 1 else token // self.tokens_per_row

    def pieces(self, tokens: torch.Tensor, start: int = 0) -> list["Piece"]:
        """Some of the layer's tokens as views of rectangles of the table.

        Args:
            tokens (`torch.Tensor` of shape `(..., tokens, token_size)`): tokens of this layer, contiguous in the last two axes.
            start (`int`): the first of them, counted from the layer's first token.

        Returns:
            `list[Piece]`: together every value that stands in these tokens once. Whole rows make one rectangle, or two if rows
            share tokens and the last token holds fewer; a window that begins or ends inside a row has one more at that side.
        """
        count = tokens.shape[-2]
        if not count or not self.numel:
            return []
        share = self.rows_per_token
        if share > 1:
            first, end = start * share, min(self.rows, (start + count) * share)
            full, rest = divmod(end - first, share)
            shared = tokens[..., : share * self.columns].unflatten(-1, (share, self.columns))
            middle = first + full * share
            pieces = [Piece(first, middle, 0, self.columns, shared[..., :full, :, :])] if full else []
            return [*pieces, Piece(middle, end, 0, self.columns, shared[..., full, :rest, :])] if rest else pieces
        stride, begin, values = self.row_stride, start * self.token_size, tokens.flatten(-2)
        end = min(begin + count * self.token_size, (self.rows - 1) * stride + self.columns)
        first, last = begin // stride, (end - 1) // stride
        first_column, end_column = begin - first * stride, min(self.columns, end - last * stride)

        def part_of_row(row: int, low: int, high: int) -> Piece:
            place = row * stride + low - begin
            return Piece(row, row + 1, low, high, values[..., None, place : place + high - low])

        if first == last and (first_column or end_column < self.columns):
            return [part_of_row(first, first_column, end_column)]
        pieces = []
        if first_column:
            pieces.append(part_of_row(first, first_column, self.columns))
            first += 1
        if end_column == self.columns:
            last += 1
        if first < last:
            place = first * stride - begin
            rows = values[..., place : place + (last - first) * stride].unflatten(-1, (last - first, stride))
            pieces.append(Piece(first, last, 0, self.columns, rows[..., : self.columns]))
        if end_column < self.columns:
            pieces.append(part_of_row(last, 0, end_column))
        return pieces

    def padding(self, tokens: torch.Tensor, start: int = 0) -> list[torch.Tensor]:
        """Views of what [`~LayerLayout.pieces`] leaves out of these tokens."""
        count = tokens.shape[-2]
        if not count or not self.numel:
            return []
        size, share, last = self.token_size, self.rows_per_token, start + count == self.num_tokens
        if self.packing == "flat":
            used = self.numel - (self.num_tokens - 1) * size
            return [tokens[..., -1:, used:]] if last and used < size else []
        if share > 1:
            views = [tokens[..., share * self.columns :]] if share * self.columns < size else []
            rest = self.rows % share
            return [*views, tokens[..., -1:, rest * self.columns : share * self.columns]] if last and rest else views
        used = self.columns - (self.tokens_per_row - 1) * size
        first = (self.tokens_per_row - 1 - start) % self.tokens_per_row  # the token that ends a row
        return [tokens[..., first :: self.tokens_per_row, used:]] if used < size and first < count else []

    def fill(self, tokens: torch.Tensor, values: Mapping[str, float], start: int = 0) -> None:
        """Set every value of these tokens to the number of the tensor that it belongs to."""
        for piece in self.pieces(tokens, start):
            for tensor, columns in piece.tensors(self.tensors):
                piece.columns(columns).fill_(values[tensor.name])

    def read_into(self, tokens: torch.Tensor, read: Callable, start: int = 0) -> None:
        """Copy what stands in some of the layer's tokens into them; padding is left as it is.

        Args:
            tokens (`torch.Tensor` of shape `(..., tokens, token_size)`): contiguous in the last two axes.
            read (`Callable`): `read(tensor_layout, first_row, end_row, columns=None)`, as [`~TensorLayout.read`] gives it.
            start (`int`): the first of the tokens, counted from the layer's first.
        """
        for piece in self.pieces(tokens, start):
            for tensor, columns in piece.tensors(self.tensors):
                target = piece.columns(columns)
                if columns[1] - columns[0] < tensor.columns:
                    part = (columns[0] - tensor.column, columns[1] - tensor.column)
                    copy_exactly(target, read(tensor, piece.start, piece.stop, part))
                else:
                    copy_exactly(*_meet(target, read(tensor, piece.start, piece.stop), tensor))

    def pack_into(self, tokens: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the layer's tensors, each `(..., *real_shape)`, into its tokens `(..., tokens, token_size)`; padding is left as it is."""
        for piece in self.pieces(tokens):
            for tensor, columns in piece.tensors(self.tensors):
                source = _rows(tensors[tensor.name], tensor, piece.start, piece.stop)
                copy_exactly(*_meet(piece.columns(columns), source, tensor))

    def unpack(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Undo [`~LayerLayout.pack_into`]: tokens `(..., tokens, token_size)` to tensors `(..., *real_shape)`."""
        batch = tokens.shape[:-2]
        if self.numel == 0:
            return {t.name: tokens.new_zeros(*batch, *t.real_shape) for t in self.tensors}
        pieces = self.pieces(tokens)
        tensors = {}
        for tensor in self.tensors:
            columns = (tensor.column, tensor.column + tensor.columns)
            parts = [piece.columns(columns).reshape(*batch, piece.stop - piece.start, -1) for piece in pieces]
            tensors[tensor.name] = tensor.from_table(parts[0] if len(parts) == 1 else torch.cat(parts, -2))
        return tensors

    def unpack_into(self, tokens: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the layer's tokens `(..., tokens, token_size)` into its tensors, each `(..., *real_shape)`, casting on the way."""
        for piece in self.pieces(tokens):
            for tensor, columns in piece.tensors(self.tensors):
                target = _rows(tensors[tensor.name], tensor, piece.start, piece.stop)
                source, target = _meet(piece.columns(columns), target, tensor)
                copy_exactly(target, source)


class Piece(NamedTuple):
    """A rectangle of a layer's table, as a view into tokens.

    Args:
        start (`int`), stop (`int`): its rows.
        first (`int`), end (`int`): its columns.
        view (`torch.Tensor`): `(..., rows, columns)`, or `(..., tokens, rows of one token, columns)` where rows share tokens.
    """

    start: int
    stop: int
    first: int
    end: int
    view: torch.Tensor

    def tensors(self, tensors: tuple[TensorLayout, ...]) -> Iterator[tuple[TensorLayout, tuple[int, int]]]:
        """The tensors that stand in the rectangle, each with its columns of the table there."""
        for tensor in tensors:
            low, high = max(self.first, tensor.column), min(self.end, tensor.column + tensor.columns)
            if low < high:
                yield tensor, (low, high)

    def columns(self, columns: tuple[int, int]) -> torch.Tensor:
        """The view, only these columns of the table."""
        return self.view[..., columns[0] - self.first : columns[1] - self.first]


def _rows(tensor: torch.Tensor, layout: TensorLayout, start: int, stop: int) -> torch.Tensor:
    """Rows of a tensor `(..., *real_shape)` as a view, the row axis cut."""
    if not layout.real_shape or (start, stop) == (0, layout.rows):
        return tensor
    return tensor.narrow(tensor.dim() - len(layout.real_shape) + layout.row_axis, start, stop - start)


def _meet(view: torch.Tensor, tensor: torch.Tensor, layout: TensorLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of one shape of columns of a piece `(..., [tokens,] rows, columns)` and of the rows `(..., *real_shape)` in it.

    Neither side is reshaped through a copy: each value is read once and written once.
    """
    lead = tensor.dim() - len(layout.real_shape)
    tensor = tensor.movedim(lead + layout.row_axis, lead) if layout.real_shape else tensor.unsqueeze(-1)
    if view.dim() - lead == 3:
        tensor = tensor.unflatten(lead, view.shape[lead : lead + 2])
    rest = layout.rest if layout.real_shape else ()
    return (view.unflatten(-1, rest) if rest else view.squeeze(-1)), tensor


@dataclass(frozen=True)
class CheckpointLayout:
    """Where each value of a checkpoint stands in its sequence of tokens.

    Args:
        layers (`tuple[LayerLayout, ...]`): the tables, in the order of the sequence.
        token_size (`int`): values in a token.
        packing (`str`): `"dense"`, `"flat"` or `"paper"`, see the module's docstring.
        passthrough (`tuple[TensorSpec, ...]`): tensors that are not floating point; they are kept beside the tokens.
        ties (`dict[str, str]`): names that share another tensor's storage, and that tensor's name.
        order (`tuple[str, ...]`): all names as the source had them.
    """

    layers: tuple[LayerLayout, ...]
    token_size: int
    packing: str
    passthrough: tuple[TensorSpec, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()

    # ------------------------------------------------------------------------------------------------ making
    @classmethod
    def build(
        cls,
        specs: Iterable[TensorSpec],
        token_size: int = 288,
        packing: str = "dense",
        ties: Mapping[str, str] | None = None,
        order: Iterable[str] | None = None,
    ) -> "CheckpointLayout":
        """Make the layout of a checkpoint from what its header says.

        Args:
            specs (`Iterable[TensorSpec]`): one a tensor, in the order of the sequence; tied names left out.
            token_size (`int`): values in a token.
            packing (`str`): one of `PACKINGS`.
            ties (`Mapping[str, str]`, *optional*): tied name to the name that is stored.
            order (`Iterable[str]`, *optional*): all names as the source has them; by default tied names come last.

        Raises:
            ValueError: If a name stands twice, or a shape, dtype or setting is impossible.
        """
        specs, ties = [*specs], dict(ties or {})
        _check_specs(specs, ties)
        values = [spec for spec in specs if _is_float(spec.dtype)]
        names = (*(spec.name for spec in specs), *ties) if order is None else tuple(order)
        passthrough = [TensorSpec(*spec[:3]) for spec in specs if not _is_float(spec.dtype)]
        return cls._cut(_tables(values, packing), token_size, packing, passthrough, ties, names)

    @classmethod
    def _cut(cls, tables, token_size, packing, passthrough, ties, order) -> "CheckpointLayout":
        """Number the layers and cut their tables, given as `(name, kind, tensors)`, into tokens."""
        if packing not in PACKINGS:
            raise ValueError(f"packing is {packing!r}, expected one of {', '.join(PACKINGS)}.")
        if isinstance(token_size, bool) or not isinstance(token_size, int) or token_size < 1:
            raise ValueError(f"token_size is {token_size!r}, expected a positive number of values.")
        layers, first = [], 0
        for name, kind, tensors in tables:
            column, placed = 0, []
            for tensor in tensors:
                placed.append(replace(tensor, column=column))
                column += tensor.columns
            layer = LayerLayout(name, kind, tensors[0].rows, column, tuple(placed), token_size, packing, first)
            layers.append(layer)
            first += layer.num_tokens
        if first * token_size > MAX_VALUES:
            raise ValueError(
                f"the checkpoint would take {first} tokens of {token_size} values; that is too many to number."
            )
        return cls(tuple(layers), token_size, packing, tuple(passthrough), ties, tuple(order))

    def repack(self, token_size: int | None = None, packing: str | None = None) -> "CheckpointLayout":
        """The same checkpoint cut into other tokens."""
        packing = packing or self.packing
        specs = {
            t.name: TensorSpec(t.name, t.shape, t.dtype, y.kind, t.row_axis) for y in self.layers for t in y.tensors
        }
        specs |= {spec.name: spec for spec in self.passthrough}
        ordered = [specs[name] for name in self.order if name in specs]
        return CheckpointLayout.build(ordered, token_size or self.token_size, packing, self.ties, self.order)

    # ------------------------------------------------------------------------------------------------ sizes
    @cached_property
    def tensors(self) -> dict[str, TensorLayout]:
        """All tokenised tensors by name."""
        return {tensor.name: tensor for layer in self.layers for tensor in layer.tensors}

    @cached_property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return sum(layer.num_tokens for layer in self.layers)

    @property
    def num_parameters(self) -> int:
        """Real values that the tokens hold: parameters and floating buffers, tied ones counted once."""
        return sum(layer.numel for layer in self.layers)

    @property
    def fill(self) -> float:
        """Share of the tokens' values that are real; 1.0 for an empty checkpoint."""
        return self.num_parameters / (self.num_tokens * self.token_size) if self.num_tokens else 1.0

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the set of tensors: names, shapes and ties; not their order, dtype, token size or packing."""
        shapes = {t.name: list(t.shape) for t in self.tensors.values()}
        shapes |= {spec.name: list(spec.shape) for spec in self.passthrough}
        text = json.dumps([shapes, dict(self.ties)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # ------------------------------------------------------------------------------------------------ per token
    @cached_property
    def layer_ids(self) -> torch.Tensor:
        """Index of the layer that each token belongs to: `(tokens,)` int64."""
        return torch.repeat_interleave(torch.tensor([layer.num_tokens for layer in self.layers], dtype=torch.int64))

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """Sequence index, layer index and channel index (first row) of each token: `(tokens, 3)` int64."""
        return self.window_positions(0, self.num_tokens)

    @cached_property
    def layer_kind_ids(self) -> torch.Tensor:
        """Index into `LAYER_KINDS` for each token: `(tokens,)` int64."""
        return self.window_kinds(0, self.num_tokens)

    @cached_property
    def value_mask(self) -> torch.Tensor:
        """`(tokens, token_size)` bool, True on real values, False on padding."""
        return self.window_mask(0, self.num_tokens)

    # ------------------------------------------------------------------------------------------------ per window
    @cached_property
    def _first_tokens(self) -> list[int]:
        return [layer.first_token for layer in self.layers]

    def layers_between(self, start: int, stop: int) -> Iterator[tuple[int, LayerLayout, int, int]]:
        """The layers that stand in tokens `start:stop`: index, layer, and its tokens there, counted from the layer's first."""
        place = max(0, bisect_right(self._first_tokens, start) - 1)
        while place < len(self.layers) and self.layers[place].first_token < stop:
            layer = self.layers[place]
            first, end = max(0, start - layer.first_token), min(layer.num_tokens, stop - layer.first_token)
            if first < end:
                yield place, layer, first, end
            place += 1

    def window_positions(self, start: int, stop: int) -> torch.Tensor:
        """[`~CheckpointLayout.position_ids`] of tokens `start:stop`, made for these alone: `(stop - start, 3)` int64."""
        positions = torch.empty(stop - start, 3, dtype=torch.int64)
        positions[:, 0] = torch.arange(start, stop)
        for number, layer, first, end in self.layers_between(start, stop):
            part = positions[layer.first_token + first - start : layer.first_token + end - start]
            part[:, 1] = number
            part[:, 2] = layer.first_rows(first, end)
        return positions

    def window_kinds(self, start: int, stop: int) -> torch.Tensor:
        """[`~CheckpointLayout.layer_kind_ids`] of tokens `start:stop`: `(stop - start,)` int64."""
        kinds = torch.empty(stop - start, dtype=torch.int64)
        for _, layer, first, end in self.layers_between(start, stop):
            kinds[layer.first_token + first - start : layer.first_token + end - start] = LAYER_KINDS.index(layer.kind)
        return kinds

    def window_mask(self, start: int, stop: int) -> torch.Tensor:
        """[`~CheckpointLayout.value_mask`] of tokens `start:stop`: `(stop - start, token_size)` bool."""
        mask = torch.ones(stop - start, self.token_size, dtype=torch.bool)
        for _, layer, first, end in self.layers_between(start, stop):
            part = mask[layer.first_token + first - start : layer.first_token + end - start]
            for view in layer.padding(part, first):
                view.fill_(False)
        return mask

    def window_values(
        self,
        values: Mapping[str, float],
        start: int,
        stop: int,
        dtype: torch.dtype = torch.float32,
        padding: float = 0.0,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """One number for each tensor, spread over its values in tokens `start:stop`: `(stop - start, token_size)`."""
        tokens = torch.full((stop - start, self.token_size), padding, dtype=dtype, device=device)
        for _, layer, first, end in self.layers_between(start, stop):
            part = tokens[layer.first_token + first - start : layer.first_token + end - start]
            layer.fill(part, values, first)
        return tokens

    def window(self, read: Callable, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Tokens `start:stop` of the sequence, reading only what stands in them, down to parts of a row.

        Args:
            read (`Callable`): `read(tensor_layout, first_row, end_row, columns=None)` gives these rows of a tensor with its row
                axis cut, or `(rows, columns)` of its table where `columns` is `(first, end)`; see [`~TensorLayout.read`].
            start (`int`): first token.
            stop (`int`): end token, not included.
            dtype (`torch.dtype`): dtype of the tokens.

        Returns:
            `torch.Tensor` of shape `(stop - start, token_size)`.
        """
        tokens = torch.empty(stop - start, self.token_size, dtype=dtype)
        for _, layer, first, end in self.layers_between(start, stop):
            part = tokens[layer.first_token + first - start : layer.first_token + end - start]
            layer.read_into(part, read, first)
            for view in layer.padding(part, first):
                view.zero_()
        return tokens

    def tokens_of(self, token_values: torch.Tensor, layer: LayerLayout) -> torch.Tensor:
        """The tokens of one layer out of `(..., tokens, token_size)`, as a view."""
        return token_values[..., layer.first_token : layer.first_token + layer.num_tokens, :]

    # ------------------------------------------------------------------------------------------------ values
    def pack(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Lay the tensors out as tokens.

        Args:
            tensors (`Mapping[str, torch.Tensor]`): each of shape `(..., *shape)` with the same leading dimensions.
            dtype (`torch.dtype`): dtype of the tokens.

        Returns:
            `torch.Tensor` of shape `(..., tokens, token_size)`, zeros where nothing stands.

        Raises:
            ValueError: If a tensor is missing, or has another shape than the layout says.
        """
        batch = self.check_tensors(tensors)
        device = next((tensors[name].device for name in self.tensors), None)
        real = {name: as_real(tensors[name]) for name in self.tensors}
        # zeros everywhere would be one more pass over the memory; padding is a small part of it
        token_values = torch.empty(*batch, self.num_tokens, self.token_size, dtype=dtype, device=device)
        for layer in self.layers:
            tokens = self.tokens_of(token_values, layer)
            layer.pack_into(tokens, real)
            for view in layer.padding(tokens):
                view.zero_()
        return token_values

    def unpack(self, token_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Undo [`~CheckpointLayout.pack`]; differentiable, dtype kept (complex tensors become complex again).

        Args:
            token_values (`torch.Tensor` of shape `(..., tokens, token_size)`): the tokens of one or many checkpoints.

        Returns:
            `dict[str, torch.Tensor]`: each tensor as `(..., *shape)`.

        Raises:
            ValueError: If the shape of the tokens is not the layout's.
        """
        self._check_tokens(token_values)
        tensors = {}
        for layer in self.layers:
            tensors |= layer.unpack(self.tokens_of(token_values, layer))
        complex_names = [name for name, tensor in self.tensors.items() if tensor.torch_dtype.is_complex]
        return tensors | {
            name: torch.view_as_complex(tensors[name].clone(memory_format=torch.contiguous_format))
            for name in complex_names
        }

    def restore(self, token_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """As [`~CheckpointLayout.unpack`], but each tensor in its dtype and in memory of its own; values are copied once.

        NaNs keep their sign and payload in every dtype that has such (see [`copy_exactly`]).
        """
        self._check_tokens(token_values)
        tokens = token_values.contiguous()
        batch = tokens.shape[:-2]
        real = {
            name: torch.empty((*batch, *tensor.real_shape), dtype=tensor.torch_dtype.to_real(), device=tokens.device)
            for name, tensor in self.tensors.items()
        }
        for layer in self.layers:
            layer.unpack_into(self.tokens_of(tokens, layer), real)
        return {n: torch.view_as_complex(t) if self.tensors[n].torch_dtype.is_complex else t for n, t in real.items()}

    def _check_tokens(self, token_values: torch.Tensor) -> None:
        if token_values.dim() < 2 or tuple(token_values.shape[-2:]) != (self.num_tokens, self.token_size):
            raise ValueError(
                f"token_values has shape {tuple(token_values.shape)}, the layout expects (..., {self.num_tokens}, "
                f"{self.token_size}). Cut padding tokens off with the attention mask, or use the layout the tokens were made with."
            )

    def check_tensors(self, tensors: Mapping[str, Any]) -> tuple[int, ...]:
        """Refuse tensors, or specs of tensors, that do not fit; gives the leading dimensions that they share.

        Raises:
            ValueError: If a tensor is missing, or has another shape than the layout says, or is complex where it should not be.
        """
        batch = None
        for name, layout in self.tensors.items():
            if name not in tensors:
                raise ValueError(f"{name} is missing, the layout expects it with shape {layout.shape}. {_REMEDY}")
            shape = tuple(tensors[name].shape)
            lead = len(shape) - len(layout.shape)
            if lead < 0 or shape[lead:] != layout.shape or (batch is not None and shape[:lead] != batch):
                expected = (*(batch or ()), *layout.shape)
                raise ValueError(f"{name} has shape {shape}, the layout expects {expected}. {_REMEDY}")
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            if dtype != layout.dtype and getattr(torch, dtype).is_complex != layout.torch_dtype.is_complex:
                raise ValueError(f"{name} is {tensors[name].dtype}, the layout expects {layout.dtype}. {_REMEDY}")
            batch = shape[:lead]
        return batch or ()

    # ------------------------------------------------------------------------------------------------ JSON
    def to_json(self) -> str:
        """The layout as JSON; only names, shapes and groupings are stored, all positions follow from them."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict:
        """The content of [`~CheckpointLayout.to_json`] as plain lists and dictionaries."""
        return {
            "format": LAYOUT_FORMAT,
            "token_size": self.token_size,
            "packing": self.packing,
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "tensors": [[t.name, list(t.shape), t.dtype, t.row_axis] for t in layer.tensors],
                }
                for layer in self.layers
            ],
            "passthrough": [[spec.name, list(spec.shape), spec.dtype] for spec in self.passthrough],
            "ties": dict(self.ties),
            "order": list(self.order),
        }

    @classmethod
    def from_json(cls, text: str) -> "CheckpointLayout":
        """Read what [`~CheckpointLayout.to_json`] wrote.

        Raises:
            ValueError: If the text is no layout, or has impossible names, shapes, kinds or settings.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits, or deeply nested
            raise ValueError(
                f"this is no layout: {error}. Expected JSON as CheckpointLayout.to_json() writes it."
            ) from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping) -> "CheckpointLayout":
        """Read what [`~CheckpointLayout.to_dict`] gave; the same errors as [`~CheckpointLayout.from_json`]."""
        if not isinstance(data, Mapping) or data.get("format") != LAYOUT_FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(
                f"this is no layout of format {LAYOUT_FORMAT} (found {found!r}). Make one with tokenizer.layout(source)."
            )
        try:
            layers = [(layer["name"], layer["kind"], [TensorLayout(n, tuple(s), d, a) for n, s, d, a in layer["tensors"]])
                      for layer in data["layers"]]  # fmt: skip
            passthrough = [TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in data["passthrough"]]
            ties, order = dict(data["ties"]), tuple(data["order"])
            token_size, packing = data["token_size"], data["packing"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the layout is damaged: {type(error).__name__}: {error}.") from error
        for name, kind, _ in layers:
            if not isinstance(name, str) or not isinstance(kind, str):
                raise ValueError(f"layer {_shown(name)} of kind {_shown(kind)}: expected texts for both.")
        for tensor in (tensor for _, _, group in layers for tensor in group):
            if tensor.row_axis is None:
                raise ValueError(f"{_shown(tensor.name)} has row axis None, expected a number.")
        tensors = [(tensor, kind) for _, kind, group in layers for tensor in group]
        _check_specs(
            [*(TensorSpec(t.name, t.shape, t.dtype, kind, t.row_axis) for t, kind in tensors), *passthrough], ties
        )
        for name, _, group in layers:
            if not group:
                raise ValueError(f"layer {name!r} of the layout has no tensors.")
            if len({tensor.rows for tensor in group}) > 1 or (len(group) > 1 and any(t.numel == 0 for t in group)):
                raise ValueError(f"layer {name!r} joins tensors of different row counts: {[t.name for t in group]}.")
        if any(not _is_float(tensor.dtype) for tensor, _ in tensors) or any(
            _is_float(spec.dtype) for spec in passthrough
        ):
            raise ValueError("the layout puts an integer tensor into tokens, or a floating one beside them.")
        if not all(isinstance(name, str) for name in order) or sorted(order) != sorted(
            [t.name for t, _ in tensors] + [s.name for s in passthrough] + [*ties]
        ):
            raise ValueError("the layout's order does not name each of its tensors once.")
        return cls._cut(layers, token_size, packing, passthrough, ties, order)


_REMEDY = "Make a layout with tokenizer.layout(source)."


# what would end a line, hide or reorder text, step out of a folder, or cannot be written as UTF-8
_FORBIDDEN = re.compile("[\\x00-\\x1f\\x7f-\\x9f/\\\\\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def check_name(name: Any) -> None:
    r"""Refuse a tensor name that could not become a file name or a row of a table.

    Raises:
        ValueError: If the name is no text, empty, a folder's (`.` and `..`), or holds control characters, `/` or `\`.
    """
    if not isinstance(name, str):
        raise ValueError(f"tensor name {_shown(name)} is no text.")
    if name in ("", ".", ".."):
        raise ValueError(f"tensor name {name!r} names nothing; rename it.")
    found = _FORBIDDEN.search(name)
    if found:
        raise ValueError(f"tensor name {_shown(name)} holds {found.group()!r}, which no file name can; rename it.")


def _shown(value: Any) -> str:
    """A foreign value as text short enough for a message."""
    text = repr(value) if not isinstance(value, (dict, list, tuple)) else f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _is_float(dtype: str) -> bool:
    """Whether tensors of this dtype stand in tokens; those with several numbers in a byte cannot be cast, so they pass through."""
    found = getattr(torch, dtype)
    return (found.is_floating_point or found.is_complex) and not dtype.startswith("float4")


def _check_specs(specs: list[TensorSpec], ties: Mapping[str, str]) -> None:
    """Refuse what no checkpoint can hold, before anything is allocated."""
    names = set()
    total = 0
    for spec in specs:
        name, shape = spec.name, spec.shape
        check_name(name)
        if name in names or name in ties:
            raise ValueError(f"tensor name {_shown(name)} stands twice.")
        names.add(name)
        if len(shape) > MAX_AXES:
            raise ValueError(f"{name} has {len(shape)} axes, expected at most {MAX_AXES}.")
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape):
            raise ValueError(f"{name} has shape {_sizes(shape)}, expected sizes of 0 or more.")
        if not isinstance(spec.dtype, str) or not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
            raise ValueError(
                f"{name} has dtype {_shown(spec.dtype)}, expected the name of a torch dtype, such as 'float32'."
            )
        if spec.kind is not None and spec.kind not in LAYER_KINDS:
            raise ValueError(f"{name} has layer kind {_shown(spec.kind)}, expected one of {', '.join(LAYER_KINDS)}.")
        axis = spec.row_axis
        if axis is not None and (
            isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis < max(1, len(shape))
        ):
            raise ValueError(f"{name} has row axis {_shown(axis)}, its shape {_sizes(shape)} has none such.")
        # an empty tensor has strides all the same: each axis counts as if it held something
        if max(shape, default=0) > MAX_VALUES or math.prod(max(1, size) for size in shape) > MAX_VALUES:
            raise ValueError(f"{name} has shape {_sizes(shape)}; that is more than any checkpoint can hold.")
        total += 2 * math.prod(shape)
    if total > MAX_VALUES:
        raise ValueError(
            f"the tensors hold {total // 2} values; that is more than any checkpoint can. The last is {name}."
        )
    for name, source in ties.items():
        check_name(name)
        if not isinstance(source, str) or source not in names:
            raise ValueError(f"{name} is tied to {_shown(source)}, which the checkpoint does not have.")


def _sizes(shape: tuple) -> str:
    return f"[{', '.join(map(_shown, shape))}]"


# ---------------------------------------------------------------------------------------------------- values
# exponent and mantissa bits of the dtypes whose NaNs carry a payload, and the integers that show their bits
_FORMATS = {
    torch.float64: (11, 52, torch.int64),
    torch.float32: (8, 23, torch.int32),
    torch.float16: (5, 10, torch.int16),
    torch.bfloat16: (8, 7, torch.int16),
    torch.float8_e5m2: (5, 2, torch.uint8),
}


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """Real and imaginary part as a last axis of 2, as a view where they are stored; real tensors as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def copy_exactly(target: torch.Tensor, source: torch.Tensor) -> None:
    """`target.copy_(source)`, except that NaNs keep sign, payload and signalling bit, as far as the target has room.

    A processor's conversions make quiet NaNs of signalling ones, and torch's make one and the same NaN of them all. A sum tells
    whether there is any NaN at all, so that checkpoints without pay for that one pass over a cast tensor, and float32 ones for nothing.
    """
    target.copy_(source)
    if target.dtype == source.dtype or target.is_meta or not {target.dtype, source.dtype} <= _FORMATS.keys():
        return
    wide = max(target, source, key=torch.Tensor.element_size)
    if not math.isnan(wide.detach().sum().item()):
        return
    nan = wide.detach().isnan()
    exponent, mantissa, integers = _FORMATS[source.dtype]
    bits = source.detach().view(integers)[nan].to(torch.int64)
    sign, payload = bits >> (exponent + mantissa) & 1, bits & ((1 << mantissa) - 1)
    exponent, room, integers = _FORMATS[target.dtype]
    payload = payload << (room - mantissa) if room >= mantissa else payload >> (mantissa - room)
    payload = torch.where(payload == 0, 1 << (room - 1), payload)  # without a payload it would be an infinity
    bits = sign << (exponent + room) | ((1 << exponent) - 1) << room | payload
    target.detach().view(integers)[nan] = bits.to(integers)


# ---------------------------------------------------------------------------------------------------- tables from shapes
def _tables(specs: list[TensorSpec], packing: str) -> list[tuple[str, str, list[TensorLayout]]]:
    """Group tensors into tables `(layer name, kind, tensors)`, by their common prefix and their shapes alone."""
    modules: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        modules.setdefault(spec.name.rpartition(".")[0], []).append(spec)
    tables = []
    for prefix, members in modules.items():
        lengths = {spec.shape[0] for spec in members if len(spec.shape) == 1}
        owners = _owners(members, lengths)
        groups: dict[object, list[TensorSpec]] = {}
        for spec in members:
            owner = owners.get(spec.name)
            if owner is not None and packing == "paper":
                key = owner.name
            elif len(spec.shape) == 1 and spec.shape[0] and not getattr(torch, spec.dtype).is_complex:
                key = spec.shape[
                    0
                ]  # the vectors of one length: scale, shift, and running statistics of a norm; biases
            else:
                key = spec.name
            groups.setdefault(key, []).append(spec)
        for group in groups.values():
            name = prefix if prefix and len(groups) == 1 else group[0].name
            tensors = [
                TensorLayout(spec.name, tuple(spec.shape), spec.dtype, _row_axis(spec, lengths)) for spec in group
            ]
            tables.append((name, _kind(owners.get(group[0].name) or group[0], lengths), tensors))
    return [part for table in tables for part in _split_norm(*table)] if packing == "paper" else tables


def _split_norm(name: str, kind: str, tensors: list[TensorLayout]) -> list[tuple[str, str, list[TensorLayout]]]:
    """The paper's code has scale and shift of a norm in one table and each running statistic in one of its own."""
    if len(tensors) <= 2 or any(len(tensor.real_shape) != 1 for tensor in tensors):
        return [(name, kind, tensors)]
    return [(name, kind, tensors[:2]), *((tensor.name, kind, [tensor]) for tensor in tensors[2:])]


def _owners(members: list[TensorSpec], lengths: set[int]) -> dict[str, TensorSpec]:
    """The matrix that each vector belongs to: one of its module that has as many rows.

    Several matrices of one size (recurrent layers) take the vectors in turn: each its own bias.
    """
    matrices: dict[int, list[TensorSpec]] = {}
    for spec in members:
        if len(spec.shape) >= 2 and math.prod(spec.shape):
            matrices.setdefault(spec.shape[_row_axis(spec, lengths)], []).append(spec)
    owners: dict[str, TensorSpec] = {}
    taken: dict[int, int] = {}
    for spec in members:
        if len(spec.shape) == 1 and spec.shape[0] in matrices and not getattr(torch, spec.dtype).is_complex:
            fits, turn = matrices[spec.shape[0]], taken.get(spec.shape[0], 0)
            owners[spec.name] = fits[turn % len(fits)]
            taken[spec.shape[0]] = turn + 1
    return owners


def _row_axis(spec: TensorSpec, lengths: set[int]) -> int:
    """The axis of the output channels: the module type's word, else the first axis that is longer than 1.

    A matrix or kernel with a single output channel keeps axis 0, which shows in its rank or in a bias of length 1; class
    tokens and position tables `(1, positions, channels)` do not.
    """
    if spec.row_axis is not None:
        return spec.row_axis
    if len(spec.shape) != 3 or spec.shape[0] != 1 or 1 in lengths:
        return 0
    return next((axis for axis, size in enumerate(spec.shape) if size > 1), 0)


def _kind(spec: TensorSpec, lengths: set[int]) -> str:
    """The layer's kind: the module type's word, else from the rank of the tensor."""
    if spec.kind is not None:
        return spec.kind
    if len(spec.shape) == 3 and spec.shape[0] == 1 and 1 not in lengths:
        return "other"
    return ("other", "norm", "linear", "conv")[min(len(spec.shape), 3)]
