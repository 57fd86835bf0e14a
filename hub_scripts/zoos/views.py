"""Windows of token sequences in two views: as they are, and after a random symmetry of the network; both with noise.

A view is a pure function of (seed, epoch, checkpoint): the same whatever the number of processes, workers or restarts. A
permuted view is a gather whose positions follow from the layout by arithmetic, for the rows and columns that stand in the
window alone, so it costs what its window costs, not what the network costs.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from hub_scripts.zoos.token_cache import TokenCache
from tokenization_sane import CheckpointLayout, SymmetrySpec
from tokenization_sane.layout_sane import LayerLayout
from tokenization_sane.symmetry_sane import SymmetryGroup, SymmetryItem


class SymmetryGather:
    """Where each value of a window comes from after a random function-preserving symmetry of the network.

    Memory grows with layers and lengths of axes; no table has an entry for every value of the network.

    Args:
        layout ([`CheckpointLayout`]): what stands where.
        spec ([`SymmetrySpec`]): the network's symmetries.
        kinds (`Iterable[str]`): which groups to draw: `"permutation"`, `"sign"`, `"scale"`. Scales are left out unless asked
            for: unlike the other two they change the spread of the values, to which the tokens' statistics were fitted.

    Raises:
        ValueError: If a group does not fit the shape of a tensor, or a kind does not exist.
    """

    def __init__(self, layout: CheckpointLayout, spec: SymmetrySpec, kinds: Iterable[str] = ("permutation", "sign")):
        kinds = tuple(kinds)
        unknown = [kind for kind in kinds if kind not in ("permutation", "sign", "scale")]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no kind of symmetry, expected permutation, sign or scale.")
        self.token_size, self.num_tokens, self.groups = layout.token_size, layout.num_tokens, spec.groups
        axes = _moving_axes(layout, spec, kinds)
        self._layers = [_MovedLayer(layer, axes) for layer in layout.layers if layer.numel]
        self._first_tokens = [layer.first_token for layer in self._layers]
        self._end_tokens = [layer.end_token for layer in self._layers]

    def draw(self, start: int, stop: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """Draw a symmetry and say where the values of tokens `start:stop` come from.

        Args:
            start (`int`): first token.
            stop (`int`): end token, not included.
            rng (`np.random.Generator`): where permutations, signs and scales come from; only groups that stand in the
                window are drawn.

        Returns:
            `tuple`: positions in the network's flattened tokens, int64 of shape `(stop - start, token_size)`, where padding
            points to position 0 (mask it); and factors of the same shape, float32, 1 on padding, that multiply the values
            once they are in place, or `None` if no sign or scale stands in the window.
        """
        return self.window(start, stop, LazyDraw(self.groups, rng))

    def window(self, start: int, stop: int, draw: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """As [`~SymmetryGather.draw`], for a symmetry that is drawn already.

        Args:
            start (`int`): first token.
            stop (`int`): end token, not included.
            draw (`Mapping`): number of a group to its permutation, signs or scales `(size,)`; asked only for groups in the
                window.
        """
        source = np.zeros((stop - start, self.token_size), np.int64)
        factors = None
        for layer, first, end in self._inside(start, stop):
            for part in layer.parts(first, end, (layer.first_token + first - start) * self.token_size):
                for block in layer.blocks:
                    columns = block.overlap(part)
                    if columns[0] >= columns[1]:
                        continue
                    rows, moved_columns = block.sources(draw, part.rows, columns)
                    np.add(part.by_row(layer.addresses(rows)), moved_columns, out=part.view(source, columns))
                    row_factor, column_factor = block.factors(draw, part.rows, columns)
                    if row_factor is not None or column_factor is not None:
                        factors = np.ones(source.shape, np.float32) if factors is None else factors
                        view = part.view(factors, columns)
                        if row_factor is not None:
                            view *= part.by_row(row_factor)
                        if column_factor is not None:
                            view *= column_factor
        return source, factors

    def spread(self, values: Mapping[str, float], start: int, stop: int, padding: float = 0.0) -> np.ndarray:
        """One value a tensor, laid out as tokens `start:stop`: float32 `(stop - start, token_size)`."""
        spread = np.full((stop - start, self.token_size), padding, np.float32)
        for layer, first, end in self._inside(start, stop):
            for part in layer.parts(first, end, (layer.first_token + first - start) * self.token_size):
                for name, first_column, end_column in layer.tensors:
                    columns = max(first_column, part.columns[0]), min(end_column, part.columns[1])
                    if columns[0] < columns[1]:
                        part.view(spread, columns)[...] = values[name]
        return spread

    def _inside(self, start: int, stop: int) -> Iterator[tuple["_MovedLayer", int, int]]:
        """Layers that stand in tokens `start:stop`, with their first and end token there, counted from the layer's first."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens {start}:{stop} are no window of a network of {self.num_tokens} tokens.")
        for layer in self._layers[bisect_right(self._end_tokens, start) : bisect_left(self._first_tokens, stop)]:
            yield layer, max(0, start - layer.first_token), min(stop, layer.end_token) - layer.first_token


class LazyDraw(dict):
    """A symmetry whose groups are drawn when they are first asked for; it then holds them by their number.

    Args:
        groups (`tuple[SymmetryGroup, ...]`): all groups of a spec.
        rng (`np.random.Generator`): where the draws come from.
    """

    def __init__(self, groups: tuple[SymmetryGroup, ...], rng: np.random.Generator):
        super().__init__()
        self.groups, self.rng = groups, rng

    def __missing__(self, number: int) -> np.ndarray:
        group = self.groups[number]
        if group.kind == "permutation":
            drawn = self.rng.permutation(group.size)
        elif group.kind == "sign":
            drawn = 1 - 2 * self.rng.integers(0, 2, group.size).astype(np.float32)
        else:  # powers of two, so that scaling rounds nothing
            drawn = np.exp2(self.rng.integers(-1, 2, group.size)).astype(np.float32)
        self[number] = drawn
        return drawn


class _Units:
    """Which index along an axis belongs to which unit of a group."""

    def __init__(self, item: SymmetryItem, size: int, length: int):
        rows = item.rows(size)
        self.repeat = rows.shape[1]
        self.rows = rows.ravel()
        self.first, self.end = int(self.rows.min()), int(self.rows.max()) + 1
        self.unit = np.full(length, -1)  # -1: of no unit
        self.place = np.zeros(length, np.int64)  # of the index within its unit
        self.unit[rows] = np.arange(size)[:, None]
        self.place[rows] = np.arange(self.repeat)
        self.are_all = len(self.rows) == length
        self.are_axis = size == length and np.array_equal(self.rows, np.arange(length))

    def source(self, permutation: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Where the values at some indices come from when the units are permuted."""
        if self.are_axis:
            return permutation[index]
        unit = self.unit[index]
        moved = self.rows[permutation[unit] * self.repeat + self.place[index]]
        return moved if self.are_all else np.where(unit >= 0, moved, index)


class _Axis:
    """All that moves along one axis of a tensor: `(group, units)` of permutations, `(group, units, power)` of factors."""

    def __init__(self, length: int):
        self.length = length
        self.permutations: list[tuple[int, _Units]] = []
        self.multipliers: list[tuple[int, _Units, int]] = []

    def seal(self) -> None:
        """Call when all groups are there."""
        owners = np.zeros(self.length, np.int64)
        for _, units in self.permutations:
            owners[units.rows] += 1
        self.is_disjoint = (
            owners <= 1
        ).all()  # else units of one group hold parts of another's, as attention heads do

    def source(self, draw: Mapping[int, np.ndarray], first: int, end: int) -> np.ndarray:
        """Where the values at indices `first:end` come from."""
        if len(self.permutations) == 1 and self.permutations[0][1].are_axis:
            return draw[self.permutations[0][0]][first:end]
        index = np.arange(first, end)
        # a group that is applied later moves what the earlier ones have moved: its answer is asked first
        for group, units in reversed(self.permutations):
            if not self.is_disjoint or (units.first < end and units.end > first):
                index = units.source(draw[group], index)
        return index

    def factor(self, draw: Mapping[int, np.ndarray], first: int, end: int) -> np.ndarray | None:
        """What multiplies the values at indices `first:end`, float32, or None."""
        product = None
        for group, units, power in self.multipliers:
            if units.first < end and units.end > first:
                factor = np.append(draw[group] ** np.float32(power), np.float32(1))[units.unit[first:end]]
                product = factor if product is None else product * factor
        return product


class _Block:
    """Columns of a layer's table that move alike: one tensor, or several whose rows alone move, and in the same way."""

    def __init__(self, column: int, columns: int, rows: _Axis | None, column_axes: tuple[tuple[int, _Axis], ...]):
        self.column, self.end_column = column, column + columns
        self.rows, self.column_axes = rows, column_axes  # (stride in columns, axis)

    def overlap(self, part: "_Part") -> tuple[int, int]:
        """First and end column of the table that are in the block and in a part of the table."""
        return max(self.column, part.columns[0]), min(self.end_column, part.columns[1])

    def sources(self, draw, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the table that the values come from."""
        row_source = self.rows.source(draw, *rows) if self.rows else np.arange(*rows)
        source = np.arange(*columns)
        for stride, axis in self.column_axes:
            if axis.permutations:
                place, first, end = self._along(columns, stride, axis.length)
                shift = axis.source(draw, first, end) - np.arange(first, end)
                source += shift if place is None else (shift * stride)[place]
        return row_source, source

    def factors(self, draw, rows: tuple[int, int], columns: tuple[int, int]) -> tuple:
        """What multiplies rows and columns, each an array or None."""
        row_factor = self.rows.factor(draw, *rows) if self.rows else None
        product = None
        for stride, axis in self.column_axes:
            if axis.multipliers:
                place, first, end = self._along(columns, stride, axis.length)
                factor = axis.factor(draw, first, end)
                if factor is not None:
                    factor = factor if place is None else factor[place]
                    product = factor if product is None else product * factor
        return row_factor, product

    def _along(self, columns: tuple[int, int], stride: int, length: int) -> tuple[np.ndarray | None, int, int]:
        """Which index along an axis each column has: counted from the first one that occurs, the first and the end one.

        `None` stands for columns that are the indices.
        """
        first, last = (columns[0] - self.column) // stride, (columns[1] - 1 - self.column) // stride
        if first // length == last // length:
            if stride == 1:
                return None, first % length, last % length + 1
            start = first // length * length
            place = np.arange(columns[0] - self.column, columns[1] - self.column) // stride - first
            return place, first - start, last - start + 1
        return np.arange(columns[0] - self.column, columns[1] - self.column) // stride % length, 0, length


class _Part(NamedTuple):
    """A rectangle of a layer's table that lies evenly spaced in the window.

    Args:
        rows, columns (`tuple[int, int]`): first and end.
        counts (`tuple[int, int]`): tokens (or rows that begin a token anew), and rows that share one.
        offset (`int`), strides (`tuple[int, int]`): where its first value stands in the flattened window, and the steps from
            token to token and from row to row.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    counts: tuple[int, int]
    offset: int
    strides: tuple[int, int]

    def by_row(self, values: np.ndarray) -> np.ndarray:
        """One value a row, so that it broadcasts against the view."""
        return values.reshape(*self.counts, 1)

    def view(self, window: np.ndarray, columns: tuple[int, int]) -> np.ndarray:
        """The part's columns as a view `(tokens, rows, columns)` into a window."""
        size = window.itemsize
        return np.ndarray(
            (*self.counts, columns[1] - columns[0]),
            window.dtype,
            window,
            (self.offset + columns[0] - self.columns[0]) * size,
            (self.strides[0] * size, self.strides[1] * size, size),
        )


class _MovedLayer:
    """A layer's table, how it is cut into tokens, and what moves in it."""

    def __init__(self, layer: LayerLayout, axes: Mapping[str, Mapping[int, _Axis]]):
        self.size, self.height, self.width = layer.token_size, layer.rows, layer.columns
        self.first_token, self.end_token = layer.first_token, layer.first_token + layer.num_tokens
        self.share = layer.rows_per_token
        self.row_stride = layer.columns if layer.packing == "flat" else layer.tokens_per_row * layer.token_size
        self.tensors = [(t.name, t.column, t.column + t.columns) for t in layer.tensors]
        self.blocks: list[_Block] = []
        for tensor in layer.tensors:
            moving = axes.get(tensor.name, {})
            rows, strides, stride = moving.get(tensor.row_axis), [], 1
            for axis in reversed([a for a in range(len(tensor.real_shape)) if a != tensor.row_axis]):
                if axis in moving:
                    strides.append((stride, moving[axis]))
                stride *= tensor.real_shape[axis]
            before = self.blocks[-1] if self.blocks else None
            if before and not strides and not before.column_axes and _alike(before.rows, rows):
                before.end_column += tensor.columns
            else:
                self.blocks.append(_Block(tensor.column, tensor.columns, rows, tuple(strides)))

    def addresses(self, rows: np.ndarray) -> np.ndarray:
        """Where rows of the table begin in the network's flattened tokens."""
        first = self.first_token * self.size
        if self.share == 1:
            return rows * self.row_stride + first
        # token * size + place * width, for token, place = divmod(rows, share)
        return rows // self.share * (self.size - self.share * self.width) + rows * self.width + first

    def parts(self, first: int, end: int, offset: int) -> list[_Part]:
        """Tokens `first:end` of the layer as at most three rectangles of its table.

        Args:
            first (`int`): first token, counted from the layer's first.
            end (`int`): end token, not included.
            offset (`int`): where token `first` stands in the flattened window.
        """
        size, stride, every = self.size, self.row_stride, (0, self.width)
        if self.share > 1:
            row, end_row = first * self.share, min(end * self.share, self.height)
            full, rest = divmod(end_row - row, self.share)
            split, strides = end_row - rest, (size, self.width)
            parts = [_Part((row, split), every, (full, self.share), offset, strides)] if full else []
            # the layer's last token may hold fewer rows than the others
            return (
                [*parts, _Part((split, end_row), every, (1, rest), offset + full * size, strides)] if rest else parts
            )
        (row, column), (end_row, end_column) = (
            divmod(place, stride) for place in (first * size, min(end * size, self.height * stride))
        )
        offset -= column  # of the first row's first column
        strides = (stride, 0)
        if row == end_row:
            return [_Part((row, row + 1), (column, end_column), (1, 1), offset + column, strides)]
        parts = []
        if column:
            parts.append(_Part((row, row + 1), (column, self.width), (1, 1), offset + column, strides))
            row, offset = row + 1, offset + stride
        if row < end_row:
            parts.append(_Part((row, end_row), every, (end_row - row, 1), offset, strides))
        if end_column:
            under = offset + (end_row - row) * stride
            parts.append(_Part((end_row, end_row + 1), (0, end_column), (1, 1), under, strides))
        return parts


def _alike(first: _Axis | None, second: _Axis | None) -> bool:
    """True if the same moves happen along two axes."""
    if first is None or second is None:
        return first is second
    return first.permutations == second.permutations and first.multipliers == second.multipliers


def _moving_axes(layout: CheckpointLayout, spec: SymmetrySpec, kinds: tuple[str, ...]) -> dict[str, dict[int, _Axis]]:
    """What moves along the axes of each tensor, by the tensor's name in the layout."""
    stored = {spec.ties.get(alias, alias): name for alias, name in layout.ties.items()}
    stored |= {spec.ties.get(name, name): name for name in layout.tensors}
    shared: dict[tuple, _Units] = {}  # axes that a group cuts in the same way have one table, and can be compared
    axes: dict[str, dict[int, _Axis]] = {}
    for number, group in enumerate(spec.groups):
        for item in group.items if group.kind in kinds else ():
            name = stored.get(item.tensor)
            if name not in layout.tensors:
                continue
            shape = layout.tensors[name].shape
            if item.axis >= len(shape):
                raise ValueError(f"{name} has shape {shape}, symmetry group {group.name!r} moves axis {item.axis}.")
            length = shape[item.axis]
            item.check(group.size, length)
            key = (item.index, group.size, length)
            if key not in shared:
                shared[key] = _Units(item, group.size, length)
            axis = axes.setdefault(name, {}).setdefault(item.axis, _Axis(length))
            if group.kind == "permutation":
                axis.permutations.append((number, shared[key]))
            else:
                axis.multipliers.append((number, shared[key], item.power))
    for moving in axes.values():
        for axis in moving.values():
            axis.seal()
    return axes


class Sample(NamedTuple):
    """Which checkpoint stands where in the order of training: epoch of training and row of the split."""

    epoch: int
    row: int


class WindowDataset(Dataset):
    """Windows of a split's token sequences; made for a sampler that gives [`Sample`]s.

    Args:
        cache ([`TokenCache`]): raw tokens of the checkpoints.
        statistics (`Mapping[str, tuple[float, float]]`): mean and standard deviation of each tensor, which normalise a window
            when it is cut out: a sign or a scale belongs to a weight, not to its normalised value.
        window_size (`int`): tokens in a window; a shorter network is padded.
        spec ([`SymmetrySpec`], *optional*): symmetries for the second view; without, it differs by its noise alone.
        noise (`float`): standard deviation of the multiplicative Gaussian noise on both views; 0 for none.
        seed (`int`): of windows, permutations, signs and noise.
        kinds (`Iterable[str]`): kinds of symmetries in the second view, see [`SymmetryGather`].
        masked (`float`): share of tokens that a view hides, whole; each view hides others, and both must still be decoded.
    """

    def __init__(
        self,
        cache: TokenCache,
        statistics: Mapping[str, tuple[float, float]],
        window_size: int,
        spec: SymmetrySpec | None = None,
        noise: float = 0.0,
        seed: int = 0,
        kinds: Iterable[str] = ("permutation", "sign"),
        masked: float = 0.0,
    ):
        self.cache, self.window_size, self.noise, self.seed, self.masked = cache, window_size, noise, seed, masked
        layout = cache.layout
        self.num_tokens = layout.num_tokens
        self.is_moved = spec is not None
        self.gather = SymmetryGather(layout, spec or SymmetrySpec(()), kinds)
        self._means, self._stds = ({name: pair[place] for name, pair in statistics.items()} for place in (0, 1))
        self._whole = self._scale(0, self.num_tokens) if window_size >= self.num_tokens else None
        # copies: a tensor that goes to a worker moves into shared memory, and an array that looks at it is left behind
        self._static = {
            "position_ids": layout.position_ids.numpy().copy(),
            "value_mask": layout.value_mask.numpy().copy(),
            "layer_kind_ids": layout.layer_kind_ids.numpy().copy(),
            "attention_mask": np.ones(layout.num_tokens, bool),
        }

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Both views of a window, `token_values` and `second_token_values`, with their clean targets and masks."""
        epoch, row = sample
        # a counter-based generator: cheap to make, and independent for every (seed, epoch, row)
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, epoch, row]))
        size = min(self.window_size, self.num_tokens)
        start = int(rng.integers(0, self.num_tokens - size + 1))
        stop = start + size
        item = {name: values[start:stop] for name, values in self._static.items()}
        mean, std = self._whole or self._scale(start, stop)
        clean = (self.cache.window(row, start, stop) - mean) / std
        second = (self._moved(row, start, stop, rng, item["value_mask"]) - mean) / std if self.is_moved else clean
        item |= {"labels": clean, "second_labels": second}
        item |= {"token_values": self._disturbed(clean, rng), "second_token_values": self._disturbed(second, rng)}
        if size < self.window_size:
            item = {name: _padded(values, self.window_size) for name, values in item.items()}
        return item | {"row": np.int64(row)}

    def _scale(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each value of tokens `start:stop`; 0 and 1 on padding."""
        return self.gather.spread(self._means, start, stop), self.gather.spread(self._stds, start, stop, padding=1.0)

    def _moved(self, row: int, start: int, stop: int, rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
        """Raw tokens `start:stop` of a row after a random symmetry."""
        source, factors = self.gather.draw(start, stop, rng)
        values = np.where(mask, self.cache.take(row, source), np.float32(0))
        return values if factors is None else values * factors

    def _disturbed(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.noise:
            values = values * (1 + np.float32(self.noise) * rng.standard_normal(values.shape, dtype=np.float32))
        if self.masked:
            values = np.where(rng.random(len(values))[:, None] < self.masked, np.float32(0), values)
        return values


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """Zeros behind the values along the first axis."""
    padded = np.zeros((size, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    return padded


def collate(items: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stack items into a batch."""
    return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}
