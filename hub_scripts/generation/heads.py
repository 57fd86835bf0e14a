"""Networks on a task with other classes or other images than their own: new classifiers, and images brought to their size."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from torch import nn
from torch.func import functional_call

from hub_scripts.evaluation.functional import build_module, plain_logits
from hub_scripts.zoos.tasks import Task

HEADS = ("ridge", "init")
CLASS_ARGUMENTS = ("num_classes", "num_labels")
STRENGTHS = np.logspace(-3, 4, 15)  # of the ridge; chosen by leaving one sample out
TEMPERATURES = np.logspace(0, 2, 21)  # what the ridge's answers, near 0 and 1, are multiplied by to become logits
FOLDS = 5
SIDES = (*range(4, 68, 4), 96, 128, 224, 256, 384)  # of square images, in pixels


def adapt_task(module: nn.Module, task: Task, resize: bool) -> Task:
    """The task as the networks can take it.

    Args:
        module (`nn.Module`): architecture of the networks.
        task ([`Task`]): what they shall do.
        resize (`bool`): True brings images that do not fit to a size and channels that the networks take: their own size where only
            the channels differ, what the configuration of a transformers model says, or else the smallest square that runs.

    Raises:
        ValueError: If the images do not fit and are not to be resized, or no size fits.
    """
    shape = tuple(task.images["train"].shape[1:])
    failure = _failure(module, shape)
    if failure is None:
        return task
    fits = next((s for s in _sizes(module, shape) if _failure(module, s) is None), None)
    if not (fits and resize):
        advice = f"--resize brings them to {'x'.join(map(str, fits))}" if fits else "no usual size fits either"
        raise ValueError(
            f"the images of task {task.name} are {'x'.join(map(str, shape))} (channels, height, width), which these networks do not "
            f"take ({failure}); {advice}."
        )
    return task.resized(*fits)


def _failure(module: nn.Module, shape: tuple[int, ...]) -> str | None:
    try:
        with torch.no_grad():
            module(torch.zeros(2, *shape))
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def _sizes(module: nn.Module, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Shapes to try, the most likely first."""
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    channels = [first.in_channels] if first is not None else list(dict.fromkeys([shape[0], 1, 3]))
    stated = getattr(getattr(module, "config", None), "image_size", None)
    sizes = [shape[1:], *([(stated, stated)] if isinstance(stated, int) else []), *((side, side) for side in SIDES)]
    return [(c, *size) for size in sizes for c in channels]


def num_outputs(module: nn.Module, task: Task) -> int:
    """Classes that the networks tell apart."""
    with torch.no_grad():
        return plain_logits(module(task.images["train"][:2])).shape[-1]


def require_classes(module: nn.Module, task: Task, new_head: str | None) -> None:
    """Refuse a task of another number of classes, if no new classifier is asked for.

    Raises:
        ValueError: With both numbers and what to do.
    """
    classes = num_outputs(module, task)
    if classes != task.num_classes and new_head is None:
        raise ValueError(
            f"task {task.name} has {task.num_classes} classes, the networks answer with {classes}; a new classifier is needed: "
            "--new-head ridge (solved on a few labelled samples) or --new-head init (random)."
        )


def replace_head(
    architecture: str,
    kwargs: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    task: Task,
    how: str,
    shots: int = 20,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, Any], dict[str, torch.Tensor]]:
    """Networks with a classifier for a task's classes; all other weights stay.

    Args:
        architecture (`str`): `"package.module:Name"`, of the networks.
        kwargs (`Mapping`): its arguments; `num_classes` or `num_labels` among them is changed.
        tensors (`Mapping[str, torch.Tensor]`): stacked state dicts, each `(networks, *shape)`.
        task ([`Task`]): the new task; labelled samples are of its train split.
        how (`str`): `"init"`, as the layer initialises itself, or `"ridge"`: a ridge regression of the classes on the features
            before the classifier, its strength chosen by leaving one sample out, scaled to the logits that fit best on folds.
        shots (`int`): labelled samples of each class for the ridge.
        seed (`int`): of the samples and of the initialisation.

    Returns:
        `tuple`: the module, its arguments, and the stacked tensors.

    Raises:
        ValueError: If the last layer is no linear layer, or the architecture cannot be built with other classes.
    """
    old = build_module(architecture, kwargs).eval()
    module, kwargs = _with_classes(architecture, kwargs, task.num_classes, task.images["train"][:2])
    images = task.images["train"]
    name, head = find_head(module, images[:2])
    count = len(next(iter(tensors.values())))
    changed = dict(tensors)
    if how == "init":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = [_initial(head) for _ in range(count)]
    else:
        few = task.few(shots, seed)
        x, y = few.images["train"], few.labels["train"].numpy()
        features = _features(old, find_head(old, images[:2])[0], tensors, x)
        drawn = [_ridge(found.numpy(), y, task.num_classes, seed) for found in features]
    for suffix, values in zip(("weight", "bias"), zip(*drawn, strict=True), strict=True):
        if f"{name}.{suffix}" in module.state_dict():
            changed[f"{name}.{suffix}"] = torch.stack(values)
    return module, kwargs, changed


def find_head(module: nn.Module, images: torch.Tensor) -> tuple[str, nn.Linear]:
    """Name and layer of the classifier: the linear layer whose outputs are the network's.

    Raises:
        ValueError: If there is none.
    """
    outputs: dict[str, torch.Tensor] = {}
    hooks = [
        part.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    ]
    try:
        with torch.no_grad():
            logits = plain_logits(module(images))
    finally:
        for hook in hooks:
            hook.remove()
    for name in reversed(outputs):
        if outputs[name].shape == logits.shape and torch.equal(outputs[name], logits):
            return name, module.get_submodule(name)
    raise ValueError(f"{type(module).__name__} does not end in a linear layer, so it cannot get a new classifier.")


def _with_classes(
    architecture: str, kwargs: Mapping[str, Any], num_classes: int, images: torch.Tensor
) -> tuple[nn.Module, dict[str, Any]]:
    for argument in CLASS_ARGUMENTS:
        changed = dict(kwargs) | {argument: num_classes}
        if argument == "num_labels":
            changed = {key: value for key, value in changed.items() if key not in ("id2label", "label2id")}
        try:
            module = build_module(architecture, changed).eval()
        except ValueError:
            continue
        # configurations take any argument, and may not heed it
        if find_head(module, images)[1].out_features == num_classes:
            return module, changed
    raise ValueError(
        f"{architecture} takes none of {', '.join(CLASS_ARGUMENTS)}, so it cannot be built for {num_classes} classes."
    )


def _initial(head: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    head.reset_parameters()
    bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach().clone()
    return head.weight.detach().clone(), bias


@torch.no_grad()
def _features(
    module: nn.Module, head: str, tensors: Mapping[str, torch.Tensor], images: torch.Tensor
) -> list[torch.Tensor]:
    """What each network hands to its classifier, `(images, features)`."""
    caught: list[torch.Tensor] = []
    hook = module.get_submodule(head).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        for index in range(len(next(iter(tensors.values())))):
            functional_call(module, {name: tensor[index] for name, tensor in tensors.items()}, (images,))
    finally:
        hook.remove()
    return caught


def _ridge(features: np.ndarray, labels: np.ndarray, num_classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `(classes, features)` and bias `(classes,)`."""
    # networks that are not finite keep a classifier that is; all answers to them are wrong in any case
    features = np.where(np.isfinite(features), features, 0.0).astype(np.float64)
    size = features.std() or 1.0  # strengths are relative to it
    features = features / size
    targets = np.eye(num_classes)[labels]
    ridge = RidgeCV(alphas=STRENGTHS).fit(features, targets)
    folds = KFold(min(FOLDS, len(labels)), shuffle=True, random_state=seed)
    held_out = cross_val_predict(RidgeCV(alphas=[ridge.alpha_]), features, targets, cv=folds)
    losses = [_cross_entropy(t * held_out, labels) for t in TEMPERATURES]
    scale = TEMPERATURES[int(np.argmin(losses))]
    weight, bias = scale / size * ridge.coef_, scale * ridge.intercept_
    return torch.from_numpy(weight).float(), torch.from_numpy(np.atleast_1d(bias)).float()


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)))
