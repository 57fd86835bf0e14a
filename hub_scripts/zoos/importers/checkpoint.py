"""One checkpoint of a foreign zoo: what is known of it, and how its weights are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint before it becomes a row.

    Args:
        model_id (`str`): the network; all its checkpoints have the same.
        epoch (`int`): when in its training; two checkpoints of a network must differ here.
        where (`str`): file, or file and row, for messages and for the row's provenance.
        read (`Callable[[], Mapping[str, torch.Tensor]]`): reads the weights; called once, when the row is written.
        columns (`Mapping[str, Any]`): properties, and hyper-parameters as `hparams_<name>`: bool, int, float, str, or None where
            the value is missing.
        split (`str`, *optional*): train, validation or test, if the source says so.
        architecture (`str`, *optional*): `"package.module:Callable"`, if the source says so.
        architecture_kwargs (`Mapping[str, Any]`): its keyword arguments.
        layout_source (`Any`): what [`SaneWeightTokenizer.layout`] takes to know more of the tensors than they tell themselves,
            such as a file whose format says which of them are recurrent; default their names and shapes.
    """

    model_id: str
    epoch: int
    where: str
    read: Callable[[], Mapping[str, torch.Tensor]]
    columns: Mapping[str, Any] = field(default_factory=dict)
    split: str | None = None
    architecture: str | None = None
    architecture_kwargs: Mapping[str, Any] = field(default_factory=dict)
    layout_source: Any = None
