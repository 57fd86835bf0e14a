"""The function of a network as a function of its tensors: what a symmetry must not change, and what it is tried on."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

MAX_DRAWS = 10  # of random weights, until the network says something about its inputs


class NetworkFunction:
    """A copy of a module as a function of its tensors, in float64, with random weights and biases.

    The weights are drawn anew, because default values (zeros and ones in norms and biases, attention that is almost uniform)
    would hide tensors that a group forgot.
    """

    def __init__(
        self, module: nn.Module, example_inputs: Any, select_outputs: Callable[[Any], Any] | None = None
    ) -> None:
        self.select_outputs = select_outputs or (lambda outputs: outputs)
        for seed in range(MAX_DRAWS):
            self._draw(module, example_inputs, torch.Generator().manual_seed(seed))
            if self._is_alive():
                break

    def _draw(self, module: nn.Module, example_inputs: Any, generator: torch.Generator) -> None:
        self.module = copy.deepcopy(module).cpu().double().eval().requires_grad_(True)
        with torch.no_grad():
            for tensor in self.module.parameters():
                tensor.copy_(_random_parameter(tensor, generator))
            for tensor in self.module.buffers():
                if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
                    tensor += 0.5 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
        self.args, self.kwargs = _call_arguments(example_inputs, generator)
        self._calibrate_norms(generator)
        self.tensors, self.ties = _named_tensors(self.module)
        with torch.no_grad():
            self.expected = self.outputs()

    @torch.no_grad()
    def _is_alive(self) -> bool:
        """False if no output notices a small change of the floating inputs: a narrow layer of ReLUs may be silent on all of them.

        Tensors before it would then seem not to matter, and groups that forget them would hold.
        """
        generator, before = torch.Generator().manual_seed(3), (self.args, self.kwargs)
        inputs = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        if not inputs:
            return True

        def nudged(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value + 1e-4 * torch.randn(value.shape, generator=generator, dtype=value.dtype)

        self.args = tuple(map(nudged, self.args))
        self.kwargs = {name: nudged(value) for name, value in self.kwargs.items()}
        try:
            return self.change({}) > 0
        finally:
            self.args, self.kwargs = before

    @torch.no_grad()
    def _calibrate_norms(self, generator: torch.Generator) -> None:
        """Batch norms get statistics near those of the random network, all different, so that deep ones pass a signal on."""
        norms = [norm for norm in self.module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
        norms = [norm for norm in norms if norm.running_var is not None]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        with suppress(ValueError):  # one value per channel has no variance; the norms before it are done
            self.outputs()
        for norm in norms:
            norm.eval()
            mean, variance = norm.running_mean, norm.running_var
            scale = variance.mean()
            mean += 0.3 * scale.sqrt() * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
            variance += scale * torch.rand(variance.shape, generator=generator, dtype=variance.dtype)

    def outputs(self, tensors: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """All output tensors, with some of the module's tensors replaced."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a module that draws noise draws the same noise each time
            outputs = torch.func.functional_call(self.module, dict(tensors or {}), self.args, self.kwargs)
        found = list(floating_tensors(self.select_outputs(outputs)))
        if not found:
            raise ValueError("The module returned no floating tensor, so its symmetries cannot be tried.")
        return found

    @torch.no_grad()
    def change(self, moved: Mapping[str, Tensor]) -> float:
        """Largest relative change of an output with some of the tensors replaced; infinite where one is not a number."""
        changes = [
            ((new - old).norm() / old.norm().clamp_min(1e-300)).item()
            for new, old in zip(self.outputs(moved), self.expected, strict=True)
        ]
        return max(math.inf if math.isnan(change) else change for change in changes)

    def gradients(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Gradients of random projections of the outputs, each output scaled to norm 1, by every parameter that has one."""
        generator = torch.Generator().manual_seed(2)
        parameters = {id(parameter) for parameter in self.module.parameters()}
        leaves = {n: t.detach().requires_grad_(True) for n, t in self.tensors.items() if id(t) in parameters}
        with torch.enable_grad():
            outputs = self.outputs(leaves)
            for number in range(count):
                total = sum(
                    (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
                    / output.norm()
                    for output in outputs
                )
                gradients = torch.autograd.grad(
                    total, [*leaves.values()], allow_unused=True, retain_graph=number < count - 1
                )
                yield {
                    name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None
                }


def _random_parameter(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
    if tensor.dim() < 2:  # scales stay around 1 and shifts around 0, or a deep network would forget its input
        return (tensor.mean() > 0.5) + 0.3 * noise
    fan_in = tensor.numel() // (tensor.shape[0] if tensor.shape[0] > 1 else tensor.shape[-1])
    return noise / math.sqrt(max(fan_in, 1))


def _call_arguments(example_inputs: Any, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call, floating tensors in float64; constant ones become noise."""

    def prepare(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value.cpu() if isinstance(value, Tensor) else value
        value = value.detach().cpu().double()
        if (
            value.numel() > 1 and value.min() == value.max()
        ):  # zeros or ones as a placeholder would hide the first layer
            return torch.randn(value.shape, generator=generator, dtype=value.dtype)
        return value

    if isinstance(example_inputs, Tensor):
        return (prepare(example_inputs),), {}
    if isinstance(example_inputs, Mapping):
        return (), {name: prepare(value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, tuple | list):
        return tuple(prepare(value) for value in example_inputs), {}
    raise ValueError(
        f"example_inputs is {type(example_inputs).__name__}, expected a tensor, a tuple of positional arguments or a dict."
    )


def _named_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of the state dict by their first name, and the further names of tied ones."""
    stored = module.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in stored.items():
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) in names:
            ties[name] = names[id(tensor)]
        else:
            names[id(tensor)], tensors[name] = name, tensor
    return tensors, ties


def floating_tensors(outputs: Any) -> Iterator[Tensor]:
    """Floating tensors of whatever a module returned: a tensor, or tensors inside tuples, lists and mappings."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from floating_tensors(value)
    elif isinstance(outputs, tuple | list):
        for value in outputs:
            yield from floating_tensors(value)
