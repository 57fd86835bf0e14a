"""Layers of many checkpoints: size and spectrum of the weights, embeddings, and how far off a layer is among its kind."""

import importlib.util
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from sklearn.covariance import LedoitWolf
from sklearn.model_selection import GroupKFold

from hub_scripts.evaluation.features import layer_mean_std
from tokenization_sane import LayerLayout

FEWEST_EIGENVALUES = 10  # a tail of fewer says nothing about an exponent
FEWEST_AT_EPOCH = 10  # train rows of one epoch that are enough to compare with
FOLDS = 5
STATISTICS = ("norm", "std", "spectral_norm", "alpha")


# ---------------------------------------------------------------------------------------------------- weights
def weight_profile(
    tensors: Mapping[str, torch.Tensor], layer: LayerLayout, fit: str | None = None
) -> dict[str, np.ndarray]:
    """Size and spectrum of one layer in many networks.

    Norm and standard deviation are of all values of the layer; spectral norm and exponent of its largest tensor with at least
    two axes.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): stacked networks, each `(networks, *shape)`, float.
        layer ([`LayerLayout`]): one of their layout.
        fit (`str`, *optional*): how exponents are found, one of those of [`exponent_fit`], which chooses by default.

    Returns:
        `dict[str, np.ndarray]`: `norm`, `std`, `spectral_norm` and `alpha`, each `(networks,)` float64. NaN: the layer has no
        matrix, or fewer than `FEWEST_EIGENVALUES`.
    """
    values = torch.cat([tensors[tensor.name].flatten(1) for tensor in layer.tensors], dim=1).double()
    found = {"norm": values.norm(dim=1).numpy(), "std": values.std(dim=1, correction=0).numpy()}
    nothing = np.full(len(values), np.nan)
    matrices = [tensor for tensor in layer.tensors if len(tensor.real_shape) > 1]
    if not matrices:
        return found | {"spectral_norm": nothing, "alpha": nothing}
    tensor = max(matrices, key=lambda one: one.numel)
    stacked = tensors[tensor.name]
    tables = tensor.to_table(stacked)  # (networks, rows, columns)
    found["spectral_norm"] = spectral_norm(tables).numpy()
    is_kernel = layer.kind == "conv" and len(tensor.shape) > 2
    slices = _kernel_slices(stacked, tensor.row_axis) if is_kernel else tables[:, None]
    found["alpha"] = np.array([power_law_exponent(eigenvalues(one), fit) for one in slices])
    return found


def spectral_norm(matrices: torch.Tensor) -> torch.Tensor:
    """Largest singular values `(...)`, float64, of matrices `(..., rows, columns)`, none of them empty."""
    return _squared_singular_values(matrices)[..., -1].sqrt()


def _squared_singular_values(matrices: torch.Tensor) -> torch.Tensor:
    """`(..., min(rows, columns))`, rising: of the smaller product of a matrix with itself, several times faster than an SVD."""
    matrices = matrices.double()
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    product = matrices @ matrices.mT if is_wide else matrices.mT @ matrices
    return torch.linalg.eigvalsh(product).clamp(min=0)


def _kernel_slices(tensor: torch.Tensor, row_axis: int) -> torch.Tensor:
    """A matrix of channels for each position of the kernel: `(networks, out, in, *kernel)` to `(networks, positions, out, in)`."""
    return tensor.movedim(row_axis + 1, 1).flatten(3).movedim(3, 1)


def eigenvalues(matrices: torch.Tensor) -> np.ndarray:
    """Eigenvalues of W Wᵀ of all matrices together, without those that are zero up to rounding.

    WeightWatcher takes a kernel as one matrix for each of its positions, and their eigenvalues as one sample. It drops what is
    below 1e-5; here the limit is that of the numerical rank, so that the exponent does not depend on the scale of the weights.

    Args:
        matrices (`torch.Tensor` of shape `(matrices, rows, columns)`): float.

    Returns:
        `np.ndarray`: `(eigenvalues,)` float64, in no order.
    """
    values = _squared_singular_values(matrices)
    smallest = max(matrices.shape[1:]) * torch.finfo(torch.float32).eps  # singular value; weights are float32 at best
    return values[values > values[:, -1:] * smallest**2].numpy()


def power_law_exponent(values: np.ndarray, fit: str | None = None) -> float:
    """The exponent alpha of a density that falls as `value ** -alpha` in the tail.

    Args:
        values (`np.ndarray` of shape `(eigenvalues,)`): positive.
        fit (`str`, *optional*): one of those of [`exponent_fit`], which chooses by default.

    Returns:
        `float`: the exponent; NaN for fewer than `FEWEST_EIGENVALUES`, or if they do not differ.
    """
    if len(values) < FEWEST_EIGENVALUES or np.ptp(values) <= 1e-9 * values.max():
        return float("nan")
    if (fit or exponent_fit()) == "hill":
        return hill_exponent(values)
    import powerlaw  # optional, and slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tails that it tries and drops, and of its own old names
        return float(powerlaw.Fit(values, verbose=False).alpha)


def exponent_fit() -> str:
    """How exponents are found: `"powerlaw"` (as WeightWatcher: the start of the tail that fits best) if installed, or `"hill"`."""
    return "powerlaw" if importlib.util.find_spec("powerlaw") else "hill"


def hill_exponent(values: np.ndarray) -> float:
    """Hill's estimate of the exponent from the upper half of the values `(eigenvalues,)`; NaN if those do not differ."""
    values = np.sort(values)[::-1]
    count = len(values) // 2
    total = np.log(values[:count] / values[count]).sum()
    return float(1 + count / total) if total > 0 else float("nan")


# ---------------------------------------------------------------------------------------------------- embeddings
def layer_embeddings(latents: np.ndarray | torch.Tensor, layer_ids: np.ndarray | torch.Tensor) -> np.ndarray:
    """Mean and standard deviation over the latents of each layer.

    Args:
        latents (`np.ndarray` or `torch.Tensor` of shape `(checkpoints, tokens, latent_size)`): float.
        layer_ids (`np.ndarray` or `torch.Tensor` of shape `(tokens,)`): int; the layer of each token.

    Returns:
        `np.ndarray` of shape `(checkpoints, layers, 2 * latent_size)`: float32, layers that have tokens, in the order of their
        ids.
    """
    found = layer_mean_std(latents, layer_ids)
    return found.reshape(len(found), len(np.unique(layer_ids)), -1)


def drift(embeddings: np.ndarray, model_ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Distance of each checkpoint's layers from those of the first epoch that there is of its model.

    Args:
        embeddings (`np.ndarray` of shape `(checkpoints, layers, features)`): of [`layer_embeddings`].
        model_ids (`np.ndarray` of shape `(checkpoints,)`): which network each is of.
        epochs (`np.ndarray` of shape `(checkpoints,)`): int.

    Returns:
        `np.ndarray` of shape `(checkpoints, layers)`.
    """
    first: dict[str, int] = {}
    for row in np.argsort(epochs, kind="stable"):
        first.setdefault(model_ids[row], row)
    return np.linalg.norm(embeddings - embeddings[[first[model] for model in model_ids]], axis=-1)


# ---------------------------------------------------------------------------------------------------- outliers
def outlier_scores(
    embeddings: np.ndarray, model_ids: np.ndarray, epochs: np.ndarray, is_train: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far one layer is off in each checkpoint, compared with the train split.

    The distance is Mahalanobis', from the median of train rows and with the covariance of Ledoit and Wolf; they are of the same
    epoch where there are `FEWEST_AT_EPOCH` of it, else of all epochs. A row looks nearer to what it was itself fitted on, so the
    distances of train rows are found in `FOLDS` parts, each fitted on the models of the others.

    Args:
        embeddings (`np.ndarray` of shape `(checkpoints, features)`): of one layer.
        model_ids (`np.ndarray` of shape `(checkpoints,)`): which network each is of.
        epochs (`np.ndarray` of shape `(checkpoints,)`): int.
        is_train (`np.ndarray` of shape `(checkpoints,)`): bool.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: each `(checkpoints,)`. The score, which is the distance less the median of
        the train rows' and divided by their spread (of the median absolute deviation); the percentage of train rows that are not
        farther off; and whether these were of the same epoch.

    Raises:
        ValueError: If the train split holds fewer than two models.
    """
    embeddings = np.asarray(embeddings, np.float64)
    if len(np.unique(model_ids[is_train])) < 2:
        raise ValueError("outliers are told by the train split, which must hold at least two models.")
    scores, percentiles = np.empty(len(embeddings)), np.empty(len(embeddings))
    counts = {epoch: (epochs[is_train] == epoch).sum() for epoch in np.unique(epochs)}
    own = {
        epoch: count >= FEWEST_AT_EPOCH and len(np.unique(model_ids[is_train & (epochs == epoch)])) > 1
        for epoch, count in counts.items()
    }
    same_epoch = np.array([own[epoch] for epoch in epochs], bool)
    groups = [(epochs == epoch, is_train & (epochs == epoch)) for epoch, enough in own.items() if enough]
    groups.append((~same_epoch, is_train))
    floor = _variance_floor(embeddings[is_train])
    for members, reference in groups:
        if not members.any():
            continue
        distances = np.full(len(embeddings), np.nan)
        others = members & ~reference
        if others.any():
            distances[others] = _distances(embeddings[others], embeddings[reference], floor)
        rows = np.flatnonzero(reference)
        folds = GroupKFold(min(FOLDS, len(np.unique(model_ids[rows]))))
        for kept, left_out in folds.split(rows, groups=model_ids[rows]):
            distances[rows[left_out]] = _distances(embeddings[rows[left_out]], embeddings[rows[kept]], floor)
        usual = np.median(distances[rows])
        # a Gaussian's distances spread by 0.7; where train rows are all alike the spread would be rounding
        spread = max(1.4826 * np.median(np.abs(distances[rows] - usual)), 0.1)
        scores[members] = (distances[members] - usual) / spread
        ranks = np.searchsorted(np.sort(distances[rows]), distances[members], side="right")
        percentiles[members] = 100 * ranks / len(rows)
    return scores, percentiles, same_epoch


def _variance_floor(embeddings: np.ndarray) -> float:
    """Variance that counts as none: untouched biases of epoch 0 are alike up to rounding."""
    deviations = np.square(embeddings - np.median(embeddings, axis=0)).mean()
    return float(1e-6 * deviations + 1e-8 * np.square(embeddings).mean() + 1e-30)


def _distances(embeddings: np.ndarray, reference: np.ndarray, floor: float) -> np.ndarray:
    """Mahalanobis distances `(rows,)` of embeddings `(rows, features)` from reference rows `(others, features)`."""
    centre = np.median(reference, axis=0)
    covariance = LedoitWolf(assume_centered=True).fit(reference - centre).covariance_
    factor = cho_factor(covariance + floor * np.eye(len(covariance)))
    deviations = embeddings - centre
    return np.sqrt(np.einsum("ij,ij->i", deviations, cho_solve(factor, deviations.T).T))
