"""Reconstruction, function and health on the networks of validation splits, shared out among the processes."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator

from hub_scripts.codec import Codec
from hub_scripts.evaluation.functional import condition_norms, evaluate
from hub_scripts.training.parts import Part

MAX_NETWORKS = 64  # whose function is measured: last checkpoints
MAX_IMAGES = 2000  # on which it is
MAX_VALUES = 50_000_000  # weights that are held in memory; of a larger split, checkpoints at equal distances
DEAD = 1e-3  # a latent that varies less than this share of the liveliest one says nothing


class Validation:
    """Measures a model on all parts of a run.

    Args:
        parts (`Sequence[tuple[Part, Codec]]`): what to measure on.
        accelerator (`Accelerator`): of the run.
    """

    def __init__(self, parts: Sequence[tuple[Part, Codec]], accelerator: Accelerator):
        self._parts = [_PartValidation(part, codec, accelerator) for part, codec in parts]

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        """Scores: means over the parts, and where there are several, `name/part` of each.

        Returns:
            `dict[str, float]`: `r2` over all real values; `accuracy_decoded` (norms with running statistics of train images:
            decoded ones do not fit) and `accuracy_original` on the tasks' validation images, if there are tasks;
            `effective_rank` of the latents (the exponential of the entropy of their covariance's eigenvalues, Roy and
            Vetterli 2007) and `dead_latents`, the share that hardly varies; `r2/<layer>` of each layer, if there is one part.
        """
        model.eval()
        found = {part.name: part() for part in self._parts}
        names = dict.fromkeys(name for scores in found.values() for name in scores if not name.startswith("r2/"))
        means = {name: float(np.mean([s[name] for s in found.values() if name in s])) for name in names}
        if len(found) == 1:
            return means | next(iter(found.values()))
        return means | {f"{name}/{part}": s[name] for part, s in found.items() for name in names if name in s}


class _PartValidation:
    def __init__(self, part: Part, codec: Codec, accelerator: Accelerator):
        self.name, self.codec, self.accelerator = part.name, codec, accelerator
        cache = part.validation
        every = -(-len(cache) * codec.layout.num_tokens * codec.layout.token_size // MAX_VALUES)
        rows = np.arange(0, len(cache), every)[accelerator.process_index :: accelerator.num_processes]
        self.tokens = codec.normalize(cache.tokens(rows))
        self.module = part.zoo.module if part.zoo.can_run else None
        if self.module is not None:
            epochs = part.zoo.column("validation", "epoch")
            last = torch.from_numpy(epochs[rows] == epochs.max())
            self.chosen = last.nonzero().flatten()[:MAX_NETWORKS]
            self.images = part.zoo.whole_task.images["validation"][:MAX_IMAGES]
            self.labels = part.zoo.labels("validation", "validation", rows[self.chosen.numpy()])[..., :MAX_IMAGES]
            self.norm_images = part.zoo.whole_task.images["train"][:MAX_IMAGES]
            # what the originals can do never changes
            self.hits_original = self._accuracy(self.tokens[self.chosen]) * len(self.chosen)
        mask = codec.layout.value_mask
        self.layers = torch.zeros(mask.shape, dtype=torch.int64)
        for number, layer in enumerate(codec.layout.layers):
            self.layers[layer.first_token : layer.first_token + layer.num_tokens] = number
        self.layers = self.layers[mask]

    def __call__(self) -> dict[str, float]:
        latents = self.codec.encode(self.tokens)
        decoded = self.codec.decode(latents)
        mask = self.codec.layout.value_mask
        values = self.tokens[:, mask].double()
        # per layer: squared error, sum, sum of squares, count
        count = len(self.codec.layout.layers)
        sums = torch.zeros(4, count, dtype=torch.float64)
        for place, found in enumerate(
            (
                ((decoded[:, mask] - values) ** 2).sum(0),
                values.sum(0),
                (values**2).sum(0),
                torch.full_like(values.sum(0), len(values)),
            )
        ):
            sums[place].index_add_(0, self.layers, found)
        flat = latents.flatten(0, 1).double()
        covariance = [flat.T @ flat, flat.sum(0), torch.tensor([float(len(flat))])]
        totals = [sums.flatten(), *(found.flatten().double() for found in covariance)]
        if self.module is not None:
            hits = self._accuracy(decoded[self.chosen], new_norms=True) * len(self.chosen)
            totals.append(torch.tensor([hits, self.hits_original, len(self.chosen)], dtype=torch.float64))
        joined = torch.cat(totals).to(self.accelerator.device)
        joined = self.accelerator.reduce(joined, "sum").cpu()
        size = latents.shape[-1]
        sums, second, first, number, *rest = joined.split(
            [4 * count, size * size, size, 1, *([3] if self.module else [])]
        )
        scores = _r2(sums.view(4, count), [layer.name for layer in self.codec.layout.layers])
        scores |= _health(second.view(size, size) / number - torch.outer(first / number, first / number))
        if rest:
            hits, originals, networks = rest[0].tolist()
            scores |= {"accuracy_decoded": hits / networks, "accuracy_original": originals / networks}
        return scores

    def _accuracy(self, tokens: torch.Tensor, new_norms: bool = False) -> float:
        """Mean accuracy of networks given as tokens, on wish with running statistics of train images; 0 if this process has none."""
        if not len(tokens):
            return 0.0
        self.module.to("cpu")
        tensors = self.codec.tensors(tokens)
        if new_norms:
            tensors = condition_norms(self.module, tensors, self.norm_images)
        return float(evaluate(self.module, tensors, self.images, self.labels).accuracy.mean())


def _r2(sums: torch.Tensor, names: list[str]) -> dict[str, float]:
    """R² of all values and of each layer, from squared errors, sums, sums of squares and counts `(4, layers)`."""

    def r2(error: float, total: float, squares: float, count: float) -> float:
        spread = squares - total**2 / max(count, 1.0)
        return 1 - error / spread if spread > 0 else float("nan")

    scores = {"r2": r2(*sums.sum(1).tolist())}
    for name, column in zip(names, sums.T.tolist(), strict=True):
        if column[3]:
            scores[f"r2/{name}"] = r2(*column)
    return scores


def _health(covariance: torch.Tensor) -> dict[str, float]:
    spread = covariance.diagonal().clamp_min(0).sqrt()
    shares = torch.linalg.eigvalsh(covariance).clamp_min(0)
    shares = shares / shares.sum().clamp_min(1e-30)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum()
    return {
        "effective_rank": entropy.exp().item(),
        "dead_latents": (spread < DEAD * spread.max()).double().mean().item(),
    }
