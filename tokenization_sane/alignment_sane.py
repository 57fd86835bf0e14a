"""Bring networks near a reference by their symmetries.

Weight matching, after Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries" (ICLR
2023), arXiv 2209.04836. Coordinate descent over the groups: with all others fixed, the permutation of one group that brings its
tensors nearest to the reference (in L2) is a linear assignment problem. It starts from the order as it is or from an assignment of
signatures (values sorted along every axis whose order is still unknown), which by itself finds a network that was only permuted:
from the nearer of the two.

Signs are found with the permutations: where a unit may flip, the similarity of two units is that of the better sign. Scales are
taken out first: both networks are brought to the one scale of each unit that makes the sum of squared weights smallest, matched
there, and the result gets the scales of the reference.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .symmetry_sane import SymmetryGroup, SymmetrySpec


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
        One tensor of shape `(size,)` for each group: an int64 permutation, or float64 factors.

    Raises:
        ValueError: if a network does not fit the spec, or holds a value that is not finite.
    """
    return WeightMatcher(spec, reference).match(state_dict, seed, max_iterations)


def align(
    state_dict: Mapping[str, Tensor], reference: Mapping[str, Tensor], spec: SymmetrySpec, seed: int = 0
) -> dict[str, Tensor]:
    """The network with its units in the order, and with the signs and scales, that are nearest to the reference; its function is the same.

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


class Alignment(NamedTuple):
    """A network beside a reference.

    Args:
        state_dict (`dict[str, torch.Tensor]`): the aligned network.
        draw (`list[torch.Tensor]`): what was applied to it; `spec.invert(draw)` brings the original back.
        distance_before (`float`), distance_after (`float`): L2 distance to the reference over the tensors that the spec moves.
    """

    state_dict: dict[str, Tensor]
    draw: list[Tensor]
    distance_before: float
    distance_after: float


class _Term(NamedTuple):
    """Some slices of a group, ready to be compared: how to see a tensor as a matrix (units, everything they own)."""

    tensor: str
    axis: int
    indices: np.ndarray | None  # of all units one after another; None: the axis as it is
    size: int
    unknown: tuple[int, ...]  # axes of the tensor whose order other groups decide
    own_axis_unknown: bool  # ... and whether they also decide the order inside the units
    has_signs: bool  # signs of the values are not known
    flipped_by: tuple[int, ...]  # which of the group's signs (see `_Plan.signs`) flip these slices

    def matrix(self, tensor: np.ndarray) -> np.ndarray:
        return self._gathered(tensor).reshape(self.size, -1)

    def signature(self, tensor: np.ndarray) -> np.ndarray:
        """Like `matrix`, with the values along axes of unknown order sorted: the same for every order of these axes."""
        values = self._gathered(
            np.abs(tensor) if self.has_signs else tensor
        )  # (units x repeat, other axes in their order)
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

    def multiply(self, tensor: np.ndarray, factors: np.ndarray) -> np.ndarray:
        """The tensor with each unit's slices multiplied by its factor."""
        along = np.ones(tensor.shape[self.axis])
        rows = np.arange(tensor.shape[self.axis]) if self.indices is None else self.indices
        along[rows] = np.repeat(factors, len(rows) // self.size)
        return tensor * along.reshape([-1 if axis == self.axis else 1 for axis in range(tensor.ndim)])


class _Plan(NamedTuple):
    """One group of permutations or signs, and what depends on it.

    Args:
        number: its place in the spec.
        terms: what its units own.
        is_linear: False if it changes two axes of one tensor: then the gain of a step must be measured.
        signs: places of the sign groups whose units are these units, so that both are found together.
    """

    number: int
    terms: list[_Term]
    is_linear: bool
    signs: tuple[int, ...] = ()


class WeightMatcher:
    """Aligns any number of networks to one reference; the plan is made once.

    Args:
        spec (`SymmetrySpec`): symmetries of the architecture.
        reference (mapping of `str` to `torch.Tensor`): the network that stays as it is.
    """

    def __init__(self, spec: SymmetrySpec, reference: Mapping[str, Tensor]) -> None:
        self.spec, self._target = spec, reference
        self._scales = _SmallestScales(spec)
        arrays = self._arrays(reference)
        self._reference_factors = self._scales.factors(arrays)
        self._reference = self._scales.applied(arrays, self._reference_factors)
        self._plans = _plans(spec, self._reference)
        tensors = {number: {term.tensor for term in plan.terms} for number, plan in self._plans.items()}
        self._neighbours = {
            number: {n for n in tensors if tensors[n] & ours and (n != number or not self._plans[number].is_linear)}
            for number, ours in tensors.items()
        }
        self._matrices = {n: [t.matrix(self._reference[t.tensor]) for t in p.terms] for n, p in self._plans.items()}

    def match(self, state_dict: Mapping[str, Tensor], seed: int = 0, max_iterations: int = 100) -> list[Tensor]:
        """The draw that brings a network near the reference; see `match_weights`."""
        arrays = self._arrays(state_dict)
        factors = self._scales.factors(arrays)
        arrays = self._scales.applied(arrays, factors)
        states = [_State(self, arrays, start) for start in (self._identity(), self._start_from_signatures(arrays))]
        nearer = min(states, key=lambda state: state.distance())
        if (
            self._plans and nearer.distance() > 1e-24 * self._scale
        ):  # else it was only permuted, and the signatures found how
            nearer.descend(np.random.default_rng(seed), max_iterations)
        draw = [torch.from_numpy(value) for value in nearer.draw]
        for number, group in enumerate(self.spec.groups):
            if group.kind == "scale":
                origins = self.spec.unit_origins(group, draw).numpy()
                draw[number] = torch.from_numpy(factors[number][origins] / self._reference_factors[number])
        return draw

    def align(self, state_dict: Mapping[str, Tensor], seed: int = 0) -> Alignment:
        """The aligned network, how it came about, and its distance to the reference before and after."""
        draw = self.match(state_dict, seed)
        aligned = self.spec.apply(state_dict, draw)
        before, after = (weight_distance(network, self._target, self.spec) for network in (state_dict, aligned))
        return Alignment(aligned, draw, before, after)

    def align_all(
        self, state_dicts: Iterable[Mapping[str, Tensor]], seed: int = 0, num_threads: int = 2
    ) -> Iterator[Alignment]:
        """[`~WeightMatcher.align`] for many networks, several at a time; in their order, a few in memory."""
        with ThreadPoolExecutor(num_threads) as pool:
            waiting = []
            for state_dict in state_dicts:
                waiting.append(pool.submit(self.align, state_dict, seed))
                if len(waiting) > 2 * num_threads:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()

    @cached_property
    def _scale(self) -> float:
        return sum(float(np.vdot(array, array)) for array in self._reference.values()) + 1e-300

    @cached_property
    def _signatures(self) -> dict[int, list[np.ndarray]]:
        return {n: [t.signature(self._reference[t.tensor]) for t in p.terms] for n, p in self._plans.items()}

    def _arrays(self, state_dict: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        self.spec.check(state_dict)
        arrays = {}
        for name, stored in self.spec._stored_names(state_dict).items():
            array = state_dict[stored[0]].detach().to("cpu", torch.float64).numpy()
            if not np.isfinite(array).all():
                raise ValueError(f"{stored[0]} holds values that are not finite, so the network cannot be aligned.")
            arrays[name] = array
        return arrays

    def _identity(self) -> list[np.ndarray]:
        return [value.numpy() for value in self.spec.identity()]

    def _start_from_signatures(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        draw = self._identity()
        for number, plan in self._plans.items():
            if self.spec.groups[number].kind == "permutation":
                theirs = [term.signature(arrays[term.tensor]) for term in plan.terms]
                similarity = sum(ours @ other.T for ours, other in zip(self._signatures[number], theirs, strict=True))
                draw[number] = _assignment(similarity, sum(np.square(other).sum(1) for other in theirs))
        return draw


class _State:
    """A network on its way to the reference: its arrays, and the draw that brought it here."""

    def __init__(self, matcher: WeightMatcher, arrays: dict[str, np.ndarray], draw: list[np.ndarray]) -> None:
        self.matcher, self.arrays = matcher, dict(arrays)
        self.draw = matcher._identity()
        kinds = [group.kind for group in matcher.spec.groups]
        for number, value in enumerate(draw):
            if kinds[number] == "permutation" and not _is_identity(value):
                self._permute(number, value)
        signs = {number for number, kind in enumerate(kinds) if kind == "sign" and number in matcher._plans}
        self._flip_in_turn(signs)
        for number in sorted(signs):
            self._step(number)

    def distance(self, names: Iterable[str] | None = None) -> float:
        """Squared L2 distance to the reference."""
        names = self.arrays if names is None else names
        return sum(float(np.square(self.arrays[name] - self.matcher._reference[name]).sum()) for name in names)

    def _flip_in_turn(self, unknown: set[int]) -> None:
        """Signs group by group, each judged by tensors whose other axes have their signs already: first those that read inputs.

        Judged by all tensors at once, a unit would also be asked what it is to units that point the wrong way.
        """
        flipped: dict[str, set[int]] = {}
        for number in unknown:
            for term in self.matcher._plans[number].terms:
                flipped.setdefault(term.tensor, set()).add(number)
        unknown = set(unknown)
        while unknown:
            clear = {
                number: [
                    place
                    for place, term in enumerate(self.matcher._plans[number].terms)
                    if term.flipped_by and not flipped[term.tensor] & unknown - {number}
                ]
                for number in sorted(unknown)
            }
            number = max(clear, key=lambda one: len(clear[one]))  # the first of equals
            plan, matrices = self.matcher._plans[number], self.matcher._matrices[number]
            places = clear[number] or range(len(plan.terms))
            agreement = sum(
                np.einsum("ij,ij->i", matrices[place], plan.terms[place].matrix(self.arrays[plan.terms[place].tensor]))
                for place in places
            )
            self._flip(number, np.where(agreement < 0, -1.0, 1.0))
            unknown.discard(number)

    def descend(self, order: np.random.Generator, max_iterations: int) -> None:
        """Coordinate descent over the groups."""
        stale = set(self.matcher._plans)  # groups whose costs have changed since they were last solved
        for _ in range(max_iterations):
            for number in order.permutation(sorted(stale)).tolist():
                stale.discard(number)
                if self._step(number):
                    stale |= self.matcher._neighbours[number]
            if not stale:
                break

    def _step(self, number: int) -> bool:
        """Move one group to where it is nearest while all others rest; False if it is there."""
        plan = self.matcher._plans[number]
        is_permutation = self.matcher.spec.groups[number].kind == "permutation"
        best, choices, current, squares = self._similarity(plan, is_permutation)
        units = np.arange(len(current))
        order = _assignment(best, squares) if is_permutation else units
        signs = choices[:, units, order] if is_permutation else choices
        if _is_identity(order) and (signs == 1).all():
            return False
        gain = 2 * ((best[units, order] if is_permutation else best) - current).sum()
        names = {term.tensor for term in plan.terms}
        names |= {term.tensor for sign in plan.signs for term in self.matcher._plans[sign].terms}
        saved = {name: self.arrays[name] for name in names}, [*self.draw]
        before = None if plan.is_linear else self.distance(names)
        if is_permutation:
            self._permute(number, order)
        for sign, flips in zip(plan.signs if is_permutation else (number,), signs, strict=True):
            self._flip(sign, flips)
        if before is not None:  # it moves two axes of one tensor, so the cost is not linear: measure it
            gain = before - self.distance(names)
        if gain > 1e-12 * self.matcher._scale:
            return True
        self.arrays.update(saved[0])
        self.draw = saved[1]
        return False

    def _similarity(self, plan: _Plan, is_permutation: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of all pairs of units (permutations) or of each unit with itself (signs).

        Returns:
            the similarity with the best signs, those signs, the similarity as it is, and the squares of the network's units.
        """
        count = len(plan.signs) if is_permutation else 1
        parts: dict[tuple[int, ...], np.ndarray] = {}
        squares = np.zeros(plan.terms[0].size)
        for ours, term in zip(self.matcher._matrices[plan.number], plan.terms, strict=True):
            theirs = term.matrix(self.arrays[term.tensor])
            squares += np.square(theirs).sum(1)
            found = ours @ theirs.T if is_permutation else np.einsum("ij,ij->i", ours, theirs)
            parts[term.flipped_by] = parts[term.flipped_by] + found if term.flipped_by in parts else found
        options = list(itertools.product((1, -1), repeat=count))
        totals = np.stack(
            [sum(math.prod(o[n] for n in flipped) * part for flipped, part in parts.items()) for o in options]
        )
        chosen = totals.argmax(0)  # the first of equals: no flip
        signs = np.array(options).reshape(len(options), count).T[:, chosen].astype(np.float64)
        current = totals[0].diagonal() if is_permutation else totals[0]
        return np.take_along_axis(totals, chosen[None], 0)[0], signs, current, squares

    def _permute(self, number: int, permutation: np.ndarray) -> None:
        spec = self.matcher.spec
        for term in self.matcher._plans[number].terms:
            self.arrays[term.tensor] = term.move(self.arrays[term.tensor], permutation)
        self.draw[number] = self.draw[number][permutation]
        alone = spec.identity()
        alone[number] = torch.from_numpy(permutation)
        moved = {(item.tensor, item.axis) for item in spec.groups[number].items}
        for sign, group in enumerate(
            spec.groups
        ):  # signs stand at the places that the units have after all permutations
            if group.kind == "sign" and (group.items[0].tensor, group.items[0].axis) in moved:
                self.draw[sign] = self.draw[sign][spec.unit_origins(group, alone).numpy()]

    def _flip(self, number: int, signs: np.ndarray) -> None:
        if (signs == 1).all():
            return
        for term in self.matcher._plans[number].terms:
            self.arrays[term.tensor] = term.multiply(self.arrays[term.tensor], signs)
        self.draw[number] = self.draw[number] * signs


class _SmallestScales:
    """The scale of each unit that makes the sum of squares of a network smallest: one network of all that differ in scale.

    With all others fixed, the factor of a unit is the fourth root of the ratio of the squares of what is divided by it to the squares
    of what is multiplied; the sum is convex in the logarithms, so going round the groups ends there.
    """

    def __init__(self, spec: SymmetrySpec, max_rounds: int = 1000) -> None:
        self.groups = {number: group for number, group in enumerate(spec.groups) if group.kind == "scale"}
        self.axes: dict[str, set[int]] = {}
        for group in self.groups.values():
            for item in group.items:
                self.axes.setdefault(item.tensor, set()).add(item.axis)
        self.max_rounds = max_rounds

    def factors(self, arrays: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
        """The factors of each unit, by the number of its group."""
        factors = {number: np.ones(group.size) for number, group in self.groups.items()}
        squares = {  # summed over the axes that no scale touches, kept as axes of length 1
            name: np.square(arrays[name]).sum(tuple(set(range(arrays[name].ndim)) - axes), keepdims=True)
            for name, axes in self.axes.items()
        }
        for _ in range(self.max_rounds if factors else 0):
            largest = 0.0
            for number, group in self.groups.items():
                sums = {1: np.zeros(group.size), -1: np.zeros(group.size)}
                for item in group.items:
                    along = squares[item.tensor].sum(tuple(set(range(squares[item.tensor].ndim)) - {item.axis}))
                    sums[item.power] += along[item.rows(group.size)].sum(1)
                is_alive = (sums[1] > 0) & (sums[-1] > 0)
                factor = np.where(is_alive, (sums[-1] / np.where(is_alive, sums[1], 1)) ** 0.25, 1.0)
                factors[number] *= np.where(is_alive, factor, 1.0)
                largest = max(largest, float(np.abs(np.log(np.where(is_alive, factor, 1.0))).max()))
                for item in group.items:
                    squares[item.tensor] = _scaled(squares[item.tensor], group, item, factor**2)
            if largest < 1e-13:
                break
        return factors

    def applied(self, arrays: Mapping[str, np.ndarray], factors: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays with these factors."""
        arrays = dict(arrays)
        for number, group in self.groups.items():
            for item in group.items:
                arrays[item.tensor] = _scaled(arrays[item.tensor], group, item, factors[number])
        return arrays


def _scaled(array: np.ndarray, group: SymmetryGroup, item, factors: np.ndarray) -> np.ndarray:
    along = np.ones(array.shape[item.axis])
    rows = item.rows(group.size)
    along[rows] = (factors**item.power)[:, None]
    return array * along.reshape([-1 if axis == item.axis else 1 for axis in range(array.ndim)])


def _is_identity(permutation: np.ndarray) -> bool:
    return np.array_equal(permutation, np.arange(len(permutation)))


def _assignment(similarity: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """For each unit of the reference, the unit of the network that takes its place: smallest total squared distance.

    Args:
        similarity: products of the slices of two units, `(units of the reference, units of the network)`.
        squares: of the slices of each unit of the network, `(units,)`; where the nearest units of all are different units, they are
            the best assignment, and the cubic search for it can be left out.
    """
    from scipy.optimize import linear_sum_assignment

    similarity = similarity - squares / 2
    nearest = similarity.argmax(1)
    if len(np.unique(nearest)) == len(nearest):
        return nearest
    return linear_sum_assignment(similarity, maximize=True)[1]


def _plans(spec: SymmetrySpec, arrays: Mapping[str, np.ndarray]) -> dict[int, _Plan]:
    """What is compared and moved for each group of permutations and signs, by its place in the spec."""
    movers: dict[tuple[str, int], set[str]] = {}
    signed = {item.tensor for group in spec.of_kind("sign").groups for item in group.items}
    for group in spec.of_kind("permutation").groups:
        for item in group.items:
            movers.setdefault((item.tensor, item.axis), set()).add(group.name)
    plans = {}
    for number, group in enumerate(spec.groups):
        if group.kind == "scale":
            continue
        signs = _signs_of_units(spec, group) if group.kind == "permutation" else ()
        terms, pairs = [], [(number, group), *((sign, spec.groups[sign]) for sign in signs)]
        for item in group.items:
            shape = arrays[item.tensor].shape
            rows = item.rows(group.size)
            unknown = tuple(
                axis for axis in range(len(shape)) if axis != item.axis and movers.get((item.tensor, axis))
            )
            shared = len(movers.get((item.tensor, item.axis), ())) > 1
            for flipped, part in _parts_by_flip(spec, item, rows, signs, group.kind):
                plain = np.array_equal(part.ravel(), np.arange(shape[item.axis]))
                indices = None if plain and group.size == shape[item.axis] else part.ravel()
                terms.append(
                    _Term(item.tensor, item.axis, indices, group.size, unknown, shared, item.tensor in signed, flipped)
                )
        touched = [(item.tensor, item.axis) for _, one in pairs for item in one.items]
        is_linear = len({tensor for tensor, _ in touched}) == len(set(touched))
        plans[number] = _Plan(number, terms, is_linear, signs)
    return plans


def _signs_of_units(spec: SymmetrySpec, group: SymmetryGroup) -> tuple[int, ...]:
    """Up to two sign groups whose units are the units of a permutation group."""
    owned = {(item.tensor, item.axis): item.rows(group.size) for item in group.items}
    found = []
    for number, sign in enumerate(spec.groups):
        rows = [(owned.get((item.tensor, item.axis)), item.rows(sign.size)) for item in sign.items]
        same_size = sign.kind == "sign" and sign.size == group.size and all(ours is not None for ours, _ in rows)
        if same_size and all((ours[:, :, None] == theirs[:, None, :]).any(1).all() for ours, theirs in rows):
            found.append(number)
    return tuple(found[:2])


def _parts_by_flip(spec: SymmetrySpec, item, rows: np.ndarray, signs: tuple[int, ...], kind: str) -> list:
    """The columns of an item's indices, grouped by which of the signs flip them."""
    if kind == "sign":
        return [((0,), rows)]
    flipped = np.zeros((len(signs), rows.shape[1]), dtype=bool)
    for place, number in enumerate(signs):
        for other in spec.groups[number].items:
            if (other.tensor, other.axis) == (item.tensor, item.axis):
                flipped[place] |= np.isin(rows[0], other.rows(spec.groups[number].size)[0])
    columns: dict[tuple[int, ...], list[int]] = {}
    for column in range(rows.shape[1]):
        columns.setdefault(tuple(np.flatnonzero(flipped[:, column]).tolist()), []).append(column)
    return [(flips, rows[:, which]) for flips, which in columns.items()]
