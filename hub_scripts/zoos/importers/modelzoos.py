"""The Model Zoos of the NeurIPS 2022 datasets track, and what else ray tune has written in this way.

```
zoo/
  NN_tune_trainable_0001/        one model; such folders may stand at any depth
    params.json                  its configuration (or config.json)
    result.json                  a JSON object a line, a line an epoch
    checkpoint_000000/checkpoints    a pickled state dict
    checkpoint_000001/checkpoints
```
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tokenization_sane.checkpoint_sane import read_checkpoint

from .checkpoint import Checkpoint
from .columns import hyper_parameters, is_number, plain, property_name, with_gap
from .options import ImportOptions
from .sources import find_folders, natural_key, pickle_refused, read_object, relative_name, require_folder, wrong_tree

EXPECTED = "folders with params.json, result.json and checkpoint_000001/checkpoints"
NOT_MEASURED = -999  # what the code that trained the published zoos writes for the training figures of epoch 0
_WEIGHTS, _EPOCH = "checkpoints", "training_iteration"


def list_checkpoints(source: str, options: ImportOptions) -> list[Checkpoint]:
    """Checkpoints of a tree that ray tune has written.

    Models are named by their folder. Settings become `hparams_<name>`, figures of `result.json` get our names (`test_acc` is
    `test_accuracy`), and what is not known of a checkpoint is missing from its columns.

    Args:
        source (`str`): the folder of a zoo, of several, or of one model.
        options ([`ImportOptions`]): `allow_pickle` must be True, since the weights are pickles.

    Returns:
        `list[Checkpoint]`: by folder, then by epoch.

    Raises:
        ValueError: If there is no checkpoint, pickles are not allowed, or a file of a model is damaged.
    """
    folder = require_folder(source, "modelzoos")
    checkpoints = []
    for model in find_folders(folder, _is_model):
        with options.skipping():
            checkpoints += _checkpoints_of(model, relative_name(model, folder), options)
    if not checkpoints and not options.skipped:
        raise wrong_tree(folder, "modelzoos", EXPECTED)
    if checkpoints and not options.allow_pickle:
        raise ValueError(pickle_refused(checkpoints[0].where))
    return checkpoints


def _is_model(folders: list[str], files: list[str]) -> bool:
    # an experiment, which holds many models, has a config.json too
    return "result.json" in files or "params.json" in files or any(map(_epoch, folders))


def _epoch(name: str) -> re.Match | None:
    return re.fullmatch(r"checkpoint_([0-9]+)", name)


def _checkpoints_of(model: Path, model_id: str, options: ImportOptions) -> list[Checkpoint]:
    settings = next((model / name for name in ("params.json", "config.json") if (model / name).is_file()), None)
    hparams = {} if settings is None else hyper_parameters(read_object(settings), str(settings))
    results = _read_results(model / "result.json")
    checkpoints = []
    for folder in sorted(model.iterdir(), key=natural_key):
        if found := _epoch(folder.name):
            with options.skipping():
                epoch, path = int(found[1]), folder / _WEIGHTS
                if not path.is_file():
                    raise ValueError(f"{folder} has no file {_WEIGHTS!r}, which would hold its weights.")
                columns = with_gap(results.get(epoch, {})) | hparams
                read = partial(read_checkpoint, path, options.allow_pickle)
                checkpoints.append(Checkpoint(model_id, epoch, str(path), read, columns))
    return checkpoints


def _read_results(path: Path) -> dict[int, dict[str, Any]]:
    """Properties by epoch; a run that was started again has an epoch twice, and the later line counts."""
    if not path.is_file():
        return {}
    return {line.pop(_EPOCH): _properties(line) for line in _read_lines(path)}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # a run that was killed leaves half a line
                return
            raise ValueError(f"{path}, line {number} is no JSON: {error}.") from error
        if not isinstance(entry, dict) or type(entry.get(_EPOCH)) is not int:
            raise ValueError(f"{path}, line {number} has no integer {_EPOCH!r}, which tells the epoch.")
        yield entry


def _properties(entry: dict[str, Any]) -> dict[str, Any]:
    """Figures of a line that are about a split; the others are about the machine."""
    named = {property_name(name): value for name, value in entry.items() if is_number(value)}
    return {name: None if value == NOT_MEASURED else plain(value) for name, value in named.items() if name}
