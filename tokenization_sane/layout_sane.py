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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch

LAYER_KINDS = ("conv", "linear", "norm", "embedding", "recurrent", "other")
PACKINGS = ("dense", "flat", "paper")
LAYOUT_FORMAT = 1
MAX_VALUES = 2**62  # positions of single values are int64


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
        rest = [size for axis, size in enumerate(self.real_shape) if axis != self.row_axis]
        if not self.real_shape:
            return table.reshape(table.shape[:first])
        return table.reshape(*table.shape[: first + 1], *rest).movedim(first, first + self.row_axis)


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

    def row_offsets(self) -> torch.Tensor:
        """Where each row begins in the flattened tokens of the whole sequence: `(rows,)` int64."""
        row = torch.arange(self.rows)
        first = self.first_token * self.token_size
        if self.packing == "flat":
            return first + row * self.columns
        if self.rows_per_token == 1:
            return first + row * self.tokens_per_row * self.token_size
        token, place = row // self.rows_per_token, row % self.rows_per_token
        return first + token * self.token_size + place * self.columns

    def first_rows(self) -> torch.Tensor:
        """The first row that stands in each token: `(tokens,)` int64, the channel index `k` of the positions."""
        token = torch.arange(self.num_tokens)
        if self.packing == "flat":
            return token * self.token_size // self.columns
        return token // self.tokens_per_row * self.rows_per_token

    def blocks(self, tokens: torch.Tensor) -> list[tuple[int, int, torch.Tensor]]:
        """The table as views into its tokens.

        Args:
            tokens (`torch.Tensor` of shape `(..., tokens, token_size)`): the layer's tokens, contiguous in the last two axes.

        Returns:
            `list[tuple[int, int, torch.Tensor]]`: first row, end row, and a view of shape `(..., [tokens,] rows, columns)`.
            Rows that share tokens need two views, since the last token may hold fewer rows than the others.
        """
        if self.packing == "flat":
            return [(0, self.rows, tokens.flatten(-2)[..., : self.numel].unflatten(-1, (self.rows, self.columns)))]
        share = self.rows_per_token
        if share == 1:
            return [(0, self.rows, tokens.flatten(-2).unflatten(-1, (self.rows, -1))[..., : self.columns])]
        full, rest = divmod(self.rows, share)
        shared = tokens[..., : share * self.columns].unflatten(-1, (share, self.columns))
        blocks = [(0, full * share, shared[..., :full, :, :])] if full else []
        return [*blocks, (full * share, self.rows, shared[..., full, :rest, :])] if rest else blocks

    def pack_into(self, tokens: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the layer's tensors, each `(..., *real_shape)`, into its tokens `(..., tokens, token_size)`."""
        if self.numel == 0:
            return
        blocks = self.blocks(tokens)
        for tensor in self.tensors:
            table = tensor.to_table(tensors[tensor.name])
            for start, stop, view in blocks:
                target = view[..., tensor.column : tensor.column + tensor.columns]
                target.copy_(table[..., start:stop, :].reshape(target.shape))

    def unpack(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Undo [`~LayerLayout.pack_into`]: tokens `(..., tokens, token_size)` to tensors `(..., *real_shape)`."""
        batch = tokens.shape[:-2]
        if self.numel == 0:
            return {t.name: tokens.new_zeros(*batch, *t.real_shape) for t in self.tensors}
        blocks = self.blocks(tokens)
        tensors = {}
        for tensor in self.tensors:
            columns = slice(tensor.column, tensor.column + tensor.columns)
            parts = [view[..., columns].reshape(*batch, stop - start, -1) for start, stop, view in blocks]
            tensors[tensor.name] = tensor.from_table(parts[0] if len(parts) == 1 else torch.cat(parts, -2))
        return tensors

    def window(self, read: Callable, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Tokens `start:stop` of this layer, from the rows that stand in them alone.

        Args:
            read (`Callable`): `read(tensor_layout, first_row, end_row)` gives those rows of a tensor, its row axis cut.
            start (`int`): first token, counted from the layer's first.
            stop (`int`): end token, not included.
            dtype (`torch.dtype`): dtype of the tokens.

        Returns:
            `torch.Tensor` of shape `(stop - start, token_size)`.
        """
        size = self.token_size
        if self.packing == "flat":
            first, end = start * size // self.columns, min(self.rows, -(-stop * size // self.columns))
            skip = start * size - first * self.columns
        elif self.rows_per_token > 1:
            first, end, skip = start * self.rows_per_token, min(self.rows, stop * self.rows_per_token), 0
        else:
            first, end = start // self.tokens_per_row, -(-stop // self.tokens_per_row)
            skip = (start - first * self.tokens_per_row) * size
        part = replace(self, rows=end - first)
        tokens = torch.zeros(part.num_tokens, size, dtype=dtype)
        part.pack_into(tokens, {tensor.name: read(tensor, first, end) for tensor in self.tensors})
        values = tokens.flatten()[skip : skip + (stop - start) * size]
        return torch.nn.functional.pad(values, (0, (stop - start) * size - values.numel())).view(stop - start, size)


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

    @property
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
        channels = [layer.first_rows() for layer in self.layers if layer.num_tokens]
        channel = torch.cat(channels) if channels else torch.zeros(0, dtype=torch.int64)
        return torch.stack([torch.arange(self.num_tokens), self.layer_ids, channel], dim=1)

    @cached_property
    def layer_kind_ids(self) -> torch.Tensor:
        """Index into `LAYER_KINDS` for each token: `(tokens,)` int64."""
        kinds = torch.tensor([LAYER_KINDS.index(layer.kind) for layer in self.layers], dtype=torch.int64)
        return kinds[self.layer_ids]

    @cached_property
    def value_mask(self) -> torch.Tensor:
        """`(tokens, token_size)` bool, True on real values, False on padding."""
        mask = torch.zeros(self.num_tokens, self.token_size, dtype=torch.bool)
        for layer in self.layers:
            if layer.numel:
                for _, _, view in layer.blocks(self.tokens_of(mask, layer)):
                    view.fill_(True)
        return mask

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
        batch, device = self._check_tensors(tensors)
        real = {
            n: torch.view_as_real(tensors[n]) if t.torch_dtype.is_complex else tensors[n]
            for n, t in self.tensors.items()
        }
        token_values = torch.zeros(*batch, self.num_tokens, self.token_size, dtype=dtype, device=device)
        for layer in self.layers:
            layer.pack_into(self.tokens_of(token_values, layer), real)
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
        if token_values.dim() < 2 or tuple(token_values.shape[-2:]) != (self.num_tokens, self.token_size):
            raise ValueError(
                f"token_values has shape {tuple(token_values.shape)}, the layout expects (..., {self.num_tokens}, "
                f"{self.token_size}). Cut padding tokens off with the attention mask, or use the layout the tokens were made with."
            )
        tensors = {}
        for layer in self.layers:
            tensors |= layer.unpack(self.tokens_of(token_values, layer))
        complex_names = [name for name, tensor in self.tensors.items() if tensor.torch_dtype.is_complex]
        return tensors | {
            name: torch.view_as_complex(tensors[name].clone(memory_format=torch.contiguous_format))
            for name in complex_names
        }

    def window(self, read: Callable, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Tokens `start:stop` of the sequence, reading only the rows that stand in them.

        Args:
            read (`Callable`): `read(tensor_layout, first_row, end_row)` gives those rows of a tensor, its row axis cut.
            start (`int`): first token.
            stop (`int`): end token, not included.
            dtype (`torch.dtype`): dtype of the tokens.

        Returns:
            `torch.Tensor` of shape `(stop - start, token_size)`.
        """
        parts = [torch.zeros(0, self.token_size, dtype=dtype)]
        for layer in self.layers:
            first, end = max(start, layer.first_token), min(stop, layer.first_token + layer.num_tokens)
            if first < end:
                parts.append(layer.window(read, first - layer.first_token, end - layer.first_token, dtype))
        return torch.cat(parts)

    def _check_tensors(self, tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[int, ...], torch.device]:
        """The leading dimensions and the device that all tensors share."""
        batch, device = None, torch.device("cpu")
        for name, layout in self.tensors.items():
            if name not in tensors:
                raise ValueError(f"{name} is missing, the layout expects it with shape {layout.shape}. {_REMEDY}")
            shape = tuple(tensors[name].shape)
            lead = len(shape) - len(layout.shape)
            if lead < 0 or shape[lead:] != layout.shape or (batch is not None and shape[:lead] != batch):
                expected = (*(batch or ()), *layout.shape)
                raise ValueError(f"{name} has shape {shape}, the layout expects {expected}. {_REMEDY}")
            if str(tensors[name].dtype).removeprefix("torch.") != layout.dtype and (
                tensors[name].dtype.is_complex != layout.torch_dtype.is_complex
            ):
                raise ValueError(f"{name} is {tensors[name].dtype}, the layout expects {layout.dtype}. {_REMEDY}")
            batch, device = shape[:lead], tensors[name].device
        return batch or (), device

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
        except json.JSONDecodeError as error:
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
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the layout is damaged: {type(error).__name__}: {error}.") from error
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
        if sorted(order) != sorted([t.name for t, _ in tensors] + [s.name for s in passthrough] + [*ties]):
            raise ValueError("the layout's order does not name each of its tensors once.")
        return cls._cut(layers, token_size, packing, passthrough, ties, order)


_REMEDY = "Make a layout with tokenizer.layout(source)."


def _is_float(dtype: str) -> bool:
    found = getattr(torch, dtype)
    return found.is_floating_point or found.is_complex


def _check_specs(specs: list[TensorSpec], ties: Mapping[str, str]) -> None:
    """Refuse what no checkpoint can hold, before anything is allocated."""
    names = set()
    total = 0
    for spec in specs:
        name, shape = spec.name, spec.shape
        if not isinstance(name, str) or name in names or name in ties:
            raise ValueError(f"tensor name {name!r} is no text or stands twice.")
        names.add(name)
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape):
            raise ValueError(f"{name} has shape {list(shape)}, expected sizes of 0 or more.")
        if not isinstance(spec.dtype, str) or not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
            raise ValueError(
                f"{name} has dtype {spec.dtype!r}, expected the name of a torch dtype, such as 'float32'."
            )
        if spec.kind is not None and spec.kind not in LAYER_KINDS:
            raise ValueError(f"{name} has layer kind {spec.kind!r}, expected one of {', '.join(LAYER_KINDS)}.")
        axis = spec.row_axis
        if axis is not None and (
            isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis < max(1, len(shape))
        ):
            raise ValueError(f"{name} has row axis {axis!r}, its shape {list(shape)} has none such.")
        total += 2 * math.prod(shape)
    if total > MAX_VALUES:
        raise ValueError(f"the tensors hold {total // 2} values; that is more than any checkpoint can.")
    for name, source in ties.items():
        if source not in names:
            raise ValueError(f"{name} is tied to {source}, which the checkpoint does not have.")


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
    matrices = [spec for spec in members if len(spec.shape) >= 2 and math.prod(spec.shape)]
    owners: dict[str, TensorSpec] = {}
    for spec in members:
        if len(spec.shape) == 1 and spec.shape[0] and not getattr(torch, spec.dtype).is_complex:
            fits = [matrix for matrix in matrices if matrix.shape[_row_axis(matrix, lengths)] == spec.shape[0]]
            if fits:
                owners[spec.name] = min(fits, key=lambda matrix: [*owners.values()].count(matrix))
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
