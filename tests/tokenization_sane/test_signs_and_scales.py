"""Signs and scales: found without a rule for a layer, kept apart from permutations, and taken out by alignment."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tokenization_sane import (
    SymmetryGroup,
    SymmetryItem,
    SymmetrySpec,
    WeightMatcher,
    align,
    find_symmetries,
    weight_distance,
)

ROWS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
WHOLE = (0, 1, 1, 1)


def mlp(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 2))


def groups(module: nn.Module, inputs, kind: str) -> list[SymmetryGroup]:
    return list(find_symmetries(module, inputs).of_kind(kind).groups)


def powers(group: SymmetryGroup) -> dict[str, int]:
    """Power of each tensor, as if the first one were multiplied."""
    return {item.tensor: item.power * group.items[0].power for item in group.items}


@pytest.mark.parametrize(
    ("activation", "signs", "scales"),
    [
        (nn.Tanh(), 1, 0),
        (nn.ReLU(), 0, 1),
        (nn.Identity(), 1, 1),
        (nn.GELU(), 0, 0),
        (nn.ReLU6(), 0, 0),  # looks like a scale while no value reaches 6
        (nn.Hardtanh(), 1, 0),
    ],
)
def test_the_activation_decides_which_signs_and_scales_there_are(activation, signs, scales):
    module = mlp(activation)
    assert len(groups(module, ROWS, "sign")) == signs
    assert len(groups(module, ROWS, "scale")) == scales


def test_a_scale_multiplies_what_writes_a_unit_and_divides_what_reads_it():
    (scale,) = groups(mlp(nn.ReLU()), ROWS, "scale")
    assert powers(scale) == {"0.weight": 1, "0.bias": 1, "2.weight": -1}
    assert [item.axis for item in scale.items] == [0, 0, 1]


def test_a_norm_before_relu_has_its_own_scale_and_none_where_its_epsilon_would_show():
    module = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)
    )
    (scale,) = groups(module, IMAGES, "scale")
    assert powers(scale) == {"1.weight": 1, "1.bias": 1, "5.weight": -1}


def test_sign_flips_stop_at_max_pooling():
    def network(pool: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), pool, nn.Flatten(), nn.Linear(45, 3))

    assert groups(network(nn.MaxPool2d(2)), IMAGES, "sign") == []
    assert len(groups(network(nn.AvgPool2d(2)), IMAGES, "sign")) == 1


def test_an_lstm_flips_its_cell_gate_and_the_readers_of_its_state():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, rows):
            return self.head(self.lstm(rows)[0][:, -1])

    (sign,) = groups(Reader(), ROWS[None], "sign")
    gates = {(item.tensor, item.axis): item.index for item in sign.items}
    assert gates["lstm.weight_ih_l0", 0] == (10, 1, 1, 1)  # the third of four gates of 5 units
    assert gates["lstm.weight_hh_l0", 1] == gates["head.weight", 1] == WHOLE


def test_query_and_key_and_value_and_output_of_attention_scale_against_each_other():
    layer = nn.TransformerEncoderLayer(8, 2, 10, batch_first=True)
    module = nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2))
    found = [powers(group) for group in groups(module, ROWS[None], "scale")]
    in_out = [
        p
        for p in found
        if p.keys() == {"1.self_attn.in_proj_weight", "1.self_attn.in_proj_bias", "1.self_attn.out_proj.weight"}
    ]
    assert len(in_out) == 1
    assert in_out[0]["1.self_attn.out_proj.weight"] == -1
    inside = [
        g
        for g in groups(module, ROWS[None], "scale")
        if {i.tensor for i in g.items} <= {"1.self_attn.in_proj_weight", "1.self_attn.in_proj_bias"}
    ]
    assert len(inside) == 1  # query against key


@settings(max_examples=20, deadline=None)
@given(
    widths=st.lists(st.integers(2, 6), min_size=1, max_size=3),
    activation=st.sampled_from([nn.Tanh, nn.ReLU, nn.Identity]),
    seed=st.integers(0, 99),
)
def test_a_twin_of_all_kinds_has_the_same_function_and_is_brought_back_to_the_bit(widths, activation, seed):
    torch.manual_seed(seed)
    rows, layers, inputs = torch.randn(4, 8), [], 8
    for width in widths:
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    module = nn.Sequential(*layers, nn.Linear(inputs, 2))
    spec, state = find_symmetries(module, rows), module.state_dict()
    assume(spec.of_kind("sign", "scale").groups)  # two ReLUs may be dead on all rows: then nothing of them can be told
    draw = spec.draw(torch.Generator().manual_seed(seed))
    twin = spec.apply(state, draw)
    other = copy.deepcopy(module).double()
    other.load_state_dict(twin)
    torch.testing.assert_close(
        other(rows.double()), copy.deepcopy(module).double()(rows.double()), rtol=1e-10, atol=1e-12
    )
    restored, aligned = spec.apply(twin, spec.invert(draw)), align(twin, state, spec)
    assert all(torch.equal(restored[name], state[name]) for name in state)
    assert weight_distance(aligned, state) < 1e-5


@pytest.mark.parametrize("seed", range(12))
def test_a_narrow_layer_of_relus_that_is_silent_at_first_hides_no_tensor(seed):
    """The weights that symmetries are tried on are drawn until the outputs depend on the inputs."""
    torch.manual_seed(seed)
    rows = torch.randn(4, 8)
    module = nn.Sequential(
        *(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    ).double()
    spec, state = find_symmetries(module, rows), module.state_dict()
    before = module(rows.double())
    module.load_state_dict(spec.apply(state, spec.draw(torch.Generator().manual_seed(seed))))
    torch.testing.assert_close(module(rows.double()), before, rtol=1e-10, atol=1e-12)


def test_compose_and_invert_carry_factors_along_with_the_units():
    module = mlp(nn.Identity())
    spec, state = find_symmetries(module, ROWS), module.state_dict()
    assert {group.kind for group in spec.groups} == {"permutation", "sign", "scale"}
    one, two = (spec.draw(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    chained = spec.apply(spec.apply(state, one), two)
    composed = spec.apply(state, spec.compose(one, two))
    undone = spec.apply(chained, spec.invert(spec.compose(one, two)))
    assert all(torch.equal(chained[name], composed[name]) for name in state)
    assert all(torch.equal(undone[name], state[name]) for name in state)
    batch = spec.draw(torch.Generator().manual_seed(3), batch_size=4)
    for number in range(4):
        alone = [value[number] for value in batch]
        expected, found = spec.invert(alone), [value[number] for value in spec.invert(batch)]
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_factors_multiply_by_hand():
    group = SymmetryGroup("g", "scale", 2, (SymmetryItem("a", 0, WHOLE), SymmetryItem("b", 1, (0, 2, 2, 1), -1)))
    state = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[8.0, 8.0, 8.0, 8.0]])}
    twin = SymmetrySpec((group,)).apply(state, [torch.tensor([2.0, 0.5])])
    assert twin["a"].tolist() == [2.0, 1.5]
    assert twin["b"].tolist() == [[4.0, 4.0, 16.0, 16.0]]  # two columns a unit, divided


def test_kinds_can_be_chosen_and_stand_in_order():
    module = mlp(nn.Identity())
    assert {g.kind for g in find_symmetries(module, ROWS, kinds=("scale",)).groups} == {"scale"}
    spec = find_symmetries(module, ROWS)
    identity = spec.draw(kinds=("permutation",))
    assert all((value == 1).all() for g, value in zip(spec.groups, identity, strict=True) if g.kind != "permutation")
    assert SymmetrySpec.from_json(spec.to_json()) == spec
    with pytest.raises(ValueError, match="stand in the order permutation, sign, scale"):
        SymmetrySpec(spec.groups[::-1])
    with pytest.raises(ValueError, match="power is 2, expected 1 or -1"):
        SymmetryItem("a", 0, WHOLE, 2)
    with pytest.raises(ValueError, match="kinds has 'rotation'"):
        find_symmetries(module, ROWS, kinds=("rotation",))


def test_aligning_many_networks_keeps_their_order_and_reports_distances():
    spec = find_symmetries(mlp(nn.Tanh()), ROWS)
    torch.manual_seed(1)
    states = [nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).state_dict() for _ in range(7)]
    matcher = WeightMatcher(spec, states[0])
    found = list(matcher.align_all(iter(states), num_threads=2))
    assert found[0].distance_after == 0
    for state, one in zip(states, found, strict=True):
        assert one.distance_after <= one.distance_before
        assert weight_distance(one.state_dict, states[0], spec) == one.distance_after
        assert all(torch.equal(a, b) for a, b in zip(one.draw, matcher.match(state), strict=True))


def test_small_attention_is_not_taken_for_free_channels():
    """Two heads of three channels: a random order of six keeps to the heads now and then."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=6,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=10,
        vocab_size=11,
        max_position_embeddings=16,
    )
    spec = find_symmetries(BertModel(config, add_pooling_layer=False), {"input_ids": torch.tensor([[1, 5, 7, 2]])})
    sizes = [g.size for g in spec.of_kind("permutation").groups if "query" in g.name or "value" in g.name]
    assert sorted(sizes) == [2, 3, 3]
