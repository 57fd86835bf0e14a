"""A codec for networks of an architecture that a SANE model has not seen.

Tokens have one size, so the model itself takes any layout. Two things are made for a new one: statistics that make each of its
tensors look like those the model was trained on, and positions inside the range that it knows. Sinusoidal positions do go on
beyond that, but the model has learned nothing there (SmallCNN twice as wide: R² of decoded tokens 0.78 instead of 0.93).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from hub_scripts.codec import Codec
from modeling_sane import SaneModel
from tokenization_sane import CheckpointLayout, SaneWeightTokenizer

# of tensors that are one number in all networks, such as the zero scales of new norms: decoding leaves them as they are
CONSTANT_STD = 1e-6


@dataclass(frozen=True)
class SqueezedLayout(CheckpointLayout):
    """A layout whose positions are those of a shorter one: relative depth, as position interpolation (arXiv 2306.15595).

    Args:
        extents (`tuple[int, int, int]`): numbers of sequence, layer and channel indices to keep within.
    """

    extents: tuple[int, int, int] = (1, 1, 1)

    def window_positions(self, start: int, stop: int) -> torch.Tensor:
        """As [`CheckpointLayout.window_positions`], each index scaled down to its extent where the layout exceeds it."""
        positions = super().window_positions(start, stop)
        own = (self.num_tokens, len(self.layers), max((layer.rows for layer in self.layers), default=0))
        for axis, (longest, extent) in enumerate(zip(own, self.extents, strict=True)):
            if longest > extent:
                positions[:, axis] = positions[:, axis] * extent // longest
        return positions

    def repack(self, token_size: int | None = None, packing: str | None = None) -> CheckpointLayout:
        """As [`CheckpointLayout.repack`]; the same layout if nothing changes."""
        same = token_size in (None, self.token_size) and packing in (None, self.packing)
        return self if same else super().repack(token_size, packing)


def codec_for(
    model: SaneModel, tokenizer: SaneWeightTokenizer, layout: CheckpointLayout, tensors: Mapping[str, torch.Tensor]
) -> Codec:
    """A codec for networks of a layout, whether or not the model was trained on such.

    With `normalization="zoo"` and a layout that the tokenizer does not know, each tensor is shifted and scaled by its mean and
    standard deviation over the networks given (those of the layers that they come from would be off: copies that share the work
    of one unit have smaller weights), and positions are kept within those of the layouts that it knows.

    Args:
        model ([`SaneModel`]): in eval mode.
        tokenizer ([`SaneWeightTokenizer`]): the model's own; it is not changed.
        layout ([`CheckpointLayout`]): of the networks, as `tokenizer.layout(module)` gives it.
        tensors (`Mapping[str, torch.Tensor]`): stacked networks of the layout, each `(networks, *shape)`, as
            [`grow_networks`](growth.py) gives them.

    Returns:
        [`Codec`]: its `tokenizer` knows the layout.

    Raises:
        ValueError: If a tensor is missing or not finite, or has another shape than the layout says.
    """
    layout = layout.repack(tokenizer.token_size, tokenizer.packing)
    if tokenizer.normalization != "zoo" or layout.fingerprint in tokenizer.zoo:
        return Codec(model, tokenizer, layout)
    layout.check_tensors(tensors)
    known, tokenizer = tokenizer.zoo, copy.copy(tokenizer)
    count = len(next(iter(tensors.values())))
    tokenizer.fit(({name: tensors[name][i] for name in layout.tensors} for i in range(count)), layout)
    statistics = tokenizer.zoo[layout.fingerprint]["statistics"]
    for name, (mean, _) in statistics.items():
        if tensors[name].numel() and tensors[name].min() == tensors[name].max():
            statistics[name] = [mean, CONSTANT_STD]
    tokenizer.zoo = known | tokenizer.zoo
    return Codec(model, tokenizer, _squeezed(layout, known))


def _squeezed(layout: CheckpointLayout, known: Mapping[str, Mapping]) -> CheckpointLayout:
    """The layout with positions within those of the layouts that a tokenizer knows."""
    extents = torch.zeros(3, dtype=torch.int64)
    for entry in known.values():
        other = CheckpointLayout.from_dict(entry["layout"]).repack(layout.token_size, layout.packing)
        rows = max((layer.rows for layer in other.layers), default=0)
        extents = extents.maximum(torch.tensor([other.num_tokens, len(other.layers), rows]))
    if not extents.all():
        return layout
    return SqueezedLayout(**{f.name: getattr(layout, f.name) for f in fields(layout)}, extents=tuple(extents.tolist()))
