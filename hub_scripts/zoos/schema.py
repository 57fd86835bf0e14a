"""The rows of a zoo: one row is one checkpoint. A zoo is a folder that `datasets.load_dataset` reads, here or on the Hub.

```
zoo/
  README.md                          card; its YAML names the files of each split
  data/train-00000-of-00008.parquet  rows, see `features`
  layouts/<layout_id>.json           CheckpointLayout
  symmetries/<layout_id>.json        SymmetrySpec
  zoo.json                           task, seeds, how it was made
```
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from datasets import Dataset, Features, List, Value
from safetensors import SafetensorError

ZOO_FORMAT = 1
ZOO_FILE = "zoo.json"
PROPERTIES = (
    "train_accuracy", "validation_accuracy", "test_accuracy", "train_loss", "validation_loss", "test_loss", "generalization_gap",
)  # fmt: skip
MAX_SHARDS = 8
ROWS_PER_SHARD = 64


def features(hparams: Mapping[str, Any]) -> Features:
    """Column types; `hparams` is one row's hyper-parameters, each a column `hparams_<name>`."""
    kinds = {bool: Value("bool"), int: Value("int64"), float: Value("float64"), str: Value("string")}
    columns = {
        "model_id": Value("string"),
        "epoch": Value("int64"),
        "layout_id": Value("string"),
        "architecture": Value("string"),
        "architecture_kwargs": Value("string"),
        "weights": Value("large_binary"),  # safetensors bytes; plain binary overflows at 2 GB a table
        **{name: Value("float64") for name in PROPERTIES},
        **{f"hparams_{name}": kinds[type(value)] for name, value in hparams.items()},
        "alignment_reference": Value("string"),
        "alignment_distance_before": Value("float64"),
        "alignment_distance_after": Value("float64"),
        "alignment_permutations": List(
            List(Value("int32"))
        ),  # per permutation group: aligned unit i was unit p[i]; then signs
    }
    return Features(columns)


def weights_to_bytes(state_dict: Mapping[str, torch.Tensor]) -> bytes:
    """Safetensors bytes of a state dict."""
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state_dict.items()})


def weights_from_row(row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """State dict of a row.

    Raises:
        ValueError: If the bytes are damaged; the message names the row.
    """
    try:
        return safetensors.torch.load(row["weights"])
    except (SafetensorError, TypeError, ValueError) as error:
        where = f"model_id {row.get('model_id')!r}, epoch {row.get('epoch')!r}"
        raise ValueError(
            f"the weights of the row with {where} are damaged: {error}. Import or build that model again."
        ) from error


def write_split(folder: Path, split: str, rows: list[dict[str, Any]], columns: Features) -> list[str]:
    """Write the rows of a split as parquet shards and return their names, relative to the zoo."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(rows, features=columns)
    count = max(1, min(MAX_SHARDS, math.ceil(len(rows) / ROWS_PER_SHARD)))
    names = [f"data/{split}-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
    for index, name in enumerate(names):
        table.shard(count, index, contiguous=True).to_parquet(str(folder / name))
    return names
