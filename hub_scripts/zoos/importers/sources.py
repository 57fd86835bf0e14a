"""Folders of foreign zoos: what in them may be a checkpoint, and which format they look like."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenization_sane.checkpoint_sane import KERAS_SUFFIXES, PICKLE_SUFFIXES, natural_key, pickle_refused

SUFFIXES = (".safetensors", ".npz", *KERAS_SUFFIXES)
# pickles that trainers leave beside the weights
_SIDE_FILES = re.compile(r"(optimizer|scheduler|scaler|rng_state\w*|training_args)\.(bin|pt|pth)")


def require_folder(source: str, name: str) -> Path:
    """The folder of a zoo.

    Args:
        source (`str`): as the user gave it.
        name (`str`): the format that is asked for.

    Raises:
        ValueError: If it is none.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source} does not exist; --format {name} expects a folder.")
    if not path.is_dir():
        raise ValueError(f"{source} is a file; --format {name} expects the folder that holds it.")
    return path


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Folders with the names of their folders and files, hidden ones left out, in natural order; see `os.walk`.

    Folders that the caller removes from the list are not entered.
    """
    for where, folders, files in os.walk(folder):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_key)
        yield Path(where), folders, sorted((name for name in files if not name.startswith(".")), key=natural_key)


def find_folders(source: Path, is_wanted: Callable[[list[str], list[str]], bool]) -> list[Path]:
    """Folders in a tree, the tree itself included, that are wanted by what is in them; those inside a wanted one are not.

    Args:
        source (`Path`): the tree.
        is_wanted (`Callable[[list[str], list[str]], bool]`): gets the names of folders and files.
    """
    found = []
    for folder, folders, files in walk(source):
        if is_wanted(folders, files):
            found.append(folder)
            folders.clear()
    return found


def is_weights(name: str) -> bool:
    """True for the name of a file that may be a checkpoint; trainers' other pickles are none."""
    return name.lower().endswith((*SUFFIXES, *PICKLE_SUFFIXES)) and not _SIDE_FILES.fullmatch(name)


def is_pickle(name: str) -> bool:
    """True for the name of a pickle, or of the index of shards that are pickles."""
    return name.lower().removesuffix(".index.json").endswith(PICKLE_SUFFIXES)


def require_weights(names: Iterable[str], where: str, allow_pickle: bool) -> None:
    """Refuse a folder or repository that cannot hold a readable checkpoint.

    Args:
        names (`Iterable[str]`): of its files.
        where (`str`): the folder or repository.
        allow_pickle (`bool`): False refuses pickles too.

    Raises:
        ValueError: With what is missing.
    """
    weights = [name for name in names if is_weights(name)]
    if not weights:
        raise ValueError(f"{where} holds no weights; expected a file that ends in {', '.join(SUFFIXES)}.")
    if not allow_pickle and all(map(is_pickle, weights)):
        raise ValueError(pickle_refused(f"{where}/{weights[0]}"))


def layout_source(source: Any, names: Iterable[str]) -> Any:
    """The source itself where its format says more of the tensors than their names and shapes, as Keras' does; else None.

    Args:
        source (`Any`): a file, folder or repository.
        names (`Iterable[str]`): of the files in it.
    """
    names = [name.lower() for name in names]
    is_keras = any(name.endswith(KERAS_SUFFIXES) for name in names)
    return source if is_keras and not any(name.endswith(".safetensors") for name in names) else None


def relative_name(path: Path, source: Path) -> str:
    """A model's name by its place in the tree."""
    return source.resolve().name if path == source else path.relative_to(source).as_posix()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: If there is none; the file is named.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def wrong_tree(source: Path, name: str, expected: str) -> ValueError:
    """The error for a folder that a format finds nothing in.

    Args:
        source (`Path`): the folder.
        name (`str`): the format.
        expected (`str`): what it looked for.
    """
    other = guess_format(source)
    hint = f"; it looks like --format {other}" if other not in (None, name) else ""
    return ValueError(f"--format {name} expects {expected}, {source} has none{hint}.")


def guess_format(source: Path) -> str | None:
    """The format that a folder looks like; None if there is nothing known in it."""
    found = None
    for _, folders, files in walk(source):
        if {"weights.npy", "layout.csv"} <= set(files):
            return "unterthiner"
        if any(re.fullmatch(r"checkpoint-\d+", folder) for folder in folders):
            return "checkpoints"
        if any(re.fullmatch(r"checkpoint_\d+", folder) for folder in folders):
            return "modelzoos"
        if any(map(is_weights, files)):
            found = "folder"
    return found
