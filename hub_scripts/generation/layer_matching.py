"""Which layer of a new architecture comes from which layer of an old one: by kind, shape and relative depth, in order.

Modules form a tree. The children of two modules are aligned without crossings, as sequences are in an edit distance (Needleman and
Wunsch 1970), such that as many layers as possible find a source of their kind; among those alignments, the one with the most
similar shapes and relative depths. A residual block is a node of the tree, so that a new one is inserted as a whole. Names of
modules play no part.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from tokenization_sane import SymmetrySpec
from tokenization_sane.layout_sane import TensorSpec
from tokenization_sane.specs_sane import module_specs
from tokenization_sane.symmetry_sane import SymmetryGroup, SymmetryItem

# What a pair of layers loses of its worth of 1; together less than 1, so that a pair is always better than none
WIDER_COST, NARROWER_COST, MAX_SHAPE_COST = 0.05, 0.2, 0.3  # for each doubling or halving of an axis; at most
KERNEL_COST = 0.1
RESOLUTION_COST = 0.1  # on images of another size: there is a pooling between
SETTINGS_COST = 0.3  # another stride or dilation
DEPTH_COST = 0.01  # from one end to the other
SETTINGS = ("stride", "dilation", "transposed")
MATRICES = ("conv", "linear", "recurrent")  # kinds of layers that read units on one side and write others


@dataclass(frozen=True, eq=False)
class Layer:
    """A module that holds floating tensors itself.

    Args:
        name (`str`): of the module in its network.
        kind (`str`): one of `LAYER_KINDS`.
        module (`nn.Module`): itself.
        tensors (`dict[str, TensorSpec]`): by their name in the module; tied ones stand in the first layer that has them.
        follows (`str`, *optional*): of a norm, the layer whose output is its input.
        resolution (`tuple[int, ...]`, *optional*): height and width of what a convolution gives.
    """

    name: str
    kind: str
    module: nn.Module
    tensors: dict[str, TensorSpec]
    follows: str | None = None
    resolution: tuple[int, ...] | None = None

    @property
    def largest(self) -> TensorSpec:
        """Its tensor with the most values."""
        return max(self.tensors.values(), key=lambda spec: math.prod(spec.shape))

    def write_axis(self, spec: TensorSpec) -> int:
        """The axis of a matrix or kernel that gives what the layer writes."""
        return spec.row_axis or 0

    def read_axis(self, spec: TensorSpec) -> int | None:
        """The axis of a matrix or kernel that takes what the layer reads; None for tensors that hold one slice for each unit."""
        is_matrix = self.kind in MATRICES and len(spec.shape) >= 2 and not self.is_depthwise
        return 1 - self.write_axis(spec) if is_matrix else None

    @property
    def is_depthwise(self) -> bool:
        """True for a convolution that keeps its channels apart."""
        return self.kind == "conv" and getattr(self.module, "groups", 1) > 1 and self.largest.shape[1] == 1

    def is_kernel_axis(self, spec: TensorSpec, axis: int) -> bool:
        """True for height, width or depth of a kernel."""
        return self.kind == "conv" and len(spec.shape) >= 3 and axis >= 2


class Architecture:
    """The layers of a network, and the units that the axes of their tensors belong to.

    Args:
        module (`nn.Module`): the network.
        spec ([`SymmetrySpec`]): its symmetries; the permutations are used.
        inputs (`torch.Tensor` of shape `(images, channels, height, width)`): to run it on.
    """

    def __init__(self, module: nn.Module, spec: SymmetrySpec, inputs: torch.Tensor):
        self.module, self.kind = module, type(module).__name__
        specs, self.ties = module_specs(module)
        self.groups = {group.name: group for group in spec.of_kind("permutation").groups}
        self.owners: dict[tuple[str, int], list[tuple[SymmetryGroup, SymmetryItem]]] = {}
        for group in self.groups.values():
            for item in group.items:
                self.owners.setdefault((item.tensor, item.axis), []).append((group, item))
        tensors: dict[str, dict[str, TensorSpec]] = {}
        for found in specs:
            if getattr(torch, found.dtype).is_floating_point:
                prefix, _, own = found.name.rpartition(".")
                tensors.setdefault(prefix, {})[own] = found
        modules = dict(module.named_modules())
        kinds = {name: next((s.kind for s in held.values() if s.kind), "other") for name, held in tensors.items()}
        follows, shapes, self.failure = _observed(module, {name: modules[name] for name in tensors}, inputs)
        self.layers: dict[str, Layer] = {}
        for name, held in tensors.items():
            before = follows.get(name) if kinds[name] == "norm" else None
            resolution = shapes[name][2:] if kinds[name] == "conv" and name in shapes else None
            self.layers[name] = Layer(name, kinds[name], modules[name], held, before, resolution)
        self.tree = _tree(module, "", self.layers) or _Node(None, [])

    def units(self, spec: TensorSpec, axis: int | None) -> list[tuple[SymmetryGroup, SymmetryItem]]:
        """Groups of units that own slices along an axis, and which slices; none where the axis is fixed."""
        return [] if axis is None else self.owners.get((spec.name, axis), [])

    def fixed(self, spec: TensorSpec, axis: int) -> np.ndarray:
        """Indices along an axis that belong to no unit, in order: int64."""
        free = np.ones(spec.shape[axis], dtype=bool)
        for group, item in self.units(spec, axis):
            free[item.rows(group.size)] = False
        return np.flatnonzero(free)


def repeat(item: SymmetryItem) -> int:
    """Indices that each unit owns."""
    return item.index[2] if item.is_affine else len(item.index[0])


@torch.no_grad()
def _observed(
    module: nn.Module, parts: Mapping[str, nn.Module], inputs: torch.Tensor
) -> tuple[dict[str, str], dict[str, tuple[int, ...]], RuntimeError | None]:
    """Run a network: parts whose input is the very output of another one, and that one; shapes of outputs; the error if it fails."""
    follows: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    outputs: dict[int, tuple[str, torch.Tensor]] = {}  # the tensor is kept, or another one might take its id

    def note_input(name: str, values: tuple) -> None:
        found = outputs.get(id(values[0])) if values else None
        if found is not None:
            follows[name] = found[0]

    def note_output(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs[id(output)], shapes[name] = (name, output), tuple(output.shape)

    hooks = [part.register_forward_pre_hook(lambda _, values, n=n: note_input(n, values)) for n, part in parts.items()]
    hooks += [part.register_forward_hook(lambda _, __, out, n=n: note_output(n, out)) for n, part in parts.items()]
    failure = None
    try:
        module(inputs[:1])
    except RuntimeError as error:  # another input size; the layers tell more about it than the error does
        failure = error
    finally:
        for hook in hooks:
            hook.remove()
    return follows, shapes, failure


# --- the tree


@dataclass(eq=False)
class _Node:
    """A layer, or modules that stand together."""

    layer: Layer | None
    children: list["_Node"]

    @property
    def parts(self) -> list["_Node"]:
        """Its children; a layer is the only part of itself."""
        return self.children or [self]

    def leaves(self) -> Iterator[Layer]:
        if self.layer is not None:
            yield self.layer
        for child in self.children:
            yield from child.leaves()


def _tree(module: nn.Module, prefix: str, layers: Mapping[str, Layer]) -> _Node | None:
    """The modules below one that hold tensors."""
    own = _Node(layers[prefix], []) if prefix in layers else None
    children = [own] if own else []
    for name, child in module.named_children():
        node = _tree(child, f"{prefix}.{name}" if prefix else name, layers)
        if node is not None:
            children.append(node)
    joined: list[_Node] = []
    for node in children:
        before = joined[-1] if joined else None
        if node.layer is not None and before is not None and node.layer.follows in [x.name for x in before.leaves()]:
            # a norm and what it normalises come and go together: the same norm after another layer means something else
            joined[-1] = _Node(None, [*before.parts, node])
        else:
            joined.append(node)
    if joined == [own]:
        return own
    return _Node(None, joined) if joined else None


# --- pairs


class LayerMatch(NamedTuple):
    """Sources of layers.

    Args:
        pairs (`dict[str, str]`): layer of the target to the layer of the source that it comes from.
        donors (`list[dict[str, str]]`): for each new part of the target, its layers to those of the most similar part of the
            source, which has a place of its own.
    """

    pairs: dict[str, str]
    donors: list[dict[str, str]]


def match_layers(target: Architecture, source: Architecture) -> LayerMatch:
    """Find the source of each layer of `target`; layers without one are in no pair."""
    matcher, found = _Matcher(target, source), LayerMatch({}, [])
    if matcher.worth(target.tree, source.tree):
        matcher.collect(target.tree, source.tree, found.pairs, found.donors)
    return found


def mismatch(target: Architecture, ours: Layer, source: Architecture, theirs: Layer) -> str | None:
    """Why a layer of the target cannot come from a layer of the source; None if it can."""
    kinds = [(layer.kind, {own: len(spec.shape) for own, spec in layer.tensors.items()}) for layer in (ours, theirs)]
    if kinds[0] != kinds[1]:
        return f"{theirs.name} of the old one has other tensors"
    for own, spec in ours.tensors.items():
        other = theirs.tensors[own]
        for axis in (axis for axis in range(len(spec.shape)) if not ours.is_kernel_axis(spec, axis)):
            units, others = target.units(spec, axis), source.units(other, axis)
            where = f"axis {axis} of {spec.name} has length {spec.shape[axis]}, that of the old {other.name} {other.shape[axis]}"
            if len(units) != len(others):
                return f"{where}, and only one of them holds hidden units"
            for (group, item), (other_group, other_item) in zip(units, others, strict=True):
                if repeat(item) != repeat(other_item) and not (len(units) > 1 and group.size == other_group.size):
                    return f"{where}, with {repeat(item)} and {repeat(other_item)} values for each unit"
            if len(target.fixed(spec, axis)) != len(source.fixed(other, axis)):
                return f"{where}, and they hold no hidden units"
    return None


class _Matcher:
    """Alignments of nodes; each pair of nodes is looked at once."""

    def __init__(self, target: Architecture, source: Architecture):
        self.target, self.source = target, source
        self.known: dict[tuple[int, int], float] = {}

    def worth(self, ours: _Node, theirs: _Node) -> float:
        """Nearly the number of layers of a node that find their source in the other; 0 if none does."""
        key = (id(ours), id(theirs))
        if key not in self.known:
            if ours.layer is not None and theirs.layer is not None:
                self.known[key] = self._likeness(ours.layer, theirs.layer)
            else:
                self.known[key] = max(self._table(*way)[-1, -1] for way in _ways(ours, theirs))
        return self.known[key]

    def _likeness(self, ours: Layer, theirs: Layer) -> float:
        if mismatch(self.target, ours, self.source, theirs) is not None:
            return 0.0
        spec, cost, kernels_differ = ours.largest, 0.0, False
        for axis, (new, old) in enumerate(zip(spec.shape, theirs.largest.shape, strict=True)):
            if ours.is_kernel_axis(spec, axis):
                kernels_differ |= new != old
            else:
                doublings = math.log2(max(new, 1) / max(old, 1))
                cost += max(WIDER_COST * doublings, -NARROWER_COST * doublings)
        settings_differ = any(getattr(ours.module, s, None) != getattr(theirs.module, s, None) for s in SETTINGS)
        cost = min(MAX_SHAPE_COST, cost) + KERNEL_COST * kernels_differ + SETTINGS_COST * settings_differ
        return 1 - cost - RESOLUTION_COST * (ours.resolution != theirs.resolution)

    def _gain(self, ours: Sequence[_Node], i: int, theirs: Sequence[_Node], j: int) -> float:
        depths = [place / (len(nodes) - 1) if len(nodes) > 1 else 0.0 for place, nodes in ((i, ours), (j, theirs))]
        worth = self.worth(ours[i], theirs[j])
        return worth - DEPTH_COST * abs(depths[0] - depths[1]) if worth else 0.0

    def _table(self, ours: Sequence[_Node], theirs: Sequence[_Node]) -> np.ndarray:
        """Best worth of the first nodes of both: `(ours + 1, theirs + 1)`."""
        table = np.zeros((len(ours) + 1, len(theirs) + 1))
        for i in range(len(ours)):
            for j in range(len(theirs)):
                both = table[i, j] + self._gain(ours, i, theirs, j)
                table[i + 1, j + 1] = max(table[i, j + 1], table[i + 1, j], both)
        return table

    def collect(self, ours: _Node, theirs: _Node, pairs: dict[str, str], donors: list[dict[str, str]]) -> None:
        """Note the pairs of the best alignment, and donors for the parts that it leaves out."""
        if ours.layer is not None and theirs.layer is not None:
            pairs[ours.layer.name] = theirs.layer.name
            return
        news, olds = max(_ways(ours, theirs), key=lambda way: self._table(*way)[-1, -1])
        table, i, j = self._table(news, olds), len(news), len(olds)
        while i:
            if j and table[i, j] == table[i, j - 1]:
                j -= 1
            elif table[i, j] == table[i - 1, j]:
                i -= 1
                gains = [self._gain(news, i, olds, place) for place in range(len(olds))]
                if any(gains):
                    donors.append({})
                    self.collect(news[i], olds[int(np.argmax(gains))], donors[-1], [])
            else:
                i, j = i - 1, j - 1
                self.collect(news[i], olds[j], pairs, donors)


def _ways(ours: _Node, theirs: _Node) -> list[tuple[list[_Node], list[_Node]]]:
    """How two nodes can be aligned: part by part, or one of them with the parts of the other, which has a level more."""
    ways = [(ours.parts, theirs.parts)]
    if ours.children and theirs.children:
        ways += [([ours], theirs.parts), (ours.parts, [theirs])]
    return ways
