"""Splits by model: all checkpoints of a network stand on one side."""

from collections.abc import Sequence

import numpy as np

from hub_scripts.zoos.tasks import SPLITS

SPLIT_SHARES = (0.7, 0.15, 0.15)


def split_models(count: int, seed: int, shares: Sequence[float] = SPLIT_SHARES) -> dict[str, list[int]]:
    """Numbers of the models of each split, drawn at random; each split gets at least one.

    Args:
        count (`int`): models, at least 3.
        seed (`int`): of the draw.
        shares (`Sequence[float]`): of train, validation and test.

    Raises:
        ValueError: If there are fewer models than splits.
    """
    if count < len(SPLITS):
        raise ValueError(f"{count} models cannot be split into {', '.join(SPLITS)}; give at least {len(SPLITS)}.")
    order = np.random.default_rng(seed).permutation(count)
    held_out = [max(1, round(share * count)) for share in shares[1:]]
    ends = np.cumsum([count - sum(held_out), *held_out])
    parts = np.split(order, ends[:-1])
    return {split: sorted(part.tolist()) for split, part in zip(SPLITS, parts, strict=True)}
