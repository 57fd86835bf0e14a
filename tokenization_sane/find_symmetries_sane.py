"""Find the symmetries of a network: candidates from its channel graph, each tried on the function before it is offered.

Permutations: the units that the graph joins trade places. Where they cannot move freely, they may in blocks (attention heads) and
alike within all blocks (channels inside heads); the number of blocks is tried, not read from anywhere.

Scales: a family of networks `W_i * s ** power_i` has one function for all s > 0 exactly if the sum over i of
`power_i * <W_i, gradient by W_i>` is zero for each unit and each output (differentiate by log s). So the powers are the null space of
a small matrix that a few backward passes fill, whatever the architecture: no rule for each kind of layer.

Signs: the powers of a scale are tried as signs too (paths that are linear), and, where the network has odd activations, what stands
before and behind them.

Nothing is trusted: each group is tried on the function itself, in float64, with random weights, and is offered only if the function
stays while changing one of its tensors alone changes it. Groups are tried all at once and apart only where that fails, so that a
deep network takes a few dozen forward passes instead of hundreds.
"""

import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .channels_sane import FoundGroup, Rows, rows_name, traced_groups
from .function_sane import NetworkFunction
from .symmetry_sane import (
    KINDS,
    NUM_DRAWS,
    TOLERANCE,
    RejectedGroup,
    SymmetryGroup,
    SymmetryItem,
    SymmetrySpec,
    change,
    control_change,
    holds,
    restless,
    transform,
)

GRADIENT_SAMPLES, MANY_PARAMETERS = (8, 2), 10**7  # random projections of the outputs; many units need fewer of them
MAX_EQUATION_UNITS = 256  # units of a group that are enough to tell its powers
FEW_UNITS = 32
EXACT = 1e-9  # a scale through a norm with an epsilon nearly holds; it is offered only where it holds to rounding
ODD_FUNCTIONS = ("Tanh", "Atan", "Asinh", "Sin", "Erf", "Tan")  # names of autograd's nodes


def find_symmetries(
    module: nn.Module,
    example_inputs: Any,
    time_limit_s: float = 120.0,
    select_outputs: Callable[[Any], Any] | None = None,
    kinds: Iterable[str] = KINDS,
) -> SymmetrySpec:
    """Find the symmetries of a network, and verify each of them on its function.

    Args:
        module: any network. It is not changed; a copy is traced and tried in float64 on the CPU.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. Small ones are enough and
            fast: every group costs a forward pass.
        time_limit_s: seconds after which groups that are not yet verified are left out.
        select_outputs: picks what must not change from what the module returns (default: every floating tensor in it), for
            instance `lambda outputs: outputs.logits` where hidden states are returned as well.
        kinds: which kinds of groups to look for: `"permutation"`, `"sign"`, `"scale"`.

    Returns:
        The spec: verified groups, and the rejected ones with the reason. The same for every call.

    Raises:
        ValueError: if the module does not run on the example inputs or cannot be traced.
    """
    kinds = set(kinds)
    if kinds - set(KINDS):
        raise ValueError(f"kinds has {sorted(kinds - set(KINDS))[0]!r}, expected some of {', '.join(KINDS)}.")
    deadline = time.monotonic() + time_limit_s
    function = NetworkFunction(module, example_inputs, select_outputs)
    found = traced_groups(function, deadline)
    search = _Search(function, deadline)
    groups, rejected = search.permutations(found) if "permutation" in kinds else ([], [])
    slopes = _Slopes(found, groups)
    size = sum(tensor.numel() for tensor in function.tensors.values())
    for gradient in function.gradients(GRADIENT_SAMPLES[size > MANY_PARAMETERS]):
        slopes.add(function.tensors, gradient)
    idle = [group for group in groups if not holds(group.max_error, slopes.control(group))]
    rejected += [
        RejectedGroup(g.name, g.size, "moving its first tensor alone does not change the function") for g in idle
    ]
    groups = [group for group in groups if group not in idle]
    if kinds & {"sign", "scale"}:
        signs, scales = search.signs_and_scales(found, slopes)
        groups += (signs if "sign" in kinds else []) + (scales if "scale" in kinds else [])
    touched = {item.tensor for group in groups for item in group.items}
    return SymmetrySpec(
        groups=tuple(groups),
        rejected=tuple(rejected),
        shapes={name: tuple(tensor.shape) for name, tensor in function.tensors.items() if name in touched},
        ties={alias: name for alias, name in function.ties.items() if name in touched},
    )


# --- variants of what the graph says


class _Variant(NamedTuple):
    """Some of the slices that a found group's units own, and how the units are made of them.

    Args:
        pieces (`tuple`): pairs of the place of a `(tensor, axis)` among the group's, and a column of its indices (`None`: all).
        form (`str`): `""` as they are, `"strided"`, `"blocks"` or `"within"`.
        count (`int`): number of blocks.
    """

    pieces: tuple[tuple[int, int | None], ...]
    form: str = ""
    count: int = 1

    def group(self, found: FoundGroup) -> SymmetryGroup:
        rows = _select(found.rows, self.pieces)
        if self.form == "strided":
            rows = {key: _strided(indices) for key, indices in rows.items()}
        elif self.form == "blocks":
            rows = {key: indices.reshape(self.count, -1) for key, indices in rows.items()}
        elif self.form == "within":
            rows = {key: _within(indices, self.count) for key, indices in rows.items()}
        suffix = {"blocks": f"/{self.count} blocks", "within": f"/within {self.count} blocks"}.get(self.form, "")
        items = tuple(SymmetryItem.from_rows(tensor, axis, indices) for (tensor, axis), indices in rows.items())
        return SymmetryGroup(rows_name(rows) + suffix, "permutation", len(next(iter(rows.values()))), items)


def _select(rows: Rows, pieces: Iterable[tuple[int, int | None]]) -> Rows:
    keys, selected = list(rows), {}
    for place, column in pieces:
        indices = rows[keys[place]] if column is None else rows[keys[place]][:, [column]]
        known = selected.get(keys[place])
        selected[keys[place]] = indices if known is None else np.concatenate([known, indices], axis=1)
    return selected


def _strided(indices: np.ndarray) -> np.ndarray:
    """The same indices, dealt out to the units in turns: a flatten after the channels became the last axis."""
    return np.sort(indices, axis=None).reshape(indices.shape[::-1]).T


def _within(indices: np.ndarray, count: int) -> np.ndarray:
    """Units that stay in their block and move alike in each of `count` blocks: channels inside attention heads."""
    return indices.reshape(count, -1, indices.shape[1]).transpose(1, 2, 0).reshape(len(indices) // count, -1)


_Pieces = tuple[tuple[int, int | None], ...]


def _whole(rows: Rows) -> _Pieces:
    return tuple((place, None) for place in range(len(rows)))


def _pieces_by_column(rows: Rows) -> _Pieces:
    """Every column apart where a unit owns a few indices (gates; fused query, key and value), else all of them as one."""
    return tuple(
        (place, column)
        for place, indices in enumerate(rows.values())
        for column in (range(indices.shape[1]) if 1 < indices.shape[1] <= 4 else [None])
    )


def _modules(rows: Rows, by_column: bool) -> list[_Pieces]:
    """The pieces cut up by module, and by the few rows of one module that a unit owns."""
    keys, parts = list(rows), {}
    for place, column in _pieces_by_column(rows) if by_column else _whole(rows):
        parts.setdefault((keys[place][0].rpartition(".")[0], column or 0), []).append((place, column))
    return [tuple(part) for part in parts.values()]


class _Slopes:
    """What the gradients of the function say, gathered sample by sample so that one sample is in memory.

    Args:
        found: for each `(tensor, axis)` of these, how much the outputs change with the logarithm of the scale of each index.
        groups: for each of these, how much the outputs change towards where its first tensor alone is moved: the control.
    """

    def __init__(self, found: Sequence[FoundGroup], groups: Sequence[SymmetryGroup]) -> None:
        self.sums: dict[tuple[str, int], list[torch.Tensor]] = {}
        self._axes = {key for one in found for key in one.rows}
        self._groups = groups
        self._controls: dict[str, float] = {group.name: 0.0 for group in groups}

    @torch.no_grad()
    def add(self, tensors: Mapping[str, torch.Tensor], gradient: Mapping[str, torch.Tensor]) -> None:
        """Take in the gradient of one projection of the outputs."""
        products: dict[str, torch.Tensor] = {}
        for tensor, axis in self._axes:
            if tensor in gradient:
                if tensor not in products:
                    products[tensor] = tensors[tensor] * gradient[tensor]
                others = [other for other in range(products[tensor].dim()) if other != axis]
                total = products[tensor].sum(others) if others else products[tensor]
                self.sums.setdefault((tensor, axis), []).append(total)
        for group in self._groups:
            item = group.items[0]
            if item.tensor in gradient and not self._controls[group.name]:
                value = restless(group, torch.Generator().manual_seed(1))
                moved = transform(tensors[item.tensor], item, value, group.kind)
                slope = (
                    torch.dot((moved - tensors[item.tensor]).flatten(), gradient[item.tensor].flatten()).abs().item()
                )
                self._controls[group.name] = max(self._controls[group.name], slope)

    def control(self, group: SymmetryGroup) -> float:
        """Relative change of the outputs, to first order, when only the first tensor of a group is moved."""
        return self._controls[group.name]


class _OutOfTime(Exception):
    """The time limit was over."""


class _Search:
    """Turns what the graph says into groups that hold, by trying variants on the function."""

    def __init__(self, function: NetworkFunction, deadline: float) -> None:
        self.function, self.deadline = function, deadline
        # counts that held before, the newest first; to begin with, all small numbers that modules hold (of heads, for one)
        numbers = {v for m in function.module.modules() for v in vars(m).values() if type(v) is int and 1 < v <= 256}
        self.block_counts = sorted(numbers, reverse=True)
        self.noise = 0.0  # largest change that permutations made: rounding

    # --- permutations
    def permutations(self, found: Sequence[FoundGroup]) -> tuple[list[SymmetryGroup], list[RejectedGroup]]:
        """All groups that hold, in the order of the graph, and what was found but does not hold."""
        alike: dict[Any, list[int]] = {}
        for number, one in enumerate(found):
            signature = (one.size, one.reaches_output, *((key[1], rows.shape[1]) for key, rows in one.rows.items()))
            alike.setdefault(signature, []).append(number)
        variants: dict[int, list[_Variant]] = {}
        with suppress(_OutOfTime):
            self._choose_variants(found, list(alike.values()), variants)
        groups = {(n, v): variant.group(found[n]) for n in sorted(variants) for v, variant in enumerate(variants[n])}
        kept, self.noise = self._verified([*groups.values()])
        names = {group.name for group in kept}
        covered = {number for (number, _), group in groups.items() if group.name in names}
        rejected = [
            self._rejection(found[number], number in variants) for number in range(len(found)) if number not in covered
        ]
        return kept, rejected

    def _choose_variants(self, found: Sequence[FoundGroup], alike: list[list[int]], variants: dict) -> None:
        plain = {number: _Variant(_whole(one.rows)) for number, one in enumerate(found)}
        outside = [members for members in alike if found[members[0]].reaches_output]
        inside = [members for members in alike if not found[members[0]].reaches_output]
        failing = [inside[n] for n in self._failing([[plain[k].group(found[k]) for k in m] for m in inside])]
        failing += [m for m in outside if self._fails([plain[n].group(found[n]) for n in m])]
        for members in [*inside, *outside]:
            if members not in failing:
                variants.update({number: [plain[number]] for number in members})
        for members in failing:
            first, *others = members
            variants[first] = self._variants(found[first])
            same = variants[first]
            if others and not (same and self._fails([v.group(found[n]) for n in others for v in same])):
                variants.update(dict.fromkeys(others, same))
            else:
                variants.update({number: self._variants(found[number]) for number in others})

    def _variants(self, found: FoundGroup) -> list[_Variant]:
        """How the units of a group that cannot move freely can move; perhaps not at all."""
        if any(rows.shape[1] > 1 for rows in found.rows.values()):
            strided = _Variant(_whole(found.rows), "strided")
            if not self._fails([strided.group(found)]):
                return [strided]
        return [] if found.reaches_output else self._block_variants(found)

    def _block_variants(self, found: FoundGroup) -> list[_Variant]:
        """Blocks that move as a whole, and units that move within blocks."""
        whole = _whole(found.rows)
        divisors = [count for count in range(found.size // 2, 1, -1) if found.size % count == 0]
        known = [count for count in self.block_counts if count in divisors]
        rest = [count for count in divisors if count not in known]
        tries = [  # as many blocks as move; where none do, as few within which units move
            *(("blocks", sorted(known, reverse=True)), ("within", sorted(known))),
            *(("blocks", rest), ("within", rest[::-1])),
        ]
        for form, counts in tries:
            for count in counts:
                blocks = _Variant(whole, form, count)
                if not self._fails([blocks.group(found)]):
                    count = self._finest(found, blocks) if form == "blocks" else count
                    blocks = blocks._replace(count=count)
                    self.block_counts = list(dict.fromkeys([count, *self.block_counts]))
                    within = self._variants_within(found, count)
                    return [blocks, *within] if form == "blocks" else within
        return []

    def _finest(self, found: FoundGroup, blocks: _Variant) -> int:
        """The largest multiple of a number of blocks that moves as well."""
        for factor in (2, 3, 5, 7):
            count = blocks.count * factor
            if found.size % count == 0 and count < found.size:
                finer = blocks._replace(count=count)
                if not self._fails([finer.group(found)]):
                    return self._finest(found, finer)
        return blocks.count

    def _variants_within(self, found: FoundGroup, count: int) -> list[_Variant]:
        """Pairs of modules that can move alone (query with key, value with output), and what is left as one group."""
        variants, left = [], _whole(found.rows)
        for by_column in (True, False):
            parts, left = [p for p in _modules(found.rows, by_column) if {q[0] for q in p} <= {q[0] for q in left}], ()
            while parts:
                first, *parts = parts
                for second in parts:
                    pair = _Variant((*first, *second), "within", count)
                    if not self._fails([pair.group(found)]):
                        variants.append(pair)
                        parts.remove(second)
                        break
                else:
                    left += first
        rest = _Variant(left, "within", count)
        return [*variants, rest] if left and not self._fails([rest.group(found)]) else variants

    # --- trying
    def _change(self, groups: Iterable[SymmetryGroup], seed: int) -> float:
        """One forward pass with all groups moved at once; what a group does for a seed does not depend on the others."""
        if time.monotonic() > self.deadline:
            raise _OutOfTime
        moves = []
        for group in groups:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {group.name}".encode()))  # 32 bits count
            moves.append((group, restless(group, generator), group.items))
        return change(self.function, moves)

    def _fails(self, groups: Sequence[SymmetryGroup], tolerance: float = TOLERANCE, seed: int = 0) -> bool:
        # a random order of a few units may keep to heads by chance: try more than one
        draws = NUM_DRAWS if any(group.size <= FEW_UNITS for group in groups) else 1
        return any(self._change(groups, seed + 100 * draw) > tolerance for draw in range(draws))

    def _failing(self, units: list[list[SymmetryGroup]], tolerance: float = TOLERANCE, seed: int = 0) -> list[int]:
        """Numbers of those units whose groups change the function, by halving what fails."""

        def search(numbers: list[int]) -> list[int]:
            if not numbers or not self._fails([g for n in numbers for g in units[n]], tolerance, seed):
                return []
            half = len(numbers) // 2
            return search(numbers[:half]) + search(numbers[half:]) if half else numbers

        return search(list(range(len(units))))

    def _verified(
        self, groups: list[SymmetryGroup], tolerance: float = TOLERANCE
    ) -> tuple[list[SymmetryGroup], float]:
        """The groups that hold, with the error that was seen, and that error.

        All are moved at once, with several draws; were one of them wrong, the function would show it.
        """
        error = 0.0
        try:
            for seed in range(1, NUM_DRAWS + 1) if groups else ():
                seen = self._change(groups, seed)
                if seen > tolerance:
                    failing = self._failing([[group] for group in groups], tolerance, seed)
                    failing = failing or range(len(groups))  # each holds alone, not so all together: offer none
                    return self._verified([g for n, g in enumerate(groups) if n not in failing], tolerance)
                error = max(error, seen)
        except _OutOfTime:
            return [], error
        return [replace(group, max_error=error) for group in groups], error

    def _verified_alike(
        self, groups: list[SymmetryGroup], tolerance: float = TOLERANCE
    ) -> tuple[list[SymmetryGroup], float]:
        """As `_verified`; where the first of some groups of one form fails, the others are not tried one by one."""
        alike: dict[Any, list[SymmetryGroup]] = {}
        for group in groups:
            form = [(item.axis, item.power, self.function.tensors[item.tensor].dim()) for item in group.items]
            alike.setdefault((group.name.rpartition("/")[2], *form), []).append(group)
        candidates = list(alike.values())
        try:
            failing = set(self._failing(candidates, tolerance))
            kept = [c for n, c in enumerate(candidates) if n not in failing or not self._fails(c[:1], tolerance)]
        except _OutOfTime:
            return [], 0.0
        names = {group.name for members in kept for group in members}
        return self._verified([group for group in groups if group.name in names], tolerance)

    def _rejection(self, found: FoundGroup, was_tried: bool) -> RejectedGroup:
        name = rows_name(found.rows)
        if not was_tried or time.monotonic() > self.deadline:
            return RejectedGroup(name, found.size, "not verified within the time limit")
        group = _Variant(_whole(found.rows)).group(found)
        error = change(self.function, [(group, restless(group, torch.Generator().manual_seed(1)), group.items)])
        reason = "its units are those of a model output; " if found.reaches_output else ""
        reason += f"changes the function by {error:.1e} (control {control_change(self.function, group):.1e})"
        return RejectedGroup(name, found.size, reason)

    # --- signs and scales
    def signs_and_scales(
        self, found: Sequence[FoundGroup], slopes: _Slopes
    ) -> tuple[list[SymmetryGroup], list[SymmetryGroup]]:
        """Groups of units whose slices can change their sign, and of those that can change their scale.

        Powers come from tensors whose gradient is not zero: the function notices each of them, so no other control is needed.
        """
        powers = [_powers(one, slopes, 100 * self.noise) for one in found]

        def candidates(kind: str) -> list[SymmetryGroup]:
            return [
                _factor_group(one, number, kind, generator)
                for one, generators in zip(found, powers, strict=True)
                for number, generator in enumerate(generators)
            ]

        scales, _ = self._verified_alike(candidates("scale"), max(EXACT, 10 * self.noise))
        signs, _ = self._verified_alike(candidates("sign"))
        if self._has_odd_functions():
            odd = self._odd_signs(found, {_places(group) for group in signs})
            signs += [group for group in odd if holds(group.max_error, control_change(self.function, group))]
        return signs, scales

    def _has_odd_functions(self) -> bool:
        if any(isinstance(module, nn.RNNBase) for module in self.function.module.modules()):
            return True
        with torch.enable_grad():
            waiting = [output.grad_fn for output in self.function.outputs()]
        seen = set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            sources = [source for source, _ in node.next_functions]
            if node.name().startswith("Add") and None in sources:  # 1 + tanh(x), as in an approximate GELU
                seen.update(source for source in sources if source is not None and source.name().startswith("Tanh"))
            clamped_evenly = node.name().startswith("Hardtanh") and node._saved_min_val == -node._saved_max_val
            if clamped_evenly or node.name().startswith(ODD_FUNCTIONS):
                return True
            waiting += sources
        return False

    def _odd_signs(self, found: Sequence[FoundGroup], known: set) -> list[SymmetryGroup]:
        """What flips together around an odd activation: writers and readers, one gate and the readers, a norm and its sides."""
        candidates = []
        for one in found:
            pieces, keys = _pieces_by_column(one.rows), list(one.rows)
            role = {piece: one.roles.get(keys[piece[0]], "") for piece in pieces}
            of = {
                name: [p for p in pieces if role[p] == name]
                for name in ("writes", "reads", "weight", "bias", "running_mean")
            }
            gates = sorted({column for _, column in of["writes"] if column is not None})
            choices = [
                of["writes"] + of["reads"],
                of["writes"] + of["running_mean"] + of["weight"],
                of["weight"] + of["bias"] + of["reads"],
                *([p for p in of["writes"] if p[1] == gate] + of["reads"] for gate in gates),
            ]
            for number, choice in enumerate(choices):
                if len(choice) > 1 and not one.reaches_output:
                    group = _factor_group(
                        one, number, "sign", dict.fromkeys(sorted(choice, key=pieces.index), 1), "/odd"
                    )
                    if _places(group) not in known:
                        known.add(_places(group))
                        candidates.append(group)
        return self._verified_alike(candidates)[0]


def _factor_group(
    found: FoundGroup, number: int, kind: str, powers: Mapping[tuple[int, int | None], int], mark: str = ""
) -> SymmetryGroup:
    keys, items = list(found.rows), []
    for power in (1, -1):
        # a sign and its inverse are the same flip
        pieces = [piece for piece, found_power in powers.items() if (found_power if kind == "scale" else 1) == power]
        rows = _select(found.rows, pieces)
        items += [SymmetryItem.from_rows(tensor, axis, indices, power) for (tensor, axis), indices in rows.items()]
    items.sort(key=lambda item: (keys.index((item.tensor, item.axis)), -item.power))
    return SymmetryGroup(f"{rows_name(found.rows)}{mark}/{kind} {number}", kind, found.size, tuple(items))


def _places(group: SymmetryGroup) -> frozenset:
    return frozenset((item.tensor, item.axis, item.index) for item in group.items)


def _powers(found: FoundGroup, slopes: _Slopes, noise: float) -> list[dict[tuple[int, int | None], int]]:
    """The scales of a group that the gradients allow: powers of pieces."""
    keys = list(found.rows)
    pieces = [piece for piece in _pieces_by_column(found.rows) if keys[piece[0]] in slopes.sums]
    generators = _integer_null_space([_equations(found, piece, slopes.sums) for piece in pieces], noise)
    return [{piece: power for piece, power in zip(pieces, g, strict=True) if power} for g in generators]


def _equations(found: FoundGroup, piece: tuple[int, int | None], sums: Mapping) -> np.ndarray:
    """How much each output changes with the logarithm of each unit's scale in one piece: `(samples x units,)`."""
    key = list(found.rows)[piece[0]]
    rows = found.rows[key] if piece[1] is None else found.rows[key][:, [piece[1]]]
    rows = torch.from_numpy(rows[:MAX_EQUATION_UNITS])
    return torch.stack([total[rows].sum(1) for total in sums[key]]).flatten().numpy()


def _integer_null_space(columns: list[np.ndarray], noise: float) -> list[list[int]]:
    """Combinations of the columns with powers of 1, -1 and 0 that vanish; columns that vanish alone take no part."""
    size = max((np.linalg.norm(column) for column in columns), default=0.0)
    live = [number for number, column in enumerate(columns) if np.linalg.norm(column) > 1e-6 * size > 0]
    if len(live) < 2:
        return []
    norms = np.array([np.linalg.norm(columns[number]) for number in live])
    matrix = np.stack([columns[number] for number in live], axis=1) / norms
    _, values, right = np.linalg.svd(matrix, full_matrices=True)
    values = np.pad(values, (0, len(live) - len(values)))
    basis = right[values < max(1e-8, noise) * values[0]] / norms * norms.max()
    generators = []
    for row in _reduced(basis):
        powers = np.rint(row).astype(int)
        if np.abs(row - powers).max() < 1e-3 and np.abs(powers).max() == 1 and np.count_nonzero(powers) > 1:
            full = [0] * len(columns)
            for number, power in zip(live, powers.tolist(), strict=True):
                full[number] = power
            generators.append(full)
    return generators


def _reduced(basis: np.ndarray) -> np.ndarray:
    """Reduced row echelon form: generators that share no tensors come apart."""
    basis = basis.copy()
    for row in range(len(basis)):
        place = np.unravel_index(np.abs(basis[row:]).argmax(), basis[row:].shape)
        basis[[row, row + place[0]]] = basis[[row + place[0], row]]
        basis[row] /= basis[row, place[1]]
        others = np.arange(len(basis)) != row
        basis[others] -= basis[others, place[1]][:, None] * basis[row]
    return basis
