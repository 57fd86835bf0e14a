"""Trees that ray tune has written, as the published Model Zoos are."""

import json
import os
import pickle

import pytest
import torch

from hub_scripts.zoos.importers import ImportOptions, importer
from hub_scripts.zoos.importers.modelzoos import list_checkpoints

PARAMS = {"model::type": "CNN", "optim::lr": 3e-4, "model::use_bias": False, "seed": 7, "kernels": [5, 5, 2]}
OPTIONS = {"allow_pickle": True}


def network(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"module_list.0.weight": torch.randn(3, 2, generator=generator), "module_list.0.bias": torch.ones(3) * seed}


def line(epoch: int, **figures) -> str:
    """A line of result.json with what ray adds to each."""
    return json.dumps({**figures, "training_iteration": epoch, "time_total_s": 1.5, "pid": 3, "config": PARAMS})


def make_model(folder, epochs=(0, 1), results=None, params=PARAMS):
    for epoch in epochs:
        checkpoint = folder / f"checkpoint_{epoch:06d}"
        checkpoint.mkdir(parents=True)
        torch.save(network(epoch), checkpoint / "checkpoints")
        torch.save({"state": {}}, checkpoint / "optimizer")
    if params is not None:
        (folder / "params.json").write_text(json.dumps(params))
    if results is not None:
        (folder / "result.json").write_text("\n".join(results) + "\n")
    return folder


@pytest.fixture
def zoo(tmp_path):
    """Two models, at different depths, and the files of the experiment beside them."""
    root = tmp_path / "zoo"
    make_model(
        root / "NN_2",
        results=[
            line(0, train_loss=-999, train_acc=-999, test_loss=2.5, test_acc=0.1),
            line(1, train_loss=0.5, train_acc=0.75, test_loss=0.625, test_acc=0.5, val_acc=0.25, validation_loss=1),
        ],
    )
    make_model(root / "more" / "NN_10", epochs=(5,), params={"model": {"nlin": "relu", "dropout": 0}, "wd": None})
    (root / "config.json").write_text("{}")
    (root / "experiment_state-2021.json").write_text("{}")
    return root


def test_models_have_settings_and_figures_of_each_epoch(zoo):
    first, second, third = importer("modelzoos")(str(zoo), ImportOptions(**OPTIONS))
    assert [(c.model_id, c.epoch) for c in (first, second, third)] == [("NN_2", 0), ("NN_2", 1), ("more/NN_10", 5)]
    hparams = {
        "hparams_model_type": "CNN",
        "hparams_optim_lr": 3e-4,
        "hparams_model_use_bias": False,
        "hparams_seed": 7,
    }
    # -999 is what their code writes before it has trained
    assert first.columns == {
        "train_loss": None,
        "train_accuracy": None,
        "test_loss": 2.5,
        "test_accuracy": 0.1,
        **hparams,
    }
    assert second.columns == {
        "train_loss": 0.5,
        "train_accuracy": 0.75,
        "test_loss": 0.625,
        "test_accuracy": 0.5,
        "validation_accuracy": 0.25,
        "validation_loss": 1,
        "generalization_gap": 0.25,
        **hparams,
    }
    assert third.columns == {"hparams_model_nlin": "relu", "hparams_model_dropout": 0, "hparams_wd": None}
    assert second.where == f"{zoo}/NN_2/checkpoint_000001/checkpoints"


def test_weights_are_those_of_the_pickles(zoo):
    for checkpoint in list_checkpoints(str(zoo), ImportOptions(**OPTIONS)):
        found = checkpoint.read()
        assert found.keys() == network(0).keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in network(checkpoint.epoch).items())


def test_old_pickles_are_read_too(tmp_path):
    make_model(tmp_path / "m", epochs=(1,))
    torch.save(network(1), tmp_path / "m" / "checkpoint_000001" / "checkpoints", _use_new_zipfile_serialization=False)
    (checkpoint,) = list_checkpoints(str(tmp_path), ImportOptions(**OPTIONS))
    assert torch.equal(checkpoint.read()["module_list.0.weight"], network(1)["module_list.0.weight"])


def test_a_pickle_runs_no_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    make_model(tmp_path / "m", epochs=(1,))
    (tmp_path / "m" / "checkpoint_000001" / "checkpoints").write_bytes(pickle.dumps({"w": Attack()}, protocol=2))
    (checkpoint,) = list_checkpoints(str(tmp_path), ImportOptions(**OPTIONS))
    with pytest.raises(ValueError, match="cannot be read with weights_only=True"):
        checkpoint.read()
    assert not (tmp_path / "pwned").exists()


def test_pickles_must_be_allowed(zoo):
    with pytest.raises(
        ValueError, match=r"checkpoint_000000/checkpoints is a pickle, which can hold code; pass --allow"
    ):
        list_checkpoints(str(zoo), ImportOptions())


def test_a_single_model_is_a_zoo_too(zoo):
    found = list_checkpoints(str(zoo / "NN_2"), ImportOptions(**OPTIONS))
    assert [(checkpoint.model_id, checkpoint.epoch) for checkpoint in found] == [("NN_2", 0), ("NN_2", 1)]


def test_checkpoints_are_in_the_order_of_their_epochs(tmp_path):
    make_model(tmp_path / "m", epochs=(1, 2, 10), params=None)
    (tmp_path / "m" / "checkpoint_3").mkdir()  # the name in older versions
    torch.save(network(3), tmp_path / "m" / "checkpoint_3" / "checkpoints")
    (tmp_path / "m" / "checkpoint_tmp12").mkdir()
    found = list_checkpoints(str(tmp_path), ImportOptions(**OPTIONS))
    assert [checkpoint.epoch for checkpoint in found] == [1, 2, 3, 10]
    assert found[0].columns == {}


def test_a_half_last_line_is_of_a_killed_run(tmp_path):
    make_model(tmp_path / "m", results=[line(0, test_acc=0.125), line(1, test_acc=0.5)[:20]], params={})
    first, second = list_checkpoints(str(tmp_path), ImportOptions(**OPTIONS))
    assert (first.columns, second.columns) == ({"test_accuracy": 0.125}, {})


def test_of_an_epoch_that_was_run_twice_the_later_line_counts(tmp_path):
    lines = [line(0, test_acc=0.1), line(1, test_acc=0.2), line(1, test_acc=float("nan")), line(0, test_acc=0.4)]
    make_model(tmp_path / "m", results=lines, params={})
    first, second = list_checkpoints(str(tmp_path), ImportOptions(**OPTIONS))
    assert (first.columns, second.columns) == ({"test_accuracy": 0.4}, {"test_accuracy": None})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "params.json").write_text("{"), r"NN_2/params\.json is no JSON"),
        (lambda m: (m / "params.json").write_text("[]"), r"NN_2/params\.json holds a list, expected a JSON object"),
        (
            lambda m: (m / "params.json").write_text('{"a::b": 1, "a": {"b": 2}}'),
            r"params\.json: a\.b and another entry would both be the column hparams_a_b",
        ),
        (lambda m: (m / "result.json").write_text("{\n{}\n"), r"NN_2/result\.json, line 1 is no JSON"),
        (
            lambda m: (m / "result.json").write_text('{"test_acc": 1}\n'),
            r"result\.json, line 1 has no integer 'training_it",
        ),
        (
            lambda m: (m / "checkpoint_000000" / "checkpoints").unlink(),
            r"NN_2/checkpoint_000000 has no file 'checkpoints'",
        ),
    ],
)
def test_a_damaged_model_is_refused_or_left_out(zoo, damage, message):
    damage(zoo / "NN_2")
    with pytest.raises(ValueError, match=message):
        list_checkpoints(str(zoo), ImportOptions(**OPTIONS))
    options = ImportOptions(on_error="skip", **OPTIONS)
    assert list_checkpoints(str(zoo), options)[-1].model_id == "more/NN_10"
    (reason,) = options.skipped
    assert "NN_2" in reason


def test_a_tree_of_another_format_is_told(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"modelzoos expects folders with params\.json, .*; it looks like --format folder"
    ):
        list_checkpoints(str(tmp_path), ImportOptions(**OPTIONS))
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match="it looks like --format checkpoints"):
        list_checkpoints(str(tmp_path), ImportOptions(**OPTIONS))
