"""`sane sample` on a tiny zoo and model: sets, curves, selection, what is written, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ResNetForImageClassification

from hub_scripts import sample as command
from hub_scripts.build_zoo import BuildZooArguments, build_zoo
from hub_scripts.codec import Codec
from hub_scripts.evaluation.functional import build_module, evaluate
from hub_scripts.evaluation.reconstruction import measure_reconstruction
from hub_scripts.generation.anchors import choose_rows, load_anchors
from hub_scripts.generation.judge import Judge
from hub_scripts.sample import SampleArguments, sample
from hub_scripts.train import TrainArguments, train
from hub_scripts.zoos.networks import save_in_own_class
from hub_scripts.zoos.zoo import Zoo
from modeling_sane import load_sampler
from tests.tiny import TINY_TRAINING

QUICK = {"anchors": ["top:3"], "count": 4, "keep": 2, "bandwidth": 0.05, "bandwidths": [0.3], "laplace_bandwidth": 0.2,
         "laplace_bandwidths": [0.3], "laplace_images": 50, "anchor_steps": 2, "noises": [0.1, 0.4]}  # fmt: skip


@pytest.fixture(scope="module")
def zoo(tiny_zoo) -> Zoo:
    return Zoo(tiny_zoo)


@pytest.fixture(scope="module")
def codec(tiny_model, zoo) -> Codec:
    return Codec.from_pretrained(tiny_model, zoo.layout)


@pytest.fixture(scope="module")
def arguments(tiny_zoo, tiny_model):
    def make(folder: Path, **changes) -> SampleArguments:
        sources = {"model": str(tiny_model), "zoo": str(tiny_zoo)}
        return SampleArguments(output_dir=str(folder), **sources | QUICK | changes)

    return make


@pytest.fixture(scope="module")
def samples(arguments, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "sample"
    sample(arguments(folder, refine_steps=3))
    return folder


# --- anchors
def test_anchors_are_last_checkpoints_of_the_train_split(zoo):
    best = choose_rows(zoo, "top:3", seed=0)
    accuracy, epoch = zoo.column("train", "validation_accuracy"), zoo.column("train", "epoch")
    assert (epoch[best] == 2).all()
    assert accuracy[best].min() >= np.sort(accuracy[epoch == 2])[-3]
    assert set(choose_rows(zoo, "random:3", 1)) <= set(np.flatnonzero(epoch == 2))


def test_anchors_near_a_wish_are_the_nearest_checkpoint_of_each_model(zoo, codec):
    accuracy, models = zoo.column("train", "validation_accuracy"), np.asarray(zoo.rows("train")["model_id"])
    rows = choose_rows(zoo, "near:4", 0, {"validation_accuracy": 0.4})
    away = np.abs(accuracy - 0.4)
    of_models = np.sort([away[models == name].min() for name in np.unique(models)])
    np.testing.assert_allclose(away[rows], of_models[:4])
    assert len(set(models[rows])) == 4
    found = load_anchors(zoo, ["near:1"], codec.tokenizer, 0, {"epoch": 1})
    assert found.names[0].endswith(" epoch 1")
    with pytest.raises(ValueError, match="near:8 asks for more than the 7 models"):
        choose_rows(zoo, "near:8", 0, {"epoch": 1})


def test_anchors_by_name_and_from_files_are_the_same_networks(zoo, codec, tmp_path):
    row = int(choose_rows(zoo, "top:1", 0)[0])
    name = zoo.rows("train")[row]["model_id"]
    named = load_anchors(zoo, [f"ids:{name}"], codec.tokenizer, 0)
    # another order of units is the same network: anchors from elsewhere are aligned to the zoo
    spec = zoo.symmetries.of_kind("permutation", "sign")
    twin = spec.apply(zoo.state_dict("train", row), spec.draw(torch.Generator().manual_seed(3)))
    save_file({key: tensor.contiguous() for key, tensor in twin.items()}, tmp_path / "twin.safetensors")
    read = load_anchors(zoo, [str(tmp_path / "twin.safetensors")], codec.tokenizer, 0)
    for key, tensor in named.tensors.items():
        torch.testing.assert_close(read.tensors[key], tensor)


def test_anchors_that_stand_in_the_order_of_the_zoo_stay_there(zoo, codec, tmp_path, monkeypatch):
    """Matching a noisy copy of a train network with the reference may end in another order than that network has."""
    networks = zoo.stacked("train", zoo.last_rows("train")[:3])
    spec = zoo.symmetries.of_kind("permutation")
    element = spec.draw(torch.Generator().manual_seed(1))
    monkeypatch.setattr(
        "hub_scripts.zoos.alignment.ZooAligner.align_stacked",
        lambda self, tensors: {k: torch.stack([spec.apply({n: t[i] for n, t in tensors.items()}, element)[k] for i in range(3)])
                               for k in tensors},
    )  # fmt: skip
    noisy = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in networks.items()}
    for i in range(3):
        save_file({name: tensor[i].contiguous() for name, tensor in noisy.items()}, tmp_path / f"{i}.safetensors")
    read = load_anchors(zoo, [str(tmp_path / f"{i}.safetensors") for i in range(3)], codec.tokenizer, 0)
    for name, tensor in noisy.items():
        torch.testing.assert_close(read.tensors[name], tensor)


def test_a_generated_set_can_be_anchors(samples, zoo, codec):
    folder = samples / "networks" / "joint"
    anchors = load_anchors(zoo, [str(folder)], codec.tokenizer, 0)
    files = [str(path) for path in sorted(folder.glob("*.safetensors"))]
    assert anchors.names == files
    assert len(files) > 1
    one_by_one = load_anchors(zoo, files, codec.tokenizer, 0)
    for name, tensor in anchors.tensors.items():
        assert torch.equal(tensor, one_by_one.tensors[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["top:99"], "top:99 asks for more than the 7 models"),
        (["ids:nobody"], "names 'nobody', which is not in the train split"),
        (["FOLDER/other.safetensors"], r"other.safetensors is of another layout .*it has no tensor conv1"),
    ],
)
def test_anchors_that_are_not_there_are_refused(zoo, codec, tmp_path, words, message):
    save_file({"other.weight": torch.ones(3, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        load_anchors(zoo, [word.replace("FOLDER", str(tmp_path)) for word in words], codec.tokenizer, 0)


# --- judging
def test_a_permuted_copy_has_no_distance(zoo, codec):
    spec = zoo.symmetries.of_kind("permutation", "sign")
    network = zoo.state_dict("train", 4)
    twin = spec.apply(network, spec.draw(torch.Generator().manual_seed(5)))
    judge = Judge(zoo, codec, zoo.module, zoo.task, keep=1)
    distances = judge.distances({name: tensor[None].float() for name, tensor in twin.items()})
    assert distances[0] == pytest.approx(0, abs=1e-3)


def test_networks_that_are_not_finite_are_counted_and_come_last(zoo, codec):
    tensors = {name: tensor[:3].clone() for name, tensor in zoo.stacked("train").items()}
    tensors["conv1.weight"][0, 0] = float("nan")
    judged = Judge(zoo, codec, zoo.module, zoo.task, keep=1)(tensors)
    assert judged.figures["not_finite"] == 1
    assert judged.order[-1] == 0
    assert np.isnan(judged.distance[0])


# --- the command
def test_sampling_judges_generated_networks_beside_the_baselines(samples):
    results = json.loads((samples / "results.json").read_text())
    sets = results["sample"]
    modes = {"laplace", "joint", "token", "dimension"}
    beside = {"noise", "average", "anchors", "decoded_anchors", "fitted_anchors", "unseen", "noise_refined"}
    assert set(sets) == modes | {f"{mode}_refined" for mode in modes} | beside
    assert sets["anchors"]["nearest_train_distance"] == pytest.approx(0, abs=1e-4)  # they are training checkpoints
    assert sets["unseen"]["nearest_train_distance"] > sets["noise"]["nearest_train_distance"] > 0
    assert sets["joint"]["count"] == 4
    assert 0 < sets["joint"]["disagreement"] <= 1
    assert sets["anchors"]["accuracy_ensemble"] > 0.3
    assert results["curves"]["joint"][0]["nearest_train_distance"] > sets["joint"]["nearest_train_distance"]
    assert {"curves.png", "accuracy.png", "accuracy_against_distance.png"} <= {path.name for path in samples.iterdir()}


def test_written_networks_are_the_ones_that_were_judged(samples, zoo):
    info = json.loads((samples / "networks" / "networks.json").read_text())
    assert len(info["anchors"]) == 3
    for entry in info["sets"]["laplace"]:
        network = {name: tensor[None] for name, tensor in load_file(samples / "networks" / entry["file"]).items()}
        found = evaluate(zoo.module, network, zoo.task.images["test"], zoo.task.labels["test"]).accuracy[0]
        assert found == pytest.approx(entry["test_accuracy"], abs=1e-6)


def test_a_network_of_transformers_is_written_as_its_own_class(tmp_path, zoo):
    config = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    module = build_module("transformers:ResNetForImageClassification", config)
    network = {name: torch.full_like(tensor, 0.5) for name, tensor in module.named_parameters()}
    assert save_in_own_class(tmp_path / "best", module, network)
    read = ResNetForImageClassification.from_pretrained(tmp_path / "best")
    assert all((tensor == 0.5).all() for tensor in read.parameters())
    assert not save_in_own_class(tmp_path / "other", zoo.module, {})


def test_a_laplace_draw_keeps_the_function_better_than_equal_noise(arguments, tmp_path):
    flags = {
        "mode": ["laplace", "joint"],
        "bandwidth": 0.5,
        "laplace_bandwidth": 0.5,
        "laplace_images": 300,
        "count": 12,
    }
    results = sample(arguments(tmp_path / "s", **flags))
    assert results["laplace"]["nearest_train_distance"] > 0.8 * results["joint"]["nearest_train_distance"]
    assert results["laplace"]["accuracy_mean"] > results["joint"]["accuracy_mean"]


def test_bootstrap_goes_on_from_the_best_of_the_last_round(arguments, tmp_path):
    """Without noise the draws of the second round are those that the first one kept."""
    found = {}
    for rounds in (1, 2):
        sample(arguments(tmp_path / str(rounds), mode=["joint"], bandwidth=0.0, rounds=rounds))
        info = json.loads((tmp_path / str(rounds) / "networks" / "networks.json").read_text())
        found[rounds] = {round(entry["nearest_train_distance"], 4) for entry in info["sets"]["joint"]}
    assert found[2] <= found[1]


def test_norms_get_the_statistics_of_the_images(tmp_path):
    """Decoded running statistics do not fit decoded weights; measured ones do."""
    zoo, model = tmp_path / "zoo", tmp_path / "model"
    kwargs = '{"channels": [3, 5], "hidden_size": 7, "batch_norm": true}'
    shared = {"num_models": 7, "epochs": 2, "batch_size": 100, "learning_rates": [1e-2], "weight_decays": [0.0]}
    build_zoo(BuildZooArguments(output_dir=str(zoo), architecture_kwargs=kwargs, **shared))
    train(TrainArguments(zoo=str(zoo), output_dir=str(model), **TINY_TRAINING))
    found = {}
    for norms in ("none", "data"):
        flags = QUICK | {"mode": ["joint"], "bandwidth": 0.3, "norms": norms}
        found[norms] = sample(
            SampleArguments(model=str(model), zoo=str(zoo), output_dir=str(tmp_path / norms), **flags)
        )
        assert found[norms]["unseen"]["nearest_train_distance"] > 0
    assert found["data"]["joint"]["accuracy_mean"] > found["none"]["joint"]["accuracy_mean"]
    opened = Zoo(zoo)
    codec, test = Codec.from_pretrained(model, opened.layout), (opened.task.images["test"], opened.task.labels["test"])
    figures, tokens = measure_reconstruction(opened, codec)
    as_decoded = evaluate(opened.module, codec.tensors(tokens["decoded"]), *test).accuracy.mean()
    assert figures["accuracy_decoded"] > as_decoded


def test_networks_of_another_architecture(arguments, tmp_path):
    kwargs = '{"channels": [4, 6], "hidden_size": 9}'
    results = sample(arguments(tmp_path / "s", mode=["joint"], target_kwargs=kwargs))
    written = json.loads((tmp_path / "s" / "results.json").read_text())
    assert written["growth"]["max_change"] < 1e-4  # wider networks compute what the anchors do
    assert np.isnan(results["joint"]["nearest_train_distance"])
    network = load_file(tmp_path / "s" / "networks" / "joint" / "000.safetensors")
    assert network["conv1.weight"].shape[0] == 4


def test_a_task_with_other_classes_needs_a_new_classifier(arguments, tmp_path):
    task = "digits[3,1,4]"
    with pytest.raises(ValueError, match=r"has 3 classes, the networks answer with 10; .* --new-head ridge"):
        sample(arguments(tmp_path / "s", mode=["joint"], task=task))
    results = sample(arguments(tmp_path / "s", mode=["joint"], task=task, new_head="ridge"))
    assert results["anchors"]["accuracy_mean"] > 0.7  # of three classes, from 20 samples each
    network = load_file(tmp_path / "s" / "networks" / "joint" / "000.safetensors")
    assert network["fc2.weight"].shape[0] == 3


def test_gradients_that_do_not_fit_in_memory_are_refused_before_the_work_begins(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "MOST_GRADIENT_VALUES", 2_000)
    with pytest.raises(
        ValueError, match=r"each of 50 images in .* Lower --laplace-images to \d, or take another --mode"
    ):
        sample(arguments(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_a_flow_needs_no_anchors_and_is_kept(arguments, tmp_path):
    sample(arguments(tmp_path / "s", mode=["flow", "token_flow"], flow_steps=2, condition=["validation_accuracy=0.5"]))
    kinds = {path.name: type(load_sampler(path)).__name__ for path in (tmp_path / "s" / "sampler").iterdir()}
    assert kinds == {"flow": "ComponentFlowSampler", "token_flow": "LatentFlowSampler"}
    with pytest.raises(ValueError, match="no numeric column"):
        sample(arguments(tmp_path / "t", mode=["flow"], flow_steps=2, condition=["beauty=1"]))
    assert not (tmp_path / "t").exists()


def test_what_is_published_names_anchors_without_folders_of_this_machine(samples, arguments, tmp_path):
    folder = samples / "networks" / "joint"
    sample(arguments(tmp_path / "s", mode=["joint"], anchors=[str(folder)]))
    published = [(tmp_path / "s" / "networks" / name).read_text() for name in ("networks.json", "README.md")]
    assert all("000.safetensors" in text and str(folder.parent) not in text for text in published)
    assert str(folder / "000.safetensors") in (tmp_path / "s" / "results.json").read_text()


def test_networks_at_chance_are_kept_and_the_exit_code_says_so(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(_words(arguments(tmp_path / "s", mode=["joint"], bandwidth=50.0)))
    assert stopped.value.code == command.AT_CHANCE
    assert "at chance" in capsys.readouterr().out
    assert (tmp_path / "s" / "networks" / "joint" / "000.safetensors").is_file()


def _words(args: SampleArguments) -> list[str]:
    given = {"model": args.model, "zoo": args.zoo, "output_dir": args.output_dir, "mode": args.mode, "bandwidth": args.bandwidth, **{
        name: getattr(args, name) for name in ("anchors", "count", "keep", "bandwidths", "laplace_images", "noises")}}  # fmt: skip
    return [str(w) for name, v in given.items() for w in (f"--{name}", *(v if isinstance(v, list) else [v]))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": ["top:0"]}, "expected one of top:N, random:N"),
        ({"anchors": ["top:3", "a.safetensors"]}, "expected one of top:N, random:N"),
        ({"mode": ["all"]}, "expected some of laplace, joint, token"),
        ({"keep": 9, "count": 3}, "expected 1 <= keep <= count"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"norms": "some"}, "--norms is 'some', expected data or none"),
        ({"condition": ["x=1"]}, "needs --anchors near:N, or --mode flow"),
        ({"anchors": ["near:3"]}, "needs --condition NAME=VALUE"),
        ({"condition": ["x"], "mode": ["flow"]}, "expected NAME=VALUE"),
    ],
)
def test_sampling_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        SampleArguments(model="m", zoo="z", output_dir="o", **change)


def test_a_model_that_decodes_to_nan_is_named(arguments, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    name = next(name for name in weights if "decoder" in name)
    save_file(
        weights | {name: weights[name] / 0}, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"broken turns its anchors into values that are not finite"):
        sample(arguments(tmp_path / "s", model=str(tmp_path / "broken")))
    assert not (tmp_path / "s").exists()


def test_a_density_of_one_anchor_and_a_task_that_does_not_fit_are_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match="gaussian needs at least two anchors, there is one"):
        sample(arguments(tmp_path / "s", mode=["gaussian"], anchors=["top:1"]))
