"""What SANE has to beat: features straight from the weights, a PCA of tokens, and simple ways to make new networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hub_scripts.evaluation.features import QUANTILES
from hub_scripts.evaluation.functional import build_module
from hub_scripts.evaluation.moments import over_depth

BLOCK_BYTES = 2**28  # the largest intermediate array


def weight_features(weights: Mapping[str, np.ndarray | torch.Tensor]) -> np.ndarray:
    """The flattened weights, `W`.

    Args:
        weights (`Mapping[str, np.ndarray | torch.Tensor]`): stacked tensors, each `(checkpoints, *shape)`; integer and bool
            tensors are left out.

    Returns:
        `np.ndarray` of shape `(checkpoints, parameters)`: float32, tensors in the order of the mapping.

    Raises:
        ValueError: If there is no floating tensor, or their numbers of checkpoints differ.
    """
    return np.concatenate(list(_flat(weights).values()), axis=1)


def layer_statistics(
    weights: Mapping[str, np.ndarray | torch.Tensor], groups: Sequence[Sequence[str]] | None = None
) -> np.ndarray:
    """Statistics of the weights, `s(W)` of Unterthiner et al. 2020: mean, variance and the quantiles 1, 25, 50, 75, 99 %.

    Args:
        weights (`Mapping[str, np.ndarray | torch.Tensor]`): stacked tensors, each `(checkpoints, *shape)`; integer and bool
            tensors are left out.
        groups (`Sequence[Sequence[str]]`, *optional*): names of tensors that are described together, e.g. those of a layer.
            Without it every tensor stands alone, so weights and biases are apart.

    Returns:
        `np.ndarray` of shape `(checkpoints, groups * 7)`: float32.

    Raises:
        ValueError: If a group names a tensor that is not there, or as in [`weight_features`].
    """
    flat = _flat(weights)
    groups = [[name] for name in flat] if groups is None else groups
    missing = [name for group in groups for name in group if name not in flat]
    if missing:
        raise ValueError(f"groups name {missing[0]}, but the floating weights are {', '.join(flat)}.")
    return np.concatenate(
        [_statistics(np.concatenate([flat[name] for name in group], axis=1)) for group in groups], axis=1
    )


def network_statistics(weights: Mapping[str, np.ndarray | torch.Tensor]) -> np.ndarray:
    """s(W) of what networks of any architecture have: first and last matrix, and means and deviations over depth.

    Args:
        weights (`Mapping[str, np.ndarray | torch.Tensor]`): stacked tensors, each `(checkpoints, *shape)`.

    Returns:
        `np.ndarray` of shape `(checkpoints, 6 * 7)`: float32; matrices and convolutions first, vectors last.
    """
    return over_depth((_statistics(values), weights[name].ndim > 2) for name, values in _flat(weights).items())


@dataclass(frozen=True)
class TokenPCA:
    """A linear autoencoder of tokens; made by [`token_pca`].

    Args:
        mean (`np.ndarray` of shape `(tokens or 1, token_size)`): float64.
        directions (`np.ndarray` of shape `(tokens or 1, token_size, components)`): float64, orthonormal columns.
        value_mask (`np.ndarray` of shape `(tokens, token_size)`): bool, True on real values.
    """

    mean: np.ndarray
    directions: np.ndarray
    value_mask: np.ndarray

    def reconstruct(self, tokens: np.ndarray | torch.Tensor) -> np.ndarray:
        """Project tokens `(checkpoints, tokens, token_size)` on the components and back: float32, zero where nothing stands."""
        centred = np.where(self.value_mask, np.asarray(tokens), 0.0) - self.mean
        codes = np.einsum("bnd,ndk->bnk", centred, np.broadcast_to(self.directions, self._shape), optimize=True)
        back = np.einsum("bnk,ndk->bnd", codes, np.broadcast_to(self.directions, self._shape), optimize=True)
        return np.where(self.value_mask, back + self.mean, 0.0).astype(np.float32)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (len(self.value_mask), *self.directions.shape[1:])


def token_pca(
    train_tokens: np.ndarray | torch.Tensor,
    value_mask: np.ndarray | torch.Tensor,
    components: int,
    per_position: bool = True,
) -> TokenPCA:
    """Fit a PCA of tokens: the floor for a reconstruction with `components` latent values a token.

    Args:
        train_tokens (`np.ndarray` or `torch.Tensor` of shape `(checkpoints, tokens, token_size)`): float, of the train split.
        value_mask (`np.ndarray` or `torch.Tensor` of shape `(tokens, token_size)`): bool, True on real values.
        components (`int`): latent values a token; more than `token_size` are cut to it.
        per_position (`bool`): True fits a PCA to each token position (the stronger floor), False one to all tokens together.

    Returns:
        [`TokenPCA`]: with the method `reconstruct`.

    Raises:
        ValueError: If the shapes do not fit or `components` is less than 1.
    """
    tokens, mask = np.asarray(train_tokens), np.asarray(value_mask, bool)
    if tokens.ndim != 3 or mask.shape != tokens.shape[1:]:
        raise ValueError(
            f"train_tokens have shape {tokens.shape} and value_mask {mask.shape}, expected (checkpoints, tokens, token_size) "
            "and (tokens, token_size)."
        )
    if components < 1:
        raise ValueError(f"components is {components}, expected at least 1.")
    tokens = np.where(mask, tokens, 0.0)
    samples = (
        tokens.swapaxes(0, 1) if per_position else tokens.reshape(1, -1, tokens.shape[-1])
    )  # (positions, samples, token_size)
    step = max(1, BLOCK_BYTES // (8 * samples[0].size))
    parts = [_principal(samples[i : i + step], components) for i in range(0, len(samples), step)]
    mean, directions = (np.concatenate(part) for part in zip(*parts, strict=True))
    return TokenPCA(mean, directions, mask)


def r2_score_masked(
    tokens: np.ndarray | torch.Tensor,
    reconstruction: np.ndarray | torch.Tensor,
    value_mask: np.ndarray | torch.Tensor,
    mean: float | np.ndarray | None = None,
) -> float:
    """One R² over all real values of all checkpoints.

    Args:
        tokens (`np.ndarray` or `torch.Tensor` of shape `(checkpoints, tokens, token_size)`): the originals.
        reconstruction (`np.ndarray` or `torch.Tensor` of shape `(checkpoints, tokens, token_size)`): what is judged.
        value_mask (`np.ndarray` or `torch.Tensor` of shape `(tokens, token_size)`): bool, True on real values.
        mean (`float` or `np.ndarray` of shape `(tokens, token_size)`, *optional*): what R² = 0 stands for; the mean of all
            real values of `tokens` if not given.

    Returns:
        `float`: 1 - squared error / squared deviation from `mean`; NaN where nothing deviates.
    """
    mask = np.asarray(value_mask, bool)
    values = np.asarray(tokens)[:, mask].astype(np.float64)
    error = np.square(values - np.asarray(reconstruction)[:, mask]).sum()
    centre = values.mean() if mean is None else np.broadcast_to(mean, mask.shape)[mask]
    total = np.square(values - centre).sum()
    return float(1 - error / total) if total > 0 else float("nan")


def nearest_distances(
    queries: np.ndarray | torch.Tensor, references: np.ndarray | torch.Tensor, chunk_size: int = 1024
) -> np.ndarray:
    """Euclidean distance of each query to its nearest reference.

    Args:
        queries (`np.ndarray` or `torch.Tensor` of shape `(queries, values)`): float.
        references (`np.ndarray` or `torch.Tensor` of shape `(references, values)`): float.
        chunk_size (`int`): queries at a time.

    Returns:
        `np.ndarray` of shape `(queries,)`: float64.

    Raises:
        ValueError: If there is no reference or the widths differ.
    """
    queries, references = np.asarray(queries, np.float64), np.asarray(references, np.float64)
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1] or not len(references):
        raise ValueError(
            f"queries have shape {queries.shape} and references {references.shape}, expected two matrices of the same width "
            "and at least one reference."
        )
    squares = np.square(references).sum(1)
    distances = np.empty(len(queries))
    for start in range(0, len(queries), chunk_size):
        part = queries[start : start + chunk_size]
        nearest = (squares - 2 * part @ references.T).argmin(1)
        # the product only ranks: subtracting squares would lose the digits of a near copy
        distances[start : start + chunk_size] = np.linalg.norm(part - references[nearest], axis=1)
    return distances


def noise_around(
    anchors: torch.Tensor, std: torch.Tensor, strength: float, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Anchors plus Gaussian noise, each anchor used equally often.

    Args:
        anchors (`torch.Tensor` of shape `(anchors, values)`): flattened weights.
        std (`torch.Tensor` of shape `(values,)`): scale of each value, e.g. its standard deviation over the train split.
        strength (`float`): noise in units of `std`.
        count (`int`): networks to make.
        generator (`torch.Generator`): source of the noise.

    Returns:
        `torch.Tensor` of shape `(count, values)`.
    """
    chosen = anchors[torch.arange(count) % len(anchors)]
    return chosen + strength * std * torch.randn(chosen.shape, generator=generator, dtype=chosen.dtype)


def average_anchors(
    anchors: torch.Tensor, count: int, subset_size: int, generator: torch.Generator, share: float = 1.0
) -> torch.Tensor:
    """Means of random subsets of aligned anchors, or anchors that go a part of the way there.

    Args:
        anchors (`torch.Tensor` of shape `(anchors, values)`): flattened weights, aligned with each other.
        count (`int`): networks to make.
        subset_size (`int`): anchors in a mean, drawn without repetition.
        generator (`torch.Generator`): source of the subsets.
        share (`float`): how far each goes from the first of its anchors (0) to their mean (1).

    Returns:
        `torch.Tensor` of shape `(count, values)`.

    Raises:
        ValueError: If there are fewer anchors than `subset_size`.
    """
    if not 1 <= subset_size <= len(anchors):
        raise ValueError(f"subset_size is {subset_size}, expected 1 to {len(anchors)}, the number of anchors.")
    chosen = torch.rand(count, len(anchors), generator=generator).argsort(1)[:, :subset_size]
    shares = torch.zeros(count, len(anchors), dtype=anchors.dtype).scatter_(1, chosen, 1 / subset_size)
    return torch.lerp(anchors[chosen[:, 0]], shares @ anchors, share)


def from_scratch(architecture: str, kwargs: Mapping[str, Any], count: int, seed: int) -> dict[str, torch.Tensor]:
    """Networks as the architecture initialises itself, stacked `(count, *shape)`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = [build_module(architecture, kwargs).state_dict() for _ in range(count)]
    return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}


def _flat(weights: Mapping[str, np.ndarray | torch.Tensor]) -> dict[str, np.ndarray]:
    """Floating tensors as `(checkpoints, values)` float32."""
    flat = {}
    for name, stacked in weights.items():
        if isinstance(stacked, torch.Tensor):
            if not stacked.is_floating_point():
                continue
            stacked = stacked.detach().cpu().float().numpy()
        elif not np.issubdtype(stacked.dtype, np.floating):
            continue
        if stacked.size:
            flat[name] = stacked.reshape(len(stacked), -1).astype(np.float32, copy=False)
    sizes = {len(values) for values in flat.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"found stacks of {sorted(sizes)} checkpoints, expected floating tensors with one number of checkpoints."
        )
    return flat


def _statistics(values: np.ndarray) -> np.ndarray:
    """(checkpoints, values) -> (checkpoints, 7)."""
    quantiles = np.quantile(values, QUANTILES, axis=1)
    return np.concatenate([values.mean(1)[None], values.var(1)[None], quantiles]).T.astype(np.float32)


def _principal(samples: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean `(positions, token_size)` and leading directions `(positions, token_size, components)`."""
    samples = samples.astype(np.float64)
    mean = samples.mean(1)
    centred = samples - mean[:, None]
    _, vectors = np.linalg.eigh(centred.swapaxes(1, 2) @ centred)  # ascending
    return mean, vectors[:, :, ::-1][:, :, :components]
