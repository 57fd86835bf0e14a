"""Training runs as transformers' `Trainer` leaves them.

```
run/
  checkpoint-500/       epoch 500: a Trainer counts steps
    model.safetensors   or shards with their index, or pytorch_model.bin
    config.json         the architecture
    trainer_state.json  what was measured, step by step
  checkpoint-1000/
```
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from tokenization_sane.checkpoint_sane import read_checkpoint

from .checkpoint import Checkpoint
from .columns import hyper_parameters, is_number, plain
from .options import ImportOptions
from .sources import (
    find_folders,
    natural_key,
    read_object,
    relative_name,
    require_folder,
    require_weights,
    wrong_tree,
)
from .transformers_config import architecture_of

EXPECTED = "folders checkpoint-N with model.safetensors"
_PROPERTIES = {"eval_accuracy": "validation_accuracy", "eval_loss": "validation_loss", "loss": "train_loss"}
_SETTINGS = ("train_batch_size", "num_train_epochs", "max_steps", "trial_params")  # of trainer_state.json


def list_checkpoints(source: str, options: ImportOptions) -> list[Checkpoint]:
    """Checkpoints of one run or of several.

    A run is a model, named by its folder; the number of a checkpoint, its step, is the epoch, and the epoch that the Trainer counts
    is the property `training_epoch`. Figures that were logged at that step are properties. `training_args.bin` is a pickle and is
    never opened; a `training_args.json` is read.

    Args:
        source (`str`): the folder of a run, or one with runs in it.
        options ([`ImportOptions`]): `allow_pickle` is needed for runs without safetensors.

    Returns:
        `list[Checkpoint]`: by run, then by step.

    Raises:
        ValueError: If there is no checkpoint, or one is damaged.
    """
    folder = require_folder(source, "checkpoints")
    runs = find_folders(folder, lambda folders, _: any(map(_step, folders)))
    if not runs:
        raise wrong_tree(folder, "checkpoints", EXPECTED)
    checkpoints = []
    for run in runs:
        for path in sorted(run.iterdir(), key=natural_key):
            if (found := _step(path.name)) and path.is_dir():
                with options.skipping():
                    checkpoints.append(_checkpoint(path, relative_name(run, folder), int(found[1]), options))
    return checkpoints


def _step(name: str) -> re.Match | None:
    return re.fullmatch(r"checkpoint-([0-9]+)", name)


def _checkpoint(path: Path, model_id: str, step: int, options: ImportOptions) -> Checkpoint:
    require_weights((file.name for file in path.iterdir()), str(path), options.allow_pickle)
    state = _read("trainer_state.json", path)
    architecture, kwargs = architecture_of(_read("config.json", path))
    hparams = hyper_parameters(
        {name: state[name] for name in _SETTINGS if state.get(name) is not None}, f"{path}/trainer_state.json"
    ) | hyper_parameters(_read("training_args.json", path), f"{path}/training_args.json")
    return Checkpoint(
        model_id=model_id,
        epoch=step,
        where=str(path),
        read=partial(read_checkpoint, path, options.allow_pickle),
        columns={**_properties(state, step), **hparams},
        architecture=architecture,
        architecture_kwargs=kwargs,
    )


def _read(name: str, checkpoint: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint, or else of its run; nothing if neither has it."""
    file = next((folder / name for folder in (checkpoint, checkpoint.parent) if (folder / name).is_file()), None)
    return {} if file is None else read_object(file)


def _properties(state: dict[str, Any], step: int) -> dict[str, Any]:
    """What was measured at a step."""
    logged: dict[str, Any] = {"epoch": state.get("epoch") if state.get("global_step") == step else None}
    for entry in state.get("log_history") or []:
        logged |= entry if isinstance(entry, dict) and entry.get("step") == step else {}
    columns = {"training_epoch": float(logged["epoch"])} if is_number(logged["epoch"]) else {}
    for name, value in logged.items():
        if is_number(value) and (name in _PROPERTIES or name.startswith("eval_")):
            columns[_PROPERTIES.get(name, name)] = plain(value)
    return columns
