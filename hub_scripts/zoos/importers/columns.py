"""Names and values that other people's zoos use, as the columns of ours."""

import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from hub_scripts.zoos.schema import HPARAM

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "val": "validation", "valid": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip


@lru_cache
def identifier(name: str) -> str:
    """A name as a column can have it: `model::nlin` becomes `model_nlin`."""
    return re.sub(r"\W+", "_", name).strip("_")


def property_name(name: str) -> str | None:
    """A measurement by our name: `val_acc` becomes `validation_accuracy`; None if it does not begin with a split."""
    split, _, metric = name.partition("_")
    if split not in SPLIT_NAMES or not metric:
        return None
    return f"{SPLIT_NAMES[split]}_{'accuracy' if metric == 'acc' else metric}"


def plain(value: Any) -> Any:
    """A value as a row can hold it: NaN is missing, and an integer of more than 64 bits becomes a fraction."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return float(value) if type(value) is int and not -(2**63) <= value < 2**63 else value


def is_number(value: Any) -> bool:
    """True for integers and fractions; bool is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole_number(value: Any, where: str, column: str) -> int:
    """An integer out of a table.

    Args:
        value (`Any`): what stands there.
        where (`str`): file and row, for messages.
        column (`str`): its column.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, float) and value.is_integer():  # what pandas makes of integers in a column with gaps
        value = int(value)
    if type(value) is not int:
        raise ValueError(f"{where}, column {column!r} is {value!r}, expected an integer.")
    return value


def hyper_parameters(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings as columns `hparams_<name>`; the names of nested ones are joined, lists are left out.

    Args:
        settings (`Mapping[str, Any]`): as a JSON file has them.
        where (`str`): that file, for messages.

    Raises:
        ValueError: If two settings get the same name.
    """
    columns: dict[str, Any] = {}
    for path, value in _leaves(settings, ()):
        name = HPARAM + identifier("_".join(path))
        if name in columns:
            raise ValueError(
                f"{where}: {'.'.join(path)} and another entry would both be the column {name}; rename one."
            )
        columns[name] = plain(value)
    return columns


def _leaves(settings: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        elif not isinstance(value, list):
            yield (*above, key), value


def with_gap(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns, with `generalization_gap` where it can be told from them and is not there."""
    train, test = columns.get("train_accuracy"), columns.get("test_accuracy")
    if "generalization_gap" in columns or not (is_number(train) and is_number(test)):
        return columns
    return {**columns, "generalization_gap": train - test}
