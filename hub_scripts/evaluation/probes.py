"""Read properties of checkpoints from features: a ridge regression whose strength the validation split chooses."""

from collections.abc import Callable, Mapping, Sequence
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
    """Ridge regression of one property; see [`ridge_probes`].

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
        ValueError: As in [`ridge_probes`].
    """
    name = "property"
    return ridge_probes(train_x, {name: train_y}, val_x, {name: val_y}, test_x, {name: test_y}, alphas)[name]


def ridge_probes(
    train_x: np.ndarray,
    train_ys: Mapping[str, np.ndarray],
    val_x: np.ndarray,
    val_ys: Mapping[str, np.ndarray],
    test_x: np.ndarray,
    test_ys: Mapping[str, np.ndarray],
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, ProbeResult]:
    """Ridge regressions of several properties on the same standardised features, fitted on the train split only.

    Scaling, constant features and the means of the properties come from the train split; for each property the strength
    with the smallest squared error on the validation split is taken. All strengths and properties share one
    eigendecomposition, of the features' or the checkpoints' products, whichever are fewer.

    Args:
        train_x (`np.ndarray` of shape `(train_checkpoints, features)`): float.
        train_ys (`Mapping[str, np.ndarray]`): properties, each `(train_checkpoints,)`.
        val_x (`np.ndarray` of shape `(validation_checkpoints, features)`): float.
        val_ys (`Mapping[str, np.ndarray]`): the same properties, each `(validation_checkpoints,)`.
        test_x (`np.ndarray` of shape `(test_checkpoints, features)`): float.
        test_ys (`Mapping[str, np.ndarray]`): the same properties, each `(test_checkpoints,)`.
        alphas (`Sequence[float]`): strengths to try, positive.

    Returns:
        `dict[str, ProbeResult]`: by property; one that does not vary has NaN figures and a note.

    Raises:
        ValueError: If a split is empty, shapes do not fit or a value is missing.
    """
    splits = {"train": (train_x, train_ys), "validation": (val_x, val_ys), "test": (test_x, test_ys)}
    (x, ys), (val_x, val_ys), (test_x, test_ys) = (_checked(name, *split) for name, split in splits.items())
    if not x.shape[1] == val_x.shape[1] == test_x.shape[1]:
        raise ValueError(
            f"the splits have {x.shape[1]}, {val_x.shape[1]} and {test_x.shape[1]} features, expected the same number in each."
        )
    mean, std = x.mean(0), x.std(0)
    varies = std > 1e-7 * np.abs(mean)  # float32 features carry no more digits
    x, val_x, test_x = ((part[:, varies] - mean[varies]) / std[varies] for part in (x, val_x, test_x))
    fit = _ridge(x, np.asarray(alphas, np.float64))

    results = {}
    for name, y in ys.items():
        if np.ptp(y) == 0 or not varies.any():
            what = "the property does not vary" if np.ptp(y) == 0 else "no feature varies"
            constant = np.full(len(test_x), y.mean())
            results[name] = ProbeResult(*[float("nan")] * 3, constant, f"{what} in the train split")
            continue
        weights = fit(y - y.mean())  # (features, alphas)
        errors = np.square(val_x @ weights + y.mean() - val_ys[name][:, None]).mean(0)
        best = int(errors.argmin())
        at_edge = len(alphas) > 1 and best in (0, len(alphas) - 1)
        note = "the best strength lies at the edge of the grid" if at_edge else ""
        results[name] = _result(test_ys[name], test_x @ weights[:, best] + y.mean(), float(alphas[best]), note)
    return results


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


def _ridge(x: np.ndarray, alphas: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Function from a centred property `(checkpoints,)` to weights `(features, alphas)`; x is centred."""
    primal = x.shape[1] <= len(x)
    values, vectors = np.linalg.eigh(x.T @ x if primal else x @ x.T)
    inverse = 1 / (values[:, None].clip(0) + alphas)  # (eigenvalues, alphas)
    if primal:
        return lambda y: vectors @ ((vectors.T @ (x.T @ y))[:, None] * inverse)
    return lambda y: (
        x.T @ (vectors @ ((vectors.T @ y)[:, None] * inverse))
    )  # the same, by X'(XX' + a)^-1 = (X'X + a)^-1 X'


def _result(y: np.ndarray, predictions: np.ndarray, alpha: float, note: str) -> ProbeResult:
    total = np.square(y - y.mean()).sum()
    if total == 0:
        note = "; ".join(filter(None, [note, "the property does not vary in the test split"]))
        return ProbeResult(float("nan"), float("nan"), alpha, predictions, note)
    r2 = 1 - np.square(y - predictions).sum() / total
    return ProbeResult(float(r2), float(kendalltau(y, predictions).statistic), alpha, predictions, note)


def _checked(
    split: str, features: np.ndarray, properties: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    x, ys = np.asarray(features, np.float64), {name: np.asarray(y, np.float64) for name, y in properties.items()}
    if x.ndim != 2 or not len(x):
        raise ValueError(
            f"the features of the {split} split have shape {x.shape}, expected (checkpoints, features), not empty."
        )
    if not np.isfinite(x).all():
        missing = int((~np.isfinite(x)).any(1).sum())
        raise ValueError(
            f"{missing} of {len(x)} checkpoints of the {split} split have features with NaN or infinity; leave them out."
        )
    for name, y in ys.items():
        if y.shape != x.shape[:1]:
            raise ValueError(
                f"{name} of the {split} split has shape {y.shape}, expected ({len(x)},) as the features have rows."
            )
        missing = int((~np.isfinite(y)).sum())
        if missing:
            raise ValueError(
                f"{name} is missing or infinite for {missing} of {len(x)} checkpoints of the {split} split; leave them out."
            )
    return x, ys
