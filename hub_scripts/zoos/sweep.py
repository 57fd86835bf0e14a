"""What differs between the networks of a population: settings taken in turn or drawn, and which networks train together."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

SWEEPS = ("grid", "random")
# networks can share a step only if these are equal; so are arguments of the architecture, which change what is computed
SHARED = ("optimizer", "data_fraction")


@dataclass(frozen=True)
class Member:
    """One network of a population.

    Args:
        model_id (`str`): its name.
        architecture_kwargs (`str`): keyword arguments of its architecture, as JSON.
        hparams (`dict`): `learning_rate`, `weight_decay`, `initialisation`, `optimizer`, `data_fraction`, `label_noise`, `seed`,
            `classes` where each network has its own (as `"3-1-4-5"`), and arguments of the architecture that are swept over;
            lists among those as JSON text.
    """

    model_id: str
    architecture_kwargs: str = "{}"
    hparams: dict[str, Any] = field(default_factory=dict)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of its architecture."""
        return json.loads(self.architecture_kwargs)

    @property
    def classes(self) -> tuple[int, ...] | None:
        """The classes of the task that it knows, in the order of its outputs; None for all."""
        return read_classes(self.hparams["classes"]) if "classes" in self.hparams else None

    @property
    def shape(self) -> tuple[Any, ...]:
        """What must be equal for networks to train together."""
        return (self.architecture_kwargs, *(self.hparams[name] for name in SHARED))


def num_combinations(settings: Mapping[str, Sequence[Any]], swept_kwargs: Mapping[str, Sequence[Any]]) -> int:
    """Different networks, but for their seeds, that a sweep can make."""
    return math.prod(len(values) for values in [*settings.values(), *swept_kwargs.values()])


def draw_members(
    settings: Mapping[str, Sequence[Any]],
    swept_kwargs: Mapping[str, Sequence[Any]],
    architecture_kwargs: Mapping[str, Any],
    count: int,
    sweep: str,
    seed: int,
) -> list[Member]:
    """Give each network its settings and a seed of its own; networks that can train together stand side by side.

    Args:
        settings (`Mapping[str, Sequence]`): by hyper-parameter, its values.
        swept_kwargs (`Mapping[str, Sequence]`): by keyword argument of the architecture, its values.
        architecture_kwargs (`Mapping[str, Any]`): arguments that all networks share.
        count (`int`): networks.
        sweep (`str`): `"grid"` takes every combination in turn, the last settings changing fastest; `"random"` draws each
            setting of each network independently.
        seed (`int`): of the draws, and of the networks' seeds.
    """
    values = {**settings, **swept_kwargs}
    sizes = [len(found) for found in values.values()]
    if sweep == "grid":
        places = np.unravel_index(sorted(i % math.prod(sizes) for i in range(count)), sizes)
    else:
        # a stream of its own: splits are drawn from the seed itself
        generator = np.random.default_rng([seed, 1])
        places = [generator.integers(size, size=count) for size in sizes]
    together = [place for name, place in zip(values, places, strict=True) if name in (*swept_kwargs, *SHARED)]
    members = []
    for number, row in enumerate(np.lexsort(together[::-1])):
        chosen = {name: found[place[row]] for (name, found), place in zip(values.items(), places, strict=True)}
        own = {name: chosen.pop(name) for name in swept_kwargs}
        members.append(
            Member(
                f"model-{number:05d}",
                json.dumps({**architecture_kwargs, **own}, sort_keys=True),
                {
                    **chosen,
                    **{name: json.dumps(v) if isinstance(v, list | dict) else v for name, v in own.items()},
                    "seed": seed * 1_000_003 + number,
                },
            )
        )
    return members


def draw_classes(
    members: Sequence[Member], splits: Mapping[str, str], num_classes: int, per_network: int, seed: int
) -> list[Member]:
    """Give each network some classes of the task in an order of its own; no network of another split has those of a train network.

    Networks of the validation and test splits have choices that no other network has; those of the train split may repeat
    each other's where there are few.

    Args:
        members (`Sequence[Member]`): the networks.
        splits (`Mapping[str, str]`): the split of each, by `model_id`.
        num_classes (`int`): classes of the task.
        per_network (`int`): classes of each network.
        seed (`int`): of the draw.

    Raises:
        ValueError: If there are fewer ordered choices than that takes.
    """
    held_out = [member for member in members if splits[member.model_id] != "train"]
    choices = math.perm(num_classes, per_network)
    if choices <= len(held_out):
        raise ValueError(
            f"{per_network} of {num_classes} classes can be chosen and ordered in {choices} ways, but the {len(held_out)} networks "
            "of the validation and test splits need one each that no network of the train split has; build fewer networks."
        )
    # a stream of its own: splits are drawn from the seed itself, settings from [seed, 1]
    generator = np.random.default_rng([seed, 2])
    taken: set[str] = set()
    found: dict[str, str] = {}
    for member in [*held_out, *(member for member in members if splits[member.model_id] == "train")]:
        text = None
        while text is None or text in taken:
            text = write_classes(generator.permutation(num_classes)[:per_network].tolist())
        found[member.model_id] = text
        if splits[member.model_id] != "train":
            taken.add(text)
    return [replace(m, hparams={**m.hparams, "classes": found[m.model_id]}) for m in members]


def write_classes(classes: Sequence[int]) -> str:
    """Classes as a column of a zoo has them: `"3-1-4-5"`."""
    return "-".join(map(str, classes))


def read_classes(text: str) -> tuple[int, ...]:
    """Undo [`write_classes`]."""
    return tuple(int(word) for word in text.split("-"))


def make_groups(members: Sequence[Member], size: Callable[[str], int]) -> list[list[Member]]:
    """Cut a population into groups that train together.

    Args:
        members (`Sequence[Member]`): in the order of [`draw_members`].
        size (`Callable`): most networks in a group, by `architecture_kwargs`.
    """
    groups = []
    for shape, alike in groupby(members, key=lambda member: member.shape):
        run, step = list(alike), size(shape[0])
        groups += [run[i : i + step] for i in range(0, len(run), step)]
    return groups
