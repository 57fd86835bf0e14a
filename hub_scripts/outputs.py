"""Output folders: nothing half-written is left, and nothing that is not ours is overwritten."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

MARKER = ".sane"  # names the command that a folder belongs to


def cache_folder(name: str) -> Path:
    """Where things are kept that can be made again: below `SANE_CACHE`, or else beside the Hub's own cache."""
    return Path(os.environ.get("SANE_CACHE", Path(HF_HOME) / "sane")) / name


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Fill a folder under another name and give it its own when all is written.

    Args:
        target (`str` or `Path`): the folder; it must not exist, or be empty.

    Yields:
        `Path`: where to write. It is removed if anything fails.

    Raises:
        ValueError: If the target holds something.
    """
    target = Path(target)
    require_empty(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_empty(target: str | Path) -> None:
    """Refuse a path that is a file or a folder with something in it."""
    target = Path(target)
    if target.is_file():
        raise ValueError(f"{target} is a file; give another --output-dir.")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} already holds something; remove it or give another --output-dir.")


def claim_folder(target: str | Path, command: str, settings: dict[str, Any]) -> bool:
    """Make a folder the output of a command that can be interrupted and go on.

    Args:
        target (`str` or `Path`): the folder.
        command (`str`): who writes there.
        settings (`dict`): what must be the same for going on; JSON values.

    Returns:
        `bool`: True if the folder was claimed before, by the same command with the same settings.

    Raises:
        ValueError: If it holds something else, or was claimed with other settings (the first that differs is named).
    """
    target = Path(target)
    marker = target / MARKER
    mine = {"command": command, "settings": json.loads(json.dumps(settings))}
    if marker.is_file():
        found = json.loads(marker.read_text(encoding="utf-8"))
        if found["command"] != command:
            raise ValueError(f"{target} belongs to `sane {found['command']}`; give another --output-dir.")
        differ = [k for k in mine["settings"] if found["settings"].get(k) != mine["settings"][k]]
        if differ:
            raise ValueError(
                f"{target} was begun with --{differ[0]} {found['settings'].get(differ[0])}, now it is "
                f"{mine['settings'][differ[0]]}; use the same settings to go on, or another --output-dir."
            )
        return True
    if target.is_dir():
        for half in target.glob(f".{MARKER}.*"):  # of a process that was killed while it wrote the marker
            half.unlink()
    require_empty(target)
    target.mkdir(parents=True, exist_ok=True)
    write_json(marker, mine)
    return False


def release_folder(target: str | Path) -> None:
    """Undo [`claim_folder`] where nothing else was written."""
    target = Path(target)
    if [path.name for path in target.iterdir()] == [MARKER]:
        shutil.rmtree(target)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON so that a reader sees all of it or what stood there before; NumPy numbers and NaN are made plain."""
    write_text(path, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that a reader sees all of it or what stood there before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """What [`write_json`] wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    """NumPy and torch numbers as Python's, NaN and infinities as None, keys as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return str(value) if isinstance(value, Path) else value
