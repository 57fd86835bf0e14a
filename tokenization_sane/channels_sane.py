"""Which channel of one module is which channel of the next, from torch-pruning's dependency graph.

Every channel of every module is a node of one large graph, and so is every index along an axis of a tensor; its connected
components are the units. Tied tensors, shared modules and concatenations are joined on the way. Modules are read by their type and
operations by the shapes that autograd remembers; names of tensors and modules play no part.
"""

import itertools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .function_sane import NetworkFunction, floating_tensors

Rows = dict[tuple[str, int], np.ndarray]  # (tensor, axis) -> indices, int64 of shape (units, repeat)


class FoundGroup(NamedTuple):
    """Units that the graph says belong together, before anything is tried.

    Args:
        rows (`Rows`): the indices that each unit owns.
        reaches_output (`bool`): True where the units are those of a model output.
        roles (`dict`): what each `(tensor, axis)` does to the units: `"writes"`, `"reads"`, or the part it has in a norm.
    """

    rows: Rows
    reaches_output: bool
    roles: dict[tuple[str, int], str]

    @property
    def size(self) -> int:
        """Number of units."""
        return len(next(iter(self.rows.values())))


def rows_name(rows: Rows) -> str:
    """Tensor and axis of the first indices, and where they begin."""
    (tensor, axis), indices = next(iter(rows.items()))
    return f"{tensor}@{axis}" + (f"+{indices.min()}" if indices.min() else "")


class _Index(NamedTuple):
    """What torch-pruning's index mappings read: a channel, and the channel it came from."""

    idx: int
    root_idx: int


def traced_groups(function: NetworkFunction, deadline: float) -> list[FoundGroup]:
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


def _dependency_graph(function: NetworkFunction) -> Any:
    """torch-pruning's graph of a module."""
    import torch_pruning
    from torch_pruning.dependency import index_mapping

    def outputs_with_history(outputs: Any) -> list[Tensor]:
        return [tensor for tensor in floating_tensors(function.select_outputs(outputs)) if tensor.grad_fn is not None]

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
        is_channel_axis = axis == 1 and len(shapes[0]) != 3  # (batch, tokens, channels)
        if is_channel_axis and len({id(source) for source in sources}) == len(sources):
            lengths = [
                source._input_metadata[number].shape[1] if source else 0 for source, number in history.next_functions
            ]
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
    if (
        len(chain) < 3
        or "View" not in chain[-1].grad_fn.name()
        or joined != (shape[0], shape[1] * shape[2], *shape[3:])
    ):
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
        self.roles: dict[tuple[str | None, int], str] = {}
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
                self._note_role(module, tensor, axis, tensor is not module.out_proj.weight)

    def _roots(self) -> Iterator[tuple[Any, Any, np.ndarray]]:
        """Output channels of every module that makes new channels."""
        for module, node in self.graph.module2node.items():
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding) or _is_transposed_linear(module):
                pruner = self.graph.get_pruner_of_module(module)
                yield node, pruner.prune_out_channels, np.arange(pruner.get_out_channels(module))

    def _link_tensors(self, node: Any, side: Any, channels: np.ndarray, is_output_side: bool) -> None:
        for tensor, axis, ours, indices in _held(node.module, is_output_side, channels, node.pruning_dim):
            self._link_index((node, side), ours, tensor, axis, indices)
            self._note_role(node.module, tensor, axis, is_output_side)
        period = _row_period(node.module, is_output_side)
        if period:
            self._link((node, side), channels, ("rows", node), channels % period)

    def _note_role(self, module: Any, tensor: Tensor, axis: int, is_output_side: bool) -> None:
        key = (self.names.get(id(tensor)), axis)
        if isinstance(module, _NORMS):
            self.roles[key] = next(name for name in _NORM_PARTS if getattr(module, name, None) is tensor)
            return
        reads_itself = isinstance(module, _RecurrentLinear) and axis == 1  # the last state
        role = "writes" if is_output_side and not reads_itself else "reads"
        self.roles[key] = role if self.roles.get(key, role) == role else "both"  # a depthwise convolution

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
    if isinstance(module, _NORMS):
        vectors = [getattr(module, name, None) for name in _NORM_PARTS]
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


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


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


def _groups_of_units(codes: np.ndarray, units: np.ndarray, channels: _ChannelGraph) -> list[FoundGroup]:
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
            groups.append(
                FoundGroup(rows, reaches_output, {key: channels.roles[key] for key in rows if key in channels.roles})
            )
    return sorted(
        groups, key=lambda group: [(order[name], axis, rows[0, 0]) for (name, axis), rows in group.rows.items()]
    )
