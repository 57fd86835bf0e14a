"""Which latent directions change a network, and gradient steps on latents through the frozen decoder."""

import pytest
import torch
from torch.func import functional_call

from hub_scripts.codec import Codec
from hub_scripts.evaluation.functional import batched_logits, cross_entropy
from hub_scripts.generation.refinement import probabilities, refine
from hub_scripts.generation.sensitivity import latent_gradients
from hub_scripts.zoos.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_zoo) -> Zoo:
    return Zoo(tiny_zoo)


@pytest.fixture(scope="module")
def codec(tiny_model, zoo) -> Codec:
    codec = Codec.from_pretrained(tiny_model, zoo.layout)
    codec.model.requires_grad_(False)
    return codec


@pytest.fixture(scope="module")
def latents(codec, zoo):
    return codec.encode(codec.tokens({name: tensor[-2:] for name, tensor in zoo.stacked("train").items()}))


def test_gradients_are_those_of_single_images_through_decoder_and_network(codec, zoo, latents):
    """Beside autograd, one image at a time; the answers are the ones that the same generator draws."""
    images = zoo.task.images["train"][:5]
    generator = torch.Generator().manual_seed(3)
    found = next(latent_gradients(codec, zoo.module, latents[:1], images, generator))
    assert found.shape == (5, *latents.shape[1:])
    values = latents[:1].clone().requires_grad_()

    def logits(image):
        tensors = {name: tensor[0] for name, tensor in codec.tensors(codec.decode(values, gradient=True)).items()}
        return functional_call(zoo.module, tensors, (image[None],))

    chances = torch.cat([logits(image) for image in images]).softmax(-1).detach()
    answers = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(3))[:, 0]
    for gradient, image, answer in zip(found, images, answers, strict=True):
        loss = torch.nn.functional.cross_entropy(logits(image), answer[None])
        (expected,) = torch.autograd.grad(loss, values)
        torch.testing.assert_close(gradient, expected[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("through", ["latents", "weights"])
def test_steps_towards_labels_lower_the_loss_and_leave_the_decoder_alone(codec, zoo, latents, through):
    images, labels = zoo.task.images["train"], zoo.task.labels["train"]
    before = {name: tensor.clone() for name, tensor in codec.model.state_dict().items()}
    start = latents if through == "latents" else codec.decode(latents)
    settings = {"steps": 10, "learning_rate": 0.02, "batch_size": 100, "generator": torch.Generator().manual_seed(0)}
    refined = refine(codec, zoo.module, start, images, labels, through=through, **settings)
    assert refined.shape == start.shape

    def loss(values):
        tokens = codec.decode(values) if through == "latents" else values
        return float(cross_entropy(batched_logits(zoo.module, codec.tensors(tokens), images), labels).mean())

    assert loss(refined) < loss(start)
    assert all(torch.equal(tensor, before[name]) for name, tensor in codec.model.state_dict().items())


def test_each_network_can_have_a_target_of_its_own(codec, zoo, latents):
    """What networks say needs no labels; decoded ones come nearer to their originals, not to each other."""
    originals = {name: tensor[-2:] for name, tensor in zoo.stacked("train").items()}
    images = zoo.task.images["train"]
    own = probabilities(zoo.module, originals, images)
    torch.testing.assert_close(own.sum(-1), torch.ones(2, len(images)))
    settings = {"steps": 20, "learning_rate": 0.02, "batch_size": 100, "generator": torch.Generator().manual_seed(0)}
    fitted = refine(codec, zoo.module, latents, images, own, **settings)

    def distance(values):
        return (probabilities(zoo.module, codec.tensors(codec.decode(values)), images) - own).abs().mean((1, 2))

    assert (distance(fitted) < distance(latents)).all()
