"""Data prompts: class vectors, episodes, retrieval, training, saving, and the command on a tiny zoo of many tasks."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hub_scripts import prompt as command
from hub_scripts.build_zoo import BuildZooArguments, build_zoo
from hub_scripts.codec import Codec
from hub_scripts.evaluation.functional import evaluate
from hub_scripts.evaluation.reconstruction import measure_reconstruction
from hub_scripts.finetune import FinetuneArguments, finetune
from hub_scripts.generation.episodes import Episodes, draw_samples, train_prompter
from hub_scripts.generation.prompts import DataPrompt, PromptConfig, PromptedGenerator, Prompter
from hub_scripts.generation.retrieval import retrieve
from hub_scripts.prompt import PromptArguments, make_networks, train_prompt
from hub_scripts.sample import SampleArguments, sample
from hub_scripts.train import TrainArguments, train
from hub_scripts.zoos.networks import load_networks
from hub_scripts.zoos.tasks import Task, load_task
from hub_scripts.zoos.zoo import Zoo
from tests.tiny import TINY_TRAINING

CONFIG = PromptConfig((1, 5, 4), 3, width=4, feature_size=7, hidden_size=11, key_size=2)
QUICK = {
    "steps": 4,
    "batch_size": 2,
    "shots": 3,
    "queries": 2,
    "finetune_epochs": 1,
    "finetune_learning_rates": [1e-2],
    "finetune_batch_size": 100,
}


@pytest.fixture(scope="module")
def zoo_folder(tmp_path_factory) -> Path:
    """Networks that know three of the ten digits each."""
    folder = tmp_path_factory.mktemp("tasks") / "zoo"
    build_zoo(
        BuildZooArguments(
            output_dir=str(folder),
            num_models=9,
            epochs=2,
            batch_size=50,
            keep_epochs=["last"],
            learning_rates=[1e-2],
            weight_decays=[0.0],
            initialisations=["kaiming_uniform"],
            architecture_kwargs='{"channels": [3, 5], "hidden_size": 7, "batch_norm": true}',
            classes_per_network=3,
        )
    )
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, zoo_folder) -> Path:
    """A SANE model after six steps; the behavioural loss runs networks of different classes on the same images."""
    folder = tmp_path_factory.mktemp("model") / "model"
    results = train(TrainArguments(zoo=str(zoo_folder), output_dir=str(folder), **TINY_TRAINING))
    assert results["validation"]["accuracy_original"] > 0.5  # chance is 1/3, and 1/10 if labels were not their own
    return folder


@pytest.fixture(scope="module")
def prompt_folder(tmp_path_factory, zoo_folder, model_folder) -> Path:
    folder = tmp_path_factory.mktemp("prompt") / "prompt"
    train_prompt(PromptArguments(model=str(model_folder), zoo=str(zoo_folder), output_dir=str(folder), **QUICK))
    return folder


def samples(prompts=2, classes=3, each=4):
    torch.manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each).expand(prompts, -1)
    return torch.randn(prompts, classes * each, 1, 5, 4), labels


def make_prompter(zoo_folder, model_folder) -> Prompter:
    zoo = Zoo(zoo_folder)
    codec = Codec.from_pretrained(model_folder, zoo.layout)
    torch.manual_seed(0)
    latents = codec.encode(codec.tokens(zoo.stacked("train")))
    generator = PromptedGenerator(PromptConfig((1, 8, 8), 3, width=4), latents, codec.layout.layer_ids)
    row = zoo.rows("train")[0]
    return Prompter(generator, codec, row["architecture"], json.loads(row["architecture_kwargs"]), "digits")


# ---------------------------------------------------------------------------------------------------- class vectors
def test_class_vectors_depend_neither_on_the_order_of_samples_nor_on_copies_of_them():
    prompt, (images, labels) = DataPrompt(CONFIG), samples()
    vectors = prompt(images, labels)
    assert vectors.shape == (2, 3, 7)
    order = torch.randperm(12)
    torch.testing.assert_close(prompt(images[:, order], labels[:, order]), vectors)
    torch.testing.assert_close(prompt(images.repeat(1, 2, 1, 1, 1), labels.repeat(1, 2)), vectors)
    assert not torch.allclose(vectors[:, 0], vectors[:, 1])


def test_class_vectors_follow_the_numbers_of_the_classes():
    prompt, (images, labels) = DataPrompt(CONFIG), samples()
    moved = torch.tensor([2, 0, 1])[labels]
    torch.testing.assert_close(prompt(images, moved)[:, [2, 0, 1]], prompt(images, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y.clamp(max=1)), "prompt 0 has no sample of class 2; give at least one of each of the 3"),
        (lambda x, y: (x, y + 1), "labels are from 1 to 3, expected 0 to 2: .* as in digits"),
        (lambda x, y: (x[..., :3], y), r"the samples are 1 x 5 x 3, the networks read 1 x 5 x 4"),
        (lambda x, y: (x[0], y[0]), r"images have shape \(12, 1, 5, 4\) and labels \(12,\), expected"),
    ],
)
def test_samples_that_are_no_prompt_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DataPrompt(CONFIG)(*change(*samples()))


# ---------------------------------------------------------------------------------------------------- latents
def test_a_generator_starts_at_the_mean_of_its_anchors_and_mixes_them_by_layer():
    anchors, (images, labels) = torch.randn(5, 6, 2), samples()
    generator = PromptedGenerator(CONFIG, anchors, torch.tensor([0, 0, 4, 4, 4, 9]))
    made = generator(images, labels)
    assert made.latents.shape == (2, 6, 2)
    assert made.mixture.shape == (2, 3, 5)
    torch.testing.assert_close(made.mixture.sum(-1), torch.ones(2, 3))
    layer_of = [0, 0, 1, 1, 1, 2]
    by_hand = torch.stack([made.mixture[1, layer] @ anchors[:, t] for t, layer in enumerate(layer_of)])
    torch.testing.assert_close(made.latents[1], by_hand)
    alone = PromptedGenerator(CONFIG, anchors.mean(0, keepdim=True), torch.tensor(layer_of))
    torch.testing.assert_close(alone(images, labels).latents, anchors.mean(0).expand(2, -1, -1))


# ---------------------------------------------------------------------------------------------------- episodes
def make_task(classes=5, each=8):
    count = classes * each
    images = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 5, 4)  # an image tells which one it is
    labels = torch.arange(count) % classes
    splits = ("train", "validation", "test")
    return Task("made up", dict.fromkeys(splits, images), dict.fromkeys(splits, labels), classes, 0.0, 1.0)


def test_episodes_draw_no_held_out_classes_in_whatever_order():
    held_out = [(0, 1, 2), (4, 3, 2)]
    episodes = Episodes(make_task(), 3, held_out, np.random.default_rng(0))
    drawn = {episodes.draw_classes() for _ in range(400)}
    assert {frozenset(chosen) for chosen in drawn}.isdisjoint(map(frozenset, held_out))
    assert len(drawn) == 8 * 6  # eight sets of ten are left, in six orders


def test_where_few_sets_are_left_other_orders_are_drawn():
    episodes = Episodes(make_task(classes=3), 3, [(0, 1, 2)], np.random.default_rng(0))
    assert {episodes.draw_classes() for _ in range(100)} == {(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}
    with pytest.raises(ValueError, match="all orders of 2 of 2 classes are held out, none is left to train on"):
        Episodes(make_task(classes=2), 2, [(0, 1), (1, 0)], np.random.default_rng(0))


def test_queries_are_other_images_of_the_same_classes():
    episodes = Episodes(make_task(), 3, [], np.random.default_rng(0))
    episode = episodes.draw(4, shots=3, queries=9)  # of eight images of a class, three and the other five
    assert episode.images.shape == (4, 9, 1, 5, 4)
    assert episode.query_images.shape == (4, 15, 1, 5, 4)
    for i in range(4):
        numbers, others = (x[i, :, 0, 0, 0].long() for x in (episode.images, episode.query_images))
        assert not set(numbers.tolist()) & set(others.tolist())
        classes = (numbers % 5)[episode.labels[i] == 0].unique()
        assert torch.equal(classes, (others % 5)[episode.query_labels[i] == 0].unique())
        assert len(classes) == 1


def test_samples_are_drawn_by_class_and_numbered_in_the_order_given():
    labels = torch.tensor([5, 7, 5, 9, 7, 5])
    rows, numbers = draw_samples(labels, (7, 5), 2, np.random.default_rng(0))
    assert labels[rows].tolist() == [7, 7, 5, 5]
    assert numbers.tolist() == [0, 0, 1, 1]
    assert draw_samples(labels, (9, 5), 9, np.random.default_rng(0))[1].tolist() == [0, 1, 1, 1]


# ---------------------------------------------------------------------------------------------------- retrieval
class Pixels(nn.Sequential):
    """Outputs are weighted pixels of images (1, 1, 3)."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3, 3, bias=False))


def test_the_best_network_is_found_and_its_outputs_are_given_to_the_classes_they_fit():
    images, labels = torch.eye(3).view(1, 3, 1, 1, 3), torch.tensor([[0, 1, 2]])
    two_right = torch.eye(3)[[0, 1, 1]]
    all_right_but_turned = 5 * torch.eye(3)[[1, 2, 0]]  # output 0 answers to class 1
    networks = {"1.weight": torch.stack([-torch.eye(3), two_right, all_right_but_turned])}
    plain = retrieve(Pixels(), networks, images, labels, match=False)
    assert (plain.rows.tolist(), plain.outputs.tolist()) == ([1], [[0, 1, 2]])
    matched = retrieve(Pixels(), networks, images, labels, match=True)
    assert (matched.rows.tolist(), matched.outputs.tolist()) == ([2], [[2, 0, 1]])
    found = evaluate(Pixels(), {"1.weight": networks["1.weight"][2:]}, images[0], matched.outputs[0][labels[0]])
    assert found.accuracy[0] == 1


def test_among_equal_hits_the_surest_network_is_taken():
    images, labels = torch.eye(3).view(1, 3, 1, 1, 3), torch.tensor([[0, 1, 2]])
    networks = {"1.weight": torch.stack([torch.eye(3), 9 * torch.eye(3), 2 * torch.eye(3)])}
    for match in (True, False):
        assert retrieve(Pixels(), networks, images, labels, match).rows.tolist() == [1]


# ---------------------------------------------------------------------------------------------------- training, saving
def test_training_changes_the_generator_and_not_the_sane_model(zoo_folder, model_folder):
    prompter = make_prompter(zoo_folder, model_folder)
    others = list(itertools.permutations(range(3)))[1:]  # one order of three digits is left, which is soon learned
    episodes = Episodes(load_task("digits[4,0,7]"), 3, others, np.random.default_rng(0))
    before = {name: tensor.clone() for name, tensor in prompter.codec.model.state_dict().items()}
    losses = []
    train_prompter(
        prompter, episodes, steps=40, batch_size=4, shots=5, queries=8, learning_rate=5e-3,
        report=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.7 < 1.0 < np.mean(losses[:3])  # log 3 is chance
    assert all(torch.equal(before[name], tensor) for name, tensor in prompter.codec.model.state_dict().items())


def test_a_saved_prompter_makes_the_same_networks_to_the_bit(zoo_folder, model_folder, tmp_path):
    prompter, task = make_prompter(zoo_folder, model_folder), load_task("digits[4,0,7]")
    nn.init.normal_(prompter.generator.correction.weight, std=0.1)
    rows, labels = draw_samples(task.labels["train"], range(3), 4, np.random.default_rng(0))
    images = task.images["train"][rows][None]
    made = prompter(images, labels[None])
    prompter.save_pretrained(tmp_path / "prompt")
    assert {path.name for path in (tmp_path / "prompt").iterdir()} == {"prompt.json", "prompt.safetensors", "layout.json", "sane"}  # fmt: skip
    again = Prompter.from_pretrained(tmp_path / "prompt")
    assert again.config == prompter.config
    assert all(torch.equal(tensor, made[name]) for name, tensor in again(images, labels[None]).items())
    (tmp_path / "prompt" / "layout.json").unlink()
    with pytest.raises(ValueError, match=r"has no layout\.json, expected a folder that `sane prompt --zoo"):
        Prompter.from_pretrained(tmp_path / "prompt")


# ---------------------------------------------------------------------------------------------------- command
def test_a_prompt_is_measured_beside_its_baselines(prompt_folder, zoo_folder):
    assert {path.name for path in prompt_folder.iterdir()} == {
        "README.md", "results.json", "finetuning_samples.png", "finetuning_train.png", "prompt.json", "prompt.safetensors",
        "layout.json", "sane",
    }  # fmt: skip
    results = json.loads((prompt_folder / "results.json").read_text())
    found, zoo = results["prompt"], Zoo(zoo_folder)
    assert found["tasks"] == len(zoo.rows("test"))
    assert found["trained_accuracy"] == pytest.approx(zoo.column("test", "test_accuracy").mean(), abs=1e-6)
    assert results["history"][-1]["step"] == 4
    for data in ("samples", "train"):
        assert set(found[data]) == {"prompted", "retrieved", "retrieved_matched", "zoo_mean", "scratch"}
        assert {len(method["accuracy"]) for method in found[data].values()} == {2}
    at_start = {name: [found[data][name]["accuracy"][0] for data in ("samples", "train")] for name in found["train"]}
    assert all(one == other for one, other in at_start.values())
    assert at_start["retrieved_matched"][0] >= at_start["retrieved"][0] - 0.05
    assert found["train"]["scratch"]["accuracy"][1] > found["train"]["scratch"]["accuracy"][0]
    assert "| data prompt |" in (prompt_folder / "README.md").read_text()


def test_a_new_task_gets_networks_that_can_be_fine_tuned(prompt_folder, tmp_path):
    args = PromptArguments(prompt=str(prompt_folder), task="digits[9,2,5]", output_dir=str(tmp_path / "n"), count=2)
    results = make_networks(args)
    tensors, info = load_networks(tmp_path / "n" / "networks" / "prompted")
    task = load_task("digits[9,2,5]")
    module = Prompter.from_pretrained(prompt_folder).module
    accuracy = evaluate(module, tensors, task.images["test"], task.labels["test"]).accuracy
    assert [entry["test_accuracy"] for entry in info["sets"]["prompted"]] == pytest.approx(accuracy.tolist())
    assert results["accuracy_mean"] == pytest.approx(accuracy.mean())
    init = [str(tmp_path / "n" / "networks" / "prompted"), "scratch"]
    curves = finetune(FinetuneArguments(init=init, output_dir=str(tmp_path / "f"), epochs=1, learning_rates=[1e-2]))
    assert curves["prompted"][0] == pytest.approx(results["accuracy_mean"], abs=1e-5)
    assert curves["prompted"][1] > 0.4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task", "digits"), "labels are from 0 to 9, expected 0 to 2: networks of this prompt know 3 classes"),
        (("--task", "digits[1,2]"), "prompt 0 has no sample of class 2"),
    ],
)
def test_a_task_of_another_kind_is_refused(prompt_folder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--prompt", str(prompt_folder), *flags, "--output-dir", str(tmp_path / "n")])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_settings_that_do_not_belong_together_are_refused(tiny_zoo, model_folder, tmp_path):
    for given in ({"model": "m"}, {"prompt": "p"}, {"model": "m", "zoo": "z", "task": "t"}):
        with pytest.raises(ValueError, match="give --model and --zoo to train a prompt, or --prompt and --task"):
            PromptArguments(output_dir="o", **given)
    with pytest.raises(ValueError, match="the same network for every prompt; use --anchors all"):
        PromptArguments(output_dir="o", model="m", zoo="z", correct=False)
    with pytest.raises(
        ValueError, match=r"all networks of .* know the same classes; a prompt learns from a zoo of many"
    ):
        train_prompt(PromptArguments(model=str(model_folder), zoo=str(tiny_zoo), output_dir=str(tmp_path / "p")))


def test_other_commands_meet_a_zoo_of_many_tasks(zoo_folder, model_folder, tmp_path):
    zoo = Zoo(zoo_folder)
    figures, _ = measure_reconstruction(zoo, Codec.from_pretrained(model_folder, zoo.layout))
    assert figures["accuracy_original"] == pytest.approx(zoo.column("test", "test_accuracy").mean(), abs=2e-3)
    settings = {"model": str(model_folder), "zoo": str(zoo_folder), "output_dir": str(tmp_path / "s")}
    settings |= {"anchors": "top:2", "count": 2, "keep": 1, "bandwidths": [0.1], "noises": [0.1], "average": 2}
    with pytest.raises(ValueError, match=r"knows other classes of digits; .* for instance --task 'digits\["):
        sample(SampleArguments(**settings))
    chosen = ",".join(map(str, zoo.classes("train")[0]))
    sample(SampleArguments(**settings, task=f"digits[{chosen}]"))
