"""Function-preserving symmetries of a network: find them, verify them, draw them, apply them, align with them.

A *group* is a set of `size` interchangeable units (hidden channels, for instance) and the slices of tensors that each unit
owns. Moving the units in all of these tensors at once leaves the function of the network as it is. One convention holds
throughout: after a permutation `p`, unit `u` carries the values that unit `p[u]` had before.

How groups are found: torch-pruning's dependency graph says which channel of one module is which channel of the next. Every
channel of every module is a node of one large graph here, and so is every index along an axis of a tensor; its connected
components are the units. Tied tensors, shared modules and concatenations are joined on the way. Where units cannot move freely,
they may in blocks (attention heads) and alike within all blocks (channels inside heads). Nothing is trusted: each group
is tried on the function itself, in float64, with random weights, and is offered only if the function stays while moving one of
its tensors alone changes it. Names of tensors and modules play no part.

How networks are aligned: weight matching, after Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo
Permutation Symmetries" (ICLR 2023), arXiv 2209.04836. Coordinate descent over the groups: with all others fixed, the permutation
of one group that brings its tensors nearest to the reference (in L2) is a linear assignment problem. It starts from the
order as it is or from an assignment of signatures (values sorted along every axis whose order is still unknown), which by itself
finds a network that was only permuted: from the nearer of the two.
"""

import copy
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

SYMMETRY_FORMAT = 1
KINDS = ("permutation",)
NUM_DRAWS = 3
TOLERANCE = 1e-5  # relative change of the outputs that still counts as rounding (some models compute norms in float32)
SENSITIVITY = 1e-4  # ... and which must be this much smaller than the change when only one tensor is moved


# --- what a symmetry is


def _check_integer(value: Any, what: str, minimum: int = 0) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**62:
        raise ValueError(f"{what} is {value!r}, expected an integer of at least {minimum} (and below 2**62).")


@dataclass(frozen=True)
class SymmetryItem:
    """The slices that the units of a group own along one axis of one tensor.

    Args:
        tensor (`str`): key in the state dict.
        axis (`int`): axis of the tensor, counted from 0.
        index (`tuple`): `(offset, stride, repeat, step)`, unit `u` owns `offset + u * stride + k * step` for `k < repeat`; or,
            where that does not describe it, one tuple of `repeat` indices for each unit.
    """

    tensor: str
    axis: int
    index: tuple[int, int, int, int] | tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        where = f"Symmetry item {self.tensor!r}"
        if not isinstance(self.tensor, str) or not self.tensor:
            raise ValueError(f"{where}: the tensor must be a name, as in the state dict.")
        _check_integer(self.axis, f"{where}: axis")
        if not isinstance(self.index, tuple) or not self.index:
            raise ValueError(f"{where}: index must be (offset, stride, repeat, step) or one tuple of indices a unit.")
        if not self.is_affine:
            lengths = {len(row) if isinstance(row, tuple) else None for row in self.index}
            if len(lengths) != 1 or lengths & {None, 0}:
                raise ValueError(f"{where}: every unit must own the same number of indices (at least one).")
        for value in self.index if self.is_affine else (i for row in self.index for i in row):
            _check_integer(value, f"{where}: index value")
        if self.is_affine:
            _check_integer(self.index[2], f"{where}: repeat", minimum=1)

    @property
    def is_affine(self) -> bool:
        """True where the index is `(offset, stride, repeat, step)`."""
        return len(self.index) == 4 and not any(isinstance(value, tuple) for value in self.index)

    @classmethod
    def from_rows(cls, tensor: str, axis: int, rows: np.ndarray) -> "SymmetryItem":
        """Shortest description of `rows` (int array of shape `(units, repeat)`)."""
        units, repeat = rows.shape
        offset = int(rows[0, 0])
        stride = int(rows[1, 0]) - offset if units > 1 else repeat
        step = int(rows[0, 1]) - offset if repeat > 1 else 1
        affine = offset + np.arange(units)[:, None] * stride + np.arange(repeat) * step
        if min(stride, step) >= 0 and np.array_equal(affine, rows):
            return cls(tensor, axis, (offset, stride, repeat, step))
        return cls(tensor, axis, tuple(tuple(row) for row in rows.tolist()))

    def rows(self, size: int) -> np.ndarray:
        """Indices that each of `size` units owns, int64 of shape `(size, repeat)`."""
        if not self.is_affine:
            return np.array(self.index, dtype=np.int64)
        offset, stride, repeat, step = self.index
        return offset + np.arange(size)[:, None] * stride + np.arange(repeat) * step

    def check(self, size: int, length: int | None = None) -> None:
        """Check the numbers against the units of the group and the length of the axis, without making the rows.

        Raises:
            ValueError: if units overlap, if their number is not `size`, or if an index lies outside the axis.
        """
        where = f"Symmetry item {self.tensor!r}, axis {self.axis}"
        if self.is_affine:
            offset, stride, repeat, step = self.index
            last = offset + (size - 1) * stride + (repeat - 1) * step
            common = math.gcd(stride, step)  # a step of lcm(stride, step) meets the same index twice
            steps = (step // common, stride // common) if common else (0, 0)
            overlap = (
                (steps[0] < size and steps[1] < repeat)
                if stride and step
                else (size > 1 and not stride) or (repeat > 1 and not step)
            )
        else:
            values = [value for row in self.index for value in row]
            if len(self.index) != size:
                raise ValueError(f"{where}: {len(self.index)} rows of indices, the group has {size} units.")
            last, overlap = max(values), len(set(values)) != len(values)
        if overlap:
            raise ValueError(f"{where}: two units own the same index.")
        if length is not None and last >= length:
            raise ValueError(f"{where}: index {last} is outside of an axis of length {length}.")


@dataclass(frozen=True)
class SymmetryGroup:
    """Units that can trade places without changing the function of the network.

    Args:
        name (`str`): unique in its spec; tensor and axis of the first item.
        kind (`str`): `"permutation"`.
        size (`int`): number of units, at least 2.
        items (`tuple[SymmetryItem, ...]`): what the units own; all of it moves together.
        max_error (`float`): largest relative change of the outputs seen when the group was verified.
    """

    name: str
    kind: str
    size: int
    items: tuple[SymmetryItem, ...]
    max_error: float = field(default=0.0, compare=False)  # a measurement, not a part of what the group is

    def __post_init__(self) -> None:
        where = f"Symmetry group {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"{where}: the name must be a text that is not empty.")
        if self.kind not in KINDS:
            raise ValueError(f"{where}: kind is {self.kind!r}, expected one of {KINDS}.")
        _check_integer(self.size, f"{where}: size", minimum=2)
        if not isinstance(self.max_error, float | int) or not 0 <= self.max_error < math.inf:
            raise ValueError(f"{where}: max_error is {self.max_error!r}, expected a number of at least 0.")
        places = [(item.tensor, item.axis) for item in self.items]
        if not places or len(set(places)) != len(places):
            raise ValueError(f"{where}: needs items, and no two for the same axis of a tensor.")
        for item in self.items:
            item.check(self.size)

    def __repr__(self) -> str:
        return f"SymmetryGroup({self.name!r}, {self.kind}, size={self.size}, items={len(self.items)})"


@dataclass(frozen=True)
class RejectedGroup:
    """A group that was found but is not offered, with the reason."""

    name: str
    size: int
    reason: str


class VerificationReport(NamedTuple):
    """What the function of a network did when one group was moved.

    Args:
        group (`str`): name of the group.
        max_error (`float`): largest relative change of the outputs over fixed-point-free draws; rounding if the group holds.
        control_error (`float`): the same when only the first tensor of the group is moved; must be clearly larger.
        ok (`bool`): True if the group holds and the control does not.
    """

    group: str
    max_error: float
    control_error: float
    ok: bool


@dataclass(frozen=True, repr=False)
class SymmetrySpec:
    """All verified symmetries of one architecture. A *draw* is a list with one int64 permutation a group, in their order.

    Args:
        groups (`tuple[SymmetryGroup, ...]`): what holds. Any two groups commute.
        rejected (`tuple[RejectedGroup, ...]`): what was found and left out.
        shapes (`dict[str, tuple[int, ...]]`): shapes of the tensors that the groups touch. Tensors that are missing here are
            only checked against the largest index.
        ties (`dict[str, str]`): further names of tied tensors, and the name under which the groups know them.
    """

    groups: tuple[SymmetryGroup, ...]
    rejected: tuple[RejectedGroup, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError(
                f"Two symmetry groups have the same name: {sorted(n for n in names if names.count(n) > 1)[0]!r}."
            )
        for name, shape in self.shapes.items():
            for length in shape:
                _check_integer(length, f"Shape of {name!r}: {shape}; a length")
        for group in self.groups:
            for item in group.items:
                shape = self.shapes.get(item.tensor)
                if shape is not None and item.axis >= len(shape):
                    raise ValueError(
                        f"Symmetry item {item.tensor!r}: axis {item.axis} does not exist in shape {shape}."
                    )
                if shape is not None:
                    item.check(group.size, shape[item.axis])

    def __repr__(self) -> str:
        units = sum(group.size for group in self.groups)
        return f"SymmetrySpec(groups={len(self.groups)}, units={units}, rejected={len(self.rejected)})"

    def to_json(self) -> str:
        """The spec as JSON text."""
        return json.dumps({"format": SYMMETRY_FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "SymmetrySpec":
        """The spec that `to_json` wrote; numbers from elsewhere are checked.

        Raises:
            ValueError: if the text is not JSON, a field is missing, or a number is impossible.
        """
        try:
            data = json.loads(text)
            if data["format"] != SYMMETRY_FORMAT:
                raise ValueError(f"Symmetry JSON has format {data['format']!r}, this version reads {SYMMETRY_FORMAT}.")
            return cls(
                groups=tuple(_group_from_dict(group) for group in data["groups"]),
                rejected=tuple(RejectedGroup(**group) for group in data["rejected"]),
                shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
                ties=dict(data["ties"]),
            )
        except json.JSONDecodeError as error:
            raise ValueError(f"Symmetry JSON cannot be read: {error}.") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Symmetry JSON has a missing or wrong field: {error}.") from error

    def identity(self, batch_size: int | None = None) -> list[Tensor]:
        """The draw that changes nothing; permutations of shape `(size,)` or `(batch_size, size)`."""
        batch = () if batch_size is None else (batch_size,)
        return [torch.arange(group.size).expand(*batch, group.size).clone() for group in self.groups]

    def draw(self, generator: torch.Generator | None = None, batch_size: int | None = None) -> list[Tensor]:
        """Uniformly random permutations, int64 of shape `(size,)` or `(batch_size, size)`, one a group."""
        batch = () if batch_size is None else (batch_size,)
        return [
            torch.rand(*batch, group.size, generator=generator, dtype=torch.float64).argsort(-1)
            for group in self.groups
        ]

    def invert(self, draw: Sequence[Tensor]) -> list[Tensor]:
        """The draw that undoes `draw`."""
        self._check_draw(draw)
        return [permutation.argsort(-1) for permutation in draw]

    def compose(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
        """The draw that does what applying `first` and then `second` does."""
        self._check_draw(first)
        self._check_draw(second)
        return [one.gather(-1, two) for one, two in zip(first, second, strict=True)]

    def apply(self, state_dict: Mapping[str, Tensor], draw: Sequence[Tensor]) -> dict[str, Tensor]:
        """A network with the same function and its units in another order.

        Args:
            state_dict: any mapping from names to tensors, of any dtype. It is not changed.
            draw: one permutation of shape `(size,)` for each group.

        Returns:
            A new dict in the same order: permuted copies, and all other tensors as they are. Tied tensors stay tied.

        Raises:
            ValueError: if a tensor is missing or has another shape, or if the draw does not fit the groups.
        """
        self._check_draw(draw)
        self.check(state_dict)
        names = self._stored_names(state_dict)
        result = dict(state_dict)
        for group, permutation in zip(self.groups, draw, strict=True):
            for item in group.items:
                moved = _move(result[names[item.tensor][0]], item, permutation)
                result.update(dict.fromkeys(names[item.tensor], moved))
        return result

    def check(self, state_dict: Mapping[str, Tensor]) -> None:
        """Check that a state dict has every tensor of the spec, in its shape.

        Raises:
            ValueError: naming the tensor, what was found and what was expected.
        """
        names = self._stored_names(state_dict)
        for group in self.groups:
            for item in group.items:
                if not names[item.tensor]:
                    raise ValueError(
                        f"The state dict has no tensor {item.tensor!r}, which symmetry group {group.name!r} moves. "
                        "Make a spec for this architecture with find_symmetries(module, example_inputs)."
                    )
                for name in names[item.tensor]:
                    found, expected = tuple(state_dict[name].shape), self.shapes.get(item.tensor)
                    if expected is not None and found != expected:
                        raise ValueError(
                            f"{name} has shape {found}, the symmetry spec expects {expected}. "
                            "Make a spec for this architecture with find_symmetries(module, example_inputs)."
                        )
                    if item.axis >= len(found):
                        raise ValueError(
                            f"{name} has shape {found}, symmetry group {group.name!r} moves axis {item.axis}."
                        )
                    item.check(group.size, found[item.axis])

    def verify(
        self, module: nn.Module, example_inputs: Any, select_outputs: Callable[[Any], Any] | None = None
    ) -> list[VerificationReport]:
        """Try every group on the function of a module (a copy of it, in float64, with random weights).

        Args:
            module: network of the architecture that the spec is for.
            example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            select_outputs: picks what must not change from what the module returns; as for `find_symmetries`.

        Returns:
            One `VerificationReport` for each group, in their order.
        """
        function = _Function(module, example_inputs, select_outputs)
        self.check(function.tensors)
        return [function.report(group) for group in self.groups]

    @cached_property
    def _aliases(self) -> dict[str, list[str]]:
        aliases = {item.tensor: [item.tensor] for group in self.groups for item in group.items}
        for alias, name in self.ties.items():
            aliases.setdefault(name, [name]).append(alias)
        return aliases

    def _stored_names(self, state_dict: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """The names under which a state dict holds each tensor of the spec; files keep only one name of tied tensors."""
        return {name: [alias for alias in aliases if alias in state_dict] for name, aliases in self._aliases.items()}

    def _check_draw(self, draw: Sequence[Tensor]) -> None:
        sizes = [tuple(permutation.shape[-1:]) for permutation in draw]
        expected = [(group.size,) for group in self.groups]
        if sizes != expected:
            raise ValueError(f"The draw has permutations of sizes {sizes}, the symmetry spec expects {expected}.")


def _group_from_dict(data: dict[str, Any]) -> SymmetryGroup:
    items = [{**item, "index": _tuples(item["index"])} for item in data["items"]]
    return SymmetryGroup(**{**data, "items": tuple(SymmetryItem(**item) for item in items)})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def axis_index(item: SymmetryItem, permutations: Tensor, length: int) -> Tensor:
    """Where the values along one axis come from after its units were permuted.

    Args:
        item: what the units own along the axis.
        permutations: int64 of shape `(..., size)`, any number of permutations of the units.
        length: length of the axis.

    Returns:
        int64 of shape `(..., length)`: `tensor.index_select(item.axis, axis_index(...))` is the permuted tensor.
    """
    rows = torch.from_numpy(item.rows(permutations.shape[-1])).to(permutations.device)  # (size, repeat)
    index = torch.arange(length, device=permutations.device).repeat(*permutations.shape[:-1], 1)
    index[..., rows.flatten()] = rows[permutations].flatten(-2)
    return index


def _move(tensor: Tensor, item: SymmetryItem, permutation: Tensor) -> Tensor:
    index = axis_index(item, permutation.to(tensor.device), tensor.shape[item.axis])
    if tensor.dtype.is_floating_point and tensor.element_size() == 1:  # float8 has no index_select: move its bytes
        return tensor.view(torch.uint8).index_select(item.axis, index).view(tensor.dtype)
    return tensor.index_select(item.axis, index)


# --- the function on which groups are tried


class _Function:
    """A copy of a module as a function of its tensors, in float64, with random weights and biases.

    The weights are drawn anew, because default values (zeros and ones in norms and biases, attention that is almost uniform)
    would hide tensors that a group forgot.
    """

    def __init__(
        self, module: nn.Module, example_inputs: Any, select_outputs: Callable[[Any], Any] | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.select_outputs = select_outputs or (lambda outputs: outputs)
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
        found = list(_tensors(self.select_outputs(outputs)))
        if not found:
            raise ValueError("The module returned no floating tensor, so its symmetries cannot be tried.")
        return found

    @torch.no_grad()
    def change(self, group: SymmetryGroup, permutation: Tensor, items: Sequence[SymmetryItem] | None = None) -> float:
        """Largest relative change of an output when `items` (default: all of the group) are moved."""
        moved: dict[str, Tensor] = {}
        for item in group.items if items is None else items:
            moved[item.tensor] = _move(moved.get(item.tensor, self.tensors[item.tensor]), item, permutation)
        changes = [
            ((new - old).norm() / old.norm().clamp_min(1e-300)).item()
            for new, old in zip(self.outputs(moved), self.expected, strict=True)
        ]
        return max(math.inf if math.isnan(change) else change for change in changes)

    def report(self, group: SymmetryGroup) -> VerificationReport:
        """Try one group: fixed-point-free permutations, and as a control its first tensor alone."""
        generator = torch.Generator().manual_seed(1)
        error = 0.0
        for _ in range(NUM_DRAWS):
            permutation = _derangement(group.size, generator)
            error = max(error, self.change(group, permutation))
            if error > TOLERANCE:
                break
        control = self.change(group, permutation, group.items[:1])
        return VerificationReport(group.name, error, control, error < min(TOLERANCE, SENSITIVITY * control))

    def surely_fails(self, group: SymmetryGroup) -> bool:
        """One forward pass instead of four, for guesses."""
        return self.change(group, _derangement(group.size, torch.Generator().manual_seed(1))) > TOLERANCE


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


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Floating tensors of whatever a module returned: a tensor, or tensors inside tuples, lists and mappings."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, tuple | list):
        for value in outputs:
            yield from _tensors(value)


def _derangement(size: int, generator: torch.Generator) -> Tensor:
    """A random permutation without fixed point: one cycle through all units in random order."""
    order = torch.randperm(size, generator=generator)
    permutation = torch.empty_like(order)
    permutation[order] = order.roll(1)
    return permutation


# --- finding groups


def find_symmetries(
    module: nn.Module,
    example_inputs: Any,
    time_limit_s: float = 120.0,
    select_outputs: Callable[[Any], Any] | None = None,
) -> SymmetrySpec:
    """Find the permutation symmetries of a network, and verify each of them on its function.

    Args:
        module: any network. It is not changed; a copy is traced and tried in float64 on the CPU.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. Small ones are enough and
            fast: every group costs four forward passes.
        time_limit_s: seconds after which groups that are not yet verified are left out.
        select_outputs: picks what must not change from what the module returns (default: every floating tensor in it), for
            instance `lambda outputs: outputs.logits` where hidden states are returned as well.

    Returns:
        The spec: verified groups, and the rejected ones with the reason. The same for every call.

    Raises:
        ValueError: if the module does not run on the example inputs or cannot be traced.
    """
    deadline = time.monotonic() + time_limit_s
    function = _Function(module, example_inputs, select_outputs)
    trial = _Trial(function)
    groups: list[SymmetryGroup] = []
    rejected: list[RejectedGroup] = []
    for found in _traced_groups(function, deadline):
        if time.monotonic() > deadline:
            rejected.append(RejectedGroup(found.name, found.size, f"not verified within {time_limit_s:g} s"))
            continue
        verified, report = trial.verified_groups(found)
        groups.extend(verified)
        if not verified:
            reason = "its units are those of a model output; " if found.reaches_output else ""
            reason += f"changes the function by {report.max_error:.1e} (control {report.control_error:.1e})"
            rejected.append(RejectedGroup(found.name, found.size, reason))
    touched = {item.tensor for group in groups for item in group.items}
    return SymmetrySpec(
        groups=tuple(groups),
        rejected=tuple(rejected),
        shapes={name: tuple(tensor.shape) for name, tensor in function.tensors.items() if name in touched},
        ties={alias: name for alias, name in function.ties.items() if name in touched},
    )


_Rows = dict[tuple[str, int], np.ndarray]  # (tensor, axis) -> indices, int64 of shape (units, repeat)


class _FoundGroup(NamedTuple):
    """Units that the graph says belong together, before anything is tried."""

    rows: _Rows
    reaches_output: bool

    @property
    def name(self) -> str:
        return _name(self.rows)

    @property
    def size(self) -> int:
        return len(next(iter(self.rows.values())))


def _name(rows: _Rows) -> str:
    (tensor, axis), indices = next(iter(rows.items()))
    return f"{tensor}@{axis}" + (f"+{indices.min()}" if indices.min() else "")


def _strided(rows: _Rows) -> _Rows:
    """The same indices, dealt out to the units in turns: a flatten after the channels became the last axis."""
    return {key: np.sort(indices, axis=None).reshape(indices.shape[::-1]).T for key, indices in rows.items()}


def _blocks(rows: _Rows, count: int) -> _Rows:
    """Units joined to `count` blocks that move as a whole: attention heads, for instance."""
    return {key: indices.reshape(count, -1) for key, indices in rows.items()}


def _within(rows: _Rows, count: int) -> _Rows:
    """Units that stay in their block and move alike in each of `count` blocks: channels inside attention heads."""
    return {
        key: indices.reshape(count, -1, indices.shape[1]).transpose(1, 2, 0).reshape(len(indices) // count, -1)
        for key, indices in rows.items()
    }


def _parts(rows: _Rows, by_column: bool) -> list[_Rows]:
    """The same group cut up by module, and by the few rows of one module that a unit owns (fused query, key and value)."""
    parts: dict[tuple[str, int], _Rows] = {}
    for (tensor, axis), indices in rows.items():
        module = tensor.rpartition(".")[0]
        columns = indices.T[:, :, None] if by_column and indices.shape[1] <= 4 else [indices]
        for number, column in enumerate(columns):
            parts.setdefault((module, number), {})[tensor, axis] = column
    return list(parts.values())


def _joined(parts: Sequence[_Rows]) -> _Rows:
    joined: _Rows = {}
    for part in parts:
        for key, indices in part.items():
            joined[key] = np.concatenate([joined[key], indices], axis=1) if key in joined else indices
    return joined


class _Trial:
    """Turns what the graph says into groups that hold, by trying variants on the function.

    The number of blocks in a layer (heads of an attention, groups of a norm) is not read from anywhere: every divisor of the
    number of units is tried, those that held before first.
    """

    def __init__(self, function: _Function) -> None:
        self.function = function
        self.block_counts: list[int] = []

    def verified_groups(self, found: _FoundGroup) -> tuple[list[SymmetryGroup], VerificationReport]:
        """All groups that hold (perhaps none), and the report on the group as it was found."""
        group = _permutation_group(found.rows)
        report = self.function.report(group)
        if report.ok:
            return [replace(group, max_error=report.max_error)], report
        strided = self._guess(_strided(found.rows)) if any(rows.shape[1] > 1 for rows in found.rows.values()) else None
        if strided or found.reaches_output:
            return [strided] if strided else [], report
        return self._block_groups(found), report

    def _block_groups(self, found: _FoundGroup) -> list[SymmetryGroup]:
        """Blocks that move as a whole, and units that move within blocks."""
        divisors = [count for count in range(found.size // 2, 1, -1) if found.size % count == 0]
        known = [count for count in self.block_counts if count in divisors]
        for count in dict.fromkeys([*known, *divisors]):  # as many blocks as hold
            whole = self._guess(_blocks(found.rows, count), f"/{count} blocks")
            if whole:
                self._remember(count)
                return [whole, *self._groups_within(found.rows, count)]
        for count in dict.fromkeys([*known, *reversed(divisors)]):  # no whole block moves: as few as hold
            if self._guess(_within(found.rows, count), f"/within {count} blocks"):
                self._remember(count)
                return self._groups_within(found.rows, count)
        return []

    def _groups_within(self, rows: _Rows, count: int) -> list[SymmetryGroup]:
        """Pairs of parts that can move alone (query with key, value with output), and what is left as one group."""
        groups = []
        for by_column in (True, False):
            pairs, rows = self._pairs_within(_parts(rows, by_column), count)
            groups.extend(pairs)
        rest = self._guess(_within(rows, count), f"/within {count} blocks") if rows else None
        return [*groups, rest] if rest else groups

    def _pairs_within(self, parts: list[_Rows], count: int) -> tuple[list[SymmetryGroup], _Rows]:
        """Verified pairs, and the rows of all other parts."""
        pairs, left = [], []
        while parts:
            first, *parts = parts
            for number, second in enumerate(parts):
                pair = self._guess(_within(_joined([first, second]), count), f"/within {count} blocks")
                if pair:
                    pairs.append(pair)
                    del parts[number]
                    break
            else:
                left.append(first)
        return pairs, _joined(left)

    def _remember(self, count: int) -> None:
        self.block_counts = list(dict.fromkeys([count, *self.block_counts]))

    def _guess(self, rows: _Rows, suffix: str = "") -> SymmetryGroup | None:
        group = _permutation_group(rows, suffix)
        if self.function.surely_fails(group):
            return None
        report = self.function.report(group)
        return replace(group, max_error=report.max_error) if report.ok else None


def _permutation_group(rows: _Rows, suffix: str = "") -> SymmetryGroup:
    items = tuple(SymmetryItem.from_rows(tensor, axis, indices) for (tensor, axis), indices in rows.items())
    return SymmetryGroup(_name(rows) + suffix, "permutation", len(next(iter(rows.values()))), items)


class _Index(NamedTuple):
    """What torch-pruning's index mappings read: a channel, and the channel it came from."""

    idx: int
    root_idx: int


def _traced_groups(function: _Function, deadline: float) -> list[_FoundGroup]:
    """Groups of one module, from connected components of its channel graph."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    with _recurrent_layers_replaced(function.module):
        channels = _ChannelGraph(_dependency_graph(function), function.tensors, deadline)
    if not channels.edges:
        return []
    edges = np.concatenate(channels.edges, axis=1)  # (2, edges)
    codes, ends = np.unique(edges, return_inverse=True)
    ends = ends.reshape(edges.shape)
    links = coo_array((np.ones(ends.shape[1], dtype=np.int8), (ends[0], ends[1])), shape=(len(codes), len(codes)))
    units = connected_components(links, directed=False)[1]
    return _groups_of_units(codes, units, channels)


def _dependency_graph(function: _Function) -> Any:
    """torch-pruning's graph of a module."""
    import torch_pruning
    from torch_pruning.dependency import index_mapping

    def outputs_with_history(outputs: Any) -> list[Tensor]:
        return [tensor for tensor in _tensors(function.select_outputs(outputs)) if tensor.grad_fn is not None]

    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # about parameters outside of modules that it knows; they are handled below
        try:
            graph.build_dependency(
                function.module,
                (function.args, function.kwargs),
                forward_fn=lambda module, inputs: module(*inputs[0], **inputs[1]),
                output_transform=outputs_with_history,
                customized_pruners=_conv1d_pruners(function.module),
                verbose=False,
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            nodes = getattr(graph, "module2node", None)
            if not nodes:
                raise ValueError(f"torch-pruning cannot trace this module: {type(error).__name__}: {error}") from error
            # the graph stands, only the index mapping of one node failed: do the others; verification judges the result
            for node in nodes.values():
                update = getattr(index_mapping, f"update_{node.type.name.lower()}_index_mapping", None)
                if update is not None:
                    with suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
                        update(graph, node)
    for node in graph.module2node.values():
        _correct_mapping(node)
    return graph


def _correct_mapping(node: Any) -> None:
    """Index mappings that torch-pruning guesses wrong or leaves out, from the shapes that autograd remembers."""
    history = node.grad_fn
    shapes = [tuple(output.shape) for output in getattr(history, "_input_metadata", ())]
    kind = history.name() if hasattr(history, "name") else ""
    if kind.startswith("CatBackward") and shapes:
        axis = torch.tensor(history._saved_dim, dtype=torch.uint64).view(torch.int64).item()  # -1 is kept as 2**64 - 1
        sizes = getattr(node.module, "concat_sizes", None) or [None]
        if None in sizes or sum(sizes) != shapes[0][axis]:  # along another axis: channels stay where they are
            for neighbour in node.inputs:
                _set_mappings(node, neighbour, 1, None, None)
        sources = [source for source, _ in history.next_functions]
        if axis == 1 and len({id(source) for source in sources}) == len(sources):
            lengths = [source._input_metadata[number].shape[1] if source else 0 for source, number in history.next_functions]
            for source, stop, length in zip(sources, np.cumsum(lengths).tolist(), lengths, strict=True):
                for neighbour in node.inputs:
                    if neighbour.grad_fn is source and sum(lengths) == shapes[0][1]:
                        part = (stop - length, stop)
                        _set_mappings(node, neighbour, 1, _Part(*part, False), _Part(*part, True))
    elif kind.startswith("Split") and history._saved_dim == (2 if len(shapes[0]) == 3 else 1):
        axis = history._saved_dim
        starts = np.cumsum([0, *(shape[axis] for shape in shapes)])
        for reader in node.outputs:
            for source, number in getattr(reader.grad_fn, "next_functions", ()):
                if source is history:
                    start, stop = starts[number], starts[number + 1]
                    _set_mappings(node, reader, 0, _Part(start, stop, False), _Part(start, stop, True))
    elif kind.startswith("Slice") and history._saved_step != 1:  # every other pixel; channels are not skipped
        for neighbour in node.inputs:
            _set_mappings(node, neighbour, 0, None, None)
    elif "View" in kind and shapes and len(shapes[0]) == 5:
        _correct_shuffle(node, shapes[0])
    elif (
        kind.startswith("Expand") and shapes and len(shapes[0]) == 5
    ):  # key and value heads repeated for their queries
        repeat = shapes[0][2] // history._saved_self_sym_sizes[2]
        for neighbour in node.inputs:
            _set_mappings(
                node, neighbour, 0, _Repeat(repeat, shapes[0][4], True), _Repeat(repeat, shapes[0][4], False)
            )
    elif kind.startswith("ScaledDotProduct") and history._saved_query.shape[1] != history._saved_key.shape[1]:
        repeat = history._saved_query.shape[1] // history._saved_key.shape[1]
        size = history._saved_key.shape[3]
        shared = [source for source, _ in history.next_functions[1:3]]  # keys and values
        for neighbour in node.inputs:
            if neighbour.grad_fn in shared:
                _set_mappings(node, neighbour, 0, _Repeat(repeat, size, True), _Repeat(repeat, size, False))


def _correct_shuffle(node: Any, shape: tuple[int, ...]) -> None:
    """Channels seen as `(batch, groups, channels of a group, height, width)`, and back with the two swapped."""
    chain = [node]
    while len(chain) < 4 and len(chain[-1].outputs) == 1:
        chain.append(chain[-1].outputs[0])
        history = chain[-1].grad_fn
        kind = history.name() if hasattr(history, "name") else ""
        if kind.startswith("Transpose") and {history._saved_dim0, history._saved_dim1} != {1, 2}:
            return
        if "View" in kind:
            break
        if not kind.startswith(("Transpose", "Clone")):
            return
    joined = tuple(chain[-1].grad_fn._input_metadata[0].shape)
    if len(chain) < 3 or "View" not in chain[-1].grad_fn.name() or joined != (shape[0], shape[1] * shape[2], *shape[3:]):
        return
    order = np.arange(joined[1]).reshape(shape[1:3]).T.ravel()  # channel `order[c]` becomes channel `c`
    readers = [(chain[-1], reader) for reader in chain[-1].outputs]
    for first, second in [*itertools.pairwise(chain), *readers]:
        _set_mappings(first, second, 0, None, None)
    for source in node.inputs:
        _set_mappings(node, source, 0, _Reordered(order), _Reordered(np.argsort(order)))


def _set_mappings(node: Any, neighbour: Any, place: int, towards: Any, back: Any) -> None:
    """Set the mapping from a node to a neighbour, and the one from the neighbour to the node."""
    for source, target, mapping in ((node, neighbour, towards), (neighbour, node, back)):
        for dependency in source.dependencies:
            if dependency.target is target:
                dependency.index_mapping[place] = mapping


class _Part(NamedTuple):
    """Channels of a whole as channels of the part `start:stop`, or the reverse."""

    start: int
    stop: int
    to_whole: bool

    def __call__(self, pairs: Sequence[_Index]) -> list[_Index]:
        if self.to_whole:
            return [_Index(pair.idx + self.start, pair.root_idx) for pair in pairs]
        return [_Index(pair.idx - self.start, pair.root_idx) for pair in pairs if self.start <= pair.idx < self.stop]


class _Reordered(NamedTuple):
    """Channel `c` on one side is channel `order[c]` on the other."""

    order: np.ndarray

    def __call__(self, pairs: Sequence[_Index]) -> list[_Index]:
        return [_Index(int(self.order[pair.idx]), pair.root_idx) for pair in pairs if pair.idx < len(self.order)]


class _Repeat(NamedTuple):
    """Channels in heads of `size`, each head repeated: from one of the repeats to the head, or the reverse."""

    repeat: int
    size: int
    to_single: bool

    def __call__(self, pairs: Sequence[_Index]) -> list[_Index]:
        found = []
        for pair in pairs:
            head, channel = divmod(pair.idx, self.size)
            heads = [head // self.repeat] if self.to_single else range(head * self.repeat, (head + 1) * self.repeat)
            found += [_Index(one * self.size + channel, pair.root_idx) for one in heads]
        return found


def _conv1d_pruners(module: nn.Module) -> dict[type, Any]:
    """What torch-pruning must know of linear layers whose weight is (inputs, outputs), as in transformers' GPT-2."""
    import torch_pruning

    class TransposedLinearPruner(torch_pruning.BasePruningFunc):
        TARGET_MODULES = None

        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            return layer

        def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            return layer

        def get_out_channels(self, layer: nn.Module) -> int:
            return layer.weight.shape[1]

        def get_in_channels(self, layer: nn.Module) -> int:
            return layer.weight.shape[0]

    return {type(layer): TransposedLinearPruner() for layer in module.modules() if _is_transposed_linear(layer)}


def _is_transposed_linear(module: Any) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


class _RecurrentLinear(nn.Linear):
    """Stands for one layer of an LSTM, GRU or RNN while the network is traced; both directions side by side."""

    def __init__(self, recurrent: nn.RNNBase, layer: int) -> None:
        directions = 2 if recurrent.bidirectional else 1
        inputs = recurrent.hidden_size * directions if layer else recurrent.input_size
        super().__init__(inputs, recurrent.hidden_size * directions, dtype=torch.float64)
        suffixes = [f"_l{layer}", f"_l{layer}_reverse"][:directions]
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self.directions = [[getattr(recurrent, name + suffix, None) for name in names] for suffix in suffixes]

    def held(self, is_output_side: bool, channels: np.ndarray) -> Iterator[tuple[Tensor, int, np.ndarray, np.ndarray]]:
        for number, (weight_ih, weight_hh, bias_ih, bias_hh) in enumerate(self.directions):
            if not is_output_side:
                yield weight_ih, 1, channels, channels
                continue
            size = weight_hh.shape[1]
            ours = channels[channels // size == number]
            yield weight_hh, 1, ours, ours % size
            for tensor in (weight_ih, weight_hh, bias_ih, bias_hh):
                for gate in range(len(weight_ih) // size if tensor is not None else 0):
                    yield tensor, 0, ours, ours % size + gate * size


class _RecurrentStandIn(nn.Module):
    """Channels in and out like a recurrent module, without recurrence: output and last state."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_RecurrentLinear(recurrent, layer) for layer in range(recurrent.num_layers))
        self.time_axis = 1 if recurrent.batch_first else 0
        self.has_cell, self.size = isinstance(recurrent, nn.LSTM), recurrent.hidden_size

    def forward(self, values: Any, state: Any = None) -> tuple[Any, Any]:
        packed = values if isinstance(values, nn.utils.rnn.PackedSequence) else None
        values, states = values if packed is None else packed.data, []
        for layer in self.layers:
            values = layer(values)  # (..., directions x size)
            last = values.select(self.time_axis, -1) if values.dim() == 3 else values[-1]
            states += [last[..., start : start + self.size] for start in range(0, values.shape[-1], self.size)]
        state = torch.stack(states)
        return values if packed is None else packed._replace(data=values), (state, state) if self.has_cell else state


@contextmanager
def _recurrent_layers_replaced(module: nn.Module) -> Iterator[None]:
    """torch-pruning does not see inside recurrent modules: put linear layers in their place while it traces."""
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.RNNBase) and not child.proj_size
    ]
    try:
        for parent, name, child in places:
            setattr(parent, name, _RecurrentStandIn(child))
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


class _ChannelGraph:
    """All channels of all nodes of a dependency graph, and indices along tensor axes, as numbers linked by edges.

    A number is `place << 32 | channel`; a place is a node of the graph with one of its two sides, or an axis of a tensor.
    """

    def __init__(self, graph: Any, tensors: Mapping[str, Tensor], deadline: float) -> None:
        from torch_pruning import ops

        self.graph = graph
        self.names = {id(tensor): name for name, tensor in tensors.items()}
        self.places: dict[Any, int] = {}
        self.axes: dict[int, tuple[str, int]] = {}  # place -> tensor, axis
        self.outputs: set[int] = set()  # places that are model outputs
        self.edges: list[np.ndarray] = []
        longest = max((length for tensor in tensors.values() for length in tensor.shape), default=0)
        seen: dict[tuple[Any, Any], np.ndarray] = {}
        waiting = list(self._roots())
        while waiting:
            node, side, channels = waiting.pop()
            if time.monotonic() > deadline:
                raise ValueError("The time limit was over while the network was traced. Allow more with time_limit_s.")
            known = seen.get((node, side), np.empty(0, dtype=np.int64))
            fresh = np.setdiff1d(channels, known)
            if not len(fresh):
                continue
            seen[node, side] = np.union1d(known, fresh)
            for dependency in node.dependencies:
                if dependency.is_triggered_by(side):
                    sources, targets = _mapped(dependency, fresh, longest)
                    self._link((node, side), sources, (dependency.target, dependency.handler), targets)
                    waiting.append((dependency.target, dependency.handler, targets))
        for (node, side), channels in seen.items():
            is_output_side = graph.is_out_channel_pruning_fn(side)
            if node.type == ops.OPTYPE.OUTPUT or (is_output_side and not node.outputs):
                self.outputs.add(self._place((node, side)))
            self._link_tensors(node, side, channels, is_output_side)
        for module, node in graph.module2node.items():
            for tensor, axis, channels_inside, indices in _held_inside(module):
                self._link_index((node, "inside"), channels_inside, tensor, axis, indices)

    def _roots(self) -> Iterator[tuple[Any, Any, np.ndarray]]:
        """Output channels of every module that makes new channels."""
        for module, node in self.graph.module2node.items():
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding) or _is_transposed_linear(module):
                pruner = self.graph.get_pruner_of_module(module)
                yield node, pruner.prune_out_channels, np.arange(pruner.get_out_channels(module))

    def _link_tensors(self, node: Any, side: Any, channels: np.ndarray, is_output_side: bool) -> None:
        for tensor, axis, ours, indices in _held(node.module, is_output_side, channels, node.pruning_dim):
            self._link_index((node, side), ours, tensor, axis, indices)
        period = _row_period(node.module, is_output_side)
        if period:
            self._link((node, side), channels, ("rows", node), channels % period)

    def _link_index(self, key: Any, channels: np.ndarray, tensor: Tensor, axis: int, indices: np.ndarray) -> None:
        name = self.names.get(id(tensor))
        if name is None or not len(indices) or indices.max() >= tensor.shape[axis]:
            return  # not in the state dict, or not a channel axis: mistraced
        self._link(key, channels, (name, axis), indices)
        self.axes[self._place((name, axis))] = (name, axis)

    def _place(self, key: Any) -> int:
        return self.places.setdefault(key, len(self.places))

    def _link(self, source: Any, sources: np.ndarray, target: Any, targets: np.ndarray) -> None:
        codes = [(self._place(key) << 32) + channels for key, channels in ((source, sources), (target, targets))]
        self.edges.append(np.stack(codes))


def _mapped(dependency: Any, channels: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Channels before and after one edge of the dependency graph; one may become several, or none."""
    mappings = [mapping for mapping in dependency.index_mapping if mapping is not None]
    if not mappings:
        return channels, channels
    pairs = [_Index(channel, channel) for channel in channels.tolist()]
    for mapping in mappings:
        with suppress(IndexError):  # a mapping of something that has no channels, as a split of a state
            pairs = mapping(pairs)
    pairs = [(pair.root_idx, pair.idx) for pair in pairs if pair.root_idx is not None and 0 <= pair.idx < longest]
    sources, targets = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return sources, targets


def _held(
    module: Any, is_output_side: bool, channels: np.ndarray, parameter_axis: int | None
) -> Iterator[tuple[Tensor, int, np.ndarray, np.ndarray]]:
    """Tensors that hold the channels on one side of a module: tensor, axis, channels, and the index of each of them."""
    if isinstance(module, nn.Parameter):  # used without a module of its own
        yield module, parameter_axis % module.dim(), channels, channels
    elif isinstance(module, _RecurrentLinear):
        yield from module.held(is_output_side, channels)
    elif isinstance(module, nn.modules.conv._ConvNd) and not _is_row_side(module, is_output_side):
        yield module.weight, 1, channels, channels % module.weight.shape[1]  # the columns of all groups move alike
        if is_output_side and module.bias is not None:
            yield module.bias, 0, channels, channels
    else:
        for tensor, axis in _vectors(module, is_output_side):
            if tensor is not None:
                yield tensor, axis, channels, channels


def _vectors(module: Any, is_output_side: bool) -> list[tuple[Tensor | None, int]]:
    """Tensors of a module and the axis along which they hold one channel after another."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        return [(weight, 0), (bias if is_output_side or _is_depthwise(module) else None, 0)]
    if isinstance(module, nn.Linear):
        return [(weight, 0), (bias, 0)] if is_output_side else [(weight, 1)]
    if _is_transposed_linear(module):
        return [(weight, 1), (bias, 0)] if is_output_side else [(weight, 0)]
    if isinstance(module, nn.Embedding):
        return [(weight, 1)]
    if isinstance(module, nn.PReLU):
        return [(weight, 0)] if module.num_parameters > 1 else []
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
        vectors = (weight, bias, getattr(module, "running_mean", None), getattr(module, "running_var", None))
        return [(vector, vector.dim() - 1) for vector in vectors if vector is not None]
    if isinstance(module, nn.MultiheadAttention):  # the residual side; see _held_inside
        inputs = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        return [*((weight, 1) for weight in inputs), (module.out_proj.weight, 0), (module.out_proj.bias, 0)]
    return []


def _held_inside(module: Any) -> Iterator[tuple[Tensor, int, np.ndarray, np.ndarray]]:
    """The same for channels that never leave a module: query, key and value of `nn.MultiheadAttention`."""
    if not isinstance(module, nn.MultiheadAttention):
        return
    size = module.embed_dim
    channels = np.arange(size)
    yield module.out_proj.weight, 1, channels, channels
    for weight in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight):
        if weight is not None:
            yield weight, 0, channels, channels
    for tensor in (module.in_proj_weight, module.in_proj_bias):
        for third in range(3 if tensor is not None else 0):
            yield tensor, 0, channels, channels + third * size


def _is_depthwise(module: nn.modules.conv._ConvNd) -> bool:
    return 1 < module.groups == module.in_channels == module.out_channels


def _is_row_side(module: nn.modules.conv._ConvNd, is_output_side: bool) -> bool:
    """True if the channels on this side of a convolution are rows (axis 0) of its weight."""
    return is_output_side != module.transposed or _is_depthwise(module)


def _row_period(module: Any, is_output_side: bool) -> int | None:
    """Rows in each group of a grouped convolution. Rows stay in their group; we move the same row of each group alike."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups == 1 or _is_depthwise(module):
        return None
    return module.weight.shape[0] // module.groups if _is_row_side(module, is_output_side) else None


def _groups_of_units(codes: np.ndarray, units: np.ndarray, channels: _ChannelGraph) -> list[_FoundGroup]:
    """Units that own the same number of indices along the same axes form a group."""
    places, indices = codes >> 32, codes & 0xFFFFFFFF
    at_output = np.isin(places, list(channels.outputs))
    output_units = set(units[at_output].tolist())
    order = {name: position for position, name in enumerate(channels.names.values())}
    on_tensor = np.flatnonzero(np.isin(places, list(channels.axes)))
    owned: dict[int, dict[tuple[str, int], list[int]]] = {}
    for unit, place, index in zip(
        units[on_tensor].tolist(), places[on_tensor].tolist(), indices[on_tensor].tolist(), strict=True
    ):
        owned.setdefault(unit, {}).setdefault(channels.axes[place], []).append(index)
    alike: dict[Any, list[dict[tuple[str, int], list[int]]]] = {}
    for unit, axes in owned.items():
        keys = sorted(axes, key=lambda key: (order[key[0]], key[1]))
        signature = (unit in output_units, *((key, len(axes[key])) for key in keys))
        alike.setdefault(signature, []).append({key: sorted(axes[key]) for key in keys})
    groups = []
    for (reaches_output, *_), members in alike.items():
        if len(members) > 1:
            first = next(iter(members[0]))
            members.sort(key=lambda member: member[first])
            rows = {key: np.array([member[key] for member in members]) for key in members[0]}
            groups.append(_FoundGroup(rows, reaches_output))
    return sorted(
        groups, key=lambda group: [(order[name], axis, rows[0, 0]) for (name, axis), rows in group.rows.items()]
    )


# --- alignment


def match_weights(
    state_dict: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    spec: SymmetrySpec,
    seed: int = 0,
    max_iterations: int = 100,
) -> list[Tensor]:
    """The draw that brings a network near a reference: `spec.apply(state_dict, draw)` is the aligned network.

    For many networks and one reference make a `WeightMatcher` once.

    Args:
        state_dict: network to be moved.
        reference: network of the same architecture, which stays as it is.
        spec: symmetries of the architecture.
        seed: decides the order of the groups in each sweep.
        max_iterations: largest number of sweeps over all groups; it stops as soon as no group improves.

    Returns:
        One int64 permutation of shape `(size,)` for each group.

    Raises:
        ValueError: if a network does not fit the spec, or holds a value that is not finite.
    """
    return WeightMatcher(spec, reference).match(state_dict, seed, max_iterations)


def align(
    state_dict: Mapping[str, Tensor], reference: Mapping[str, Tensor], spec: SymmetrySpec, seed: int = 0
) -> dict[str, Tensor]:
    """The network with its units in the order that is nearest to the reference; its function is the same.

    Arguments and errors as for `match_weights`.
    """
    return spec.apply(state_dict, match_weights(state_dict, reference, spec, seed))


def weight_distance(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], spec: SymmetrySpec | None = None
) -> float:
    """L2 distance over the floating tensors of two networks, or over those that a spec moves.

    Raises:
        ValueError: if a tensor is missing in one of them or the shapes differ.
    """
    if spec is None:
        names = {name: (name, name) for name, tensor in {**first, **second}.items() if tensor.is_floating_point()}
    else:
        spec.check(first)
        spec.check(second)
        ours, theirs = spec._stored_names(first), spec._stored_names(second)
        names = {name: (ours[name][0], theirs[name][0]) for name in ours}
    total = 0.0
    for one, other in names.values():
        found = [
            tuple(tensors[name].shape) if name in tensors else None
            for name, tensors in ((one, first), (other, second))
        ]
        if found[0] != found[1]:
            raise ValueError(
                f"{one} has shapes {found[0]} and {found[1]} (None: missing); the networks must be alike."
            )
        total += (first[one].double() - second[other].double()).square().sum().item()
    return math.sqrt(total)


class _Term(NamedTuple):
    """One item of a group, ready to be compared: how to see a tensor as a matrix (units, everything they own)."""

    tensor: str
    axis: int
    indices: np.ndarray | None  # of all units one after another; None: the axis as it is
    size: int
    unknown: tuple[int, ...]  # axes of the tensor whose order other groups decide
    own_axis_unknown: bool  # ... and whether they also decide the order inside the units

    def matrix(self, tensor: np.ndarray) -> np.ndarray:
        return self._gathered(tensor).reshape(self.size, -1)

    def signature(self, tensor: np.ndarray) -> np.ndarray:
        """Like `matrix`, with the values along axes of unknown order sorted: the same for every order of these axes."""
        values = self._gathered(tensor)  # (units x repeat, other axes in their order)
        others = [axis for axis in range(tensor.ndim) if axis != self.axis]
        known = [1 + place for place, axis in enumerate(others) if axis not in self.unknown]
        unknown = [1 + place for place, axis in enumerate(others) if axis in self.unknown]
        values = values.reshape(self.size, -1, *values.shape[1:])
        order = [0, *(1 + axis for axis in known), 1, *(1 + axis for axis in unknown)]
        if not self.own_axis_unknown:
            order = [0, 1, *(1 + axis for axis in known), *(1 + axis for axis in unknown)]
        values = values.transpose(order)
        sorted_axes = len(unknown) + self.own_axis_unknown
        if sorted_axes:
            values = np.sort(values.reshape(*values.shape[: values.ndim - sorted_axes], -1), axis=-1)
        return values.reshape(self.size, -1)

    def _gathered(self, tensor: np.ndarray) -> np.ndarray:
        tensor = np.moveaxis(tensor, self.axis, 0)
        return tensor if self.indices is None else tensor[self.indices]

    def move(self, tensor: np.ndarray, permutation: np.ndarray) -> np.ndarray:
        if self.indices is None:
            return np.take(tensor, permutation, axis=self.axis)
        sources = np.arange(tensor.shape[self.axis])
        rows = self.indices.reshape(self.size, -1)
        sources[rows] = rows[permutation]
        return np.take(tensor, sources, axis=self.axis)


class WeightMatcher:
    """Aligns any number of networks to one reference; the plan is made once.

    Args:
        spec (`SymmetrySpec`): symmetries of the architecture.
        reference (mapping of `str` to `torch.Tensor`): the network that stays as it is.
    """

    def __init__(self, spec: SymmetrySpec, reference: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self._reference = self._arrays(reference)
        self._terms = _terms(spec, self._reference)
        tensors = [{term.tensor for term in terms} for terms in self._terms]
        self._neighbours = [
            [
                other
                for other, theirs in enumerate(tensors)
                if ours & theirs and (other != group or len(ours) < len(terms))
            ]
            for group, (ours, terms) in enumerate(zip(tensors, self._terms, strict=True))
        ]
        self._matrices = [[term.matrix(self._reference[term.tensor]) for term in terms] for terms in self._terms]
        self._signatures = [[term.signature(self._reference[term.tensor]) for term in terms] for terms in self._terms]

    def match(self, state_dict: Mapping[str, Tensor], seed: int = 0, max_iterations: int = 100) -> list[Tensor]:
        """The draw that brings a network near the reference; see `match_weights`."""
        arrays = self._arrays(state_dict)
        if not self._terms:
            return []
        starts = [[np.arange(group.size) for group in self.spec.groups], self._start_from_signatures(arrays)]
        moved = [self._applied(arrays, start) for start in starts]
        distances = [self._distance(arrays) for arrays in moved]
        nearer = int(distances[1] < distances[0])
        draw = starts[nearer]
        if distances[nearer] > 1e-24 * self._scale:  # else it was only permuted, and the signatures found how
            draw = self._descend(moved[nearer], draw, np.random.default_rng(seed), max_iterations)
        return [torch.from_numpy(permutation) for permutation in draw]

    @cached_property
    def _scale(self) -> float:
        return sum(float(np.vdot(array, array)) for array in self._reference.values()) + 1e-300

    def _arrays(self, state_dict: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        self.spec.check(state_dict)
        arrays = {}
        for name, stored in self.spec._stored_names(state_dict).items():
            array = state_dict[stored[0]].detach().to("cpu", torch.float64).numpy()
            if not np.isfinite(array).all():
                raise ValueError(f"{stored[0]} holds values that are not finite, so the network cannot be aligned.")
            arrays[name] = array
        return arrays

    def _start_from_signatures(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [
            _assignment(
                sum(ours @ term.signature(arrays[term.tensor]).T for ours, term in zip(signatures, terms, strict=True))
            )
            for signatures, terms in zip(self._signatures, self._terms, strict=True)
        ]

    def _applied(self, arrays: dict[str, np.ndarray], draw: list[np.ndarray]) -> dict[str, np.ndarray]:
        arrays = dict(arrays)
        for group, permutation in enumerate(draw):
            if not _is_identity(permutation):
                arrays.update(self._moved(arrays, group, permutation))
        return arrays

    def _descend(
        self, arrays: dict[str, np.ndarray], draw: list[np.ndarray], order: np.random.Generator, max_iterations: int
    ) -> list[np.ndarray]:
        """Coordinate descent over the groups, from networks that `draw` has moved already."""
        stale = set(range(len(draw)))  # groups whose costs have changed since they were last solved
        for _ in range(max_iterations):
            for group in order.permutation(sorted(stale)).tolist():
                stale.discard(group)
                permutation = self._step(arrays, group)
                if permutation is not None:
                    arrays.update(self._moved(arrays, group, permutation))
                    draw[group] = draw[group][permutation]
                    stale.update(self._neighbours[group])
            if not stale:
                break
        return draw

    def _step(self, arrays: dict[str, np.ndarray], group: int) -> np.ndarray | None:
        """The permutation of one group that brings it nearer while all others rest, or `None`."""
        similarity = sum(
            ours @ term.matrix(arrays[term.tensor]).T
            for ours, term in zip(self._matrices[group], self._terms[group], strict=True)
        )
        permutation = _assignment(similarity)
        if _is_identity(permutation):
            return None
        units = np.arange(len(permutation))
        gain = 2 * (similarity[units, permutation] - similarity[units, units]).sum()
        if group in self._neighbours[group]:  # it moves two axes of one tensor, so the cost is not linear: measure it
            moved = self._moved(arrays, group, permutation)
            gain = self._distance({name: arrays[name] for name in moved}) - self._distance(moved)
        return permutation if gain > 1e-12 * self._scale else None

    def _moved(self, arrays: dict[str, np.ndarray], group: int, permutation: np.ndarray) -> dict[str, np.ndarray]:
        moved: dict[str, np.ndarray] = {}
        for term in self._terms[group]:
            moved[term.tensor] = term.move(moved.get(term.tensor, arrays[term.tensor]), permutation)
        return moved

    def _distance(self, arrays: dict[str, np.ndarray]) -> float:
        return sum(float(np.square(array - self._reference[name]).sum()) for name, array in arrays.items())


def _is_identity(permutation: np.ndarray) -> bool:
    return np.array_equal(permutation, np.arange(len(permutation)))


def _assignment(similarity: np.ndarray) -> np.ndarray:
    """For each unit of the reference, the unit of the network that takes its place: largest total similarity."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(similarity, maximize=True)[1]


def _terms(spec: SymmetrySpec, arrays: Mapping[str, np.ndarray]) -> list[list[_Term]]:
    movers: dict[tuple[str, int], set[str]] = {}
    for group in spec.groups:
        for item in group.items:
            movers.setdefault((item.tensor, item.axis), set()).add(group.name)
    terms = []
    for group in spec.groups:
        terms.append([])
        for item in group.items:
            shape = arrays[item.tensor].shape
            indices = item.rows(group.size).flatten()
            whole = np.array_equal(indices, np.arange(shape[item.axis]))
            unknown = tuple(
                axis for axis in range(len(shape)) if axis != item.axis and movers.get((item.tensor, axis))
            )
            shared = len(movers[item.tensor, item.axis]) > 1
            plain = whole and group.size == shape[item.axis]
            terms[-1].append(_Term(item.tensor, item.axis, None if plain else indices, group.size, unknown, shared))
    return terms
