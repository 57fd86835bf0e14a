"""Aligns the networks of a zoo to one of them, and says how much that shrank the distance."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import SymmetrySpec, WeightMatcher, weight_distance


class ZooAligner:
    """Matches networks to a reference of the train split.

    Args:
        spec ([`SymmetrySpec`]): of the networks. Scales are left out: they would change the values that statistics are made of.
        reference_id (`str`): model id of the reference.
        reference (`Mapping[str, torch.Tensor]`): its last checkpoint.
    """

    def __init__(self, spec: SymmetrySpec, reference_id: str, reference: Mapping[str, torch.Tensor]):
        self.spec, self.reference_id, self.reference = spec.of_kind("permutation", "sign"), reference_id, reference
        self._matcher = WeightMatcher(self.spec, reference)

    @classmethod
    def of_zoo(cls, zoo: Zoo) -> "ZooAligner | None":
        """The aligner that brings networks to the order of a zoo's own; None if nothing of its networks can be moved.

        The reference is the one that the zoo names; of a zoo that was not aligned, its first train model.
        """
        if not zoo.has_symmetries or not zoo.symmetries.of_kind("permutation", "sign").groups:
            return None
        first = zoo.rows("train")[0]
        for reference in (first.get("alignment_reference"), first["model_id"]):
            row = zoo.last_row_of("train", reference)
            if row is not None:
                break
        return cls(zoo.symmetries, reference, zoo.state_dict("train", row))

    def align_stacked(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Stacked networks `(networks, *shape)`, each matched on its own."""
        count = len(next(iter(tensors.values())))
        networks = ({name: tensor[i] for name, tensor in tensors.items()} for i in range(count))
        aligned = [found.state_dict for found in self._matcher.align_all(networks)]
        return {name: torch.stack([network[name] for network in aligned]) for name in tensors}

    def match(self, last: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Permutations and signs that bring the last checkpoint of a network near the reference.

        All checkpoints of the network get the same: that keeps its run continuous, and matching a trained checkpoint means more
        than matching an initial one.
        """
        return self._matcher.match(last)

    def apply(
        self, state_dict: Mapping[str, torch.Tensor], draw: list[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """A checkpoint after the permutation, and its row's columns about that."""
        aligned = self.spec.apply(state_dict, draw)
        return aligned, {
            "alignment_reference": self.reference_id,
            "alignment_distance_before": weight_distance(state_dict, self.reference),
            "alignment_distance_after": weight_distance(aligned, self.reference),
            "alignment_permutations": [value.long().tolist() for value in draw],
        }


def unaligned(
    spec: SymmetrySpec, state_dict: Mapping[str, torch.Tensor], permutations: Sequence[Sequence[int]] | None
) -> dict[str, torch.Tensor]:
    """A checkpoint as training left it.

    Args:
        spec ([`SymmetrySpec`]): of the zoo's networks.
        state_dict (`Mapping[str, torch.Tensor]`): the aligned weights of a row.
        permutations (`Sequence[Sequence[int]]`, *optional*): the row's `alignment_permutations`; a row without was not aligned.
    """
    if permutations is None:
        return dict(state_dict)
    spec = spec.of_kind("permutation", "sign")
    return spec.apply(state_dict, spec.invert([torch.tensor(value) for value in permutations]))
