"""Sweeps: which settings networks get, which of them train together, and what training makes of the settings."""

import copy
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hub_scripts.evaluation import functional
from hub_scripts.evaluation.functional import (
    accuracy,
    batched_logits,
    cross_entropy,
    evaluate,
    own_logits,
    train_networks,
    trains_one_by_one,
)
from hub_scripts.zoos.architectures import MLP, ModelZooCNN, SmallCNN
from hub_scripts.zoos.population import INITIALISATIONS, _initialise, _training_data
from hub_scripts.zoos.sweep import (
    Member,
    draw_classes,
    draw_members,
    make_groups,
    num_combinations,
    read_classes,
    write_classes,
)
from hub_scripts.zoos.tasks import Task, renumber

SETTINGS = {
    "learning_rate": [0.1, 0.2],
    "weight_decay": [0.0],
    "initialisation": ["kaiming_uniform", "xavier_normal"],
    "optimizer": ["adamw", "sgd"],
    "data_fraction": [1.0],
    "label_noise": [0.0],
}
SWEPT = {"channels": [[2, 3], [3, 5]], "activation": ["tanh", "relu"]}


def draw(count, sweep, settings=SETTINGS, swept=SWEPT, seed=0):
    return draw_members(settings, swept, {"hidden_size": 7}, count, sweep, seed)


# ---------------------------------------------------------------------------------------------------- settings
def test_a_grid_takes_every_combination_in_turn():
    assert num_combinations(SETTINGS, SWEPT) == 32
    members = draw(70, "grid")
    names = [name for name in members[0].hparams if name != "seed"]
    counts = Counter(tuple(member.hparams[name] for name in names) for member in members)
    assert len(counts) == 32
    assert sorted(counts.values()) == [2] * 26 + [3] * 6
    assert [member.model_id for member in members[:2]] == ["model-00000", "model-00001"]
    assert len({member.hparams["seed"] for member in members}) == 70


def test_arguments_of_the_architecture_are_swept_and_recorded():
    member = draw(70, "grid")[-1]
    assert member.kwargs == {"hidden_size": 7, "channels": [3, 5], "activation": "relu"}
    assert member.hparams["activation"] == "relu"
    assert json.loads(member.hparams["channels"]) == [3, 5]  # a column holds no lists
    assert "hidden_size" not in member.hparams  # all networks share it


def test_random_settings_are_independent_draws_that_follow_from_the_seed():
    members = draw(400, "random")
    assert members == draw(400, "random")
    assert members != draw(400, "random", seed=1)
    pairs = Counter((member.hparams["learning_rate"], member.hparams["activation"]) for member in members)
    assert len(pairs) == 4
    assert min(pairs.values()) > 70


def test_groups_are_alike_and_not_too_large():
    members = draw(70, "random")
    groups = make_groups(members, lambda kwargs: 3 if "tanh" in kwargs else 4)
    assert [member for group in groups for member in group] == members  # numbered in the order of their groups
    for group in groups:
        assert len({member.shape for member in group}) == 1
        assert len(group) <= (3 if group[0].hparams["activation"] == "tanh" else 4)
    assert len({group[0].shape for group in groups}) == 8  # two sizes, two activations, two optimizers


# ---------------------------------------------------------------------------------------------------- classes
def in_splits(count, held_out):
    """Members and their splits, the last ones held out."""
    members = make_members(count)
    names = ["train"] * (count - held_out) + ["validation", "test"] * held_out
    return members, {member.model_id: name for member, name in zip(members, names, strict=False)}


def test_no_network_has_the_classes_of_a_held_out_one_in_the_same_order():
    members, splits = in_splits(40, held_out=9)
    found = draw_classes(members, splits, num_classes=4, per_network=2, seed=0)  # twelve choices
    assert found == draw_classes(members, splits, 4, 2, seed=0) != draw_classes(members, splits, 4, 2, seed=1)
    held_out = [member.classes for member in found if splits[member.model_id] != "train"]
    train = {member.classes for member in found if splits[member.model_id] == "train"}
    assert len(set(held_out)) == 9
    assert len(train) == 3
    assert train.isdisjoint(held_out)
    assert all(len(set(chosen)) == 2 and set(chosen) <= set(range(4)) for chosen in [*train, *held_out])
    assert [member.hparams["seed"] for member in found] == list(range(40))  # all else is as it was


def test_more_held_out_networks_than_choices_of_classes_are_refused():
    with pytest.raises(
        ValueError, match="2 of 3 classes can be chosen and ordered in 6 ways, but the 6 networks of the"
    ):
        draw_classes(*in_splits(20, held_out=6), num_classes=3, per_network=2, seed=0)


def test_classes_are_text_in_a_column():
    assert write_classes([3, 1, 10]) == "3-1-10"
    assert read_classes("3-1-10") == (3, 1, 10)
    assert make_members()[0].classes is None


# ---------------------------------------------------------------------------------------------------- data and weights
def make_task(images=20, classes=3):
    generator = torch.Generator().manual_seed(0)
    splits = ("train", "validation", "test")
    x = {split: torch.randn(images, 1, 4, 4, generator=generator) for split in splits}
    return Task("made up", x, {split: torch.arange(images) % classes for split in splits}, classes, 0.0, 1.0)


def make_members(count=3, **hparams):
    shared = {"initialisation": "kaiming_uniform", "data_fraction": 1.0, "label_noise": 0.0}
    return [Member(f"m{i}", "{}", {**shared, **hparams, "seed": i}) for i in range(count)]


def test_each_network_sees_its_own_share_of_the_images():
    subsets, labels = _training_data(make_members(data_fraction=0.4), make_task())
    assert subsets.shape == (3, 8)
    assert all(len(set(subset.tolist())) == 8 for subset in subsets)
    assert len({frozenset(subset.tolist()) for subset in subsets}) == 3
    assert torch.equal(labels, make_task().labels["train"])
    assert _training_data(make_members(), make_task())[0] is None


def test_label_noise_gives_a_share_of_a_networks_images_another_class():
    task = make_task()
    subsets, labels = _training_data(make_members(data_fraction=0.5, label_noise=0.3), task)
    wrong = labels != task.labels["train"]
    assert labels.shape == (3, 20)
    assert ((labels >= 0) & (labels < 3)).all()
    assert wrong.gather(1, subsets).sum(1).tolist() == [3, 3, 3]
    assert wrong.sum(1).tolist() == [3, 3, 3]  # others are not touched


def test_a_network_with_classes_of_its_own_sees_their_images_alone():
    task = make_task(images=21)  # seven of each of three classes
    task.labels["train"][0] = 1  # six, eight, seven
    members = [replace(m, hparams={**m.hparams, "classes": c}) for m, c in zip(make_members(), ("2-0", "1-2", "0-1"), strict=True)]  # fmt: skip
    subsets, labels = _training_data(members, task)
    assert labels.shape == (3, 21)
    assert subsets.shape == (3, 13)  # as many as the two smallest classes have
    for member, subset, own in zip(members, subsets, labels, strict=True):
        assert len(set(subset.tolist())) == 13
        assert set(own[subset].tolist()) == {0, 1}
        assert torch.equal(torch.tensor(member.classes)[own[subset]], task.labels["train"][subset])
        assert (own == -100).sum() == (
            torch.isin(task.labels["train"], torch.tensor(member.classes), invert=True)
        ).sum()
    noisy = [replace(m, hparams={**m.hparams, "data_fraction": 0.5, "label_noise": 0.5}) for m in members]
    subsets, wrong = _training_data(noisy, task)
    assert subsets.shape == (3, 6)
    assert (wrong != labels).sum(1).tolist() == [3, 3, 3]
    assert set(wrong.gather(1, subsets).flatten().tolist()) == {0, 1}


def test_images_without_a_label_are_not_counted(networks):
    images, labels = torch.randn(9, 1, 4, 4), torch.arange(9) % 3
    own = torch.stack([renumber(labels, (0, 1, 2)), renumber(labels, (2, 1)), renumber(labels, (1, 0))])
    found = evaluate(Net(), networks, images, own, batch_size=2)
    logits = batched_logits(Net(), networks, images)
    np.testing.assert_allclose(accuracy(logits, own), found.accuracy, rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(logits, own), found.loss, rtol=1e-5)
    for i in range(3):
        kept = own[i] >= 0
        alone = evaluate(Net(), {k: t[i : i + 1] for k, t in networks.items()}, images[kept], own[i][kept])
        assert found.accuracy[i] == pytest.approx(alone.accuracy[0])
        assert found.loss[i] == pytest.approx(alone.loss[0], rel=1e-5)


def test_each_network_may_be_run_on_images_of_its_own(networks):
    images = torch.randn(3, 5, 1, 4, 4)
    found = own_logits(Net(), networks, images)
    for i in range(3):
        torch.testing.assert_close(found[i], batched_logits(Net(), networks, images[i])[i])


@pytest.mark.parametrize(
    ("initialisation", "low", "high", "std"),
    [("uniform", 0.0, 1.0, 12**-0.5), ("normal", -6, 6, 1.0), ("truncated_normal", -2.0, 2.0, 0.88), ("kaiming_normal", -1, 1, (2 / 64) ** 0.5)],
)  # fmt: skip
def test_initialisations_are_those_of_the_published_zoos(initialisation, low, high, std):
    stacked = _initialise(MLP(hidden_sizes=(30,)), make_members(4, initialisation=initialisation))
    weight = stacked["fc1.weight"]
    assert low <= weight.min() < weight.max() <= high
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert (stacked["fc1.bias"] == 0).all()
    assert not torch.equal(weight[0], weight[1])
    assert set(INITIALISATIONS) >= {"kaiming_uniform", "xavier_uniform", "xavier_normal"}


def test_the_cnn_of_the_model_zoos_has_their_parameters():
    def count(**kwargs):
        return sum(parameter.numel() for parameter in ModelZooCNN(**kwargs).parameters())

    assert (count(), count(image_channels=3)) == (2464, 2864)  # as published, grey and coloured
    assert ModelZooCNN(image_size=20, dropout=0.1, batch_norm=True).eval()(torch.zeros(2, 1, 20, 20)).shape == (2, 10)
    with pytest.raises(ValueError, match="image_size is 19, expected at least 20"):
        ModelZooCNN(image_size=19)
    with pytest.raises(ValueError, match="activation is 'swish', expected one of tanh, relu"):
        SmallCNN(activation="swish")


# ---------------------------------------------------------------------------------------------------- training
class Net(nn.Sequential):
    """A convolution, batch norm and a linear layer on images (1, 4, 4)."""

    def __init__(self):
        # a bias before batch norm has no gradient but rounding, which Adam would blow up to full steps
        super().__init__(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


class ViewNet(Net):
    """Its `view` does not work on channels that stand last."""

    def forward(self, images):
        maps = self[2](self[1](self[0](images)))
        return self[4](maps.view(len(images), -1))


def train(module, stacked, task, **settings):
    settings = {"learning_rate": 0.05, "epochs": 2, "batch_size": 6, "labels": task.labels["train"], **settings}
    generator = torch.Generator().manual_seed(5)
    return list(train_networks(module, stacked, task.images["train"], generator=generator, **settings))[-1]


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return _initialise(Net(), make_members())


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("sgd", lambda p, **settings: torch.optim.SGD(p, momentum=0.9, **settings)),
    ],
)
def test_optimizers_take_the_steps_of_torchs_own_with_settings_of_each_network(networks, name, reference):
    task, rates, decays = make_task(), [0.01, 0.03, 0.05], [0.0, 0.5, 1.0]
    together = train(Net(), networks, task, optimizer=name, learning_rate=rates, weight_decay=decays)
    for i in range(3):
        alone = Net()
        alone.load_state_dict({key: tensor[i] for key, tensor in networks.items()})
        optimizer = reference(alone.parameters(), lr=rates[i], weight_decay=decays[i])
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            for batch in torch.randperm(20, generator=generator).split(6):
                optimizer.zero_grad()
                nn.functional.cross_entropy(alone(task.images["train"][batch]), task.labels["train"][batch]).backward()
                optimizer.step()
        for key, tensor in alone.state_dict().items():
            torch.testing.assert_close(together[key][i], tensor, rtol=1e-3, atol=1e-4)


def test_an_unknown_optimizer_is_refused(networks):
    with pytest.raises(ValueError, match="no optimizer 'lion', expected one of adamw, adam, sgd"):
        train(Net(), networks, make_task(), optimizer="lion")


@pytest.mark.parametrize("kind", [Net, ViewNet])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_networks_one_by_one_learn_as_those_at_once(networks, kind, fraction, monkeypatch):
    task = make_task()
    subsets, labels = _training_data(make_members(data_fraction=fraction, label_noise=0.2), task)
    settings = {"labels": labels, "subsets": subsets, "learning_rate": [0.01, 0.02, 0.03]}
    at_once = train(kind(), networks, task, **settings)
    figures = evaluate(kind(), at_once, task.images["train"], labels, batch_size=7, subsets=subsets)
    assert not trains_one_by_one(kind(), task.images["train"][:1], 6)
    monkeypatch.setattr(functional, "LARGE_CONVOLUTION", 0)
    assert trains_one_by_one(kind(), task.images["train"][:1], 6)
    one_by_one = train(kind(), networks, task, **settings)
    for key, tensor in at_once.items():
        torch.testing.assert_close(one_by_one[key], tensor, rtol=1e-3, atol=1e-4)
        assert one_by_one[key].is_contiguous()
    again = evaluate(kind(), at_once, task.images["train"], labels, batch_size=7, subsets=subsets)
    np.testing.assert_allclose(again.accuracy, figures.accuracy)
    np.testing.assert_allclose(again.loss, figures.loss, rtol=1e-5)


def test_a_network_learns_from_its_own_images_and_labels_alone(networks):
    task = make_task()
    subsets, labels = _training_data(make_members(data_fraction=0.5, label_noise=0.2), task)
    before = train(Net(), networks, task, labels=labels, subsets=subsets)
    changed = copy.deepcopy(task)
    unseen = sorted(set(range(20)) - set(subsets[1].tolist()))
    changed.images["train"][unseen] = 100
    after = train(Net(), networks, changed, labels=labels, subsets=subsets)
    assert all(torch.equal(before[key][1], after[key][1]) for key in before)
    assert not torch.equal(before["4.weight"][0], after["4.weight"][0])


def test_accuracy_is_measured_on_the_images_of_each_network(networks):
    task = make_task()
    subsets, labels = _training_data(make_members(data_fraction=0.5, label_noise=0.2), task)
    found = evaluate(Net(), networks, task.images["train"], labels, subsets=subsets)
    for i in range(3):
        own = {key: tensor[i : i + 1] for key, tensor in networks.items()}
        alone = evaluate(Net(), own, task.images["train"][subsets[i]], labels[i][subsets[i]])
        assert found.accuracy[i] == pytest.approx(alone.accuracy[0])
        assert found.loss[i] == pytest.approx(alone.loss[0], rel=1e-5)
