"""Aligns the networks of a zoo to one of them, and says how much that shrank the distance."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

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
