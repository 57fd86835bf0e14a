"""A zoo opened for reading: rows, layouts, symmetries, weights; from a folder or from the Hub."""

import json
import logging
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from huggingface_hub import snapshot_download
from torch import nn
from tqdm.auto import tqdm

from hub_scripts.arguments import require_source
from hub_scripts.evaluation.functional import build_module
from hub_scripts.zoos.schema import ZOO_FILE, ZOO_FORMAT, weights_from_row
from hub_scripts.zoos.tasks import SPLITS, Task, load_task
from tokenization_sane import CheckpointLayout, SaneWeightTokenizer, SymmetrySpec, check_finite

logger = logging.getLogger(__name__)


class Zoo:
    """A zoo of one layout, read from a folder or from a dataset repository on the Hub.

    Args:
        source (`str` or `Path`): folder, or repository id.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        on_error (`str`): `"refuse"` stops at the first row whose weights are damaged, not finite or do not fit the layout, when
            it is read; `"skip"` looks through all rows at once, leaves those out and says which.

    Raises:
        ValueError: If there is no zoo, or it is empty, damaged, or lets a model stand in two splits.
    """

    def __init__(self, source: str | Path, revision: str | None = None, on_error: str = "refuse"):
        self.name = str(source)
        require_source(source, "the zoo")
        if Path(source).is_dir():
            self.folder = Path(source)
        else:
            side_files = [ZOO_FILE, "layouts/*", "symmetries/*"]
            try:
                path = snapshot_download(
                    str(source), repo_type="dataset", revision=revision, allow_patterns=side_files
                )
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{source} is neither a folder nor a dataset repository that can be read: {error}"
                ) from error
            self.folder = Path(path)
        if not (self.folder / ZOO_FILE).is_file():
            raise ValueError(
                f"{source} is no zoo: it has no {ZOO_FILE}. Build one with `sane build-zoo --output-dir DIR`."
            )
        self.info = json.loads((self.folder / ZOO_FILE).read_text(encoding="utf-8"))
        if self.info.get("format") != ZOO_FORMAT:
            raise ValueError(f"{source} has zoo format {self.info.get('format')!r}, this version reads {ZOO_FORMAT}.")
        self.splits: dict[str, Dataset] = dict(self._load(Path(source).is_dir(), revision))
        if on_error == "skip":
            self.splits = {split: self._without_bad_rows(split, rows) for split, rows in self.splits.items()}
        self._check()

    def _load(self, is_local: bool, revision: str | None) -> Mapping[str, Dataset]:
        if not is_local:
            return load_dataset(self.name, revision=revision)
        # for a folder, load_dataset(folder) would give what another folder of the same name held, out of its cache; files that
        # are named one by one are told apart by path and time
        files = {split: sorted(map(str, (self.folder / "data").glob(f"{split}-*.parquet"))) for split in SPLITS}
        files = {split: names for split, names in files.items() if names}
        if not files:
            raise ValueError(f"{self.name} has no rows; build or import some models first.")
        return load_dataset("parquet", data_files=files)

    def _without_bad_rows(self, split: str, rows: Dataset) -> Dataset:
        good = []
        for index, row in enumerate(rows):
            try:
                self._weights(split, row)
                good.append(index)
            except ValueError as error:
                logger.warning("skipped: %s", error)
        return rows if len(good) == len(rows) else rows.select(good)

    def _weights(self, split: str, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The weights of a row, if they are whole, finite and fit the layout."""
        state_dict = weights_from_row(row)
        try:
            check_finite(state_dict)
            layout = self._read_layout(row["layout_id"])
            for name, tensor in layout.tensors.items():
                if name not in state_dict or tuple(state_dict[name].shape) != tensor.shape:
                    found = tuple(state_dict[name].shape) if name in state_dict else "nothing"
                    raise ValueError(f"{name} has shape {found}, the zoo's layout expects {tensor.shape}.")
        except ValueError as error:
            raise ValueError(f"{self.name}, {split} row {row['model_id']!r} epoch {row['epoch']}: {error}") from error
        return state_dict

    def _check(self) -> None:
        if not sum(len(rows) for rows in self.splits.values()):
            raise ValueError(f"{self.name} has no rows; build or import some models first.")
        owner: dict[str, str] = {}
        for split, rows in self.splits.items():
            for model_id in set(rows["model_id"]):
                if owner.setdefault(model_id, split) != split:
                    raise ValueError(
                        f"{self.name}: model {model_id!r} stands in the splits {owner[model_id]} and {split}; "
                        "a model must stand in one split with all its checkpoints."
                    )
        ids = {layout_id for rows in self.splits.values() for layout_id in set(rows["layout_id"])}
        if len(ids) != 1:
            raise ValueError(
                f"{self.name} holds {len(ids)} layouts, expected one; split it into zoos of one layout each."
            )
        (self.layout_id,) = ids

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.splits.values())

    @property
    def num_models(self) -> int:
        """Networks, each counted once whatever its checkpoints."""
        return sum(len(set(rows["model_id"])) for rows in self.splits.values())

    def rows(self, split: str) -> Dataset:
        """The rows of a split; an empty or missing split is refused."""
        if split not in self.splits or not len(self.splits[split]):
            raise ValueError(f"{self.name} has no models in its {split} split; it has {', '.join(self.splits)}.")
        return self.splits[split]

    def column(self, split: str, name: str) -> np.ndarray:
        """One column as an array `(checkpoints,)`."""
        return np.asarray(self.rows(split)[name])

    @cached_property
    def layout(self) -> CheckpointLayout:
        """What stands where in the zoo's checkpoints, at the layout's own token size; see `CheckpointLayout.repack`."""
        return self._read_layout(self.layout_id)

    @cached_property
    def symmetries(self) -> SymmetrySpec:
        """The symmetries that were found for the zoo's architecture."""
        return SymmetrySpec.from_json(self._side_file("symmetries", self.layout_id))

    @lru_cache  # noqa: B019 (a zoo lives as long as its process)
    def _read_layout(self, layout_id: str) -> CheckpointLayout:
        return CheckpointLayout.from_json(self._side_file("layouts", layout_id))

    def _side_file(self, kind: str, layout_id: str) -> str:
        path = self.folder / kind / f"{layout_id}.json"
        if not path.is_file():
            raise ValueError(
                f"{self.name} has no {kind}/{layout_id}.json, which its rows name; build or import the zoo again."
            )
        return path.read_text(encoding="utf-8")

    @cached_property
    def task(self) -> Task:
        """The task that the zoo's networks were trained on."""
        return load_task(self.info["task"])

    @cached_property
    def module(self) -> nn.Module:
        """The zoo's architecture, in eval mode; its weights have no meaning."""
        row = next(iter(self.splits.values()))[0]
        return build_module(row["architecture"], json.loads(row["architecture_kwargs"])).eval()

    def state_dict(self, split: str, index: int) -> dict[str, torch.Tensor]:
        """The (aligned) weights of one row."""
        return self._weights(split, self.rows(split)[int(index)])

    def stacked(self, split: str, indices: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Weights of many rows at once: name to `(checkpoints, *shape)`.

        Raises:
            ValueError: If a row is damaged, holds NaN or infinite values, or does not fit the layout; the row is named.
        """
        rows = self.rows(split)
        rows = rows if indices is None else rows.select([int(i) for i in indices])
        tensors: dict[str, torch.Tensor] = {}
        for place, row in enumerate(rows):
            state_dict = self._weights(split, row)
            for name, layout in self.layout.tensors.items():
                if name not in tensors:
                    tensors[name] = torch.empty(len(rows), *layout.shape)
                tensors[name][place] = state_dict[name]
        return tensors


def token_cache(
    zoo: Zoo, split: str, tokenizer: SaneWeightTokenizer, folder: Path, chunk_size: int = 256
) -> np.ndarray:
    """Normalised tokens of a whole split, as a memory-mapped file that is written once.

    Args:
        zoo ([`Zoo`]): where from.
        split (`str`): which rows.
        tokenizer ([`SaneWeightTokenizer`]): its token size, packing and statistics.
        folder (`Path`): where the file goes; it is written under another name first, so a reader never sees half of it.
        chunk_size (`int`): checkpoints in memory at a time.

    Returns:
        `np.memmap` of shape `(checkpoints, tokens, token_size)`, float32.
    """
    layout = zoo.layout.repack(tokenizer.token_size, tokenizer.packing)
    path = folder / f"{split}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{split}.partial.npy"
        count = len(zoo.rows(split))
        tokens = np.lib.format.open_memmap(partial, "w+", np.float32, (count, layout.num_tokens, layout.token_size))
        for start in tqdm(
            range(0, count, chunk_size), desc=f"tokenize {split}", leave=False, disable=count <= chunk_size
        ):
            indices = np.arange(start, min(start + chunk_size, count))
            tokens[indices] = tokenizer.normalize(layout.pack(zoo.stacked(split, indices)), layout).numpy()
        tokens.flush()
        partial.rename(path)
    tokens = np.load(path, mmap_mode="r")
    expected = (len(zoo.rows(split)), layout.num_tokens, layout.token_size)
    if tokens.shape != expected:
        raise ValueError(
            f"{path} holds tokens of shape {tokens.shape}, expected {expected}: it was made from another zoo. Remove {folder}."
        )
    return tokens
