import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from hub_scripts.evaluation.functional import (
    accuracy,
    agreement,
    batched_logits,
    behavioural_loss,
    build_module,
    condition_norms,
    cross_entropy,
    disagreement,
    evaluate,
    train_networks,
    with_image_norms,
)
from hub_scripts.zoos.architectures import SmallCNN

IMAGES, CLASSES = 7, 4


class NormNet(nn.Module):
    """Convolution, batch norm and dropout on images (2, 5, 5)."""

    def __init__(self):
        super().__init__()
        # a bias before batch norm has no gradient but rounding, which Adam would blow up to full steps
        self.conv = nn.Conv2d(2, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, images):
        return self.head(self.drop(self.norm(self.conv(images)).relu().mean((2, 3))))


class TiedNet(nn.Module):
    """Two layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def make_plain_function(size: int) -> nn.Module:
    return nn.Linear(size, size)


def random_networks(module: nn.Module, networks: int) -> dict[str, torch.Tensor]:
    """Stacked state dicts, all different; running variances stay positive."""
    generator = torch.Generator().manual_seed(networks)
    stacked = {}
    for name, tensor in module.state_dict().items():
        copies = tensor.expand(networks, *tensor.shape).clone()
        if tensor.is_floating_point():
            copies += torch.rand(copies.shape, generator=generator) - 0.5
        stacked[name] = copies
    return stacked


@pytest.fixture(autouse=True)
def same_initialisation_in_any_order():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randn(IMAGES, 2, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.arange(IMAGES) % CLASSES


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_batched_logits_equal_a_loop_over_networks(images, chunk_size):
    module = NormNet()  # in training mode, which must not matter
    tensors = random_networks(module, 3)
    batched = batched_logits(module, tensors, images, chunk_size)
    alone = copy.deepcopy(module).eval()
    loop = [functional_call(alone, {name: stack[i] for name, stack in tensors.items()}, images) for i in range(3)]
    assert batched.shape == (3, IMAGES, CLASSES)
    torch.testing.assert_close(batched, torch.stack(loop), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(batched[0], batched[1], atol=1e-3)
    assert module.training
    assert module.norm.training


def test_missing_buffers_are_taken_from_the_module(images):
    module = NormNet()
    tensors = random_networks(module, 2)
    without = {name: tensor for name, tensor in tensors.items() if name != "norm.num_batches_tracked"}
    torch.testing.assert_close(
        batched_logits(module, without, images), batched_logits(module, tensors, images), rtol=0, atol=0
    )


def test_tied_parameters_may_come_under_one_name_or_both():
    module, x = TiedNet(), torch.randn(3, 5)
    tensors = random_networks(module, 2)
    once = {name: tensor for name, tensor in tensors.items() if name != "second.weight"}
    other = {name: tensor for name, tensor in tensors.items() if name != "first.weight"}
    other["second.weight"] = tensors["first.weight"]
    expected = batched_logits(module, once, x)
    torch.testing.assert_close(batched_logits(module, other, x), expected)
    torch.testing.assert_close(batched_logits(module, once | {"second.weight": tensors["first.weight"]}, x), expected)


def test_a_gradient_flows_into_the_weights_of_each_network_alone(images):
    module = NormNet()
    tensors = random_networks(module, 2)
    weight = tensors["conv.weight"].requires_grad_()
    batched_logits(module, tensors, images)[1].sum().backward()
    assert (weight.grad[0] == 0).all()
    assert (weight.grad[1] != 0).any()


def test_tensors_that_do_not_fit_are_named(images):
    module = NormNet()
    tensors = random_networks(module, 2)
    with pytest.raises(ValueError, match=r"head\.bias of NormNet is missing"):
        batched_logits(module, {name: t for name, t in tensors.items() if name != "head.bias"}, images)
    with pytest.raises(ValueError, match=r"fc\.bias is not a tensor of NormNet"):
        batched_logits(module, tensors | {"fc.bias": torch.zeros(2, 4)}, images)
    with pytest.raises(ValueError, match=r"head\.bias has shape \(2, 9\), NormNet expects \(networks, 4\)"):
        batched_logits(module, tensors | {"head.bias": torch.zeros(2, 9)}, images)


def test_figures_equal_those_by_hand():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [0.0, 3.0]], [[0.0, 1.0], [0.0, 1.0], [float("nan"), 0.0]]])
    labels = torch.tensor([0, 1, 1])
    # a tie goes to class 0; NaN is never right
    torch.testing.assert_close(accuracy(logits, labels), torch.tensor([2 / 3, 1 / 3]))
    assert accuracy(logits, torch.tensor([1, 1, 0]))[1] == pytest.approx(2 / 3)
    by_hand = (math.log1p(math.exp(-2)) + math.log(2) + math.log1p(math.exp(-3))) / 3
    assert cross_entropy(logits, labels)[0].item() == pytest.approx(by_hand)
    torch.testing.assert_close(agreement(logits, logits), torch.tensor([1.0, 2 / 3]))
    torch.testing.assert_close(agreement(logits[:1], logits[1:]), torch.tensor([0.0]))


def test_disagreement_is_the_mean_over_pairs():
    logits = torch.randn(4, 30, 3, generator=torch.Generator().manual_seed(0))
    pairs = [agreement(logits[i : i + 1], logits[j : j + 1]).item() for i in range(4) for j in range(i)]
    assert disagreement(logits) == pytest.approx(1 - sum(pairs) / 6)
    assert disagreement(logits[:1].expand(5, -1, -1)) == 0
    logits[1, 7] = torch.nan  # agrees with none of the others
    pairs = [agreement(logits[i : i + 1], logits[j : j + 1]).item() for i in range(4) for j in range(i)]
    assert disagreement(logits) == pytest.approx(1 - sum(pairs) / 6)
    assert math.isnan(disagreement(logits[:1]))


def test_behavioural_loss_is_the_divergence_from_the_original():
    original = torch.tensor([[[math.log(3.0), 0.0]]])  # probabilities 3/4, 1/4
    decoded = torch.zeros(1, 1, 2, requires_grad=True)  # 1/2, 1/2
    loss = behavioural_loss(decoded, original)
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    loss.backward()
    torch.testing.assert_close(decoded.grad[0, 0], torch.tensor([0.5 - 0.75, 0.5 - 0.25]))
    softer = behavioural_loss(torch.zeros(1, 1, 2), 2 * original, temperature=2.0)
    assert softer.item() == pytest.approx(4 * loss.item())
    assert behavioural_loss(original + 5, original, temperature=2.0).item() == pytest.approx(0, abs=1e-6)


def test_evaluate_gives_the_same_figures_in_parts(images, labels):
    module = NormNet()
    tensors = random_networks(module, 3)
    logits = batched_logits(module, tensors, images)
    parts = evaluate(module, tensors, images, labels, chunk_size=2, batch_size=3)
    np.testing.assert_allclose(parts.accuracy, accuracy(logits, labels), rtol=1e-6)
    np.testing.assert_allclose(parts.loss, cross_entropy(logits, labels), rtol=1e-5)


def finetune(module, tensors, images, labels, **kwargs):
    """Curves on 300 other images with labels by chance: their figures tell networks apart that differ a little."""
    settings = {"learning_rate": 0.05, "epochs": 3, "batch_size": 3, "weight_decay": 0.1} | kwargs
    generator = torch.Generator().manual_seed(5)
    stages = train_networks(module, tensors, images, labels, generator=generator, **settings)
    return np.stack([evaluate(module, stacked, **evaluation_set(images)).accuracy for stacked in stages])


def evaluation_set(images):
    generator = torch.Generator().manual_seed(3)
    return {
        "images": torch.randn(300, *images.shape[1:], generator=generator),
        "labels": torch.randint(0, CLASSES, (300,), generator=generator),
    }


@pytest.mark.parametrize("settings", [(0.05, 0.1), ([0.01, 0.05, 0.05], [0.1, 0.1, 0.0])])
def test_networks_trained_at_once_learn_as_each_alone(images, labels, settings):
    module = NormNet()
    module.drop.p = 0.0  # its draws depend on how many networks there are
    tensors = random_networks(module, 3)
    before = {name: tensor.clone() for name, tensor in tensors.items()}

    def train(stack, learning_rate, weight_decay):
        kwargs = {"epochs": 2, "batch_size": 3, "generator": torch.Generator().manual_seed(5)}
        return list(
            train_networks(
                module, stack, images, labels, learning_rate=learning_rate, weight_decay=weight_decay, **kwargs
            )
        )[-1]

    together = train(tensors, *settings)
    for i, own in enumerate(zip(*np.broadcast_arrays(*settings, [0] * 3), strict=True)):
        alone = train({name: stack[i : i + 1] for name, stack in tensors.items()}, float(own[0]), float(own[1]))
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name][i], tensor[0], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert (together["head.weight"] - before["head.weight"]).abs().max() > 0.05


def test_training_equals_a_plain_loop(labels):
    module = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES))
    x = torch.randn(IMAGES, 6, generator=torch.Generator().manual_seed(1))
    tensors = {name: t[None] for name, t in module.state_dict().items()}
    settings = {"learning_rate": 0.05, "weight_decay": 2.0, "epochs": 3, "batch_size": 4}
    stages = train_networks(module, tensors, x, labels, generator=torch.Generator().manual_seed(5), **settings)
    stages = [{name: t[0].clone() for name, t in stage.items()} for stage in stages]

    reference = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.05, weight_decay=2.0)
    generator = torch.Generator().manual_seed(5)
    expected = []
    for epoch in range(4):
        for batch in torch.randperm(IMAGES, generator=generator).split(4) if epoch else ():
            optimizer.zero_grad()
            nn.functional.cross_entropy(reference(x[batch]), labels[batch]).backward()
            optimizer.step()
        expected.append({name: t.clone() for name, t in reference.state_dict().items()})
    assert len(stages) == 4
    for stage, plain in zip(stages, expected, strict=True):
        torch.testing.assert_close(stage, plain, rtol=1e-3, atol=1e-4)
    assert module[1].num_batches_tracked == 0  # the module that lends its code is left as it was


def test_finetuning_follows_the_accuracy_from_before_training(images, labels):
    module = NormNet()
    tensors = random_networks(module, 2)
    curve = finetune(module, tensors, images, labels)
    others = evaluation_set(images)
    before = evaluate(module, tensors, **others).accuracy
    assert curve.shape == (4, 2)
    np.testing.assert_array_equal(curve[0], before)
    assert (curve[1:] != before).any(0).all()


def test_a_norm_without_momentum_is_refused_for_training(images, labels):
    module = NormNet()
    module.norm.momentum = None
    with pytest.raises(ValueError, match="momentum=None"):
        finetune(module, random_networks(module, 2), images, labels)


def test_conditioning_gives_norms_the_statistics_of_the_images(images):
    module = NormNet()
    tensors = random_networks(module, 2)
    conditioned = condition_norms(module, tensors, images[:6], batches=2)
    for i in range(2):
        maps = nn.functional.conv2d(images[:6], tensors["conv.weight"][i])
        halves = [half.transpose(0, 1).flatten(1) for half in maps.split(3)]  # (channels, values)
        mean = torch.stack([half.mean(1) for half in halves]).mean(0)
        variance = torch.stack([half.var(1) for half in halves]).mean(0)
        torch.testing.assert_close(conditioned["norm.running_mean"][i], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(conditioned["norm.running_var"][i], variance, rtol=1e-4, atol=1e-5)
    assert set(conditioned) == set(tensors)
    torch.testing.assert_close(conditioned["conv.weight"], tensors["conv.weight"], rtol=0, atol=0)
    assert module.norm.momentum == 0.1
    assert (module.norm.running_mean == 0).all()


def test_conditioning_leaves_networks_without_statistics_alone():
    module = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    tensors = random_networks(module, 2)
    conditioned = condition_norms(module, tensors, torch.randn(4, 5))
    assert all(conditioned[name] is tensors[name] for name in tensors)


def test_an_architecture_is_built_from_its_name():
    module = build_module(
        "hub_scripts.zoos.architectures:SmallCNN", {"channels": [2, 3], "hidden_size": 5, "num_classes": 4}
    )
    assert module(torch.zeros(1, 1, 8, 8)).shape == (1, 4)
    assert isinstance(build_module(f"{__name__}:TiedNet"), TiedNet)


def test_a_class_of_transformers_is_built_through_its_configuration(images):
    kwargs = {
        "num_channels": 2,
        "embedding_size": 4,
        "hidden_sizes": [4],
        "depths": [1],
        "num_labels": 3,
        "layer_type": "basic",
    }
    module = build_module("transformers:ResNetForImageClassification", kwargs)
    tensors = random_networks(module, 2)
    assert batched_logits(module, tensors, images.repeat(1, 1, 4, 4)).shape == (2, IMAGES, 3)


@pytest.mark.parametrize(
    ("architecture", "kwargs", "message"),
    [
        ("os:system", {"command": "true"}, "part of Python's library"),
        ("transformers:pipeline", {"task": "fill-mask"}, "not a subclass of nn.Module"),
        ("hub_scripts.zoos.architectures:ACTIVATIONS", {}, "not a subclass of nn.Module"),
        (f"{__name__}:make_plain_function", {"size": 2}, "not a subclass of nn.Module"),
        ("transformers:DPTForDepthEstimation", {"backbone_kwargs": {"trust_remote_code": True}}, "remote code"),
        ("SmallCNN", {}, "expected 'package.module:Name'"),
        ("torch.nn:Sequential.forward", {}, "expected 'package.module:Name'"),
        ("no_such_package_here:Net", {}, "cannot be imported"),
        ("torch.nn:NoSuchLayer", {}, "has no NoSuchLayer"),
        ("torch.nn:Linear", {"size": 2}, "does not accept"),
        ("hub_scripts.zoos.architectures:ModelZooCNN", {"channels": [3]}, "does not accept .*zip"),
    ],
)
def test_names_that_are_no_architecture_are_refused(architecture, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_module(architecture, kwargs)


def test_trust_calls_a_function_that_returns_a_module():
    assert build_module(f"{__name__}:make_plain_function", {"size": 2}, trust=True).out_features == 2
    with pytest.raises(ValueError, match=r"returned a \w+Path, expected an nn\.Module"):
        build_module("pathlib:Path", {}, trust=True)


def test_norms_of_the_images_do_not_depend_on_running_statistics():
    module = SmallCNN(batch_norm=True).eval()
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tensors = {name: t[None].clone() for name, t in module.state_dict().items()}
    tensors["norm1.running_var"] = torch.zeros(1, 8)  # would divide by nearly zero
    tensors["conv1.weight"].requires_grad_()
    logits = batched_logits(with_image_norms(module), tensors, images)
    logits.square().sum().backward()
    assert tensors["conv1.weight"].grad.isfinite().all()
    conditioned = condition_norms(module, {name: t.detach() for name, t in tensors.items()}, images, batches=1)
    # running variances are those of a sample, norms divide by those of the population
    torch.testing.assert_close(logits, batched_logits(module, conditioned, images), rtol=0.05, atol=0.05)
