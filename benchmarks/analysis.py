"""What can be read from weights: probes on two zoos with three seeds, transfer between them, search, speed, real LSTMs; JSON out.

python benchmarks/analysis.py --out results.json --zoos runs/fashion runs/batchnorm        everything; an hour on two cores
python benchmarks/analysis.py --out results.json --zoos ... --part search                  some parts; others are kept

Without `--zoos` both are built first: 210 CNNs of the published Model Zoos on Fashion-MNIST (`apt-get install dataset-fashion-mnist`)
and 210 ReLU CNNs with batch norm on scikit-learn's digits, with label noise and other data sets for each.

`probes`: for each seed the models of both zoos are split anew (70, 15 and 15 %), one SANE is trained on both train splits
(`--preset multi-zoo`, as many steps for all seeds), and `sane probe` measures all representations on both test splits, with its
defaults and each other's zoo as the transfer. `cells` compares SANE's default with the better of the two variants of s(W), ridge with
ridge and trees with trees: means over the seeds, and in how many seeds the 95 % interval of the difference lies above 0 (a bootstrap
over models on the same draws). Within a run nothing is chosen on
test data: probes, bands and numbers of trees follow the validation split. But the design itself (which moments, how prototypes are made,
settings of the trees) was found while looking at the test split of seed 0, which is the split that both zoos are stored with. So
`cells_of_other_seeds` counts the seeds after the first alone; most of their test networks were not looked at then.

`search`, `speed` and `mhcnuggets` are described in `benchmarks/analysis_search.py`, `nfn`, a network on weights that is trained on the
properties directly, in `benchmarks/analysis_nfn.py`.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.analysis_nfn import measure_nfn
from benchmarks.analysis_search import measure_mhcnuggets, measure_search, measure_speed
from benchmarks.training_quality import command, fashion_zoo
from hub_scripts.outputs import read_json, write_json
from hub_scripts.zoos.schema import hparam_columns, property_columns
from hub_scripts.zoos.splits import split_models
from hub_scripts.zoos.writer import ZooWriter
from hub_scripts.zoos.zoo import Zoo

SEEDS = (0, 1, 2)
STEPS = 100  # of the encoder
PROPERTIES = ("test_accuracy", "epoch", "generalization_gap")
STATISTICS = ("layer_statistics", "layer_statistics_joint")
BATCH_NORM = [
    *("--architecture-kwargs", '{"activation": "relu", "batch_norm": true}', "--num-models", "210", "--epochs", "8"),
    *("--keep-epochs", "0", "1", "2", "3", "5", "8", "--learning-rates", "1e-3", "3e-3", "1e-2"),
    *("--weight-decays", "0", "0.1", "--label-noises", "0", "0.1", "0.2", "--data-fractions", "0.5", "1.0"),
    *("--initialisations", "kaiming_uniform", "xavier_normal", "--sweep", "random"),
]


def batch_norm_zoo(folder: Path) -> Path:
    """210 ReLU CNNs with batch norm on digits."""
    if not folder.exists():
        command("build_zoo.py", "--output-dir", str(folder), *BATCH_NORM)
    return folder


def split_anew(source: Path, folder: Path, seed: int) -> Path:
    """The same zoo with other models in its splits."""
    zoo = Zoo(source)
    columns = next(iter(zoo.splits.values())).features
    models = sorted({model for rows in zoo.splits.values() for model in rows["model_id"]})
    split_of = {
        models[number]: split for split, chosen in split_models(len(models), seed).items() for number in chosen
    }
    kept = [*property_columns(columns), *hparam_columns(columns)]
    counts = dict.fromkeys(("train", "validation", "test"), 0)
    for rows in zoo.splits.values():
        for model in rows["model_id"]:
            counts[split_of[model]] += 1
    writer = ZooWriter(folder, {name: columns[name] for name in kept}, counts)
    writer.add_layout(zoo.layout, zoo.symmetries)
    own = ["model_id", "epoch", "layout_id", "architecture", "architecture_kwargs", "alignment_permutations"]
    for split, rows in zoo.splits.items():
        for index, row in enumerate(rows):
            values = {name: row[name] for name in (*kept, *own)}
            writer.add(split_of[row["model_id"]], values, zoo.state_dict(split, index))
    writer.finish(folder.name, {key: zoo.info[key] for key in ("task", "pixel_mean", "pixel_std")})
    return folder


def measure_probes(
    folder: Path, zoos: list[Path], seeds: tuple[int, ...] = SEEDS, steps: int = STEPS
) -> dict[str, Any]:
    """Figures of `sane probe` by seed and zoo, and the comparison with s(W)."""
    runs: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        parts = [split_anew(zoo, folder / f"seed{seed}" / zoo.name, seed) for zoo in zoos]
        model = folder / f"seed{seed}" / "model"
        flags = ["--preset", "multi-zoo", "--max-steps", str(steps), "--eval-steps", str(steps), "--seed", str(seed)]
        command("train.py", "--zoo", *map(str, parts), "--output-dir", str(model), *flags)
        runs[str(seed)] = {"training": read_json(model / "results.json")["validation"]}
        for place, zoo in enumerate(parts):
            output = folder / f"seed{seed}" / f"probe_{zoo.name}"
            flags = ["--transfer-zoos", str(parts[1 - place]), "--seed", str(seed)]
            wall, cpu = command(
                "probe.py", "--model", str(model), "--zoo", str(zoo), "--output-dir", str(output), *flags
            )
            found = read_json(output / "results.json")
            transfer = next(iter(found["transfer"].values()))
            kept = {key: found[key] for key in ("checkpoints", "probe", "probe_all_epochs")}
            runs[str(seed)][zoo.name] = kept | {"transfer": transfer, "wall_s": wall, "cpu_s": cpu}
            print(seed, zoo.name, {p: cell(kept["probe"][p]) for p in PROPERTIES}, flush=True)
    names = [zoo.name for zoo in zoos]
    return {
        "steps": steps,
        "seeds": list(seeds),
        "cells": cells(runs, names),
        # the design was found while looking at the first one's test split
        "cells_of_other_seeds": cells({str(seed): runs[str(seed)] for seed in seeds[1:]}, names),
        "transfer": moved(runs, names),
        "runs": runs,
    }


def cell(kinds: dict[str, Any]) -> dict[str, list[float]]:
    """R² of SANE and of both variants of s(W), ridge and trees."""
    return {kind: [round(kinds[kind][key], 3) for key in ("r2", "trees_r2")] for kind in ("sane", *STATISTICS)}


def cells(runs: dict[str, dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """For each zoo, property and probe: means over the seeds, and how often SANE is beyond the interval."""
    found: dict[str, Any] = {}
    for name in names:
        for what in PROPERTIES:
            by_seed = [run[name]["probe"][what] for run in runs.values()]
            for probe, key in (("ridge", "r2"), ("trees", "trees_r2")):
                means = {kind: float(np.mean([kinds[kind][key] for kinds in by_seed])) for kind in by_seed[0]}
                margins = [kinds["sane"][f"{probe}_margin"] for kinds in by_seed]
                statistics = max(means[kind] for kind in STATISTICS)
                found[f"{name} {what} {probe}"] = {
                    "sane": means["sane"],
                    "better_layer_statistics": statistics,
                    "difference": means["sane"] - statistics,
                    "seeds_above_interval": sum(margin["low"] > 0 for margin in margins),
                    "seeds_below_interval": sum(margin["high"] < 0 for margin in margins),
                    "all": means,
                }
    won = [one["difference"] > 0 for one in found.values()]
    beyond = [one["seeds_above_interval"] > len(runs) / 2 for one in found.values()]
    return {"won": sum(won), "beyond_interval": sum(beyond), "of": len(won), "by_cell": found}


def moved(runs: dict[str, dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Kendall's τ for accuracy on the other zoo, means over the seeds."""
    return {
        f"{name} to {names[1 - place]}": {
            kind: {
                probe: float(np.mean([run[name]["transfer"]["test_accuracy"][kind][probe]["kendall_tau"] for run in runs.values()]))
                for probe in ("ridge", "trees")
            }
            for kind in ("sane", "layer_statistics")
        }
        for place, name in enumerate(names)
    }  # fmt: skip


PARTS = ("probes", "search", "speed", "mhcnuggets", "nfn")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="the JSON file; parts not measured are kept as it has them"
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--zoos", type=Path, nargs=2, help="a zoo on Fashion-MNIST and one with batch norm, as above")
    parser.add_argument(
        "--wheels", type=Path, help="folder that holds the mhcnuggets package; by default pip downloads it"
    )
    parser.add_argument("--model", type=Path, help="a SANE model of the first zoo; by default one is trained")
    parser.add_argument("--work-dir", type=Path, help="keep zoos, models and figures here")
    args = parser.parse_args()
    results: dict[str, Any] = read_json(args.out) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work_dir or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["SANE_CACHE"] = str(folder / "cache")
        zoos = args.zoos or [fashion_zoo(folder / "fashion"), batch_norm_zoo(folder / "batchnorm")]
        zoos = [zoo.resolve() for zoo in zoos]
        model = args.model.resolve() if args.model else folder / "model"
        if not model.exists() and {"search", "speed"} & set(args.part):
            flags = ["--preset", "small-cnn", "--max-steps", str(STEPS)]
            command("train.py", "--zoo", str(zoos[0]), "--output-dir", str(model), *flags)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "probes": lambda: measure_probes(folder, zoos),
            "search": lambda: measure_search(folder, zoos, model),
            "speed": lambda: measure_speed(folder, zoos[0], model),
            "mhcnuggets": lambda: measure_mhcnuggets(folder, args.wheels, folder / "mhcnuggets.png"),
            "nfn": lambda: measure_nfn(zoos, SEEDS),
        }
        for name in args.part:
            results[name] = parts[name]()
            results.setdefault("machine", {})[name] = {"torch": torch.__version__, "cores": os.cpu_count()}
            write_json(args.out, results)
    print(json.dumps({name: results[name].get("cells", results[name]) for name in args.part}, indent=2))


if __name__ == "__main__":
    main()
