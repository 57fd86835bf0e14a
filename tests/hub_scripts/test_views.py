"""Windows and views: a permuted window is the window of the permuted network, and draws do not depend on how a run is split."""

import numpy as np
import pytest
import torch
from torch import nn

from hub_scripts.zoos.views import Sample, StepSampler, SymmetryGather, WindowDataset, collate
from tokenization_sane import SaneWeightTokenizer, find_symmetries


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    )


@pytest.fixture(scope="module")
def spec():
    return find_symmetries(network(), torch.randn(2, 2, 6, 6))


@pytest.mark.parametrize("packing", ["dense", "flat", "paper"])
@pytest.mark.parametrize("window", [(0, 1), (3, 8), (0, None)])
def test_a_permuted_window_is_the_window_of_the_permuted_network(spec, packing, window):
    state_dict = network().state_dict()
    layout = SaneWeightTokenizer(7, packing).layout(state_dict)
    start, stop = window[0], window[1] or layout.num_tokens
    gather = SymmetryGather(layout, spec)

    source = gather.draw(start, stop, np.random.default_rng(0))
    # the groups that the window touches draw in turn; the others do not matter to it
    rng, touched = np.random.default_rng(0), set()
    for layer in layout.layers:
        if layer.first_token < stop and layer.first_token + layer.num_tokens > start:
            touched |= {
                i
                for i, g in enumerate(spec.groups)
                for item in g.items
                for t in layer.tensors
                if item.tensor == t.name
            }
    draw = spec.identity()
    for group in sorted(touched):
        draw[group] = torch.from_numpy(rng.permutation(spec.groups[group].size))
    assert window[1] == 1 or len(touched) > 0

    tokens = layout.pack(state_dict)
    expected = layout.pack(spec.apply(state_dict, draw))[start:stop]
    found = torch.where(layout.value_mask[start:stop], tokens.flatten()[torch.from_numpy(source)], 0)
    assert torch.equal(found, expected)
    assert not torch.equal(found, tokens[start:stop])


def dataset(spec, noise=0.1, window_size=6) -> WindowDataset:
    torch.manual_seed(0)
    layout = SaneWeightTokenizer(7).layout(network())
    tokens = torch.stack([layout.pack(network().state_dict()) for _ in range(5)]).numpy()
    return WindowDataset(tokens, layout, window_size, spec, noise, seed=3)


def test_a_view_depends_on_seed_epoch_and_row_alone(spec):
    views = dataset(spec)
    again = views[Sample(2, 4)]
    views[Sample(0, 1)]
    for name, values in views[Sample(2, 4)].items():
        assert np.array_equal(values, again[name]), name
    assert not np.array_equal(views[Sample(3, 4)]["labels"], again["labels"]) or not np.array_equal(
        views[Sample(3, 4)]["second_labels"], again["second_labels"]
    )


def test_noise_is_on_the_views_and_not_on_their_targets(spec):
    clean, noisy = dataset(spec, noise=0.0)[Sample(0, 2)], dataset(spec, noise=0.5)[Sample(0, 2)]
    assert np.array_equal(clean["token_values"], clean["labels"])
    assert np.array_equal(clean["labels"], noisy["labels"])
    assert not np.array_equal(noisy["token_values"], noisy["labels"])
    assert (noisy["token_values"][~noisy["value_mask"]] == 0).all()


def test_a_network_shorter_than_a_window_is_padded(spec):
    views = dataset(spec, window_size=99)
    item = views[Sample(0, 0)]
    real = views.layout.num_tokens
    assert item["attention_mask"].sum() == real < 99
    assert item["token_values"].shape == (99, 7)
    assert not item["value_mask"][real:].any()


def test_without_symmetries_the_second_view_differs_by_noise_alone():
    item = dataset(None)[Sample(0, 0)]
    assert np.array_equal(item["labels"], item["second_labels"])
    assert not np.array_equal(item["token_values"], item["second_token_values"])


def test_items_are_stacked(spec):
    batch = collate([dataset(spec)[Sample(0, row)] for row in (1, 3)])
    assert batch["token_values"].shape == (2, 6, 7)
    assert batch["row"].tolist() == [1, 3]


def steps(**kwargs) -> list:
    return list(StepSampler(count=11, batch_size=4, last_step=7, seed=5, **kwargs))


def test_every_epoch_shows_other_checkpoints_once():
    taken = [sample for step in steps(first_step=0) for sample in step]
    for epoch in range(3):
        rows = [sample.row for sample in taken if sample.epoch == epoch]
        assert len(set(rows)) == len(rows) == 8  # two whole steps of the eleven checkpoints
    assert [s.row for s in taken if s.epoch == 0] != [s.row for s in taken if s.epoch == 1]


def test_a_run_goes_on_with_the_steps_it_would_have_taken():
    assert steps(first_step=3) == steps(first_step=0)[3:]


def test_two_processes_share_the_steps_of_one():
    one, left, right = (
        steps(first_step=0),
        steps(first_step=0, num_processes=2),
        steps(first_step=0, rank=1, num_processes=2),
    )
    assert [a + b for a, b in zip(left, right, strict=True)] == one


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="a batch of 12 is more than the 11 checkpoints"):
        StepSampler(11, 12, 0, 1, 0)
    with pytest.raises(ValueError, match="a batch of 3 does not divide among 2 processes"):
        StepSampler(11, 3, 0, 1, 0, num_processes=2)
