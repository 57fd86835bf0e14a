"""Anchors: the good networks that new ones are generated from, all of one layout and aligned with each other."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hub_scripts.embed import read_network, stack
from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import SaneWeightTokenizer, WeightMatcher

RULE = re.compile(r"(top|random):([1-9]\d*)|ids:(.+)")
SYNTAX = "top:N, random:N, ids:NAME,NAME, or checkpoints: files, folders or Hub repositories"


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


def load_anchors(zoo: Zoo, words: Sequence[str], tokenizer: SaneWeightTokenizer, seed: int) -> Anchors:
    """Anchors by a rule on the train split, or from checkpoints anywhere.

    Args:
        zoo ([`Zoo`]): its train split is where rules choose; its alignment is what checkpoints from elsewhere are brought to.
        words (`Sequence[str]`): one rule (`top:5`, `random:10`, `ids:a,b`), or checkpoint files, folders, Hub repositories.
        tokenizer ([`SaneWeightTokenizer`]): reads checkpoints.
        seed (`int`): of random choices.

    Raises:
        ValueError: If a rule asks for what the split does not have, or a checkpoint cannot be read or is of another layout.
    """
    if len(words) == 1 and RULE.fullmatch(words[0]):
        rows = choose_rows(zoo, words[0], seed)
        names = [zoo.rows("train")[int(row)]["model_id"] for row in rows]
        return Anchors(zoo.stacked("train", rows), names)
    networks = []
    for source in words:
        _, tensors = read_network(source, tokenizer)
        differs = _first_difference(tensors, zoo.layout.tensors)
        if differs:
            raise ValueError(
                f"anchor {source} is of another layout than the networks of {zoo.name}: {differs}. Anchors must be of one "
                "architecture; a set of another one is mapped with --target-architecture."
            )
        networks.append(tensors)
    tensors = stack(networks)
    return Anchors(align_to_zoo(zoo, tensors), list(words))


def choose_rows(zoo: Zoo, rule: str, seed: int) -> np.ndarray:
    """Rows of the train split: last checkpoints, the best on validation images, random ones, or those of named models.

    Raises:
        ValueError: If the split holds fewer models than asked for, or not the ones that are named.
    """
    kind, _, asked = rule.partition(":")
    epochs = zoo.column("train", "epoch")
    models = np.asarray(zoo.rows("train")["model_id"])
    if kind == "ids":
        return np.asarray([_last_row(zoo, models, epochs, name) for name in asked.split(",")])
    last = np.flatnonzero(epochs == epochs.max())
    if int(asked) > len(last):
        raise ValueError(
            f"--anchors {rule} asks for more than the {len(last)} models of the train split of {zoo.name}."
        )
    if kind == "random":
        return np.random.default_rng(seed).choice(last, int(asked), replace=False)
    return last[np.argsort(-zoo.column("train", "validation_accuracy")[last], kind="stable")[: int(asked)]]


def _last_row(zoo: Zoo, models: np.ndarray, epochs: np.ndarray, name: str) -> int:
    rows = np.flatnonzero(models == name)
    if not len(rows):
        others = [s for s in zoo.splits if s != "train" and name in zoo.rows(s)["model_id"][:]]
        where = f" (it stands in the {others[0]} split)" if others else ""
        raise ValueError(f"--anchors names {name!r}, which is not in the train split of {zoo.name}{where}.")
    return int(rows[epochs[rows].argmax()])


def _first_difference(tensors: Mapping[str, torch.Tensor], expected: Mapping) -> str | None:
    for name, tensor in expected.items():
        if name not in tensors:
            return f"it has no tensor {name}"
        if tuple(tensors[name].shape) != tuple(tensor.shape):
            return f"{name} has shape {tuple(tensors[name].shape)} there and {tuple(tensor.shape)} in the zoo"
    more = [name for name in tensors if name not in expected]
    return f"it has a tensor {more[0]}, which they lack" if more else None


def align_to_zoo(zoo: Zoo, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacked networks `(networks, *shape)` with their units in the order that the zoo's networks are aligned to.

    Tensors that no symmetry moves stay as they are; so does everything if the zoo has no symmetries.
    """
    spec = zoo.symmetries.of_kind("permutation", "sign") if zoo.has_symmetries else None
    if spec is None or not spec.groups:
        return dict(tensors)
    matcher = WeightMatcher(spec, alignment_reference(zoo))
    count = len(next(iter(tensors.values())))
    networks = ({name: tensor[i] for name, tensor in tensors.items()} for i in range(count))
    return stack([found.state_dict for found in matcher.align_all(networks)])


def alignment_reference(zoo: Zoo) -> dict[str, torch.Tensor]:
    """Last checkpoint of the network that the zoo is aligned to; of one that was not aligned, of its first train model."""
    models, epochs = np.asarray(zoo.rows("train")["model_id"]), zoo.column("train", "epoch")
    named = zoo.rows("train")[0].get("alignment_reference")
    rows = np.flatnonzero(models == (named if named in models else models[0]))
    return zoo.state_dict("train", int(rows[epochs[rows].argmax()]))
