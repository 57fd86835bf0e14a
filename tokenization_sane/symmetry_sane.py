"""Function-preserving symmetries of a network: find them, verify them, draw them, apply them, align with them.

A *group* is a set of `size` interchangeable units (hidden channels, for instance) and the slices of tensors that each unit
owns. Moving the units in all of these tensors at once leaves the function of the network as it is. One convention holds
throughout: after a permutation `p`, unit `u` carries the values that unit `p[u]` had before.

How groups are found: torch-pruning's dependency graph says which channel of one module is which channel of the next. Every
channel of every module is a node of one large graph here, and so is every index along an axis of a tensor; its connected
components are the units. Tied tensors, shared modules and concatenations are joined on the way. Nothing is trusted: each group
is tried on the function itself, in float64, with random weights, and is offered only if the function stays while moving one of
its tensors alone changes it. Names of tensors and modules play no part.

How networks are aligned: weight matching, after Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo
Permutation Symmetries" (ICLR 2023), arXiv 2209.04836. Coordinate descent over the groups: with all others fixed, the permutation
of one group that brings its tensors nearest to the reference (in L2) is a linear assignment problem. It starts from the
order as it is or from an assignment of signatures (values sorted along every axis whose order is still unknown), which by itself
finds a network that was only permuted: from the nearer of the two.
"""

import copy
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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

    def verify(self, module: nn.Module, example_inputs: Any) -> list[VerificationReport]:
        """Try every group on the function of a module (a copy of it, in float64, with random weights).

        Args:
            module: network of the architecture that the spec is for.
            example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

        Returns:
            One `VerificationReport` for each group, in their order.
        """
        function = _Function(module, example_inputs)
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

    def __init__(self, module: nn.Module, example_inputs: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.module = copy.deepcopy(module).cpu().double().eval().requires_grad_(True)
        with torch.no_grad():
            for tensor in self.module.parameters():
                tensor.copy_(_random_parameter(tensor, generator))
            for tensor in self.module.buffers():
                if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
                    tensor += 0.5 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
        self.args, self.kwargs = _call_arguments(example_inputs, generator)
        self.tensors, self.ties = _named_tensors(self.module)
        with torch.no_grad():
            self.expected = self.outputs()

    def outputs(self, tensors: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """All output tensors, with some of the module's tensors replaced."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a module that draws noise draws the same noise each time
            outputs = torch.func.functional_call(self.module, dict(tensors or {}), self.args, self.kwargs)
        found = list(_tensors(outputs))
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
        error = control = 0.0
        for draw in range(NUM_DRAWS):
            permutation = _derangement(group.size, generator)
            if draw == 0:
                control = self.change(group, permutation, group.items[:1])
            error = max(error, self.change(group, permutation))
            if error > TOLERANCE:
                break
        return VerificationReport(group.name, error, control, error < min(TOLERANCE, SENSITIVITY * control))


def _random_parameter(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
    if tensor.dim() < 2:
        return 0.5 + 0.3 * noise
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


def find_symmetries(module: nn.Module, example_inputs: Any, time_limit_s: float = 120.0) -> SymmetrySpec:
    """Find the permutation symmetries of a network, and verify each of them on its function.

    Args:
        module: any network. It is not changed; a copy is traced and tried in float64 on the CPU.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. Small ones are enough and
            fast: every group costs four forward passes.
        time_limit_s: seconds after which groups that are not yet verified are left out.

    Returns:
        The spec: verified groups, and the rejected ones with the reason. The same for every call.

    Raises:
        ValueError: if the module does not run on the example inputs or cannot be traced.
    """
    deadline = time.monotonic() + time_limit_s
    function = _Function(module, example_inputs)
    groups: list[SymmetryGroup] = []
    rejected: list[RejectedGroup] = []
    for found in _traced_groups(function, deadline):
        name, size, reason = found.name, found.size, ""
        if time.monotonic() > deadline:
            reason = f"not verified within {time_limit_s:g} s"
        else:
            report = None
            for variant in found.variants():
                report = function.report(variant)
                if report.ok:
                    groups.append(
                        SymmetryGroup(variant.name, variant.kind, variant.size, variant.items, report.max_error)
                    )
                    break
            if not report.ok:
                reason = "its units are those of a model output; " if found.reaches_output else ""
                reason += f"changes the function by {report.max_error:.1e} (control {report.control_error:.1e})"
        if reason:
            rejected.append(RejectedGroup(name, size, reason))
    touched = {item.tensor for group in groups for item in group.items}
    return SymmetrySpec(
        groups=tuple(groups),
        rejected=tuple(rejected),
        shapes={name: tuple(tensor.shape) for name, tensor in function.tensors.items() if name in touched},
        ties={alias: name for alias, name in function.ties.items() if name in touched},
    )


class _FoundGroup(NamedTuple):
    """Units that the graph says belong together, before anything is tried."""

    rows: dict[tuple[str, int], np.ndarray]  # (tensor, axis) -> indices, int64 of shape (units, repeat)
    reaches_output: bool

    @property
    def name(self) -> str:
        tensor, axis = next(iter(self.rows))
        offset = min(rows.min() for rows in list(self.rows.values())[:1])
        return f"{tensor}@{axis}" + (f"+{offset}" if offset else "")

    @property
    def size(self) -> int:
        return len(next(iter(self.rows.values())))

    def variants(self) -> Iterator[SymmetryGroup]:
        """Groups to try, in this order: as found; with repeated indices taken in strides (a flatten after a permute)."""
        yield self._group(self.rows)
        if any(rows.shape[1] > 1 for rows in self.rows.values()):
            yield self._group({key: _strided(rows) for key, rows in self.rows.items()})

    def _group(self, rows: Mapping[tuple[str, int], np.ndarray]) -> SymmetryGroup:
        items = tuple(SymmetryItem.from_rows(tensor, axis, indices) for (tensor, axis), indices in rows.items())
        return SymmetryGroup(self.name, "permutation", self.size, items)


def _strided(rows: np.ndarray) -> np.ndarray:
    """The same indices, dealt out to the units in turns."""
    return np.sort(rows, axis=None).reshape(rows.shape[1], rows.shape[0]).T


class _Index(NamedTuple):
    """What torch-pruning's index mappings read: a channel, and the channel it came from."""

    idx: int
    root_idx: int


def _traced_groups(function: _Function, deadline: float) -> list[_FoundGroup]:
    """Groups of one module, from connected components of its channel graph."""
    import torch_pruning
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parameters outside of modules it knows; they are handled below
        graph = torch_pruning.DependencyGraph().build_dependency(
            function.module,
            (function.args, function.kwargs),
            forward_fn=lambda module, inputs: module(*inputs[0], **inputs[1]),
            output_transform=lambda outputs: [tensor for tensor in _tensors(outputs) if tensor.grad_fn is not None],
            verbose=False,
        )
    channels = _ChannelGraph(graph, function.tensors, deadline)
    edges = np.concatenate(channels.edges, axis=1)  # (2, edges)
    codes, ends = np.unique(edges, return_inverse=True)
    ends = ends.reshape(edges.shape)
    links = coo_array((np.ones(ends.shape[1], dtype=np.int8), (ends[0], ends[1])), shape=(len(codes), len(codes)))
    units = connected_components(links, directed=False)[1]
    return _groups_of_units(codes, units, channels)


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
                    sources, targets = _mapped(dependency, fresh)
                    self._link((node, side), sources, (dependency.target, dependency.handler), targets)
                    waiting.append((dependency.target, dependency.handler, targets))
        for (node, side), channels in seen.items():
            is_output_side = graph.is_out_channel_pruning_fn(side)
            if node.type == ops.OPTYPE.OUTPUT or (is_output_side and not node.outputs):
                self.outputs.add(self._place((node, side)))
            self._link_tensors(node, side, channels, is_output_side)

    def _roots(self) -> Iterator[tuple[Any, Any, np.ndarray]]:
        """Output channels of every module that makes new channels."""
        for module, node in self.graph.module2node.items():
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding):
                pruner = self.graph.get_pruner_of_module(module)
                yield node, pruner.prune_out_channels, np.arange(pruner.get_out_channels(module))

    def _link_tensors(self, node: Any, side: Any, channels: np.ndarray, is_output_side: bool) -> None:
        for tensor, axis, period in _touched(node.module, is_output_side, node.pruning_dim):
            name, indices = self.names.get(id(tensor)), channels % period
            if name is None or indices.max() >= tensor.shape[axis]:  # not stored, or not a channel axis: mistraced
                continue
            self._link((node, side), channels, (name, axis), indices)
            self.axes[self._place((name, axis))] = (name, axis)
        period = _row_period(node.module, is_output_side)
        if period:
            self._link((node, side), channels, ("rows", node), channels % period)

    def _place(self, key: Any) -> int:
        return self.places.setdefault(key, len(self.places))

    def _link(self, source: Any, sources: np.ndarray, target: Any, targets: np.ndarray) -> None:
        codes = [(self._place(key) << 32) + channels for key, channels in ((source, sources), (target, targets))]
        self.edges.append(np.stack(codes))


def _mapped(dependency: Any, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Channels before and after one edge of the dependency graph; one may become several, or none."""
    mappings = [mapping for mapping in dependency.index_mapping if mapping is not None]
    if not mappings:
        return channels, channels
    pairs = [_Index(channel, channel) for channel in channels.tolist()]
    for mapping in mappings:
        pairs = mapping(pairs)
    pairs = [(pair.root_idx, pair.idx) for pair in pairs if pair.root_idx is not None and pair.idx >= 0]
    sources, targets = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return sources, targets


def _touched(module: Any, is_output_side: bool, parameter_axis: int | None) -> list[tuple[Tensor, int, int]]:
    """Tensors that hold the channels on one side of a module: (tensor, axis, period); channel `c` is index `c % period`."""
    if isinstance(module, nn.Parameter):  # used without a module of its own
        return [(module, parameter_axis % module.dim(), module.shape[parameter_axis])]
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        axis = 0 if _is_row_side(module, is_output_side) else 1
        held = [(weight, axis), (bias if is_output_side or _is_depthwise(module) else None, 0)]
    elif isinstance(module, nn.Linear):
        held = [(weight, 0), (bias, 0)] if is_output_side else [(weight, 1)]
    elif isinstance(module, nn.Embedding):
        held = [(weight, 1)]
    elif isinstance(module, nn.PReLU):
        held = [(weight, 0)] if module.num_parameters > 1 else []
    elif isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
        vectors = (weight, bias, getattr(module, "running_mean", None), getattr(module, "running_var", None))
        held = [(vector, vector.dim() - 1) for vector in vectors if vector is not None]
    else:
        held = []
    grouped_columns = isinstance(module, nn.modules.conv._ConvNd) and held[0][1] == 1
    return [
        (tensor, axis, tensor.shape[1] if grouped_columns and axis else 2**32)
        for tensor, axis in held
        if tensor is not None
    ]


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
        nearer = int(self._distance(moved[1]) < self._distance(moved[0]))
        draw = self._descend(moved[nearer], starts[nearer], np.random.default_rng(seed), max_iterations)
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
