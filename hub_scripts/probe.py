"""Predict properties of networks from their weights: SANE's representations beside the baselines, by the same probes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.evaluation import plots
from hub_scripts.evaluation.embedder import Embedder
from hub_scripts.evaluation.features import DEFAULT_FEATURE, FEATURES
from hub_scripts.evaluation.probes import (
    CategoryResult,
    ProbeResult,
    bootstrap_r2,
    category_probe,
    ridge_probes,
    tree_probes,
)
from hub_scripts.evaluation.representations import BASELINES, DEFAULT, NAMES, Groups, Representations, transferable
from hub_scripts.model_cards import probe_section
from hub_scripts.outputs import new_folder, write_json, write_text
from hub_scripts.zoos.schema import hparam_columns, is_missing, property_columns
from hub_scripts.zoos.tasks import SPLITS
from hub_scripts.zoos.zoo import Zoo

PROGRAM = "sane probe"
DEFAULT_PROPERTIES = ("test_accuracy", "epoch", "generalization_gap")
STATISTICS = ("layer_statistics", "layer_statistics_joint")  # the variants of s(W)
SUMMARY = (DEFAULT, "sane_latents", "sane_moments", "sane_responses", "weights_aligned", *STATISTICS)  # of all epochs
PLOTTED = (DEFAULT, "layer_statistics", "layer_statistics_joint", "weights_aligned")
MOST_CATEGORIES = 20  # different values of a column that is told as a category

logger = logging.getLogger(__name__)


@dataclass
class ProbeArguments:
    """Predict properties of a zoo's networks: from SANE, layer statistics s(W) and weights W, by ridge regression and boosted trees.

    Fitted on the train split, strength chosen on the validation split, measured on the test split; splits are by model.

    Example:
      sane probe --model runs/model --zoo runs/zoo --output-dir runs/probe
      sane probe --model runs/model --zoo runs/zoo --output-dir runs/probe --properties test_loss --categories hparams_optimizer
      sane probe --model runs/model --zoo runs/zoo --output-dir runs/probe --transfer-zoos runs/other
    """

    model: str = field(metadata={"help": "Folder or Hub repository of a SANE model with its tokenizer."})
    zoo: str = field(metadata={"help": "Folder of a zoo, or a dataset repository on the Hub."})
    output_dir: str = field(metadata={"help": "Folder for results.json, probe.md and plots; must not exist yet."})
    properties: list[str] = field(
        default_factory=lambda: [*DEFAULT_PROPERTIES],
        metadata={
            "help": "Numeric columns of the zoo to predict, hparams_* among them; all takes every one that varies."
        },
    )
    categories: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Columns to tell apart as categories, e.g. hparams_initialisation; all takes those of text."
        },
    )
    feature: str = field(
        default=DEFAULT_FEATURE, metadata={"help": f"How latents become one vector: {', '.join(FEATURES)}."}
    )
    representations: list[str] = field(
        default_factory=list, metadata={"help": f"Which to compare; by default all: {', '.join(NAMES)}."}
    )
    first_epoch: int = field(
        default=1,
        metadata={"help": "Leave out checkpoints before this epoch: untouched zero biases give epoch 0 away."},
    )
    all_epochs: bool = field(
        default=True, metadata={"help": "Measure once more with the checkpoints before --first-epoch."}
    )
    transfer_zoos: list[str] = field(
        default_factory=list,
        metadata={"help": "Other zoos, of any architecture, on whose test split the probes are used as they are."},
    )
    layout_id: str | None = field(default=None, metadata={"help": "Of a zoo with several layouts: the one to probe."})
    on_error: str = field(
        default="refuse",
        metadata={"help": "Rows with damaged or non-finite weights: refuse (stop and name the row) or skip."},
    )
    seed: int = field(default=0, metadata={"help": "Of prototypes, trees and bootstrap intervals."})

    def __post_init__(self):
        if self.feature not in FEATURES:
            raise ValueError(f"--feature is {self.feature!r}, expected one of {', '.join(FEATURES)}.")
        unknown = [name for name in self.representations if name not in NAMES]
        if unknown:
            raise ValueError(f"--representations has {unknown[0]!r}, expected some of {', '.join(NAMES)}.")


def probe(args: ProbeArguments) -> dict[str, Any]:
    """Fit and measure all probes; returns what `results.json` holds under `probe`."""
    with new_folder(args.output_dir) as folder:
        zoo = Zoo(args.zoo, on_error=args.on_error, layout_id=args.layout_id)
        targets, categories = _targets(zoo, args.properties), _categories(zoo, args.categories)
        epochs = {split: zoo.column(split, "epoch") for split in SPLITS}
        chosen = {split: np.flatnonzero(epochs[split] >= args.first_epoch) for split in SPLITS}
        empty = [split for split, rows in chosen.items() if not len(rows)]
        if empty:
            raise ValueError(
                f"{args.zoo} has no checkpoints of epoch {args.first_epoch} or later in its {empty[0]} split."
            )
        embedder = Embedder.from_pretrained(args.model, args.feature)
        found = Representations(zoo, embedder, args.first_epoch, args.seed, args.representations or NAMES)
        results: dict[str, Any] = {"checkpoints": {split: len(rows) for split, rows in chosen.items()}, "left_out": {}}
        kinds = list(found.groups)
        results["probe"], predictions = _probes(found, kinds, targets, chosen, args, results["left_out"])
        if args.all_epochs and any((values < args.first_epoch).any() for values in epochs.values()):
            everything = {split: np.arange(len(values)) for split, values in epochs.items()}
            summary = [kind for kind in kinds if kind in SUMMARY]
            results["probe_all_epochs"], _ = _probes(found, summary, targets, everything, args, {})
        results["categories"] = {
            name: {kind: told._asdict() for kind, told in _tell(found, kinds, values, chosen, args.seed).items()}
            for name, values in categories.items()
        }
        results["transfer"] = {
            source: _transfer(zoo, found, source, targets, chosen, args) for source in args.transfer_zoos
        }
        if found.prototypes is not None:
            found.prototypes.save(folder / "prototypes.safetensors")
            plots.image_grid(found.prototypes.images, found.prototypes.labels).savefig(folder / "prototypes.png")
        _draw(folder, results["probe"], predictions)
        write_text(folder / "probe.md", probe_section(zoo, results, asdict(args)))
        write_json(folder / "results.json", results | {"arguments": asdict(args)})
    _report(results)
    return results["probe"]


def _targets(zoo: Zoo, names: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Numeric columns by split, NaN where a value is missing."""
    columns = zoo.rows("train").features
    if list(names) == ["all"]:
        known = ["epoch", *property_columns(columns), *hparam_columns(columns)]
        names = [name for name in known if _is_numeric(zoo, name) and _varies(_numbers(zoo, "train", name))]
    targets = {}
    for name in names:
        if name not in columns:
            raise ValueError(f"{zoo.name} has no column {name!r}; it has {', '.join(columns)}.")
        if not _is_numeric(zoo, name):
            raise ValueError(f"column {name!r} of {zoo.name} is text; name it under --categories.")
        targets[name] = {split: _numbers(zoo, split, name) for split in SPLITS}
        for split, values in targets[name].items():
            if not np.isfinite(values).any():
                raise ValueError(f"column {name!r} of {zoo.name} has no value in the {split} split.")
    return targets


def _is_numeric(zoo: Zoo, name: str) -> bool:
    return all(is_missing(v) or isinstance(v, (int, float)) for v in zoo.rows("train")[name][:])


def _varies(values: np.ndarray) -> bool:
    """True if the values that are there differ."""
    return len(np.unique(values[np.isfinite(values)])) > 1


def _numbers(zoo: Zoo, split: str, name: str) -> np.ndarray:
    return np.array([np.nan if is_missing(value) else float(value) for value in zoo.rows(split)[name][:]])


def _categories(zoo: Zoo, names: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Columns of categories by split, as text."""
    columns = zoo.rows("train").features
    if list(names) == ["all"]:
        known = [*property_columns(columns), *hparam_columns(columns)]
        names = [
            n for n in known if not _is_numeric(zoo, n) and 1 < len(set(zoo.rows("train")[n][:])) <= MOST_CATEGORIES
        ]
    found = {}
    for name in names:
        if name not in columns:
            raise ValueError(f"{zoo.name} has no column {name!r}; it has {', '.join(columns)}.")
        found[name] = {
            split: np.array(["" if is_missing(v) else str(v) for v in zoo.rows(split)[name][:]]) for split in SPLITS
        }
        count = len(set(found[name]["train"]) - {""})
        if not 2 <= count <= MOST_CATEGORIES:
            raise ValueError(
                f"column {name!r} of {zoo.name} has {count} different values in the train split, expected 2 to {MOST_CATEGORIES}."
            )
    return found


def _matrix(groups: Groups, split: str, rows: np.ndarray) -> np.ndarray:
    return np.concatenate([group[split][rows] for group in groups], axis=1)


def _fit(
    groups: Groups, targets: Mapping[str, Mapping[str, np.ndarray]], rows: Mapping[str, np.ndarray], seed: int
) -> dict[str, tuple[ProbeResult, ProbeResult]]:
    """Ridge and trees of one representation for properties that the same rows have."""
    ys = {split: {name: values[split][rows[split]] for name, values in targets.items()} for split in SPLITS}
    arguments = [part for split in SPLITS for part in (_matrix(groups, split, rows[split]), ys[split])]
    sizes = [group["train"].shape[1] for group in groups]
    ridge = ridge_probes(*arguments, groups=sizes)
    trees = tree_probes(*arguments, seed=seed, groups=sizes)
    return {name: (ridge[name], trees[name]) for name in targets}


def _probes(
    found: Representations,
    kinds: Sequence[str],
    targets: Mapping[str, Mapping[str, np.ndarray]],
    chosen: Mapping[str, np.ndarray],
    args: ProbeArguments,
    left_out: dict[str, dict[str, int]],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Figures by property and representation, and the predictions behind them."""
    results: dict[str, Any] = {}
    predictions: dict[str, dict[str, Any]] = {}
    for names, rows in _by_rows(targets, chosen, left_out):
        together = {name: targets[name] for name in names}
        fitted = {
            kind: _fit(found.groups[kind], together, rows, args.seed)
            for kind in tqdm(kinds, desc="probes", unit="representation", leave=False)
        }
        ids = found.zoo.column("test", "model_id")[rows["test"]]
        for name in names:
            true = targets[name]["test"][rows["test"]]
            told = {kind: probes[name] for kind, probes in fitted.items()}
            results[name] = {
                kind: _figures(true, *pair, ids, args.seed) | {"num_features": _width(found.groups[kind])}
                for kind, pair in told.items()
            }
            for column, place in (("ridge", 0), ("trees", 1)) if {DEFAULT, *STATISTICS} <= told.keys() else ():
                r2s = {kind: np.nan_to_num(told[kind][place].r2, nan=-np.inf) for kind in STATISTICS}
                best = max(r2s, key=r2s.get)
                ours, theirs = told[DEFAULT][place], told[best][place]
                low, high = bootstrap_r2(true, ours.predictions, ids, seed=args.seed, other=theirs.predictions)
                margin = {"against": best, "difference": ours.r2 - theirs.r2, "low": low, "high": high}
                results[name][DEFAULT][f"{column}_margin"] = margin
            predictions[name] = {"true": true, **{kind: ridge.predictions for kind, (ridge, _) in told.items()}}
    return {name: results[name] for name in targets}, predictions


def _by_rows(
    targets: Mapping[str, Mapping[str, np.ndarray]],
    chosen: Mapping[str, np.ndarray],
    left_out: dict[str, dict[str, int]],
) -> list[tuple[list[str], dict[str, np.ndarray]]]:
    """Properties that are known for the same rows, with these; others are counted in `left_out`."""
    found: dict[tuple, tuple[list[str], dict[str, np.ndarray]]] = {}
    for name, ys in targets.items():
        rows = {split: index[np.isfinite(ys[split][index])] for split, index in chosen.items()}
        missing = {split: len(chosen[split]) - len(index) for split, index in rows.items()}
        empty = [split for split, index in rows.items() if not len(index)]
        if empty:
            raise ValueError(f"column {name!r} has no value among the checkpoints of the {empty[0]} split.")
        if any(missing.values()):
            left_out[name] = missing
        found.setdefault(tuple(rows[split].tobytes() for split in SPLITS), ([], rows))[0].append(name)
    return list(found.values())


def _width(groups: Groups) -> int:
    return sum(group["train"].shape[1] for group in groups)


def _figures(true: np.ndarray, ridge: ProbeResult, trees: ProbeResult, ids: np.ndarray, seed: int) -> dict[str, Any]:
    low, high = bootstrap_r2(true, ridge.predictions, ids, seed=seed)
    trees_low, trees_high = bootstrap_r2(true, trees.predictions, ids, seed=seed)
    found = {"r2": ridge.r2, "r2_low": low, "r2_high": high, "kendall_tau": ridge.kendall_tau, "alpha": ridge.alpha}
    found |= {"trees_r2": trees.r2, "trees_r2_low": trees_low, "trees_r2_high": trees_high}
    return found | ({"note": ridge.note} if ridge.note else {})


def _tell(
    found: Representations,
    kinds: Sequence[str],
    values: Mapping[str, np.ndarray],
    chosen: Mapping[str, np.ndarray],
    seed: int,
) -> dict[str, CategoryResult]:
    rows = {split: index[values[split][index] != ""] for split, index in chosen.items()}
    return {
        kind: category_probe(
            *(part for s in SPLITS for part in (_matrix(found.groups[kind], s, rows[s]), values[s][rows[s]])),
            seed=seed,
        )
        for kind in kinds
        if kind in (DEFAULT, "sane_latents", *BASELINES)
    }


def _transfer(
    zoo: Zoo,
    found: Representations,
    source: str,
    targets: Mapping[str, Mapping[str, np.ndarray]],
    chosen: Mapping[str, np.ndarray],
    args: ProbeArguments,
) -> dict[str, Any]:
    """Probes of this zoo on the test split of another one, by what networks of both have."""
    other = Zoo(source, on_error=args.on_error)
    prototypes = Representations.fit_prototypes(other, args.first_epoch, args.seed) if found.prototypes else None
    runs = prototypes is not None  # otherwise there is nothing that responses of both could be compared by
    ours = transferable(found.weights, found.prototypes if runs else None, zoo.module if runs else None)
    theirs = transferable({"test": other.stacked("test")}, prototypes, other.module if runs else None)
    rows = np.flatnonzero(other.column("test", "epoch") >= args.first_epoch)
    results: dict[str, Any] = {}
    for name, ys in targets.items():
        if name not in other.rows("test").column_names:
            logger.warning("%s has no column %r, which is left out there.", source, name)
            continue
        true = _numbers(other, "test", name)[rows]
        known = np.isfinite(true)
        results[name] = {}
        for kind, groups in ours.items():
            parts = {split: chosen[split][np.isfinite(ys[split][chosen[split]])] for split in ("train", "validation")}
            fit = [p for s, r in parts.items() for p in (_matrix(groups, s, r), {name: ys[s][r]})]
            sizes = [group["train"].shape[1] for group in groups]
            for column, told in (
                (
                    "ridge",
                    ridge_probes(*fit, _matrix(theirs[kind], "test", rows[known]), {name: true[known]}, groups=sizes),
                ),
                (
                    "trees",
                    tree_probes(*fit, _matrix(theirs[kind], "test", rows[known]), {name: true[known]}, groups=sizes),
                ),
            ):
                error = told[name].predictions - true[known]
                results[name].setdefault(kind, {})[column] = {
                    "kendall_tau": told[name].kendall_tau,
                    "r2": told[name].r2,
                    # calibration: where the errors lie, and how far from what the property varies
                    "bias": float(error.mean()),
                    "mean_absolute_error": float(np.abs(error).mean()),
                    "standard_deviation": float(true[known].std()),
                }
    return results


def _draw(folder: Path, results: Mapping[str, Any], predictions: Mapping[str, Mapping[str, Any]]) -> None:
    for name, told in predictions.items():
        shown = {kind: told[kind] for kind in PLOTTED if kind in told} or {
            k: v for k, v in told.items() if k != "true"
        }
        intervals = {kind: (results[name][kind]["r2_low"], results[name][kind]["r2_high"]) for kind in shown}
        figure = plots.predicted_against_true(told["true"], shown, name.replace("_", " "), intervals)
        figure.savefig(folder / f"predicted_{name}.png")
    plots.probe_bars(results).savefig(folder / "probes.png")


def _report(results: Mapping[str, Any]) -> None:
    for name, counts in results["left_out"].items():
        logger.warning(
            "%s is missing for %s checkpoints, which are left out for it.",
            name,
            ", ".join(f"{count} {split}" for split, count in counts.items()),
        )


def _print(results: dict[str, Any], output_dir: str) -> None:
    for name, kinds in results.items():
        line = ", ".join(f"{kind} {f['r2']:.3f} | {f['trees_r2']:.3f}" for kind, f in kinds.items() if kind in PLOTTED)
        print(f"R² for {name} (ridge | trees): {line}")
    print(f"figures and plots in {Path(output_dir) / 'probe.md'}")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane probe`."""
    args = parse_arguments(ProbeArguments, argv, PROGRAM)
    run_command(lambda a: _print(probe(a), a.output_dir), args, PROGRAM)


if __name__ == "__main__":
    main()
