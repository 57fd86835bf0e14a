"""Inputs that networks of a zoo agree on, made from the networks alone, and what a network says about them.

A network's weights say what it does only when they run. Instead of data, a zoo's own networks tell what an input of a class looks
like to them: prototypes are optimised until networks of the train split, drawn at random, see the class in them, at several
levels of certainty. Responses to prototypes are the same for all permutations, signs and scales of a network.

Neither images nor properties of the zoo are used, so what is read from responses is read from weights. Learned inputs as probes
of weights: Kahana, Horwitz, Shuval and Hoshen, "Deep Linear Probe Generators for Weight Space Learning" (ICLR 2025); theirs are
trained on the property. Making inputs smooth by giving their frequencies other scales: Olah, Mordvintsev and Schubert, "Feature
Visualization" (Distill 2017).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hub_scripts.evaluation.functional import batched_logits

LEVELS = 10  # prototypes of a class
CERTAINTY = (0.1, 2.2)  # mean cross-entropy of the surest and of the least sure prototype of a class
SMOOTHNESS = 2.0  # power of the frequency that its amplitude is divided by
NETWORKS, STEPS, LEARNING_RATE, NOISE = 16, 150, 0.05, 0.1
CHUNK = 256  # networks whose responses are computed at a time


@dataclass(frozen=True)
class Prototypes:
    """Inputs of all classes.

    Args:
        images (`torch.Tensor` of shape `(prototypes, channels, height, width)`): float32.
        labels (`torch.Tensor` of shape `(prototypes,)`): int64; those of a class stand together, surest first.
    """

    images: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def fit(
        cls,
        module: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        shape: tuple[int, int, int],
        num_classes: int,
        seed: int = 0,
        steps: int = STEPS,
    ) -> "Prototypes":
        """Optimise inputs until networks see their classes in them.

        Args:
            module (`nn.Module`): the architecture.
            tensors (`Mapping[str, torch.Tensor]`): stacked networks of the train split, each `(networks, *shape)`.
            shape (`tuple[int, int, int]`): channels, height and width of an input.
            num_classes (`int`): outputs of the networks.
            seed (`int`): of starts, noise and networks.
            steps (`int`): of Adam.
        """
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(num_classes).repeat_interleave(LEVELS)
        wanted = torch.linspace(*CERTAINTY, LEVELS).repeat(num_classes)
        height, width = shape[-2:]
        frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2).sqrt()
        amplitude = frequency.clamp(min=1 / max(height, width)) ** -SMOOTHNESS
        amplitude = amplitude / amplitude.square().mean().sqrt()
        start = torch.randn(len(labels), shape[0], *amplitude.shape, 2, generator=generator)
        spectrum = (0.3 * start).requires_grad_()
        optimizer = torch.optim.Adam([spectrum], lr=LEARNING_RATE)

        def images() -> torch.Tensor:
            return torch.fft.irfft2(torch.view_as_complex(spectrum) * amplitude, s=(height, width), norm="ortho")

        count = len(next(iter(tensors.values())))
        for _ in tqdm(range(steps), desc="prototypes", unit="step", leave=False):
            rows = torch.randperm(count, generator=generator)[:NETWORKS]
            shown = images()
            shown = shown + NOISE * torch.randn(shown.shape, generator=generator)
            logits = batched_logits(module, {name: values[rows] for name, values in tensors.items()}, shown)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(rows)), reduction="none")
            error = (loss.view(len(rows), -1).mean(0) - wanted).abs().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        return cls(images().detach(), labels)

    @torch.no_grad()
    def responses(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """What networks say about the prototypes.

        Args:
            module (`nn.Module`): the architecture.
            tensors (`Mapping[str, torch.Tensor]`): stacked networks, each `(networks, *shape)`.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: float64 `(networks, prototypes)`, the log-probability of each prototype's class; and
            `(networks, statistics)`, which do not tell the classes apart: means of log-probability, hits and entropy, their
            spread, the means of each level of certainty, and the sorted means of the classes.
        """
        count = len(next(iter(tensors.values())))
        parts = [
            self._responses(
                batched_logits(module, {name: t[i : i + CHUNK] for name, t in tensors.items()}, self.images)
            )
            for i in range(0, count, CHUNK)
        ]
        own, statistics = (np.concatenate(part) for part in zip(*parts, strict=True))
        return own, statistics

    def _responses(self, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        logits = logits.double()
        log_probabilities = logits.log_softmax(-1)
        own = log_probabilities.gather(-1, self.labels.expand(len(logits), -1)[..., None])[..., 0]
        own = own.clamp(min=-30.0)  # a network that is sure of something else must not rule a linear probe
        probabilities = log_probabilities.exp()
        entropy = -(probabilities * log_probabilities.clamp(min=-30.0)).sum(-1)
        hits = (logits.argmax(-1) == self.labels).double()
        by_class = (own.view(len(logits), -1, LEVELS), hits.view(len(logits), -1, LEVELS))
        statistics = [
            torch.stack([own.mean(1), own.std(1), hits.mean(1), entropy.mean(1), entropy.std(1)], 1),
            logits.std(-1).mean(1, keepdim=True).clamp(min=1e-6).log(),
            *(values.mean(1) for values in by_class),  # of each level
            *(values.mean(2).sort(1).values for values in by_class),
            probabilities.mean(1).sort(1).values,
        ]
        return own.numpy(), torch.cat(statistics, 1).numpy()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        save_file({"images": self.images.contiguous(), "labels": self.labels}, path)

    @classmethod
    def load(cls, path: str | Path) -> "Prototypes":
        """Read what [`~Prototypes.save`] wrote."""
        return cls(**load_file(path))
