"""How good generated networks are, and how far from every network that they could have been copied from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from hub_scripts.codec import Codec
from hub_scripts.evaluation.baselines import nearest_distances
from hub_scripts.evaluation.functional import (
    batched_logits,
    condition_norms,
    disagreement,
    ensemble_accuracy,
    evaluate,
)
from hub_scripts.zoos.alignment import ZooAligner
from hub_scripts.zoos.tasks import Task
from hub_scripts.zoos.zoo import Zoo

TOP = 5  # networks in `accuracy_top5`, chosen on validation images
BLOCK_VALUES = 2**28  # of training weights in memory at a time, 1 GB
NORMS = ("data", "none")
CHANCE_MARGIN = 2.0  # standard deviations of the accuracy of guessing


@dataclass(frozen=True)
class Judged:
    """Networks and what was measured of them.

    Args:
        tensors (`dict[str, torch.Tensor]`): stacked state dicts `(networks, *shape)`, norms conditioned.
        validation (`np.ndarray` of shape `(networks,)`): accuracy on validation images, for choosing.
        accuracy (`np.ndarray` of shape `(networks,)`): accuracy on test images.
        distance (`np.ndarray` of shape `(networks,)`): to the nearest training checkpoint, normalised weights.
        figures (`dict[str, float]`): what `results.json` says of the set.
    """

    tensors: dict[str, torch.Tensor]
    validation: np.ndarray
    accuracy: np.ndarray
    distance: np.ndarray
    figures: dict[str, Any]

    @property
    def order(self) -> np.ndarray:
        """Networks, the best on validation images first; those that are not finite last."""
        return np.argsort(-np.nan_to_num(self.validation, nan=-1.0), kind="stable")


class Judge:
    """Measures sets of networks of one architecture on one task.

    Args:
        zoo ([`Zoo`]): distances are to the checkpoints of its train split.
        codec ([`Codec`]): of the networks; its normalisation is the unit of distances.
        module (`nn.Module`): their architecture.
        task ([`Task`]): validation images choose, test images measure, train images condition norms.
        keep (`int`): networks in `accuracy_kept`, chosen on validation images.
        norms (`str`): `"data"` gives norms the running statistics of train images, `"none"` leaves what was decoded.
        is_new_layout (`bool`): True for networks of another architecture than the zoo's: they have no distance to it.
    """

    def __init__(
        self,
        zoo: Zoo,
        codec: Codec,
        module: nn.Module,
        task: Task,
        keep: int,
        norms: str = "data",
        is_new_layout: bool = False,
    ):
        self.zoo, self.codec, self.module, self.task = zoo, codec, module, task
        self.keep, self.norms, self.is_new_layout = keep, norms, is_new_layout
        self.mask = codec.layout.value_mask
        self._cached: list[torch.Tensor] | None = None

    def flat(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalised weights `(networks, values)` of tokens `(networks, tokens, token_size)`, padding left out."""
        return tokens[:, self.mask]

    def tokens(self, flat: torch.Tensor) -> torch.Tensor:
        """Undo [`~Judge.flat`]."""
        tokens = torch.zeros(len(flat), *self.mask.shape)
        tokens[:, self.mask] = flat
        return tokens

    def train_blocks(self) -> Iterator[torch.Tensor]:
        """Normalised weights of all training checkpoints, `(checkpoints, values)` a block; kept if they are few."""
        if self._cached is not None:
            yield from self._cached
            return
        count, values = len(self.zoo.rows("train")), int(self.mask.sum())
        step = max(1, BLOCK_VALUES // values)
        kept: list[torch.Tensor] = []
        for start in range(0, count, step):
            block = self.flat(self.codec.tokens(self.zoo.stacked("train", np.arange(start, min(count, start + step)))))
            if count <= step:
                kept.append(block)
            yield block
        self._cached = kept or None

    def train_std(self) -> torch.Tensor:
        """Standard deviation of each value over the training checkpoints, `(values,)`."""
        count, total, squares = 0, 0.0, 0.0
        for block in self.train_blocks():
            count, total, squares = (
                count + len(block),
                total + block.double().sum(0),
                squares + block.double().square().sum(0),
            )
        return ((squares - total.square() / count) / max(1, count - 1)).clamp(min=0).sqrt().float()

    def distances(self, tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
        """Distance of each network to the nearest training checkpoint, as it stands or aligned, whichever is smaller.

        Without the alignment, a copy whose units are in another order would look like a new network.
        """
        if self.is_new_layout:
            return np.full(len(next(iter(tensors.values()))), np.nan)
        finite = torch.stack([t.isfinite().flatten(1).all(1) for t in tensors.values() if t.is_floating_point()]).all(
            0
        )
        distances = np.full(len(finite), np.nan)
        if not finite.any():
            return distances
        good = {name: tensor[finite] for name, tensor in tensors.items()}
        ways = [good] if self._aligner is None else [good, self._aligner.align_stacked(good)]
        both = [self.flat(self.codec.tokens(tensors)) for tensors in ways]
        nearest = np.full(int(finite.sum()), np.inf)
        for block in self.train_blocks():
            for flat in both:
                nearest = np.minimum(nearest, nearest_distances(flat, block))
        distances[finite.numpy()] = nearest
        return distances

    @cached_property
    def _aligner(self) -> ZooAligner | None:
        return ZooAligner.of_zoo(self.zoo)

    def _conditioned(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Networks whose norms have the statistics that they are judged with."""
        if self.norms == "none":
            return dict(tensors)
        return condition_norms(self.module, tensors, self.task.images["train"])

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> Judged:
        """Measure stacked networks `(networks, *shape)`."""
        images, labels = self.task.images, self.task.labels
        distances = self.distances(tensors)
        tensors = self._conditioned(tensors)
        validation = evaluate(self.module, tensors, images["validation"], labels["validation"]).accuracy
        accuracy = evaluate(self.module, tensors, images["test"], labels["test"]).accuracy
        judged = Judged(tensors, validation, accuracy, distances, {})
        order = judged.order
        judged.figures.update(
            accuracy_mean=accuracy.mean(),
            accuracy_std=accuracy.std(),
            **{f"accuracy_top{TOP}": accuracy[order[:TOP]].mean()},
            accuracy_kept=accuracy[order[: self.keep]].mean(),
            nearest_train_distance=_mean(distances),
            nearest_train_distance_kept=_mean(distances[order[: self.keep]]),
            not_finite=int(np.isnan(distances).sum()) if not self.is_new_layout else 0,
            count=len(accuracy),
        )
        return judged

    def point(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Mean test accuracy and distance, for a curve; cheaper than judging, since nothing is chosen."""
        distances = self.distances(tensors)
        tensors = self._conditioned(tensors)
        accuracy = evaluate(self.module, tensors, self.task.images["test"], self.task.labels["test"]).accuracy
        return {"accuracy_mean": accuracy.mean(), "nearest_train_distance": _mean(distances)}

    def together(self, judged: Judged) -> dict[str, float]:
        """What the kept networks are as a set, on test images: accuracy of their averaged probabilities, and how often two disagree."""
        index = judged.order[: self.keep].copy()
        kept = {name: tensor[index] for name, tensor in judged.tensors.items()}
        with torch.no_grad():
            logits = batched_logits(self.module, kept, self.task.images["test"])
        labels = self.task.labels["test"]
        return {"accuracy_ensemble": ensemble_accuracy(logits, labels), "disagreement": disagreement(logits)}

    def is_at_chance(self, judged: Judged) -> bool:
        """True if no network does better on validation images than guessing would."""
        chance, count = 1 / self.task.num_classes, len(self.task.labels["validation"])
        limit = chance + CHANCE_MARGIN * (chance * (1 - chance) / count) ** 0.5
        return bool(np.nanmax(judged.validation) <= limit)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
