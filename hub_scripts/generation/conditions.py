"""Properties that networks shall have: numeric columns of a zoo, and the checkpoints that come nearest to a wish."""

from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Value

from hub_scripts.zoos.zoo import Zoo


def condition_values(zoo: Zoo, names: Sequence[str]) -> np.ndarray:
    """Values of columns of the train split, `(checkpoints, columns)` float64, NaN where they are unknown.

    Raises:
        ValueError: If a name is none of a numeric column.
    """
    features = zoo.rows("train").features
    numbers = [
        name for name, kind in features.items() if isinstance(kind, Value) and kind.dtype.startswith(("int", "float"))
    ]
    for name in names:
        if name not in numbers:
            raise ValueError(
                f"--condition names {name!r}, which is no numeric column of {zoo.name}; these are: {', '.join(numbers)}."
            )
    return np.stack([np.asarray(zoo.column("train", name), np.float64) for name in names], axis=1)


def nearest_rows(zoo: Zoo, conditions: Mapping[str, float], count: int) -> np.ndarray:
    """Train checkpoints that are nearest to a wish, `(count,)` int64, nearest first; of each model its nearest one.

    Each property is measured in its standard deviations over the split.

    Raises:
        ValueError: If a condition is no numeric column, or fewer models have known values than are asked for.
    """
    values = condition_values(zoo, list(conditions))
    spread = np.nanstd(values, axis=0)
    away = (values - list(conditions.values())) / np.where(spread > 0, spread, 1)
    distance = np.square(away).sum(1)
    order = np.argsort(distance, kind="stable")  # NaN last
    order = order[: int(np.isfinite(distance).sum())]
    _, first = np.unique(np.asarray(zoo.rows("train")["model_id"])[order], return_index=True)
    if len(first) < count:
        raise ValueError(
            f"--anchors near:{count} asks for more than the {len(first)} models of the train split of {zoo.name} whose "
            f"{' and '.join(conditions)} are known."
        )
    return order[np.sort(first)[:count]]
