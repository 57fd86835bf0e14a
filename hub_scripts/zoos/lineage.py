"""Which networks of a zoo are copies of one another, or nearly so, judged by their weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

NEAR = 0.9  # cosine; independent networks of one architecture lie far below, fine-tuned ones above
SKETCH_SIZE = 4096


class Lineage:
    """Collects one sketch a network while a zoo is written, and compares them at the end.

    A sketch is the flattened weights, folded into a fixed length with random signs (a count sketch: Charikar, Chen and
    Farach-Colton 2002), which keeps cosines; so memory grows with networks, not with their size.
    """

    def __init__(self) -> None:
        self._sketches: dict[str, list[np.ndarray]] = {}
        self._models: dict[str, list[tuple[str, str]]] = {}
        self._hashes: dict[str, str] = {}
        self.duplicates: list[tuple[str, str]] = []
        self._signs: dict[int, torch.Tensor] = {}

    def add_checkpoint(self, where: str, sha256: str) -> None:
        """Note a checkpoint by the checksum of its weights; equal ones are listed in `duplicates` as `(this, earlier)`."""
        earlier = self._hashes.setdefault(sha256, where)
        if earlier != where:
            self.duplicates.append((where, earlier))

    def add_model(self, model_id: str, split: str, layout_id: str, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Note the last checkpoint of a network."""
        values = torch.cat([t.detach().flatten().float() for t in state_dict.values() if t.is_floating_point()])
        self._sketches.setdefault(layout_id, []).append(self._sketch(values))
        self._models.setdefault(layout_id, []).append((model_id, split))

    def _sketch(self, values: torch.Tensor) -> np.ndarray:
        if len(values) > SKETCH_SIZE:
            if len(values) not in self._signs:
                draw = torch.randint(0, 2, (len(values),), generator=torch.Generator().manual_seed(0))
                self._signs = {len(values): (2 * draw - 1).to(torch.int8)}
            values = values * self._signs[len(values)]
            values = torch.nn.functional.pad(values, (0, -len(values) % SKETCH_SIZE)).view(-1, SKETCH_SIZE).sum(0)
        return (values / values.norm().clamp_min(1e-12)).numpy()

    def __len__(self) -> int:
        return sum(map(len, self._models.values()))

    def report(self) -> dict[str, Any]:
        """What `zoo.json` keeps: counts, families (largest first), and each network's nearest other one."""
        nearest, families, pairs, near_pairs, leaks = [], [], 0, 0, 0
        for layout_id, sketches in self._sketches.items():
            models = self._models[layout_id]
            if len(models) < 2:
                continue
            matrix = np.stack(sketches)
            rows, columns = [], []
            for start in range(0, len(matrix), 1024):  # all pairs at once would be too much for large zoos
                cosines = matrix[start : start + 1024] @ matrix.T
                own = np.arange(len(cosines))
                cosines[own, start + own] = -np.inf
                best = cosines.argmax(1)
                nearest += [
                    (models[start + i][0], models[best[i]][0], round(float(cosines[i, best[i]]), 4)) for i in own
                ]
                near = cosines > NEAR
                leaks += sum(
                    models[start + i][1] != "train" and any(models[j][1] == "train" for j in np.flatnonzero(near[i]))
                    for i in own
                )
                found = np.nonzero(near)
                rows.append(found[0] + start)
                columns.append(found[1])
            rows, columns = np.concatenate(rows), np.concatenate(columns)
            pairs += len(models) * (len(models) - 1) // 2
            near_pairs += len(rows) // 2
            graph = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(models),) * 2)
            _, labels = connected_components(graph, directed=False)
            for label in np.flatnonzero(np.bincount(labels) > 1):
                members = [models[i][0] for i in np.flatnonzero(labels == label)]
                families.append({"size": len(members), "members": members})
        families.sort(key=lambda family: -family["size"])
        return {
            "near": NEAR,
            "num_models": len(self),
            "num_duplicates": len(self.duplicates),
            "duplicates": self.duplicates,
            "share_of_near_pairs": near_pairs / max(1, pairs),
            "num_families": len(families),
            "num_related": sum(family["size"] for family in families),
            "num_leaks": leaks,
            "families": families,
            "nearest": nearest,
        }
