"""Networks of new architectures out of networks of old ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hub_scripts.evaluation.functional import condition_norms
from hub_scripts.generation.growth import LayerOrigin, grow_networks
from hub_scripts.generation.target_codec import CONSTANT_STD, codec_for
from hub_scripts.zoos.architectures import MLP, ModelZooCNN, SmallCNN, SmallResNet
from modeling_sane import SaneConfig, SaneModel
from tokenization_sane import SaneWeightTokenizer, find_symmetries

NETWORKS = 2
GREY, LARGE, COLOUR = (1, 8, 8), (1, 20, 20), (3, 32, 32)


def networks(module, seed=0):
    """Stacked random networks, with norms that are no identity."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(NETWORKS, *tensor.shape, generator=generator)
            is_scale = tensor.dim() == 1 and tensor.min() == 1  # scales and variances of norms
            tensors[name] = 1 + noise.clamp(-2, 2) / 4 if is_scale else tensor + 0.2 * noise
    return tensors


def symmetries(module, shape):
    return find_symmetries(module, torch.randn(2, *shape), kinds=("permutation",))


def pictures(shape, count=16):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(7))


def grow(old, new, shape=GREY, new_shape=None, **settings):
    """Grown networks, their report, and the networks they come from."""
    torch.manual_seed(3)
    specs = (symmetries(old, shape), symmetries(new, new_shape or shape))
    tensors = networks(old)
    grown, report = grow_networks(tensors, old, specs[0], new, specs[1], pictures(shape), **settings)
    return grown, report, tensors


def outputs(module, tensors, images):
    """Logits `(networks, images, classes)`, one network at a time."""
    module.eval()
    made = [functional_call(module, {k: t[i] for k, t in tensors.items()}, (images,)) for i in range(NETWORKS)]
    return torch.stack([out if isinstance(out, torch.Tensor) else out.logits for out in made])


def change(old, tensors, new, grown, images):
    before, after = outputs(old, tensors, images), outputs(new, grown, images)
    return float((after - before).norm() / before.norm())


def check_fits(module, grown):
    expected = {n: t.shape for n, t in module.state_dict().items() if t.is_floating_point()}
    assert {name: tensor.shape[1:] for name, tensor in grown.items()} == expected
    assert all(tensor.isfinite().all() and len(tensor) == NETWORKS for tensor in grown.values())


# --- the function stays

RELU = {"activation": "relu"}
NORMS = {**RELU, "batch_norm": True}
PRESERVED = {
    "wider": (SmallCNN, {}, {"channels": (11, 17), "hidden_size": 23}),
    "wider with norms": (SmallCNN, {"batch_norm": True}, {"batch_norm": True, "channels": (9, 25), "hidden_size": 20}),
    "wider published": (ModelZooCNN, {}, {"channels": (9, 11, 7), "hidden_size": 31}),
    "wider mlp": (MLP, {}, {"hidden_sizes": (31, 37)}),
    "larger kernel": (SmallCNN, {}, {"kernel_size": 5}),
    "norms added": (SmallCNN, {}, {"batch_norm": True}),
    "deeper": (SmallCNN, RELU, {**RELU, "channels": (8, 12, 12, 12)}),
    "deeper after a pooling": (SmallCNN, {**RELU, "channels": (6, 6)}, {**RELU, "channels": (6, 6, 6, 6)}),
    "norms stay with theirs": (SmallCNN, {**NORMS, "channels": (6, 6)}, {**NORMS, "channels": (6, 6, 6, 6)}),
    "deeper with norms": (MLP, {"batch_norm": True}, {"batch_norm": True, "hidden_sizes": (24, 24, 16)}),
    "deeper beside its like": (SmallCNN, {**NORMS, "channels": (6, 9, 9)}, {**NORMS, "channels": (6, 9, 9, 9)}),
    "deeper and wider": (MLP, {}, {"hidden_sizes": (29, 26, 26, 19)}),
    "everything": (SmallCNN, RELU, {**RELU, "channels": (9, 14, 15), "kernel_size": 5, "batch_norm": True}),
    "residual wider": (SmallResNet, {}, {"channels": (11, 13)}),
    "residual deeper": (SmallResNet, {}, {"depths": (3, 2)}),
    "one block to three": (SmallResNet, {"channels": (5,)}, {"channels": (7,), "depths": (3,)}),
}  # fmt: skip


@pytest.mark.parametrize("case", PRESERVED)
def test_the_function_stays(case):
    kind, old_kwargs, new_kwargs = PRESERVED[case]
    size = {"image_size": 20} if kind is ModelZooCNN else {}
    shape = LARGE if size else GREY
    old, new = kind(**size, **old_kwargs), kind(**size, **new_kwargs)
    grown, report, tensors = grow(old, new, shape)

    assert sum(t.numel() for t in new.parameters()) > sum(t.numel() for t in old.parameters())
    check_fits(new, grown)
    assert change(old, tensors, new, grown, pictures(shape)) < 1e-4
    assert report.is_function_preserving
    assert not report.dropped


@settings(max_examples=8, deadline=None)
@given(widths=st.tuples(st.integers(3, 9), st.integers(4, 11), st.integers(5, 13)), noise=st.sampled_from((0.0, 0.5)))
def test_any_larger_widths_keep_the_function(widths, noise):
    old = SmallCNN(channels=(3, 4), hidden_size=5)
    new = SmallCNN(channels=widths[:2], hidden_size=widths[2])
    grown, report, tensors = grow(old, new, tie_noise=noise, generator=torch.Generator().manual_seed(1))
    assert change(old, tensors, new, grown, pictures(GREY)) < 1e-4
    assert report.is_function_preserving


def resnet(depths, widths):
    config = ResNetConfig(
        num_channels=3, embedding_size=widths[0], hidden_sizes=widths, depths=depths, layer_type="basic", num_labels=5
    )
    return ResNetForImageClassification(config)


def test_a_resnet_34_grows_out_of_resnet_18s():
    old, new = resnet([2, 2, 2, 2], [4, 6, 8, 10]), resnet([3, 4, 6, 3], [4, 7, 8, 13])
    grown, report, tensors = grow(old, new, COLOUR)
    check_fits(new, grown)
    assert change(old, tensors, new, grown, pictures(COLOUR)) < 1e-4
    assert report.is_function_preserving
    assert sum(origin.how == ("inserted with output zero",) for origin in report.layers) == 8  # one for each new block
    assert not any("identity inserted" in origin.how for origin in report.layers)


def test_new_blocks_of_a_vision_transformer_add_nothing():
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 5, "attn_implementation": "eager"}
    old, new = (
        ViTForImageClassification(
            ViTConfig(hidden_size=6, intermediate_size=mlp, num_hidden_layers=depth, num_attention_heads=2, **sizes)
        )
        for depth, mlp in ((1, 7), (2, 10))
    )
    grown, report, tensors = grow(old, new)
    check_fits(new, grown)
    assert change(old, tensors, new, grown, pictures(GREY)) < 1e-4
    assert sum(origin.how == ("inserted with output zero",) for origin in report.layers) == 2  # attention and MLP


class GroupedNet(nn.Sequential):
    """A convolution in groups, or one that keeps channels apart."""

    def __init__(self, width, groups):
        super().__init__(
            nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3, groups=groups), nn.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 5),
        )  # fmt: skip


@pytest.mark.parametrize(("old", "new"), [((6, 2), (10, 2)), ((6, 6), (11, 11))])
def test_grouped_and_depthwise_convolutions_widen(old, new):
    old, new = GroupedNet(*old), GroupedNet(*new)
    grown, _, tensors = grow(old, new, tie_noise=0.5)
    assert change(old, tensors, new, grown, pictures(GREY)) < 1e-4


# --- values, by hand


def test_copies_share_what_reads_them():
    old, new = MLP(image_size=2, hidden_sizes=(2,), num_classes=3), MLP(image_size=2, hidden_sizes=(5,), num_classes=3)
    grown, report, tensors = grow(old, new, (1, 2, 2))
    units, shares = [0, 1, 0, 1, 0], torch.tensor([3, 2, 3, 2, 3])
    assert torch.equal(grown["fc1.weight"], tensors["fc1.weight"][:, units])
    assert torch.equal(grown["fc1.bias"], tensors["fc1.bias"][:, units])
    torch.testing.assert_close(grown["head.weight"], tensors["head.weight"][:, :, units] / shares)
    assert report.layers == (LayerOrigin("fc1", "fc1", ("widened",)), LayerOrigin("head", "head", ("widened",)))


def test_tie_noise_tells_copies_apart_and_cancels():
    old, new = MLP(image_size=2, hidden_sizes=(3,)), MLP(image_size=2, hidden_sizes=(5,))
    grown, report, tensors = grow(old, new, (1, 2, 2), tie_noise=0.5)
    columns = grown["head.weight"]
    assert not torch.allclose(columns[:, :, 0], columns[:, :, 3])
    torch.testing.assert_close(columns[:, :, [0, 1]] + columns[:, :, [3, 4]], tensors["head.weight"][:, :, [0, 1]])
    assert torch.equal(columns[:, :, 2], tensors["head.weight"][:, :, 2])  # has no copy
    assert report.is_function_preserving


def test_a_larger_kernel_has_zeros_around_and_a_smaller_one_is_the_middle():
    small, large = SmallCNN(channels=(2, 3)), SmallCNN(channels=(2, 3), kernel_size=7)
    grown, report, tensors = grow(small, large)
    assert torch.equal(grown["conv2.weight"], nn.functional.pad(tensors["conv2.weight"], (2, 2, 2, 2)))
    assert report.layers[1] == LayerOrigin("conv2", "conv2", ("kernel resized",))

    cut, report, tensors = grow(large, small)
    assert torch.equal(cut["conv2.weight"], tensors["conv2.weight"][..., 2:5, 2:5])
    assert not report.is_function_preserving


def test_a_new_layer_hands_on_what_it_reads():
    grown, report, _ = grow(SmallCNN(channels=(2, 3), **RELU), SmallCNN(channels=(2, 3, 3), **RELU))
    expected = torch.zeros(3, 3, 3, 3)
    expected[[0, 1, 2], [0, 1, 2], 1, 1] = 1
    assert torch.equal(grown["conv3.weight"], expected.expand(NETWORKS, 3, 3, 3, 3))
    assert not grown["conv3.bias"].any()
    assert report.layers[2] == LayerOrigin("conv3", None, ("identity inserted",))


def test_a_new_residual_block_is_a_copy_with_a_last_norm_of_zero():
    grown, report, tensors = grow(SmallResNet(channels=(4,)), SmallResNet(channels=(4,), depths=(2,)))
    assert torch.equal(grown["blocks.1.conv2.weight"], tensors["blocks.0.conv2.weight"])
    assert not grown["blocks.1.norm2.weight"].any()
    assert not grown["blocks.1.norm2.bias"].any()
    origins = {origin.layer: origin for origin in report.layers}
    assert origins["blocks.1.conv2"] == LayerOrigin("blocks.1.conv2", "blocks.0.conv2", ("inserted as a copy",))
    assert origins["blocks.1.norm2"].how == ("inserted with output zero",)


def test_blocks_come_from_blocks_of_the_same_relative_depth():
    _, report, _ = grow(SmallResNet(channels=(4,), depths=(3,)), SmallResNet(channels=(4,), depths=(5,)))
    sources = {origin.layer: origin.source for origin in report.layers if origin.how == ("copied",)}
    assert [sources.get(f"blocks.{block}.conv1") for block in range(5)] == [
        "blocks.0.conv1", None, "blocks.1.conv1", None, "blocks.2.conv1",
    ]  # fmt: skip


def test_a_new_norm_undoes_the_statistics_of_the_images():
    old, new = SmallCNN(channels=(2, 3), **RELU), SmallCNN(channels=(2, 3, 3), batch_norm=True, **RELU)
    grown, _, tensors = grow(old, new)
    images = pictures(GREY)
    read = nn.functional.conv2d(images, tensors["conv1.weight"][0], tensors["conv1.bias"][0], padding=1)
    torch.testing.assert_close(grown["norm1.running_mean"][0], read.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grown["norm1.bias"], grown["norm1.running_mean"])
    # were they not those of the images, statistics measured anew would change the function
    conditioned = condition_norms(new.eval(), grown, images)
    assert change(old, tensors, new, conditioned, images) < 0.05


# --- the function does not stay


def test_narrower_networks_keep_the_units_with_the_largest_weights():
    old, new = MLP(hidden_sizes=(5, 4)), MLP(hidden_sizes=(3, 4))
    specs, tensors = [symmetries(module, GREY) for module in (old, new)], networks(old)
    tensors["fc1.weight"][:, [1, 3]] *= 0.01
    tensors["fc2.weight"][:, :, [1, 3]] *= 0.01
    grown, report = grow_networks(tensors, old, specs[0], new, specs[1], pictures(GREY))
    assert torch.equal(grown["fc1.weight"], tensors["fc1.weight"][:, [0, 2, 4]])
    assert torch.equal(grown["fc2.weight"], tensors["fc2.weight"][:, :, [0, 2, 4]])
    assert report.layers[0].how == ("narrowed",)


CHANGED = {
    "narrower": (SmallCNN, {"batch_norm": True}, {"batch_norm": True, "channels": (5, 7), "hidden_size": 11}),
    "deeper tanh": (SmallCNN, {}, {"channels": (8, 12, 12)}),
    "narrower and wider": (SmallCNN, {}, {"channels": (5, 19), "hidden_size": 9}),
    "another stage": (SmallResNet, {}, {"channels": (8, 12, 16)}),
    "fewer blocks": (SmallResNet, {"depths": (3, 2)}, {}),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_cannot_stay_is_measured(case):
    kind, old_kwargs, new_kwargs = CHANGED[case]
    old, new = kind(**old_kwargs), kind(**new_kwargs)
    grown, report, tensors = grow(old, new)
    check_fits(new, grown)
    assert outputs(new, grown, pictures(GREY)).isfinite().all()
    expected = change(old, tensors, new, grown, pictures(GREY))
    assert expected > 1e-3
    assert report.max_change == pytest.approx(expected, rel=0.7)  # of the network that changed most
    assert not report.is_function_preserving
    assert bool(report.dropped) == (case == "fewer blocks")


def test_a_deeper_tanh_network_stays_near():
    grown = grow(MLP(activation="tanh"), MLP(activation="tanh", hidden_sizes=(24, 24, 16)))
    assert 1e-3 < grown[1].max_change < 0.5


# --- there is no mapping


@pytest.mark.parametrize(
    ("old", "new", "shapes", "message"),
    [
        (SmallCNN, MLP, (GREY, GREY), "SmallCNN cannot be mapped to the new MLP: fc1 of the new one has no source"),
        (MLP, SmallCNN, (GREY, GREY), r"conv1 of the new one has no source \(the old one has no conv layer\)"),
        (SmallCNN, lambda: SmallCNN(image_size=16), (GREY, (1, 16, 16)), r"fc1 of the new one.*16 and 4 values for each"),
        (SmallCNN, lambda: SmallCNN(image_channels=3), (GREY, (3, 8, 8)), "conv1 of the new one has no source"),
        (SmallCNN, lambda: SmallCNN(num_classes=7), (GREY, GREY), "fc2 of the new one has no source .*length 7.* 10"),
        (MLP, lambda: MLP(hidden_sizes=(24,)), (GREY, GREY), "fc2 of the old one has no place"),
        (lambda: MLP(hidden_sizes=(9,)), lambda: SmallResNet(channels=(9,)), (GREY, GREY), "stem.0 of the new one"),
    ],
)  # fmt: skip
def test_a_layer_without_a_source_is_named(old, new, shapes, message):
    with pytest.raises(ValueError, match=message):
        grow(old(), new(), *shapes)


def test_tensors_that_are_missing_are_named():
    module = MLP(hidden_sizes=(4,))
    tensors, spec = networks(module), symmetries(module, GREY)
    del tensors["head.bias"]
    with pytest.raises(ValueError, match=r"head.bias is missing, MLP expects \(networks, 10\)"):
        grow_networks(tensors, module, spec, module, spec, pictures(GREY))


def test_images_of_another_size_are_refused():
    module = SmallCNN(channels=(2, 3))
    spec = symmetries(module, GREY)
    with pytest.raises(ValueError, match="SmallCNN does not run on images of shape"):
        grow_networks(networks(module), module, spec, module, spec, pictures(LARGE))


# --- tokens of the new layout


def test_a_model_encodes_and_decodes_networks_of_a_layout_it_has_not_seen():
    old, new = SmallResNet(channels=(4,)), SmallResNet(channels=(6,), depths=(2,))
    tokenizer = SaneWeightTokenizer(token_size=16, normalization="zoo")
    tokenizer.fit([{name: tensor[i] for name, tensor in networks(old).items()} for i in range(NETWORKS)])
    known = dict(tokenizer.zoo)
    grown, _, _ = grow(old, new)
    config = SaneConfig(
        token_size=16, latent_size=5, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, window_size=8
    )
    codec = codec_for(SaneModel(config).eval(), tokenizer, tokenizer.layout(new), grown)

    assert tokenizer.zoo == known
    assert codec.tokenizer.zoo.keys() > known.keys()
    assert codec.layout.num_tokens > tokenizer.layout(old).num_tokens
    tokens = codec.tokens(grown)
    latents = codec.encode(tokens)
    assert latents.shape == (NETWORKS, codec.layout.num_tokens, 5)
    assert codec.decode(latents).shape == tokens.shape
    torch.testing.assert_close(codec.tensors(tokens), dict(grown), rtol=1e-4, atol=1e-5)
    weights = codec.layout.unpack(tokens)["blocks.0.conv1.weight"]
    assert float(weights.mean()) == pytest.approx(0, abs=1e-3)
    assert float(weights.std(correction=0)) == pytest.approx(1, abs=1e-3)
    # the model meets no position that it cannot know
    old_layout = tokenizer.layout(old)
    largest = codec.layout.position_ids.amax(0)
    assert (largest[:2] <= old_layout.position_ids.amax(0)[:2]).all()
    assert (codec.layout.position_ids.diff(dim=0)[:, :2] >= 0).all()
    # what it writes does not wake a new block
    decoded = codec.tensors(codec.decode(latents))
    assert decoded["blocks.1.norm2.weight"].abs().max() < 100 * CONSTANT_STD


def test_a_layout_that_the_tokenizer_knows_keeps_its_statistics():
    module = MLP(hidden_sizes=(4,))
    tensors = networks(module)
    tokenizer = SaneWeightTokenizer(token_size=16, normalization="zoo").fit([{n: t[0] for n, t in tensors.items()}])
    config = SaneConfig(token_size=16, latent_size=5, hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    codec = codec_for(SaneModel(config).eval(), tokenizer, tokenizer.layout(module), networks(module, seed=9))
    assert codec.tokenizer is tokenizer
