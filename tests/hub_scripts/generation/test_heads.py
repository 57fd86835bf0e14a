"""New classifiers for networks that know other classes, and images of other sizes."""

import json

import pytest
import torch

from hub_scripts.evaluation.functional import batched_logits, build_module, evaluate
from hub_scripts.generation.heads import adapt_task, find_head, replace_head, require_classes
from hub_scripts.zoos.tasks import load_task
from hub_scripts.zoos.zoo import Zoo

CNN, RESNET = "hub_scripts.zoos.architectures:SmallCNN", "transformers:ResNetForImageClassification"
TINY_RESNET = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}


@pytest.fixture(scope="module")
def zoo(tiny_zoo) -> Zoo:
    return Zoo(tiny_zoo)


@pytest.fixture(scope="module")
def kwargs(zoo) -> dict:
    return json.loads(zoo.rows("train")[0]["architecture_kwargs"])


def test_the_classifier_is_found_by_what_it_computes(zoo):
    assert find_head(zoo.module, zoo.task.images["test"][:2])[0] == "fc2"
    with pytest.raises(ValueError, match="does not end in a linear layer"):
        find_head(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4), torch.nn.ReLU()), torch.randn(2, 1, 8, 8)
        )


def test_a_ridge_on_few_samples_makes_a_working_classifier(zoo, kwargs):
    task = load_task("digits[7,2,5]")
    tensors = {name: tensor[-3:] for name, tensor in zoo.stacked("train").items()}
    found = {}
    for how in ("init", "ridge"):
        module, changed, adapted = replace_head(CNN, kwargs, tensors, task, how, shots=5)
        assert changed["num_classes"] == 3
        assert torch.equal(adapted["conv1.weight"], tensors["conv1.weight"])
        found[how] = evaluate(module, adapted, task.images["test"], task.labels["test"])
    assert found["ridge"].accuracy.min() > 0.7 > 0.6 > found["init"].accuracy.mean()
    assert found["ridge"].loss.mean() < found["init"].loss.mean()  # its logits are scaled, not only ordered


def test_classifiers_of_transformers_models_are_found_and_replaced():
    task = load_task("digits[7,2,5]")
    source = build_module(RESNET, TINY_RESNET | {"num_labels": 10}).eval()
    tensors = {
        name: tensor[None].float() for name, tensor in source.state_dict().items() if tensor.is_floating_point()
    }
    module, changed, adapted = replace_head(RESNET, TINY_RESNET | {"num_labels": 10}, tensors, task, "ridge")
    assert changed["num_labels"] == 3
    assert adapted["classifier.1.weight"].shape == (1, 3, 6)
    assert evaluate(module, adapted, task.images["test"], task.labels["test"]).loss[0] < 1.1


def test_networks_that_are_not_finite_keep_a_classifier_that_is(zoo, kwargs):
    tensors = {name: tensor[-2:].clone() for name, tensor in zoo.stacked("train").items()}
    tensors["conv1.weight"][0] = float("nan")
    tensors["fc1.bias"][1] = float("inf")
    _, _, adapted = replace_head(CNN, kwargs, tensors, load_task("digits[7,2,5]"), "ridge", shots=5)
    assert adapted["fc2.weight"].isfinite().all()
    assert adapted["conv1.weight"][0].isnan().all()


def test_a_ridge_does_not_mind_the_size_of_features(zoo, kwargs):
    task = load_task("digits[7,2,5]")
    tensors = {name: tensor[-1:] for name, tensor in zoo.stacked("train").items()}
    logits = []
    for factor in (1.0, 1e5):
        # this activation lets factors through: what stands before the classifier is as many times larger
        linear = kwargs | {"activation": "leaky_relu"}
        scaled = tensors | {name: tensors[name] * factor for name in ("fc1.weight", "fc1.bias")}
        module, _, adapted = replace_head(CNN, linear, scaled, task, "ridge", shots=5)
        logits.append(batched_logits(module, adapted, task.images["test"]))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_images_keep_their_size_where_only_channels_differ():
    resnet = build_module(RESNET, TINY_RESNET | {"num_channels": 3}).eval()
    assert adapt_task(resnet, load_task("digits"), resize=True).images["test"].shape[1:] == (3, 8, 8)
    vit = {"image_size": 20, "patch_size": 5, "num_channels": 1, "hidden_size": 8, "num_hidden_layers": 1,
           "num_attention_heads": 2, "intermediate_size": 8}  # fmt: skip
    module = build_module("transformers:ViTForImageClassification", vit).eval()
    with pytest.raises(ValueError, match=r"are 1x8x8 .*--resize brings them to 1x20x20"):
        adapt_task(module, load_task("digits"), resize=False)
    assert adapt_task(module, load_task("digits"), resize=True).images["train"].shape[1:] == (1, 20, 20)


def test_a_task_with_other_classes_or_images_is_refused_with_what_to_do(zoo):
    with pytest.raises(ValueError, match=r"has 3 classes, the networks answer with 10; .*--new-head ridge"):
        require_classes(zoo.module, load_task("digits[7,2,5]"), None)
    large = zoo.task.resized(1, 12, 12)
    with pytest.raises(ValueError, match=r"are 1x12x12 .*--resize"):
        adapt_task(zoo.module, large, resize=False)
    assert adapt_task(zoo.module, large, resize=True).images["test"].shape[1:] == (1, 8, 8)
    assert adapt_task(zoo.module, zoo.task, resize=True) is zoo.task


def test_colour_images_become_grey_where_networks_know_no_colours(zoo):
    colour = zoo.task.resized(3, 8, 8)
    grey = adapt_task(zoo.module, colour, resize=True).images["test"]
    torch.testing.assert_close(grey, zoo.task.images["test"])
