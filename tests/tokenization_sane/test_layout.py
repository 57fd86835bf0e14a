"""The layout: what stands where, by hand and by an independent re-implementation of the paper's tokens."""

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from tokenization_sane import CheckpointLayout, SaneWeightTokenizer, TensorSpec
from tokenization_sane.layout_sane import check_name

torch.set_num_threads(1)


def layout_of(shapes: dict, token_size: int, packing: str) -> CheckpointLayout:
    return CheckpointLayout.build([TensorSpec(n, s, "float32") for n, s in shapes.items()], token_size, packing)


def paper_tokens(state_dict: dict, token_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Section 1 of the method, row by row: tokens, masks and positions (n, l, k). For matrices, kernels and norms only."""
    tokens, masks, positions = [], [], []
    layer = 0
    for name, tensor in state_dict.items():
        if tensor.dim() == 0 or name.endswith("bias"):
            continue
        rows = tensor.reshape(len(tensor), -1)
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("weight") and bias in state_dict:
            rows = torch.cat([rows, state_dict[bias][:, None]], dim=1)
        for channel, row in enumerate(rows):
            for start in range(0, len(row), token_size):
                part = row[start : start + token_size]
                token = torch.zeros(token_size)
                token[: len(part)] = part
                tokens.append(token)
                masks.append(torch.arange(token_size) < len(part))
                positions.append([len(positions), layer, channel])
        layer += 1
    return torch.stack(tokens), torch.stack(masks), torch.tensor(positions)


def small_cnn_with_norm() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 7))
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            nn.init.normal_(tensor)
    return net


def test_dense_lays_whole_narrow_rows_side_by_side_and_cuts_wide_rows():
    layout = layout_of({"a.weight": (5, 4), "b.weight": (2, 13)}, token_size=9, packing="dense")
    narrow, wide = layout.layers
    # a: two rows of 4 fit into 9 values; b: a row of 13 needs two tokens
    assert (narrow.rows, narrow.columns, narrow.num_tokens) == (5, 4, 3)
    assert (wide.rows, wide.columns, wide.num_tokens) == (2, 13, 4)
    assert layout.position_ids.tolist() == [
        [0, 0, 0],
        [1, 0, 2],
        [2, 0, 4],
        [3, 1, 0],
        [4, 1, 0],
        [5, 1, 1],
        [6, 1, 1],
    ]
    assert layout.value_mask.sum(1).tolist() == [8, 8, 4, 9, 4, 9, 4]
    assert layout.fill == pytest.approx((20 + 26) / 63)


WEIGHT, BIAS = torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.tensor([10.0, 20, 30])


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        ("dense", [[1, 2, 3, 4, 0], [5, 6, 0, 0, 0], [10, 20, 30, 0, 0]]),  # two rows a token; the bias for itself
        ("flat", [[1, 2, 3, 4, 5], [6, 0, 0, 0, 0], [10, 20, 30, 0, 0]]),  # across rows
        ("paper", [[1, 2, 10, 0, 0], [3, 4, 20, 0, 0], [5, 6, 30, 0, 0]]),  # a row a token, its bias last
    ],
)
def test_where_weights_and_bias_of_a_layer_stand(packing, expected):
    layout = layout_of({"a.weight": (3, 2), "a.bias": (3,)}, token_size=5, packing=packing)
    assert layout.pack({"a.weight": WEIGHT, "a.bias": BIAS}).tolist() == expected
    assert {layer.kind for layer in layout.layers} == {"linear"}


def test_the_vectors_of_a_norm_are_the_columns_of_one_table():
    layout = SaneWeightTokenizer(9, "dense").layout(nn.BatchNorm2d(3))
    (norm,) = layout.layers
    assert ([t.name for t in norm.tensors], norm.rows, norm.columns) == (
        ["weight", "bias", "running_mean", "running_var"],
        3,
        4,
    )


def test_the_channel_of_a_flat_token_is_the_row_it_begins_in():
    layout = layout_of({"a.weight": (4, 3)}, token_size=5, packing="flat")
    assert layout.position_ids[:, 2].tolist() == [0, 1, 3]  # values 0, 5 and 10 of rows of 3


@pytest.mark.parametrize("token_size", [4, 11, 50])
def test_paper_packing_equals_the_method_row_by_row(token_size):
    state_dict = {k: v for k, v in small_cnn_with_norm().state_dict().items() if v.is_floating_point()}
    batch = SaneWeightTokenizer(token_size, "paper")(state_dict)
    tokens, masks, positions = paper_tokens(state_dict, token_size)
    assert torch.equal(batch["token_values"][0], tokens)
    assert torch.equal(batch["value_mask"][0], masks)
    assert torch.equal(batch["position_ids"][0], positions)


def resnet18(device: str) -> ResNetForImageClassification:
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    with torch.device(device):
        return ResNetForImageClassification(config)


def test_paper_packing_of_resnet18_equals_the_method_and_its_positions_pass_16_bits():
    network = resnet18("cpu")
    generator = torch.Generator().manual_seed(0)
    state_dict = {  # random norms too, so that scale, shift and statistics are told apart
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    batch = SaneWeightTokenizer(288, "paper")(state_dict)
    tokens, masks, positions = paper_tokens(state_dict, 288)
    assert batch["token_values"].shape == (1, 53524, 288)
    assert torch.equal(batch["token_values"][0], tokens)
    assert torch.equal(batch["value_mask"][0], masks)
    assert torch.equal(batch["position_ids"][0], positions)
    assert batch["position_ids"].dtype == torch.int64
    assert positions[:, 0].tolist() == list(range(53524))  # 16 bits would wrap at 32768


def test_resnet18_takes_fewer_and_fuller_tokens_than_in_the_papers_packing():
    paper = SaneWeightTokenizer(288, "paper").layout(resnet18("meta"))
    dense, flat = paper.repack(packing="dense"), paper.repack(packing="flat")
    assert (paper.num_tokens, paper.fill) == (53524, pytest.approx(0.726, abs=1e-3))
    assert dense.num_tokens <= 40_000
    assert dense.fill >= 0.97
    assert flat.fill > 0.999


def test_a_convolution_with_a_single_output_channel_keeps_its_row_and_a_position_table_has_positions_as_rows():
    layout = layout_of({"conv.weight": (1, 4, 3, 3), "conv.bias": (1,), "positions": (1, 6, 5)}, 50, "paper")
    conv, positions = layout.layers
    assert (conv.rows, conv.columns, conv.kind) == (1, 37, "conv")
    assert (positions.rows, positions.columns, positions.kind) == (6, 5, "other")


def test_recurrent_matrices_take_one_bias_each_in_the_papers_packing():
    layout = SaneWeightTokenizer(16, "paper").layout(nn.LSTM(3, 5, num_layers=2))
    names = [[tensor.name for tensor in layer.tensors] for layer in layout.layers]
    assert names == [
        ["weight_ih_l0", "bias_ih_l0"],
        ["weight_hh_l0", "bias_hh_l0"],
        ["weight_ih_l1", "bias_ih_l1"],
        ["weight_hh_l1", "bias_hh_l1"],
    ]
    assert {layer.kind for layer in layout.layers} == {"recurrent"}


def test_module_types_give_kinds_and_the_axis_of_output_channels():
    net = nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(3, 7, 2, bias=False),
            "words": nn.Embedding(11, 5),
            "norm": nn.LayerNorm(5),
            "out": nn.Linear(5, 2, bias=False),
        }
    )
    layout = SaneWeightTokenizer(16).layout(net)
    assert [(layer.name, layer.kind, layer.rows) for layer in layout.layers] == [
        ("up", "conv", 7),
        ("words", "embedding", 11),
        ("norm", "norm", 5),
        ("out", "linear", 2),
    ]


def test_the_fingerprint_knows_names_and_shapes_but_not_order_dtype_or_token_size():
    a = layout_of({"x": (2, 3), "y": (4,)}, 8, "dense")
    assert a.fingerprint == layout_of({"y": (4,), "x": (2, 3)}, 5, "flat").fingerprint
    assert a.fingerprint != layout_of({"x": (3, 2), "y": (4,)}, 8, "dense").fingerprint
    assert a.fingerprint != layout_of({"z": (2, 3), "y": (4,)}, 8, "dense").fingerprint


def test_json_restores_the_layout():
    layout = SaneWeightTokenizer(10, "flat").layout(small_cnn_with_norm())
    assert CheckpointLayout.from_json(layout.to_json()) == layout
    assert layout.repack(288, "dense").repack(10, "flat") == layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=99), "no layout of format"),
        (lambda d: d.update(token_size=0), "token_size is 0"),
        (lambda d: d.update(packing="loose"), "packing is 'loose'"),
        (lambda d: d["layers"][0]["tensors"][0].__setitem__(1, [-5, 2, 3, 3]), "expected sizes of 0 or more"),
        (lambda d: d["layers"][0]["tensors"][0].__setitem__(1, [2**40, 2**40]), "more than any checkpoint can"),
        (lambda d: d["layers"][0]["tensors"][0].__setitem__(2, "float99"), "dtype 'float99'"),
        (lambda d: d["layers"][0]["tensors"][0].__setitem__(3, 4), "row axis 4"),
        (lambda d: d["layers"][0].update(kind="banana"), "layer kind 'banana'"),
        (lambda d: d["layers"][0]["tensors"].append(["0.weight", [5], "float32", 0]), "stands twice"),
        (lambda d: d["layers"][0]["tensors"].append(["extra", [6], "float32", 0]), "different row counts"),
        (lambda d: d["ties"].update(again="nowhere"), "tied to 'nowhere'"),
        (lambda d: d.pop("layers"), "damaged"),
    ],
)
def test_a_damaged_layout_is_refused_before_anything_is_allocated(change, message):
    data = SaneWeightTokenizer(10).layout(small_cnn_with_norm()).to_dict()
    change(data)
    with pytest.raises(ValueError, match=message):
        CheckpointLayout.from_json(json.dumps(data))


def test_tensors_that_do_not_fit_are_named_with_both_shapes():
    layout = layout_of({"a.weight": (5, 3)}, 8, "dense")
    with pytest.raises(ValueError, match=r"a.weight has shape \(5, 4\), the layout expects \(5, 3\)"):
        layout.pack({"a.weight": torch.zeros(5, 4)})
    with pytest.raises(ValueError, match=r"a.weight is missing"):
        layout.pack({})
    with pytest.raises(ValueError, match=r"\(4, 8\), the layout expects \(..., 3, 8\)"):
        layout.unpack(torch.zeros(4, 8))


def test_many_checkpoints_are_packed_and_unpacked_at_once():
    layout = layout_of({"a.weight": (5, 3), "a.bias": (5,), "s": ()}, 8, "dense")
    stacked = {"a.weight": torch.randn(4, 5, 3), "a.bias": torch.randn(4, 5), "s": torch.randn(4)}
    tokens = layout.pack(stacked)
    assert tokens.shape == (4, layout.num_tokens, 8)
    assert torch.equal(tokens[2], layout.pack({name: tensor[2] for name, tensor in stacked.items()}))
    assert all(torch.equal(tensor, stacked[name]) for name, tensor in layout.unpack(tokens).items())


def test_gradients_flow_through_unpacking():
    layout = layout_of({"a.weight": (5, 3), "a.bias": (5,)}, 8, "flat")
    tokens = torch.randn(layout.num_tokens, 8, requires_grad=True)
    sum(tensor.sum() for tensor in layout.unpack(tokens).values()).backward()
    assert torch.equal(tokens.grad, layout.value_mask.float())


# ---------------------------------------------------------------------------------------------------- windows
SHAPES = st.dictionaries(
    st.sampled_from(["a.weight", "a.bias", "b.weight", "c.weight", "c.bias", "c.mean", "scale"]),
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    min_size=1,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SHAPES, st.integers(1, 11), st.sampled_from(["dense", "flat", "paper"]), st.data())
def test_any_window_is_made_of_what_stands_in_it_alone(shapes, token_size, packing, data):
    layout = layout_of(shapes, token_size, packing)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    whole = layout.pack(tensors)
    start = data.draw(st.integers(0, layout.num_tokens))
    stop = data.draw(st.integers(start, layout.num_tokens))
    values_read = 0

    def read(tensor, first, end, columns=None):
        nonlocal values_read
        part = tensor.read(tensors[tensor.name].__getitem__, first, end, columns)
        values_read += part.numel()
        return part

    assert torch.equal(layout.window(read, start, stop), whole[start:stop])
    assert values_read == layout.value_mask[start:stop].sum()
    assert torch.equal(layout.window_mask(start, stop), layout.value_mask[start:stop])
    assert torch.equal(layout.window_positions(start, stop), layout.position_ids[start:stop])
    assert torch.equal(layout.window_kinds(start, stop), layout.layer_kind_ids[start:stop])
    numbers = {name: float(place + 1) for place, name in enumerate(tensors)}
    spread = layout.pack({name: torch.full_like(tensor, numbers[name]) for name, tensor in tensors.items()})
    assert torch.equal(layout.window_values(numbers, start, stop), spread[start:stop])


@pytest.mark.parametrize(("shape", "row_axis"), [((1, 600), 0), ((2, 3, 5, 20), 0), ((3, 2, 100), 1)])
@pytest.mark.parametrize("packing", ["dense", "flat"])
def test_a_row_wider_than_the_window_is_read_in_parts_of_it(shape, row_axis, packing):
    layout = CheckpointLayout.build([TensorSpec("w", shape, "float32", None, row_axis)], 8, packing)
    tensor = torch.arange(600.0).reshape(shape)
    (place,) = layout.tensors.values()
    asked = []

    def take(index):
        asked.append(tensor[index].numel())
        return tensor[index]

    parts = [
        layout.window(lambda _, *part: place.read(take, *part), start, min(start + 2, layout.num_tokens))
        for start in range(0, layout.num_tokens, 2)
    ]
    assert torch.equal(torch.cat(parts), layout.pack({"w": tensor}))
    assert max(asked) <= 16
    assert sum(asked) == 600  # nothing is read twice


def test_chunks_cover_a_table_once():
    layout = layout_of({"w": (3, 10), "v": (7,), "empty": (0, 4)}, 8, "flat")
    chunks = {name: list(tensor.chunks(4)) for name, tensor in layout.tensors.items()}
    assert chunks["v"] == [(0, 4, None), (4, 7, None)]
    assert chunks["w"][:4] == [(0, 1, (0, 4)), (0, 1, (4, 8)), (0, 1, (8, 10)), (1, 2, (0, 4))]
    assert chunks["empty"] == []


def test_vectors_take_the_matrices_of_their_length_in_turn_whatever_their_number():
    shapes = {f"w{i}": (4, 3) for i in range(500)} | {f"b{i}": (4,) for i in range(1000)}
    layout = layout_of(shapes, 8, "paper")
    assert [t.name for t in layout.layers[3].tensors] == ["w3", "b3", "b503"]


# ---------------------------------------------------------------------------------------------------- from elsewhere
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b", "tensor name 'a/b' holds '/'.*rename it"),
        ("a\\b", r"holds '\\\\'"),
        ("a\nb", r"holds '\\n'"),
        ("a\x00", r"holds '\\x00'"),
        ("a\x9b", r"holds '\\x9b'"),
        ("a\u202eb", r"holds '\\u202e'"),
        ("\ud800", r"holds '\\ud800'"),
        ("", "'' names nothing"),
        ("..", "'..' names nothing"),
        (3, "tensor name 3 is no text"),
        (["x"], "tensor name a list is no text"),
    ],
)
def test_names_that_no_file_or_table_can_hold_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        check_name(name)
    with pytest.raises(ValueError, match=message):
        CheckpointLayout.build([TensorSpec(name, (2,), "float32")])


def test_names_in_any_script_are_fine():
    for name in ("weight", "модель.вес", "层.0.weight", "a b", "x:0", "_orig_mod.w", "..."):
        check_name(name)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 7),
    st.sampled_from([2**31, 2**48, 2**63, 2**64, 10**400, -(2**63), 1e308, float("nan"), float("inf"), 1.5, 3.0]),
    st.sampled_from(
        ["", "weight", "0.weight", "float32", "int64", "complex64", "float4_e2m1fn_x2", "dense", "a/b", "\x00"]
    ),
    st.sampled_from(
        [[], {}, [[]], [2, 3], [2**40, 2**40], [0, 2**62, 2**62], [1] * 100, {"a": 1}, [None], ["0.weight"]]
    ),
)


def places(node, path=()):
    """Every position in nested lists and dictionaries."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def damaged(draw):
    data = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(data))))
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "delete", "double", "swap"]))
        if how == "delete":
            del parent[path[-1]]
        elif how == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif how == "swap" and isinstance(parent, list):
            parent.reverse()
        else:
            parent[path[-1]] = copy.deepcopy(draw(ODD))
        if not data:
            break
    return data


def tied() -> dict:
    state_dict = {"words": torch.zeros(5, 3), "steps": torch.tensor(3), "z": torch.zeros(2, dtype=torch.complex64)}
    return state_dict | {"head": state_dict["words"], "empty": torch.zeros(0, 4)}


VALID = [
    SaneWeightTokenizer(10, packing).layout(source).to_dict()
    for packing in ("dense", "flat", "paper")
    for source in (small_cnn_with_norm(), tied())
]


@settings(max_examples=600, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
@given(damaged())
def test_damaged_json_is_refused_or_gives_a_layout_that_comes_back(data):
    try:
        layout = CheckpointLayout.from_json(json.dumps(data))
    except ValueError:
        return
    assert CheckpointLayout.from_json(layout.to_json()) == layout
    assert 0 <= layout.num_parameters <= layout.num_tokens * layout.token_size < 2**49


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 100_000, "9" * 10_000, "", "NaN", "[]", "null", '"text"', "{"]
)
def test_text_that_is_no_layout_is_refused(text):
    with pytest.raises(ValueError, match="this is no layout"):
        CheckpointLayout.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["layers"][0]["tensors"][0].__setitem__(1, [2**62, 2, 3, 3]), "0.weight has shape.*more than any"),
        (
            lambda d: d["layers"][0]["tensors"][0].__setitem__(1, [0, 2**40, 2**40]),
            "0.weight has shape.*more than any",
        ),
        (lambda d: d["layers"][0]["tensors"][0].__setitem__(1, [1] * 65), "0.weight has 65 axes"),
        (lambda d: d["layers"][0]["tensors"][0].__setitem__(1, [5, [2], 3, 3]), "0.weight has shape"),
        (lambda d: d["layers"][0]["tensors"][0].__setitem__(1, [5, float("nan"), 3, 3]), "0.weight has shape"),
        (lambda d: d["layers"][0]["tensors"][0].__setitem__(1, [5, float("inf"), 3, 3]), "0.weight has shape"),
        (lambda d: d["layers"][0]["tensors"][0].__setitem__(0, "a/b"), "tensor name 'a/b'"),
        (lambda d: d["layers"][0].update(name=7), "layer 7"),
        (lambda d: d["layers"][0].update(kind=None), "kind None"),
        (lambda d: d.update(token_size=2**60), "too many"),
        (lambda d: d.update(order=[1, 2]), "order does not name"),
    ],
)
def test_impossible_numbers_are_refused_with_the_name_of_the_tensor(change, message):
    data = copy.deepcopy(VALID[0])
    change(data)
    with pytest.raises(ValueError, match=message):
        CheckpointLayout.from_json(json.dumps(data))
