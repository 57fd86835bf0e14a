"""A few gradient steps that make generated networks better, on their latents through the frozen decoder or on their weights."""

from collections.abc import Callable

import torch
from torch import nn
from tqdm.auto import tqdm

from hub_scripts.codec import Codec
from hub_scripts.evaluation.functional import batched_logits, with_image_norms

THROUGH = ("latents", "weights")
NETWORKS_AT_ONCE = 16


@torch.no_grad()
def probabilities(module: nn.Module, tensors: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """What networks say, `(networks, images, classes)`: targets that need no labels, one by one or their mean."""
    return batched_logits(module, tensors, images).softmax(-1)


def refine(
    codec: Codec,
    module: nn.Module,
    start: torch.Tensor,
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
    through: str = "latents",
) -> torch.Tensor:
    """Adam on the cross-entropy between networks and targets; the learning rate falls to zero.

    Args:
        codec ([`Codec`]): of the networks; its model is not changed.
        module (`nn.Module`): their architecture.
        start (`torch.Tensor`): latents `(networks, tokens, latent_size)`, or normalised tokens `(networks, tokens, token_size)`
            where the steps go through weights.
        images (`torch.Tensor` of shape `(images, channels, height, width)`): to draw batches from.
        targets (`torch.Tensor` of shape `(images, classes)`, `(networks, images, classes)` or `(images,)`): probabilities, the same
            for all networks or for each its own, or labels (int64).
        steps (`int`): optimizer steps.
        learning_rate (`float`): in units of the start's standard deviation, so that both ways go equally fast.
        batch_size (`int`): images in a step, the same for all networks.
        generator (`torch.Generator`): draws the batches.
        through (`str`): `"latents"` or `"weights"`.

    Returns:
        `torch.Tensor`: as `start`.
    """
    to_tokens: Callable[[torch.Tensor], torch.Tensor] = (
        (lambda values: codec.decode(values, gradient=True)) if through == "latents" else lambda values: values
    )
    module = with_image_norms(module)
    batches = [torch.randint(len(images), (batch_size,), generator=generator) for _ in range(steps)]
    unit = start.std()
    refined = []
    with tqdm(total=len(start) * steps, desc=f"refine through {through}", unit="network-step") as bar:
        own_targets = targets.ndim == 3
        for rows in torch.arange(len(start)).split(NETWORKS_AT_ONCE):
            part, wanted = start[rows], targets[rows] if own_targets else targets
            values = (part / unit).clone().requires_grad_()
            optimizer = torch.optim.Adam([values], lr=learning_rate)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
            for index in batches:
                logits = batched_logits(module, codec.tensors(to_tokens(values * unit)), images[index])
                own = wanted[:, index] if own_targets else wanted[index].expand(len(part), *wanted[index].shape)
                loss = (
                    nn.functional.cross_entropy(logits.flatten(0, 1), own.flatten(0, 1), reduction="sum") / batch_size
                )
                (values.grad,) = torch.autograd.grad(loss, [values])
                optimizer.step()
                schedule.step()
                bar.update(len(part))
            refined.append((values * unit).detach())
    return torch.cat(refined)
