"""The Small CNN Zoo of Unterthiner et al. 2020: one matrix whose rows are flattened networks.

```
zoo/
  weights.npy      (checkpoints, 4970)
  metrics.csv.gz   a row for each row of the matrix: modeldir, step, train_accuracy, ..., config.activation, ...
  layout.csv       a row for each variable: varname, start_idx, end_idx, size, shape (or name, offset, shape)
```

Keras keeps a convolution's kernel as (height, width, in, out) and a dense layer's as (in, out). Here they become (out, in, height,
width) and (out, in), as in PyTorch, and `sequential/conv2d/kernel:0` is called `sequential.conv2d.weight`.
"""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hub_scripts.zoos.schema import HPARAM

from .checkpoint import Checkpoint
from .columns import identifier, whole_number, with_gap
from .options import ImportOptions
from .sources import find_folders, require_folder, wrong_tree
from .tables import Row, read_table

_FILES = ("weights.npy", "layout.csv", "metrics.csv.gz", "metrics.csv")
EXPECTED = "weights.npy, layout.csv and metrics.csv.gz (or metrics.csv)"
_TO_TORCH = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}  # axes of a kernel with so many


class Variable(NamedTuple):
    """A tensor in a flattened network.

    Args:
        name (`str`): as a state dict has it.
        start (`int`): its first column.
        shape (`tuple[int, ...]`): as Keras has it.
        is_kernel (`bool`): True where the axes are to be put into PyTorch's order.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    is_kernel: bool


def list_checkpoints(source: str, options: ImportOptions) -> list[Checkpoint]:
    """Checkpoints of a Small CNN Zoo.

    A model is a `modeldir`, its epoch is `step`; `config.*` become hyper-parameters. Without a `modeldir`, a new model begins where
    the step does not grow.

    Args:
        source (`str`): the folder of one data set.
        options ([`ImportOptions`]): `hparam_columns` and `ignore_columns` are of the metrics.

    Returns:
        `list[Checkpoint]`: in the order of the matrix.

    Raises:
        ValueError: If a file is missing or damaged, or the three do not fit each other.
    """
    folder = require_folder(source, "unterthiner")
    metrics = _metrics_file(folder)
    weights = _open_weights(folder / "weights.npy")
    variables = _read_layout(folder / "layout.csv", weights.shape[1])
    rows = read_table(
        metrics,
        required={
            "step": "expected the metrics of a Small CNN Zoo",
            **dict.fromkeys(options.hparam_columns, "mend --hparams"),
        },
        text=["modeldir"],
        ignore=options.ignore_columns,
    )
    checkpoints: list[Checkpoint] = []
    model, last, count = -1, math.inf, 0
    for count, row in enumerate(rows, start=1):
        with options.skipping():
            step = whole_number(row.values["step"], row.where, "step")
            model, last = model + (step <= last), step
            checkpoints.append(
                Checkpoint(
                    model_id=row.values.get("modeldir") or str(model),
                    epoch=step,
                    where=f"{folder / 'weights.npy'}[{count - 1}]",
                    read=partial(_read_row, weights, count - 1, variables),
                    columns=_columns(row, options),
                )
            )
    if count != len(weights):
        raise ValueError(
            f"{metrics} has {count} rows, weights.npy beside it has {len(weights)}; they must have as many, download both again."
        )
    return checkpoints


def _metrics_file(folder: Path) -> Path:
    """The metrics, after a check that all three files are there."""
    found = {name for name in _FILES if (folder / name).is_file()}
    metrics = [name for name in _FILES[2:] if name in found]
    missing = [name for name in _FILES[:2] if name not in found] + ([] if metrics else [_FILES[2]])
    if not found:
        inside = find_folders(folder, lambda _, files: set(_FILES[:2]) <= set(files))
        if inside:
            raise ValueError(
                f"{folder} is no Small CNN Zoo, but holds {', '.join(map(str, inside))}; give one of them."
            )
        raise wrong_tree(folder, "unterthiner", EXPECTED)
    if missing:
        raise ValueError(f"--format unterthiner expects {EXPECTED}, {folder} has no {missing[0]}; download it too.")
    return folder / metrics[0]


def _open_weights(path: Path) -> np.ndarray:
    """The matrix, mapped: rows are read when they are asked for."""
    try:
        weights = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no NumPy matrix of numbers: {error}; download it again.") from error
    if not isinstance(weights, np.ndarray) or weights.ndim != 2 or weights.dtype.kind != "f":
        found = f"{weights.dtype} of shape {weights.shape}" if isinstance(weights, np.ndarray) else "an archive"
        raise ValueError(f"{path} is {found}, expected a matrix of floats, a row for each checkpoint.")
    return weights


def _read_layout(path: Path, num_columns: int) -> list[Variable]:
    """Variables in the order of their columns, which they must fill."""
    variables = sorted((_variable(row) for row in read_table(path)), key=lambda variable: variable.start)
    end = 0
    for variable in variables:
        if variable.start != end:
            raise ValueError(f"{path}: {variable.name} begins at column {variable.start}, expected {end}.")
        end += math.prod(variable.shape)
    if end != num_columns:
        raise ValueError(f"{path} is about {end} columns, weights.npy beside it has {num_columns}.")
    return variables


def _variable(row: Row) -> Variable:
    values = row.values
    name, start = values.get("varname", values.get("name")), values.get("start_idx", values.get("offset"))
    if not isinstance(name, str) or type(start) is not int or values.get("shape") is None:
        raise ValueError(
            f"{row.where} does not tell a variable; expected the columns varname, start_idx and shape (or name, offset and shape)."
        )
    shape = tuple(int(size) for size in re.findall(r"[0-9]+", str(values["shape"])))  # "(3, 3, 1, 16)"
    end = values.get("end_idx", start + math.prod(shape))
    if end - start != math.prod(shape):
        raise ValueError(f"{row.where}: {name} has {end - start} columns, its shape {shape} has {math.prod(shape)}.")
    stem, _, leaf = re.sub(r":[0-9]+$", "", name).rpartition("/")
    is_kernel = leaf == "kernel" and len(shape) in _TO_TORCH
    leaf = "weight" if is_kernel else leaf
    return Variable(".".join([*filter(None, stem.split("/")), leaf]), start, shape, is_kernel)


def _columns(row: Row, options: ImportOptions) -> dict[str, Any]:
    names = {name: HPARAM + identifier(name) for name in options.hparam_columns if not name.startswith(HPARAM)}
    columns = {}
    for name, value in row.values.items():
        if name.startswith("config."):
            columns[HPARAM + identifier(name.removeprefix("config."))] = value
        elif name not in ("modeldir", "step"):
            columns[names.get(name, name)] = value
    return with_gap(columns)


def _read_row(weights: np.ndarray, index: int, variables: list[Variable]) -> dict[str, torch.Tensor]:
    values = np.array(weights[index], dtype=weights.dtype.newbyteorder("="))
    return {variable.name: _tensor(values, variable) for variable in variables}


def _tensor(values: np.ndarray, variable: Variable) -> torch.Tensor:
    part = values[variable.start : variable.start + math.prod(variable.shape)].reshape(variable.shape)
    if variable.is_kernel:
        part = part.transpose(_TO_TORCH[len(variable.shape)])
    return torch.from_numpy(part.copy(order="C"))
