"""Training: what it leaves behind, that it goes on exactly where it stopped, and that two processes are one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from hub_scripts import train as command
from hub_scripts.train import TrainArguments, train
from hub_scripts.training.run import Run
from tests.tiny import TINY_TRAINING as SETTINGS

ROOT = Path(__file__).parents[2]


def flags(settings: dict) -> list[str]:
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def log(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in entry.items() if k not in ("seconds", "memory_mb") and not k.endswith("_per_second")}
        for entry in json.loads((folder / "training_log.json").read_text())
    ]


def test_training_leaves_a_model_a_tokenizer_a_card_and_its_last_checkpoints(tiny_model, tiny_zoo):
    names = {path.name for path in tiny_model.iterdir()}
    assert names == {
        ".sane",
        "README.md",
        "config.json",
        "checkpoint_sane.py",
        "configuration_sane.py",
        "layout_sane.py",
        "model.safetensors",
        "modeling_sane.py",
        "preprocessor_config.json",
        "results.json",
        "safetensors_sane.py",
        "specs_sane.py",
        "step_000004",
        "step_000006",
        "tokenization_sane.py",
        "tokenizer_config.json",
        "training_args.json",
        "training_log.json",
    }
    results = json.loads((tiny_model / "results.json").read_text())
    assert results["steps"] == 6
    tokens = command.Zoo(tiny_zoo).layout.repack(16, "flat")
    assert results["compression"] == pytest.approx(tokens.num_parameters / (tokens.num_tokens * 15))
    # the linear start alone reconstructs most of the weights, at 15 of 16 values
    assert results["validation"]["r2"] > 0.8


def test_the_model_reads_networks_of_the_zoo(tiny_model, tiny_zoo):
    model, tokenizer = AutoModel.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    weights = command.Zoo(tiny_zoo).state_dict("test", 0)
    batch = tokenizer(weights)
    arguments = {name: batch[name] for name in ("position_ids", "layer_kind_ids")}
    with torch.no_grad():
        latents = model.encode_sequence(batch["token_values"], **arguments)
        tokens = model.decode_sequence(latents, **arguments)
    decoded = tokenizer.decode(tokens[0], batch["layouts"][0])
    assert latents.shape == (1, batch["layouts"][0].num_tokens, 15)
    assert decoded.keys() == weights.keys()
    error = sum((decoded[n] - weights[n]).square().sum() for n in weights) / sum(
        w.square().sum() for w in weights.values()
    )
    assert error < 0.3


def test_an_interrupted_run_goes_on_to_the_same_digits(tiny_model, tiny_zoo, tmp_path):
    folder = tmp_path / "model"
    settings = TrainArguments(zoo=str(tiny_zoo), output_dir=str(folder), resume_from_checkpoint="latest", **SETTINGS)

    class Killed(Exception):
        pass

    saved = Run.save

    def killed_after_step_4(run, output_dir):
        saved(run, output_dir)
        if run.step == 4:
            raise Killed

    Run.save = killed_after_step_4
    try:
        with pytest.raises(Killed):
            train(settings)
    finally:
        Run.save = saved
    assert not (folder / "model.safetensors").exists()
    train(settings)
    assert log(folder) == log(tiny_model)
    once, twice = load_file(tiny_model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_run_that_is_there_is_not_overwritten(tiny_model, tiny_zoo, tmp_path):
    with pytest.raises(ValueError, match="already holds a training run; add --resume-from-checkpoint latest"):
        train(TrainArguments(zoo=str(tiny_zoo), output_dir=str(tiny_model), **SETTINGS))
    with pytest.raises(ValueError, match=r"begun with --noise 0\.1, now it is 0\.3"):
        train(
            TrainArguments(
                zoo=str(tiny_zoo), output_dir=str(tiny_model), noise=0.3, resume_from_checkpoint="latest", **SETTINGS
            )
        )
    (tmp_path / "letter").write_text("mine")
    with pytest.raises(ValueError, match="already holds something"):
        train(TrainArguments(zoo=str(tiny_zoo), output_dir=str(tmp_path), **SETTINGS))


def test_a_run_can_start_from_any_model(tiny_model, tiny_zoo, tmp_path):
    settings = SETTINGS | {"max_steps": 1, "learning_rate": 1e-9}
    train(
        TrainArguments(
            zoo=str(tiny_zoo), output_dir=str(tmp_path / "more"), model_name_or_path=str(tiny_model), **settings
        )
    )
    before, after = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "more" / "model.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


@pytest.mark.parametrize(
    "switch",
    [
        {"contrastive_weight": 0.0, "permute": False},
        {"behavioural_weight": 0.0, "window_size": 9},
        {"packing": "paper", "position_encoding": "learned", "linear_start": False},
        {"gradient_accumulation_steps": 2, "normalize_targets": True},
        {"gradient_checkpointing": True, "attn_implementation": "eager"},
        {"max_minutes": 1e-4},
    ],
)
def test_switches_train(tiny_zoo, tmp_path, switch):
    results = train(
        TrainArguments(zoo=str(tiny_zoo), output_dir=str(tmp_path / "m"), **(SETTINGS | {"max_steps": 2} | switch))
    )
    assert results["steps"] == (1 if "max_minutes" in switch else 2)


def test_accumulating_a_batch_in_two_parts_gives_the_gradients_of_the_whole(tiny_zoo, tmp_path):
    common = SETTINGS | {"max_steps": 2, "contrastive_weight": 0.0, "behavioural_weight": 0.0, "save_steps": 9}
    for parts in (1, 2):
        folder = str(tmp_path / str(parts))
        train(TrainArguments(zoo=str(tiny_zoo), output_dir=folder, gradient_accumulation_steps=parts, **common))
    one, two = (load_file(tmp_path / str(parts) / "model.safetensors") for parts in (1, 2))
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1}, "--batch-size 1 has nothing to contrast"),
        ({"learning_rate": "1e-4"}, "in YAML write 1.0e-4"),
        ({"noise": -1.0}, "--noise is -1.0, expected 0 or more"),
        ({"resume_from_checkpoint": "somewhere"}, "expected 'latest'"),
    ],
)
def test_contradictions_are_refused_by_flag_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        TrainArguments(zoo="z", output_dir=str(tmp_path), **(SETTINGS | change))


def test_a_zoo_that_is_too_small_and_a_window_that_is_too_short_say_so(tiny_zoo, tmp_path):
    with pytest.raises(ValueError, match="a batch of 64 is more than the 21 checkpoints"):
        train(TrainArguments(zoo=str(tiny_zoo), output_dir=str(tmp_path / "a"), **(SETTINGS | {"batch_size": 64})))
    with pytest.raises(ValueError, match="the behavioural loss needs whole networks"):
        train(
            TrainArguments(
                zoo=str(tiny_zoo),
                output_dir=str(tmp_path / "b"),
                **(SETTINGS | {"window_size": 5, "behavioural_weight": 0.1}),
            )
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_a_tracker_that_is_unknown_or_missing_is_named(tiny_zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    for name, message in [
        ("abacus", "Unsupported logging capability"),
        ("tensorboard", "tensorboard is not installed"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(TrainArguments(zoo=str(tiny_zoo), output_dir=str(tmp_path / "m"), report_to=name, **SETTINGS))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- real processes
def launch(words: list[str], **environment: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
    return subprocess.Popen(
        [sys.executable, *words], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_processes_take_the_steps_of_one(tiny_zoo, tiny_model, tmp_path):
    words = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    arguments = ["--zoo", str(tiny_zoo), "--output_dir", str(tmp_path / "two"), *flags(SETTINGS)]
    process = launch([*words, "hub_scripts/train.py", *arguments], ACCELERATE_USE_CPU="true")
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0, printed
    assert "2 process(es) on cpu" in printed
    for one, two in zip(log(tiny_model), log(tmp_path / "two"), strict=True):
        for name in ("r2", "accuracy_original"):
            assert two[name] == pytest.approx(one[name], abs=2e-3), name
    one, two = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    # the behavioural loss takes the first networks of each process' share, so the gradients differ a little
    assert max((one[name] - two[name]).abs().max() for name in one) < 0.05


def test_processes_that_do_not_know_of_each_other_are_refused(tiny_zoo, tmp_path):
    arguments = ["--zoo", str(tiny_zoo), "--output_dir", str(tmp_path / "m"), *flags(SETTINGS)]
    process = launch(["hub_scripts/train.py", *arguments], WORLD_SIZE="2", ACCELERATE_USE_CPU="false", LOCAL_RANK="-1")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "2 processes were launched but each runs alone" in printed


def test_a_killed_process_goes_on_to_the_same_digits(tiny_zoo, tiny_model, tmp_path):
    folder = tmp_path / "model"
    words = [
        "hub_scripts/train.py",
        "--zoo",
        str(tiny_zoo),
        "--output_dir",
        str(folder),
        "--resume_from_checkpoint",
        "latest",
    ]
    process = launch([*words, *flags(SETTINGS)])
    deadline = time.monotonic() + 120
    while not list(folder.glob("step_*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if (folder / "results.json").exists():  # it was faster than the signal: take the end away
        for name in ("results.json", "model.safetensors"):
            (folder / name).unlink()
        shutil.rmtree(folder / "step_000006")
    again = launch([*words, *flags(SETTINGS)])
    printed = again.communicate(timeout=120)[0]
    assert again.returncode == 0, printed
    assert not list(folder.glob(".*.partial"))
    one, two = load_file(tiny_model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
