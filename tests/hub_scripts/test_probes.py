import math

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from hub_scripts.evaluation.probes import bootstrap_r2, ridge_probe, ridge_probes


def linear_splits(features: int, noise: float = 0.0, sizes=(40, 17, 23)):
    """Train, validation and test (x, y) of one linear relation; features have very different scales."""
    rng = np.random.default_rng(0)
    weights, scales = rng.normal(size=features), 10.0 ** rng.integers(-3, 4, size=features)
    splits = []
    for size in sizes:
        x = rng.normal(size=(size, features))
        splits += [x * scales + 5 * scales, x @ weights + 3 + noise * rng.normal(size=size)]
    return splits


def test_a_linear_relation_is_found():
    result = ridge_probe(*linear_splits(features=5))
    assert result.r2 > 0.999
    assert result.kendall_tau > 0.98
    assert result.predictions.shape == (23,)


@pytest.mark.parametrize("features", [7, 90])  # fewer and more than the 40 train checkpoints
def test_predictions_equal_scikit_learns_ridge(features):
    train_x, train_y, val_x, val_y, test_x, test_y = linear_splits(features, noise=0.5)
    result = ridge_probe(train_x, train_y, val_x, val_y, test_x, test_y, alphas=[3.0])
    scaler = StandardScaler().fit(train_x)
    reference = Ridge(alpha=3.0).fit(scaler.transform(train_x), train_y)
    np.testing.assert_allclose(result.predictions, reference.predict(scaler.transform(test_x)), rtol=1e-8)
    assert result.r2 == pytest.approx(reference.score(scaler.transform(test_x), test_y))


@pytest.mark.parametrize("features", [7, 90])
def test_the_validation_split_chooses_the_strength(features):
    train_x, train_y, val_x, val_y, test_x, test_y = linear_splits(features, noise=2.0)
    alphas = [0.01, 1.0, 30.0, 1000.0]
    errors = [
        np.square(ridge_probe(train_x, train_y, val_x, val_y, val_x, val_y, [a]).predictions - val_y).mean()
        for a in alphas
    ]
    chosen = ridge_probe(train_x, train_y, val_x, val_y, test_x, test_y, alphas).alpha
    assert chosen == alphas[int(np.argmin(errors))]
    # a validation split without any relation to the features asks for the strongest shrinking
    unrelated = np.full_like(val_y, train_y.mean())
    assert ridge_probe(train_x, train_y, val_x, unrelated, test_x, test_y, alphas).alpha == 1000.0


def test_the_test_split_touches_nothing_but_its_own_predictions():
    splits = linear_splits(features=5, noise=1.0)
    whole = ridge_probe(*splits)
    part = ridge_probe(*splits[:4], splits[4][:3], splits[5][:3] * 100)
    assert part.alpha == whole.alpha
    np.testing.assert_allclose(part.predictions, whole.predictions[:3], rtol=1e-12)


def test_features_constant_in_the_train_split_are_left_out():
    splits = linear_splits(features=5, noise=1.0)
    wider = [np.column_stack([s, np.full(len(s), i)]) if s.ndim == 2 else s for i, s in enumerate(splits)]
    np.testing.assert_allclose(ridge_probe(*wider).predictions, ridge_probe(*splits).predictions, rtol=1e-12)


def test_a_property_that_does_not_vary_gives_nan_and_a_note():
    train_x, train_y, val_x, val_y, test_x, test_y = linear_splits(features=5)
    in_train = ridge_probe(train_x, np.full(40, 2.0), val_x, val_y, test_x, test_y)
    in_test = ridge_probe(train_x, train_y, val_x, val_y, test_x, np.full(23, 2.0))
    for result, split in ((in_train, "train"), (in_test, "test")):
        assert math.isnan(result.r2)
        assert math.isnan(result.kendall_tau)
        assert result.note.endswith(f"the property does not vary in the {split} split")
    np.testing.assert_array_equal(in_train.predictions, np.full(23, 2.0))


def test_several_properties_at_once_equal_each_alone():
    train_x, train_y, val_x, val_y, test_x, test_y = linear_splits(features=90, noise=1.0)
    ys = [{"up": y, "square": y**2} for y in (train_y, val_y, test_y)]
    both = ridge_probes(train_x, ys[0], val_x, ys[1], test_x, ys[2])
    alone = ridge_probe(train_x, train_y**2, val_x, val_y**2, test_x, test_y**2)
    assert list(both) == ["up", "square"]
    assert both["square"].alpha == alone.alpha
    np.testing.assert_array_equal(both["square"].predictions, alone.predictions)


def test_missing_values_and_wrong_shapes_are_named():
    train_x, train_y, val_x, val_y, test_x, test_y = linear_splits(features=5)
    holes = val_y.copy()
    holes[[2, 5]] = np.nan
    with pytest.raises(
        ValueError, match="property is missing or infinite for 2 of 17 checkpoints of the validation split"
    ):
        ridge_probe(train_x, train_y, val_x, holes, test_x, test_y)
    with pytest.raises(ValueError, match="1 of 17 checkpoints of the validation split have features with NaN"):
        ridge_probe(train_x, train_y, np.where(np.arange(17)[:, None] == 4, np.inf, val_x), val_y, test_x, test_y)
    with pytest.raises(ValueError, match="the splits have 5, 5 and 4 features"):
        ridge_probe(train_x, train_y, val_x, val_y, test_x[:, :4], test_y)
    with pytest.raises(ValueError, match=r"the test split have shape \(0, 5\)"):
        ridge_probe(train_x, train_y, val_x, val_y, test_x[:0], test_y[:0])


def test_the_interval_holds_r2_and_draws_whole_models():
    rng = np.random.default_rng(0)
    y = rng.normal(size=60)
    predictions = y + 0.5 * rng.normal(size=60)
    r2 = 1 - np.square(y - predictions).sum() / np.square(y - y.mean()).sum()
    low, high = bootstrap_r2(y, predictions, np.arange(60), count=500, seed=1)
    assert low < r2 < high
    # twelve copies of five checkpoints are as little evidence as the five
    models = np.tile(np.arange(5), 12)
    few = bootstrap_r2(y[:5], predictions[:5], ["a", "b", "c", "d", "e"], count=500, seed=1)
    np.testing.assert_allclose(bootstrap_r2(y[models], predictions[models], models, count=500, seed=1), few, rtol=1e-9)


def test_the_interval_holds_the_asked_share_of_draws():
    y, predictions, models = (
        np.array([0.0, 1.0, 4.0, 5.0, 2.0]),
        np.array([0.5, 1.0, 3.0, 5.5, 2.5]),
        np.array([0, 0, 1, 1, 2]),
    )
    draws = []
    for counts in np.random.default_rng(4).multinomial(3, [1 / 3] * 3, size=200):
        drawn = np.repeat(np.arange(5), counts[models])
        spread = np.square(y[drawn] - y[drawn].mean()).sum()
        if spread:  # the last model alone has one checkpoint
            draws.append(1 - np.square(y - predictions)[drawn].sum() / spread)
    expected = np.quantile(draws, [0.1, 0.9])
    np.testing.assert_allclose(bootstrap_r2(y, predictions, models, count=200, seed=4, level=0.8), expected, rtol=1e-9)


def test_the_interval_of_a_constant_property_is_nan():
    assert all(map(math.isnan, bootstrap_r2(np.ones(6), np.zeros(6), [0, 0, 1, 1, 2, 2], count=10, seed=0)))
