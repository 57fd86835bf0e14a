"""Formats that a zoo can be made from; one file each. An importer lists checkpoints and reads none of their weights."""

import importlib
from collections.abc import Callable

from .checkpoint import Checkpoint
from .options import ImportOptions

# modules, not functions: only the one that is asked for is imported
IMPORTERS: dict[str, str] = {
    "folder": "hub_scripts.zoos.importers.folder",
    "modelzoos": "hub_scripts.zoos.importers.modelzoos",
    "unterthiner": "hub_scripts.zoos.importers.unterthiner",
    "checkpoints": "hub_scripts.zoos.importers.checkpoints",
    "hub": "hub_scripts.zoos.importers.hub",
}


def importer(name: str) -> Callable[[str, ImportOptions], list[Checkpoint]]:
    """The `list_checkpoints(source, options)` of a format.

    Args:
        name (`str`): a key of `IMPORTERS`.

    Raises:
        ValueError: If there is no such format.
    """
    if name not in IMPORTERS:
        raise ValueError(f"--format {name} is not known, expected one of {', '.join(IMPORTERS)}.")
    return importlib.import_module(IMPORTERS[name]).list_checkpoints
