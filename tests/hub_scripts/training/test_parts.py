"""Zoos of several layouts in one run."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hub_scripts.training.order import Order, StepSampler
from hub_scripts.training.parts import MixedWindows, open_parts
from hub_scripts.zoos.views import Sample, WindowDataset, collate
from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import SaneWeightTokenizer


def test_without_weights_an_epoch_shows_each_row_once():
    order = Order([5, 3], seed=1)
    assert sorted(sample.row for sample in order.epoch(4)) == list(range(8))
    assert order.epoch(4) == Order([5, 3], seed=1).epoch(4) != order.epoch(5)
    assert {sample.epoch for sample in order.epoch(4)} == {4}


def test_weights_are_shares_of_an_epoch_and_each_part_goes_round_its_rows():
    order = Order([10, 2], seed=1, weights=[1.0, 3.0])
    assert len(order) == 12
    shown = [sample for epoch in range(4) for sample in order.epoch(epoch)]
    rows = Counter(sample.row for sample in shown)
    assert sum(rows[row] for row in range(10)) == 12
    assert {rows[row] for row in range(10)} == {1, 2}  # 12 of 10: nobody twice before all were there
    assert rows[10] == rows[11] == 18
    assert len(set(shown)) == len(shown)  # a row that comes again has another epoch, so another view
    assert order.epoch(2) == Order([10, 2], seed=1, weights=[1.0, 3.0]).epoch(2)


@pytest.fixture(scope="module")
def parts(tiny_zoo, mlp_zoo):
    tokenizer = SaneWeightTokenizer(16, "flat", "zoo")
    return open_parts([Zoo(tiny_zoo), Zoo(mlp_zoo)], tokenizer), tokenizer


def test_each_layout_has_its_own_statistics_and_symmetries(parts):
    parts, tokenizer = parts
    assert len({part.layout.fingerprint for part in parts}) == 2
    for part in parts:
        rows = (part.zoo.state_dict("train", row) for row in range(len(part.train)))
        expected = SaneWeightTokenizer(16, "flat", "zoo").fit(rows, part.zoo.layout).zoo
        for name, pair in expected[part.layout.fingerprint]["statistics"].items():
            assert part.statistics[name] == pytest.approx(pair)
        assert tokenizer.symmetries[part.layout.fingerprint] == part.zoo.symmetries.to_json()


def test_a_batch_holds_windows_of_both_padded_to_one_size(parts):
    parts, _ = parts
    windows = MixedWindows([WindowDataset(part.train, part.statistics, 60, part.zoo.symmetries) for part in parts])
    assert len(windows) == sum(len(part.train) for part in parts)
    order = Order([len(part.train) for part in parts], seed=0)
    (batch,) = DataLoader(windows, batch_sampler=StepSampler(order, 24, 0, 1), collate_fn=collate)
    assert set(batch["part"].tolist()) == {0, 1}
    for place in range(24):
        part, row = parts[batch["part"][place]], int(batch["row"][place])
        size = min(60, part.layout.num_tokens)
        assert batch["attention_mask"][place].sum() == size
        first = int(batch["position_ids"][place, 0, 0])
        expected = part.train.tokens([row])[0, first : first + size]
        scale = {name: 1 / std for name, (_, std) in part.statistics.items()}
        shift = {name: -mean / std for name, (mean, std) in part.statistics.items()}
        gather = windows.parts[batch["part"][place]].gather
        scale, shift = (torch.from_numpy(gather.spread(one, first, first + size)) for one in (scale, shift))
        torch.testing.assert_close(batch["labels"][place, :size], expected * scale + shift, atol=1e-5, rtol=1e-4)


def test_zoos_of_one_layout_share_their_statistics(tiny_zoo, tmp_path):
    tokenizer = SaneWeightTokenizer(16, "flat", "zoo")
    twice = open_parts([Zoo(tiny_zoo), Zoo(tiny_zoo)], tokenizer)
    once = open_parts([Zoo(tiny_zoo)], SaneWeightTokenizer(16, "flat", "zoo"))
    for name, (mean, std) in once[0].statistics.items():
        assert np.allclose(twice[0].statistics[name], (mean, std))


def test_a_row_is_counted_through_all_parts(parts):
    parts, _ = parts
    windows = MixedWindows([WindowDataset(part.train, part.statistics, 8) for part in parts])
    first = len(parts[0].train)
    assert (windows[Sample(0, first - 1)]["part"], windows[Sample(0, first - 1)]["row"]) == (0, first - 1)
    assert (windows[Sample(0, first)]["part"], windows[Sample(0, first)]["row"]) == (1, 0)
