"""SaneWeightTokenizer: a checkpoint as a sequence of weight tokens, and back bit for bit."""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from .checkpoint_sane import CheckpointFiles, read_checkpoint
from .layout_sane import CheckpointLayout, TensorLayout
from .specs_sane import module_specs, state_dict_specs

NORMALIZATIONS = ("none", "checkpoint", "zoo")
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
MOMENTS_CHUNK = (
    2**16
)  # values whose moments are taken at once; they stay in the cache, larger ones take four times as long
KEPT_LAYOUTS = 8
KEPT_LAYOUT_VALUES = 2**26  # larger layouts are not kept: the mask alone takes that many bytes
SMALLEST_STD = 1e-8  # a tensor that does not vary (the zero biases of an untrained network) is shifted, not scaled


class SaneWeightTokenizer(FeatureExtractionMixin):
    """Cuts the weights of any neural network into tokens and puts them together again.

    Args:
        token_size (`int`, defaults to 288): values in a token.
        packing (`str`, defaults to `"dense"`): `"dense"`, `"flat"` or `"paper"`, see [`CheckpointLayout`].
        normalization (`str`, defaults to `"none"`): `"zoo"` shifts and scales each tensor by its mean and standard deviation
            over the checkpoints given to [`~SaneWeightTokenizer.fit`]; `"checkpoint"` by those of the checkpoint itself;
            `"none"` leaves the values alone, and decoding is exact to the bit.
        zoo (`dict`, *optional*): what `fit` learned: fingerprint to layout, means and standard deviations.
        symmetries (`dict`, *optional*): fingerprint to the JSON text of that architecture's `SymmetrySpec`, so that it travels
            with the tokenizer; the tokenizer itself does not use it.

    Example:
    ```python
    tokenizer = SaneWeightTokenizer(token_size=32)
    batch = tokenizer(network.state_dict())
    state_dict = tokenizer.decode(batch["token_values"][0], batch["layouts"][0], passthrough=batch["passthrough"][0])
    ```
    """

    model_input_names = ["token_values", "position_ids", "attention_mask", "value_mask", "layer_kind_ids"]  # noqa: RUF012

    def __init__(
        self,
        token_size: int = 288,
        packing: str = "dense",
        normalization: str = "none",
        zoo: dict | None = None,
        symmetries: dict[str, str] | None = None,
        **kwargs: Any,
    ):
        CheckpointLayout.build([], token_size, packing)  # checks both
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization is {normalization!r}, expected one of {', '.join(NORMALIZATIONS)}.")
        self.token_size = token_size
        self.packing = packing
        self.normalization = normalization
        self.zoo = zoo or {}
        self.symmetries = symmetries or {}
        super().__init__(**kwargs)

    # ---------------------------------------------------------------------------------------------------- layout
    def layout(self, source: Any, allow_pickle: bool = False) -> CheckpointLayout:
        """What stands where in a checkpoint; made from its header, no weight is read.

        Args:
            source (`nn.Module`, `Mapping[str, torch.Tensor]`, `str` or `Path`): a network, a state dict, a file, a folder with
                one or with shards, or a Hub repository; see [`CheckpointFiles`].
            allow_pickle (`bool`, defaults to `False`): True opens pickles too, with `weights_only=True`.

        Returns:
            [`CheckpointLayout`]: in the order of the source. A checkpoint with the same tensors as one of the zoo that the
            tokenizer was fitted to has that zoo's order and layer kinds, so that one network has one sequence. Layouts are kept,
            so that checkpoints of one architecture share masks and positions.
        """
        if isinstance(source, nn.Module):
            state_dict = source.state_dict()
            _check_strided(state_dict)
            return self._place(*module_specs(source), state_dict)
        if isinstance(source, Mapping):
            _check_strided(source)
            return self._place(*state_dict_specs(source), source)
        with CheckpointFiles(source, allow_pickle) as files:
            return self._place(files.specs, files.ties, None)

    def _place(self, specs: list, ties: Mapping[str, str], order: Iterable[str] | None) -> CheckpointLayout:
        """The layout of these tensors: one made before, else a new one, in the order that the zoo has."""
        names = None if order is None else tuple(order)
        key = (tuple(specs), tuple(ties.items()), names, self.token_size, self.packing)
        kept = _layouts.setdefault(self, OrderedDict())
        layout, known, ordered = kept.pop(key, (None, None, None))
        layout = layout or CheckpointLayout.build(specs, self.token_size, self.packing, ties, names)
        entry = self.zoo.get(layout.fingerprint) if self.zoo else None
        if ordered is None or known is not entry:
            ordered = layout
            if entry is not None:
                zoo_layout = _with_dtypes(
                    CheckpointLayout.from_dict(entry["layout"]), {s.name: s.dtype for s in specs}
                )
                ordered = zoo_layout.repack(self.token_size, self.packing)
        if layout.num_tokens * self.token_size <= KEPT_LAYOUT_VALUES:
            kept[key] = (layout, entry, ordered)
            while len(kept) > KEPT_LAYOUTS:
                kept.popitem(last=False)
        return ordered

    # ---------------------------------------------------------------------------------------------------- encode
    def __call__(
        self,
        source: Any,
        layout: CheckpointLayout | None = None,
        dtype: torch.dtype = torch.float32,
        non_finite: str | None = None,
        allow_pickle: bool = False,
    ) -> BatchFeature:
        """Cut one checkpoint, or a list of them, into tokens.

        Args:
            source (checkpoint or list of checkpoints): anything [`~SaneWeightTokenizer.layout`] takes.
            layout ([`CheckpointLayout`], *optional*): use this layout for every checkpoint instead of making it.
            dtype (`torch.dtype`, defaults to `torch.float32`): dtype of the tokens; `torch.float64` for float64 checkpoints.
            non_finite (`str`, *optional*): `"error"` refuses NaN and infinite weights by name, `"keep"` lets them pass. The
                default keeps them where decoding is exact (`normalization="none"`) and refuses them otherwise.
            allow_pickle (`bool`, defaults to `False`): True opens pickles too, with `weights_only=True`.

        Returns:
            `BatchFeature`: `token_values (batch, tokens, token_size)`, `value_mask` (the same shape, bool, True on real
            values), `position_ids (batch, tokens, 3)`, `attention_mask (batch, tokens)` (bool, False on padding tokens),
            `layer_kind_ids (batch, tokens)`, and the lists `layouts`, `passthrough` and `statistics`. Shorter checkpoints
            are padded at the end.

        Raises:
            ValueError: If a tensor does not fit the layout, float64 would be rounded, or a weight is not finite.
        """
        sources = list(source) if isinstance(source, (list, tuple)) else [source]
        if not sources:
            raise ValueError("there is no checkpoint in the list; give at least one.")
        keep = self._keeps(non_finite)
        layouts, tokens, passthrough, statistics = [], [], [], []
        for checkpoint in sources:
            tensors = read_checkpoint(checkpoint, allow_pickle)
            place = layout or self.layout(checkpoint, allow_pickle)
            known = set(place.order)
            unknown = [name for name in tensors if name not in known] if layout else []
            if unknown:
                raise ValueError(
                    f"the given layout does not know {unknown[0]}, so it would be lost; make a layout with tokenizer.layout(source)."
                )
            _check_precision(place, dtype)
            if not keep:
                check_finite(tensors)
            values = place.pack({name: tensors[name] for name in place.tensors if name in tensors}, dtype)
            scale = self._statistics(place, _reader(tensors))
            layouts.append(place)
            tokens.append(_shift_and_scale(values, place, scale))
            passthrough.append({spec.name: tensors[spec.name] for spec in place.passthrough})
            statistics.append(scale)
        count = torch.tensor([len(values) for values in tokens])
        if len(layouts) == 1:  # made anew, which takes no longer than copies of what the layout would keep
            end = layouts[0].num_tokens
            made = (
                layouts[0].window_mask(0, end),
                layouts[0].window_positions(0, end),
                layouts[0].window_kinds(0, end),
            )
            values, mask, positions, kinds = (rows[None] for rows in (*tokens, *made))
        else:
            made = [(place.value_mask, place.position_ids, place.layer_kind_ids) for place in layouts]
            values, mask, positions, kinds = (
                nn.utils.rnn.pad_sequence(list(rows), batch_first=True) for rows in (tokens, *zip(*made, strict=True))
            )
        return BatchFeature(
            {
                "token_values": values,
                "value_mask": mask,
                "position_ids": positions,
                "attention_mask": torch.arange(int(count.max())) < count[:, None],
                "layer_kind_ids": kinds,
                "layouts": layouts,
                "passthrough": passthrough,
                "statistics": statistics,
            }
        )

    # ---------------------------------------------------------------------------------------------------- decode
    def decode(
        self,
        token_values: torch.Tensor,
        layout: CheckpointLayout,
        passthrough: Mapping[str, torch.Tensor] | None = None,
        statistics: Mapping[str, tuple[float, float]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Put a checkpoint together again.

        Args:
            token_values (`torch.Tensor` of shape `(tokens, token_size)`): tokens; padding tokens at the end are ignored.
            layout ([`CheckpointLayout`]): what stands where.
            passthrough (`Mapping[str, torch.Tensor]`, *optional*): the tensors that are no floating point numbers.
            statistics (`Mapping`, *optional*): the checkpoint's own, as the tokenizer returned them; needed with
                `normalization="checkpoint"`.

        Returns:
            `dict[str, torch.Tensor]`: state dict in the layout's order and dtypes; tied names share one tensor.

        Raises:
            ValueError: If the tokens do not fit the layout, or statistics or passed-through tensors are missing.
        """
        passthrough = passthrough or {}
        absent = [spec.name for spec in layout.passthrough if spec.name not in passthrough]
        if absent:
            raise ValueError(
                f"{absent[0]} is not in the tokens (it holds no floating point numbers); give it as passthrough=batch['passthrough'][i]."
            )
        token_values = token_values[: layout.num_tokens] if token_values.dim() == 2 else token_values
        values = self.denormalize(token_values, layout, statistics)
        tensors = layout.restore(values) | {spec.name: passthrough[spec.name] for spec in layout.passthrough}
        return {name: tensors[layout.ties.get(name, name)] for name in layout.order}

    # ---------------------------------------------------------------------------------------------------- statistics
    def fit(
        self,
        state_dicts: Iterable[Mapping[str, torch.Tensor]],
        layout: CheckpointLayout | None = None,
        allow_pickle: bool = False,
    ) -> "SaneWeightTokenizer":
        """Learn each tensor's mean and standard deviation over a zoo, in one pass, for `normalization="zoo"`.

        Checkpoints of several architectures may be mixed. Fit on the training split only: statistics are part of the model.

        Args:
            state_dicts (`Iterable`): anything that [`~SaneWeightTokenizer.layout`] takes, one at a time.
            layout ([`CheckpointLayout`], *optional*): the layout of them all, which gives their order and layer kinds.
            allow_pickle (`bool`, defaults to `False`): True opens pickles too, with `weights_only=True`.

        Returns:
            [`SaneWeightTokenizer`]: itself.

        Raises:
            ValueError: If there is no checkpoint, or one holds NaN or infinite values.
        """
        layouts: dict[str, CheckpointLayout] = {}
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for checkpoint in state_dicts:
            with self._open(checkpoint, allow_pickle, layout) as (place, read):
                layouts.setdefault(place.fingerprint, place)
                totals = moments.setdefault(place.fingerprint, {})
                for name, tensor in place.tensors.items():
                    totals[name] = merge_moments(totals.get(name), _moments(read, tensor))
        if not layouts:
            raise ValueError("there is no checkpoint to fit the statistics to.")
        return self.set_moments({fingerprint: (place, moments[fingerprint]) for fingerprint, place in layouts.items()})

    def set_moments(
        self, zoo: Mapping[str, tuple[CheckpointLayout, Mapping[str, torch.Tensor]]]
    ) -> "SaneWeightTokenizer":
        """Use statistics that were gathered elsewhere, as [`~SaneWeightTokenizer.fit`] gathers them.

        Args:
            zoo (`Mapping`): by fingerprint, a layout and each tensor's moments: count, mean and sum of squared deviations of all
                its values, float64 `(3,)`; see [`merge_moments`].

        Returns:
            [`SaneWeightTokenizer`]: itself.
        """
        self.zoo = {
            fingerprint: {
                "layout": layout.to_dict(),
                "statistics": {name: _mean_and_std(total) for name, total in moments.items()},
            }
            for fingerprint, (layout, moments) in zoo.items()
        }
        return self

    def normalize(
        self, token_values: torch.Tensor, layout: CheckpointLayout, statistics: Mapping | None = None
    ) -> torch.Tensor:
        """Shift and scale tokens `(..., tokens, token_size)` as the tokenizer's normalization asks."""
        if statistics is None and self.normalization == "checkpoint":
            statistics = self._statistics(layout, _reader(layout.unpack(token_values)))
        return _shift_and_scale(token_values, layout, statistics or self._statistics(layout))

    def denormalize(
        self, token_values: torch.Tensor, layout: CheckpointLayout, statistics: Mapping | None = None
    ) -> torch.Tensor:
        """Undo [`~SaneWeightTokenizer.normalize`]; differentiable."""
        if self.normalization == "checkpoint" and statistics is None:
            raise ValueError(
                "normalization='checkpoint' needs statistics=batch['statistics'][i] to decode that checkpoint."
            )
        scale = statistics if self.normalization == "checkpoint" else self._statistics(layout)
        return _shift_and_scale(token_values, layout, scale, undo=True)

    def token_statistics(
        self, layout: CheckpointLayout, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The zoo's shift and scale of every value: mean and standard deviation, each `(tokens, token_size)`.

        `normalized * std + mean` undoes the normalization of a whole batch; 0 and 1 on padding and where values stay as they are.
        """
        scale = self._statistics(layout) if self.normalization == "zoo" else dict.fromkeys(layout.tensors, (0.0, 1.0))
        return _spread(scale, layout, 0, layout.num_tokens, dtype)

    def _statistics(
        self, layout: CheckpointLayout, read: Callable | None = None, keep: bool = True
    ) -> dict[str, list[float]] | None:
        """Mean and standard deviation by tensor name, or None where values stay as they are."""
        if self.normalization == "none":
            return None
        if self.normalization == "checkpoint":
            return {name: _mean_and_std(_moments(read, tensor, keep)) for name, tensor in layout.tensors.items()}
        if layout.fingerprint not in self.zoo:
            raise ValueError(
                f"the tokenizer has no statistics for a checkpoint with fingerprint {layout.fingerprint} ({len(layout.tensors)} "
                f"tensors, first {next(iter(layout.tensors), None)!r}). Call fit() with checkpoints of that kind, or use "
                "normalization='checkpoint'."
            )
        return self.zoo[layout.fingerprint]["statistics"]

    # ---------------------------------------------------------------------------------------------------- windows
    def iter_windows(
        self,
        source: Any,
        window_size: int = 256,
        halo: int = 0,
        dtype: torch.dtype = torch.float32,
        non_finite: str | None = None,
        allow_pickle: bool = False,
    ) -> Iterator[BatchFeature]:
        """Walk over a checkpoint in windows of tokens; memory holds one window and the rows, or parts of a row, that stand in it.

        Args:
            source (checkpoint): anything [`~SaneWeightTokenizer.layout`] takes.
            window_size (`int`): tokens in a window.
            halo (`int`, defaults to 0): extra tokens on both sides, where there are any.
            dtype (`torch.dtype`): dtype of the tokens.
            non_finite (`str`, *optional*): as when called.
            allow_pickle (`bool`, defaults to `False`): True opens pickles too, with `weights_only=True`.

        Yields:
            `BatchFeature`: as the tokenizer returns, with a batch axis of 1, and `start`, `stop`: the tokens without halo.
            `layouts` and `statistics` are the same objects in every window; passed-through tensors are left out. With
            `normalization="checkpoint"` one pass over the source for its statistics goes first.

        Raises:
            ValueError: If a size is impossible, float64 would be rounded, or a weight is not finite.
        """
        if window_size < 1 or halo < 0:
            raise ValueError(
                f"window_size is {window_size} and halo {halo}; expected at least 1 and at least 0 tokens."
            )
        keep = self._keeps(non_finite)
        with self._open(source, allow_pickle) as (layout, read):
            _check_precision(layout, dtype)
            scale = self._statistics(layout, read, keep)
            for start in range(0, layout.num_tokens, window_size):
                stop = min(start + window_size, layout.num_tokens)
                first, end = max(0, start - halo), min(layout.num_tokens, stop + halo)
                values = layout.window(read, first, end, dtype)
                if not keep and not torch.isfinite(values).all():
                    _refuse_window(layout, values, first)
                yield BatchFeature(
                    {
                        "token_values": _shift_and_scale(values, layout, scale, start=first)[None],
                        "value_mask": layout.window_mask(first, end)[None],
                        "position_ids": layout.window_positions(first, end)[None],
                        "attention_mask": torch.ones(1, end - first, dtype=torch.bool),
                        "layer_kind_ids": layout.window_kinds(first, end)[None],
                        "layouts": [layout],
                        "statistics": [scale],
                        "start": start,
                        "stop": stop,
                    }
                )

    def _keeps(self, non_finite: str | None) -> bool:
        """Whether NaN and infinite weights pass."""
        if non_finite not in (None, "error", "keep"):
            raise ValueError(f"non_finite is {non_finite!r}, expected 'error' or 'keep'.")
        return (non_finite or ("keep" if self.normalization == "none" else "error")) == "keep"

    @contextmanager
    def _open(self, source: Any, allow_pickle: bool, layout: CheckpointLayout | None = None) -> Iterator[tuple]:
        """The layout of a checkpoint, and a reader of rows as [`~CheckpointLayout.window`] wants it; opened once."""
        if isinstance(source, (nn.Module, Mapping)):
            tensors = source.state_dict() if isinstance(source, nn.Module) else source
            layout = layout or self.layout(source)
            layout.check_tensors(tensors)
            yield layout, _reader(tensors)
            return
        with CheckpointFiles(source, allow_pickle) as files:
            if layout is None:
                layout = self._place(files.specs, files.ties, None)
            else:
                layout.check_tensors({spec.name: spec for spec in files.specs})
            yield layout, files.rows

    # ---------------------------------------------------------------------------------------------------- saving
    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds."""
        output = super().to_dict()
        # saving writes this entry as a list because the class is called a tokenizer; AutoFeatureExtractor wants a string
        auto_map = output.get("auto_map") or {}
        output["auto_map"] = {k: v[0] if isinstance(v, (list, tuple)) else v for k, v in auto_map.items()}
        return {key: value for key, value in output.items() if value or key not in ("auto_map", "symmetries")}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the tokenizer so that `AutoTokenizer` and `AutoFeatureExtractor` both load it, with its code."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        name = type(self).__name__
        config = {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [f"tokenization_sane.{name}", None]}}
        (folder / TOKENIZER_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


# ---------------------------------------------------------------------------------------------------- values
def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError that names the first tensor with NaN or infinite values."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # the smallest and the largest value are a quarter of the work of asking all, and NaN is both
        if not all(end.isfinite() for end in tensor.detach().to(_wide(tensor.dtype)).aminmax()):
            bad = int((~torch.isfinite(tensor.float())).sum())
            raise ValueError(
                f"{name} holds {bad} NaN or infinite values of {tensor.numel()}; repair or leave out this checkpoint."
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype that has every operation, for one that may only store values."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _check_precision(layout: CheckpointLayout, dtype: torch.dtype) -> None:
    wide = [n for n, t in layout.tensors.items() if t.torch_dtype in (torch.float64, torch.complex128)]
    if wide and dtype != torch.float64:
        raise ValueError(
            f"{wide[0]} is {layout.tensors[wide[0]].dtype}; {dtype} tokens would round it. Use dtype=torch.float64."
        )


def _with_dtypes(layout: CheckpointLayout, dtypes: Mapping[str, str]) -> CheckpointLayout:
    """The layout with the dtypes of another checkpoint of the same tensors."""
    data = layout.to_dict()
    for layer in data["layers"]:
        layer["tensors"] = [[name, shape, dtypes[name], axis] for name, shape, _, axis in layer["tensors"]]
    return CheckpointLayout.from_dict(data)


def _check_strided(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.layout != torch.strided:
            kind = str(tensor.layout).removeprefix("torch.")
            raise ValueError(f"{name} is a {kind} tensor, tokens need dense ones; convert it with .to_dense() first.")


def _refuse_window(layout: CheckpointLayout, values: torch.Tensor, first: int) -> None:
    """Name the layer of the first value of a window that is not finite."""
    token = first + int((~torch.isfinite(values)).any(1).nonzero()[0])
    ((_, layer, _, _),) = layout.layers_between(token, token + 1)
    raise ValueError(
        f"{layer.name} holds NaN or infinite values in token {token}; repair or leave out this checkpoint."
    )


def _reader(tensors: Mapping[str, torch.Tensor]) -> Callable:
    """Reads rows of tensors in memory, as [`CheckpointFiles.rows`] does from files."""

    def read(tensor: TensorLayout, start: int, stop: int, columns: tuple[int, int] | None = None) -> torch.Tensor:
        return tensor.read(tensors[tensor.name].__getitem__, start, stop, columns)

    return read


def _moments(read: Callable, tensor: TensorLayout, keep: bool = False) -> torch.Tensor:
    """Count, mean and sum of squared deviations of all values of a tensor, float64 `(3,)`; read a chunk at a time.

    Files and tensors in memory are cut into the same chunks, so that their statistics are equal to the last digit.
    """
    total, bad = None, 0
    for start, stop, columns in tensor.chunks(MOMENTS_CHUNK):
        # in the order of the table, whatever the strides: sums in another order differ in the last digit
        values = tensor.to_table(read(tensor, start, stop)) if columns is None else read(tensor, start, stop, columns)
        values = values.detach().to(torch.float64).contiguous()
        found = moments_of(values)
        if not keep and not torch.isfinite(found[1]):
            bad += int((~torch.isfinite(values)).sum())
        total = merge_moments(total, found)
    if bad:
        raise ValueError(
            f"{tensor.name} holds {bad} NaN or infinite values of {tensor.numel}; repair or leave out this checkpoint."
        )
    return torch.zeros(3, dtype=torch.float64) if total is None else total


def moments_of(values: torch.Tensor) -> torch.Tensor:
    """Count, mean and sum of squared deviations of float64 values: `(3,)`."""
    count = torch.tensor(float(values.numel()), dtype=torch.float64)
    mean = values.mean() if values.numel() else values.new_zeros(())
    return torch.stack([count, mean, ((values - mean) ** 2).sum()])


def merge_moments(left: torch.Tensor | None, right: torch.Tensor) -> torch.Tensor:
    """Moments of two sets of values together (Chan, Golub and LeVeque 1983)."""
    if left is None or left[0] == 0:
        return right
    count = left[0] + right[0]
    delta = right[1] - left[1]
    mean = left[1] + delta * right[0] / count
    return torch.stack([count, mean, left[2] + right[2] + delta**2 * left[0] * right[0] / count])


def _mean_and_std(moments: torch.Tensor) -> list[float]:
    count, mean, squares = moments.tolist()
    std = (squares / count) ** 0.5 if count else 0.0
    return [mean, std if std > SMALLEST_STD else 1.0]


def _shift_and_scale(
    values: torch.Tensor,
    layout: CheckpointLayout,
    statistics: Mapping | None,
    undo: bool = False,
    start: int = 0,
) -> torch.Tensor:
    """`(values - mean) / std` on real values, or the reverse; padding stays zero. `start` is the first token of a window."""
    if statistics is None:
        return values
    stop = start + values.shape[-2]
    mean, std = _spread(statistics, layout, start, stop, values.dtype, values.device)
    # on padding both are (0, 1), so that zeros stay zeros; what a decoder writes there is cut off with the mask
    if undo:
        return torch.where(layout.window_mask(start, stop).to(values.device), values * std + mean, 0)
    return (values - mean) / std


def _spread(
    statistics: Mapping,
    layout: CheckpointLayout,
    start: int,
    stop: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the tensor that each value of some tokens belongs to: two of `(tokens, token_size)`."""
    means, stds = ({name: pair[place] for name, pair in statistics.items()} for place in (0, 1))
    return (
        layout.window_values(means, start, stop, dtype, 0.0, device),
        layout.window_values(stds, start, stop, dtype, 1.0, device),
    )


# the layouts that each tokenizer made last; beside the objects, so that they are neither saved nor sent to worker processes
_layouts: WeakKeyDictionary[SaneWeightTokenizer, OrderedDict] = WeakKeyDictionary()
