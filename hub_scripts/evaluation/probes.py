"""Read properties of checkpoints from features: ridge regression and boosted trees; the validation split chooses how strong."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import kendalltau
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ALPHAS = tuple(np.logspace(-3, 6, 19).tolist())
BANDS = (1.0, 0.3, 0.0)  # factors on groups of features
TREES = {"max_iter": 150, "learning_rate": 0.08, "max_leaf_nodes": 15, "min_samples_leaf": 10, "max_features": 0.3}


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
    groups: Sequence[int] | None = None,
) -> dict[str, ProbeResult]:
    """Ridge regressions of several properties on the same standardised features, fitted on the train split only.

    Scaling, constant features and the means of the properties come from the train split; for each property the strength
    with the smallest squared error on the validation split is taken. All strengths and properties share one
    eigendecomposition, of the features' or the checkpoints' products, whichever are fewer.

    With groups the strength may differ between them (banded ridge, Nunez-Elizalde, Huth and Gallant 2019): each is multiplied by one of
    `BANDS`, 0 leaves it out, and the validation split chooses together with the strength.

    Args:
        train_x (`np.ndarray` of shape `(train_checkpoints, features)`): float.
        train_ys (`Mapping[str, np.ndarray]`): properties, each `(train_checkpoints,)`.
        val_x (`np.ndarray` of shape `(validation_checkpoints, features)`): float.
        val_ys (`Mapping[str, np.ndarray]`): the same properties, each `(validation_checkpoints,)`.
        test_x (`np.ndarray` of shape `(test_checkpoints, features)`): float.
        test_ys (`Mapping[str, np.ndarray]`): the same properties, each `(test_checkpoints,)`.
        alphas (`Sequence[float]`): strengths to try, positive.
        groups (`Sequence[int]`, *optional*): number of features in each group, in their order.

    Returns:
        `dict[str, ProbeResult]`: by property; one that does not vary has NaN figures and a note.

    Raises:
        ValueError: If a split is empty, shapes do not fit or a value is missing.
    """
    (x, ys), (val_x, val_ys), (test_x, test_ys) = _splits((train_x, train_ys), (val_x, val_ys), (test_x, test_ys))
    groups = [x.shape[1]] if groups is None else list(groups)
    if sum(groups) != x.shape[1]:
        raise ValueError(f"the groups have {sum(groups)} features together, the checkpoints {x.shape[1]}.")
    mean, std = x.mean(0), x.std(0)
    varies = std > 1e-7 * np.abs(mean)  # float32 features carry no more digits
    x, val_x, test_x = ((part[:, varies] - mean[varies]) / std[varies] for part in (x, val_x, test_x))
    owner = np.repeat(np.arange(len(groups)), groups)[varies]
    fixed = {
        name: "the property does not vary" if np.ptp(y) == 0 else "no feature varies"
        for name, y in ys.items()
        if np.ptp(y) == 0 or not varies.any()
    }
    # error, strength, predictions, at the edge of the grid
    best: dict[str, tuple[float, float, np.ndarray, bool]] = {}
    for bands in _bands(len(groups)) if len(fixed) < len(ys) else ():
        factors = np.asarray(bands)[owner]
        fit = _ridge(x * factors, np.asarray(alphas, np.float64))
        for name in ys.keys() - fixed.keys():
            centre = ys[name].mean()
            weights = factors[:, None] * fit(ys[name] - centre)  # (features, alphas)
            errors = np.square(val_x @ weights + centre - val_ys[name][:, None]).mean(0)
            least = int(errors.argmin())
            if name not in best or errors[least] < best[name][0]:
                edge = len(alphas) > 1 and least in (0, len(alphas) - 1)
                best[name] = (errors[least], float(alphas[least]), test_x @ weights[:, least] + centre, edge)
    results = {}
    for name, y in ys.items():
        if name in fixed:
            results[name] = _nothing(y, len(test_x), fixed[name])
        else:
            _, alpha, predictions, edge = best[name]
            note = "the best strength lies at the edge of the grid" if edge else ""
            results[name] = _result(test_ys[name], predictions, alpha, note)
    return results


def _bands(count: int) -> list[tuple[float, ...]]:
    """Factors on `count` groups; only their ratios matter, so the largest is 1."""
    return [bands for bands in itertools.product(BANDS, repeat=count) if max(bands) == 1.0]


def tree_probes(
    train_x: np.ndarray,
    train_ys: Mapping[str, np.ndarray],
    val_x: np.ndarray,
    val_ys: Mapping[str, np.ndarray],
    test_x: np.ndarray,
    test_ys: Mapping[str, np.ndarray],
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> dict[str, ProbeResult]:
    """Gradient-boosted trees for each property: what a ridge regression cannot bend to.

    scikit-learn's `HistGradientBoostingRegressor` on the train split, with the number of trees that is best on the validation
    split. With groups of features, all of them and each alone are tried, and the validation split chooses.
    Arguments, returns and errors as of [`ridge_probes`]; `alpha` is the number of trees.
    """
    (x, ys), (val_x, val_ys), (test_x, test_ys) = _splits((train_x, train_ys), (val_x, val_ys), (test_x, test_ys))
    results = {}
    for name, y in ys.items():
        if np.ptp(y) == 0:
            results[name] = _nothing(y, len(test_x), "the property does not vary")
            continue
        best = (np.inf, 0, np.empty(0))  # error, trees, predictions
        for columns in _subsets(groups or [x.shape[1]]):
            trees = HistGradientBoostingRegressor(**TREES, early_stopping=False, random_state=seed).fit(
                x[:, columns], y
            )
            errors = [np.square(found - val_ys[name]).mean() for found in trees.staged_predict(val_x[:, columns])]
            least = int(np.argmin(errors))
            if errors[least] < best[0]:
                stages = trees.staged_predict(test_x[:, columns])
                best = (errors[least], least + 1, next(itertools.islice(stages, least, None)))
        results[name] = _result(test_ys[name], best[2], float(best[1]), "")
    return results


def _subsets(groups: Sequence[int]) -> list[np.ndarray]:
    """Columns of all groups together, and of each alone."""
    owner = np.repeat(np.arange(len(groups)), groups)
    alone = [np.flatnonzero(owner == group) for group in range(len(groups))] if len(groups) > 1 else []
    return [np.arange(len(owner)), *alone]


class CategoryResult(NamedTuple):
    """How well a category is told on the test split.

    Args:
        accuracy (`float`): of logistic regression.
        f1 (`float`): its F1, the mean over the categories.
        trees_accuracy (`float`): of gradient-boosted trees.
        trees_f1 (`float`): their F1.
        majority (`float`): accuracy of always telling the commonest category of the train split.
    """

    accuracy: float
    f1: float
    trees_accuracy: float
    trees_f1: float
    majority: float


def category_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    seed: int = 0,
) -> CategoryResult:
    """Logistic regression, its strength chosen on the validation split, and boosted trees for one category.

    Args:
        train_x (`np.ndarray` of shape `(train_checkpoints, features)`): float.
        train_y (`np.ndarray` of shape `(train_checkpoints,)`): text or whole numbers, at least two different ones.
        val_x (`np.ndarray` of shape `(validation_checkpoints, features)`): float.
        val_y (`np.ndarray` of shape `(validation_checkpoints,)`): the same category.
        test_x (`np.ndarray` of shape `(test_checkpoints, features)`): float.
        test_y (`np.ndarray` of shape `(test_checkpoints,)`): the same category.
        seed (`int`): of the trees.
    """
    fitted = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500)).fit(train_x, train_y)
        for strength in (1e-3, 1e-2, 1e-1, 1.0)
    ]
    linear = max(fitted, key=lambda model: accuracy_score(val_y, model.predict(val_x))).predict(test_x)
    settings = TREES | {"max_iter": 100}
    trees = HistGradientBoostingClassifier(**settings, early_stopping=False, random_state=seed)
    bent = trees.fit(train_x, train_y).predict(test_x)
    values, counts = np.unique(train_y, return_counts=True)
    scores = [f(test_y, told) for told in (linear, bent) for f in (accuracy_score, _macro_f1)]
    return CategoryResult(*map(float, scores), float((test_y == values[counts.argmax()]).mean()))


def _macro_f1(true: np.ndarray, told: np.ndarray) -> float:
    return f1_score(true, told, average="macro", zero_division=0)


def bootstrap_r2(
    y: np.ndarray,
    predictions: np.ndarray,
    model_ids: Sequence,
    count: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    other: np.ndarray | None = None,
) -> tuple[float, float]:
    """Interval of R² when other models had been in the test split: whole models are drawn, with all of their checkpoints.

    Args:
        y (`np.ndarray` of shape `(checkpoints,)`): the property.
        predictions (`np.ndarray` of shape `(checkpoints,)`): of the probe.
        model_ids (`Sequence` of length `checkpoints`): which model a checkpoint belongs to.
        count (`int`): draws.
        seed (`int`): of the draws.
        level (`float`): share of the draws inside the interval.
        other (`np.ndarray` of shape `(checkpoints,)`, *optional*): predictions of another probe; the interval is then that of
            the first one's R² minus the second one's, on the same draws.

    Returns:
        `tuple[float, float]`: low and high end; NaN where the property does not vary.
    """
    y = np.asarray(y, np.float64)
    models, owner = np.unique(np.asarray(model_ids), return_inverse=True)
    centred = y - y.mean()  # keeps digits when squares are subtracted below
    error = np.square(y - np.asarray(predictions, np.float64))
    if other is not None:
        error = error - np.square(y - np.asarray(other, np.float64))
    terms = np.stack([np.ones_like(y), centred, np.square(centred), error])
    per_model = np.stack(
        [np.bincount(owner, weights=term, minlength=len(models)) for term in terms], axis=1
    )  # (models, 4)
    drawn = np.random.default_rng(seed).multinomial(len(models), np.full(len(models), 1 / len(models)), size=count)
    checkpoints, total, squares, error = (drawn @ per_model).T
    spread = squares - np.square(total) / checkpoints
    varies = spread > 1e-12 * squares.max()  # a draw of one model whose property never changes says nothing
    if not varies.any():
        return float("nan"), float("nan")
    best = 1.0 if other is None else 0.0
    low, high = np.quantile(best - error[varies] / spread[varies], [(1 - level) / 2, (1 + level) / 2])
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


def _nothing(y: np.ndarray, count: int, why: str) -> ProbeResult:
    """The mean for all, where nothing can be fitted."""
    return ProbeResult(*[float("nan")] * 3, np.full(count, y.mean()), f"{why} in the train split")


def _result(y: np.ndarray, predictions: np.ndarray, alpha: float, note: str) -> ProbeResult:
    total = np.square(y - y.mean()).sum()
    if total == 0:
        note = "; ".join(filter(None, [note, "the property does not vary in the test split"]))
        return ProbeResult(float("nan"), float("nan"), alpha, predictions, note)
    r2 = 1 - np.square(y - predictions).sum() / total
    return ProbeResult(float(r2), float(kendalltau(y, predictions).statistic), alpha, predictions, note)


def _splits(*parts: tuple[np.ndarray, Mapping[str, np.ndarray]]) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Train, validation and test split, checked."""
    checked = [_checked(name, *part) for name, part in zip(("train", "validation", "test"), parts, strict=True)]
    widths = [x.shape[1] for x, _ in checked]
    if len(set(widths)) > 1:
        raise ValueError(
            f"the splits have {widths[0]}, {widths[1]} and {widths[2]} features, expected the same number in each."
        )
    return checked


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
