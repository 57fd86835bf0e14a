"""Whether networks find their relatives by their embeddings, how fast embeddings are made, and what they tell of real networks.

These are parts of `benchmarks/analysis.py` (`search`, `speed`, `mhcnuggets`). Intervals hold 95 % of bootstrap samples over models.

`search`: checkpoints of zoos that `sane build-zoo` made. Each network is embedded as it came out of its training, with the
alignment of the zoo undone, by: each of `FEATURES` on the latents of a SANE model (`sane_*`); moments of the weights, of each
tensor, after canonical signs (`layer_moments`); the default feature beside the moments (`sane_and_moments`); what the axes that no
symmetry moves say (pixels of a kernel, inputs, classes): root mean squares along them (`axis_profile`), these beside the moments
(`moments_and_profile`), and inner products of their slices (`axis_products`); s(W) of Unterthiner et al. 2020; the flattened weights as they came (`weights`), in canonical order (`weights_canonical`), and matched to the zoo's
reference (`weights_aligned`; queries that are no rows of the zoo are matched alone). Distances are those of `sane search`: Euclidean
between standardised features; or cosines (`*_cosine`). A zoo whose layout the model does not know gets a model of
its own, trained for `TRAIN_STEPS` steps. The truth is known:

* `twin`: `INDEX_SIZE` checkpoints are in the index; queries are these with random permutations and signs that keep their functions.
  Recall at 1 is the share of queries whose nearest row is the network that they were made of.
* `same_run`: all checkpoints are in the index, and each is a query without its own row: is a checkpoint of the same training run
  nearest, or among the nearest 5? `same_run_permuted`: the same with queries permuted at random.
* `sibling`: last checkpoints; is one of the nearest 5 from a run with the same hyper-parameters and another seed?
* `parent_*`: `CHILDREN` last checkpoints are trained on with a changed task (half of the zoo's images, at most `CHILD_IMAGES`; three
  pairs of classes trade names) for some epochs and permuted at random. `auc` is the share of other models that lie farther
  away than the parent, `auc_pooled` tells pairs of child and parent from all others by one threshold, `recall@1` is among all models.

* `*_matched`: the `MATCHED` nearest are put in a new order, by the cosine of their weights to the query's after weight
  matching; recall at 1 before and after, and the recall at `MATCHED`, which is the most that this can reach.
  `same_run_permuted_matched` has `MATCHED_QUERIES` queries.

`chance` is what a random order of the index gives.

`speed`: seconds of `sane embed` from the command line, start of Python included, for 1,000 checkpoints of a zoo; and bytes a
second of random ResNet-18 checkpoints in files, through reading, stacking and `Embedder` as `sane embed` does, against the encoder's
forward passes alone, on windows of the same tokens that do not overlap and lie in memory. `parts` says where the time of the
first batch goes.

`mhcnuggets`: 299 LSTMs that others trained for use, one for each allele of the MHC, imported as `docs/zoos.md` says. A small model is
trained on them. One network of each allele is kept (the last one), none that the zoo's lineage lists as a duplicate: is the
nearest network of the same family? A family is a species and locus (`FAMILY`, on the allele's name) and the class of the MHC that the
package lists the allele under. Networks without another of their family are no queries. `distinct` keeps one of those whose
cosine is 1.0000 in the lineage; `within_class` looks for neighbours among networks of the same class alone, since the two classes
have different ancestors. `*_from_ancestor_cosine` are cosines between what is left when the mean of the lineage's family of nearly equal
networks is taken away, which stands for the network that they were trained on from (`sane_latents`: all latents of a network side
by side).
"""

import csv
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from matplotlib.figure import Figure
from safetensors.torch import save_file
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from benchmarks.families import resnet18
from benchmarks.training_quality import ROOT, command
from hub_scripts.embed import BATCH_VALUES, load_embedder, read_network, stack
from hub_scripts.evaluation.baselines import layer_statistics, weight_features
from hub_scripts.evaluation.embedder import Embedder
from hub_scripts.evaluation.features import DEFAULT_FEATURE, FEATURES
from hub_scripts.evaluation.functional import evaluate, train_networks
from hub_scripts.evaluation.index import EmbeddingIndex
from hub_scripts.evaluation.moments import layer_moments
from hub_scripts.evaluation.plots import RC
from hub_scripts.outputs import read_json
from hub_scripts.zoos.alignment import unaligned
from hub_scripts.zoos.schema import HPARAM, LINEAGE_FILE, hparam_columns, property_columns
from hub_scripts.zoos.writer import ZooWriter
from hub_scripts.zoos.zoo import Zoo
from modeling_sane import SaneConfig, SaneModel
from tokenization_sane import CheckpointLayout, SaneWeightTokenizer, SymmetrySpec, WeightMatcher, find_symmetries

Tensors = dict[str, torch.Tensor]  # stacked networks, each (networks, *shape)
Vectors = dict[str, np.ndarray]  # by embedding, (networks, features)

INDEX_SIZE = 1000
CHILDREN = 40
CHILD_EPOCHS = (1, 5)
CHILD_IMAGES = 5000
CHILD_RATE = 1e-3
SWAPPED_PAIRS = 3
MATCHED, MATCHED_QUERIES = 20, 200
FIRST_STAGES = (f"sane_{DEFAULT_FEATURE}", "layer_moments", "axis_profile")
TRAIN_STEPS = 60
BOOTSTRAPS = 2000
TARGETS = {"small_seconds": 60.0, "resnet18_ratio": 0.7}

# a random model of the size that ResNet-18 is embedded with
RESNET_MODEL = {"token_size": 288, "latent_size": 128, "hidden_size": 384, "num_hidden_layers": 4}
RESNET_MODEL |= {"num_attention_heads": 6}
BARE_BATCHES = (8, 64)  # windows in a forward pass; the faster one counts

MHCNUGGETS = "mhcnuggets==2.4.1"
MHC_FOLDER = "mhcnuggets/saves/production"
MHC_TRAINING = ["--token-size", "64", "--packing", "flat", "--latent-size", "30", "--hidden-size", "128"]
MHC_TRAINING += ["--num-hidden-layers", "2", "--batch-size", "16", "--learning-rate", "1e-3", "--max-minutes", "3"]
MHC_STEPS = 60
MHC_CLASSES = {
    number: f"mhcnuggets/data/production/mhc{number}/alleles_with_trained_models.txt" for number in ("I", "II")
}
# species and locus: HLA-A, HLA-DQ (with or without its alpha chain), H-2, Mamu-DR, BoLA, ...; the class is added to it
FAMILY = re.compile(r"HLA-(?:D[PQR]|[A-Z]+)|Mamu-(?:DR|[AB])|Patr-[AB]|H-2|[A-Za-z]+")
SAME = 1.0  # cosine in the lineage, which has four digits


# ---------------------------------------------------------------------------------------------------- figures
def summary(values: np.ndarray, groups: Sequence[Any] | None = None) -> dict[str, Any]:
    """Mean and bootstrap interval of figures `(queries,)`; queries of one group are drawn together."""
    values = np.asarray(values, np.float64)
    _, numbers = np.unique(np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(numbers, values), np.bincount(numbers)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), BOOTSTRAPS)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), (0.025, 0.975))
    return {"mean": float(values.mean()), "interval": [float(low), float(high)], "queries": len(values)}


def chance(relatives: np.ndarray, others: int, k: int) -> float:
    """Mean probability that a random order of `others` rows has one of the `(queries,)` relatives among its first `k`."""
    missed = np.ones(len(relatives))
    for place in range(k):
        missed *= np.clip((others - place - relatives) / max(1, others - place), 0, 1)
    return float(1 - missed.mean())


def nearest(name: str, index: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows of the `k` nearest of an index, both `(queries, k)`, by the distance that the embedding's name says."""
    k = min(k, len(index))
    if name.endswith("_cosine"):
        unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12) for vectors in (index, queries)]
        distances = 1 - unit[1].astype(np.float64) @ unit[0].astype(np.float64).T
        rows = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(distances, rows, 1), rows
    rows = Dataset.from_dict({"layout_id": ["one"] * len(index), "embedding": list(index.astype(np.float32))})
    with quiet():
        return EmbeddingIndex(rows).query(queries, "one", k)


def recalls(
    name: str, index: np.ndarray, queries: np.ndarray, own: np.ndarray, related: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Whether a relative is among the nearest, `(queries,)` for each k.

    Args:
        name (`str`): of the embedding.
        index (`np.ndarray` of shape `(rows, features)`): what is searched.
        queries (`np.ndarray` of shape `(queries, features)`): what is searched for.
        own (`np.ndarray` of shape `(queries,)`): int, the row of the index that a query may not find; -1 for none.
        related (`np.ndarray` of shape `(queries, rows)`): bool, what counts as found.
        ks (`Sequence[int]`): how many of the nearest.
    """
    _, rows = nearest(name, index, queries, max(ks) + 1)
    found = np.take_along_axis(related, rows, 1)
    kept = [hits[near != mine] for hits, near, mine in zip(found, rows, own, strict=True)]
    return {f"recall@{k}": np.array([hits[:k].any() for hits in kept], float) for k in ks}


# ---------------------------------------------------------------------------------------------------- networks
class Population(NamedTuple):
    """Networks of a zoo, or made of some: as they came, and matched to the zoo's reference."""

    came: Tensors
    aligned: Tensors

    def rows(self, rows: np.ndarray) -> "Population":
        """Some of the networks."""
        return Population(*({name: tensor[rows] for name, tensor in tensors.items()} for tensors in self))


class Kin(NamedTuple):
    """Who is related to whom: model, epoch and hyper-parameters (as text) of each checkpoint, `(checkpoints,)` each."""

    models: np.ndarray
    epochs: np.ndarray
    settings: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """Rows of the last checkpoints of the models."""
        rows = {}
        for row in np.argsort(self.epochs, kind="stable"):
            rows[self.models[row]] = row
        return np.sort(list(rows.values()))


def each(tensors: Tensors) -> Iterator[dict[str, torch.Tensor]]:
    """Networks out of their stack."""
    for row in range(len(next(iter(tensors.values())))):
        yield {name: tensor[row] for name, tensor in tensors.items()}


def read_zoo(zoo: Zoo) -> tuple[Population, Kin]:
    """All checkpoints of a zoo, of all splits."""
    aligned, came, models, epochs, settings = [], [], [], [], []
    for split, table in zoo.splits.items():
        hparams = [name for name in hparam_columns(table.features) if name != f"{HPARAM}seed"]
        aligned.append(zoo.stacked(split))
        for network, row in zip(each(aligned[-1]), table, strict=True):
            came.append(unaligned(zoo.symmetries, network, row["alignment_permutations"]))
            models.append(row["model_id"])
            epochs.append(row["epoch"])
            settings.append(json.dumps([row[name] for name in hparams]))
    together = {name: torch.cat([part[name] for part in aligned]) for name in aligned[0]}
    return Population(stack(came), together), Kin(np.array(models), np.array(epochs), np.array(settings))


def reference(zoo: Zoo) -> dict[str, torch.Tensor]:
    """The network that the zoo was aligned to: the last checkpoint of its model."""
    table = zoo.rows("train")
    models, epochs = np.asarray(table["model_id"]), np.asarray(table["epoch"])
    rows = np.flatnonzero(models == table[0]["alignment_reference"])
    return zoo.state_dict("train", rows[epochs[rows].argmax()])


def permuted(tensors: Tensors, zoo: Zoo, seed: int) -> Population:
    """Twins of networks, each with permutations and signs of its own; and these, matched to the zoo's reference."""
    spec = zoo.symmetries.of_kind("permutation", "sign")
    generator, matcher = torch.Generator().manual_seed(seed), WeightMatcher(spec, reference(zoo))
    twins = [spec.apply(network, spec.draw(generator)) for network in each(tensors)]
    return Population(stack(twins), stack([spec.apply(twin, matcher.match(twin)) for twin in twins]))


def along_fixed_axes(tensors: Tensors, spec: SymmetrySpec) -> Iterator[np.ndarray]:
    """Tensors as `(networks, places, values)`, float64: places on the axes that no permutation moves, of tensors that have some.

    Sums over the values of a place do not depend on permutations; sums of squares, or of products of two places, do not depend
    on signs of the moved axes either.
    """
    moved: dict[str, set[int]] = {}
    for group in spec.of_kind("permutation").groups:
        for item in group.items:
            moved.setdefault(item.tensor, set()).add(item.axis)
    for name, tensor in tensors.items():
        axes = range(tensor.ndim - 1)
        fixed = [axis + 1 for axis in axes if axis not in moved.get(name, ()) and tensor.shape[axis + 1] > 1]
        if fixed and tensor.is_floating_point():
            rest = [axis + 1 for axis in axes if axis + 1 not in fixed]
            places = int(np.prod([tensor.shape[axis] for axis in fixed]))
            yield tensor.double().permute(0, *fixed, *rest).reshape(len(tensor), places, -1).numpy()


def axis_profile(tensors: Tensors, spec: SymmetrySpec) -> np.ndarray:
    """Root mean square at each place of the fixed axes, or the value where there is one alone: `(networks, places)`."""
    parts = along_fixed_axes(tensors, spec)
    return np.concatenate([x[..., 0] if x.shape[2] == 1 else np.sqrt(np.square(x).mean(2)) for x in parts], axis=1)


def axis_products(tensors: Tensors, spec: SymmetrySpec) -> np.ndarray:
    """Inner products of all pairs of places of the fixed axes, or the values where there is one alone: `(networks, pairs)`."""
    found = []
    for x in along_fixed_axes(tensors, spec):
        first, second = np.triu_indices(x.shape[1])
        found.append(x[..., 0] if x.shape[2] == 1 else (x @ x.swapaxes(1, 2))[:, first, second])
    return np.concatenate(found, axis=1)


def embeddings(
    networks: Population, embedder: Embedder, layout: CheckpointLayout, spec: SymmetrySpec | None = None
) -> Vectors:
    """All embeddings of some networks; without symmetries those that need none."""
    canonical = embedder.canonical(networks.came, layout)
    latents, layer_ids = embedder.latents(networks.came, layout), embedder.codec(layout).layout.layer_ids
    found = {f"sane_{name}": feature(latents, layer_ids) for name, feature in FEATURES.items()}
    found["layer_moments"] = layer_moments(canonical)
    found["sane_and_moments"] = np.concatenate([found[f"sane_{DEFAULT_FEATURE}"], found["layer_moments"]], axis=1)
    found["layer_statistics"] = found["layer_statistics_cosine"] = layer_statistics(networks.came)
    found["weights_cosine"] = weight_features(networks.came)
    if spec is None:
        return found
    found["axis_profile"], found["axis_products"] = axis_profile(canonical, spec), axis_products(canonical, spec)
    found["moments_and_profile"] = np.concatenate([found["layer_moments"], found["axis_profile"]], axis=1)
    found["weights_canonical"] = found["weights_canonical_cosine"] = weight_features(canonical)
    found["weights_aligned_cosine"] = weight_features(networks.aligned)
    return found


def model_for(zoo: Zoo, model: Path, folder: Path) -> Path:
    """The model, or one trained on the zoo where the model's tokenizer does not know its networks."""
    if zoo.layout_id in SaneWeightTokenizer.from_pretrained(model).zoo:
        return model
    output = folder / f"model_{zoo.layout_id}"
    if not output.exists():
        steps = ["--max-steps", str(TRAIN_STEPS), "--eval-steps", str(TRAIN_STEPS), "--behavioural-weight", "0"]
        command("train.py", "--preset", "small-cnn", "--zoo", zoo.name, "--output-dir", str(output), *steps)
    return output


# ---------------------------------------------------------------------------------------------------- search
def children(zoo: Zoo, parents: Tensors) -> tuple[dict[int, Tensors], dict[str, Any]]:
    """Parents trained on with a changed task, by epochs; and how they changed."""
    task, rng = zoo.task, np.random.default_rng(0)
    swap = torch.arange(task.num_classes)
    for one, other in rng.permutation(task.num_classes)[: 2 * SWAPPED_PAIRS].reshape(-1, 2):
        swap[one], swap[other] = int(other), int(one)
    count = len(task.labels["train"])
    half = torch.from_numpy(rng.permutation(count)[: min(count // 2, CHILD_IMAGES)])
    images, labels = task.images["train"][half], swap[task.labels["train"][half]]
    settings = {"learning_rate": CHILD_RATE, "epochs": max(CHILD_EPOCHS), "batch_size": 32}
    generator = torch.Generator().manual_seed(0)
    found, changes = {}, {}
    for epoch, stacked in enumerate(
        train_networks(zoo.module, parents, images, labels, generator=generator, **settings)
    ):
        if epoch in (0, *CHILD_EPOCHS):
            made = {name: stacked[name].detach().clone() for name in parents}
            moved = weight_features({name: made[name] - parents[name] for name in parents})
            size = weight_features(parents)
            scores = evaluate(zoo.module, made, task.images["test"], swap[task.labels["test"]])
            changes[str(epoch)] = {
                "accuracy_on_changed_task": float(scores.accuracy.mean()),
                "relative_change": float((np.linalg.norm(moved, axis=1) / np.linalg.norm(size, axis=1)).mean()),
            }
            found[epoch] = made
    del found[0]
    return found, {"images": len(half), **settings, "by_epochs": changes}


def find_parent(name: str, index: np.ndarray, queries: np.ndarray, parents: np.ndarray) -> dict[str, Any]:
    """AUC and recall of the parents, given as rows of the index."""
    near, rows = nearest(name, index, queries, len(index))
    distances = np.empty_like(near)
    np.put_along_axis(distances, rows, near, 1)
    truth = np.arange(len(index)) == parents[:, None]
    own = distances[truth][:, None]
    auc = ((distances > own) + 0.5 * (distances == own)).sum(1) - 0.5  # the parent is as far away as itself
    return {
        "auc": summary(auc / (len(index) - 1)),
        "auc_pooled": float(roc_auc_score(truth.ravel(), -distances.ravel())),
        "recall@1": summary(truth[np.arange(len(rows)), rows[:, 0]]),
    }


def matched(
    near: np.ndarray, queries: Tensors, index: Tensors, related: np.ndarray, spec: SymmetrySpec
) -> dict[str, Any]:
    """Recall before and after the nearest `(queries, k)` rows are sorted by their cosine after weight matching."""
    begin, hits = time.perf_counter(), []
    for query, rows, truth in zip(each(queries), near, related, strict=True):
        matcher, own = WeightMatcher(spec, query), flat(query)
        cosines = []
        for row in rows:
            other = {name: tensor[row] for name, tensor in index.items()}
            cosines.append(own @ flat(spec.apply(other, matcher.match(other))))
        hits.append((truth[rows[0]], truth[rows[np.argmax(cosines)]], truth[rows].any()))
    names = ("recall@1_before", "recall@1", f"recall@{near.shape[1]}")
    found = {name: summary(values) for name, values in zip(names, np.array(hits).T, strict=True)}
    return found | {"milliseconds_per_pair": 1000 * (time.perf_counter() - begin) / near.size}


def flat(network: Mapping[str, torch.Tensor]) -> np.ndarray:
    """All weights of a network as one vector of length 1."""
    values = torch.cat([tensor.double().flatten() for tensor in network.values()])
    return (values / values.norm()).numpy()


def measure_zoo(zoo: Zoo, embedder: Embedder) -> dict[str, Any]:
    """All tests of one zoo, by test and embedding."""
    layout, rng, spec = zoo.layout, np.random.default_rng(0), zoo.symmetries.of_kind("permutation", "sign")
    networks, kin = read_zoo(zoo)
    total, last = len(kin.models), kin.last
    indexed = embeddings(networks, embedder, layout, spec)
    turned = permuted(networks.came, zoo, 1)
    twins = embeddings(turned, embedder, layout, spec)

    chosen = np.sort(rng.permutation(total)[:INDEX_SIZE])
    itself = np.arange(len(chosen)) == np.arange(len(chosen))[:, None]
    nothing, own = np.full(len(chosen), -1), np.arange(total)
    same_run = (kin.models == kin.models[:, None]) & (own != own[:, None])
    siblings = (kin.settings[last] == kin.settings[last][:, None]) & (kin.models[last] != kin.models[last][:, None])
    asking = np.flatnonzero(siblings.any(1))
    parents = np.sort(rng.permutation(len(last))[:CHILDREN])
    young, changes = children(zoo, networks.rows(last[parents]).came)
    moved = {epoch: permuted(made, zoo, 2 + epoch) for epoch, made in young.items()}
    found_by = {epoch: embeddings(made, embedder, layout, spec) for epoch, made in moved.items()}
    asked = np.sort(rng.permutation(total)[:MATCHED_QUERIES])

    relatives = same_run.sum(1)
    found: dict[str, Any] = {
        "checkpoints": total,
        "models": len(last),
        "children": changes,
        "chance": {
            "twin": {"recall@1": 1 / len(chosen)},
            "same_run": {f"recall@{k}": chance(relatives, total - 1, k) for k in (1, 5)},
            "sibling": {f"recall@{k}": chance(siblings[asking].sum(1), len(last) - 1, k) for k in (1, 5)},
            "parent": {"auc": 0.5, "recall@1": 1 / len(last)},
        },
        "embeddings": {},
    }
    for name, vectors in indexed.items():
        few = vectors[last]
        tests = {
            "twin": (recalls(name, vectors[chosen], twins[name][chosen], nothing, itself, (1,)), kin.models[chosen]),
            "same_run": (recalls(name, vectors, vectors, own, same_run, (1, 5)), kin.models),
            "same_run_permuted": (recalls(name, vectors, twins[name], own, same_run, (1, 5)), kin.models),
            "sibling": (recalls(name, few, few[asking], asking, siblings[asking], (1, 5)), None),
        }
        found["embeddings"][name] = {"features": vectors.shape[1]} | {
            test: {key: summary(values, groups) for key, values in figures.items()}
            for test, (figures, groups) in tests.items()
        }
        for epoch, queries in found_by.items():
            found["embeddings"][name][f"parent_{epoch}"] = find_parent(name, few, queries[name], parents)
        if name in FIRST_STAGES:
            _, near = nearest(name, vectors, twins[name][asked], MATCHED + 1)
            near = np.stack([rows[rows != mine][:MATCHED] for rows, mine in zip(near, asked, strict=True)])
            figures = matched(near, turned.rows(asked).came, networks.came, same_run[asked], spec)
            found["embeddings"][name]["same_run_permuted_matched"] = figures
            for epoch, queries in found_by.items():
                _, near = nearest(name, few, queries[name], MATCHED)
                truth = np.arange(len(last)) == parents[:, None]
                figures = matched(near, moved[epoch].came, networks.rows(last).came, truth, spec)
                found["embeddings"][name][f"parent_{epoch}_matched"] = figures
    return found


def measure_search(folder: Path, zoos: list[Path], model: Path) -> dict[str, Any]:
    """Recall of relatives for each zoo and embedding, by the name of the zoo's folder."""
    found: dict[str, Any] = {}
    for path in zoos:
        zoo = Zoo(path)
        source = model_for(zoo, model, folder)
        figures = measure_zoo(zoo, load_embedder(source, DEFAULT_FEATURE))
        found[path.name] = {"model_steps": read_json(source / "results.json")["steps"], **figures}
        print(path.name, table(found[path.name]), sep="\n", flush=True)
    return found


def table(found: Mapping[str, Any]) -> str:
    """The means as text, one embedding a line."""
    lines = []
    for name, figures in found["embeddings"].items():
        scores = {
            f"{test} {key}": value["mean"] if isinstance(value, dict) else value
            for test, entries in figures.items()
            if test != "features"
            for key, value in entries.items()
        }
        lines.append(f"{name:34}" + "  ".join(f"{key} {value:.3f}" for key, value in scores.items()))
    return "\n".join(lines)


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars of datasets, of which there would be one for each search."""
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# ---------------------------------------------------------------------------------------------------- speed
def small_zoo(zoo: Zoo, folder: Path, count: int) -> int:
    """The first checkpoints of a zoo as a zoo of their own; says how many."""
    columns = next(iter(zoo.splits.values())).features
    kept = [*property_columns(columns), *hparam_columns(columns)]
    left, rows = count, {}
    for split, content in zoo.splits.items():
        rows[split] = min(left, len(content))
        left -= rows[split]
    rows = {split: number for split, number in rows.items() if number}
    writer = ZooWriter(folder, {name: columns[name] for name in dict.fromkeys(kept)}, rows)
    writer.add_layout(zoo.layout, zoo.symmetries)
    names = [*dict.fromkeys(kept), "model_id", "epoch", "layout_id", "architecture", "architecture_kwargs"]
    for split, number in rows.items():
        for index, row in enumerate(zoo.splits[split].select(range(number))):
            writer.add(split, {name: row[name] for name in names}, zoo.state_dict(split, index))
    writer.finish(folder.name, {key: zoo.info[key] for key in ("task", "pixel_mean", "pixel_std")})
    return count - left


def embed_small(folder: Path, zoo: Zoo, model: Path, threads: int) -> dict[str, Any]:
    """Seconds of the command for 1,000 checkpoints."""
    count = small_zoo(zoo, folder / "small", INDEX_SIZE)
    script = ROOT / "hub_scripts" / "embed.py"
    line = [sys.executable, str(script), "--model", str(model), "--output-dir", str(folder / "small_embeddings")]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    begin = time.perf_counter()
    subprocess.run([*line, str(folder / "small")], env=environment, cwd=ROOT, capture_output=True, check=True)
    seconds = time.perf_counter() - begin
    done = read_json(folder / "small_embeddings" / "results.json")["checkpoints"]
    if done != count:
        raise RuntimeError(f"{done} of {count} checkpoints were embedded.")
    return {"checkpoints": count, "seconds": seconds, "seconds_per_1000": 1000 * seconds / count}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it gave."""
    begin = time.perf_counter()
    found = function()
    return time.perf_counter() - begin, found


def resnet_files(folder: Path, total_bytes: float) -> list[Path]:
    """Random ResNet-18 checkpoints that have so many bytes together, one at least."""
    folder.mkdir()
    torch.manual_seed(0)
    files: list[Path] = []
    written = 0
    while not files or written < total_bytes:
        files.append(folder / f"{len(files):03d}.safetensors")
        save_file(resnet18().state_dict(), files[-1])
        written += files[-1].stat().st_size
    return files


def resnet_model(files: Sequence[Path], folder: Path) -> Embedder:
    """A model of random weights whose tokenizer knows ResNet-18 and its symmetries, saved and loaded."""
    torch.manual_seed(0)
    tokenizer = SaneWeightTokenizer(RESNET_MODEL["token_size"], "dense", normalization="zoo").fit(files[:1])
    spec = find_symmetries(resnet18(), torch.randn(1, 3, 64, 64))
    tokenizer.symmetries = {tokenizer.layout(files[0]).fingerprint: spec.to_json()}
    SaneModel(SaneConfig(**RESNET_MODEL)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_embedder(folder, DEFAULT_FEATURE)


@torch.no_grad()
def bare(model: SaneModel, windows: torch.Tensor, positions: torch.Tensor, kinds: torch.Tensor, batch: int) -> None:
    """The encoder on windows `(windows, tokens, token_size)` and what belongs to them."""
    for parts in zip(windows.split(batch), positions.split(batch), kinds.split(batch), strict=True):
        model.encode(parts[0], parts[1], layer_kind_ids=parts[2])


def cut(values: torch.Tensor, size: int) -> torch.Tensor:
    """`(networks, tokens, ...)` -> `(windows, size, ...)`, zeros or the last entries of a network behind its end."""
    missing = -values.shape[1] % size
    if missing:
        values = torch.cat([values, values[:, -missing:]], dim=1)
    return values.reshape(-1, size, *values.shape[2:])


def embed_resnets(folder: Path, total_bytes: float) -> dict[str, Any]:
    """Bytes a second from files to vectors, in memory, and of the encoder alone."""
    files = resnet_files(folder / "resnets", total_bytes)
    embedder = resnet_model(files, folder / "resnet_model")
    layout = embedder.tokenizer.layout(files[0])
    codec, size = embedder.codec(layout), embedder.model.config.window_size
    at_once = max(1, BATCH_VALUES // layout.num_parameters)
    own = codec.layout

    def read(some: Sequence[Path]) -> Tensors:
        return stack([read_network(str(file), embedder.tokenizer)[1] for file in some])

    def windows(tensors: Tensors) -> list[torch.Tensor]:
        tokens = codec.tokens(embedder.canonical(tensors, layout))
        beside = (ids.expand(len(tokens), *ids.shape) for ids in (own.position_ids, own.layer_kind_ids))
        return [cut(values, size) for values in (tokens, *beside)]

    warm = windows(read(files[:1]))
    speeds = {}
    for batch in BARE_BATCHES:
        bare(embedder.model, *(part[:batch] for part in warm), batch)
        speeds[batch] = timed(lambda batch=batch: bare(embedder.model, *warm, batch))[0]
    fastest = min(speeds, key=speeds.get)
    spent, parts = {"read": 0.0, "embedder": 0.0, "bare": 0.0}, {}
    for start in range(0, len(files), at_once):
        seconds, tensors = timed(lambda start=start: read(files[start : start + at_once]))
        spent["read"] += seconds
        spent["embedder"] += timed(lambda tensors=tensors: embedder(tensors, layout))[0]
        if not start:
            parts = {"networks": len(files[:at_once]), "read": seconds} | parts_of(embedder, tensors, layout)
        pieces = windows(tensors)
        spent["bare"] += timed(lambda pieces=pieces: bare(embedder.model, *pieces, fastest))[0]
        if not start:
            parts["bare"] = spent["bare"]
    size_of_all = sum(file.stat().st_size for file in files)
    return {
        "files": len(files),
        "bytes": size_of_all,
        "tokens": own.num_tokens,
        "seconds": spent,
        "bytes_per_second": {
            "files_to_vectors": size_of_all / (spent["read"] + spent["embedder"]),
            "embedder": size_of_all / spent["embedder"],
            "bare": size_of_all / spent["bare"],
        },
        "bare_windows_at_once": fastest,
        "ratio": spent["bare"] / (spent["read"] + spent["embedder"]),
        "ratio_in_memory": spent["bare"] / spent["embedder"],
        "parts": parts,
    }


def parts_of(embedder: Embedder, tensors: Tensors, layout: CheckpointLayout) -> dict[str, float]:
    """Seconds of what `Embedder` does, one after another."""
    codec, spent = embedder.codec(layout), {}
    spent["canonical"], ordered = timed(lambda: embedder.canonical(tensors, layout))
    spent["pack"], raw = timed(lambda: codec.layout.pack(ordered))
    spent["normalize"], tokens = timed(lambda: codec.normalize(raw))
    spent["encode"], latents = timed(lambda: codec.encode(tokens))
    for name, feature in FEATURES.items():
        spent[f"feature {name}"] = timed(lambda feature=feature: feature(latents, codec.layout.layer_ids))[0]
    return spent


def measure_speed(folder: Path, zoo: Path, model: Path, total_bytes: float = 1e9, threads: int = 2) -> dict[str, Any]:
    """Small checkpoints from the command line, large ones against the encoder alone."""
    opened, before = Zoo(zoo), torch.get_num_threads()
    small = embed_small(folder, opened, model_for(opened, model, folder), threads)
    try:
        torch.set_num_threads(threads)
        large = embed_resnets(folder, total_bytes)
    finally:
        torch.set_num_threads(before)
    ok = {
        "small": small["seconds_per_1000"] <= TARGETS["small_seconds"],
        "resnet18": large["ratio"] >= TARGETS["resnet18_ratio"],
    }
    return {"threads": threads, "small": small, "resnet18": large, "targets": TARGETS, "ok": ok}


# ---------------------------------------------------------------------------------------------------- mhcnuggets
def import_mhcnuggets(folder: Path, wheels: Path | None) -> tuple[Zoo, dict[str, str]]:
    """The zoo, as `docs/zoos.md` makes it, and the class of each allele."""
    if wheels is None:
        wheels = folder / "wheels"
        line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), MHCNUGGETS]
        subprocess.run(line, check=True)
    with zipfile.ZipFile(next(wheels.glob("mhcnuggets-*.whl"))) as wheel:
        names = sorted(name for name in wheel.namelist() if name.startswith(MHC_FOLDER) and name.endswith(".h5"))
        wheel.extractall(folder, names)
        lists = {number: wheel.read(name).decode().split() for number, name in MHC_CLASSES.items()}
    classes = {allele: number for number, alleles in lists.items() for allele in alleles}
    production = folder / MHC_FOLDER
    with (production / "properties.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "model_id", "epoch"])
        for path in sorted(production.glob("*.h5")):
            writer.writerow([path.name, path.stem.split("_")[0], int(path.stem.endswith("_to_HLAp"))])
    zoo = folder / "mhcnuggets_zoo"
    properties = ["--properties", str(production / "properties.csv"), "--license", "mit"]
    command("import_zoo.py", "--format", "folder", str(production), str(zoo), *properties)
    return Zoo(zoo), classes


def family(name: str, mhc_class: str) -> str:
    """Species, locus and class of an allele."""
    found = FAMILY.match(name)
    return f"{name if found is None else found[0]} ({mhc_class})"


def distinct(models: np.ndarray, lineage: Mapping[str, Any]) -> np.ndarray:
    """Rows with one model of each set whose cosines are 1.0000 in the lineage."""
    place = {model: row for row, model in enumerate(models.tolist())}
    same = [
        (place[one], place[other])
        for one, other, cosine in lineage["nearest"]
        if cosine >= SAME and one in place and other in place
    ]
    ends = np.array(same, int).reshape(-1, 2).T
    graph = csr_array((np.ones(ends.shape[1]), tuple(ends)), shape=(len(models),) * 2)
    _, labels = connected_components(graph, directed=False)
    return np.sort(np.unique(labels, return_index=True)[1])


def neighbours(name: str, vectors: np.ndarray, families: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    """Share of networks whose nearest other is of the same family, among all and among those of the same class."""
    related = (families == families[:, None]) & ~np.eye(len(families), dtype=bool)
    asking = np.flatnonzero(related.any(1))
    hits = recalls(name, vectors, vectors[asking], asking, related[asking], (1,))["recall@1"]
    within = np.zeros(len(families))
    for chosen in np.unique(classes):
        rows = np.flatnonzero(classes == chosen)
        alike = related[np.ix_(rows, rows)]
        within[rows] = recalls(name, vectors[rows], vectors[rows], np.arange(len(rows)), alike, (1,))["recall@1"]
    return {"accuracy": summary(hits), "within_class": summary(within[asking])}


def chances(families: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    """What a random neighbour gives, and the share of the largest family."""
    related = (families == families[:, None]) & ~np.eye(len(families), dtype=bool)
    asking = related.any(1)
    counts = related[asking].sum(1)
    in_class = (classes == classes[asking][:, None]).sum(1) - 1
    sizes = np.unique(families, return_counts=True)[1]
    return {
        "accuracy": float((counts / (len(families) - 1)).mean()),
        "within_class": float((counts / in_class).mean()),
        "largest_family": float(sizes.max() / sizes.sum()),
    }


def measure_mhcnuggets(
    folder: Path, wheels: Path | None, figure: Path | None = None, steps: int = MHC_STEPS
) -> dict[str, Any]:
    """Whether the nearest network reads peptides of the same family of the MHC; a map as PNG at `figure`, if given."""
    (zoo, classes), output = import_mhcnuggets(folder, wheels), folder / "mhcnuggets_model"
    limits = ["--max-steps", str(steps), "--eval-steps", str(steps)]
    seconds, _ = command("train.py", "--zoo", zoo.name, "--output-dir", str(output), *MHC_TRAINING, *limits)
    embedder, trained = load_embedder(output, DEFAULT_FEATURE), read_json(output / "results.json")
    lineage = read_json(zoo.folder / LINEAGE_FILE)
    twice = {one for one, _ in lineage["duplicates"]}
    found: dict[str, Any] = {"checkpoints": len(zoo), "training_seconds": seconds, "steps": trained["steps"]}
    found |= {"r2": trained["validation"]["r2"], "layouts": {}}
    for layout_id in zoo.layout_ids:
        part = zoo.of_layout(layout_id)
        tensors = [part.stacked(split) for split, table in part.splits.items() if len(table)]
        columns = ["model_id", "epoch", "source"]
        rows = [row for table in part.splits.values() for row in table.select_columns(columns)]
        models = np.array([row["model_id"] for row in rows])
        kin = Kin(models, np.array([row["epoch"] for row in rows]), models)
        kept = [row for row in kin.last if rows[row]["source"] not in twice]
        networks = {name: torch.cat([stacked[name] for stacked in tensors])[kept] for name in tensors[0]}
        of_models = np.array([classes[model] for model in models[kept]])
        families = np.array([family(*pair) for pair in zip(models[kept], of_models, strict=True)])
        vectors = embeddings(Population(networks, networks), embedder, part.layout)
        latents = embedder.latents(networks, part.layout).flatten(1).numpy()
        vectors["sane_latents_cosine"] = latents
        for name, values in (("sane_latents", latents), ("weights", vectors["weights_cosine"])):
            vectors[f"{name}_from_ancestor_cosine"] = from_ancestor(values, models[kept], lineage)
        figures = judge_families(vectors, models[kept], families, of_models, lineage)
        found["layouts"][layout_id] = figures
        if figure is not None:
            place = figure if len(zoo.layout_ids) == 1 else figure.with_stem(f"{figure.stem}_{layout_id}")
            family_map(vectors[f"sane_{DEFAULT_FEATURE}"], families).savefig(place)
    return found


def from_ancestor(vectors: np.ndarray, models: np.ndarray, lineage: Mapping[str, Any]) -> np.ndarray:
    """Vectors without the mean of each family of the lineage; those in none are taken as one more."""
    numbers = np.zeros(len(models), int)
    for number, members in enumerate(lineage["families"], start=1):
        numbers[np.isin(models, members["members"])] = number
    return vectors - np.stack([vectors[numbers == number].mean(0) for number in numbers])


def judge_families(
    vectors: Vectors, models: np.ndarray, families: np.ndarray, classes: np.ndarray, lineage: Mapping[str, Any]
) -> dict[str, Any]:
    """Figures of all embeddings of networks of one layout, of all networks and of distinct ones."""
    sizes = dict(zip(*(part.tolist() for part in np.unique(families, return_counts=True)), strict=True))
    found: dict[str, Any] = {"networks": len(models), "families": sizes}
    for which, rows in (("all", np.arange(len(models))), ("distinct", distinct(models, lineage))):
        scores = {
            name: neighbours(name, values[rows], families[rows], classes[rows]) for name, values in vectors.items()
        }
        found[which] = {
            "networks": len(rows),
            "chance": chances(families[rows], classes[rows]),
            "embeddings": scores,
        }
    return found


@mpl.rc_context(RC)
def family_map(vectors: np.ndarray, families: Sequence[str]) -> Figure:
    """Networks on the first two principal components of their standardised embeddings, coloured by family."""
    spread = vectors.std(0)
    pca = PCA(2, random_state=0)
    points = pca.fit_transform((vectors - vectors.mean(0)) / np.where(spread > 0, spread, 1))
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes, names = figure.subplots(), sorted(set(families))
    for number, name in enumerate(names):
        chosen = points[np.array(families) == name]
        marker = "s" if name.endswith("(II)") else "o"
        colour = mpl.colormaps["tab20"](number % 20)
        axes.scatter(*chosen.T, color=colour, marker=marker, s=16, label=f"{name} ({len(chosen)})")
    shares = 100 * pca.explained_variance_ratio_
    axes.set(
        title=f"{len(points)} LSTMs of MHCnuggets; squares are of class II",
        xlabel=f"component 1 ({shares[0]:.0f} % of variance)",
        ylabel=f"component 2 ({shares[1]:.0f} %)",
    )
    figure.legend(loc="outside right upper")
    return figure
