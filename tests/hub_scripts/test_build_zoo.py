"""A built zoo: a dataset anyone can load, aligned, split by model, and what it says is true."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from datasets import Dataset, Features, load_dataset

from hub_scripts import build_zoo as command
from hub_scripts.build_zoo import BuildZooArguments
from hub_scripts.evaluation.functional import evaluate
from hub_scripts.zoos.zoo import Zoo, token_cache
from tokenization_sane import SaneWeightTokenizer, weight_distance


def test_load_dataset_reads_a_zoo_and_its_rows_are_checkpoints(tiny_zoo):
    zoo = load_dataset(str(tiny_zoo))
    assert set(zoo) == {"train", "validation", "test"}
    row = zoo["train"][0]
    assert (row["model_id"], row["epoch"]) == (zoo["train"]["model_id"][1], 0)  # by model, then by epoch
    assert safetensors.torch.load(row["weights"])["conv1.weight"].shape == (3, 1, 3, 3)
    assert row["generalization_gap"] == pytest.approx(row["train_accuracy"] - row["test_accuracy"])
    assert {"hparams_learning_rate", "hparams_seed", "architecture", "layout_id"} <= set(row)


def test_no_model_stands_in_two_splits(tiny_zoo):
    models = [set(split["model_id"]) for split in load_dataset(str(tiny_zoo)).values()]
    assert sum(map(len, models)) == len(set.union(*models)) == 9
    assert min(map(len, models)) >= 1


def test_accuracies_in_the_rows_are_those_of_the_weights_in_the_rows(tiny_zoo):
    zoo = Zoo(tiny_zoo)
    images, labels = zoo.task.images["test"], zoo.task.labels["test"]
    found = evaluate(zoo.module, zoo.stacked("train"), images, labels)
    np.testing.assert_allclose(found.accuracy, zoo.column("train", "test_accuracy"), atol=2 / len(labels))
    np.testing.assert_allclose(found.loss, zoo.column("train", "test_loss"), atol=1e-4)
    last = zoo.column("train", "epoch") == 2
    assert found.accuracy[last].mean() > found.accuracy[~last].mean() + 0.1  # they did learn


def test_alignment_brings_models_nearer_and_can_be_undone(tiny_zoo):
    zoo = Zoo(tiny_zoo)
    rows = zoo.rows("train")
    reference = next(
        i for i, row in enumerate(rows) if row["model_id"] == row["alignment_reference"] and row["epoch"] == 2
    )
    assert rows[reference]["alignment_distance_after"] == 0
    for index in np.flatnonzero(zoo.column("train", "epoch") == 2):
        row = rows[int(index)]
        assert row["alignment_distance_after"] <= row["alignment_distance_before"]
        aligned, target = zoo.state_dict("train", index), zoo.state_dict("train", reference)
        assert weight_distance(aligned, target) == pytest.approx(row["alignment_distance_after"], abs=1e-4)
        draw = [torch.tensor(p) for p in row["alignment_permutations"]]
        spec = zoo.symmetries.of_kind("permutation", "sign")
        original = spec.apply(aligned, spec.invert(draw))
        assert weight_distance(original, target) == pytest.approx(row["alignment_distance_before"], abs=1e-4)


def test_the_same_seed_builds_the_same_networks(tmp_path, tiny_zoo):
    arguments = json.loads((tiny_zoo / "zoo.json").read_text())["arguments"]
    command.build_zoo(BuildZooArguments(output_dir=str(tmp_path / "again"), **arguments))
    assert Zoo(tmp_path / "again").rows("test")["weights"] == Zoo(tiny_zoo).rows("test")["weights"]


def test_the_card_counts_what_is_there(tiny_zoo):
    card = (tiny_zoo / "README.md").read_text()
    rows = load_dataset(str(tiny_zoo), split="train")
    assert f"| train | {len(set(rows['model_id']))} | {len(rows)} |" in card
    assert "path: data/train-*.parquet" in card


def test_tokens_are_cached_once_and_are_the_tokenizers(tiny_zoo, tmp_path):
    zoo = Zoo(tiny_zoo)
    tokenizer = SaneWeightTokenizer(16, "flat", "zoo").fit([zoo.state_dict("train", i) for i in range(4)], zoo.layout)
    tokens = token_cache(zoo, "train", tokenizer, tmp_path, chunk_size=3)
    expected = tokenizer(zoo.state_dict("train", 5))["token_values"][0]
    torch.testing.assert_close(torch.from_numpy(tokens[5].copy()), expected)
    before = (tmp_path / "train.npy").stat().st_mtime_ns
    token_cache(zoo, "train", tokenizer, tmp_path)
    assert (tmp_path / "train.npy").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["train.npy"]


# ---------------------------------------------------------------------------------------------------- bad zoos
def changed(tiny_zoo, tmp_path, change) -> str:
    """A copy of the zoo whose train rows were changed."""
    folder = tmp_path / "changed"
    shutil.copytree(tiny_zoo, folder)
    file = next((folder / "data").glob("train-*.parquet"))
    rows = Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    features: Features = rows.features
    Dataset.from_list(change([dict(row) for row in rows]), features=features).to_parquet(str(file))
    return str(folder)


def test_a_damaged_row_is_named(tiny_zoo, tmp_path):
    def cut(rows):
        rows[1]["weights"] = rows[1]["weights"][:40]
        return rows

    zoo = Zoo(changed(tiny_zoo, tmp_path, cut))
    model = zoo.rows("train")[1]["model_id"]
    with pytest.raises(ValueError, match=f"row with model_id '{model}', epoch 1 are damaged"):
        zoo.stacked("train")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w | {"fc1.weight": torch.full_like(w["fc1.weight"], float("nan"))}, "fc1.weight holds .* NaN"),
        (
            lambda w: w | {"fc1.weight": w["fc1.weight"][:2].clone()},
            r"fc1.weight has shape \(2, 20\).*expects \(7, 20\)",
        ),
    ],
)
def test_weights_that_do_not_fit_or_are_no_numbers_are_named_with_their_row(tiny_zoo, tmp_path, spoil, message):
    def change(rows):
        rows[2]["weights"] = safetensors.torch.save(spoil(safetensors.torch.load(rows[2]["weights"])))
        return rows

    with pytest.raises(ValueError, match=f"train row .* epoch 2: {message}"):
        Zoo(changed(tiny_zoo, tmp_path, change)).stacked("train")


def test_an_empty_zoo_and_a_leaking_split_are_refused(tiny_zoo, tmp_path):
    def leak(rows):
        rows[0]["model_id"] = load_dataset(str(tiny_zoo), split="test")["model_id"][0]
        return rows

    with pytest.raises(ValueError, match="stands in the splits train and test"):
        Zoo(changed(tiny_zoo, tmp_path, leak))
    with pytest.raises(ValueError, match=r"is no zoo: it has no zoo.json. Build one"):
        Zoo(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_models": 1}, "--num-models is 1, expected at least 3"),
        ({"initialisations": ["ones"]}, "--initialisations ones is not known"),
        ({"learning_rates": []}, "--learning-rates is empty"),
    ],
)
def test_a_zoo_that_cannot_be_split_or_trained_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        BuildZooArguments(output_dir=str(tmp_path / "zoo"), **settings)


def test_an_unknown_task_leaves_nothing_behind(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--output-dir", str(tmp_path / "zoo"), "--task", "cats"])
    assert stopped.value.code == 1
    assert "there is no task 'cats'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_rows_are_left_out_and_named_where_that_is_asked_for(tiny_zoo, tmp_path, caplog):
    def change(rows):
        rows[0]["weights"] = rows[0]["weights"][:40]
        weights = safetensors.torch.load(rows[2]["weights"])
        rows[2]["weights"] = safetensors.torch.save(
            weights | {"fc1.bias": torch.full_like(weights["fc1.bias"], torch.inf)}
        )
        return rows

    zoo = Zoo(changed(tiny_zoo, tmp_path, change), on_error="skip")
    assert len(zoo.rows("train")) == len(Zoo(tiny_zoo).rows("train")) - 2
    assert zoo.stacked("train")["fc1.bias"].isfinite().all()
    assert [record.getMessage().startswith("skipped: ") for record in caplog.records] == [True, True]
    assert "fc1.bias holds 7 NaN or infinite values" in caplog.text


def test_a_zoo_of_one_model_says_which_split_is_missing(tiny_zoo, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(tiny_zoo, folder)
    for file in [*(folder / "data").glob("validation-*"), *(folder / "data").glob("test-*")]:
        file.unlink()
    with pytest.raises(ValueError, match="has no models in its validation split; it has train"):
        Zoo(folder).rows("validation")
    for file in (folder / "data").glob("*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no rows; build or import some models first"):
        Zoo(folder)
