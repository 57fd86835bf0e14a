"""The layout: what stands where, by hand and by an independent re-implementation of the paper's tokens."""

import json

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from tokenization_sane import CheckpointLayout, SaneWeightTokenizer, TensorSpec

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


def test_paper_packing_of_resnet18_has_the_papers_shape_and_positions_beyond_16_bits():
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    with torch.device("meta"):
        network = ResNetForImageClassification(config)
    layout = SaneWeightTokenizer(288, "paper").layout(network)
    assert (layout.num_tokens, layout.token_size) == (53524, 288)
    assert layout.position_ids[:, 0].tolist() == list(range(53524))  # 16 bits would wrap at 32768
    assert layout.fill == pytest.approx(0.726, abs=1e-3)
    assert layout.repack(packing="dense").num_tokens <= 40_000
    assert layout.repack(packing="flat").fill > 0.999


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
        (lambda d: d["ties"].update(again="nowhere"), "tied to nowhere"),
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
