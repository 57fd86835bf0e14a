import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tokenization_sane import (
    SymmetryGroup,
    SymmetryItem,
    SymmetrySpec,
    WeightMatcher,
    align,
    find_symmetries,
    match_weights,
    weight_distance,
)
from tokenization_sane.symmetry_sane import axis_index


def permutations_of(module, inputs, **kwargs) -> SymmetrySpec:
    return find_symmetries(module, inputs, kinds=("permutation",), **kwargs)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def cnn(widths=(5, 7), normalize=True, classes=3):
    """Convolution, norm, ReLU, pooling; 8 x 8 images; flattened 2 x 2 maps at the end."""
    layers, channels = [], 2
    for width in widths:
        norm = [nn.BatchNorm2d(width)] if normalize else []
        layers += [nn.Conv2d(channels, width, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    pixels = (8 // 2 ** len(widths)) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * pixels, classes))


class ResidualNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.first, self.first_norm = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.second, self.second_norm = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        stream = self.stem_norm(self.stem(images)).relu()
        inside = self.first_norm(self.first(stream)).relu()
        stream = (stream + self.second_norm(self.second(inside))).relu()
        return {"logits": self.head(stream.mean((2, 3))), "stream_norm": stream.norm()}


IMAGES = torch.randn(2, 2, 8, 8, generator=seeded())
ROWS = torch.randn(4, 3, generator=seeded())


def trained_look(module, seed=0):
    """Random values in every tensor, so that norms and biases are not alike in all channels."""
    generator = seeded(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + 0.3 * torch.rand(tensor.shape, generator=generator))
                tensor.mul_(torch.randint(2, tensor.shape, generator=generator) * 2 - 1 if tensor.dim() > 1 else 1)
    return module.eval()


def moves(group):
    return [(item.tensor, item.axis, item.index) for item in group.items]


WHOLE = (0, 1, 1, 1)


def test_hidden_layers_of_an_mlp_are_its_groups():
    spec = permutations_of(mlp(), ROWS)
    assert [group.size for group in spec.groups] == [5, 7]
    assert moves(spec.groups[0]) == [("0.weight", 0, WHOLE), ("0.bias", 0, WHOLE), ("2.weight", 1, WHOLE)]
    assert moves(spec.groups[1]) == [("2.weight", 0, WHOLE), ("2.bias", 0, WHOLE), ("4.weight", 1, WHOLE)]
    assert spec.shapes == {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (7, 5), "2.bias": (7,), "4.weight": (2, 7)}
    assert [(group.name, group.size) for group in spec.rejected] == [("4.weight@0", 2)]
    assert "output" in spec.rejected[0].reason


def test_a_channel_before_flatten_owns_all_its_pixels():
    spec = permutations_of(cnn(), IMAGES)
    norm = ["1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert moves(spec.groups[0]) == [
        ("0.weight", 0, WHOLE), ("0.bias", 0, WHOLE), *((name, 0, WHOLE) for name in norm), ("4.weight", 1, WHOLE)
    ]  # fmt: skip
    assert spec.groups[1].size == 7
    assert moves(spec.groups[1])[-1] == (
        "9.weight",
        1,
        (0, 4, 4, 1),
    )  # 2 x 2 pixels for each channel, one after another


def test_a_flatten_of_channels_last_maps_takes_pixels_in_strides():
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.head = nn.Conv2d(2, 5, 3), nn.Linear(5 * 36, 3)

        def forward(self, images):
            return self.head(self.convolution(images).relu().permute(0, 2, 3, 1).flatten(1))

    (group,) = permutations_of(ChannelsLast(), IMAGES).groups
    assert moves(group)[-1] == ("head.weight", 1, (0, 1, 36, 5))


def test_a_residual_stream_is_one_group_and_the_branch_another():
    spec = permutations_of(ResidualNet(), IMAGES)
    assert [group.size for group in spec.groups] == [6, 5]
    stream, branch = ({(item.tensor, item.axis) for item in group.items} for group in spec.groups)
    assert {("stem.weight", 0), ("first.weight", 1), ("second.weight", 0), ("second_norm.running_var", 0)} <= stream
    assert {("first.weight", 0), ("second.weight", 1)} <= branch
    assert ("head.weight", 1) in stream


def test_depthwise_and_grouped_convolutions_keep_their_groups():
    module = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.PReLU(6), nn.Conv2d(6, 12, 3, groups=2), nn.ReLU(),
        nn.Conv2d(12, 3, 1), nn.Flatten(),
    )  # fmt: skip
    groups = permutations_of(module, IMAGES).groups
    assert [group.size for group in groups] == [3, 6]
    assert moves(groups[0])[0] == ("0.weight", 0, (0, 1, 2, 3))  # row r of both halves moves alike
    assert ("1.weight", 0, (0, 1, 2, 3)) in moves(groups[0])
    assert ("2.weight", 0, (0, 1, 2, 3)) in moves(groups[0])
    assert moves(groups[0])[-1] == ("3.weight", 1, WHOLE)
    assert moves(groups[1]) == [
        ("3.weight", 0, (0, 1, 2, 6)),
        ("3.bias", 0, (0, 1, 2, 6)),
        ("5.weight", 1, (0, 1, 2, 6)),
    ]


def test_a_concatenation_gives_each_part_its_own_columns():
    class Concatenated(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(9, 2)

        def forward(self, rows):
            return self.head(torch.cat([self.left(rows), self.right(rows)], dim=1).relu())

    left, right = permutations_of(Concatenated(), ROWS).groups
    assert moves(left)[-1] == ("head.weight", 1, WHOLE)
    assert left.size == 4
    assert moves(right)[-1] == ("head.weight", 1, (4, 1, 1, 1))


def test_tied_tensors_join_groups_and_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden, self.output = (
                nn.Embedding(11, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 11, bias=False),
            )
            self.output.weight = self.embedding.weight

        def forward(self, words):
            return self.output(self.hidden(self.embedding(words)).relu())

    module = Tied()
    spec = permutations_of(module, torch.arange(5)[None])
    (group,) = spec.groups
    assert moves(group) == [
        ("embedding.weight", 1, WHOLE), ("hidden.weight", 0, WHOLE), ("hidden.weight", 1, WHOLE), ("hidden.bias", 0, WHOLE)
    ]  # fmt: skip
    assert spec.ties == {"output.weight": "embedding.weight"}
    twin = spec.apply(module.state_dict(), spec.draw(seeded()))
    assert twin["output.weight"] is twin["embedding.weight"]
    one_name = {name: tensor for name, tensor in module.state_dict().items() if name != "embedding.weight"}
    assert torch.equal(spec.apply(one_name, spec.draw(seeded()))["output.weight"], twin["embedding.weight"])


class Attention(nn.Module):
    """Self-attention over rows with a fused projection, inside a residual stream."""

    def __init__(self, heads=2, size=6):
        super().__init__()
        self.split = (3, heads, size // heads)
        self.read, self.norm = nn.Linear(3, size), nn.LayerNorm(size)
        self.fused, self.out, self.head = nn.Linear(size, 3 * size), nn.Linear(size, size), nn.Linear(size, 2)

    def forward(self, rows):
        stream = self.read(rows)  # (batch, rows, size)
        fused = self.fused(self.norm(stream)).unflatten(-1, self.split).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*fused.unbind(0)).transpose(1, 2).flatten(2)
        return self.head(stream + self.out(mixed))


def test_attention_heads_move_whole_and_channels_move_inside_them():
    stream, heads, query_key, value_out = permutations_of(Attention(), ROWS[None]).groups
    assert stream.size == 6
    assert ("fused.weight", 1, WHOLE) in moves(stream)
    assert [item.rows(2).tolist() for item in heads.items if item.tensor == "fused.bias"] == [
        [[0, 6, 12, 1, 7, 13, 2, 8, 14], [3, 9, 15, 4, 10, 16, 5, 11, 17]]
    ]
    assert ("out.weight", 1, (0, 3, 3, 1)) in moves(heads)
    assert moves(query_key) == [("fused.weight", 0, (0, 1, 4, 3)), ("fused.bias", 0, (0, 1, 4, 3))]
    assert moves(value_out) == [
        ("fused.weight", 0, (12, 1, 2, 3)), ("fused.bias", 0, (12, 1, 2, 3)), ("out.weight", 1, (0, 1, 2, 3))
    ]  # fmt: skip


def test_groups_of_one_axis_commute_and_a_twin_of_heads_is_brought_back():
    state = trained_look(Attention()).state_dict()
    spec = permutations_of(Attention(), ROWS[None])
    draw = spec.draw(seeded(2))
    twin = spec.apply(state, draw)
    reverse = SymmetrySpec(spec.groups[::-1], (), spec.shapes).apply(state, draw[::-1])
    restored = spec.apply(twin, spec.invert(draw))
    aligned = align(twin, state, spec)
    assert all(torch.equal(twin[name], reverse[name]) for name in state)
    assert all(torch.equal(state[name], restored[name]) for name in state)
    assert all(torch.equal(state[name], aligned[name]) for name in state)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_hidden_units_of_a_recurrent_layer_own_a_row_of_each_gate(kind, gates):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.recurrent, self.head = nn.Linear(3, 4), kind(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, rows):
            return self.head(self.recurrent(self.read(rows))[0][:, -1])

    module = Recurrent()
    first, hidden = permutations_of(module, ROWS[None]).groups
    assert moves(first)[-1] == ("recurrent.weight_ih_l0", 1, WHOLE)
    rows = (0, 1, gates, 5 if gates > 1 else 1)
    assert moves(hidden) == [
        ("recurrent.weight_ih_l0", 0, rows), ("recurrent.weight_hh_l0", 0, rows), ("recurrent.weight_hh_l0", 1, WHOLE),
        ("recurrent.bias_ih_l0", 0, rows), ("recurrent.bias_hh_l0", 0, rows), ("head.weight", 1, WHOLE),
    ]  # fmt: skip
    assert isinstance(module.recurrent, kind)


def test_multihead_attention_modules_are_read_by_type():
    layer = nn.TransformerEncoderLayer(8, 2, 10, batch_first=True)
    groups = permutations_of(nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2)), ROWS[None]).groups
    assert {(group.size, group.items[0].tensor) for group in groups} == {
        (8, "0.weight"), (2, "1.self_attn.in_proj_weight"), (4, "1.self_attn.in_proj_weight"), (10, "1.linear1.weight")
    }  # fmt: skip


def test_chosen_outputs_decide_what_must_stay():
    class Open(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, rows):
            hidden = self.hidden(rows).relu()
            return {"logits": self.head(hidden), "hidden": hidden}

    assert permutations_of(Open(), ROWS).groups == ()
    spec = permutations_of(Open(), ROWS, select_outputs=lambda outputs: outputs["logits"])
    assert [group.size for group in spec.groups] == [5]
    assert not spec.verify(Open(), ROWS)[0].ok
    assert spec.verify(Open(), ROWS, select_outputs=lambda outputs: outputs["logits"])[0].ok


@settings(max_examples=15, deadline=None)
@given(widths=st.lists(st.integers(2, 6), min_size=1, max_size=3), normalize=st.booleans(), seed=st.integers(0, 99))
def test_a_drawn_twin_has_the_same_function(widths, normalize, seed):
    module = trained_look(cnn(widths, normalize), seed).double()
    spec = permutations_of(module, IMAGES)
    assert [group.size for group in spec.groups] == widths
    twin = copy.deepcopy(module)
    draw = spec.draw(seeded(seed))
    twin.load_state_dict(spec.apply(module.state_dict(), draw))
    expected = module(IMAGES.double())
    assert (twin(IMAGES.double()) - expected).norm() <= 1e-12 * expected.norm()
    assert torch.equal(twin[0].bias, module[0].bias[draw[0]])


def test_verify_catches_a_group_that_forgets_a_tensor():
    module = cnn()
    whole = permutations_of(module, IMAGES).groups[0]
    forgetful = SymmetryGroup(
        "no running mean", "permutation", 5, tuple(i for i in whole.items if i.tensor != "1.running_mean")
    )
    output = SymmetryGroup(
        "output", "permutation", 3, (SymmetryItem("9.weight", 0, WHOLE), SymmetryItem("9.bias", 0, WHOLE))
    )
    good, bad, worse = SymmetrySpec((whole, forgetful, output)).verify(module, IMAGES)
    assert good.ok
    assert good.max_error < 1e-12
    assert good.control_error > 1e-3
    assert not bad.ok
    assert bad.max_error > 1e-3
    assert not worse.ok


def test_verify_catches_a_group_that_moves_nothing():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 4)

        def forward(self, rows):
            return self.used(rows)

    idle = SymmetryGroup("idle", "permutation", 4, (SymmetryItem("unused.weight", 0, WHOLE),))
    (report,) = SymmetrySpec((idle,)).verify(Unused(), ROWS)
    assert report.max_error == report.control_error == 0
    assert not report.ok


def test_a_group_that_changes_the_function_is_rejected_with_the_reason():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, rows):
            return self.head(self.hidden(rows).relu() * torch.arange(4))

    spec = permutations_of(Fixed(), ROWS)
    assert spec.groups == ()
    assert [group.name for group in spec.rejected] == ["hidden.weight@0", "head.weight@0"]
    assert "changes the function" in spec.rejected[0].reason


def test_finding_and_verifying_leave_module_and_random_state_alone():
    module = trained_look(cnn()).train()
    before = copy.deepcopy(module.state_dict())
    random_state, images = torch.get_rng_state(), IMAGES.clone()
    permutations_of(module, IMAGES).verify(module, IMAGES)
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(images, IMAGES)
    assert module.training
    assert all(tensor.grad is None and tensor.dtype == torch.float32 for tensor in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_finding_is_deterministic():
    assert permutations_of(ResidualNet(), IMAGES) == permutations_of(ResidualNet(), IMAGES)


@pytest.mark.parametrize("inputs", [ROWS, (ROWS,), {"input": ROWS}, torch.zeros(4, 3)])
def test_example_inputs_can_be_a_tensor_a_tuple_or_a_dict(inputs):
    assert [group.size for group in permutations_of(mlp(), inputs).groups] == [5, 7]


def test_json_brings_back_the_same_spec():
    spec = permutations_of(cnn(), IMAGES)
    explicit = SymmetryGroup("explicit", "permutation", 2, (SymmetryItem("0.weight", 0, ((0, 4), (3, 1))),))
    spec = SymmetrySpec((*spec.groups, explicit), spec.rejected, spec.shapes, {"alias": "0.weight"})
    restored = SymmetrySpec.from_json(spec.to_json())
    assert restored == spec
    assert [group.max_error for group in restored.groups] == [group.max_error for group in spec.groups]
    assert len(repr(spec)) < 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": [0, 1, 1]}, "same number of indices"),
        ({"index": [0, -1, 1, 1]}, "'0.weight': index value is -1"),
        ({"index": [0, 2, 1, 1]}, "index 8 is outside of an axis of length 5"),
        ({"index": [0, 1, 2, 1]}, "two units own the same index"),
        ({"index": [0, 0, 1, 1]}, "two units own the same index"),
        ({"index": [0, 1, 0, 1]}, "repeat is 0"),
        ({"index": [0, 2**70, 1, 1]}, "integer"),
        ({"index": [[0], [1]]}, "2 rows of indices, the group has 5 units"),
        ({"index": [[0], [1], [2], [3], [3]]}, "two units own the same index"),
        ({"axis": 4}, "axis 4 does not exist in shape"),
        ({"axis": True}, "integer"),
    ],
)
def test_json_with_impossible_numbers_is_refused(change, message):
    data = json.loads(permutations_of(cnn(), IMAGES).to_json())
    data["groups"][0]["items"][0].update(change)
    with pytest.raises(ValueError, match=message):
        SymmetrySpec.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"format": 99}'])
def test_json_that_is_no_spec_is_refused(text):
    with pytest.raises(ValueError, match="Symmetry JSON"):
        SymmetrySpec.from_json(text)


def test_unit_u_takes_the_values_of_unit_p_u():
    group = SymmetryGroup("g", "permutation", 3, (SymmetryItem("t", 1, (1, 2, 2, 1)),))
    tensor = torch.arange(8.0)[None]  # units own columns (1, 2), (3, 4), (5, 6)
    moved = SymmetrySpec((group,)).apply({"t": tensor}, [torch.tensor([2, 0, 1])])["t"]
    assert moved.tolist() == [[0, 5, 6, 1, 2, 3, 4, 7]]
    assert tensor.tolist() == [list(range(8))]


def test_axis_index_gathers_a_batch_of_permutations():
    spec = permutations_of(cnn(), IMAGES)
    state = cnn().state_dict()
    item = spec.groups[1].items[-1]  # 7 channels of 4 pixels
    draws = spec.draw(seeded(), batch_size=3)
    assert [tuple(draw.shape) for draw in draws] == [(3, 5), (3, 7)]
    index = axis_index(item, draws[1], 28)
    assert index.shape == (3, 28)
    for row, permutation in zip(index, draws[1], strict=True):
        twin = spec.apply(state, [torch.arange(5), permutation])
        assert torch.equal(state["9.weight"][:, row], twin["9.weight"])
    assert axis_index(item, draws[1][None], 30)[0, :, 28:].tolist() == [[28, 29]] * 3


def test_draws_are_permutations_that_follow_their_generator():
    spec = permutations_of(cnn(), IMAGES)
    draws = spec.draw(seeded(1), batch_size=200)
    assert all(torch.equal(draw.sort(-1).values, torch.arange(draw.shape[-1]).expand_as(draw)) for draw in draws)
    assert all(torch.equal(one, two) for one, two in zip(draws, spec.draw(seeded(1), batch_size=200), strict=True))
    assert (draws[0][:, 0].bincount(minlength=5) > 20).all()  # 40 expected


def test_invert_undoes_and_compose_chains():
    spec, state = permutations_of(cnn(), IMAGES), trained_look(cnn()).state_dict()
    first, second = spec.draw(seeded(1)), spec.draw(seeded(2))
    chained = spec.apply(spec.apply(state, first), second)
    composed = spec.apply(state, spec.compose(first, second))
    restored = spec.apply(chained, spec.invert(spec.compose(first, second)))
    assert all(torch.equal(chained[name], composed[name]) for name in state)
    assert all(torch.equal(state[name], restored[name]) for name in state)
    assert any(not torch.equal(state[name], chained[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_apply_moves_values_of_any_dtype_and_passes_the_rest(dtype):
    spec = permutations_of(mlp(), ROWS)
    state = {name: (tensor * 9).to(dtype) for name, tensor in mlp().state_dict().items()}
    state["steps"] = torch.tensor(3)
    draw = spec.draw(seeded())
    twin = spec.apply(state, draw)
    assert list(twin) == list(state)
    assert twin["steps"] is state["steps"]
    assert twin["4.bias"] is state["4.bias"]
    assert twin["0.weight"].dtype == dtype
    assert torch.equal(twin["0.weight"].float(), state["0.weight"].float()[draw[0]])


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    spec, state = permutations_of(mlp(), ROWS), mlp().state_dict()
    wide = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).state_dict()
    with pytest.raises(ValueError, match=r"2.weight has shape \(8, 5\), the symmetry spec expects \(7, 5\)"):
        spec.apply(wide, spec.draw())
    with pytest.raises(ValueError, match=r"no tensor '2.weight'"):
        spec.apply({name: tensor for name, tensor in state.items() if name != "2.weight"}, spec.draw())
    with pytest.raises(
        ValueError, match=r"draw has permutations of sizes \[\(5,\)\], the symmetry spec expects \[\(5,\), \(7,\)\]"
    ):
        spec.apply(state, spec.draw()[:1])


def test_weights_that_are_not_finite_cannot_be_aligned():
    spec, state = permutations_of(cnn(), IMAGES), trained_look(cnn()).state_dict()
    broken = {**state, "1.weight": state["1.weight"] / 0}
    with pytest.raises(ValueError, match=r"1\.weight holds values that are not finite"):
        align(broken, state, spec)


@pytest.mark.parametrize(
    ("build", "inputs"), [(mlp, ROWS), (cnn, IMAGES), (lambda: cnn((4, 6, 9), False), IMAGES), (ResidualNet, IMAGES)]
)
def test_a_permuted_twin_is_brought_back_exactly(build, inputs):
    state = trained_look(build()).state_dict()
    spec = permutations_of(build(), inputs)
    for seed in range(5):
        draw = spec.draw(seeded(seed))
        twin = spec.apply(state, draw)
        assert weight_distance(twin, state) > 0.5
        back = match_weights(twin, state, spec)
        assert all(torch.equal(one, two) for one, two in zip(back, spec.invert(draw), strict=True))
        aligned = align(twin, state, spec)
        assert all(torch.equal(aligned[name], state[name]) for name in state)


def test_a_noisy_twin_is_brought_back_too():
    module = trained_look(ResidualNet())
    spec = permutations_of(module, IMAGES)
    state, generator = module.state_dict(), seeded(5)
    noisy = {
        name: t + 0.05 * torch.randn(t.shape, generator=generator)
        for name, t in state.items()
        if t.is_floating_point()
    }
    aligned = align(spec.apply(noisy, spec.draw(generator)), state, spec)
    assert all(torch.equal(aligned[name], noisy[name]) for name in noisy)


def test_aligning_independent_networks_shrinks_the_distance_and_keeps_the_function():
    spec = permutations_of(cnn(), IMAGES)
    reference = trained_look(cnn(), seed=1).state_dict()
    matcher = WeightMatcher(spec, reference)
    for seed in range(2, 6):
        module = trained_look(cnn(), seed).double()
        expected = module(IMAGES.double())
        aligned = spec.apply(module.state_dict(), matcher.match(module.state_dict()))
        assert weight_distance(aligned, reference, spec) < 0.95 * weight_distance(module.state_dict(), reference, spec)
        module.load_state_dict(aligned)
        assert torch.allclose(module(IMAGES.double()), expected, rtol=1e-10)


def test_aligning_to_itself_moves_nothing_and_again_moves_nothing_more():
    spec, state = permutations_of(cnn(), IMAGES), trained_look(cnn(), 1).state_dict()
    other = trained_look(cnn(), 2).state_dict()
    assert all(
        torch.equal(one, two) for one, two in zip(match_weights(state, state, spec), spec.identity(), strict=True)
    )
    aligned = align(other, state, spec)
    assert all(
        torch.equal(one, two) for one, two in zip(match_weights(aligned, state, spec), spec.identity(), strict=True)
    )


def test_aligning_is_deterministic_and_ignores_global_random_state():
    spec = permutations_of(cnn(), IMAGES)
    state, other = trained_look(cnn(), 1).state_dict(), trained_look(cnn(), 2).state_dict()
    first = match_weights(other, state, spec, seed=3)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert all(
        torch.equal(one, two) for one, two in zip(first, match_weights(other, state, spec, seed=3), strict=True)
    )


def test_weight_distance_counts_floating_tensors():
    first = {"a": torch.tensor([1.0, 2.0]), "steps": torch.tensor(1)}
    second = {"a": torch.tensor([4.0, 6.0]), "steps": torch.tensor(9)}
    assert weight_distance(first, second) == 5
    with pytest.raises(ValueError, match="must be alike"):
        weight_distance(first, {"a": torch.ones(3)})
