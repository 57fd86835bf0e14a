"""Predict properties of networks from their embeddings, beside the baselines that read the weights themselves."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.codec import Codec
from hub_scripts.embed import embed_split
from hub_scripts.evaluation import plots
from hub_scripts.evaluation.baselines import layer_statistics, weight_features
from hub_scripts.evaluation.features import DEFAULT_FEATURE, FEATURES
from hub_scripts.evaluation.probes import bootstrap_r2, ridge_probes
from hub_scripts.outputs import new_folder, write_json
from hub_scripts.zoos.tasks import SPLITS
from hub_scripts.zoos.zoo import Zoo

PROGRAM = "sane probe"
DEFAULT_PROPERTIES = ("test_accuracy", "epoch", "generalization_gap")
BASELINES = ("layer_statistics", "weights")


@dataclass
class ProbeArguments:
    """Predict properties of a zoo's networks with ridge regression: from SANE embeddings, layer statistics s(W) and weights W.

    Fitted on the train split, strength chosen on the validation split, measured on the test split; splits are by model.

    Example:
      sane probe --model runs/model --zoo runs/zoo --output-dir runs/probe
    """

    model: str = field(metadata={"help": "Folder or Hub repository of a SANE model with its tokenizer."})
    zoo: str = field(metadata={"help": "Folder of a zoo, or a dataset repository on the Hub."})
    output_dir: str = field(metadata={"help": "Folder for results.json and plots; must not exist yet."})
    properties: list[str] = field(
        default_factory=lambda: [*DEFAULT_PROPERTIES], metadata={"help": "Numeric columns of the zoo to predict."}
    )
    feature: str = field(
        default=DEFAULT_FEATURE, metadata={"help": f"How latents become one vector: {', '.join(FEATURES)}."}
    )
    first_epoch: int = field(
        default=1,
        metadata={"help": "Leave out checkpoints before this epoch: untouched zero biases give epoch 0 away."},
    )
    on_error: str = field(
        default="refuse",
        metadata={"help": "Rows with damaged or non-finite weights: refuse (stop and name the row) or skip."},
    )
    seed: int = field(default=0, metadata={"help": "Of the bootstrap intervals."})

    def __post_init__(self):
        if self.feature not in FEATURES:
            raise ValueError(f"--feature is {self.feature!r}, expected one of {', '.join(FEATURES)}.")


def probe(args: ProbeArguments) -> dict[str, Any]:
    """Fit and measure all probes; returns what `results.json` holds under `probe`."""
    with new_folder(args.output_dir) as folder:
        zoo = Zoo(args.zoo, on_error=args.on_error)
        codec = Codec.from_pretrained(args.model, zoo.layout)
        chosen = {split: np.flatnonzero(zoo.column(split, "epoch") >= args.first_epoch) for split in SPLITS}
        empty = [split for split, rows in chosen.items() if not len(rows)]
        if empty:
            raise ValueError(
                f"{args.zoo} has no checkpoints of epoch {args.first_epoch} or later in its {empty[0]} split."
            )
        features = _features(zoo, codec, args.feature, chosen)
        targets = {name: _targets(zoo, name, chosen) for name in args.properties}
        by_split = {split: {name: values[split] for name, values in targets.items()} for split in SPLITS}
        # one decomposition of each feature serves all properties
        probes = {
            kind: ridge_probes(*(part for split in SPLITS for part in (sets[split], by_split[split])))
            for kind, sets in features.items()
        }
        model_ids = zoo.column("test", "model_id")[chosen["test"]]
        results: dict[str, Any] = {name: {} for name in args.properties}
        for name in args.properties:
            for kind, found in probes.items():
                low, high = bootstrap_r2(by_split["test"][name], found[name].predictions, model_ids, seed=args.seed)
                results[name][kind] = {
                    "r2": found[name].r2,
                    "r2_low": low,
                    "r2_high": high,
                    "kendall_tau": found[name].kendall_tau,
                    "alpha": found[name].alpha,
                    "num_features": features[kind]["train"].shape[1],
                }
        shown = args.properties[0]
        predictions = {kind: found[shown].predictions for kind, found in probes.items()}
        figure = plots.predicted_against_true(by_split["test"][shown], predictions, shown.replace("_", " "))
        figure.savefig(folder / f"predicted_{shown}.png")
        counts = {split: len(rows) for split, rows in chosen.items()}
        write_json(folder / "results.json", {"probe": results, "checkpoints": counts, "arguments": asdict(args)})
    return results


def _features(zoo: Zoo, codec: Codec, feature: str, chosen: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Feature matrices by kind and split."""
    sets: dict[str, dict[str, np.ndarray]] = {"sane": {}, "sane_token_mean": {}, **{kind: {} for kind in BASELINES}}
    for split, rows in chosen.items():
        latents = embed_split(zoo, split, codec)[rows]
        weights = zoo.stacked(split, rows)
        sets["sane"][split] = FEATURES[feature](latents, codec.layout.layer_ids)
        sets["sane_token_mean"][split] = FEATURES["token_mean"](latents, codec.layout.layer_ids)
        sets["layer_statistics"][split] = layer_statistics(weights)
        sets["weights"][split] = weight_features(weights)
    return sets


def _targets(zoo: Zoo, name: str, chosen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A numeric column by split."""
    if name not in zoo.rows("train").column_names:
        raise ValueError(f"{zoo.name} has no column {name!r}; it has {', '.join(zoo.rows('train').column_names)}.")
    targets = {split: zoo.column(split, name)[rows] for split, rows in chosen.items()}
    for split, values in targets.items():
        if not np.issubdtype(values.dtype, np.number) or not np.isfinite(values.astype(np.float64)).all():
            raise ValueError(f"column {name!r} of {zoo.name} is text or has missing values in the {split} split.")
    return {split: values.astype(np.float64) for split, values in targets.items()}


def _print(results: dict[str, Any], output_dir: str) -> None:
    for name, kinds in results.items():
        line = ", ".join(f"{kind} {figures['r2']:.3f}" for kind, figures in kinds.items())
        print(f"R² for {name}: {line}")
    print(f"figures and plots in {Path(output_dir) / 'results.json'}")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane probe`."""
    args = parse_arguments(ProbeArguments, argv, PROGRAM)
    run_command(lambda a: _print(probe(a), a.output_dir), args, PROGRAM)


if __name__ == "__main__":
    main()
