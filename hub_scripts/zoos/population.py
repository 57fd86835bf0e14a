"""Train a population of networks of one architecture at once: their weights are stacked and run under `torch.func.vmap`."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from hub_scripts.evaluation.functional import batched_logits, cross_entropy, evaluate
from hub_scripts.zoos.tasks import SPLITS, Task

INITIALISATIONS = {
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
}


@dataclass(frozen=True)
class Member:
    """One network of a population.

    Args:
        model_id (`str`): its name.
        hparams (`dict`): `learning_rate`, `weight_decay`, `initialisation` (a key of `INITIALISATIONS`) and `seed`.
    """

    model_id: str
    hparams: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """The whole population after an epoch.

    Args:
        epoch (`int`): 0 is before training.
        tensors (`dict[str, torch.Tensor]`): stacked state dicts, each `(networks, *shape)`.
        metrics (`dict[str, torch.Tensor]`): `{split}_accuracy` and `{split}_loss`, each `(networks,)`.
    """

    epoch: int
    tensors: dict[str, torch.Tensor]
    metrics: dict[str, torch.Tensor]


def train_population(
    module: nn.Module, members: list[Member], task: Task, epochs: int, batch_size: int, seed: int
) -> Iterator[Snapshot]:
    """Train all members on the task with AdamW, all of them on the same batches.

    Args:
        module (`nn.Module`): the architecture; its own weights are not used.
        members (`list[Member]`): what differs between the networks.
        task ([`Task`]): images and labels.
        epochs (`int`): passes over the training images.
        batch_size (`int`): images in a step.
        seed (`int`): order of the images.

    Yields:
        [`Snapshot`]: at epochs 0, 1, ..., `epochs`.
    """
    stacked = _initialise(module, members)
    parameters = {name: stacked[name].requires_grad_() for name, _ in module.named_parameters()}
    # AdamW works value by value, so a slice of the stack with its own settings trains exactly as a network of its own
    slices = _runs([(m.hparams["learning_rate"], m.hparams["weight_decay"]) for m in members])
    leaves = [[nn.Parameter(p.detach()[start:stop]) for p in parameters.values()] for start, stop, _ in slices]
    settings = [{"params": group, "lr": lr, "weight_decay": wd} for group, (_, _, (lr, wd)) in zip(leaves, slices, strict=True)]
    optimizer = torch.optim.AdamW(settings)
    generator = torch.Generator().manual_seed(seed)
    images, labels = task.images["train"], task.labels["train"]

    yield Snapshot(0, _detached(stacked), _measure(module, stacked, task))
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(labels), generator=generator)
        for batch in order.split(batch_size):
            logits = batched_logits(module, stacked, images[batch], chunk_size=None, training=True)
            loss = cross_entropy(logits, labels[batch]).sum()  # a sum: each network gets its own gradient, whole
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for group, (start, stop, _) in zip(leaves, slices, strict=True):
                for leaf, gradient in zip(group, gradients, strict=True):
                    leaf.grad = gradient[start:stop]
            optimizer.step()
        yield Snapshot(epoch, _detached(stacked), _measure(module, stacked, task))


def _initialise(module: nn.Module, members: list[Member]) -> dict[str, torch.Tensor]:
    """Stacked state dicts: matrices and kernels drawn as each member asks, biases zero, other vectors as the module has them."""
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) and m.bias is not None]
    biases = {id(layer.bias) for layer in layers}
    networks = []
    for member in members:
        draw, generator = INITIALISATIONS[member.hparams["initialisation"]], torch.Generator().manual_seed(member.hparams["seed"])
        network = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            if parameter.dim() >= 2:
                draw(network[name], generator=generator)
            elif id(parameter) in biases:
                network[name].zero_()
        networks.append(network)
    return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}


def _runs(values: list) -> list[tuple[int, int, tuple]]:
    """Start, stop and value of each run of equal neighbours."""
    starts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return [(start, stop, values[start]) for start, stop in zip(starts, [*starts[1:], len(values)], strict=True)]


def _measure(module: nn.Module, stacked: dict[str, torch.Tensor], task: Task) -> dict[str, torch.Tensor]:
    metrics = {}
    for split in SPLITS:
        found = evaluate(module, stacked, task.images[split], task.labels[split])
        metrics[f"{split}_accuracy"] = torch.from_numpy(found.accuracy)
        metrics[f"{split}_loss"] = torch.from_numpy(found.loss)
    return metrics


def _detached(stacked: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in stacked.items()}
