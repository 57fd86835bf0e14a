"""Networks judged by what they compute; many networks of one architecture run at once with `torch.func`, or one after another.

Stacked tensors are a state dict with a leading axis: name -> (networks, *shape). B, N, C = images, networks, classes.
"""

import copy
import importlib
import math
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap

TRUSTED_PREFIXES = ("hub_scripts.zoos.architectures",)  # modules whose functions, not only classes, may be called
IMAGES_AT_ONCE = 256
CHUNK_SIZE = 32  # networks at a time; on a CPU larger chunks are not faster and need more memory
# Convolutions of many networks at once are one grouped convolution. On one CPU core that saves calls and costs speed: while the
# output of a convolution has fewer values than this, all images of a step together, networks at once are faster, above it
# one by one. Several threads share a grouped convolution better than many small ones
LARGE_CONVOLUTION = 50_000
OPTIMIZERS = ("adamw", "adam", "sgd")
MOMENTUM = 0.9  # of SGD
OTHER_CLASS = -100  # label of images that a network is not judged on, because it does not know their class
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam and AdamW


# --- from a name to a module


def build_module(architecture: str, kwargs: Mapping[str, Any] | None = None, trust: bool = False) -> nn.Module:
    """Build a network from the name that a zoo gives.

    A zoo may come from anywhere, so a name must not be a way to run code: only subclasses of `nn.Module` outside Python's
    own library are called, and functions of `TRUSTED_PREFIXES`. A class of transformers gets `kwargs` through its configuration.

    Args:
        architecture (`str`): `"package.module:Name"`.
        kwargs (`Mapping[str, Any]`, *optional*): arguments of the class or function.
        trust (`bool`): True calls whatever the name stands for.

    Returns:
        `nn.Module`: with its own, meaningless weights.

    Raises:
        ValueError: If the name is malformed, not found or not allowed, or does not give a module from these arguments.
    """
    kwargs = dict(kwargs or {})
    target = _resolve(architecture, trust)
    if not trust:
        _refuse_unless_safe(architecture, target, kwargs)
    try:
        config_class = getattr(target, "config_class", None)  # of transformers' models
        module = target(config_class(**kwargs)) if config_class is not None else target(**kwargs)
    except (TypeError, ValueError) as error:
        # its own words may say little: "zip() argument 2 is longer than argument 1"
        raise ValueError(f"{architecture} does not accept {kwargs}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{architecture} returned a {type(module).__name__}, expected an nn.Module.")
    return module


def _resolve(architecture: str, trust: bool) -> Any:
    path, separator, name = architecture.partition(":")
    if not (separator and name.isidentifier() and all(part.isidentifier() for part in path.split("."))):
        raise ValueError(f"architecture is {architecture!r}, expected 'package.module:Name'.")
    if not trust and path.split(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"architecture {architecture} is part of Python's library, expected a subclass of nn.Module.")
    try:
        return getattr(importlib.import_module(path), name)
    except ImportError as error:
        raise ValueError(
            f"architecture {architecture} cannot be imported: {error}. Install the package that defines it."
        ) from error
    except AttributeError as error:
        raise ValueError(f"architecture {architecture}: module {path} has no {name}.") from error


def _refuse_unless_safe(architecture: str, target: Any, kwargs: dict) -> None:
    home = getattr(target, "__module__", None) or ""  # where it is defined, not where it was imported
    if not (isinstance(target, type) and issubclass(target, nn.Module)) and not home.startswith(TRUSTED_PREFIXES):
        raise ValueError(
            f"architecture {architecture} is not a subclass of nn.Module, so it is not called; pass trust=True if you trust its source."
        )
    if _has_key(kwargs, "trust_remote_code"):
        raise ValueError(
            f"the arguments of {architecture} ask for remote code; pass trust=True if you trust its source."
        )


def _has_key(value: Any, key: str) -> bool:
    if isinstance(value, Mapping):
        return key in value or any(_has_key(item, key) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_has_key(item, key) for item in value)


def with_image_norms(module: nn.Module) -> nn.Module:
    """A copy, in eval mode, whose batch norms take mean and variance of the images at hand instead of running statistics.

    For gradients through decoded networks: a running variance that is decoded near zero makes them explode, and generated networks
    get statistics of images in any case ([`condition_norms`]).
    """
    module = copy.deepcopy(module).eval()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            part.forward = types.MethodType(_norm_of_images, part)
    return module


def _norm_of_images(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)


# --- outputs


def batched_logits(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], images: torch.Tensor, chunk_size: int | None = CHUNK_SIZE
) -> torch.Tensor:
    """Outputs of many networks on the same images, in eval mode; differentiable in the tensors.

    Args:
        module (`nn.Module`): the architecture; its own weights are not used, except buffers that `tensors` lack.
        tensors (`Mapping[str, torch.Tensor]`): stacked state dicts, each `(networks, *shape)`.
        images (`torch.Tensor` of shape `(images, channels, height, width)`): inputs.
        chunk_size (`int`, *optional*): networks at a time; all at once if None.

    Returns:
        `torch.Tensor` of shape `(networks, images, classes)`.

    Raises:
        ValueError: If a parameter is missing, a name is unknown or a shape does not fit the module.
    """
    tensors = _checked(module, tensors)
    way = _fastest_way(module, tensors, images[:1], min(len(images), IMAGES_AT_ONCE))
    with _mode(module, training=False):
        # all activations of many networks on thousands of images would take gigabytes
        parts = [_forward(module, tensors, part, chunk_size, way=way) for part in images.split(IMAGES_AT_ONCE)]
    return torch.cat(parts, dim=1)


def own_logits(module: nn.Module, tensors: Mapping[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Outputs of many networks, each on images of its own, in eval mode; differentiable in the tensors.

    Args:
        module (`nn.Module`): the architecture.
        tensors (`Mapping[str, torch.Tensor]`): stacked state dicts, each `(networks, *shape)`.
        images (`torch.Tensor` of shape `(networks, images, channels, height, width)`): inputs.

    Returns:
        `torch.Tensor` of shape `(networks, images, classes)`.

    Raises:
        ValueError: As in [`batched_logits`].
    """
    tensors = _checked(module, tensors)
    with _mode(module, training=False):
        return _forward(module, tensors, images, None, own_images=True)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share of images that each network classifies as labelled; an output with NaN counts as wrong.

    Args:
        logits (`torch.Tensor` of shape `(networks, images, classes)`): outputs.
        labels (`torch.Tensor` of shape `(images,)` or `(networks, images)`): int64; images labelled -100 are left out.

    Returns:
        `torch.Tensor` of shape `(networks,)`: float32.
    """
    hits = (logits.argmax(-1) == labels) & ~logits.isnan().any(-1)
    return hits.float().sum(1) / _num_labelled(labels)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each network.

    Args:
        logits (`torch.Tensor` of shape `(networks, images, classes)`): outputs.
        labels (`torch.Tensor` of shape `(images,)` or `(networks, images)`): int64; images labelled -100 are left out.

    Returns:
        `torch.Tensor` of shape `(networks,)`.
    """
    targets = labels.expand(len(logits), -1)  # (networks, images)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=OTHER_CLASS
    )
    return losses.view_as(targets).sum(1) / _num_labelled(labels)


def _num_labelled(labels: torch.Tensor) -> torch.Tensor:
    """Images that have a label, `()` or `(networks,)`; 1 where there are none."""
    return (labels != OTHER_CLASS).sum(-1).clamp(min=1)


def agreement(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    """Share of images on which two networks predict the same class; NaN agrees with nothing.

    Args:
        logits_a (`torch.Tensor` of shape `(networks, images, classes)`): outputs.
        logits_b (`torch.Tensor` of shape `(networks, images, classes)`): outputs of the partners.

    Returns:
        `torch.Tensor` of shape `(networks,)`: float32.
    """
    valid = ~(logits_a.isnan() | logits_b.isnan()).any(-1)
    return ((logits_a.argmax(-1) == logits_b.argmax(-1)) & valid).float().mean(1)


def disagreement(logits: torch.Tensor) -> float:
    """Share of images on which two of some networks predict different classes, mean over all pairs; NaN agrees with nothing.

    How much networks of one accuracy differ in what they compute (Fort et al. 2019, arXiv 1912.02757): copies have 0.

    Args:
        logits (`torch.Tensor` of shape `(networks, images, classes)`): outputs.

    Returns:
        `float`: 0 to 1; NaN for a single network.
    """
    networks, _, classes = logits.shape
    if networks < 2:
        return math.nan
    votes = nn.functional.one_hot(logits.argmax(-1), classes) * ~logits.isnan().any(-1, keepdim=True)
    counts = votes.sum(0)  # (images, classes)
    agreeing = (counts * (counts - 1)).sum(-1).double().mean()
    return float(1 - agreeing / (networks * (networks - 1)))


def behavioural_loss(
    decoded_logits: torch.Tensor, original_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Mean KL divergence of decoded networks' predictions from their originals' (arXiv 2503.17138).

    Args:
        decoded_logits (`torch.Tensor` of shape `(networks, images, classes)`): carries the gradient.
        original_logits (`torch.Tensor` of shape `(networks, images, classes)`): the target; no gradient flows into it.
        temperature (`float`): more than 1 weighs the unlikely classes more; gradients keep their size (times its square).

    Returns:
        `torch.Tensor`: scalar, 0 where both predict alike.
    """
    decoded = (decoded_logits / temperature).log_softmax(-1)
    original = (original_logits.detach() / temperature).log_softmax(-1)
    divergence = (original.exp() * (original - decoded)).sum(-1)  # (networks, images)
    return divergence.mean() * temperature**2


class Evaluation(NamedTuple):
    """Figures of networks on labelled images.

    Args:
        accuracy (`np.ndarray` of shape `(networks,)`): float32, 0 to 1.
        loss (`np.ndarray` of shape `(networks,)`): float32, mean cross-entropy.
    """

    accuracy: np.ndarray
    loss: np.ndarray


@torch.no_grad()
def evaluate(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int = CHUNK_SIZE,
    batch_size: int = IMAGES_AT_ONCE,
    subsets: torch.Tensor | None = None,
) -> Evaluation:
    """Accuracy and loss of many networks, with memory bounded by `chunk_size` networks on `batch_size` images.

    Args:
        module (`nn.Module`): the architecture.
        tensors (`Mapping[str, torch.Tensor]`): stacked state dicts, each `(networks, *shape)`.
        images (`torch.Tensor` of shape `(images, channels, height, width)`): inputs.
        labels (`torch.Tensor` of shape `(images,)` or `(networks, images)`): int64; images labelled -100 are left out.
        chunk_size (`int`): networks at a time, where they run at once.
        batch_size (`int`): images at a time.
        subsets (`torch.Tensor` of shape `(networks, images of a network)`, *optional*): which images each network is judged on;
            default all.

    Returns:
        [`Evaluation`]: accuracy and loss of each network.

    Raises:
        ValueError: As in [`batched_logits`].
    """
    tensors = _checked(module, tensors)
    way = _fastest_way(module, tensors, images[:1], batch_size)
    networks = len(next(iter(tensors.values())))
    size = 1 if way.one_by_one else networks
    hits, losses, counts = torch.zeros(3, networks, device=images.device)
    rows = torch.arange(len(images), device=images.device) if subsets is None else subsets
    with _mode(module, training=False):
        for start in range(0, networks, size):
            part = slice(start, start + size)
            stacked = {name: tensor[part] for name, tensor in tensors.items()}
            for index in rows.split(batch_size, dim=-1):
                x, y = _batch(images, labels, index, part)
                logits = _forward(module, stacked, x, chunk_size, index.dim() == 2, way)
                hits[part] += accuracy(logits, y) * _num_labelled(y)
                losses[part] += cross_entropy(logits, y) * _num_labelled(y)
                counts[part] += (y != OTHER_CLASS).sum(-1)
    return Evaluation((hits / counts).cpu().numpy(), (losses / counts).cpu().numpy())


def ensemble_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy of the mean of the networks' probabilities; an output with NaN is left out of the mean.

    Args:
        logits (`torch.Tensor` of shape `(networks, images, classes)`): outputs.
        labels (`torch.Tensor` of shape `(images,)`): int64.
    """
    return float((logits.softmax(-1).nan_to_num().mean(0).argmax(-1) == labels).float().mean())


# --- training


def train_networks(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    learning_rate: float | Sequence[float],
    weight_decay: float | Sequence[float] = 0.0,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    optimizer: str = "adamw",
    subsets: torch.Tensor | None = None,
    yields_per_epoch: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """Train many networks, all on the same batches.

    The optimizers work value by value, so every network trains exactly as it would alone. The tensors given are not changed.

    Args:
        module (`nn.Module`): the architecture.
        tensors (`Mapping[str, torch.Tensor]`): stacked state dicts, each `(networks, *shape)`.
        images (`torch.Tensor` of shape `(images, channels, height, width)`): to train on.
        labels (`torch.Tensor` of shape `(images,)` or `(networks, images)`): int64.
        learning_rate (`float` or `Sequence[float]`): constant; one for all or one for each network.
        weight_decay (`float` or `Sequence[float]`): likewise.
        epochs (`int`): passes over the images.
        batch_size (`int`): images in a step.
        generator (`torch.Generator`): order of the images.
        optimizer (`str`): `"adamw"`, `"adam"` or `"sgd"`, the last with a momentum of 0.9.
        subsets (`torch.Tensor` of shape `(networks, images of a network)`, *optional*): which images each network sees; default
            all.
        yields_per_epoch (`int`): how often within an epoch networks are handed out, after equal numbers of steps; at most
            once a step.

    Yields:
        `dict[str, torch.Tensor]`: stacked state dicts before training, within each epoch and at its end; clone what shall be
        kept.

    Raises:
        ValueError: As in [`batched_logits`], or if a normalisation layer has `momentum=None`.
    """
    if any(getattr(part, "momentum", 0) is None for part in module.modules()):
        raise ValueError(
            "a normalisation layer has momentum=None, torch.func cannot train it; give it a number, e.g. 0.1."
        )
    stacked = _with_buffers(module, _checked(module, tensors))
    way = _fastest_way(module, stacked, images[:1], batch_size)
    networks, count = len(next(iter(stacked.values()))), (images if subsets is None else subsets.T).shape[0]
    known = dict(module.named_parameters(remove_duplicate=False))
    names = [name for name in stacked if name in known]
    # the parts share the memory of the stack
    size = 1 if way.one_by_one else networks
    parts = [
        (slice(i, i + size), {name: tensor[i : i + size].detach() for name, tensor in stacked.items()})
        for i in range(0, networks, size)
    ]
    for _, part in parts:
        for name in names:
            part[name].requires_grad_()
    update = _Optimizer(optimizer, [stacked[name] for name in names], learning_rate, weight_decay)

    yield stacked
    for _ in range(epochs):
        batches = torch.randperm(count, generator=generator).split(batch_size)
        stops = {math.ceil(len(batches) * part / yields_per_epoch) for part in range(1, yields_per_epoch + 1)}
        for step, index in enumerate(batches, start=1):
            rows = index if subsets is None else subsets[:, index]
            gradients = []
            with _mode(module, training=True):
                for place, part in parts:
                    x, y = _batch(images, labels, rows, place)
                    loss = cross_entropy(_forward(module, part, x, None, rows.dim() == 2, way), y).sum()
                    # a sum: each network gets its own gradient, whole
                    gradients.append(
                        torch.autograd.grad(
                            loss, [part[name] for name in names], allow_unused=True, materialize_grads=True
                        )
                    )
            update.step([torch.cat(found) for found in zip(*gradients, strict=True)])
            if step in stops:
                yield stacked


def trains_one_by_one(module: nn.Module, image: torch.Tensor, batch_size: int) -> bool:
    """True if [`train_networks`] takes networks of this architecture one after another, because that is faster.

    Args:
        module (`nn.Module`): the architecture.
        image (`torch.Tensor` of shape `(1, channels, height, width)`): one input.
        batch_size (`int`): images in a step.
    """
    two = {name: tensor.detach().expand(2, *tensor.shape) for name, tensor in module.state_dict().items()}
    return _fastest_way(module, _checked(module, two), image, batch_size).one_by_one


class _Optimizer:
    """AdamW, Adam or SGD with momentum, the same steps as `torch.optim`'s, with a learning rate and decay for each network."""

    def __init__(
        self,
        kind: str,
        parameters: list[torch.Tensor],
        learning_rate: float | Sequence[float],
        weight_decay: float | Sequence[float],
    ):
        if kind not in OPTIMIZERS:
            raise ValueError(f"there is no optimizer {kind!r}, expected one of {', '.join(OPTIMIZERS)}.")
        self.kind, self.parameters, self.steps = kind, parameters, 0
        self.rates, self.decays = (
            [torch.as_tensor(v, dtype=p.dtype).to(p.device).expand(len(p)).view(-1, *[1] * (p.dim() - 1)) for p in parameters]
            for v in (learning_rate, weight_decay)
        )  # fmt: skip
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters] if kind != "sgd" else self.first

    @torch.no_grad()
    def step(self, gradients: list[torch.Tensor]) -> None:
        """Change the parameters in place."""
        self.steps += 1
        rest = [1 - beta**self.steps for beta in BETAS]  # the averages begin at zero; this makes up for it
        for value, gradient, rate, decay, first, second in zip(
            self.parameters, gradients, self.rates, self.decays, self.first, self.second, strict=True
        ):
            if self.kind == "adamw":
                value.mul_(1 - rate * decay)
            else:
                gradient.add_(decay * value)
            if self.kind == "sgd":
                value.sub_(rate * first.mul_(MOMENTUM).add_(gradient))
                continue
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            size = second.sqrt().div_(math.sqrt(rest[1])).add_(EPSILON)
            value.sub_((rate / rest[0]) * first / size)


@torch.no_grad()
def condition_norms(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], images: torch.Tensor, batches: int = 4
) -> dict[str, torch.Tensor]:
    """Give normalisation layers the running statistics that fit the weights: a plain average over some batches.

    Args:
        module (`nn.Module`): the architecture.
        tensors (`Mapping[str, torch.Tensor]`): stacked state dicts, each `(networks, *shape)`.
        images (`torch.Tensor` of shape `(images, channels, height, width)`): of the target data; no labels needed.
        batches (`int`): how many batches the images are cut into.

    Returns:
        `dict[str, torch.Tensor]`: new stacked state dicts with all buffers; the same tensors if no layer keeps statistics.

    Raises:
        ValueError: As in [`batched_logits`].
    """
    checked = _checked(module, tensors)
    norms = [m for m in module.modules() if getattr(m, "running_mean", None) is not None and hasattr(m, "momentum")]
    if not norms:
        return dict(tensors)
    stacked = _with_buffers(module, checked)
    momenta = [norm.momentum for norm in norms]
    with _mode(module, training=False):
        try:
            for norm in norms:
                norm.train()
            for index, batch in enumerate(images.chunk(batches)):
                for norm in norms:
                    norm.momentum = 1 / (index + 1)  # replaces what was there first, then averages
                _forward(module, stacked, batch, CHUNK_SIZE)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return dict(tensors) | stacked


class _Way(NamedTuple):
    """How networks of one architecture run: at once with `vmap`, or one after another on images in a given memory format."""

    one_by_one: bool = False
    memory_format: torch.memory_format = torch.contiguous_format


@torch.no_grad()
def _fastest_way(module: nn.Module, stacked: Mapping[str, torch.Tensor], image: torch.Tensor, batch_size: int) -> _Way:
    """Decided by the size of the convolutions, not by a measurement, so that it is the same on every machine."""
    if image.device.type != "cpu" or torch.get_num_threads() > 1:
        return _Way()
    sizes: list[int] = []
    convolutions = [part for part in module.modules() if isinstance(part, nn.modules.conv._ConvNd)]
    hooks = [part.register_forward_hook(lambda *call: sizes.append(call[2].numel())) for part in convolutions]
    network = {name: tensor[0] for name, tensor in stacked.items()}
    try:
        with _mode(module, training=False):
            network_logits(module, network, image)
            is_large = bool(sizes) and batch_size * sum(sizes) / len(sizes) > LARGE_CONVOLUTION
            if not is_large:
                return _Way(one_by_one=len(next(iter(stacked.values()))) == 1)
            try:  # faster, but a `view` in a module may forbid it
                network_logits(module, network, _in_format(image, torch.channels_last))
                return _Way(True, torch.channels_last)
            except RuntimeError:
                return _Way(True)
    finally:
        for hook in hooks:
            hook.remove()


def _in_format(images: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    if memory_format is torch.contiguous_format or images.dim() != 4:
        return images
    # `contiguous` would leave grey images as they are: one channel stands last as well as first
    return torch.empty_like(images, memory_format=memory_format).copy_(images)


def _batch(
    images: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, networks: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of some networks: `index` is `(batch,)` for all, or `(networks, batch)` with rows for each."""
    if index.dim() == 2:
        index = index[networks]
    if labels.dim() == 1:
        return images[index], labels[index]
    labels = labels[networks]
    return images[index], labels[:, index] if index.dim() == 1 else labels.gather(1, index)


def _forward(
    module: nn.Module,
    stacked: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    chunk_size: int | None,
    own_images: bool = False,
    way: _Way = _Way(),  # noqa: B008 (a tuple of constants)
) -> torch.Tensor:
    """(networks, images, classes); running statistics among the stacked tensors are updated in place in training mode.

    With `own_images` each network has its own: `(networks, images, channels, height, width)`.
    """
    if way.one_by_one:
        shared = None if own_images else _in_format(images, way.memory_format)
        outputs = []
        for i in range(len(next(iter(stacked.values())))):
            x = _in_format(images[i], way.memory_format) if own_images else shared
            outputs.append(network_logits(module, {name: tensor[i] for name, tensor in stacked.items()}, x))
        return torch.stack(outputs)
    return vmap(
        lambda tensors, x: network_logits(module, tensors, x),
        in_dims=(0, 0 if own_images else None),
        randomness="different",
        chunk_size=chunk_size,
    )(dict(stacked), images)


def network_logits(module: nn.Module, tensors: Mapping[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Outputs `(images, classes)` of one network, its state dict given, in the mode that the module is in."""
    return plain_logits(functional_call(module, dict(tensors), (images,)))


def plain_logits(output: Any) -> torch.Tensor:
    """Logits of what a module returned: models of transformers return an object."""
    return output if isinstance(output, torch.Tensor) else output.logits


def _with_buffers(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of the tensors with every buffer of the module, so that nothing the networks update is shared."""
    networks = len(next(iter(tensors.values())))
    missing = {name: b.expand(networks, *b.shape) for name, b in module.named_buffers() if name not in tensors}
    return {name: tensor.detach().clone() for name, tensor in (dict(tensors) | missing).items()}


def _checked(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, a tied parameter under one of its names only."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    known = parameters | dict(module.named_buffers(remove_duplicate=False))
    kind = type(module).__name__
    counts = {len(tensor) if tensor.dim() else 0 for tensor in tensors.values()}
    for name, tensor in tensors.items():
        if name not in known:
            raise ValueError(f"{name} is not a tensor of {kind}; its tensors are {', '.join(known)}.")
        if tensor.shape[1:] != known[name].shape or len(counts) != 1:
            expected = ", ".join(["networks", *map(str, known[name].shape)])
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, {kind} expects ({expected}) with as many networks for all tensors."
            )
    given = {id(known[name]): name for name in reversed(list(tensors))}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in given]
    if missing:
        raise ValueError(f"{missing[0]} of {kind} is missing among the tensors.")
    return {name: tensor for name, tensor in tensors.items() if given[id(known[name])] == name}


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, was in before:
            part.training = was
