"""The rows of a zoo: one row is one checkpoint. A zoo is a folder that `datasets.load_dataset` reads, here or on the Hub.

```
zoo/
  README.md                          card; its YAML names the files of each split
  data/train-00000-of-00008.parquet  rows, see `features`
  weights/<split>/<row>.safetensors  weights of large networks, which rows name instead of holding them
  layouts/<layout_id>.json           CheckpointLayout
  symmetries/<layout_id>.json        SymmetrySpec, where the architecture is known
  zoo.json                           task, seeds, how it was made
  lineage.json                       which networks are nearly equal
```
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import safetensors.torch
import torch
from datasets import Features, List, Value
from safetensors import SafetensorError

from tokenization_sane import CheckpointLayout, check_finite

ZOO_FORMAT = 2
ZOO_FILE = "zoo.json"
LINEAGE_FILE = "lineage.json"
HPARAM = "hparams_"
CLASSES = "hparams_classes"  # of a network that knows some of its task's, as 3-1-4-5
_BEFORE = {
    "model_id": Value("string"),
    "epoch": Value("int64"),
    "split": Value("string"),
    "layout_id": Value("string"),
    "architecture": Value("string"),  # null where it is not known
    "architecture_kwargs": Value("string"),  # JSON
    "weights": Value("large_binary"),  # safetensors bytes; plain binary overflows at 2 GB a table
    "weights_file": Value("string"),  # path in the zoo, for large networks; one of the two is null
    "weights_size": Value("int64"),  # bytes
    "weights_sha256": Value("string"),
    "source": Value("string"),  # file or repository that it came from
}
_AFTER = {
    "alignment_reference": Value("string"),
    "alignment_distance_before": Value("float64"),
    "alignment_distance_after": Value("float64"),
    # per group of the zoo's symmetries: aligned unit i was unit p[i]; signs for groups of signs
    "alignment_permutations": List(List(Value("int32"))),
}


def features(columns: Mapping[str, Value]) -> Features:
    """Column types of a zoo; `columns` are its properties and hyper-parameters, see [`column_types`]."""
    clash = [name for name in columns if name in _BEFORE | _AFTER]
    if clash:
        raise ValueError(f"a property cannot be called {clash[0]!r}, rows have a column of that name; rename it.")
    return Features(_BEFORE | dict(columns) | _AFTER)


def column_types(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Value]:
    """Types of properties and hyper-parameters, in the order in which they first occur.

    Args:
        rows (`Iterable[tuple[str, Mapping]]`): where a row came from, for messages, and its values: bool, int, float, str, or
            None where a value is missing. Whole numbers beside fractions count as fractions.

    Raises:
        ValueError: If a column holds values of kinds that do not mix; both rows are named.
    """
    kinds: dict[str, type] = {}
    first: dict[str, str] = {}
    for where, values in rows:
        for name, value in values.items():
            if value is None:
                kinds.setdefault(name, type(None))
                continue
            kind, before = type(value), kinds.get(name, type(None))
            if kind not in _KINDS:
                raise ValueError(f"{where}: column {name!r} is a {kind.__name__}, expected bool, int, float or text.")
            if before in (type(None), kind):
                if before is not kind:
                    kinds[name], first[name] = kind, where
            elif {before, kind} == {int, float}:
                kinds[name] = float
            else:
                raise ValueError(
                    f"column {name!r} is {_KINDS[before]} in {first[name]} and {_KINDS[kind]} in {where}; "
                    "make them alike, or leave the column out."
                )
    values = {bool: Value("bool"), int: Value("int64"), float: Value("float64"), str: Value("string")}
    return {name: values[kind] for name, kind in kinds.items() if kind in values}


_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text"}


def property_columns(columns: Features) -> list[str]:
    """Names of the columns that say what a network is like: neither hyper-parameters nor the zoo's own."""
    return [name for name in columns if name not in _BEFORE | _AFTER and not name.startswith(HPARAM)]


def hparam_columns(columns: Features) -> list[str]:
    """Names of the columns that say how a network was made."""
    return [name for name in columns if name.startswith(HPARAM)]


def weights_to_bytes(state_dict: Mapping[str, torch.Tensor], ties: Mapping[str, str] | None = None) -> bytes:
    """Safetensors bytes of a state dict.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): name to tensor.
        ties (`Mapping[str, str]`, *optional*): names that are stored under another name, as the file's metadata says then.
    """
    ties = ties or {}
    stored = {name: tensor.contiguous() for name, tensor in state_dict.items() if name not in ties}
    return safetensors.torch.save(stored, metadata={"format": "pt", **ties})


def weights_from_bytes(content: bytes | None, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """State dict out of safetensors bytes.

    Args:
        content (`bytes`): the file.
        sha256 (`str`, *optional*): what its checksum should be.

    Raises:
        ValueError: If there are none, or they are damaged.
    """
    try:
        if content is None:
            raise ValueError("there are none")
        state_dict = safetensors.torch.load(content)
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"the weights are damaged: {error}. Import or build that model again.") from error
    if sha256 is not None and checksum(content) != sha256:
        raise ValueError(
            "the weights are damaged: their checksum is not the row's weights_sha256. Import or build that model again."
        )
    return state_dict


def check_weights(state_dict: Mapping[str, torch.Tensor], layout: CheckpointLayout) -> None:
    """Refuse weights that do not fit a layout or are not finite; the tensor is named."""
    if layout.check_tensors(state_dict):
        raise ValueError(f"its tensors have more dimensions than the layout {layout.fingerprint} expects.")
    check_finite(state_dict)


def checksum(content: bytes) -> str:
    """SHA-256 in hexadecimal digits, as Git LFS and the Hub name a file."""
    return hashlib.sha256(content).hexdigest()


def is_missing(value: Any) -> bool:
    """True for None and NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))
