"""Checkpoints from elsewhere become a zoo; each format's reading is tested in `importers/`."""

import csv
import json
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load, load_file, save_file

from hub_scripts import import_zoo as command
from hub_scripts.import_zoo import ImportZooArguments, import_zoo
from hub_scripts.zoos.architectures import MLP, SmallCNN
from hub_scripts.zoos.zoo import Zoo

KWARGS = {"channels": [3, 4], "hidden_size": 5}
MODELS = 6


def rows() -> list[dict]:
    return [
        {"path": f"m{m}/e{e}.safetensors", "model_id": f"m{m}", "epoch": e, "test_accuracy": 0.5 + 0.01 * m,
         "train_accuracy": 0.6 + 0.01 * m, "lr": 0.1 if m % 2 else 0.01}
        for m in range(MODELS) for e in (0, 1)
    ]  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Path:
    """Six small networks, two checkpoints each, and a table of their properties."""
    folder = tmp_path / "source"
    for row in rows():
        torch.manual_seed(int(row["model_id"][1:]))
        state_dict = {name: tensor + 0.1 * row["epoch"] for name, tensor in SmallCNN(**KWARGS).state_dict().items()}
        (folder / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        save_file(state_dict, folder / row["path"])
    write_table(folder, rows())
    return folder


def write_table(folder: Path, table: list[dict]) -> None:
    with (folder / "properties.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def arguments(source: Path, output: str = "zoo", **kwargs) -> ImportZooArguments:
    args = ImportZooArguments(properties=str(source / "properties.csv"), hparams=["lr"], **kwargs)
    args.source, args.output_dir = str(source), str(source.parent / output)
    return args


def with_architecture(**kwargs) -> dict:
    return {
        "architecture": "hub_scripts.zoos.architectures:SmallCNN",
        "architecture_kwargs": json.dumps(KWARGS),
        "input_shape": "1,8,8",
        **kwargs,
    }


def test_rows_hold_weights_properties_and_where_they_came_from(source):
    info = import_zoo(arguments(source))
    zoo = load_dataset("parquet", data_files={"rows": [str(f) for f in Path(source.parent / "zoo/data").iterdir()]})
    assert info["num_checkpoints"] == len(zoo["rows"]) == 12
    by_key = {(row["model_id"], row["epoch"]): row for row in zoo["rows"]}
    for expected in rows():
        row = by_key[expected["model_id"], expected["epoch"]]
        assert (row["test_accuracy"], row["hparams_lr"]) == (expected["test_accuracy"], expected["lr"])
        original = load_file(source / expected["path"])
        assert all(torch.equal(tensor, original[name]) for name, tensor in load(row["weights"]).items())
        assert row["source"].startswith(f"source/{expected['path']}")
    models = [{row["model_id"] for row in zoo["rows"] if row["split"] == split} for split in ("train", "test")]
    assert not models[0] & models[1]


def test_aligned_rows_compute_what_the_originals_do_and_can_be_put_back(source):
    import_zoo(arguments(source, **with_architecture(align=True)))
    zoo = Zoo(source.parent / "zoo")
    images = torch.randn(4, 1, 8, 8)
    spec = zoo.symmetries.of_kind("permutation", "sign")
    for index, row in enumerate(zoo.rows("train")):
        own, aligned = (
            load_file(source / row["source"].split(" ")[0].removeprefix("source/")),
            zoo.state_dict("train", index),
        )
        outputs = [torch.func.functional_call(zoo.module, weights, (images,)) for weights in (own, aligned)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
        draw = [torch.tensor(p) for p in row["alignment_permutations"]]
        again = spec.apply(aligned, spec.invert(draw))
        assert all(torch.equal(again[name], own[name]) for name in own)
        assert row["alignment_distance_after"] <= row["alignment_distance_before"] + 1e-6
    (reference,) = set(zoo.rows("train")["alignment_reference"])
    best = max(set(zoo.rows("train")["model_id"]))  # accuracy grows with the number
    assert reference == best


def test_splits_of_the_table_are_kept(source):
    splits = ["train", "train", "train", "val", "test", "test"]
    write_table(source, [row | {"split": splits[int(row["model_id"][1:])]} for row in rows()])
    import_zoo(arguments(source))
    zoo = Zoo(source.parent / "zoo")
    assert {name: sorted(set(split["model_id"])) for name, split in zoo.splits.items()} == {
        "train": ["m0", "m1", "m2"],
        "validation": ["m3"],
        "test": ["m4", "m5"],
    }


def test_splits_depend_on_the_seed_alone(source):
    first = import_zoo(arguments(source))["files"]
    again = import_zoo(arguments(source, "again"))["files"]
    other = import_zoo(arguments(source, "other", seed=1))["files"]
    assert first == again != other


def test_copies_and_relatives_are_reported(source):
    for epoch in (0, 1):  # m1 becomes a copy of m0, m2 a fine-tuned one
        state_dict = load_file(source / f"m0/e{epoch}.safetensors")
        save_file(state_dict, source / f"m1/e{epoch}.safetensors")
        save_file({k: v + 1e-3 for k, v in state_dict.items()}, source / f"m2/e{epoch}.safetensors")
    import_zoo(arguments(source))
    lineage = json.loads((source.parent / "zoo" / "lineage.json").read_text())
    assert lineage["num_duplicates"] == 2
    assert lineage["families"] == [{"size": 3, "members": ["m0", "m1", "m2"]}]
    nearest = {model: other for model, other, _ in lineage["nearest"]}
    assert nearest["m0"] == "m1"
    card = (source.parent / "zoo" / "README.md").read_text()
    assert "3 networks: `m0`, `m1`, `m2`" in card


def test_networks_of_several_kinds_stand_in_one_zoo(source):
    extra = []
    for number in range(3):
        save_file(MLP(hidden_sizes=(6, 4 + number)).state_dict(), source / f"mlp{number}.safetensors")
        extra.append(rows()[0] | {"path": f"mlp{number}.safetensors", "model_id": f"x{number}"})
    write_table(source, rows() + extra)
    import_zoo(arguments(source))
    zoo = Zoo(source.parent / "zoo")
    assert len(zoo.layout_ids) == 4
    with pytest.raises(ValueError, match="holds 4 layouts, this needs one"):
        zoo.layout  # noqa: B018
    parts = [Zoo(source.parent / "zoo", layout_id=layout_id) for layout_id in zoo.layout_ids]
    assert sorted(len(part) for part in parts) == [1, 1, 1, 12]
    with pytest.raises(ValueError, match="has no checkpoint of the layout 'other'"):
        Zoo(source.parent / "zoo", layout_id="other")


def damage(source: Path, what: str) -> None:
    file = source / "m2" / "e1.safetensors"
    state_dict = load_file(file)
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif what == "nan":
        state_dict["fc1.bias"][1] = float("nan")
    elif what == "shape":
        state_dict["fc1.bias"] = torch.zeros(9)
    elif what == "missing":
        del state_dict["fc1.bias"]
    elif what == "extra":
        state_dict["fc9.bias"] = torch.zeros(2)
    if what != "cut":
        save_file(state_dict, file)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cut", r"m2/e1\.safetensors"),
        ("nan", "fc1.bias holds 1 NaN"),
        ("shape", r"fc1.bias has shape \(9,\), the layout expects \(5,\)"),
        ("missing", "fc1.bias is missing"),
        ("extra", "fc9.bias is not a tensor of hub_scripts.zoos.architectures:SmallCNN"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_and_nothing_is_left(source, what, message):
    damage(source, what)
    with pytest.raises(ValueError, match=message) as error:
        import_zoo(arguments(source, **with_architecture()))
    assert "m2/e1.safetensors" in str(error.value)
    assert [path.name for path in source.parent.iterdir()] == ["source"]
    info = import_zoo(arguments(source, **with_architecture(on_error="skip")))
    assert info["num_checkpoints"] == 11
    assert len(info["skipped"]) == 1
    assert "m2/e1.safetensors" in info["skipped"][0]


def test_rows_that_contradict_one_another_are_named(source):
    write_table(source, [*rows(), rows()[3] | {"path": "m0/e0.safetensors"}])
    with pytest.raises(ValueError, match=r"line 14: model 'm1' has epoch 1 in .*line 5"):
        import_zoo(arguments(source))
    table = rows()
    table[4]["test_accuracy"] = "good"
    write_table(source, table)
    with pytest.raises(ValueError, match=r"'test_accuracy' is a number in .*line 2\) and text in .*line 6\)"):
        import_zoo(arguments(source))
    write_table(source, [row | {"split": "train" if row["epoch"] else "test"} for row in rows()])
    with pytest.raises(ValueError, match=r"line 3: model 'm0' stands in split train, in .*line 2 in test"):
        import_zoo(arguments(source))


def test_mistakes_in_the_arguments_are_said_before_anything_is_read(capsys, source):
    for words, message in (
        (["--format", "zip", "a", "b"], "--format is 'zip', expected one of folder, modelzoos"),
        (["a", "b", "--align"], "--align needs --input-shape"),
        (["--format", "hub", "--properties", "p.csv", "a", "b"], "--properties is a table for --format folder"),
        (["a"], "required: OUTPUT_DIR"),
    ):
        with pytest.raises(SystemExit):
            command.main(words)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([str(source), str(source.parent / "zoo"), "--align", "--input-shape", "1,8,8"])
    assert "--align needs --architecture" in capsys.readouterr().err


def test_the_command_tells_what_it_made(capsys, source):
    words = ["--format", "folder", str(source), str(source.parent / "zoo"), "--hparams", "lr"]
    command.main([*words, "--properties", str(source / "properties.csv")])
    assert "6 models, 12 checkpoints in" in capsys.readouterr().out
