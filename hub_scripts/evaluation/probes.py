"""Read properties of checkpoints from features: a ridge regression whose strength the validation split chooses."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import kendalltau

ALPHAS = tuple(np.logspace(-3, 6, 19).tolist())


class ProbeResult(NamedTuple):
    """What a probe reaches on the test split.

    Args:
        r2 (`float`): share of the variance explained; NaN if the property does not vary.
        kendall_tau (`float`): rank agreement, -1 to 1; NaN if the property or the prediction does not vary.
        alpha (`float`): strength of the ridge that was best on the validation split; NaN if nothing was fitted.
        predictions (`np.ndarray` of shape `(test_checkpoints,)`): float64.
        note (`str`): what is unusual, in words; empty if nothing is.
    """

    r2: float
    kendall_tau: float
    alpha: float
    predictions: np.ndarray
    note: str = ""


def ridge_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    alphas: Sequence[float] = ALPHAS,
) -> ProbeResult:
    """Ridge regression on standardised features, fitted on the train split only.

    Scaling, constant features and the mean of the property come from the train split; the strength with the smallest
    squared error on the validation split is taken. All strengths share one eigendecomposition, of the features' or the
    checkpoints' products, whichever are fewer.

    Args:
        train_x (`np.ndarray` of shape `(train_checkpoints, features)`): float.
        train_y (`np.ndarray` of shape `(train_checkpoints,)`): the property.
        val_x (`np.ndarray` of shape `(validation_checkpoints, features)`): float.
        val_y (`np.ndarray` of shape `(validation_checkpoints,)`): the property.
        test_x (`np.ndarray` of shape `(test_checkpoints, features)`): float.
        test_y (`np.ndarray` of shape `(test_checkpoints,)`): the property.
        alphas (`Sequence[float]`): strengths to try, positive.

    Returns:
        [`ProbeResult`]: figures and predictions of the test split.

    Raises:
        ValueError: If a split is empty, shapes do not fit or a value is missing.
    """
    sets = _checked({"train": (train_x, train_y), "validation": (val_x, val_y), "test": (test_x, test_y)})
    (x, y), (val_x, val_y), (test_x, test_y) = sets
    if np.ptp(y) == 0:
        return ProbeResult(
            *[float("nan")] * 3, np.full(len(test_y), y[0]), "the property does not vary in the train split"
        )

    mean, std = x.mean(0), x.std(0)
    varies = std > 1e-7 * np.abs(mean)  # float32 features carry no more digits
    if not varies.any():
        return _result(test_y, np.full(len(test_y), y.mean()), float("nan"), "no feature varies in the train split")
    x, val_x, test_x = ((part[:, varies] - mean[varies]) / std[varies] for part in (x, val_x, test_x))

    alphas = np.asarray(alphas, np.float64)
    predict = _ridge_path(x, y - y.mean(), alphas)
    errors = np.square(predict(val_x) + y.mean() - val_y[:, None]).mean(0)
    best = int(errors.argmin())
    note = "the best strength lies at the edge of the grid" if len(alphas) > 1 and best in (0, len(alphas) - 1) else ""
    return _result(test_y, predict(test_x)[:, best] + y.mean(), float(alphas[best]), note)


def bootstrap_r2(
    y: np.ndarray, predictions: np.ndarray, model_ids: Sequence, count: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of R² when other models had been in the test split: whole models are drawn, with all of their checkpoints.

    Args:
        y (`np.ndarray` of shape `(checkpoints,)`): the property.
        predictions (`np.ndarray` of shape `(checkpoints,)`): of the probe.
        model_ids (`Sequence` of length `checkpoints`): which model a checkpoint belongs to.
        count (`int`): draws.
        seed (`int`): of the draws.
        level (`float`): share of the draws inside the interval.

    Returns:
        `tuple[float, float]`: low and high end; NaN where the property does not vary.
    """
    y, predictions = np.asarray(y, np.float64), np.asarray(predictions, np.float64)
    models, owner = np.unique(np.asarray(model_ids), return_inverse=True)
    centred = y - y.mean()  # keeps digits when squares are subtracted below
    terms = np.stack([np.ones_like(y), centred, np.square(centred), np.square(y - predictions)])
    per_model = np.stack(
        [np.bincount(owner, weights=term, minlength=len(models)) for term in terms], axis=1
    )  # (models, 4)
    drawn = np.random.default_rng(seed).multinomial(len(models), np.full(len(models), 1 / len(models)), size=count)
    checkpoints, total, squares, error = (drawn @ per_model).T
    spread = squares - np.square(total) / checkpoints
    varies = spread > 1e-12 * squares.max()  # a draw of one model whose property never changes says nothing
    if not varies.any():
        return float("nan"), float("nan")
    low, high = np.quantile(1 - error[varies] / spread[varies], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _ridge_path(x: np.ndarray, y: np.ndarray, alphas: np.ndarray):
    """Function from features `(checkpoints, features)` to predictions `(checkpoints, alphas)`; x and y are centred."""
    if x.shape[1] <= len(x):
        values, vectors = np.linalg.eigh(x.T @ x)
        scaled = (vectors.T @ (x.T @ y))[:, None] / (values[:, None].clip(0) + alphas)
        weights = vectors @ scaled
    else:  # the same weights through the checkpoints' products: w = Xᵀ (X Xᵀ + alpha)⁻¹ y
        values, vectors = np.linalg.eigh(x @ x.T)
        scaled = (vectors.T @ y)[:, None] / (values[:, None].clip(0) + alphas)
        weights = x.T @ (vectors @ scaled)
    return lambda features: features @ weights


def _result(y: np.ndarray, predictions: np.ndarray, alpha: float, note: str) -> ProbeResult:
    total = np.square(y - y.mean()).sum()
    if total == 0:
        note = "; ".join(filter(None, [note, "the property does not vary in the test split"]))
        return ProbeResult(float("nan"), float("nan"), alpha, predictions, note)
    r2 = 1 - np.square(y - predictions).sum() / total
    return ProbeResult(float(r2), float(kendalltau(y, predictions).statistic), alpha, predictions, note)


def _checked(splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    checked = []
    for split, (features, values) in splits.items():
        x, y = np.asarray(features, np.float64), np.asarray(values, np.float64)
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(x) or (checked and x.shape[1] != checked[0][0].shape[1]):
            raise ValueError(
                f"the {split} split has features {x.shape} and values {y.shape}, expected (checkpoints, features) and "
                "(checkpoints,), at least one checkpoint, and as many features as in the train split."
            )
        missing = int((~np.isfinite(x).all(1) | ~np.isfinite(y)).sum())
        if missing:
            raise ValueError(
                f"{missing} of {len(x)} checkpoints of the {split} split have missing or infinite values; leave them out."
            )
        checked.append((x, y))
    return checked
