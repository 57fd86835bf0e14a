"""A zoo opened for reading: rows, layouts, symmetries, weights; from a folder or from the Hub."""

import json
import logging
from collections.abc import Iterator, Mapping
from copy import copy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import nn

from hub_scripts.evaluation.functional import build_module
from hub_scripts.zoos.row_files import RowFiles
from hub_scripts.zoos.schema import CLASSES, ZOO_FILE, ZOO_FORMAT, check_weights, weights_from_bytes
from hub_scripts.zoos.source import data_files, open_source
from hub_scripts.zoos.sweep import read_classes
from hub_scripts.zoos.tasks import SPLITS, Task, load_task, renumber
from tokenization_sane import CheckpointLayout, SymmetrySpec

logger = logging.getLogger(__name__)


class Zoo:
    """A zoo, read from a folder or from a dataset repository on the Hub.

    Opening reads properties, not weights: those are read where they are asked for.

    Args:
        source (`str` or `Path`): folder, or repository id.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        on_error (`str`): `"refuse"` stops at the first row whose weights are damaged, not finite or do not fit the layout, when
            it is read; `"skip"` looks through all rows at once, leaves those out and says which.
        layout_id (`str`, *optional*): only checkpoints of this layout.

    Raises:
        ValueError: If there is no zoo, or it is empty, damaged, or lets a model stand in two splits.
    """

    def __init__(
        self,
        source: str | Path,
        revision: str | None = None,
        on_error: str = "refuse",
        layout_id: str | None = None,
    ):
        self.name = str(source)
        self.source = open_source(source, revision)
        if ZOO_FILE not in self.source.sizes:
            raise ValueError(
                f"{source} is no zoo: it has no {ZOO_FILE}. Build one with `sane build-zoo --output-dir DIR`, or make one of "
                "checkpoints with `sane import-zoo`."
            )
        self.folder = self.source.folder
        self.info = json.loads(self.source.side_file(ZOO_FILE).read_text(encoding="utf-8"))
        if self.info.get("format") != ZOO_FORMAT:
            raise ValueError(f"{source} has zoo format {self.info.get('format')!r}, this version reads {ZOO_FORMAT}.")
        self.files: dict[str, RowFiles] = {}
        self.splits: dict[str, Dataset] = {}  # all columns but the weights
        self.row_numbers: dict[str, np.ndarray] = {}  # of each row of a split, in its files
        for split in SPLITS:
            names = data_files(self.source.sizes, split)
            if names:
                self.files[split] = RowFiles(names, self.source.stream, self.source.fetch)
                self._select(split, self._table(split), np.arange(len(self.files[split])))
        self._check()
        if layout_id is not None:
            if layout_id not in self.layout_ids:
                raise ValueError(f"{self.name} has no checkpoint of the layout {layout_id!r}.")
            self._keep_layout(layout_id)
        if on_error == "skip":
            self._keep({split: self._good_rows(split) for split in self.splits})
            self._check()

    def _table(self, split: str) -> pa.Table:
        try:
            return self.files[split].table()
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def _select(self, split: str, table: pa.Table, numbers: np.ndarray) -> None:
        self.splits[split], self.row_numbers[split] = Dataset(table), numbers

    def _keep(self, masks: Mapping[str, np.ndarray]) -> None:
        for split, mask in masks.items():
            if not mask.all():
                self._select(
                    split, self.splits[split].data.table.filter(pa.array(mask)), self.row_numbers[split][mask]
                )

    def _good_rows(self, split: str) -> np.ndarray:
        good = np.zeros(len(self.splits[split]), bool)
        for index in range(len(good)):
            try:
                self.state_dict(split, index)
                good[index] = True
            except ValueError as error:
                logger.warning("skipped: %s", error)
        if not good.all():
            logger.warning(
                "%s: %d of %d rows of the %s split are skipped.", self.name, (~good).sum(), len(good), split
            )
        return good

    def _check(self) -> None:
        if not len(self):
            raise ValueError(f"{self.name} has no rows; build or import some models first.")
        owner: dict[str, str] = {}
        for split, rows in self.splits.items():
            models, epochs = rows["model_id"][:], rows["epoch"][:]
            for model_id in set(models):
                if owner.setdefault(model_id, split) != split:
                    raise ValueError(
                        f"{self.name}: model {model_id!r} stands in the splits {owner[model_id]} and {split}; "
                        "a model must stand in one split with all its checkpoints."
                    )
            seen: dict[tuple[str, int], int] = {}
            for row, key in enumerate(zip(models, epochs, strict=True)):
                if seen.setdefault(key, row) != row:
                    raise ValueError(
                        f"{self.name}: model {key[0]!r} has epoch {key[1]} twice, in the rows {seen[key]} and {row} of the "
                        f"{split} split; a model and its epoch name one row."
                    )

    def of_layout(self, layout_id: str) -> "Zoo":
        """The part of the zoo that has one layout; shares files with it."""
        part = copy(self)
        part.splits, part.row_numbers = dict(self.splits), dict(self.row_numbers)
        part._keep_layout(layout_id)
        return part

    def _keep_layout(self, layout_id: str) -> None:
        for name in ("layout_ids", "symmetries", "module", "can_run"):  # what was found for the whole zoo
            self.__dict__.pop(name, None)
        self._keep({split: np.asarray(rows["layout_id"]) == layout_id for split, rows in self.splits.items()})

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.splits.values())

    @property
    def num_models(self) -> int:
        """Networks, each counted once whatever its checkpoints."""
        return sum(len(set(rows["model_id"])) for rows in self.splits.values())

    def rows(self, split: str) -> Dataset:
        """The rows of a split, without weights; an empty or missing split is refused."""
        if split not in self.splits or not len(self.splits[split]):
            raise ValueError(f"{self.name} has no models in its {split} split; it has {', '.join(self.splits)}.")
        return self.splits[split]

    def column(self, split: str, name: str) -> np.ndarray:
        """One column as an array `(checkpoints,)`."""
        return np.asarray(self.rows(split)[name])

    def last_rows(self, split: str) -> np.ndarray:
        """Rows of the last epoch of a split, `(checkpoints,)` int64."""
        epochs = self.column(split, "epoch")
        return np.flatnonzero(epochs == epochs.max())

    def last_row_of(self, split: str, model_id: str) -> int | None:
        """Row of a model's last checkpoint; None if the split does not have the model."""
        rows = np.flatnonzero(np.asarray(self.rows(split)["model_id"]) == model_id)
        return int(rows[self.column(split, "epoch")[rows].argmax()]) if len(rows) else None

    @cached_property
    def layout_ids(self) -> list[str]:
        """The layouts that rows have, in the order of their names."""
        return sorted({layout_id for rows in self.splits.values() for layout_id in set(rows["layout_id"])})

    @property
    def layout_id(self) -> str:
        """The layout of all rows; a zoo of several is refused."""
        if len(self.layout_ids) != 1:
            raise ValueError(
                f"{self.name} holds {len(self.layout_ids)} layouts, this needs one; choose one with layout_id: "
                f"{', '.join(self.layout_ids)}."
            )
        return self.layout_ids[0]

    @property
    def layout(self) -> CheckpointLayout:
        """What stands where in the zoo's checkpoints, at the layout's own token size; see `CheckpointLayout.repack`."""
        return self.read_layout(self.layout_id)

    @cached_property
    def symmetries(self) -> SymmetrySpec:
        """The symmetries that were found for the zoo's architecture."""
        return SymmetrySpec.from_json(self._side_file("symmetries", self.layout_id))

    @property
    def has_symmetries(self) -> bool:
        """True if the zoo says which symmetries its networks have."""
        return f"symmetries/{self.layout_id}.json" in self.source.sizes

    @cached_property
    def can_run(self) -> bool:
        """True if the zoo says how its networks are built, all in one way, and what they were trained on."""
        if not self.info.get("task"):
            return False
        try:
            return self.module is not None
        except ValueError as error:
            logger.warning("the networks of %s are not run: %s", self.name, error)
            return False

    @lru_cache  # noqa: B019 (a zoo lives as long as its process)
    def read_layout(self, layout_id: str) -> CheckpointLayout:
        """One of the zoo's layouts."""
        return CheckpointLayout.from_json(self._side_file("layouts", layout_id))

    def _side_file(self, kind: str, layout_id: str) -> str:
        path = self.source.side_file(f"{kind}/{layout_id}.json")
        if not path.is_file():
            what = "which its rows name" if kind == "layouts" else "its architecture was not given when it was made"
            raise ValueError(f"{self.name} has no {kind}/{layout_id}.json, {what}; build or import the zoo again.")
        return path.read_text(encoding="utf-8")

    @cached_property
    def task(self) -> Task:
        """The task that the zoo's networks were trained on.

        Raises:
            ValueError: If the zoo does not say it, or each network has a task of its own.
        """
        if self.has_own_classes:
            row = next(row for rows in self.splits.values() for row in rows)
            name = f"{self.info['task']}[{','.join(map(str, read_classes(row[CLASSES])))}]"
            raise ValueError(
                f"each network of {self.name} knows other classes of {self.info['task']}; say which ones the task shall have, "
                f"for instance --task '{name}'."
            )
        return self.whole_task

    @property
    def has_own_classes(self) -> bool:
        """True if each network knows some of the task's classes in an order of its own, which its row tells."""
        return bool(self.info.get("classes_per_network"))

    def classes(self, split: str) -> list[tuple[int, ...]]:
        """The classes of the networks of a split, row by row, where each has its own."""
        return [read_classes(text) for text in self.rows(split)[CLASSES]]

    def labels(self, images: str, split: str, indices: np.ndarray | None = None) -> torch.Tensor:
        """Labels of a split of the whole task's images, as networks of the zoo number their classes.

        Args:
            images (`str`): split of the images.
            split (`str`): split of the networks.
            indices (`np.ndarray`, *optional*): rows of the networks; default all.

        Returns:
            `torch.Tensor`: int64, `(images,)`, or where networks have classes of their own `(networks, images)` with -100 for
            images of other classes.
        """
        labels = self.whole_task.labels[images]
        if not self.has_own_classes:
            return labels
        known = self.classes(split)
        return torch.stack(
            [renumber(labels, known[int(i)]) for i in (range(len(known)) if indices is None else indices)]
        )

    @cached_property
    def whole_task(self) -> Task:
        """Images and labels of all classes, whichever of them a network knows."""
        if not self.info.get("task"):
            raise ValueError(
                f"{self.name} does not say which task its networks were trained on; import it with --task, or leave out "
                "what needs the networks to be run."
            )
        return load_task(self.info["task"])

    @cached_property
    def module(self) -> nn.Module:
        """The zoo's architecture, in eval mode; its weights have no meaning.

        Raises:
            ValueError: If rows name none, or several: tanh and ReLU networks may have one layout.
        """
        self.layout_id  # noqa: B018 (refuses several)
        named: set[tuple[str | None, str]] = set()
        for rows in self.splits.values():
            for name, text in set(zip(rows["architecture"], rows["architecture_kwargs"], strict=True)):
                kwargs = {k: v for k, v in json.loads(text or "{}").items() if k != "dropout"}  # none in eval mode
                named.add((name, json.dumps(kwargs, sort_keys=True)))
        if len(named) > 1:
            shown = " and ".join(f"{name} with {kwargs}" for name, kwargs in sorted(named, key=str)[:2])
            raise ValueError(
                f"networks of {self.name} have {len(named)} architectures, {shown}; only a zoo of one can be run. Build or "
                "import them apart."
            )
        ((name, kwargs),) = named
        if name is None:
            raise ValueError(f"{self.name} does not name its architecture; import it with --architecture.")
        return build_module(name, json.loads(kwargs)).eval()

    def where(self, split: str, index: int) -> str:
        """A row, for messages."""
        model_id, epoch = (self._value(split, name, int(index)) for name in ("model_id", "epoch"))
        return f"{self.name}, {split} row {model_id!r} epoch {epoch}"

    def state_dict(self, split: str, index: int) -> dict[str, torch.Tensor]:
        """The (aligned) weights of one row.

        Raises:
            ValueError: If they are damaged, hold NaN or infinite values, or do not fit the layout; the row is named.
        """
        number = int(self.row_numbers[split][int(index)])
        return self._decode(split, int(index), self.files[split].weights(number))

    def read_file(self, split: str, number: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Rows of one of the split's files, `(row, state dict)`, each read once and in the order of the file."""
        numbers = self.row_numbers[split]
        for place, content in self.files[split].read(number):
            index = int(np.searchsorted(numbers, place))
            if index < len(numbers) and numbers[index] == place:
                yield index, self._decode(split, index, content)

    def _decode(self, split: str, index: int, content: bytes | None) -> dict[str, torch.Tensor]:
        file, sha256 = (self._value(split, name, index) for name in ("weights_file", "weights_sha256"))
        try:
            beside = content is None and file is not None
            state_dict = self._weights_file(file, sha256) if beside else weights_from_bytes(content, sha256)
            layout = self.read_layout(self._value(split, "layout_id", index))
            state_dict |= {alias: state_dict[name] for alias, name in layout.ties.items() if name in state_dict}
            check_weights(state_dict, layout)
        except ValueError as error:
            raise ValueError(f"{self.where(split, index)}: {error}") from error
        return state_dict

    def _weights_file(self, name: str, sha256: str | None) -> dict[str, torch.Tensor]:
        """Weights beside the rows; a file that came over damaged stays in the Hub's cache, so it is fetched again, once."""
        if name not in self.source.sizes:
            raise ValueError(f"{name} is missing from the zoo; import that model again.")
        try:
            return weights_from_bytes(self.source.fetch(name).read_bytes(), sha256)
        except ValueError:
            return weights_from_bytes(self.source.fetch(name, again=True).read_bytes(), sha256)

    def _value(self, split: str, column: str, index: int) -> Any:
        table = self.splits[split].data.table
        return table[column][index].as_py() if column in table.column_names else None

    def stacked(self, split: str, indices: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Weights of many rows at once: name to `(checkpoints, *shape)`, float32.

        Raises:
            ValueError: If a row is damaged, holds NaN or infinite values, or does not fit the layout; the row is named.
        """
        indices = np.arange(len(self.rows(split))) if indices is None else np.asarray(indices)
        tensors = {name: torch.empty(len(indices), *tensor.shape) for name, tensor in self.layout.tensors.items()}
        for place in np.argsort(indices, kind="stable"):  # in the order of the files: neighbours are read together
            for name, tensor in self.state_dict(split, indices[place]).items():
                if name in tensors:
                    tensors[name][place] = tensor
        return tensors
