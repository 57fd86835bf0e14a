"""Any tree of checkpoints, and the table of what is known of them."""

import gzip
import json
import logging
import re

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from hub_scripts.zoos.importers import ImportOptions, importer
from hub_scripts.zoos.importers.folder import list_checkpoints

HEADER = "path,model_id,epoch,test_accuracy,train_accuracy,test_loss,lr"


def network(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"fc.weight": torch.randn(3, 2, generator=generator), "fc.bias": torch.randn(3, generator=generator)}


@pytest.fixture
def zoo(tmp_path):
    """a/1.safetensors, a/2.npz, b.h5 and c/, which is a folder of shards."""
    root = tmp_path / "zoo"
    (root / "a").mkdir(parents=True)
    save_file(network(1), root / "a" / "1.safetensors")
    np.savez(root / "a" / "2.npz", **{name: tensor.numpy() for name, tensor in network(2).items()})
    with h5py.File(root / "b.h5", "w") as file:
        for name, tensor in network(3).items():
            file[name.replace(".", "/")] = tensor.numpy()
    (root / "c").mkdir()
    files = {name: f"model-{number}-of-2.safetensors" for number, name in enumerate(network(4))}
    for name, file in files.items():
        save_file({name: network(4)[name]}, root / "c" / file)
    (root / "c" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return root


def table(zoo, *lines: str, name: str = "properties.csv") -> ImportOptions:
    """Options with a table of the given lines below the usual header."""
    (zoo / name).write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    return ImportOptions(properties=str(zoo / name))


def assert_network(checkpoint, seed: int) -> None:
    found = checkpoint.read()
    assert found.keys() == network(seed).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in network(seed).items())


# --- with a table


def test_rows_become_checkpoints_with_their_properties(zoo):
    options = table(
        zoo,
        "a/1.safetensors,007,3,0.5,0.75,1e-3,0.1",
        "a/2.npz,007,4,0.1,,NaN,0.1",
        "b.h5,second,0,,1,2,0.30000000000000004",
        "c,third,0,0,1,inf,1",
    )
    options.hparam_columns = ["lr"]
    first, second, third, fourth = importer("folder")(str(zoo), options)
    assert (first.model_id, first.epoch, first.split) == ("007", 3, None)
    assert first.columns == {
        "test_accuracy": 0.5,
        "train_accuracy": 0.75,
        "test_loss": 0.001,
        "hparams_lr": 0.1,
        "generalization_gap": 0.25,
    }
    assert first.where == f"{zoo}/a/1.safetensors ({zoo}/properties.csv, line 2)"
    assert second.columns == {"test_accuracy": 0.1, "train_accuracy": None, "test_loss": None, "hparams_lr": 0.1}
    assert third.columns["hparams_lr"] == 0.30000000000000004
    assert fourth.columns["test_loss"] == float("inf")
    assert [one.layout_source for one in (first, second, third, fourth)] == [None, None, zoo / "b.h5", None]
    for seed, checkpoint in enumerate([first, second, third, fourth], start=1):
        assert_network(checkpoint, seed)


@pytest.mark.parametrize("ending", ["csv.gz", "tsv", "json", "jsonl", "parquet"])
def test_every_kind_of_table_says_the_same(zoo, ending):
    rows = [
        {"path": "a/1.safetensors", "model_id": "m", "epoch": 1, "test_accuracy": 0.25, "note": "x", "good": True},
        {"path": "a/2.npz", "model_id": "m", "epoch": 2, "test_accuracy": None, "note": None, "good": False},
    ]
    file = zoo / f"table.{ending}"
    cells = [[*rows[0]], *([("" if value is None else str(value)) for value in row.values()] for row in rows)]
    if ending == "csv.gz":
        file.write_bytes(gzip.compress("\n".join(",".join(row) for row in cells).encode("utf-8-sig")))
    elif ending == "tsv":
        file.write_text("\n".join("\t".join(row) for row in cells))
    elif ending == "json":
        file.write_text(json.dumps(rows))
    elif ending == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    first, second = list_checkpoints(str(zoo), ImportOptions(properties=str(file)))
    assert (first.model_id, first.epoch) == ("m", 1)
    assert first.columns == {"test_accuracy": 0.25, "note": "x", "good": True}
    assert second.columns == {"test_accuracy": None, "note": None, "good": False}
    assert_network(second, 2)


def test_columns_can_have_other_names_and_be_left_out(zoo):
    (zoo / "t.csv").write_text("file,net,step,part,hparams_seed,junk\na/2.npz,x,5,VAL,1,[]\nb.h5,y,6.0,,2,7\n")
    options = ImportOptions(
        properties=str(zoo / "t.csv"),
        path_column="file",
        model_column="net",
        epoch_column="step",
        split_column="part",
        ignore_columns=["junk"],
    )
    first, second = list_checkpoints(str(zoo), options)
    assert (first.model_id, first.epoch, first.split, first.columns) == ("x", 5, "validation", {"hparams_seed": 1})
    assert (second.model_id, second.epoch, second.split, second.columns) == ("y", 6, None, {"hparams_seed": 2})


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("val", "validation"), ("valid", "validation"), ("Dev", "validation"), ("test", "test")],
)
def test_splits_may_have_other_names(zoo, name, split):
    (zoo / "t.csv").write_text(f"path,model_id,epoch,split\nb.h5,x,0,{name}\n")
    (checkpoint,) = list_checkpoints(str(zoo), ImportOptions(properties=str(zoo / "t.csv")))
    assert checkpoint.split == split


def test_paths_are_relative_to_the_table_or_to_the_tree(zoo):
    (zoo / "a" / "t.csv").write_text("path,model_id,epoch\n2.npz,near,0\nb.h5,far,0\n")
    near, far = list_checkpoints(str(zoo), ImportOptions(properties=str(zoo / "a" / "t.csv")))
    assert_network(near, 2)
    assert_network(far, 3)


def test_files_may_be_links_to_elsewhere(zoo, tmp_path):
    (zoo / "b.h5").rename(tmp_path / "blob")
    (zoo / "b.h5").symlink_to(tmp_path / "blob")
    (checkpoint,) = list_checkpoints(str(zoo), table(zoo, "b.h5,x,0,,,,"))
    assert_network(checkpoint, 3)


def test_a_cell_with_line_breaks_does_not_shift_the_lines(zoo):
    options = table(zoo, '"b.h5","two\nlines",0,,,,', "", "a/2.npz,x,half,,,,")
    with pytest.raises(ValueError, match=r"properties\.csv, line 5, column 'epoch' is 'half', expected an integer"):
        list_checkpoints(str(zoo), options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a/9.npz,x,0,,,,", "line 3, column 'path': there is no ZOO/a/9.npz."),
        ("../out.npz,x,0,,,,", "line 3, column 'path': ../out.npz leaves ZOO; name a file below it"),
        ("/etc/passwd,x,0,,,,", "line 3, column 'path': /etc/passwd leaves ZOO"),
        (
            "notes.txt,x,0,,,,",
            "line 3, column 'path': notes.txt is no checkpoint; expected files that end in .safetens",
        ),
        ("old.pt,x,0,,,,", "line 3, column 'path': old.pt is a pickle, which can hold code; pass --allow-pickle"),
        ("empty,x,0,,,,", "line 3, column 'path': ZOO/empty holds no weights; expected a file that ends in .safetens"),
        (",x,0,,,,", "line 3, column 'path' is empty"),
        ("a/2.npz,,0,,,,", "line 3, column 'model_id' is empty"),
        ("a/2.npz,x,,,,,", "line 3, column 'epoch' is empty"),
        ("a/2.npz,x,1.5,,,,", "line 3, column 'epoch' is 1.5, expected an integer"),
        ("a/2.npz,x,true,,,,", "line 3, column 'epoch' is True, expected an integer"),
        ("a/2.npz,first,0,,,,", "line 3: model 'first' has epoch 0 in ZOO/properties.csv, line 2 already"),
    ],
)
def test_a_fault_names_line_and_column_or_is_left_out(zoo, line, message):
    (zoo / "notes.txt").write_text("hello")
    torch.save(network(5), zoo / "old.pt")
    (zoo / "empty").mkdir()
    options = table(zoo, "a/1.safetensors,first,0,,,,", line, "b.h5,last,0,,,,")
    message = f"{zoo}/properties.csv, " + message.replace("ZOO", str(zoo))
    with pytest.raises(ValueError, match=re.escape(message)):
        list_checkpoints(str(zoo), options)

    options.on_error = "skip"
    assert [checkpoint.model_id for checkpoint in list_checkpoints(str(zoo), options)] == ["first", "last"]
    (reason,) = options.skipped
    assert message in reason


def test_splits_must_be_known_and_one_a_model(zoo):
    (zoo / "t.csv").write_text("path,model_id,epoch,split\nb.h5,x,0,holdout\n")
    with pytest.raises(ValueError, match=r"t\.csv, line 2, column 'split' is 'holdout', expected train, validation"):
        list_checkpoints(str(zoo), ImportOptions(properties=str(zoo / "t.csv")))
    (zoo / "t.csv").write_text("path,model_id,epoch,split\nb.h5,x,0,train\na/2.npz,x,1,test\n")
    with pytest.raises(ValueError, match=r"line 3: model 'x' stands in split test, in .*t\.csv, line 2 in train"):
        list_checkpoints(str(zoo), ImportOptions(properties=str(zoo / "t.csv")))


def test_a_column_of_text_and_numbers_names_both_rows(zoo):
    options = table(zoo, "b.h5,x,0,0.5,,,", "a/2.npz,y,0,high,,,")
    with pytest.raises(ValueError, match=r"'test_accuracy' is a number in .*, line 2\) and text in .*, line 3\)"):
        list_checkpoints(str(zoo), options)


def test_two_hyper_parameters_of_one_name_are_refused(zoo):
    (zoo / "t.csv").write_text("path,model_id,epoch,lr,hparams_lr\nb.h5,x,0,1,2\n")
    with pytest.raises(ValueError, match=r"t\.csv has a column 'hparams_lr' already"):
        list_checkpoints(str(zoo), ImportOptions(properties=str(zoo / "t.csv"), hparam_columns=["lr"]))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("path_column", "file", "has no column 'file', it has path, model_id, epoch, .*--path-column"),
        ("model_column", "net", "has no column 'net', .*--model-column"),
        ("epoch_column", "step", "has no column 'step', .*--epoch-column"),
        ("hparam_columns", ["wd"], "has no column 'wd', .*mend --hparams"),
        ("ignore_columns", ["wd"], "has no column 'wd', .*mend --ignore"),
    ],
)
def test_a_missing_column_is_named_with_those_that_are_there(zoo, option, value, message):
    options = table(zoo, "b.h5,x,0,,,,")
    setattr(options, option, value)
    options.on_error = "skip"
    with pytest.raises(ValueError, match=message):
        list_checkpoints(str(zoo), options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", r"t\.csv has no rows"),
        ("t.csv", b"path,model_id,epoch\n", r"t\.csv has no rows"),
        ("t.csv", b"path,path\nb.h5,1\n", r"t\.csv, line 1 cannot be read: the column 'path' stands twice"),
        (
            "t.csv",
            b"path,model_id,epoch\nb.h5,x,0\nb.h5,x\n",
            r"line 3 cannot be read: it has 2 cells, the header has 3",
        ),
        ("t.csv", b"path,model_id,epoch\n\xff,x,0\n", r"t\.csv, line .* cannot be read: .*utf-8"),
        ("t.csv.gz", b"path,model_id,epoch\n", r"t\.csv\.gz, line 1 cannot be read: Not a gzipped file"),
        ("t.json", b"{", r"t\.json is no JSON"),
        ("t.json", b"\xff\xff", r"t\.json is no JSON"),
        ("t.json", b"{}", r"t\.json holds a dict, expected a list of objects"),
        ("t.json", b"[1]", r"t\.json, entry 1 is a int, expected an object"),
        ("t.jsonl", b'{"path": 1}\n{"pa', r"t\.jsonl has no column 'model_id'"),
        ("t.jsonl", b'{"path":"b.h5","model_id":"x","epoch":0}\n{"pa', r"t\.jsonl, line 2 is no JSON"),
        ("t.parquet", b"PAR1", r"t\.parquet is no parquet file"),
        ("t.xlsx", b"PK", r"t\.xlsx is no table that can be read; expected \.csv"),
    ],
)
def test_a_damaged_table_is_one_sentence(zoo, name, content, message):
    (zoo / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list_checkpoints(str(zoo), ImportOptions(properties=str(zoo / name)))


def test_a_missing_table_is_named(zoo):
    with pytest.raises(ValueError, match=r"gone\.csv does not exist"):
        list_checkpoints(str(zoo), ImportOptions(properties=str(zoo / "gone.csv")))


# --- without a table


def test_without_a_table_each_checkpoint_is_a_model(zoo):
    (zoo / "notes.txt").write_text("hello")
    (zoo / ".cache").mkdir()
    save_file(network(9), zoo / ".cache" / "hidden.safetensors")
    save_file(network(5), zoo / "a" / "10.safetensors")
    found = list_checkpoints(str(zoo), ImportOptions())
    assert [checkpoint.model_id for checkpoint in found] == ["b", "a/1", "a/2", "a/10", "c/model"]
    assert {checkpoint.epoch for checkpoint in found} == {0}
    assert found[0].where == f"{zoo}/b.h5"
    # only Keras files say more of the tensors than their names and shapes
    assert [checkpoint.layout_source for checkpoint in found] == [zoo / "b.h5", None, None, None, None]
    for checkpoint, seed in zip(found, (3, 1, 2, 5, 4), strict=True):
        assert_network(checkpoint, seed)


def test_pickles_are_read_only_if_allowed(tmp_path):
    torch.save(network(1), tmp_path / "x.pt")
    for side_file in ("optimizer.pt", "training_args.bin", "rng_state_0.pth"):
        torch.save(network(2), tmp_path / side_file)
    with pytest.raises(ValueError, match=r"x\.pt is a pickle, which can hold code; pass --allow-pickle"):
        list_checkpoints(str(tmp_path), ImportOptions())
    (checkpoint,) = list_checkpoints(str(tmp_path), ImportOptions(allow_pickle=True))
    assert checkpoint.model_id == "x"
    assert_network(checkpoint, 1)


def test_pickles_beside_other_files_are_left_out_with_a_warning(zoo, caplog):
    torch.save(network(5), zoo / "old.pt")
    with caplog.at_level(logging.WARNING):
        assert len(list_checkpoints(str(zoo), ImportOptions())) == 4
    assert "1 pickles are left out; --allow-pickle reads them" in caplog.text
    assert len(list_checkpoints(str(zoo), ImportOptions(allow_pickle=True))) == 5


def test_two_files_of_one_name_are_refused(zoo):
    save_file(network(5), zoo / "b.safetensors")
    with pytest.raises(
        ValueError, match=r"b\.safetensors and .*b\.h5 would both be model 'b'; name them in --properties"
    ):
        list_checkpoints(str(zoo), ImportOptions())


def test_a_tree_of_another_format_is_told(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"--format folder expects files that end in \.safetensors, .* has none\."):
        list_checkpoints(str(tmp_path), ImportOptions())
    (tmp_path / "m" / "checkpoint_000001").mkdir(parents=True)
    (tmp_path / "m" / "checkpoint_000001" / "checkpoints").write_bytes(b"x")
    with pytest.raises(ValueError, match="it looks like --format modelzoos"):
        list_checkpoints(str(tmp_path), ImportOptions())
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    save_file(network(1), tmp_path / "run" / "checkpoint-5" / "model.safetensors")
    (tmp_path / "m" / "checkpoint_000001").rename(tmp_path / "m" / "other")
    with caplog.at_level(logging.WARNING):
        assert len(list_checkpoints(str(tmp_path), ImportOptions())) == 1
    assert "looks like --format checkpoints" in caplog.text


def test_a_source_that_is_no_folder_is_refused(zoo):
    with pytest.raises(ValueError, match=r"gone does not exist; --format folder expects a folder"):
        list_checkpoints(str(zoo / "gone"), ImportOptions())
    with pytest.raises(ValueError, match=r"b\.h5 is a file; --format folder expects the folder"):
        list_checkpoints(str(zoo / "b.h5"), ImportOptions())


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="--format onnx is not known, expected one of folder, modelzoos, unterthiner"):
        importer("onnx")
