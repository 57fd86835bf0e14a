"""`sane probe`: SANE's representations and the baselines on the same checkpoints."""

import json

import numpy as np
import pytest
import torch

from hub_scripts.evaluation.moments import NUM_MOMENTS, layer_moments, moments, network_moments
from hub_scripts.evaluation.probes import bootstrap_r2, category_probe, ridge_probe, ridge_probes, tree_probes
from hub_scripts.evaluation.prototypes import Prototypes
from hub_scripts.evaluation.representations import NAMES, spectra
from hub_scripts.probe import ProbeArguments, probe
from hub_scripts.zoos.architectures import SmallCNN
from hub_scripts.zoos.tasks import SPLITS
from hub_scripts.zoos.zoo import Zoo


def settings(zoo, model, folder, **changes) -> ProbeArguments:
    return ProbeArguments(model=str(model), zoo=str(zoo), output_dir=str(folder), **changes)


# ---------------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def probed(tiny_zoo, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "p"
    changes = {"properties": ["test_accuracy", "epoch"], "categories": ["hparams_learning_rate"]}
    probe(settings(tiny_zoo, tiny_model, folder, **changes, transfer_zoos=[str(tiny_zoo)]))
    return folder


def test_all_representations_are_measured_on_the_same_checkpoints(probed):
    written = json.loads((probed / "results.json").read_text())
    assert written["checkpoints"] == {"train": 14, "validation": 2, "test": 2}  # epoch 0 left out
    assert list(written["probe"]) == ["test_accuracy", "epoch"]
    for kinds in written["probe"].values():
        assert tuple(kinds) == NAMES
        for figures in kinds.values():
            assert {"r2", "r2_low", "r2_high", "kendall_tau", "trees_r2", "num_features"} <= set(figures)
        assert kinds["sane"]["ridge_margin"]["against"] in ("layer_statistics", "layer_statistics_joint")
    assert "sane" in written["probe_all_epochs"]["epoch"]
    assert set(written["categories"]["hparams_learning_rate"]["sane"]) == {
        *("accuracy", "f1", "trees_accuracy", "trees_f1", "majority")
    }
    (moved,) = written["transfer"].values()
    assert {"kendall_tau", "bias", "mean_absolute_error"} <= set(moved["test_accuracy"]["sane"]["ridge"])


def test_tables_plots_and_prototypes_stand_beside_the_figures(probed):
    names = {path.name for path in probed.iterdir()}
    assert names == {
        *("results.json", "probe.md", "probes.png", "prototypes.png", "prototypes.safetensors"),
        *("predicted_test_accuracy.png", "predicted_epoch.png"),
    }
    written = json.loads((probed / "results.json").read_text())["probe"]["epoch"]["layer_statistics"]
    assert f"| {written['r2']:.3f} ({written['r2_low']:.3f} to" in (probed / "probe.md").read_text()


def test_a_property_that_is_missing_for_some_is_left_out_there_and_counted(
    tiny_zoo, tiny_model, tmp_path, monkeypatch
):
    column = Zoo.rows

    def with_gap(zoo, split):
        rows = column(zoo, split)
        values = [None if i == 4 else v for i, v in enumerate(rows["test_accuracy"][:])] if split == "train" else None
        return rows if values is None else rows.remove_columns("test_accuracy").add_column("test_accuracy", values)

    monkeypatch.setattr(Zoo, "rows", with_gap)
    arguments = {"properties": ["all"], "all_epochs": False, "representations": ["sane_moments"]}
    probe(settings(tiny_zoo, tiny_model, tmp_path / "p", **arguments))
    written = json.loads((tmp_path / "p" / "results.json").read_text())
    assert {"test_accuracy", "epoch", "hparams_learning_rate"} <= set(written["probe"])
    assert written["left_out"] == {"test_accuracy": {"train": 1, "validation": 0, "test": 0}}
    assert "`test_accuracy` is missing for 1 of them" in (tmp_path / "p" / "probe.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"properties": ["colour"]}, "has no column 'colour'"),
        ({"properties": ["architecture"]}, "column 'architecture' of .* is text; name it under --categories"),
        ({"categories": ["colour"]}, "has no column 'colour'"),
        ({"categories": ["architecture"]}, "has 1 different values in the train split"),
        ({"first_epoch": 9}, "has no checkpoints of epoch 9 or later in its train split"),
    ],
)
def test_bad_columns_are_refused_and_nothing_is_left(tiny_zoo, tiny_model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        probe(settings(tiny_zoo, tiny_model, tmp_path / "p", **changes))
    assert not list(tmp_path.iterdir())


def test_unknown_representations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--representations has 'magic'"):
        settings("z", "m", tmp_path, representations=["magic"])


# ---------------------------------------------------------------------------------------------------- its parts
def test_moments_do_not_depend_on_the_order_and_know_the_scale():
    values = np.random.default_rng(0).standard_normal((2, 5, 7))
    shuffled = np.random.default_rng(1).permuted(values.reshape(2, -1), axis=1)
    np.testing.assert_allclose(moments(values), moments(shuffled), rtol=1e-9, atol=1e-12)
    once, thrice = moments(values), moments(3 * values)
    np.testing.assert_allclose(thrice[:, 1], 3 * once[:, 1])  # standard deviation
    np.testing.assert_allclose(thrice[:, 5:7], once[:, 5:7], rtol=1e-6)  # kurtosis and skew
    tensors = {"w": torch.from_numpy(values), "b": torch.zeros(2, 3), "steps": torch.zeros(2, dtype=torch.int64)}
    assert layer_moments(tensors).shape == (2, 2 * NUM_MOMENTS)
    assert network_moments(tensors).shape == (2, 6 * NUM_MOMENTS)


def test_spectra_have_no_nan_and_leave_out_what_layers_do_not_have(tiny_zoo):
    zoo = Zoo(tiny_zoo)
    weights, layers = {split: zoo.stacked(split) for split in SPLITS}, zoo.layout.layers
    found = spectra(weights, layers)
    matrices = [layer for layer in layers if any(len(tensor.shape) > 1 for tensor in layer.tensors)]
    assert 2 * len(layers) + 2 * len(matrices) < found["train"].shape[1] < 5 * len(layers)  # exponents for some
    for split, part in found.items():
        assert len(part) == len(zoo.rows(split))
        assert np.isfinite(part).all()  # biases are zero in the beginning
    weights["test"] = {name: torch.zeros_like(values) for name, values in weights["test"].items()}
    assert np.isfinite(spectra(weights, layers)["test"]).all()


def test_prototypes_are_seen_as_their_class_and_responses_do_not_depend_on_the_order_of_units(tiny_zoo):
    zoo = Zoo(tiny_zoo)
    last = np.flatnonzero(zoo.column("train", "epoch") == zoo.column("train", "epoch").max())
    networks = zoo.stacked("train", last)
    prototypes = Prototypes.fit(zoo.module, networks, (1, 8, 8), 10, steps=60)
    assert prototypes.images.shape == (100, 1, 8, 8)
    own, statistics = prototypes.responses(zoo.module, networks)
    trained = own[:, ::10].mean()  # the surest of each class
    untrained = prototypes.responses(
        zoo.module, {k: v[None] for k, v in SmallCNN(**KWARGS(zoo)).state_dict().items()}
    )[0][:, ::10].mean()
    assert trained > untrained + 0.3
    spec = zoo.symmetries.of_kind("permutation", "sign")
    first = {name: values[0] for name, values in networks.items()}
    twin = spec.apply(first, spec.draw(torch.Generator().manual_seed(0)))
    again = prototypes.responses(zoo.module, {name: values[None] for name, values in twin.items()})
    np.testing.assert_allclose(again[0], own[:1], atol=1e-3)
    np.testing.assert_allclose(again[1], statistics[:1], atol=1e-2)


def KWARGS(zoo) -> dict:
    return json.loads(zoo.rows("train")["architecture_kwargs"][0])


def test_bands_leave_out_a_group_that_is_noise():
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((90, 3)), rng.standard_normal((90, 300))
    y = x @ np.array([1.0, -2.0, 0.5])
    parts = [slice(0, 40), slice(40, 65), slice(65, 90)]
    both = np.concatenate([x, noise], axis=1)
    alone = ridge_probe(*(part for s in parts for part in (both[s], y[s])))
    arguments = [part for s in parts for part in (both[s], {"y": y[s]})]
    banded = ridge_probes(*arguments, groups=[3, 300])["y"]
    assert banded.r2 > 0.99 > alone.r2
    with pytest.raises(ValueError, match="the groups have 4 features together, the checkpoints 303"):
        ridge_probes(*arguments, groups=[3, 1])


def test_trees_bend_where_ridge_cannot():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 2))
    y = np.abs(x[:, 0])
    parts = [slice(0, 400), slice(400, 500), slice(500, 600)]
    arguments = [part for s in parts for part in (x[s], {"y": y[s], "constant": np.ones_like(y[s])})]
    ridge, trees = ridge_probes(*arguments), tree_probes(*arguments, groups=[1, 1])
    assert trees["y"].r2 > 0.9 > 0.5 > ridge["y"].r2
    assert np.isnan(trees["constant"].r2)


def test_the_interval_of_a_difference_is_narrower_than_those_of_both():
    rng = np.random.default_rng(0)
    y, ids = rng.standard_normal(200), np.repeat(np.arange(40), 5)
    error = rng.standard_normal(200)
    worse, better = y + 0.6 * error, y + 0.5 * error
    low, high = bootstrap_r2(y, better, ids, other=worse)
    assert 0 < low < high
    own = bootstrap_r2(y, better, ids)
    assert high - low < own[1] - own[0]


def test_a_category_is_told_by_its_feature():
    rng = np.random.default_rng(0)
    y = np.array(["relu", "tanh", "tanh"])[rng.integers(0, 3, 300)]
    x = (y == "relu")[:, None] + 0.1 * rng.standard_normal((300, 2))
    told = category_probe(x[:200], y[:200], x[200:250], y[200:250], x[250:], y[250:])
    assert told.accuracy == told.trees_accuracy == told.f1 == 1.0
    assert told.majority == pytest.approx((y[250:] == "tanh").mean())
