"""The data of a run: checkpoints of one or many zoos, each layout with its own tokens, statistics and symmetries."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset

from hub_scripts.zoos.token_cache import TokenCache, token_cache
from hub_scripts.zoos.views import Sample, WindowDataset
from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import CheckpointLayout, SaneWeightTokenizer, merge_moments


@dataclass
class Part:
    """The checkpoints of one layout in one zoo.

    Args:
        zoo ([`Zoo`]): of that layout alone.
        train ([`TokenCache`]): tokens of its train split.
        validation ([`TokenCache`]): tokens of its validation split.
        statistics (`dict[str, tuple[float, float]]`): mean and standard deviation of each tensor, from train splits.
    """

    zoo: Zoo
    train: TokenCache
    validation: TokenCache
    statistics: dict = field(default_factory=dict)

    @property
    def layout(self) -> CheckpointLayout:
        """As the tokens are cut."""
        return self.train.layout

    @property
    def name(self) -> str:
        """Zoo and layout, for logs."""
        return f"{self.zoo.name.rstrip('/').rpartition('/')[2]}:{self.layout.fingerprint[:6]}"


def open_parts(
    zoos: Sequence[Zoo], tokenizer: SaneWeightTokenizer, dtype: str = "float32", rank: int = 0, world_size: int = 1
) -> list[Part]:
    """Read zoos into the token cache and give the tokenizer their statistics.

    Args:
        zoos (`Sequence[Zoo]`): of any layouts; one that lacks a train or validation split of a layout is refused.
        tokenizer ([`SaneWeightTokenizer`]): says how layouts are cut; gets statistics and symmetries of all layouts.
        dtype (`str`): of the cache.
        rank (`int`): this process.
        world_size (`int`): how many there are; each row is read by one of them.
    """
    parts = []
    for zoo in zoos:
        for layout_id in zoo.layout_ids:
            one = zoo if len(zoo.layout_ids) == 1 else zoo.of_layout(layout_id)
            caches = (
                token_cache(one, split, tokenizer.token_size, tokenizer.packing, dtype, rank, world_size)
                for split in ("train", "validation")
            )
            parts.append(Part(one, *caches))
    moments: dict[str, tuple[CheckpointLayout, dict[str, torch.Tensor]]] = {}
    for part in parts:
        # zoos of one layout share statistics: a checkpoint does not say which zoo it is from
        _, totals = moments.setdefault(part.layout.fingerprint, (part.zoo.layout, {}))
        for name, found in part.train.moments.items():
            totals[name] = merge_moments(totals.get(name), found)
        if part.zoo.has_symmetries:
            tokenizer.symmetries[part.layout.fingerprint] = part.zoo.symmetries.to_json()
    tokenizer.set_moments(moments)
    for part in parts:
        part.statistics = tokenizer.zoo[part.layout.fingerprint]["statistics"]
    return parts


class MixedWindows(Dataset):
    """Windows of several parts as one data set; rows are counted through all of them.

    Args:
        parts (`Sequence[WindowDataset]`): windows of one size.
    """

    def __init__(self, parts: Sequence[WindowDataset]):
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Both views of a window, and in `part` which part it is from; `row` counts within the part."""
        part = int(np.searchsorted(self.starts, sample.row, side="right")) - 1
        item = self.parts[part][Sample(sample.epoch, int(sample.row - self.starts[part]))]
        return item | {"part": np.int64(part)}
