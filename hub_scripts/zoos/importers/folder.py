"""Any tree of checkpoints, with or without a table of what is known of them.

```
zoo/
  properties.csv        path,model_id,epoch,test_accuracy,learning_rate
  a/epoch1.safetensors  each row of the table names one of these
  b.npz
  c/                    a folder of shards with its index is one checkpoint
```

Without a table each checkpoint is a model of its own, named by its path, at epoch 0.
"""

import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from hub_scripts.zoos.schema import HPARAM, column_types
from tokenization_sane.checkpoint_sane import PICKLE_SUFFIXES, read_checkpoint

from .checkpoint import Checkpoint
from .columns import SPLIT_NAMES, whole_number, with_gap
from .options import ImportOptions
from .sources import (
    SUFFIXES,
    guess_format,
    is_pickle,
    is_weights,
    layout_source,
    pickle_refused,
    relative_name,
    require_folder,
    require_weights,
    walk,
    wrong_tree,
)
from .tables import Row, read_table

logger = logging.getLogger(__name__)
EXPECTED = f"files that end in {', '.join(SUFFIXES)} (or pickles, with --allow-pickle)"
_INDEX = ".index.json"


def list_checkpoints(source: str, options: ImportOptions) -> list[Checkpoint]:
    """Checkpoints of a tree.

    Args:
        source (`str`): its folder.
        options ([`ImportOptions`]): `properties` is the table, the `..._column` its columns. Paths in it are relative to its own
            folder or to `source`.

    Returns:
        `list[Checkpoint]`: in the order of the table, else by path.

    Raises:
        ValueError: If there is no checkpoint, or the table is wrong: file, line and column are named.
    """
    folder = require_folder(source, "folder")
    if options.properties is not None:
        return _listed(folder, Path(options.properties), options)
    return _found(folder, options)


# ---------------------------------------------------------------------------------------------------- with a table
def _listed(source: Path, table: Path, options: ImportOptions) -> list[Checkpoint]:
    rows = read_table(
        table,
        required={
            options.path_column: "name the one with the paths with --path-column",
            options.model_column: "name the one that tells the networks apart with --model-column",
            options.epoch_column: "name the one with the epochs with --epoch-column",
            **dict.fromkeys(options.hparam_columns, "mend --hparams"),
        },
        text=[options.path_column, options.model_column],
        ignore=options.ignore_columns,
    )
    checkpoints: list[Checkpoint] = []
    places: dict[tuple[str, int], str] = {}
    splits: dict[str, tuple[str | None, str]] = {}
    for row in rows:
        with options.skipping():
            checkpoint = _from_row(row, source, table, options)
            _check_against(checkpoint, row.where, places, splits)
            checkpoints.append(checkpoint)
    column_types((checkpoint.where, checkpoint.columns) for checkpoint in checkpoints)
    return checkpoints


def _from_row(row: Row, source: Path, table: Path, options: ImportOptions) -> Checkpoint:
    values = dict(row.values)
    path = _path(_taken(row, values, options.path_column), row.where, source, table, options)
    model_id = _taken(row, values, options.model_column)
    epoch = whole_number(_taken(row, values, options.epoch_column), row.where, options.epoch_column)
    split = _split(values.pop(options.split_column, None), row.where, options.split_column)
    names = {name: f"{HPARAM}{name}" for name in options.hparam_columns if not name.startswith(HPARAM)}
    clash = next((name for name in names.values() if name in values), None)
    if clash is not None:
        raise ValueError(f"{table} has a column {clash!r} already; leave one of the two out with --ignore.")
    return Checkpoint(
        model_id=model_id,
        epoch=epoch,
        where=f"{path} ({row.where})",
        read=partial(read_checkpoint, path, options.allow_pickle),
        columns=with_gap({names.get(name, name): value for name, value in values.items()}),
        split=split,
        layout_source=layout_source(path, [file.name for file in path.iterdir()] if path.is_dir() else [path.name]),
    )


def _taken(row: Row, values: dict[str, Any], column: str) -> Any:
    """The value of a column that must have one, taken out of the others."""
    value = values.pop(column, None)
    if value is None:
        raise ValueError(f"{row.where}, column {column!r} is empty; fill it in, or leave the row out.")
    return value


def _path(text: str, where: str, source: Path, table: Path, options: ImportOptions) -> Path:
    """The checkpoint that a row names: a file, or a folder of shards."""
    where = f"{where}, column {options.path_column!r}"
    candidates = [base / text for base in (table.parent, source)]
    inside = [path for path in candidates if _is_inside(path, source)]
    if not inside:
        raise ValueError(f"{where}: {text} leaves {source}; name a file below it.")
    path = next((path for path in inside if path.exists()), None)
    if path is None:
        raise ValueError(f"{where}: there is no {' or '.join(dict.fromkeys(map(str, inside)))}.")
    if path.is_dir():
        require_weights((file.name for file in path.iterdir()), f"{where}: {path}", options.allow_pickle)
    elif path.suffix.lower() not in (*SUFFIXES, *PICKLE_SUFFIXES, "") and not path.name.endswith(_INDEX):
        raise ValueError(f"{where}: {text} is no checkpoint; expected {EXPECTED}.")
    elif is_pickle(path.name) and not options.allow_pickle:
        raise ValueError(f"{where}: {pickle_refused(text)}")
    return path


def _is_inside(path: Path, folder: Path) -> bool:
    # by the names alone: files in the cache of the Hub are links to elsewhere
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))  # noqa: PTH100 (resolve follows links)


def _split(value: Any, where: str, column: str) -> str | None:
    if value is None:
        return None
    split = SPLIT_NAMES.get(str(value).lower())
    if split is None:
        raise ValueError(
            f"{where}, column {column!r} is {value!r}, expected train, validation (or val, valid, dev) or test."
        )
    return split


def _check_against(
    checkpoint: Checkpoint,
    where: str,
    places: dict[tuple[str, int], str],
    splits: dict[str, tuple[str | None, str]],
) -> None:
    """Refuse what does not go with the rows before; these are kept in `places` and `splits`."""
    model_id, epoch, split = checkpoint.model_id, checkpoint.epoch, checkpoint.split
    other_split, other = splits.get(model_id, (split, where))
    if other_split != split:
        raise ValueError(
            f"{where}: model {model_id!r} stands in split {split or 'none'}, in {other} in {other_split or 'none'}; "
            "a model stands in one split with all its checkpoints."
        )
    if (model_id, epoch) in places:
        raise ValueError(
            f"{where}: model {model_id!r} has epoch {epoch} in {places[model_id, epoch]} already; "
            "give each checkpoint of a model its own."
        )
    splits[model_id], places[model_id, epoch] = (split, where), where


# ---------------------------------------------------------------------------------------------------- without a table
def _found(source: Path, options: ImportOptions) -> list[Checkpoint]:
    paths = [path for folder, _, files in walk(source) for path in _checkpoints_in(folder, files)]
    readable = [path for path in paths if options.allow_pickle or not is_pickle(path.name)]
    if paths and not readable:
        raise ValueError(pickle_refused(paths[0]))
    if not paths:
        raise wrong_tree(source, "folder", EXPECTED)
    if len(readable) < len(paths):
        logger.warning("%s: %d pickles are left out; --allow-pickle reads them.", source, len(paths) - len(readable))
    other = guess_format(source)
    if other != "folder":
        logger.warning(
            "%s looks like --format %s; --format folder makes each of its checkpoints a model of its own.",
            source,
            other,
        )
    owners: dict[str, Path] = {}
    checkpoints = []
    for path in readable:
        with options.skipping():
            name = _without_ending(relative_name(path, source))
            if name in owners:
                raise ValueError(f"{path} and {owners[name]} would both be model {name!r}; name them in --properties.")
            owners[name] = path
            checkpoints.append(
                Checkpoint(
                    model_id=name,
                    epoch=0,
                    where=str(path),
                    read=partial(read_checkpoint, path, options.allow_pickle),
                    layout_source=layout_source(path, [path.name]),
                )
            )
    return checkpoints


def _checkpoints_in(folder: Path, files: list[str]) -> list[Path]:
    """Checkpoints of one folder: each index with its shards is one, each other file another."""
    indices = [name for name in files if name.endswith(_INDEX) and is_weights(name.removesuffix(_INDEX))]
    shards = {shard for name in indices for shard in _shards(folder / name)}
    return [folder / name for name in files if name in indices or (is_weights(name) and name not in shards)]


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{index} is no index of shards; download it again, or remove it.") from error


def _without_ending(name: str) -> str:
    name = name.removesuffix(_INDEX)
    return name[: -len(Path(name).suffix)]
