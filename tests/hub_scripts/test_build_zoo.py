"""A built zoo: a dataset anyone can load, aligned, split by model, and what it says is true; however often it was killed."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from datasets import load_dataset
from filelock import FileLock

from hub_scripts import build_zoo as command
from hub_scripts.build_zoo import BuildZooArguments, build_zoo
from hub_scripts.evaluation.functional import build_module, evaluate
from hub_scripts.zoos import population
from hub_scripts.zoos.schema import checksum
from hub_scripts.zoos.tasks import load_task
from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import SymmetrySpec, weight_distance

TINY = {
    "num_models": 6,
    "epochs": 2,
    "batch_size": 100,
    "learning_rates": [1e-2, 3e-3],
    "weight_decays": [0.0],
    "initialisations": ["kaiming_uniform"],
    "architecture_kwargs": '{"channels": [2, 3], "hidden_size": 5}',
    "data_fractions": [0.5],
}
# networks of two sizes and two activations, trained in many ways
MIXED = TINY | {
    "num_models": 16,
    "sweep": "random",
    "sweep_architecture": '{"channels": [[2, 3], [3, 4]], "activation": ["tanh", "relu"]}',
    "optimizers": ["adamw", "sgd"],
    "dropouts": [0.0, 0.3],
    "data_fractions": [0.3, 1.0],
    "label_noises": [0.0, 0.2],
    "models_per_batch": 3,
    "keep_epochs": ["0", "2"],
}


def build(folder, **settings) -> Zoo:
    build_zoo(BuildZooArguments(output_dir=str(folder), **settings))
    return Zoo(folder)


def flags(settings) -> list[str]:
    """Settings as words of a command line."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    return [word for name, values in lists.items() for word in (f"--{name}", *map(str, values))]


def tables(folder) -> dict[str, pa.Table]:
    """All rows with their weights, by file."""
    return {file.name: pq.read_table(file) for file in sorted((Path(folder) / "data").glob("*.parquet"))}


@pytest.fixture(scope="module")
def mixed_zoo(tmp_path_factory):
    return build(tmp_path_factory.mktemp("mixed") / "zoo", **MIXED)


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
    build(tmp_path / "again", **arguments)
    assert tables(tmp_path / "again") == tables(tiny_zoo)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # no parts are left


def test_the_card_counts_what_is_there(tiny_zoo):
    card = (tiny_zoo / "README.md").read_text()
    rows = load_dataset(str(tiny_zoo), split="train")
    assert f"| train | {len(set(rows['model_id']))} | {len(rows)} |" in card
    assert "path: data/train-*.parquet" in card


# ---------------------------------------------------------------------------------------------------- sweeps
def test_networks_of_many_kinds_stand_in_one_zoo(mixed_zoo):
    assert mixed_zoo.num_models == 16
    assert len(mixed_zoo.layout_ids) == 2
    references = mixed_zoo.info["alignment_reference"]
    assert sorted(references) == mixed_zoo.layout_ids
    kinds = Counter()
    for rows in mixed_zoo.splits.values():
        for row in rows:
            kwargs = json.loads(row["architecture_kwargs"])
            assert kwargs["activation"] == row["hparams_activation"]
            assert kwargs["channels"] == json.loads(row["hparams_channels"])
            assert kwargs["dropout"] == row["hparams_dropout"]
            assert row["hparams_optimizer"] in ("adamw", "sgd")
            assert row["hparams_data_fraction"] in (0.3, 1.0)
            assert row["hparams_label_noise"] in (0.0, 0.2)
            assert row["alignment_reference"] == references[row["layout_id"]]
            assert row["epoch"] in (0, 2)
            kinds[row["layout_id"], row["hparams_activation"]] += 1
    assert len(kinds) == 4


def test_each_networks_figures_are_those_of_its_own_architecture(mixed_zoo):
    check_figures(mixed_zoo)
    rows = mixed_zoo.rows("train")
    clean = [row for row in rows if row["hparams_label_noise"] == 0 and row["hparams_data_fraction"] == 1]
    assert clean
    for index in [i for i, row in enumerate(rows) if row in clean]:
        found = evaluate(module_of(rows[index]), stacked(mixed_zoo, "train", index), *task_of(mixed_zoo, "train"))
        assert found.accuracy[0] == pytest.approx(rows[index]["train_accuracy"], abs=2 / 797)


def module_of(row):
    return build_module(row["architecture"], json.loads(row["architecture_kwargs"]))


def stacked(zoo, split, index):
    return {name: tensor[None] for name, tensor in zoo.state_dict(split, index).items()}


def task_of(zoo, split):
    return zoo.task.images[split], zoo.task.labels[split]


def check_figures(zoo):
    """Every row's weights, run as the row says, have the row's figures."""
    images, labels = task_of(zoo, "test")
    for split, rows in zoo.splits.items():
        for index, row in enumerate(rows):
            found = evaluate(module_of(row), stacked(zoo, split, index), images, labels)
            assert found.accuracy[0] == pytest.approx(row["test_accuracy"], abs=2 / len(labels))
            assert found.loss[0] == pytest.approx(row["test_loss"], abs=1e-4)


def test_symmetries_of_a_layout_hold_for_all_its_networks(mixed_zoo):
    for layout_id in mixed_zoo.layout_ids:
        spec = SymmetrySpec.from_json((mixed_zoo.folder / "symmetries" / f"{layout_id}.json").read_text())
        # signs hold for tanh alone, scales for ReLU alone
        assert [group.kind for group in spec.groups] == ["permutation"] * 3
        modules = {
            row["hparams_activation"]: module_of(row)
            for rows in mixed_zoo.splits.values()
            for row in rows
            if row["layout_id"] == layout_id
        }
        assert set(modules) == {"tanh", "relu"}
        for module in modules.values():
            assert all(report.ok for report in spec.verify(module, torch.randn(2, 1, 8, 8)))


def test_processes_train_the_same_networks(mixed_zoo, tmp_path):
    build(tmp_path / "zoo", **MIXED, num_workers=2)
    assert tables(tmp_path / "zoo") == tables(mixed_zoo.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


@pytest.mark.parametrize(("keep", "epochs"), [(["last"], {2}), (["all"], {0, 1, 2}), ([1, 0], {0, 1})])
def test_only_the_epochs_asked_for_are_kept(tmp_path, keep, epochs):
    zoo = build(tmp_path / "zoo", **TINY, keep_epochs=keep)
    assert set(zoo.column("train", "epoch")) == epochs
    assert len(zoo) == zoo.info["num_checkpoints"] == 6 * len(epochs)
    if keep == [1, 0]:
        rows = {(row["model_id"], row["epoch"]): row for row in build(tmp_path / "all", **TINY).rows("train")}
        for row in zoo.rows("train"):
            assert row["test_loss"] == rows[row["model_id"], row["epoch"]]["test_loss"]


def test_a_grid_that_is_not_covered_is_told(tmp_path, capsys):
    build(tmp_path / "zoo", **TINY | {"learning_rates": [1e-3 * i for i in range(1, 8)]})
    assert "6 networks take the first 6 of 7 combinations of settings" in capsys.readouterr().out


def test_networks_that_diverge_are_left_out_and_named(tmp_path, capsys):
    settings = TINY | {"num_models": 8, "optimizers": ["sgd"], "learning_rates": [1e-3, 1e10], "weight_decays": [1.0]}
    command.main(["--output-dir", str(tmp_path / "zoo"), *flags(settings)])
    zoo = Zoo(tmp_path / "zoo")
    skipped = zoo.info["skipped"]
    assert len(skipped) == 4
    assert all(reason.endswith("from epoch 1: its weights are not finite") for reason in skipped)
    assert len(zoo) == zoo.info["num_checkpoints"] == 4 * 3 + 4
    for split in zoo.splits:
        zoo.stacked(split)  # would refuse weights that are not finite
    assert capsys.readouterr().out.count("left out: model-") == 4


def test_a_class_of_transformers_is_trained(tmp_path):
    kwargs = {"num_channels": 1, "embedding_size": 3, "hidden_sizes": [4], "depths": [1], "num_labels": 10, "layer_type": "basic"}  # fmt: skip
    architecture = "transformers:ResNetForImageClassification"
    settings = TINY | {"num_models": 3, "architecture": architecture, "architecture_kwargs": json.dumps(kwargs)}
    zoo = build(tmp_path / "zoo", **settings, license="mit")
    check_figures(zoo)
    assert zoo.info["license"] == "mit"
    assert "license: mit" in (tmp_path / "zoo" / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------- many tasks
def test_each_network_is_trained_and_measured_on_classes_of_its_own(tmp_path):
    settings = TINY | {
        "num_models": 9,
        "epochs": 5,
        "data_fractions": [1.0],
        "keep_epochs": ["last"],
        "classes_per_network": 3,
    }
    zoo = build(tmp_path / "zoo", **settings, models_per_batch=4)
    assert zoo.has_own_classes
    known = {split: zoo.classes(split) for split in zoo.splits}
    assert set(known["train"]).isdisjoint(known["validation"] + known["test"])
    for split, rows in zoo.splits.items():
        for index, row in enumerate(rows):
            task = load_task(f"digits[{row['hparams_classes'].replace('-', ',')}]")
            module = module_of(row)
            assert module.fc2.out_features == 3  # follows
            for images in ("validation", "test"):
                found = evaluate(module, stacked(zoo, split, index), task.images[images], task.labels[images])
                assert found.accuracy[0] == pytest.approx(row[f"{images}_accuracy"], abs=1e-3)
                assert found.loss[0] == pytest.approx(row[f"{images}_loss"], abs=1e-4)
    assert zoo.column("train", "train_accuracy").mean() > 0.6
    # the same through the zoo: labels of all images, as each network numbers them
    found = evaluate(zoo.module, zoo.stacked("train"), zoo.whole_task.images["test"], zoo.labels("test", "train"))
    np.testing.assert_allclose(found.accuracy, zoo.column("train", "test_accuracy"), atol=1e-3)
    with pytest.raises(
        ValueError, match=r"each network of .*zoo knows other classes of digits; say which ones the task shall"
    ):
        zoo.task  # noqa: B018
    build(tmp_path / "again", **settings, models_per_batch=64)  # networks do not depend on their company
    again = Zoo(tmp_path / "again")
    assert known == {split: again.classes(split) for split in again.splits}
    np.testing.assert_allclose(again.column("train", "test_loss"), zoo.column("train", "test_loss"), atol=1e-3)


def test_labels_of_a_zoo_of_one_task_are_the_tasks(tiny_zoo):
    zoo = Zoo(tiny_zoo)
    assert not zoo.has_own_classes
    assert zoo.task is zoo.whole_task
    assert torch.equal(zoo.labels("test", "train"), zoo.task.labels["test"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes_per_network": 1}, "--classes-per-network is 1, expected at least 2"),
        ({"classes_per_network": 11}, "--classes-per-network is 11, but digits has 10 classes"),
        ({"classes_per_network": 4, "architecture_kwargs": '{"num_classes": 3}'}, r"gives an output of shape \(2, 3\) .*, expected \(2, 4\)"),
        ({"classes_per_network": 4, "sweep_architecture": '{"classes": [1]}'}, "classes has a flag of its own"),
    ],
)  # fmt: skip
def test_classes_that_networks_cannot_have_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "zoo", **TINY | settings)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- interrupted
class Interrupted(Exception):
    """Stands for whatever ends a build."""


def interrupted_build(folder, monkeypatch, after=2, **settings):
    """Stop when some groups are done; gives the folder of their parts."""
    real, calls = population.train_group, []

    def train_group(*args):
        if len(calls) == after:
            raise Interrupted
        calls.append(args)
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(population, "train_group", train_group)
        with pytest.raises(Interrupted):
            build(folder, **settings)
    return folder.with_name(f".{folder.name}.parts")


def test_finished_groups_are_not_trained_again(tmp_path, monkeypatch):
    settings = TINY | {"models_per_batch": 2}
    parts = interrupted_build(tmp_path / "zoo", monkeypatch, **settings)
    assert sorted(path.name for path in parts.iterdir()) == [".sane", "group-00000", "group-00001"]
    trained = []
    real = population.train_group
    monkeypatch.setattr(population, "train_group", lambda *args: (trained.append(args[4].name), real(*args)))
    build(tmp_path / "zoo", **settings)
    assert trained == ["group-00002"]
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]
    monkeypatch.undo()
    build(tmp_path / "undisturbed", **settings)
    assert tables(tmp_path / "zoo") == tables(tmp_path / "undisturbed")


def test_other_settings_do_not_go_on_with_what_was_begun(tmp_path, monkeypatch):
    settings = TINY | {"models_per_batch": 2}
    interrupted_build(tmp_path / "zoo", monkeypatch, **settings)
    with pytest.raises(ValueError, match=r"zoo\.parts was begun with --batch-size 100, now it is 50; use the same"):
        build(tmp_path / "zoo", **settings | {"batch_size": 50})
    build(tmp_path / "zoo", **settings, license="mit")  # does not change the networks
    with pytest.raises(ValueError, match="already holds something"):
        build(tmp_path / "zoo", **settings)


def test_nothing_is_left_of_a_build_that_finished_no_group(tmp_path, monkeypatch):
    interrupted_build(tmp_path / "zoo", monkeypatch, after=0, **TINY)
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_build_one_zoo(tmp_path):
    with (
        FileLock(tmp_path / ".zoo.lock"),
        pytest.raises(ValueError, match=r"another process is building .*zoo; wait for it, or end it"),
    ):
        build(tmp_path / "zoo", **TINY)


KILL = """
import os, random, signal, sys, time
from pathlib import Path

import torch
import sklearn.datasets
from hub_scripts.build_zoo import main

torch.set_num_threads(1)
random.seed(0)
folder, words = Path(sys.argv[1]), sys.argv[2:]
parts, partial = folder / ".killed.parts", folder / ".killed.partial"

def start(name):
    # a child has imported all; the parent never runs torch, which would not survive a fork
    child = os.fork()
    if child == 0:
        try:
            main(["--output-dir", str(folder / name), *words])
        finally:
            os._exit(0 if (folder / name).exists() else 1)
    return child

def groups():
    return len(list(parts.glob("group-*")))

moments = [(lambda: True, 0.4)] * 2 + [(lambda n=n: groups() >= n, 0.05) for n in range(1, 6)] + [(partial.exists, 0.03)] * 3
for number, (reached, jitter) in enumerate(moments):
    child = start("killed")
    while not reached():
        time.sleep(0.001)
    time.sleep(random.uniform(0, jitter))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or (folder / "killed").exists():
        sys.exit(f"the build had ended before kill {number}")
    print("killed with", groups(), "groups done", flush=True)
for name in ("killed", "undisturbed"):
    _, status = os.waitpid(start(name), 0)
    if status:
        sys.exit(f"{name} failed")
"""


def test_a_build_killed_ten_times_ends_as_one_undisturbed(tmp_path):
    settings = TINY | {"num_models": 24, "epochs": 3, "models_per_batch": 4, "data_fractions": [0.2]}
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path), *flags(settings)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("killed with") == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "undisturbed"]  # nothing is left beside them
    zoo = Zoo(tmp_path / "killed")
    found = [(row["model_id"], row["epoch"]) for rows in zoo.splits.values() for row in rows]
    assert sorted(found) == [(f"model-{number:05d}", epoch) for number in range(24) for epoch in range(4)]
    check_figures(zoo)
    assert tables(tmp_path / "killed") == tables(tmp_path / "undisturbed")


# ---------------------------------------------------------------------------------------------------- bad zoos
def reseal(row, weights: dict[str, torch.Tensor]) -> None:
    """Give a row other weights, with their own checksum."""
    row["weights"] = safetensors.torch.save(weights)
    row["weights_size"], row["weights_sha256"] = len(row["weights"]), checksum(row["weights"])


def changed(tiny_zoo, tmp_path, change) -> str:
    """A copy of the zoo whose train rows were changed."""
    folder = tmp_path / "changed"
    shutil.copytree(tiny_zoo, folder)
    (file,) = (folder / "data").glob("train-*.parquet")
    rows = pq.read_table(file)
    pq.write_table(pa.Table.from_pylist(change(rows.to_pylist()), schema=rows.schema), file)
    return str(folder)


def test_a_damaged_row_is_named(tiny_zoo, tmp_path):
    def cut(rows):
        rows[1]["weights"] = rows[1]["weights"][:40]
        return rows

    zoo = Zoo(changed(tiny_zoo, tmp_path, cut))
    model = zoo.rows("train")[1]["model_id"]
    with pytest.raises(ValueError, match=f"train row '{model}' epoch 1: the weights are damaged"):
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
        reseal(rows[2], spoil(safetensors.torch.load(rows[2]["weights"])))
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
        ({"learning_rates": ["1e-3"]}, "--learning-rates holds '1e-3', expected numbers such as"),
        ({"optimizers": ["lion"]}, "--optimizers lion is not known, expected some of adamw, adam, sgd"),
        ({"sweep": "best"}, "--sweep best is not known, expected some of grid, random"),
        ({"data_fractions": [0.0]}, "--data-fractions must be above 0"),
        ({"label_noises": [1.1]}, "--label-noises and --dropouts must be from 0 to 1"),
        ({"keep_epochs": ["0", "11"]}, "--keep-epochs is 0 11, expected all, last, or numbers from 0 to 10"),
        ({"num_workers": -1}, "--num-workers and --seed must not be negative"),
        ({"architecture_kwargs": "width=3"}, "--architecture-kwargs is no JSON: .* for instance"),
        ({"sweep_architecture": '{"hidden_size": 3}'}, "hidden_size is 3, expected a list of its values"),
        ({"sweep_architecture": '{"seed": [1, 2]}'}, "--sweep-architecture: seed has a flag of its own"),
        ({"sweep_architecture": '{"dropout": [0.1]}', "dropouts": [0.2]}, "dropout has a flag of its own"),
    ],
)
def test_a_zoo_that_cannot_be_split_or_trained_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        BuildZooArguments(output_dir=str(tmp_path / "zoo"), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture_kwargs": '{"num_classes": 9}'}, r"gives an output of shape \(2, 9\) for 2 images, expected \(2, 10\)"),
        ({"architecture_kwargs": '{"image_size": 12}'}, "cannot read the images of digits, which are 1 x 8 x 8: .*. Say so"),
        ({"sweep_architecture": '{"hidden_size": [2, "many"]}'}, "column 'hidden_size' is a number in .* and text in"),
        ({"dropouts": [0.1], "architecture": "torch.nn:Flatten"}, "does not accept"),
        ({"dropouts": [0.1], "architecture": "transformers:ResNetForImageClassification"}, "know the argument 'dropout'"),
        ({"num_models": 9, "sweep_architecture": '{"hidden_size": [1, 2, 3, 4, 5, 6, 7, 8, 9]}'},
         "is in the train split, to align the others to; give more --num-models"),
    ],
)  # fmt: skip
def test_what_would_fail_later_fails_before_training(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "zoo", **TINY | {"architecture_kwargs": "{}"} | settings)
    assert not list(tmp_path.iterdir())


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
        reseal(rows[2], weights | {"fc1.bias": torch.full_like(weights["fc1.bias"], torch.inf)})
        return rows

    zoo = Zoo(changed(tiny_zoo, tmp_path, change), on_error="skip")
    assert len(zoo.rows("train")) == len(Zoo(tiny_zoo).rows("train")) - 2
    assert zoo.stacked("train")["fc1.bias"].isfinite().all()
    assert [record.getMessage().startswith("skipped: ") for record in caplog.records] == [True, True, False]
    assert caplog.records[-1].getMessage().endswith("2 of 21 rows of the train split are skipped.")
    assert "fc1.bias holds 7 NaN or infinite values" in caplog.text


def test_two_rows_of_one_model_and_epoch_are_refused(tiny_zoo, tmp_path):
    def change(rows):
        rows[1]["epoch"] = rows[0]["epoch"]
        return rows

    with pytest.raises(ValueError, match="has epoch 0 twice, in the rows 0 and 1 of the train split"):
        Zoo(changed(tiny_zoo, tmp_path, change))


def test_a_zoo_of_several_functions_is_not_run_as_one(tiny_zoo, tmp_path):
    def change(rows):
        rows[0]["architecture_kwargs"] = json.dumps(
            json.loads(rows[0]["architecture_kwargs"]) | {"activation": "relu"}
        )
        return rows

    zoo = Zoo(changed(tiny_zoo, tmp_path, change))
    with pytest.raises(ValueError, match=r'have 2 architectures, .*"activation": "relu"'):
        zoo.module  # noqa: B018
    assert not zoo.can_run


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
