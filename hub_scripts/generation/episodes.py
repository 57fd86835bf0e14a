"""Training a prompted generator on episodes: tasks of some classes each, drawn anew at every step.

The loss is what the generated network says about other images of the task. Latents of the zoo's own networks would be no target:
many networks solve a task equally well. P, S, C = prompts, samples of a prompt, classes.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from hub_scripts.evaluation.functional import own_logits, with_image_norms
from hub_scripts.generation.prompts import Prompter
from hub_scripts.zoos.tasks import Task

FEWEST_SHOTS = 3  # samples of a class in a training prompt; up to twice as many as prompts shall have later
MAX_GRAD_NORM = 1.0
WARMUP = 0.1  # share of the steps in which the learning rate rises


class Episode(NamedTuple):
    """Tasks with a prompt and other images each.

    Args:
        images (`torch.Tensor` of shape `(prompts, samples, channels, height, width)`): float32.
        labels (`torch.Tensor` of shape `(prompts, samples)`): int64.
        query_images (`torch.Tensor` of shape `(prompts, queries, channels, height, width)`): float32, none of the prompt's.
        query_labels (`torch.Tensor` of shape `(prompts, queries)`): int64.
    """

    images: torch.Tensor
    labels: torch.Tensor
    query_images: torch.Tensor
    query_labels: torch.Tensor


def draw_samples(
    labels: torch.Tensor, classes: Sequence[int], shots: int, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose images of each class at random.

    Args:
        labels (`torch.Tensor` of shape `(images,)`): int64.
        classes (`Sequence[int]`): which, in the order of their new numbers.
        shots (`int`): images of each; all where there are fewer.
        generator (`np.random.Generator`): of the choice.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: rows of the images and their new labels, each `(samples,)` int64, by class.
    """
    labels = labels.numpy()
    rows = [generator.permutation(np.flatnonzero(labels == known))[:shots] for known in classes]
    numbers = np.repeat(np.arange(len(rows)), [len(found) for found in rows])
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(numbers)


class Episodes:
    """Draws tasks from the training images of all classes, except those that are kept for a test.

    Args:
        task ([`Task`]): all classes.
        num_classes (`int`): classes of each task drawn.
        held_out (`Collection[Sequence[int]]`): choices of classes that are not drawn, in whatever order; where hardly any choice
            would be left, other orders of theirs may be drawn.
        generator (`np.random.Generator`): of all draws.

    Raises:
        ValueError: If nothing is left to draw, or a class has fewer than two training images.
    """

    def __init__(
        self, task: Task, num_classes: int, held_out: Collection[Sequence[int]], generator: np.random.Generator
    ):
        self.images, self.labels = task.images["train"], task.labels["train"]
        self.total, self.num_classes, self.generator = task.num_classes, num_classes, generator
        sets = {frozenset(chosen) for chosen in held_out}
        self.key = frozenset if 2 * len(sets) <= math.comb(self.total, num_classes) else tuple
        self.held_out = {self.key(chosen) for chosen in held_out}
        if self.key is tuple and len(self.held_out) >= math.perm(self.total, num_classes):
            raise ValueError(
                f"all orders of {num_classes} of {self.total} classes are held out, none is left to train on."
            )
        counts = self.labels.bincount(minlength=self.total)
        self.fewest = int(counts.min())  # images of a class
        if self.fewest < 2:
            raise ValueError(
                f"{task.name} has {self.fewest} training images of class {int(counts.argmin())}, a prompt and what it is judged on "
                "take one each."
            )

    def draw_classes(self) -> tuple[int, ...]:
        """The classes of one task, in order."""
        while True:
            chosen = tuple(self.generator.permutation(self.total)[: self.num_classes].tolist())
            if self.key(chosen) not in self.held_out:
                return chosen

    def draw(self, count: int, shots: int, queries: int) -> Episode:
        """Tasks with prompts of `shots` images and `queries` others of each class; fewer where a class has too few."""
        shots = max(1, min(shots, self.fewest // 2))
        queries = max(1, min(queries, self.fewest - shots))
        each = shots + queries
        prompts, others = [], []
        for _ in range(count):
            rows, _ = draw_samples(self.labels, self.draw_classes(), each, self.generator)
            rows = rows.view(self.num_classes, each)
            prompts.append(rows[:, :shots].flatten())
            others.append(rows[:, shots:].flatten())
        numbers = torch.arange(self.num_classes)
        return Episode(
            self.images[torch.stack(prompts)],
            numbers.repeat_interleave(shots).expand(count, -1),
            self.images[torch.stack(others)],
            numbers.repeat_interleave(queries).expand(count, -1),
        )


def train_prompter(
    prompter: Prompter,
    episodes: Episodes,
    *,
    steps: int,
    batch_size: int,
    shots: int,
    queries: int,
    learning_rate: float,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train the generator of a prompter in place; the SANE model stays as it is.

    Args:
        prompter ([`Prompter`]): to train.
        episodes ([`Episodes`]): where tasks come from.
        steps (`int`): of AdamW, with a learning rate that rises and falls once.
        batch_size (`int`): tasks in a step.
        shots (`int`): samples of each class that prompts shall have later; in training from 3 to twice as many.
        queries (`int`): images of each class that a generated network is judged on.
        learning_rate (`float`): highest learning rate.
        report (`Callable`): called after each step with its number, from 1, and the cross-entropy of the generated networks.

    Raises:
        ValueError: If the loss is not finite.
    """
    generator, module = prompter.generator.train(), with_image_norms(prompter.module)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 2), pct_start=WARMUP
    )
    lowest = min(FEWEST_SHOTS, shots)
    for step in range(1, steps + 1):
        drawn = int(episodes.generator.integers(lowest, 2 * shots + 1))
        episode = episodes.draw(batch_size, drawn, queries)
        made = generator(episode.images, episode.labels)
        logits = own_logits(module, prompter.decode(made.latents), episode.query_images)
        loss = F.cross_entropy(logits.flatten(0, 1), episode.query_labels.flatten())
        apart = generator.prototype_loss(made.class_vectors, episode.query_images, episode.query_labels)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {step}; lower --learning-rate.")
        optimizer.zero_grad()
        (loss + apart).backward()
        torch.nn.utils.clip_grad_norm_(generator.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        report(step, loss.item())
    generator.eval()
