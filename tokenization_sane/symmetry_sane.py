"""What a symmetry of a network is: units that can trade places, or change their sign or scale, while the function stays.

A *group* is a set of `size` units (hidden channels, for instance) and the slices of tensors that each unit owns. There are three
kinds of group:

* `permutation`: the units trade places in all of these tensors at once. After a permutation `p`, unit `u` carries the values that
  unit `p[u]` had before.
* `sign`: each unit's slices are multiplied by its sign, +1 or -1 (through tanh, linear paths, or a norm that takes the sign up).
* `scale`: each unit's slices are multiplied by its positive factor or by 1 / factor (through ReLU or linear paths).

A *draw* moves units by all permutations first, then multiplies at the new places. Groups are found in `find_symmetries_sane.py`.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .function_sane import NetworkFunction

SYMMETRY_FORMAT = 2
KINDS = ("permutation", "sign", "scale")
NUM_DRAWS = 3
TOLERANCE = 1e-5  # relative change of the outputs that still counts as rounding (some models compute norms in float32)
SENSITIVITY = 1e-4  # ... and which must be this much smaller than the change when only one tensor is moved


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
        power (`int`): in sign and scale groups the slices are multiplied by `factor ** power`; 1 or -1.
    """

    tensor: str
    axis: int
    index: tuple[int, int, int, int] | tuple[tuple[int, ...], ...]
    power: int = 1

    def __post_init__(self) -> None:
        where = f"Symmetry item {self.tensor!r}"
        if not isinstance(self.tensor, str) or not self.tensor:
            raise ValueError(f"{where}: the tensor must be a name, as in the state dict.")
        _check_integer(self.axis, f"{where}: axis")
        if self.power not in (1, -1) or isinstance(self.power, bool):
            raise ValueError(f"{where}: power is {self.power!r}, expected 1 or -1.")
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
    def from_rows(cls, tensor: str, axis: int, rows: np.ndarray, power: int = 1) -> "SymmetryItem":
        """Shortest description of `rows` (int array of shape `(units, repeat)`)."""
        units, repeat = rows.shape
        offset = int(rows[0, 0])
        stride = int(rows[1, 0]) - offset if units > 1 else repeat
        step = int(rows[0, 1]) - offset if repeat > 1 else 1
        affine = offset + np.arange(units)[:, None] * stride + np.arange(repeat) * step
        if min(stride, step) >= 0 and np.array_equal(affine, rows):
            return cls(tensor, axis, (offset, stride, repeat, step), power)
        return cls(tensor, axis, tuple(tuple(row) for row in rows.tolist()), power)

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
    """Units that can change without changing the function of the network.

    Args:
        name (`str`): unique in its spec; tensor and axis of the first item.
        kind (`str`): `"permutation"`, `"sign"` or `"scale"`.
        size (`int`): number of units, at least 2.
        items (`tuple[SymmetryItem, ...]`): what the units own; all of it changes together.
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
        places = [(item.tensor, item.axis, item.power) for item in self.items]
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
    """All verified symmetries of one architecture.

    A *draw* is a list with one tensor a group, in their order: an int64 permutation, or float64 factors (signs or scales), each of
    shape `(size,)`.

    Args:
        groups (`tuple[SymmetryGroup, ...]`): what holds; permutations first. Any two of one kind commute.
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
        kinds = [KINDS.index(group.kind) for group in self.groups]
        if kinds != sorted(kinds):
            raise ValueError(f"The groups of a symmetry spec stand in the order {', '.join(KINDS)}.")
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
        counts = ", ".join(f"{kind}={len(self.of_kind(kind).groups)}" for kind in KINDS)
        return f"SymmetrySpec({counts}, rejected={len(self.rejected)})"

    def of_kind(self, *kinds: str) -> "SymmetrySpec":
        """The spec with the groups of these kinds alone."""
        return replace(self, groups=tuple(group for group in self.groups if group.kind in kinds))

    def coverage(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """Share of the values of some tensors that a permutation moves along at least one axis.

        Args:
            shapes: name to shape of the tensors to count, for instance the parameters of a network; tied names once.
        """
        masks: dict[str, Tensor] = {}
        for group in self.of_kind("permutation").groups:
            for item in group.items:
                name = next((alias for alias in self._aliases[item.tensor] if alias in shapes), None)
                if name is not None:
                    mask = masks.setdefault(name, torch.zeros(tuple(shapes[name]), dtype=torch.bool))
                    mask.movedim(item.axis, 0)[torch.from_numpy(item.rows(group.size).ravel())] = True
        total = sum(math.prod(shape) for shape in shapes.values())
        return sum(int(mask.sum()) for mask in masks.values()) / total if total else 0.0

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
        """The draw that changes nothing; tensors of shape `(size,)` or `(batch_size, size)`."""
        batch = () if batch_size is None else (batch_size,)
        return [_neutral(group).expand(*batch, group.size).clone() for group in self.groups]

    def draw(
        self,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        kinds: Iterable[str] = KINDS,
    ) -> list[Tensor]:
        """A random draw: uniform permutations and signs; scales of 1/2, 1 or 2, which floating point numbers take exactly.

        Args:
            generator: where the randomness comes from.
            batch_size: draw so many at once.
            kinds: groups of other kinds are left as they are.

        Returns:
            One tensor of shape `(size,)` or `(batch_size, size)` a group.
        """
        batch, kinds = () if batch_size is None else (batch_size,), tuple(kinds)
        drawn = []
        for group in self.groups:
            shape = (*batch, group.size)
            if group.kind not in kinds:
                drawn.append(_neutral(group).expand(shape).clone())
            elif group.kind == "permutation":
                drawn.append(torch.rand(shape, generator=generator, dtype=torch.float64).argsort(-1))
            elif group.kind == "sign":
                drawn.append(torch.randint(0, 2, shape, generator=generator).double() * 2 - 1)
            else:
                drawn.append(2.0 ** torch.randint(-1, 2, shape, generator=generator).double())
        return drawn

    def invert(self, draw: Sequence[Tensor]) -> list[Tensor]:
        """The draw that undoes `draw`."""
        self._check_draw(draw)
        inverse = [
            value.argsort(-1) if g.kind == "permutation" else value for g, value in zip(self.groups, draw, strict=True)
        ]
        return [
            value if g.kind == "permutation" else 1 / value.gather(-1, self.unit_origins(g, inverse))
            for g, value in zip(self.groups, inverse, strict=True)
        ]

    def compose(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
        """The draw that does what applying `first` and then `second` does."""
        self._check_draw(first)
        self._check_draw(second)
        return [
            one.gather(-1, two)
            if group.kind == "permutation"
            else one.gather(-1, self.unit_origins(group, second)) * two
            for group, one, two in zip(self.groups, first, second, strict=True)
        ]

    def unit_origins(self, group: SymmetryGroup, draw: Sequence[Tensor]) -> Tensor:
        """Where the permutations of a draw bring each unit of a sign or scale group from: int64 `(..., size)`."""
        item = group.items[0]
        rows = torch.from_numpy(item.rows(group.size)[:, 0])
        length = int(self.shapes[item.tensor][item.axis]) if item.tensor in self.shapes else int(rows.max()) + 1
        batch = max((value.shape[:-1] for value in draw), key=len, default=())
        origin = torch.arange(length).expand(*batch, length)
        for other, permutation in zip(self.groups, draw, strict=True):
            for moved in other.items if other.kind == "permutation" else ():
                if (moved.tensor, moved.axis) == (item.tensor, item.axis):
                    origin = origin.gather(-1, axis_index(moved, permutation, length))
        unit = torch.zeros(length, dtype=torch.int64)
        unit[rows] = torch.arange(group.size)
        return unit[origin[..., rows]]

    def apply(self, state_dict: Mapping[str, Tensor], draw: Sequence[Tensor]) -> dict[str, Tensor]:
        """A network with the same function and its units in another order, or with other signs and scales.

        Args:
            state_dict: any mapping from names to tensors, of any dtype. It is not changed.
            draw: one tensor of shape `(size,)` for each group.

        Returns:
            A new dict in the same order: changed copies, and all other tensors as they are. Tied tensors stay tied.

        Raises:
            ValueError: if a tensor is missing or has another shape, or if the draw does not fit the groups.
        """
        self._check_draw(draw)
        self.check(state_dict)
        names = self._stored_names(state_dict)
        result = dict(state_dict)
        for group, value in zip(self.groups, draw, strict=True):
            if group.kind != "permutation" and bool((value == 1).all()):
                continue
            for item in group.items:
                changed = transform(result[names[item.tensor][0]], item, value, group.kind)
                result.update(dict.fromkeys(names[item.tensor], changed))
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
        function = NetworkFunction(module, example_inputs, select_outputs)
        self.check(function.tensors)
        return [try_group(function, group) for group in self.groups]

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


def _neutral(group: SymmetryGroup) -> Tensor:
    return torch.arange(group.size) if group.kind == "permutation" else torch.ones(group.size, dtype=torch.float64)


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


def transform(tensor: Tensor, item: SymmetryItem, value: Tensor, kind: str) -> Tensor:
    """A tensor after one item of a group was permuted (`value`: int64 `(size,)`) or multiplied (`value`: factors `(size,)`)."""
    value = value.to(tensor.device)
    if kind == "permutation":
        index = axis_index(item, value, tensor.shape[item.axis])
        if tensor.dtype.is_floating_point and tensor.element_size() == 1:  # float8 has no index_select: move its bytes
            return tensor.view(torch.uint8).index_select(item.axis, index).view(tensor.dtype)
        return tensor.index_select(item.axis, index)
    factor = torch.ones(tensor.shape[item.axis], dtype=torch.float64, device=tensor.device)
    rows = torch.from_numpy(item.rows(len(value))).to(tensor.device)
    factor[rows] = (value.double() ** item.power)[:, None].expand(rows.shape)
    shape = [-1 if axis == item.axis else 1 for axis in range(tensor.dim())]
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return (tensor.to(wide) * factor.view(shape)).to(tensor.dtype)


# --- trying a group on the function


def change(function: NetworkFunction, moves: Iterable[tuple[SymmetryGroup, Tensor, Sequence[SymmetryItem]]]) -> float:
    """Largest relative change of the outputs when some items of some groups are moved, all at once."""
    moved: dict[str, Tensor] = {}
    with torch.no_grad():
        for group, value, items in moves:
            for item in items:
                moved[item.tensor] = transform(
                    moved.get(item.tensor, function.tensors[item.tensor]), item, value, group.kind
                )
    return function.change(moved)


def restless(group: SymmetryGroup, generator: torch.Generator) -> Tensor:
    """A random draw for one group that leaves no two neighbours as they are.

    Permutations have no fixed point (one cycle through all units in random order), since a random one of few units is often the
    identity and lets wrong groups pass; factors differ from each other.
    """
    if group.kind == "permutation":
        order = torch.randperm(group.size, generator=generator)
        permutation = torch.empty_like(order)
        permutation[order] = order.roll(1)
        return permutation
    if group.kind == "scale":
        # factors of 3 to 30: smaller ones would not meet the limits of a clipped activation (ReLU6)
        exponent = 1.1 + 2.3 * torch.rand(group.size, generator=generator, dtype=torch.float64)
        return torch.exp(exponent * _random_signs(group.size, generator))
    return _random_signs(group.size, generator)


def _random_signs(size: int, generator: torch.Generator) -> Tensor:
    """Signs that are not all alike; -1 for a single unit."""
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    signs[0] = -1
    return signs


def control_change(function: NetworkFunction, group: SymmetryGroup) -> float:
    """What the function does when only the first tensor of a group is moved: it must notice."""
    value = restless(group, torch.Generator().manual_seed(1))
    return change(function, [(group, value, group.items[:1])])


def holds(error: float, control: float) -> bool:
    """True if a change of the function is rounding beside the change that the control makes."""
    return error < min(TOLERANCE, SENSITIVITY * control)


def try_group(function: NetworkFunction, group: SymmetryGroup) -> VerificationReport:
    """Try one group: draws without fixed point, and as a control its first tensor alone."""
    generator = torch.Generator().manual_seed(1)
    error = 0.0
    for _ in range(NUM_DRAWS):
        error = max(error, change(function, [(group, restless(group, generator), group.items)]))
        if error > TOLERANCE:
            break
    control = control_change(function, group)
    return VerificationReport(group.name, error, control, holds(error, control))
