"""Layers of a zoo over epochs and depth, and which layer of which checkpoint is an outlier among its kind."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, require_source, run_command
from hub_scripts.evaluation import layer_plots
from hub_scripts.evaluation.embedder import Embedder
from hub_scripts.evaluation.layer_profiles import (
    STATISTICS,
    drift,
    exponent_fit,
    layer_embeddings,
    outlier_scores,
    weight_profile,
)
from hub_scripts.outputs import new_folder, write_json
from hub_scripts.zoos.zoo import Zoo

PROGRAM = "sane profile-layers"
CHUNK = 64  # checkpoints in memory
LONGEST_LIST = 20  # outliers in results.json
SHOWN = 5  # of them on the terminal


@dataclass
class ProfileArguments:
    """Follow the layers of a zoo's checkpoints over epochs and depth: norms, spectra, embeddings; and find outliers.

    A layer's outlier score is the distance of its embedding from those of the train split at the same epoch (of all epochs where
    there are few), in robust standard deviations. The exponent alpha is WeightWatcher's, fitted with the package powerlaw if it
    is installed, else by Hill's estimator; null for layers with fewer than 10 eigenvalues.

    Example:
      sane profile-layers --model runs/model --zoo runs/zoo --output-dir runs/profile
      sane profile-layers --model runs/model --zoo runs/zoo --output-dir runs/two --models model-00003 model-00007
    """

    model: str = field(metadata={"help": "Folder or Hub repository of a SANE model with its tokenizer."})
    zoo: str = field(metadata={"help": "Folder of a zoo, or a dataset repository on the Hub."})
    output_dir: str = field(metadata={"help": "Folder for results.json and plots; must not exist yet."})
    models: list[str] | None = field(
        default=None,
        metadata={"help": "Only show these models (model_id); outliers are told by the train split all the same."},
    )
    layout_id: str | None = field(default=None, metadata={"help": "Which layout of a zoo of several."})
    on_error: str = field(
        default="refuse",
        metadata={"help": "Rows with damaged or non-finite weights: refuse (stop and name the row) or skip."},
    )


def profile(args: ProfileArguments) -> dict[str, Any]:
    """Profile all layers; returns what `results.json` holds under `profile`.

    Raises:
        ValueError: If the zoo has several layouts, does not have a model, or has fewer than two models to compare with.
    """
    with new_folder(args.output_dir) as folder:
        require_source(args.zoo, "the zoo")
        embedder = Embedder.from_pretrained(args.model)
        zoo = Zoo(args.zoo, on_error=args.on_error, layout_id=args.layout_id)
        if len(zoo.layout_ids) > 1:
            raise ValueError(
                f"{args.zoo} holds {len(zoo.layout_ids)} layouts; choose one with --layout-id: {', '.join(zoo.layout_ids)}."
            )
        rows = _rows(zoo, args.models)
        layout = embedder.codec(zoo.layout).layout
        layers = [layout.layers[index] for index in np.unique(layout.layer_ids)]  # those that have tokens
        embeddings, statistics = _measure(zoo, embedder, layers, rows)
        chosen, epochs = rows["is_chosen"], rows["epoch"]
        judged = [
            outlier_scores(embeddings[:, index], rows["model_id"], epochs, rows["split"] == "train")
            for index in range(len(layers))
        ]
        statistics["drift"] = drift(embeddings, rows["model_id"], epochs)
        statistics["score"] = np.stack([scores for scores, _, _ in judged], axis=1)
        levels = np.unique(epochs[chosen])
        means = {
            name: np.stack([_mean(values[chosen & (epochs == epoch)]) for epoch in levels])  # (epochs, layers)
            for name, values in statistics.items()
        }
        names = [layer.name for layer in layers]
        results = {
            "alpha_fit": exponent_fit(),
            "canonical_order": embedder.has_symmetries(zoo.layout),
            "checkpoints": {split: int((chosen & (rows["split"] == split)).sum()) for split in zoo.splits},
            "train_checkpoints_compared_with": int((rows["split"] == "train").sum()),
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "tensors": [tensor.name for tensor in layer.tensors],
                    "values": layer.numel,
                    "by_epoch": [
                        {
                            "epoch": int(epoch),
                            "checkpoints": int((chosen & (epochs == epoch)).sum()),
                            **{name: means[name][place, index] for name in means},
                        }
                        for place, epoch in enumerate(levels)
                    ],
                }
                for index, layer in enumerate(layers)
            ],
            "outliers": _outliers(rows, names, judged),
        }
        _plot(folder, levels, names, means)
        write_json(folder / "results.json", {"profile": results, "arguments": asdict(args)})
    return results


def _rows(zoo: Zoo, models: list[str] | None) -> dict[str, np.ndarray]:
    """The checkpoints to read, `(checkpoints,)` each: those of the chosen models, and the train split."""
    zoo.rows("train")  # refuses a zoo without
    splits = [split for split in zoo.splits if len(zoo.splits[split])]
    rows = {name: np.concatenate([zoo.column(split, name) for split in splits]) for name in ("model_id", "epoch")}
    rows["split"] = np.concatenate([np.full(len(zoo.splits[split]), split) for split in splits])
    rows["row"] = np.concatenate([np.arange(len(zoo.splits[split])) for split in splits])
    unknown = sorted(set(models or ()) - set(rows["model_id"]))
    if unknown:
        raise ValueError(f"{zoo.name} has no model {unknown[0]!r}; one of its models is {rows['model_id'][0]!r}.")
    rows["is_chosen"] = np.isin(rows["model_id"], models) if models else np.ones(len(rows["row"]), bool)
    read = rows["is_chosen"] | (rows["split"] == "train")
    return {name: values[read] for name, values in rows.items()}


def _measure(
    zoo: Zoo, embedder: Embedder, layers: list, rows: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Embeddings `(checkpoints, layers, features)` and statistics `(checkpoints, layers)`; the latter NaN if not chosen."""
    layer_ids = embedder.codec(zoo.layout).layout.layer_ids
    statistics = {name: np.full((len(rows["row"]), len(layers)), np.nan) for name in STATISTICS}
    embeddings = []
    for split in dict.fromkeys(rows["split"]):
        places = np.flatnonzero(rows["split"] == split)  # splits stand one after another
        for start in tqdm(range(0, len(places), CHUNK), desc=f"profile {split}", unit="batch", leave=False):
            chunk = places[start : start + CHUNK]
            tensors = zoo.stacked(split, rows["row"][chunk])
            embeddings.append(layer_embeddings(embedder.latents(tensors, zoo.layout), layer_ids))
            shown = np.flatnonzero(rows["is_chosen"][chunk])
            if not len(shown):
                continue
            tensors = {name: tensor[shown] for name, tensor in tensors.items()}
            for index, layer in enumerate(layers):
                for name, values in weight_profile(tensors, layer).items():
                    statistics[name][chunk[shown], index] = values
    return np.concatenate(embeddings), statistics


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the checkpoints `(checkpoints, layers)` that have a value; NaN where none has."""
    counts = np.isfinite(values).sum(0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)


def _outliers(rows: dict[str, np.ndarray], names: list[str], judged: list) -> list[dict[str, Any]]:
    """The layers of chosen checkpoints with the largest scores, the largest first."""
    scores, percentiles, same_epoch = (np.stack(parts, axis=1) for parts in zip(*judged, strict=True))
    scores = np.where(rows["is_chosen"][:, None], scores, -np.inf)
    order = np.argsort(-scores, axis=None, kind="stable")[: min(LONGEST_LIST, rows["is_chosen"].sum() * len(names))]
    return [
        {
            "model_id": str(rows["model_id"][row]),
            "epoch": int(rows["epoch"][row]),
            "split": str(rows["split"][row]),
            "layer": names[layer],
            "score": float(scores[row, layer]),
            "percentile": float(percentiles[row, layer]),
            "compared_with": "same epoch" if same_epoch[row, layer] else "all epochs",
        }
        for row, layer in zip(*np.unravel_index(order, scores.shape), strict=True)
    ]


def _plot(folder: Path, epochs: np.ndarray, names: list[str], means: dict[str, np.ndarray]) -> None:
    for name, what, log in (
        ("drift", "embedding distance from the first epoch", False),
        ("norm", "norm of the weights", True),
    ):
        lines = dict(zip(names, means[name].T, strict=True))
        layer_plots.over_epochs(epochs, lines, what, log).savefig(folder / f"{name}_over_epochs.png")
    depths = np.flatnonzero(np.isfinite(means["alpha"]).any(0))
    if len(depths):
        ends = sorted({0, len(epochs) // 2, len(epochs) - 1})
        alphas = {int(epochs[place]): means["alpha"][place, depths] for place in ends}
        figure = layer_plots.alpha_over_depth(depths, [names[depth] for depth in depths], alphas)
        figure.savefig(folder / "alpha_over_depth.png")


def _print(results: dict[str, Any], output_dir: str) -> None:
    print("strongest outliers, in robust standard deviations of the train split:")
    for found in results["outliers"][:SHOWN]:
        print(
            f"  {found['score']:8.1f}  {found['layer']} of {found['model_id']} epoch {found['epoch']} ({found['split']}; "
            f"compared with {found['compared_with']})"
        )
    print(f"figures and plots in {Path(output_dir) / 'results.json'}")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane profile-layers`."""
    args = parse_arguments(ProfileArguments, argv, PROGRAM)
    run_command(lambda a: _print(profile(a), a.output_dir), args, PROGRAM)


if __name__ == "__main__":
    main()
