"""Nearest networks among embedded ones, by the distance between standardised embeddings."""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset

from hub_scripts.outputs import read_json

EMBEDDINGS_FILE = "embeddings.parquet"
RESULTS_FILE = "results.json"
SMALLEST_SPREAD = 1e-5  # of a feature, relative to its values: below, it differs by rounding alone
SPACING_ROWS = 1000  # looked at for the typical distance between neighbours


class EmbeddingIndex:
    """Embedded networks, searched exactly, each layout apart: other layouts have embeddings of other widths and meanings.

    Features are standardised by their mean and standard deviation over the rows of the layout.

    Args:
        rows (`Dataset`): with the columns `layout_id` and `embedding` (list of float32), as `sane embed` writes them.
        made_with (`dict`, *optional*): what `sane embed` says of the model: `model`, `feature`, `model_sha256` and
            `tokenizer_sha256`.

    Raises:
        ValueError: If there are no rows, or faiss is not installed.
    """

    def __init__(self, rows: Dataset, made_with: dict[str, Any] | None = None):
        if find_spec("faiss") is None:
            raise ValueError("searching needs faiss, which is not installed; try pip install 'sane-hub[search]'.")
        if not len(rows):
            raise ValueError("the index has no rows; embed some networks with `sane embed` first.")
        self.rows, self.made_with = rows, made_with or {}
        self._layout_ids = np.asarray(rows["layout_id"][:])

    @classmethod
    def from_folder(cls, path: str | Path) -> "EmbeddingIndex":
        """Open a folder that `sane embed` has finished.

        Raises:
            ValueError: If it is none, or holds no rows.
        """
        folder = Path(path)
        for name in (EMBEDDINGS_FILE, RESULTS_FILE):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} has no {name}; make it, or finish it, with `sane embed --output-dir {folder}`."
                )
        return cls(Dataset(pq.read_table(folder / EMBEDDINGS_FILE)), read_json(folder / RESULTS_FILE))

    @property
    def layout_ids(self) -> list[str]:
        """The layouts that rows have, sorted."""
        return sorted(set(self._layout_ids.tolist()))

    def numbers(self, layout_id: str) -> np.ndarray:
        """Numbers of the rows of a layout: `(rows,)` int64, ascending.

        Raises:
            ValueError: If there are none.
        """
        numbers = np.flatnonzero(self._layout_ids == layout_id)
        if not len(numbers):
            raise ValueError(
                f"the index holds no network of the layout {layout_id}; embed some of that architecture into it."
            )
        return numbers

    def vectors(self, layout_id: str) -> np.ndarray:
        """Standardised embeddings of a layout's rows: `(rows, features)` float32, in the order of [`~EmbeddingIndex.numbers`]."""
        return self._layout(layout_id)[2]

    def embeddings(self, numbers: np.ndarray) -> np.ndarray:
        """Embeddings of rows of one layout as they were written: `(rows, features)` float32."""
        column = self.rows.select_columns(["embedding"]).with_format("arrow")[numbers].column("embedding")
        # chunk by chunk: all values together may be more than Arrow counts in one list column
        values = [chunk.flatten().to_numpy(zero_copy_only=False).astype(np.float32) for chunk in column.chunks]
        return np.concatenate(values).reshape(len(column), -1)

    def standardise(self, vectors: np.ndarray, layout_id: str) -> np.ndarray:
        """Shift and scale embeddings `(n, features)` by the rows of their layout; a feature that is constant there is only shifted.

        Raises:
            ValueError: If the index has no row of the layout, or the widths differ.
        """
        mean, scale, _, _ = self._layout(layout_id)
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != len(mean):
            raise ValueError(f"embeddings have shape {vectors.shape}, expected (n, {len(mean)}) as in the index.")
        return _scaled(vectors, mean, scale)

    def query(self, vectors: np.ndarray, layout_id: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest rows to each embedding.

        Args:
            vectors (`np.ndarray` of shape `(n, features)`): float32; embeddings as the model gives them, not standardised.
            layout_id (`str`): of the networks that they are of.
            k (`int`): how many rows; all of the layout if it has fewer.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: distances (float64, ascending) and row numbers (int64), both `(n, k)`.

        Raises:
            ValueError: If `k` is below 1, the index has no row of the layout, or the widths differ.
        """
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1.")
        numbers, standardised = self.numbers(layout_id), self.standardise(vectors, layout_id)
        rows, index = self._layout(layout_id)[2:]
        places = index.search_batch("embedding", standardised, min(k, len(numbers))).total_indices
        # faiss computes |x|^2 + |y|^2 - 2xy in float32, of which little is left where x and y are nearly equal
        pairs = zip(standardised.astype(np.float64), places, strict=True)
        distances = np.stack([np.linalg.norm(vector - rows[near], axis=1) for vector, near in pairs])
        order = np.argsort(distances, axis=1, kind="stable")
        return np.take_along_axis(distances, order, 1), numbers[np.take_along_axis(places, order, 1)]

    @lru_cache  # noqa: B019 (an index lives as long as its process)
    def spacing(self, layout_id: str) -> float:
        """The median distance from a row of a layout to the nearest that is not equal to it; 1 where there is no other."""
        numbers = self.numbers(layout_id)
        if len(numbers) > SPACING_ROWS:
            numbers = np.random.default_rng(0).choice(numbers, SPACING_ROWS, replace=False)
        distances, _ = self.query(self.embeddings(numbers), layout_id, k=2)
        nearest = distances[:, -1][distances[:, -1] > 0]
        return float(np.median(nearest)) if len(nearest) else 1.0

    @lru_cache  # noqa: B019
    def _layout(self, layout_id: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, Dataset]:
        """Mean and scale of the features, standardised rows, and these as a dataset that can be searched."""
        numbers = self.numbers(layout_id)
        vectors = self.embeddings(numbers)
        mean, std = vectors.mean(0, dtype=np.float64), vectors.std(0, dtype=np.float64)
        scale = np.where(std > SMALLEST_SPREAD * np.abs(vectors).max(0), std, 1.0)
        vectors = _scaled(vectors, mean, scale)
        index = Dataset.from_dict({"row": numbers})
        index.add_faiss_index_from_external_arrays(vectors, "embedding", string_factory="Flat")
        return mean, scale, vectors, index


def _scaled(vectors: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((vectors - mean) / scale, np.float32)
