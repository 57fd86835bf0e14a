"""Which directions in latent space change what a network says."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.func import grad, vmap
from tqdm.auto import tqdm

from hub_scripts.codec import Codec
from hub_scripts.evaluation.functional import condition_norms, network_logits

IMAGES_AT_ONCE = 128


def latent_gradients(
    codec: Codec, module: nn.Module, latents: torch.Tensor, images: torch.Tensor, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Gradients whose outer products are the Fisher information of networks in their latents.

    For each image an answer is drawn from the decoded network's own probabilities, so no labels are needed.

    Args:
        codec ([`Codec`]): decodes latents to networks.
        module (`nn.Module`): their architecture.
        latents (`torch.Tensor` of shape `(networks, tokens, latent_size)`): where the gradients are taken.
        images (`torch.Tensor` of shape `(images, channels, height, width)`): inputs of the task.
        generator (`torch.Generator`): draws the answers.

    Yields:
        `torch.Tensor` of shape `(images, tokens, latent_size)`: for each network; the mean of their outer products is the Fisher
        information.
    """
    for one in tqdm(latents, desc="sensitivity", unit="network"):
        yield _pulled_back(codec, module, one, images, generator)


def _pulled_back(
    codec: Codec, module: nn.Module, latents: torch.Tensor, images: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """(directions, tokens, latent_size) of one network: gradients in its weights, brought back through the decoder."""
    latents = latents.detach()[None].requires_grad_()
    decoded = codec.decode(latents, gradient=True)
    weights = torch.cat(list(_weight_gradients(codec, module, decoded[0].detach(), images, generator)))
    parts = []
    for part in weights.split(IMAGES_AT_ONCE):
        (found,) = torch.autograd.grad(decoded, latents, part[:, None], retain_graph=True, is_grads_batched=True)
        parts.append(found[:, 0])
    return torch.cat(parts)


def _weight_gradients(
    codec: Codec, module: nn.Module, tokens: torch.Tensor, images: torch.Tensor, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """(images, tokens, token_size), some at a time: of the log-likelihood of a drawn answer, in the normalised tokens.

    Norms have the running statistics of the images, as generated networks get them, and these do not count as directions.
    """
    conditioned = condition_norms(module, codec.tensors(tokens[None]), images)
    buffers = {name: conditioned[name][0] for name, _ in module.named_buffers() if name in conditioned}

    def loss(tokens: torch.Tensor, image: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        tensors = {name: tensor[0] for name, tensor in codec.tensors(tokens[None]).items()} | buffers
        return nn.functional.cross_entropy(network_logits(module, tensors, image[None]), answer[None])

    with torch.no_grad():
        tensors = {name: tensor[0] for name, tensor in codec.tensors(tokens[None]).items()} | buffers
        chances = torch.cat([network_logits(module, tensors, part) for part in images.split(IMAGES_AT_ONCE)]).softmax(
            -1
        )
    answers = torch.multinomial(chances, 1, generator=generator)[:, 0]
    for part, own in zip(images.split(IMAGES_AT_ONCE), answers.split(IMAGES_AT_ONCE), strict=True):
        yield vmap(grad(loss), in_dims=(None, 0, 0))(tokens, part, own)
