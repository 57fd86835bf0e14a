"""The commands after training, on a tiny zoo and model: what they write, and that the figures are of the right networks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from hub_scripts import cli
from hub_scripts.codec import Codec
from hub_scripts.embed import EmbedArguments, embed
from hub_scripts.evaluation.reconstruction import measure_reconstruction
from hub_scripts.finetune import FinetuneArguments, finetune
from hub_scripts.sample import SampleArguments, sample
from hub_scripts.zoos.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_zoo) -> Zoo:
    return Zoo(tiny_zoo)


@pytest.fixture(scope="module")
def samples(tiny_zoo, tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "sample"
    sample(
        SampleArguments(
            model=str(tiny_model),
            zoo=str(tiny_zoo),
            output_dir=str(folder),
            anchors="top:3",
            count=4,
            keep=2,
            mode=["joint"],
            bandwidth=0.05,
            bandwidths=[0.3],
            noises=[0.1, 0.4],
        )
    )
    return folder


# ---------------------------------------------------------------------------------------------------- codec
def test_coding_a_network_alone_or_among_others_is_the_same(zoo, tiny_model):
    codec = Codec.from_pretrained(tiny_model, zoo.layout)
    tokens = codec.tokens(zoo.stacked("train"))
    together, alone = codec.encode(tokens), codec.encode(tokens[3:4])
    torch.testing.assert_close(together[3:4], alone, rtol=1e-4, atol=1e-5)
    assert (codec.decode(together)[:, ~codec.layout.value_mask] == 0).all()
    tensors = codec.tensors(tokens)
    torch.testing.assert_close(tensors["fc1.weight"], zoo.stacked("train")["fc1.weight"])


def test_reconstruction_is_measured_on_the_last_checkpoints_of_test_models(zoo, tiny_model):
    figures, tokens = measure_reconstruction(zoo, Codec.from_pretrained(tiny_model, zoo.layout))
    last = zoo.column("test", "epoch") == 2
    assert figures["accuracy_original"] == pytest.approx(zoo.column("test", "test_accuracy")[last].mean(), abs=2e-3)
    assert (figures["models"], figures["checkpoints"]) == (last.sum(), len(last))
    assert len(tokens["original"]) == last.sum()
    assert 0 < figures["r2"] < 1


# ---------------------------------------------------------------------------------------------------- embed
def test_a_zoo_and_its_files_get_the_same_embeddings(zoo, tiny_zoo, tiny_model, tmp_path):
    args = EmbedArguments(model=str(tiny_model), output_dir=str(tmp_path / "zoo"))
    args.sources = [str(tiny_zoo)]
    assert embed(args)["checkpoints"] == len(zoo)
    rows = Dataset.from_parquet(str(tmp_path / "zoo" / "embeddings.parquet"), cache_dir=str(tmp_path / "cache"))
    wanted = next(row for row in rows if row["split"] == "test" and row["epoch"] == 1)

    save_file(zoo.state_dict("test", 1), tmp_path / "network.safetensors")
    args = EmbedArguments(model=str(tiny_model), output_dir=str(tmp_path / "file"))
    args.sources = [str(tmp_path / "network.safetensors")]
    embed(args)
    (row,) = Dataset.from_parquet(str(tmp_path / "file" / "embeddings.parquet"), cache_dir=str(tmp_path / "cache"))
    assert row["layout_id"] == wanted["layout_id"]
    np.testing.assert_allclose(row["embedding"], wanted["embedding"], rtol=1e-4, atol=1e-4)


def test_a_network_of_another_kind_is_refused_with_what_to_do(tiny_model, tmp_path, capsys):
    save_file({"other.weight": torch.ones(3, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit) as stopped:
        cli_main("embed", "--model", tiny_model, "--output_dir", tmp_path / "out", tmp_path / "other.safetensors")
    assert stopped.value.code == 1
    assert "no statistics for a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("embed", "--model", "MODEL", "OUT/a.safetensors"), "the source OUT/a.safetensors does not exist."),
        (("embed", "--model", "OUT/model", "ZOO"), "the model OUT/model does not exist."),
        (("probe", "--model", "MODEL", "--zoo", "OUT/zoo"), "the zoo OUT/zoo does not exist."),
    ],
)
def test_a_mistyped_path_is_called_that(tiny_model, tiny_zoo, tmp_path, capsys, words, message):
    places = {"MODEL": str(tiny_model), "ZOO": str(tiny_zoo), "OUT": str(tmp_path)}

    def filled(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    with pytest.raises(SystemExit) as stopped:
        cli_main(*map(filled, words), "--output_dir", tmp_path / "out")
    assert stopped.value.code == 1
    assert filled(message) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- fine-tune
def test_finetuning_starts_from_the_sets_and_from_scratch(samples, tmp_path):
    sets = [str(samples / "networks" / name) for name in ("joint", "anchors")]
    results = finetune(
        FinetuneArguments(init=[*sets, "scratch"], output_dir=str(tmp_path / "f"), epochs=2, batch_size=100)
    )
    info = json.loads((samples / "networks" / "networks.json").read_text())
    assert results["epochs"] == [0, 1, 2]
    assert results["joint"][0] == pytest.approx(np.mean([e["test_accuracy"] for e in info["sets"]["joint"]]), abs=1e-5)
    assert results["scratch"][2] > results["scratch"][0]
    assert results["anchors"][0] > results["scratch"][0]


def test_finetuning_needs_to_know_the_architecture(tmp_path):
    with pytest.raises(ValueError, match="needs at least one set of networks"):
        FinetuneArguments(init=["scratch"], output_dir="o")
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        finetune(FinetuneArguments(init=[str(tmp_path)], output_dir=str(tmp_path / "f")))


# ---------------------------------------------------------------------------------------------------- sane
def cli_main(*words):
    sys.argv = ["sane", *map(str, words)]
    cli.main()


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_explains_its_options_and_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli_main(command, "--help")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "Example:" in printed
    assert f"sane {command}" in printed or f"hub_scripts/{command}.py" in printed


def test_sane_lists_its_commands_and_refuses_others():
    words = [sys.executable, "-m", "hub_scripts.cli"]
    root = Path(__file__).parents[2]
    shown = subprocess.run([*words, "--help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in cli.COMMANDS)
    refused = subprocess.run([*words, "fly"], cwd=root, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "there is no command 'fly'" in refused.stderr
