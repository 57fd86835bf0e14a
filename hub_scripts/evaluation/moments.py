"""Moments of weights: how the values of each tensor are distributed, whatever the order of the units.

More than s(W) of Unterthiner et al. 2020, and in forms that a linear probe can use: the scale of a tensor stands in them
as itself, its square and its logarithm, and the shape of its distribution (skew, kurtosis, largest magnitude) apart from its
scale.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NUM_MOMENTS = 9 + len(QUANTILES)


def moments(values: np.ndarray) -> np.ndarray:
    """Moments of values `(networks, ...)`: float64 `(networks, NUM_MOMENTS)`.

    Mean, standard deviation, variance, mean magnitude, the logarithms of standard deviation, kurtosis, mean and largest
    magnitude, skew, and the quantiles 1, 5, 25, 50, 75, 95 and 99 %.
    """
    x = values.reshape(len(values), -1).astype(np.float64)
    mean, var, size = x.mean(1), x.var(1) + 1e-12, np.abs(x)
    centred = x - mean[:, None]
    skew, kurtosis = (np.power(centred, power).mean(1) / np.power(var, power / 2) for power in (3, 4))
    scales = [mean, np.sqrt(var), var, size.mean(1), np.log(var) / 2]
    shape = [np.log(kurtosis + 1e-3), skew, np.log(size.mean(1) + 1e-9), np.log(size.max(1) + 1e-9)]
    return np.stack([*scales, *shape, *np.quantile(x, QUANTILES, axis=1)], axis=1)


def layer_moments(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Moments of each floating tensor.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): stacked networks, each `(networks, *shape)`.

    Returns:
        `np.ndarray` of shape `(networks, tensors * NUM_MOMENTS)`: float64, tensors in their order.
    """
    return np.concatenate([moments(values) for values in _floating(tensors).values()], axis=1)


def network_moments(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Moments that networks of any architecture have: of the first and the last matrix, and means and deviations over depth.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): stacked networks, each `(networks, *shape)`.

    Returns:
        `np.ndarray` of shape `(networks, 6 * NUM_MOMENTS)`: float64; matrices and convolutions first, vectors last.
    """
    return over_depth((moments(values), values.ndim > 2) for values in _floating(tensors).values())


def over_depth(statistics: Iterable[tuple[np.ndarray, bool]]) -> np.ndarray:
    """What statistics of tensors say that networks of any depth have.

    Args:
        statistics (`Iterable[tuple[np.ndarray, bool]]`): of each tensor, in order, `(networks, statistics)`; and whether it is a
            matrix or kernel, of which there must be one.

    Returns:
        `np.ndarray` of shape `(networks, 6 * statistics)`: first and last matrix, mean and deviation over matrices, and over vectors
        (zeros if there are none).
    """
    found = list(statistics)
    matrices = np.stack([values for values, is_matrix in found if is_matrix])
    vectors = [values for values, is_matrix in found if not is_matrix]
    vectors = np.stack(vectors) if vectors else np.zeros_like(matrices[:1])
    parts = [matrices[0], matrices[-1], matrices.mean(0), matrices.std(0), vectors.mean(0), vectors.std(0)]
    return np.concatenate(parts, axis=1)


def _floating(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {
        name: values.float().numpy()
        for name, values in tensors.items()
        if values.is_floating_point() and values.numel()
    }
