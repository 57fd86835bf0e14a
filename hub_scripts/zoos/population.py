"""A population of networks: groups of one shape are trained and measured, in this process or in several."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hub_scripts.evaluation.functional import build_module, evaluate, train_networks
from hub_scripts.outputs import new_folder, read_json, write_json
from hub_scripts.zoos.sweep import Member
from hub_scripts.zoos.tasks import OTHER_CLASS, Task, load_task, renumber

INITIALISATIONS = {
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    # of the published Model Zoos, whatever the size of the layer: 0 to 1, standard normal, and that one cut off at two
    "uniform": nn.init.uniform_,
    "normal": nn.init.normal_,
    "truncated_normal": nn.init.trunc_normal_,
}
GROUP_FILE = "group.json"  # is written last
Report = Callable[
    [int, float | None], None
]  # networks that ended an epoch, and their mean validation accuracy if it is known


@dataclass(frozen=True)
class Training:
    """What all networks of a population share.

    Args:
        architecture (`str`): `"package.module:Callable"`.
        task (`str`): as [`load_task`] takes it.
        epochs (`tuple[int, ...]`): epochs at which checkpoints are kept, ascending; 0 is before training. The last one ends it.
        batch_size (`int`): images in a step.
        seed (`int`): order of the images.
    """

    architecture: str
    task: str
    epochs: tuple[int, ...]
    batch_size: int
    seed: int


def build_network(architecture: str, kwargs: Mapping[str, Any], seed: int) -> nn.Module:
    """The module of an architecture; its own weights, where they are used at all, follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_module(architecture, kwargs)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: sums of several threads differ in the last digit, from machine to machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- one group


def train_group(
    module: nn.Module, members: Sequence[Member], training: Training, task: Task, folder: Path, report: Report
) -> None:
    """Train networks of one shape and write their checkpoints and figures into a new folder, whole or not at all.

    Args:
        module (`nn.Module`): the architecture of all members.
        members (`Sequence[Member]`): networks with the same `shape`.
        training ([`Training`]): what they share with the rest of the population.
        task ([`Task`]): the loaded task.
        folder (`Path`): where to write; it is complete if it exists.
        report (`Callable`): called after each epoch.
    """
    started = time.perf_counter()
    subsets, labels = _training_data(members, task)
    hparams = {name: [member.hparams[name] for member in members] for name in members[0].hparams}
    stages = train_networks(
        module,
        _initialise(module, members),
        task.images["train"],
        labels,
        learning_rate=hparams["learning_rate"],
        weight_decay=hparams["weight_decay"],
        optimizer=hparams["optimizer"][0],
        epochs=training.epochs[-1],
        batch_size=training.batch_size,
        generator=torch.Generator().manual_seed(training.seed),
        subsets=subsets,
    )
    stored = set(module.state_dict())
    metrics = {}
    with new_folder(folder) as partial, torch.random.fork_rng(devices=[]):
        torch.manual_seed(hparams["seed"][0])  # of dropout
        for epoch, stacked in enumerate(stages):
            if epoch in training.epochs:
                save_file({name: t for name, t in stacked.items() if name in stored}, partial / _file(epoch))
                metrics[epoch] = _measure(module, stacked, members, task, subsets, labels)
            if epoch:
                report(
                    len(members), float(np.mean(metrics[epoch]["validation_accuracy"])) if epoch in metrics else None
                )
        write_json(
            partial / GROUP_FILE, {"metrics": metrics, "seconds": time.perf_counter() - started, "size": len(members)}
        )


def _file(epoch: int) -> str:
    return f"epoch-{epoch:05d}.safetensors"


def read_group(folder: Path) -> tuple[list[dict[int, dict[str, float | None]]], float]:
    """Figures of each network of a group by epoch, leaving out epochs whose weights are not finite; and seconds of training."""
    found = read_json(folder / GROUP_FILE)
    runs = [
        {
            int(epoch): {name: values[place] for name, values in metrics.items() if name != "is_finite"}
            for epoch, metrics in found["metrics"].items()
            if metrics["is_finite"][place]
        }
        for place in range(found["size"])
    ]
    return runs, found["seconds"]


def read_checkpoint(folder: Path, place: int, epoch: int) -> dict[str, torch.Tensor]:
    """Weights of one network of a group at one epoch; nothing else is read."""
    with safe_open(folder / _file(epoch), framework="pt") as file:
        return {name: file.get_slice(name)[place] for name in file.keys()}  # noqa: SIM118 (it is no dict)


def _training_data(members: Sequence[Member], task: Task) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Images that each network sees, `(networks, images)`, None for all; and labels, `(images,)` or `(networks, images)`."""
    labels = own_labels(members, task.labels["train"])
    available, num_classes = labels.shape[-1], task.num_classes
    if members[0].classes is not None:
        num_classes = len(members[0].classes)
        # as many as any choice of classes has: networks that train together see as many images, however they are grouped
        available = int(task.labels["train"].bincount(minlength=task.num_classes).sort().values[:num_classes].sum())
    count = max(1, round(members[0].hparams["data_fraction"] * available))
    noises = [member.hparams["label_noise"] for member in members]
    # a stream of its own: the weights are drawn from the seed itself
    generators = [np.random.default_rng([member.hparams["seed"], 1]) for member in members]
    known = [np.flatnonzero(own != OTHER_CLASS) for own in labels.expand(len(members), -1)]
    subsets = [generator.permutation(rows)[:count] for generator, rows in zip(generators, known, strict=True)]
    if any(noises):
        labels = labels.expand(len(members), -1).clone()
        for own, subset, noise, generator in zip(labels, subsets, noises, generators, strict=True):
            wrong = torch.from_numpy(subset[: round(noise * count)])
            shift = torch.from_numpy(generator.integers(1, num_classes, size=len(wrong)))  # to another class
            own[wrong] = (own[wrong] + shift) % num_classes
    return None if count == labels.shape[-1] else torch.from_numpy(np.stack(subsets)), labels


def own_labels(members: Sequence[Member], labels: torch.Tensor) -> torch.Tensor:
    """A task's labels `(images,)` as each network numbers its own classes, `(networks, images)`; as they are if all know all."""
    if members[0].classes is None:
        return labels
    return torch.stack([renumber(labels, member.classes) for member in members])


def _initialise(module: nn.Module, members: Sequence[Member]) -> dict[str, torch.Tensor]:
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


def _measure(
    module: nn.Module,
    stacked: Mapping[str, torch.Tensor],
    members: Sequence[Member],
    task: Task,
    subsets: torch.Tensor | None,
    labels: torch.Tensor,
) -> dict[str, list[float]]:
    """Accuracy and loss of each network: on the images and labels it was trained on, and on its classes in the other splits."""
    metrics: dict[str, list[float]] = {}
    train = evaluate(module, stacked, task.images["train"], labels, subsets=subsets)
    others = {
        s: evaluate(module, stacked, task.images[s], own_labels(members, task.labels[s]))
        for s in ("validation", "test")
    }
    for split, found in {"train": train, **others}.items():
        metrics |= {f"{split}_accuracy": found.accuracy.tolist(), f"{split}_loss": found.loss.tolist()}
    finite = [t.isfinite().flatten(1).all(1) for t in stacked.values() if t.is_floating_point()]
    return metrics | {"is_finite": torch.stack(finite).all(0).tolist()}


# --- all groups


def train_groups(
    groups: Mapping[Path, Sequence[Member]], training: Training, task: Task, num_workers: int, report: Report
) -> None:
    """Train groups and write each into its folder.

    Args:
        groups (`Mapping[Path, Sequence[Member]]`): by the folder of each.
        training ([`Training`]): what all networks share.
        task ([`Task`]): the loaded task; processes load their own.
        num_workers (`int`): processes; 0 trains in this one. The networks do not depend on it.
        report (`Callable`): called in this process after each epoch of a group.

    Raises:
        ValueError: If a process is lost.
    """
    if num_workers == 0:
        with one_thread():
            for folder, members in groups.items():
                train_group(_module(members, training), members, training, task, folder, report)
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    executor = ProcessPoolExecutor(
        min(num_workers, len(groups) or 1), context, initializer=_start_worker, initargs=(training, messages)
    )
    try:
        waiting = {executor.submit(_work, members, folder) for folder, members in groups.items()}
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            while not messages.empty():
                report(*messages.get())
            for future in done:
                future.result()
    except BaseException as error:
        # an executor would let its processes finish what they do, which may take hours
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise ValueError(
                "a training process was lost, perhaps for lack of memory; the same command goes on from here, with fewer "
                "--num-workers or --models-per-batch it needs less."
            ) from error
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _module(members: Sequence[Member], training: Training) -> nn.Module:
    return build_network(training.architecture, members[0].kwargs, training.seed)


_WORKER: dict[str, Any] = {}  # what a process keeps from one group to the next


def _start_worker(training: Training, messages: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _WORKER.update(training=training, task=load_task(training.task), report=lambda *message: messages.put(message))


def _end_with_parent() -> None:
    """A killed parent cannot end its processes, and they would wait for it forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(members: Sequence[Member], folder: Path) -> None:
    training = _WORKER["training"]
    train_group(_module(members, training), members, training, _WORKER["task"], folder, _WORKER["report"])
