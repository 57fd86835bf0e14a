"""Features of checkpoints from their latents; nothing is fitted, so no feature can leak from one checkpoint to another."""

from collections.abc import Callable

import numpy as np
import torch

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)  # as in Unterthiner et al. 2020 with the ends drawn in


def token_mean(latents: np.ndarray | torch.Tensor, layer_ids: np.ndarray | torch.Tensor) -> np.ndarray:
    """Mean latent over all tokens: the paper's embedding of a checkpoint.

    Args:
        latents (`np.ndarray` or `torch.Tensor` of shape `(checkpoints, tokens, latent_size)`): float.
        layer_ids (`np.ndarray` or `torch.Tensor` of shape `(tokens,)`): int; the layer of each token. Not used here.

    Returns:
        `np.ndarray` of shape `(checkpoints, latent_size)`: float32.

    Raises:
        ValueError: If the shapes do not fit.
    """
    return _checked(latents, layer_ids)[0].mean(1)


def layer_mean_std(latents: np.ndarray | torch.Tensor, layer_ids: np.ndarray | torch.Tensor) -> np.ndarray:
    """Mean and standard deviation over each layer's tokens.

    Arguments and errors as in [`token_mean`].

    Returns:
        `np.ndarray` of shape `(checkpoints, layers * 2 * latent_size)`: float32, layers in the order of their ids.
    """
    return _per_layer(latents, layer_ids, lambda x: np.stack([x.mean(1), x.std(1)], axis=1))


def layer_statistics_of_latents(
    latents: np.ndarray | torch.Tensor, layer_ids: np.ndarray | torch.Tensor
) -> np.ndarray:
    """Mean, standard deviation and the quantiles 1, 25, 50, 75, 99 % over each layer's tokens.

    Arguments and errors as in [`token_mean`].

    Returns:
        `np.ndarray` of shape `(checkpoints, layers * 7 * latent_size)`: float32, layers in the order of their ids.
    """

    def statistics(x: np.ndarray) -> np.ndarray:
        quantiles = np.quantile(x, QUANTILES, axis=1).swapaxes(0, 1)
        return np.concatenate([x.mean(1)[:, None], x.std(1)[:, None], quantiles], axis=1)

    return _per_layer(latents, layer_ids, statistics)


def layer_distribution(latents: np.ndarray | torch.Tensor, layer_ids: np.ndarray | torch.Tensor) -> np.ndarray:
    """How the latent values of each layer are distributed, all of its tokens and latent dimensions together.

    Mean, standard deviation, variance, mean magnitude, logarithms of standard deviation and kurtosis, and the quantiles 1,
    25, 50, 75, 99 %: few numbers, unchanged by the order of the tokens, and a linear probe can bend them (the scale of a
    layer stands in them as itself, its square and its logarithm). Arguments and errors as in [`token_mean`].

    Returns:
        `np.ndarray` of shape `(checkpoints, layers * 11)`: float32, layers in the order of their ids.
    """

    def statistics(x: np.ndarray) -> np.ndarray:
        x = x.reshape(len(x), -1).astype(np.float64)  # (checkpoints, tokens * latent_size)
        mean, var = x.mean(1), x.var(1) + 1e-12
        kurtosis = np.square(np.square(x - mean[:, None])).mean(1) / np.square(var)
        shape = [mean, np.sqrt(var), var, np.abs(x).mean(1), np.log(var) / 2, np.log(kurtosis + 1e-3)]
        return np.stack([*shape, *np.quantile(x, QUANTILES, axis=1)], axis=1)

    return _per_layer(latents, layer_ids, statistics)


FEATURES = {
    "token_mean": token_mean,
    "layer_mean_std": layer_mean_std,
    "layer_statistics_of_latents": layer_statistics_of_latents,
    "layer_distribution": layer_distribution,
}
DEFAULT_FEATURE = "layer_distribution"


def _per_layer(
    latents: np.ndarray | torch.Tensor,
    layer_ids: np.ndarray | torch.Tensor,
    statistics: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Statistics `(checkpoints, statistics, latent_size)` of each layer, side by side in a row."""
    latents, layer_ids = _checked(latents, layer_ids)
    parts = [statistics(latents[:, layer_ids == layer]) for layer in np.unique(layer_ids)]
    return (
        np.stack(parts, axis=1).reshape(len(latents), -1).astype(np.float32)
    )  # (checkpoints, layers * statistics * latent_size)


def _checked(
    latents: np.ndarray | torch.Tensor, layer_ids: np.ndarray | torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(latents, torch.Tensor):
        latents = latents.detach().cpu().float().numpy()
    latents, layer_ids = np.asarray(latents, np.float32), np.asarray(layer_ids)
    if latents.ndim != 3 or layer_ids.shape != latents.shape[1:2]:
        raise ValueError(
            f"latents have shape {latents.shape} and layer_ids {layer_ids.shape}, expected (checkpoints, tokens, latent_size) "
            "and (tokens,)."
        )
    return latents, layer_ids
