"""One order of the units for all networks that differ by permutations and signs alone.

Weight matching needs a reference; the order here is the network's own: units are sorted by the size of their weights, and
signs are chosen so that a unit's first weights sum to something positive. Networks that are each other's permuted twins come
out equal, up to units of exactly equal size; others are not brought near each other, as weight matching does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .symmetry_sane import SymmetryGroup, SymmetryItem, SymmetrySpec, axis_index


def canonical_order(spec: SymmetrySpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Networks with the same functions, in the order that is their own.

    Scales stay as they are: moving them would change the spread of the weights.

    Args:
        spec ([`SymmetrySpec`]): of the networks.
        tensors (`Mapping[str, Tensor]`): stacked state dicts, each `(networks, *shape)`; they are not changed.

    Returns:
        `dict[str, Tensor]`: the same names and shapes.
    """
    result = dict(tensors)
    aliases = {name: [name, *(a for a, stored in spec.ties.items() if stored == name)] for name in tensors}
    for kind, choose in (("sign", _signs), ("permutation", _order)):
        for group in spec.groups:
            if group.kind != kind:
                continue
            chosen = choose(group, result)
            for item in group.items:
                names = [name for name in aliases.get(item.tensor, ()) if name in result]
                if names:
                    moved = _moved(result[names[0]], item, chosen, kind)
                    result.update(dict.fromkeys(names, moved))
    return result


def _slices(tensor: Tensor, item: SymmetryItem, size: int) -> Tensor:
    """What each unit owns: `(networks, units, values)`, float64."""
    rows = torch.from_numpy(item.rows(size)).to(tensor.device)
    along = tensor.movedim(item.axis + 1, 1).index_select(1, rows.flatten()).double()
    return along.reshape(len(tensor), size, -1)


def _signs(group: SymmetryGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Signs `(networks, units)`, from the first tensor in which a unit's values do not sum to zero.

    A sum does not depend on the order of the values; signs of other groups that act on them were chosen before, from the
    network's input on.
    """
    signs = None
    for item in group.items:
        if item.tensor in tensors:
            found = _slices(tensors[item.tensor], item, group.size).sum(-1).sign()
            signs = found if signs is None else torch.where(signs == 0, found, signs)
    return torch.where(signs == 0, 1.0, signs)


def _order(group: SymmetryGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Permutations `(networks, units)`: ascending by the product of the sizes of what a unit owns in each tensor."""
    size = None
    for item in group.items:
        if item.tensor in tensors and tensors[item.tensor].is_floating_point():
            found = _slices(tensors[item.tensor], item, group.size).square().sum(-1).add(1e-12).log()
            size = found if size is None else size + found
    return size.argsort(dim=-1, stable=True)


def _moved(tensor: Tensor, item: SymmetryItem, chosen: Tensor, kind: str) -> Tensor:
    axis, length = item.axis + 1, tensor.shape[item.axis + 1]
    shape = [1] * tensor.ndim
    shape[0], shape[axis] = len(tensor), length
    if kind == "permutation":
        index = axis_index(item, chosen, length).view(shape)
        return tensor.gather(axis, index.expand_as(tensor))
    factor = torch.ones(len(tensor), length, dtype=tensor.dtype, device=tensor.device)
    rows = torch.from_numpy(item.rows(chosen.shape[-1])).to(tensor.device)
    factor[:, rows] = chosen.to(tensor.dtype)[..., None].expand(*chosen.shape, rows.shape[1])
    return tensor * factor.view(shape)
