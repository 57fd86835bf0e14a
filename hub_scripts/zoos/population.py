"""A population of networks of one architecture: what differs between them, and what they are after each epoch."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from hub_scripts.evaluation.functional import evaluate, train_networks
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
    stages = train_networks(
        module,
        _initialise(module, members),
        task.images["train"],
        task.labels["train"],
        learning_rate=[member.hparams["learning_rate"] for member in members],
        weight_decay=[member.hparams["weight_decay"] for member in members],
        epochs=epochs,
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
    )
    for epoch, stacked in enumerate(stages):
        yield Snapshot(
            epoch, {name: tensor.clone() for name, tensor in stacked.items()}, _measure(module, stacked, task)
        )


def _initialise(module: nn.Module, members: list[Member]) -> dict[str, torch.Tensor]:
    """Stacked state dicts: matrices and kernels drawn as each member asks, biases zero, other vectors as the module has them."""
    layers = [
        m for m in module.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) and m.bias is not None
    ]
    biases = {id(layer.bias) for layer in layers}
    networks = []
    for member in members:
        draw, generator = (
            INITIALISATIONS[member.hparams["initialisation"]],
            torch.Generator().manual_seed(member.hparams["seed"]),
        )
        network = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            if parameter.dim() >= 2:
                draw(network[name], generator=generator)
            elif id(parameter) in biases:
                network[name].zero_()
        networks.append(network)
    return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}


def _measure(module: nn.Module, stacked: dict[str, torch.Tensor], task: Task) -> dict[str, torch.Tensor]:
    metrics = {}
    for split in SPLITS:
        found = evaluate(module, stacked, task.images[split], task.labels[split])
        metrics[f"{split}_accuracy"] = torch.from_numpy(found.accuracy)
        metrics[f"{split}_loss"] = torch.from_numpy(found.loss)
    return metrics
