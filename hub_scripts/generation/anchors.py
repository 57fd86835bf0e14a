"""Anchors: the good networks that new ones are generated from, all of one layout and aligned with each other."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hub_scripts.embed import read_network, stack
from hub_scripts.evaluation.baselines import nearest_distances
from hub_scripts.generation.conditions import nearest_rows
from hub_scripts.zoos.alignment import ZooAligner
from hub_scripts.zoos.networks import set_files
from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import SaneWeightTokenizer

RULE = re.compile(r"(top|random|near):([1-9]\d*)|ids:(.+)")
SYNTAX = "top:N, random:N, near:N, ids:NAME,NAME, or checkpoints: files, folders, sets of generated networks or Hub repositories"
TRAIN_NETWORKS_AT_ONCE = 64  # in memory, when the order of other networks is looked for


@dataclass(frozen=True)
class Anchors:
    """Networks of one layout, aligned with each other.

    Args:
        tensors (`dict[str, torch.Tensor]`): stacked state dicts, each `(anchors, *shape)` float32.
        names (`list[str]`): model ids or sources.
    """

    tensors: dict[str, torch.Tensor]
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)


def check_rules(words: Sequence[str]) -> None:
    """Refuse a rule that is none, or that stands beside something else.

    Raises:
        ValueError: The rule is named, and what is expected.
    """
    for word in words:
        is_rule = word.partition(":")[0] in ("top", "random", "near", "ids")
        if is_rule and (len(words) > 1 or not RULE.fullmatch(word)):
            raise ValueError(f"--anchors is {' '.join(words)!r}, expected one of {SYNTAX}.")


def load_anchors(
    zoo: Zoo,
    words: Sequence[str],
    tokenizer: SaneWeightTokenizer,
    seed: int,
    conditions: Mapping[str, float] | None = None,
) -> Anchors:
    """Anchors by a rule on the train split, or from checkpoints anywhere.

    Args:
        zoo ([`Zoo`]): its train split is where rules choose; its alignment is what checkpoints from elsewhere are brought to.
        words (`Sequence[str]`): one rule (`top:5`, `random:10`, `near:5`, `ids:a,b`), or checkpoint files, folders, Hub
            repositories, sets of generated networks.
        tokenizer ([`SaneWeightTokenizer`]): reads checkpoints.
        seed (`int`): of random choices.
        conditions (`Mapping[str, float]`, *optional*): numeric columns and the values that `near` looks for.

    Raises:
        ValueError: If a rule asks for what the split does not have, or a checkpoint cannot be read or is of another layout.
    """
    if RULE.fullmatch(words[0]):
        rows = choose_rows(zoo, words[0], seed, conditions)
        found = [zoo.rows("train")[int(row)] for row in rows]
        names = [row["model_id"] + (f" epoch {row['epoch']}" if words[0].startswith("near") else "") for row in found]
        return Anchors(zoo.stacked("train", rows), names)
    sources = [str(file) for word in words for file in set_files(word) or [word]]
    networks = []
    for source in sources:
        _, tensors = read_network(source, tokenizer)
        differs = _first_difference(tensors, zoo.layout.tensors)
        if differs:
            raise ValueError(
                f"anchor {source} is of another layout than the networks of {zoo.name}: {differs}. Anchors must be of one "
                "architecture; a set of another one is mapped with --target-architecture."
            )
        networks.append(tensors)
    return Anchors(_in_order_of(zoo, stack(networks)), sources)


def _in_order_of(zoo: Zoo, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each network aligned to the zoo, or as it stands if that is nearer to a train network.

    A noisy copy of a train network that stands in the zoo's order, as a generated one does, can match the reference in another
    order than the train network itself.
    """
    aligner = ZooAligner.of_zoo(zoo)
    if aligner is None:
        return tensors
    ways = [aligner.align_stacked(tensors), tensors]
    flats = [torch.cat([way[name].flatten(1) for name in tensors], dim=1) for way in ways]
    nearest = np.full((2, len(flats[0])), np.inf)
    last = zoo.last_rows("train")
    for start in range(0, len(last), TRAIN_NETWORKS_AT_ONCE):
        train = zoo.stacked("train", last[start : start + TRAIN_NETWORKS_AT_ONCE])
        block = torch.cat([train[name].flatten(1).float() for name in tensors], dim=1)
        nearest = np.minimum(nearest, [nearest_distances(flat, block) for flat in flats])
    stays = torch.from_numpy(nearest[1] < nearest[0])
    return {
        name: torch.where(stays.view(-1, *[1] * (tensor.dim() - 1)), tensor, ways[0][name])
        for name, tensor in tensors.items()
    }


def choose_rows(zoo: Zoo, rule: str, seed: int, conditions: Mapping[str, float] | None = None) -> np.ndarray:
    """Rows of the train split that a rule chooses.

    These are last checkpoints, the best on validation images, random ones or those of named models; or, of the checkpoints of all
    epochs, those nearest to some conditions.

    Raises:
        ValueError: If the split holds fewer models than asked for, or not the ones that are named.
    """
    kind, _, asked = rule.partition(":")
    if kind == "ids":
        return np.asarray([_named_row(zoo, name) for name in asked.split(",")])
    if kind == "near":
        return nearest_rows(zoo, conditions or {}, int(asked))
    last = zoo.last_rows("train")
    if int(asked) > len(last):
        raise ValueError(
            f"--anchors {rule} asks for more than the {len(last)} models of the train split of {zoo.name}."
        )
    if kind == "random":
        return np.random.default_rng(seed).choice(last, int(asked), replace=False)
    return last[np.argsort(-zoo.column("train", "validation_accuracy")[last], kind="stable")[: int(asked)]]


def _named_row(zoo: Zoo, name: str) -> int:
    row = zoo.last_row_of("train", name)
    if row is None:
        others = [s for s in zoo.splits if s != "train" and name in zoo.rows(s)["model_id"][:]]
        where = f" (it stands in the {others[0]} split)" if others else ""
        raise ValueError(f"--anchors names {name!r}, which is not in the train split of {zoo.name}{where}.")
    return row


def _first_difference(tensors: Mapping[str, torch.Tensor], expected: Mapping) -> str | None:
    for name, tensor in expected.items():
        if name not in tensors:
            return f"it has no tensor {name}"
        if tuple(tensors[name].shape) != tuple(tensor.shape):
            return f"{name} has shape {tuple(tensors[name].shape)} there and {tuple(tensor.shape)} in the zoo"
    more = [name for name in tensors if name not in expected]
    return f"it has a tensor {more[0]}, which they lack" if more else None
