"""Runs of transformers' Trainer."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hub_scripts.evaluation.functional import build_module
from hub_scripts.zoos.importers import ImportOptions, importer
from hub_scripts.zoos.importers.checkpoints import list_checkpoints


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([1, 2, index]), "labels": torch.tensor(index % 3)}


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """What the Trainer leaves after four steps."""
    folder = tmp_path_factory.mktemp("real") / "run"
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=5,
        vocab_size=11,
        max_position_embeddings=7,
        num_labels=3,
    )
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=4,
        report_to=[],
        use_cpu=True,
        per_device_train_batch_size=4,
        disable_tqdm=True,
    )
    trainer = Trainer(
        BertForSequenceClassification(config),
        arguments,
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trainer.train()
    return folder


def make_checkpoint(folder, step, weights=None, state=None, config=None):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"w": torch.full((2, 3), float(step))} if weights is None else weights, checkpoint / "model.safetensors")
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    if config is not None:
        (checkpoint / "config.json").write_text(json.dumps(config))
    torch.save({"lr": 1.0}, checkpoint / "training_args.bin")
    torch.save({"w": torch.zeros(1)}, checkpoint / "optimizer.pt")
    return checkpoint


def test_a_real_run_is_listed_step_by_step(real_run):
    first, second = importer("checkpoints")(str(real_run), ImportOptions())
    assert [(c.model_id, c.epoch) for c in (first, second)] == [("run", 2), ("run", 4)]
    history = json.loads((real_run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert first.columns["training_epoch"] == 1.0
    assert first.columns["validation_accuracy"] == history[0]["eval_accuracy"]
    assert "train_loss" not in first.columns  # logged at step 4 only
    assert second.columns["train_loss"] == next(entry["loss"] for entry in history if "loss" in entry)
    assert second.columns["validation_loss"] == history[-1]["eval_loss"]
    hparams = {name: value for name, value in second.columns.items() if name.startswith("hparams_")}
    assert hparams == {"hparams_train_batch_size": 4, "hparams_num_train_epochs": 2, "hparams_max_steps": 4}


def test_weights_fit_the_architecture_that_the_configuration_tells(real_run):
    checkpoint = list_checkpoints(str(real_run), ImportOptions())[1]
    assert checkpoint.architecture == "transformers:BertForSequenceClassification"
    assert not {"architectures", "dtype", "model_type", "transformers_version"} & checkpoint.architecture_kwargs.keys()
    module = build_module(checkpoint.architecture, json.loads(json.dumps(checkpoint.architecture_kwargs)))
    found = checkpoint.read()
    expected = load_file(real_run / "checkpoint-4" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    module.load_state_dict(found)


def test_a_folder_of_runs_has_a_model_for_each(tmp_path):
    make_checkpoint(tmp_path / "b", 10)
    make_checkpoint(tmp_path / "b", 9)
    make_checkpoint(tmp_path / "deep" / "a", 1)
    (tmp_path / "b" / "checkpoint-best").mkdir()
    found = list_checkpoints(str(tmp_path), ImportOptions())
    assert [(c.model_id, c.epoch) for c in found] == [("b", 9), ("b", 10), ("deep/a", 1)]
    assert [checkpoint.read()["w"][0, 0].item() for checkpoint in found] == [9, 10, 1]
    assert found[0].columns == {}
    assert (found[0].architecture, found[0].architecture_kwargs) == (None, {})
    assert found[0].where == f"{tmp_path}/b/checkpoint-9"


def test_only_what_was_logged_at_the_step_counts(tmp_path):
    history = [
        {"step": 5, "epoch": 0.5, "loss": 3.0, "eval_loss": 2.0},
        {"step": 10, "epoch": 1.0, "loss": 1.5, "learning_rate": 0.1},
        {"step": 10, "epoch": 1.0, "eval_f1": 0.25, "eval_loss": float("nan"), "eval_note": "fine"},
    ]
    trial = {"learning_rate": 0.1, "layers": [1, 2]}
    make_checkpoint(
        tmp_path, 10, state={"epoch": 1.0, "global_step": 10, "log_history": history, "trial_params": trial}
    )
    (checkpoint,) = list_checkpoints(str(tmp_path), ImportOptions())
    assert checkpoint.columns == {
        "training_epoch": 1.0,
        "train_loss": 1.5,
        "eval_f1": 0.25,
        "validation_loss": None,
        "hparams_trial_params_learning_rate": 0.1,
    }


def test_the_state_of_the_run_stands_in_for_that_of_a_checkpoint(tmp_path):
    make_checkpoint(tmp_path, 5)
    make_checkpoint(tmp_path, 10)
    history = [{"step": step, "epoch": step / 10, "eval_accuracy": step / 100} for step in (5, 10)]
    state = {"epoch": 1.0, "global_step": 10, "log_history": history}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "training_args.json").write_text(json.dumps({"learning_rate": 0.125, "fsdp": []}))
    first, second = list_checkpoints(str(tmp_path), ImportOptions())
    assert first.columns == {"training_epoch": 0.5, "validation_accuracy": 0.05, "hparams_learning_rate": 0.125}
    assert second.columns["validation_accuracy"] == 0.1


def test_a_class_that_transformers_lacks_is_no_architecture(tmp_path):
    make_checkpoint(tmp_path, 1, config={"architectures": ["MyOwnModel"], "auto_map": {}, "hidden_size": 3})
    make_checkpoint(tmp_path, 2, config={"hidden_size": 3})
    found = list_checkpoints(str(tmp_path), ImportOptions())
    assert [(checkpoint.architecture, checkpoint.architecture_kwargs) for checkpoint in found] == [(None, {})] * 2


def test_pickled_weights_must_be_allowed(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 1)
    (checkpoint / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"checkpoint-1/pytorch_model\.bin is a pickle, .* pass --allow-pickle"):
        list_checkpoints(str(tmp_path), ImportOptions())
    (found,) = list_checkpoints(str(tmp_path), ImportOptions(allow_pickle=True))
    assert torch.equal(found.read()["w"], torch.ones(2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "model.safetensors").unlink(), r"checkpoint-1 holds no weights; expected a file that ends in"),
        (lambda c: (c / "trainer_state.json").write_text("{"), r"checkpoint-1/trainer_state\.json is no JSON"),
        (
            lambda c: (c / "config.json").write_text("[]"),
            r"checkpoint-1/config\.json holds a list, expected a JSON ob",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_or_left_out(tmp_path, damage, message):
    damage(make_checkpoint(tmp_path, 1))
    make_checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match=message):
        list_checkpoints(str(tmp_path), ImportOptions())
    options = ImportOptions(on_error="skip")
    assert [checkpoint.epoch for checkpoint in list_checkpoints(str(tmp_path), options)] == [2]
    assert len(options.skipped) == 1


def test_a_tree_of_another_format_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"--format checkpoints expects folders checkpoint-N with .*, .* has none\."):
        list_checkpoints(str(tmp_path), ImportOptions())
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="it looks like --format folder"):
        list_checkpoints(str(tmp_path), ImportOptions())
