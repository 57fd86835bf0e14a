"""A run that is told to end, and what its log says of its health."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hub_scripts.train import TrainArguments, train
from hub_scripts.training.validation import _health, _r2
from tests.tiny import TINY_TRAINING

ROOT = Path(__file__).parents[3]


def test_sigterm_ends_the_run_after_the_step_with_a_checkpoint_and_it_goes_on_from_there(
    tiny_zoo, tiny_model, tmp_path
):
    words = [word for name, value in TINY_TRAINING.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "hub_scripts.train", "--zoo", str(tiny_zoo), "--output-dir", str(tmp_path / "m")]
    # SIGTERM as soon as the first step is over: the signal comes from within, so the test waits for nothing
    code = (
        "import os, signal, sys; from hub_scripts import train; from hub_scripts.training.run import Run; advance = Run.advance\n"
        "def told(run, *a):\n    run.step == 2 and os.kill(os.getpid(), signal.SIGTERM)\n    advance(run, *a)\n"
        "Run.advance = told; train.main(sys.argv[1:])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *command[3:], *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as in this process: sums of two threads differ in the last digit
    )
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert "ended at step 3; --resume-from-checkpoint latest goes on from there" in result.stdout
    assert (tmp_path / "m" / "step_000003").is_dir()
    settings = TINY_TRAINING | {"resume_from_checkpoint": "latest"}
    train(TrainArguments(zoo=str(tiny_zoo), output_dir=str(tmp_path / "m"), **settings))
    once, twice = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "m" / "model.safetensors")
    # two processes: equal up to rounding, which depends on where arrays lie in memory
    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_log_tells_speed_memory_and_health(tiny_model):
    last = json.loads((tiny_model / "training_log.json").read_text())[-1]
    assert last["samples_per_second"] > 0
    assert last["tokens_per_second"] > last["samples_per_second"]
    assert last["memory_mb"] > 50
    assert 1 <= last["effective_rank"] <= 15  # latent values
    assert 0 <= last["dead_latents"] < 1
    assert {name for name in last if name.startswith("r2/")} == {
        f"r2/{layer}.{name}" for layer in ("conv1", "conv2", "fc1", "fc2") for name in ("weight", "bias")
    }


def test_effective_rank_and_dead_latents_of_known_covariances():
    assert _health(torch.eye(4).double()) == {"effective_rank": pytest.approx(4.0), "dead_latents": 0.0}
    one = torch.zeros(4, 4).double()
    one[0, 0] = 3.0
    assert _health(one) == {"effective_rank": pytest.approx(1.0, abs=1e-6), "dead_latents": 0.75}


def test_r2_of_layers_and_of_all():
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0]]).double()
    error = torch.tensor([0.5, 2.0]).double()
    sums = torch.stack([error, values.sum(0), (values**2).sum(0), torch.full((2,), 2.0).double()])
    scores = _r2(sums, ["a", "b"])
    assert scores["r2/a"] == pytest.approx(1 - 0.5 / 2)
    assert scores["r2/b"] == pytest.approx(1 - 2 / 8)
    assert scores["r2"] == pytest.approx(1 - 2.5 / 14)


def test_one_model_reads_zoos_of_two_architectures(tiny_zoo, mlp_zoo, tmp_path):
    settings = TINY_TRAINING | {"zoo_weights": [1.0, 2.0]}
    results = train(TrainArguments(zoo=[str(tiny_zoo), str(mlp_zoo)], output_dir=str(tmp_path / "m"), **settings))
    scores = results["validation"]
    each = [value for name, value in scores.items() if name.startswith("r2/")]
    assert len(each) == 2
    assert scores["r2"] == pytest.approx(sum(each) / 2)
    assert all(value > 0.5 for value in each)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert len(tokenizer.zoo) == len(tokenizer.symmetries) == 2
    card = (tmp_path / "m" / "README.md").read_text()
    assert "architectures:SmallCNN" in card
    assert "architectures:MLP" in card


def test_contradictions_about_zoos_are_refused(tmp_path):
    for change, message in (
        ({"zoo": ["a", "a"]}, "--zoo names a zoo twice"),
        ({"zoo": ["a", "b"], "zoo_weights": [1.0]}, "--zoo-weights has 1 numbers for 2 zoos"),
        ({"zoo": ["a", "b"], "layout_id": "x"}, "--revision and --layout-id choose within one zoo"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainArguments(output_dir=str(tmp_path), **change)


def test_presets_are_defaults_that_flags_override(monkeypatch, capsys):
    from hub_scripts import train as command

    seen = []
    monkeypatch.setattr(command, "train", seen.append)
    for name in sorted(path.stem for path in command.PRESETS.glob("*.yaml")):
        command.main(["--zoo", "z", "--output-dir", "o", "--preset", name, "--batch-size", "12"])
        assert (seen[-1].preset, seen[-1].batch_size) == (name, 12)
    assert {args.preset for args in seen} == {"tiny", "small-cnn", "resnet18", "multi-zoo"}
    (resnet,) = (args for args in seen if args.preset == "resnet18")
    assert (resnet.hidden_size, resnet.token_size, resnet.mixed_precision) == (2048, 288, "bf16")
    with pytest.raises(SystemExit):
        command.main(["--zoo", "z", "--output-dir", "o", "--preset", "huge"])
    assert "--preset is 'huge', expected one of multi-zoo, resnet18, small-cnn, tiny" in capsys.readouterr().err
