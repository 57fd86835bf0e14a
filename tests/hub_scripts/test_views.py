"""Windows and views: a moved window is the window of the moved network, and draws do not depend on how a run is split."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hub_scripts.training.order import Order, StepSampler
from hub_scripts.zoos.architectures import MLP
from hub_scripts.zoos.token_cache import TokenCache
from hub_scripts.zoos.views import LazyDraw, Sample, SymmetryGather, WindowDataset, collate
from tokenization_sane import CheckpointLayout, SaneWeightTokenizer, SymmetrySpec, find_symmetries
from tokenization_sane.layout_sane import TensorSpec
from tokenization_sane.symmetry_sane import SymmetryGroup, SymmetryItem

WHOLE = (0, 1, 1, 1)  # unit u owns index u
PACKINGS = ["dense", "flat", "paper"]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7)
        self.back, self.head = nn.Conv2d(7, 5, 3, padding=1, bias=False), nn.Linear(5, 3)

    def forward(self, images):
        stream = self.stem(images).relu()
        return self.head((stream + self.back(self.norm(self.inner(stream)).relu())).mean((2, 3)))


@pytest.fixture(scope="module")
def spec():
    return find_symmetries(network(), torch.randn(2, 2, 6, 6))


def group(kind: str, size: int, *items: SymmetryItem) -> SymmetryGroup:
    return SymmetryGroup(f"{items[0].tensor}.{items[0].axis}.{kind}.{items[0].index}", kind, size, items)


# ---------------------------------------------------------------------------------------------------- positions by hand
def weight_of_six() -> tuple[CheckpointLayout, SymmetrySpec]:
    """A matrix of 3 rows and 2 columns, and two groups that move them; one row a token of 2 values."""
    layout = CheckpointLayout.build([TensorSpec("w", (3, 2), "float32")], token_size=2)
    spec = SymmetrySpec((
        group("permutation", 3, SymmetryItem("w", 0, WHOLE)),
        group("permutation", 2, SymmetryItem("w", 1, WHOLE)),
    ))  # fmt: skip
    return layout, spec


def test_positions_of_moved_rows_and_columns():
    layout, spec = weight_of_six()
    draw = {0: np.array([2, 0, 1]), 1: np.array([1, 0])}

    source, factors = SymmetryGather(layout, spec).window(0, 3, draw)
    assert source.tolist() == [[5, 4], [1, 0], [3, 2]]  # rows 2, 0, 1 of (0, 1), (2, 3), (4, 5), each turned around
    assert factors is None
    assert SymmetryGather(layout, spec).window(1, 2, draw)[0].tolist() == [[1, 0]]


def test_positions_follow_the_packing():
    specs = [TensorSpec("w", (2, 3), "float32")]
    spec = SymmetrySpec((group("permutation", 2, SymmetryItem("w", 0, WHOLE)),))
    swap = {0: np.array([1, 0])}

    wide = CheckpointLayout.build(specs, token_size=2)  # values 0 1 | 2 . | 3 4 | 5 . at positions 0 to 7
    assert SymmetryGather(wide, spec).window(0, 4, swap)[0].tolist() == [[4, 5], [6, 0], [0, 1], [2, 0]]
    assert SymmetryGather(wide, spec).window(1, 3, swap)[0].tolist() == [[6, 0], [0, 1]]
    shared = CheckpointLayout.build(specs, token_size=7)  # both rows and one value of padding
    assert SymmetryGather(shared, spec).window(0, 1, swap)[0].tolist() == [[3, 4, 5, 0, 1, 2, 0]]
    flat = CheckpointLayout.build(specs, token_size=4, packing="flat")  # values 0 1 2 3 | 4 5 . .
    assert SymmetryGather(flat, spec).window(1, 2, swap)[0].tolist() == [[1, 2, 0, 0]]


def test_a_part_of_an_axis_moves_and_the_rest_stays():
    layout = CheckpointLayout.build([TensorSpec("w", (1, 7), "float32", row_axis=0)], token_size=7)
    first = group("permutation", 2, SymmetryItem("w", 1, (0, 2, 2, 1)))  # pairs (0, 1) and (2, 3)
    second = group("permutation", 2, SymmetryItem("w", 1, ((6,), (4,))))
    gather = SymmetryGather(layout, SymmetrySpec((first, second)))
    swap = np.array([1, 0])
    assert gather.window(0, 1, {0: swap, 1: swap})[0].tolist() == [[2, 3, 0, 1, 6, 5, 4]]


def test_channels_move_inside_heads_that_move_themselves():
    layout = CheckpointLayout.build([TensorSpec("w", (6, 1), "float32")], token_size=1)
    heads = group("permutation", 2, SymmetryItem("w", 0, (0, 3, 3, 1)))  # 0 1 2 | 3 4 5
    channels = group("permutation", 3, SymmetryItem("w", 0, (0, 1, 2, 3)))  # 0 3 | 1 4 | 2 5
    gather = SymmetryGather(layout, SymmetrySpec((heads, channels)))
    source, _ = gather.window(0, 6, {0: np.array([1, 0]), 1: np.array([1, 2, 0])})
    assert source.flatten().tolist() == [4, 5, 3, 1, 2, 0]


def test_signs_and_scales_multiply_what_has_moved():
    layout, spec = weight_of_six()
    spec = SymmetrySpec((
        *spec.groups,
        group("sign", 3, SymmetryItem("w", 0, WHOLE)),
        group("scale", 2, SymmetryItem("w", 1, WHOLE, power=-1)),
    ))  # fmt: skip
    draw = {0: np.array([2, 0, 1]), 1: np.array([0, 1]), 2: np.float32([-1, 1, 1]), 3: np.float32([2, 1])}

    source, factors = SymmetryGather(layout, spec, kinds=("permutation", "sign")).window(0, 3, draw)
    assert source.tolist() == [[4, 5], [0, 1], [2, 3]]
    assert factors.tolist() == [[-1, -1], [1, 1], [1, 1]]
    assert SymmetryGather(layout, spec).window(0, 3, draw)[1].tolist() == factors.tolist()
    source, factors = SymmetryGather(layout, spec, kinds=("scale",)).window(0, 3, draw)
    assert source.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert factors.tolist() == [[0.5, 1]] * 3


def test_scales_are_powers_of_two_and_signs_are_plus_or_minus_one():
    groups = (
        group("sign", 50, SymmetryItem("w", 0, WHOLE)),
        group("scale", 50, SymmetryItem("w", 0, WHOLE)),
    )
    draw = LazyDraw(groups, np.random.default_rng(0))
    assert set(draw[0]) == {-1, 1}
    assert set(draw[1]) == {0.5, 1, 2}
    assert draw[0].dtype == draw[1].dtype == np.float32


def test_only_groups_in_the_window_are_drawn():
    layout, spec = weight_of_six()
    more = TensorSpec("v", (5, 2), "float32")
    layout = CheckpointLayout.build([TensorSpec("w", (3, 2), "float32"), more], token_size=2)
    parts = [group("permutation", 2, SymmetryItem("v", 0, (first, 1, 1, 1))) for first in (0, 3)]
    spec = SymmetrySpec((*spec.groups, *parts))
    for window, expected in (((0, 2), {0, 1}), ((2, 4), {0, 1, 2}), ((3, 5), {2}), ((5, 6), set()), ((4, 7), {2, 3})):
        draw = LazyDraw(spec.groups, np.random.default_rng(0))
        SymmetryGather(layout, spec).window(*window, draw)
        assert set(draw) == expected, window


def test_tied_tensors_move_under_the_name_that_the_layout_has():
    layout = CheckpointLayout.build([TensorSpec("b", (3, 2), "float32")], token_size=2)
    item = group("permutation", 3, SymmetryItem("a", 0, WHOLE))
    turn = {0: np.array([1, 2, 0])}
    assert SymmetryGather(layout, SymmetrySpec((item,), ties={"b": "a"})).window(0, 1, turn)[0].tolist() == [[2, 3]]
    layout = CheckpointLayout.build([TensorSpec("b", (3, 2), "float32")], token_size=2, ties={"a": "b"})
    assert SymmetryGather(layout, SymmetrySpec((item,))).window(0, 1, turn)[0].tolist() == [[2, 3]]


def test_memory_does_not_grow_with_the_number_of_values():
    small, large = (
        CheckpointLayout.build([TensorSpec("w", (5, 5, size, size), "float32")], token_size=288) for size in (1, 100)
    )
    spec = SymmetrySpec((group("permutation", 5, SymmetryItem("w", 0, WHOLE), SymmetryItem("w", 1, WHOLE)),))
    sizes = [len(pickle.dumps(SymmetryGather(layout, spec))) for layout in (small, large)]
    assert abs(sizes[1] - sizes[0]) < 100
    assert large.num_parameters == 10_000 * small.num_parameters


def test_a_spec_of_another_network_is_refused():
    layout, _ = weight_of_six()
    with pytest.raises(ValueError, match=r"index 3 is outside of an axis of length 3"):
        SymmetryGather(layout, SymmetrySpec((group("permutation", 4, SymmetryItem("w", 0, WHOLE)),)))
    with pytest.raises(ValueError, match=r"w has shape \(3, 2\), symmetry group .* moves axis 2"):
        SymmetryGather(layout, SymmetrySpec((group("permutation", 2, SymmetryItem("w", 2, WHOLE)),)))
    with pytest.raises(ValueError, match="'rotation' is no kind of symmetry"):
        SymmetryGather(layout, SymmetrySpec(()), kinds=("rotation",))
    with pytest.raises(ValueError, match="tokens 2:4 are no window of a network of 3 tokens"):
        SymmetryGather(layout, SymmetrySpec(())).draw(2, 4, np.random.default_rng(0))


# ------------------------------------------------------------------------------------- against the whole network, moved
def check_window(layout: CheckpointLayout, spec: SymmetrySpec, state_dict: dict, start: int, stop: int, seed: int):
    """A moved window is the window of the moved network, to the bit."""
    gather = SymmetryGather(layout, spec, kinds=("permutation", "sign", "scale"))
    draw = LazyDraw(spec.groups, np.random.default_rng(seed))
    source, factors = gather.window(start, stop, draw)
    again = gather.draw(start, stop, np.random.default_rng(seed))
    assert np.array_equal(source, again[0])
    assert (factors is None) == (again[1] is None)
    assert factors is None or np.array_equal(factors, again[1])

    mask = layout.value_mask[start:stop].numpy()
    found = np.where(mask, layout.pack(state_dict).flatten().numpy()[source], 0)
    found = found if factors is None else found * factors
    neutral = spec.identity()  # for groups that the window did not ask for
    whole = [torch.from_numpy(draw[i]).to(rest.dtype) if i in draw else rest for i, rest in enumerate(neutral)]
    expected = layout.pack(spec.apply(state_dict, whole))[start:stop].numpy()
    assert source.dtype == np.int64
    assert (source[~mask] == 0).all()
    assert factors is None or (factors[~mask] == 1).all()
    assert np.array_equal(found, expected)
    return draw, found


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("window", [(0, 1), (3, 8), (0, None)])
def test_a_permuted_window_is_the_window_of_the_permuted_network(spec, packing, window):
    state_dict = network().state_dict()
    layout = SaneWeightTokenizer(7, packing).layout(state_dict)
    start, stop = window[0], window[1] or layout.num_tokens
    draw, found = check_window(layout, spec, state_dict, start, stop, seed=0)
    assert len(draw) > 0
    assert not np.array_equal(found, layout.pack(state_dict)[start:stop].numpy())


@st.composite
def checkpoints(draw):
    """A state dict of tensors of any rank with numbers that are all different, and groups that move any of their axes."""
    specs, length = [], st.integers(1, 5)
    for module in "abc"[: draw(st.integers(1, 3))]:
        rank = draw(st.integers(0, 5))
        shape = tuple(draw(length) for _ in range(rank))
        dtype = draw(st.sampled_from(["float32", "float32", "complex64"]))
        axis = draw(st.integers(0, rank - 1)) if rank else None
        specs.append(TensorSpec(f"{module}.weight", shape, dtype, row_axis=axis))
        vector = shape[axis] if rank and draw(st.booleans()) else draw(length)
        for name in ("bias", "scale", "mean")[: draw(st.integers(0, 3))]:
            specs.append(TensorSpec(f"{module}.{name}", (vector,), "float32"))
    places = [(spec, axis, size) for spec in specs for axis, size in enumerate(spec.shape) if size > 1]
    groups = []
    for number in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["permutation", "permutation", "sign", "scale"]))
        # spec.apply multiplies real tensors only
        possible = [place for place in places if kind == "permutation" or place[0].dtype == "float32"]
        if not possible:
            continue
        chosen = draw(st.lists(st.sampled_from(possible), min_size=1, max_size=5, unique=True))
        size = draw(st.integers(2, min(size for *_, size in chosen)))
        items = []
        for spec, axis, whole in chosen:
            repeat = draw(st.integers(1, whole // size))
            indices = (
                draw(st.permutations(range(whole)))[: size * repeat] if draw(st.booleans()) else range(size * repeat)
            )
            item = SymmetryItem.from_rows(spec.name, axis, np.array(indices).reshape(size, repeat))
            items.append(replace(item, power=1 if kind == "permutation" else draw(st.sampled_from([1, -1]))))
        groups.append(SymmetryGroup(f"group {number}", kind, size, tuple(items)))
    groups.sort(key=lambda group: ["permutation", "sign", "scale"].index(group.kind))
    count, tensors = 1, {}
    for spec in specs:
        numel = math.prod(spec.shape)
        values = torch.arange(count, count + numel, dtype=torch.float32).view(spec.shape)
        tensors[spec.name] = values * (1 + 1000j) if spec.dtype == "complex64" else values
        count += numel
    return specs, SymmetrySpec(tuple(groups)), tensors


@settings(max_examples=300, deadline=None)
@given(checkpoints(), st.sampled_from(PACKINGS), st.integers(1, 23), st.data())
def test_any_window_of_any_checkpoint_moves_as_the_whole_does(checkpoint, packing, token_size, data):
    specs, spec, state_dict = checkpoint
    layout = CheckpointLayout.build(specs, token_size, packing)
    start = data.draw(st.integers(0, layout.num_tokens - 1))
    stop = data.draw(st.integers(start + 1, layout.num_tokens))
    check_window(layout, spec, state_dict, start, stop, seed=data.draw(st.integers(0, 99)))


NETWORKS = {
    "cnn": (network, (2, 2, 6, 6)),
    "mlp": (lambda: MLP(4, 2, (7, 5), 3, "tanh"), (2, 2, 4, 4)),
    "residual": (Residual, (2, 2, 5, 5)),
}


@pytest.fixture(scope="module")
def found_specs():
    return {name: find_symmetries(build(), torch.randn(shape)) for name, (build, shape) in NETWORKS.items()}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*NETWORKS]), st.sampled_from(PACKINGS), st.integers(1, 99), st.data())
def test_any_window_of_a_real_network_moves_as_the_whole_does(found_specs, name, packing, token_size, data):
    state_dict, spec = NETWORKS[name][0]().state_dict(), found_specs[name]
    assert spec.groups
    layout = SaneWeightTokenizer(token_size, packing).layout(state_dict)
    start = data.draw(st.integers(0, layout.num_tokens - 1))
    stop = data.draw(st.integers(start + 1, layout.num_tokens))
    check_window(layout, spec, state_dict, start, stop, seed=data.draw(st.integers(0, 99)))


# ---------------------------------------------------------------------------------------------------- samples
def dataset(spec, noise=0.1, window_size=6) -> WindowDataset:
    torch.manual_seed(0)
    layout = SaneWeightTokenizer(7).layout(network())
    tokens = torch.stack([layout.pack(network().state_dict()) for _ in range(5)]).numpy()
    return WindowDataset(TokenCache(tokens, layout), as_they_are(layout), window_size, spec, noise, seed=3)


def as_they_are(layout: CheckpointLayout) -> dict[str, tuple[float, float]]:
    """Statistics that change nothing."""
    return dict.fromkeys(layout.tensors, (0.0, 1.0))


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


def test_signs_flip_weights_and_not_their_normalised_values():
    """A weight w is shown as (w - 3) / 2; its mirror image -w is shown as (-w - 3) / 2."""
    layout = CheckpointLayout.build([TensorSpec("w", (4, 2), "float32")], token_size=3)
    weights = torch.arange(8, dtype=torch.float32).view(4, 2)
    cache = TokenCache(layout.pack({"w": weights})[None].numpy(), layout)
    tokens = layout.pack({"w": (weights - 3) / 2}).numpy()
    spec = SymmetrySpec((group("sign", 4, SymmetryItem("w", 0, WHOLE)),))
    views = WindowDataset(cache, {"w": (3.0, 2.0)}, 4, spec, seed=3)
    flipped = 0
    for epoch in range(8):
        item = views[Sample(epoch, 0)]
        assert np.array_equal(item["labels"], tokens)
        second = item["second_labels"]
        assert (second[:, 2] == 0).all()  # padding
        for row in range(4):
            choices = [[(sign * w - 3) / 2 for w in weights[row].tolist()] for sign in (1, -1)]
            assert second[row, :2].tolist() in choices
            flipped += second[row, :2].tolist() == choices[1]
    assert 8 <= flipped <= 24  # of 32
    plain = WindowDataset(cache, {"w": (3.0, 2.0)}, 4, spec, seed=3, kinds=("permutation",))[Sample(0, 0)]
    assert np.array_equal(plain["second_labels"], tokens)


def test_a_network_shorter_than_a_window_is_padded(spec):
    views = dataset(spec, window_size=99)
    item = views[Sample(0, 0)]
    real = views.num_tokens
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
    return list(StepSampler(Order([11], seed=5), batch_size=4, last_step=7, **kwargs))


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
        StepSampler(Order([11], 0), 12, 0, 1)
    with pytest.raises(ValueError, match="a batch of 3 does not divide among 2 processes"):
        StepSampler(Order([11], 0), 3, 0, 1, num_processes=2)
