"""`sane profile-layers`: layers over epochs and depth, and the layer that is an outlier."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hub_scripts.evaluation import layer_plots
from hub_scripts.evaluation.layer_profiles import (
    drift,
    eigenvalues,
    exponent_fit,
    hill_exponent,
    outlier_scores,
    power_law_exponent,
    spectral_norm,
    weight_profile,
)
from hub_scripts.profile_layers import ProfileArguments, main, profile
from hub_scripts.zoos.schema import checksum, weights_from_bytes, weights_to_bytes
from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import CheckpointLayout, TensorSpec


def with_scaled_layer(source: Path, target: Path, split: str, row: int, layer: str, factor: float) -> tuple[str, int]:
    """A copy of a zoo in which one layer of one checkpoint is scaled; returns which checkpoint."""
    shutil.copytree(source, target)
    (file,) = (target / "data").glob(f"{split}-*.parquet")
    table = pq.read_table(file)
    columns = {name: table[name].to_pylist() for name in ("weights", "weights_sha256")}
    weights = weights_from_bytes(columns["weights"][row])
    weights[layer] = weights[layer] * factor
    columns["weights"][row] = weights_to_bytes(weights)
    columns["weights_sha256"][row] = checksum(columns["weights"][row])
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table, file)
    return table["model_id"][row].as_py(), table["epoch"][row].as_py()


# ---------------------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize(
    ("split", "row", "layer"),
    [("train", 5, "fc1.weight"), ("test", 2, "conv2.weight"), ("validation", 1, "fc2.weight")],
)
def test_a_layer_that_was_scaled_is_the_strongest_outlier(tiny_zoo, tiny_model, tmp_path, split, row, layer):
    model_id, epoch = with_scaled_layer(tiny_zoo, tmp_path / "zoo", split, row, layer, 5.0)
    args = ProfileArguments(model=str(tiny_model), zoo=str(tmp_path / "zoo"), output_dir=str(tmp_path / "out"))
    first = profile(args)["outliers"][0]
    assert (first["model_id"], first["epoch"], first["split"], first["layer"]) == (model_id, epoch, split, layer)
    assert first["score"] > 5
    assert first["percentile"] == 100
    assert first["compared_with"] == "all epochs"  # there are seven train checkpoints of an epoch


def test_layers_are_followed_over_epochs(tiny_zoo, tiny_model, tmp_path, capsys):
    main(["--model", str(tiny_model), "--zoo", str(tiny_zoo), "--output-dir", str(tmp_path / "out")])
    assert "strongest outliers" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    found = written["profile"]
    assert found["alpha_fit"] == exponent_fit()
    assert found["canonical_order"]
    assert found["checkpoints"] == {"train": 21, "validation": 3, "test": 3}
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert list(layers)[0::2] == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    zoo = Zoo(tiny_zoo)
    for entry in layers["fc1.weight"]["by_epoch"]:
        weights = [
            zoo.stacked(split, np.flatnonzero(zoo.column(split, "epoch") == entry["epoch"]))["fc1.weight"].flatten(1)
            for split in zoo.splits
        ]
        norms = torch.cat(weights).norm(dim=1)
        assert (entry["checkpoints"], entry["norm"]) == (9, pytest.approx(norms.mean().item(), rel=1e-5))
        assert entry["alpha"] is None  # 7 eigenvalues
    assert layers["conv2.weight"]["by_epoch"][0]["alpha"] > 1  # 3 for each of the 9 places of the kernel
    assert layers["fc1.bias"]["by_epoch"][0]["spectral_norm"] is None
    drifts = [entry["drift"] for entry in layers["fc1.weight"]["by_epoch"]]
    assert drifts[0] == 0
    assert drifts[2] > 0
    assert len(found["outliers"]) == 20
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "drift_over_epochs.png",
        "norm_over_epochs.png",
        "alpha_over_depth.png",
    }


def test_only_the_models_that_are_asked_for_are_shown(tiny_zoo, tiny_model, tmp_path):
    test_model = Zoo(tiny_zoo).rows("test")["model_id"][0]
    settings = {"model": str(tiny_model), "zoo": str(tiny_zoo)}
    found = profile(ProfileArguments(**settings, output_dir=str(tmp_path / "one"), models=[test_model]))
    assert found["checkpoints"] == {"train": 0, "validation": 0, "test": 3}
    assert found["train_checkpoints_compared_with"] == 21
    assert {entry["model_id"] for entry in found["outliers"]} == {test_model}
    everything = profile(ProfileArguments(**settings, output_dir=str(tmp_path / "all")))
    scores = {(e["model_id"], e["epoch"], e["layer"]): e["score"] for e in everything["outliers"]}
    for entry in found["outliers"]:
        key = entry["model_id"], entry["epoch"], entry["layer"]
        assert key not in scores or scores[key] == pytest.approx(entry["score"], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["nobody"]}, "has no model 'nobody'"),
        ({"layout_id": "abc"}, "has no checkpoint of the layout 'abc'"),
        ({"zoo": "nowhere/there/zoo"}, "the zoo nowhere/there/zoo does not exist"),
    ],
)
def test_what_is_not_in_the_zoo_is_told(tiny_zoo, tiny_model, tmp_path, change, message):
    settings = {"model": str(tiny_model), "zoo": str(tiny_zoo), "output_dir": str(tmp_path / "out"), **change}
    with pytest.raises(ValueError, match=message):
        profile(ProfileArguments(**settings))
    assert not list(tmp_path.iterdir())


def test_a_profile_of_known_matrices():
    layout = CheckpointLayout.build([TensorSpec("w", (2, 3), "float32"), TensorSpec("b", (5,), "float32")], 8)
    tensors = {"w": torch.zeros(2, 2, 3), "b": torch.ones(2, 5)}
    tensors["w"][0] = torch.tensor([[3.0, 0, 0], [0, 4, 0]])
    matrix, vector = (weight_profile(tensors, layer) for layer in layout.layers)
    np.testing.assert_allclose(matrix["norm"], [5, 0])
    np.testing.assert_allclose(matrix["spectral_norm"], [4, 0])
    np.testing.assert_allclose(vector["norm"], [5**0.5] * 2)
    np.testing.assert_allclose(vector["std"], [0, 0], atol=1e-7)
    assert np.isnan([*matrix["alpha"], *vector["alpha"], *vector["spectral_norm"]]).all()


def test_spectral_norms_are_those_of_torch():
    for shape in ((4, 9), (9, 4)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert spectral_norm(matrix) == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-5)


def test_eigenvalues_of_a_kernel_are_those_of_its_places_without_zeros():
    kernel = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    kernel[:, :, 0, 0] = 0
    layout = CheckpointLayout.build([TensorSpec("k", (4, 6, 3, 3), "float32", "conv")], 8)
    found = eigenvalues(kernel.flatten(2).movedim(2, 0))
    assert len(found) == 4 * 8
    one = kernel[:, :, 1, 2].double()
    for value in torch.linalg.eigvalsh(one @ one.T):
        assert np.isclose(found, value.item()).any()
    (alpha,) = weight_profile({"k": kernel[None]}, layout.layers[0])["alpha"]
    assert alpha == pytest.approx(power_law_exponent(found))
    (scaled,) = weight_profile({"k": 1e-4 * kernel[None]}, layout.layers[0])["alpha"]
    assert scaled == pytest.approx(alpha, rel=1e-3)


def test_exponents_of_pareto_values_are_found():
    values = np.random.default_rng(0).pareto(1.5, 2000) + 1  # density falls as value ** -2.5
    assert hill_exponent(values) == pytest.approx(2.5, abs=0.15)
    assert power_law_exponent(values[:500]) == pytest.approx(2.5, abs=0.3)
    assert np.isnan(power_law_exponent(values[:9]))
    assert np.isnan(power_law_exponent(np.ones(30)))


# ---------------------------------------------------------------------------------------------------- outliers
def population(models: int, epochs: int, features: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings that move on by 10 with each epoch and spread by 1."""
    model_ids = np.repeat([f"m{number:02}" for number in range(models)], epochs)
    epoch = np.tile(np.arange(epochs), models)
    values = np.random.default_rng(0).normal(size=(len(epoch), features)) + 10 * epoch[:, None]
    return values, model_ids, epoch


def test_a_checkpoint_is_compared_with_those_of_its_epoch():
    values, model_ids, epoch = population(models=14, epochs=2)
    is_train = np.char.less(model_ids, "m12")
    row = np.flatnonzero((model_ids == "m13") & (epoch == 1))[0]
    values[row] -= 10  # what is usual at epoch 0
    scores, percentiles, same_epoch = outlier_scores(values, model_ids, epoch, is_train)
    assert scores.argmax() == row
    assert percentiles[row] == 100
    assert same_epoch.all()
    few, _, same_epoch = outlier_scores(values, model_ids, epoch, is_train & np.char.less(model_ids, "m08"))
    assert not same_epoch.any()
    assert few[row] < scores[row]


def test_train_rows_do_not_look_nearer_than_others():
    values, model_ids, epoch = population(models=60, epochs=1, features=20)
    is_train = np.char.less(model_ids, "m30")
    scores, _, _ = outlier_scores(values, model_ids, epoch, is_train)
    assert abs(np.median(scores[~is_train]) - np.median(scores[is_train])) < 1


def test_layers_that_are_all_alike_have_no_outliers_but_for_one_that_is_not():
    values, model_ids, epoch = population(models=12, epochs=2)
    values[epoch == 0] = 1 + 1e-7 * values[epoch == 0]  # biases that are still zero, encoded with rounding
    is_train = np.ones(len(values), bool)
    scores, _, _ = outlier_scores(values, model_ids, epoch, is_train)
    assert np.abs(scores[epoch == 0]).max() < 1
    values[0] += 1
    scores, _, _ = outlier_scores(values, model_ids, epoch, is_train)
    assert scores.argmax() == 0
    assert scores[0] > 100


def test_one_model_is_nothing_to_compare_with():
    values, model_ids, epoch = population(models=2, epochs=2)
    with pytest.raises(ValueError, match="at least two models"):
        outlier_scores(values, model_ids, epoch, model_ids == "m00")


def test_drift_starts_at_the_first_epoch_there_is():
    embeddings = np.zeros((3, 1, 2))
    embeddings[:, 0, 0] = [4, 1, 7]
    found = drift(embeddings, np.array(["a", "a", "b"]), np.array([6, 3, 9]))
    np.testing.assert_allclose(found[:, 0], [3, 0, 0])


# ---------------------------------------------------------------------------------------------------- plots
@pytest.mark.parametrize("count", [3, 80])
def test_plots_hold_few_layers_and_many(count):
    names = [f"layer{number}" for number in range(count)]
    lines = {name: np.array([0.0, 1.0, np.nan]) for name in names}
    axes = layer_plots.over_epochs(np.arange(3), lines, "norm", log=True).axes[0]
    assert len(axes.lines) == count
    bars = layer_plots.relative_changes(names, np.arange(count) / count, [False] * count).axes[0]
    assert [label.get_text() for label in bars.get_yticklabels()] == names[-layer_plots.MOST_BARS :]
    depth = layer_plots.alpha_over_depth(np.arange(count), names, {0: np.ones(count), 5: np.ones(count)}).axes[0]
    assert len(depth.lines) == 2
