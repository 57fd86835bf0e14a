"""Which unit (channel) of a new architecture is which unit of an old one, and what becomes of layers that the old one lacks.

Units move together in the groups of a `SymmetrySpec`, so one map for each group says all: the weights of a group's readers, writers
and norms follow from it. A layer without a source reads units of one group and writes units of another:

* where nothing else writes that group and both groups have one origin, the layer hands its inputs on (`identities`);
* where something else writes it, as beside a skip connection, the layer says nothing yet (`silent`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from hub_scripts.generation.layer_matching import MATRICES, Architecture, Layer, match_layers, mismatch, repeat
from tokenization_sane.layout_sane import TensorSpec
from tokenization_sane.symmetry_sane import SymmetryGroup


@dataclass
class GrowthPlan:
    """Where each layer and each group of units of a target comes from.

    Args:
        pairs (`dict[str, str]`): layer of the target to its source.
        donors (`dict[str, str]`): new layer to the layer that lends its first values.
        identities (`set[str]`): new layers that hand their inputs on.
        silent (`set[str]`): new layers that add nothing to what others write.
        origins (`dict[str, str]`): group of the target to the group of the source whose units it has.
    """

    pairs: dict[str, str]
    donors: dict[str, str] = field(default_factory=dict)
    identities: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    origins: dict[str, str] = field(default_factory=dict)


class _Edge(NamedTuple):
    """A new layer between two groups of units."""

    layer: Layer
    reads: str
    writes: str
    can_hand_on: bool


def plan_growth(target: Architecture, source: Architecture) -> GrowthPlan:
    """Find a source for each layer and group of units of `target`.

    Raises:
        ValueError: If there is none for some layer; the message names it.
    """
    match = match_layers(target, source)
    plan = GrowthPlan(match.pairs)
    live: set[str] = set()  # groups that something writes already
    for name, other in match.pairs.items():
        layer = target.layers[name]
        if not _join(plan.origins, target, layer, source, source.layers[other]):
            raise _no_mapping(target, source, _conflict(match.pairs, name, source))
        live |= {group.name for group in _written(target, layer)}
    new_layers = [layer for name, layer in target.layers.items() if name not in match.pairs]
    edges = [edge for layer in new_layers for edge in _edges(target, layer)]
    for edge in edges:
        if not (edge.reads and edge.writes):
            raise _no_source(target, edge.layer, source)
    while path := _identity_path(edges, plan.origins, live):
        for edge in path:
            plan.identities.add(edge.layer.name)
            plan.origins[edge.writes] = plan.origins[path[0].reads]
            live.add(edge.writes)
    for edge in edges:
        if edge.writes in plan.origins and edge.layer.name not in plan.identities:
            if edge.writes not in live:
                raise _no_source(target, edge.layer, source)
            plan.silent.add(edge.layer.name)
    for part in match.donors:
        donors, origins = {n: o for n, o in part.items() if n not in plan.identities}, dict(plan.origins)
        if all(_join(origins, target, target.layers[n], source, source.layers[o]) for n, o in donors.items()):
            plan.origins = origins
            plan.donors |= donors
    return plan


def _join(origins: dict[str, str], target: Architecture, ours: Layer, source: Architecture, theirs: Layer) -> bool:
    """Note that the units along the axes of one layer are those of another; False if they are known to be others."""
    for own, spec in ours.tensors.items():
        other = theirs.tensors[own]
        for axis in range(len(spec.shape)):
            for (group, _), (origin, _) in zip(target.units(spec, axis), source.units(other, axis), strict=True):
                if origins.setdefault(group.name, origin.name) != origin.name:
                    return False
    return True


def _written(target: Architecture, layer: Layer) -> list[SymmetryGroup]:
    """Groups whose units a layer makes, from other units or from tokens."""
    axes = [(s, layer.write_axis(s)) for s in layer.tensors.values() if layer.read_axis(s) is not None]
    if layer.kind == "embedding":
        axes = [(spec, axis) for spec in layer.tensors.values() for axis in range(len(spec.shape))]
    return [group for spec, axis in axes for group, _ in target.units(spec, axis)]


def _edges(target: Architecture, layer: Layer) -> list[_Edge]:
    edges = []
    for spec in layer.tensors.values():
        axis = layer.read_axis(spec)
        if axis is None:
            continue
        reads, writes = target.units(spec, axis), target.units(spec, layer.write_axis(spec))
        is_plain = layer.kind in ("conv", "linear") and getattr(layer.module, "groups", 1) == 1
        one_to_one = len(reads) == len(writes) == 1 and repeat(reads[0][1]) == repeat(writes[0][1])
        names = [[group.name for group, _ in found] or [""] for found in (reads, writes)]
        edges += [_Edge(layer, r, w, is_plain and one_to_one) for r in names[0] for w in names[1]]
    return edges


def _identity_path(edges: list[_Edge], origins: Mapping[str, str], live: set[str]) -> list[_Edge]:
    """The fewest new layers, in order, from a group that is written to one that is not, both of one origin; empty if none."""
    for goal in [group for group in origins if group not in live]:
        paths, seen = [[edge] for edge in edges if edge.writes == goal and edge.can_hand_on], {goal}
        while paths:  # breadth first, from the goal backwards
            path, *paths = paths
            start = path[0].reads
            if start in live and origins.get(start) == origins[goal]:
                return path
            if start not in origins and start not in seen:
                seen.add(start)
                paths += [[edge, *path] for edge in edges if edge.writes == start and edge.can_hand_on]
    return []


def _no_mapping(target: Architecture, source: Architecture, reason: str) -> ValueError:
    return ValueError(f"the old {source.kind} cannot be mapped to the new {target.kind}: {reason}.")


def _conflict(pairs: Mapping[str, str], name: str, source: Architecture) -> str:
    left = [n for n, layer in source.layers.items() if n not in pairs.values() and layer.kind in MATRICES]
    if left:
        return f"{left[0]} of the old one has no place, and only what stands beside a skip connection can be left out"
    return f"{name} of the new one joins units that are apart in the old one"


def _no_source(target: Architecture, layer: Layer, source: Architecture) -> ValueError:
    """The error for a layer that has no source, with what keeps the nearest layer of its kind from being it."""
    depth = {name: place / len(source.layers) for place, name in enumerate(source.layers)}
    own = list(target.layers).index(layer.name) / len(target.layers)
    alike = [other for other in source.layers.values() if other.kind == layer.kind]
    nearest = min(alike, key=lambda other: abs(depth[other.name] - own), default=None)
    if nearest is None:
        reason = f"the old one has no {layer.kind} layer"
    else:
        reason = mismatch(target, layer, source, nearest) or f"{nearest.name} of the old one has another place"
    return _no_mapping(target, source, f"{layer.name} of the new one has no source ({reason})")


# --- units


class UnitMaps:
    """For each group of a target, which unit of the source each of its units is.

    More units than before: all, again and again in turn; what reads them takes a share of each, so that sums stay (Net2Net, Chen,
    Goodfellow and Shlens 2016, arXiv 1511.05641). Fewer: those with the largest weights, on average over the networks, so that the
    networks stay aligned.

    Args:
        target ([`Architecture`]), source ([`Architecture`]): new and old.
        origins (`Mapping[str, str]`): group of the target to group of the source.
        tensors (`Mapping[str, torch.Tensor]`): stacked tensors of the source, each `(networks, *shape)`.
    """

    def __init__(
        self,
        target: Architecture,
        source: Architecture,
        origins: Mapping[str, str],
        tensors: Mapping[str, torch.Tensor],
    ):
        self.target, self.source = target, source
        self.units: dict[str, np.ndarray] = {}  # (units of the target's group,) int64
        for name, origin in origins.items():
            size, known = target.groups[name].size, source.groups[origin]
            if size < known.size:
                self.units[name] = np.sort(np.argsort(-_weight_shares(known, tensors), kind="stable")[:size])
            else:
                self.units[name] = np.arange(size) % known.size

    def along(self, spec: TensorSpec, other: TensorSpec, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the values along an axis come from.

        Args:
            spec ([`TensorSpec`]): of the target's tensor.
            other ([`TensorSpec`]): of its source.
            axis (`int`): of both.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: index along the source's axis int64, and what share of it a reader takes float32,
            each `(length,)`.
        """
        index, shares = np.full(spec.shape[axis], -1), np.ones(spec.shape[axis], dtype=np.float32)
        index[self.target.fixed(spec, axis)] = self.source.fixed(other, axis)
        groups = zip(self.target.units(spec, axis), self.source.units(other, axis), strict=True)
        for (group, item), (origin, other_item) in groups:
            if repeat(item) != repeat(other_item):
                continue  # channels inside heads, where there are more heads: the group of whole heads moves them
            rows, units = item.rows(group.size), self.units[group.name]
            index[rows] = other_item.rows(origin.size)[units]
            shares[rows] = 1 / np.bincount(units)[units][:, None]
        assert (index >= 0).all()
        return torch.from_numpy(index), torch.from_numpy(shares)

    def handed_on(self, layer: Layer, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Matrix of a new layer that hands its inputs on: float32 `(written, read)`; and equal numbers for equal inputs, `(read,)`."""
        (reads, read_item), (writes, write_item) = (
            self.target.units(spec, axis)[0] for axis in (layer.read_axis(spec), layer.write_axis(spec))
        )
        matrix = np.zeros((spec.shape[layer.write_axis(spec)], spec.shape[layer.read_axis(spec)]), dtype=np.float32)
        inputs = np.zeros(matrix.shape[1], dtype=np.int64)
        inner, outer = self.units[reads.name], self.units[writes.name]
        shares = (outer[:, None] == inner) / np.bincount(inner)[inner]
        places = zip(write_item.rows(writes.size).T, read_item.rows(reads.size).T, strict=True)
        for number, (rows, columns) in enumerate(places):
            matrix[rows[:, None], columns] = shares
            inputs[columns] = inner * repeat(read_item) + number
        return torch.from_numpy(matrix), torch.from_numpy(inputs)


def _weight_shares(group: SymmetryGroup, tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """How much of the squared weights of its matrices each unit of a group owns: float64 `(units,)`."""
    total = np.zeros(group.size)
    for item in group.items:
        values = tensors[item.tensor]
        if values.dim() > 2:  # (networks, rows, columns, ...)
            squares = values.double().square().movedim(item.axis + 1, 0).flatten(1).sum(1).numpy()
            owned = squares[item.rows(group.size)].sum(1)
            total += owned / max(owned.sum(), 1e-300)
    return total
