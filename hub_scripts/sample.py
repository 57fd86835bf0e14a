"""Generate new networks around good ones, beside what critics ask for: noise, averages, and distances to the training data."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.codec import Codec
from hub_scripts.evaluation import plots
from hub_scripts.evaluation.baselines import average_anchors, nearest_distances, noise_around
from hub_scripts.evaluation.functional import condition_norms, evaluate
from hub_scripts.hub import publish_folder
from hub_scripts.model_cards import networks_card, public_settings
from hub_scripts.outputs import new_folder, write_json, write_text
from hub_scripts.zoos.networks import save_networks
from hub_scripts.zoos.tasks import Task, load_task
from hub_scripts.zoos.zoo import Zoo
from modeling_sane import KernelDensitySampler

PROGRAM = "sane sample"
MODES = ("joint", "token", "dimension")
NETWORKS_FOLDER = "networks"
TOP = 5  # networks in `accuracy_top5`, chosen on validation images


@dataclass
class SampleArguments:
    """Generate networks: fit a kernel density to the latents of good networks of the train split, draw, decode, keep the best.

    Beside each set stand its accuracy at epoch 0 and its distance to the nearest training checkpoint, and the same for the
    anchors, anchors plus noise, averages of anchors, and real networks of the test split.

    Example:
      sane sample --model runs/model --zoo runs/zoo --output-dir runs/sample --anchors top:10 --count 50 --keep 10
    """

    model: str = field(metadata={"help": "Folder or Hub repository of a SANE model with its tokenizer."})
    zoo: str = field(metadata={"help": "Folder of a zoo, or a dataset repository on the Hub."})
    output_dir: str = field(metadata={"help": "Folder for networks, results.json and plots; must not exist yet."})
    anchors: str = field(
        default="top:10",
        metadata={"help": "Networks to sample around, last epoch of the train split: top:N or random:N."},
    )
    mode: list[str] = field(
        default_factory=lambda: [*MODES],
        metadata={"help": "What one draw takes from one anchor: joint (the whole network), token, or dimension."},
    )
    bandwidth: float = field(
        default=0.2, metadata={"help": "Standard deviation of the kernels in the latents' own unit."}
    )
    bandwidths: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.2, 0.4],
        metadata={"help": "More bandwidths, for the plot of accuracy against distance."},
    )
    noises: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.2, 0.4],
        metadata={"help": "Weight noise of the noise baseline, in standard deviations over the train split; the first results "
                  "take the one whose distance is nearest to that of the joint samples."},
    )  # fmt: skip
    average: int = field(default=2, metadata={"help": "Anchors in an average."})
    count: int = field(default=50, metadata={"help": "Networks to draw for each set."})
    keep: int = field(default=10, metadata={"help": "Networks of each set to write, the best on validation images."})
    task: str | None = field(default=None, metadata={"help": "Task to judge them on; by default the zoo's own."})
    push_to_hub: str | None = field(
        default=None,
        metadata={"help": "Publish the networks that are kept, with their card, as this model repository."},
    )
    hub_private: bool = field(default=False, metadata={"help": "Make the repository private, if it is new."})
    on_error: str = field(
        default="refuse",
        metadata={"help": "Rows with damaged or non-finite weights: refuse (stop and name the row) or skip."},
    )
    seed: int = field(default=0, metadata={"help": "Of anchors, draws and noise."})

    def __post_init__(self):
        if not re.fullmatch(r"(top|random):[1-9]\d*", self.anchors):
            raise ValueError(f"--anchors is {self.anchors!r}, expected top:N or random:N, such as top:10.")
        unknown = set(self.mode) - set(MODES)
        if unknown or not self.mode:
            raise ValueError(f"--mode is {self.mode}, expected some of {', '.join(MODES)}.")
        if self.count < 1 or not 1 <= self.keep <= self.count:
            raise ValueError(f"--keep is {self.keep} and --count {self.count}, expected 1 <= keep <= count.")


class _Judge:
    """Accuracy and distance of sets of networks."""

    def __init__(self, zoo: Zoo, codec: Codec, task: Task):
        self.zoo, self.codec, self.task = zoo, codec, task
        self.mask = codec.layout.value_mask
        self.train = self.flat(codec.tokens(zoo.stacked("train")))

    def flat(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalised weights `(networks, values)`, padding left out."""
        return tokens[:, self.mask]

    def tokens(self, flat: torch.Tensor) -> torch.Tensor:
        """Undo [`~_Judge.flat`]."""
        tokens = torch.zeros(len(flat), *self.mask.shape)
        tokens[:, self.mask] = flat
        return tokens

    def __call__(self, flat: torch.Tensor) -> dict[str, Any]:
        """Networks given as normalised weights: their tensors, accuracies and figures."""
        images, labels = self.task.images, self.task.labels
        tensors = self.codec.tensors(self.tokens(flat))
        tensors = condition_norms(self.zoo.module, tensors, images["train"])
        validation = evaluate(self.zoo.module, tensors, images["validation"], labels["validation"]).accuracy
        accuracy = evaluate(self.zoo.module, tensors, images["test"], labels["test"]).accuracy
        order = np.argsort(-validation, kind="stable")
        distances = nearest_distances(flat, self.train)
        figures = {
            "accuracy_mean": accuracy.mean(),
            "accuracy_std": accuracy.std(),
            f"accuracy_top{TOP}": accuracy[order[:TOP]].mean(),
            "nearest_train_distance": distances.mean(),
            "count": len(flat),
        }
        return {"tensors": tensors, "order": order, "accuracy": accuracy, "distance": distances, "figures": figures}


def sample(args: SampleArguments) -> dict[str, Any]:
    """Draw, judge, select and write; returns what `results.json` holds under `sample`."""
    with new_folder(args.output_dir) as folder:
        zoo = Zoo(args.zoo, on_error=args.on_error)
        task = load_task(args.task) if args.task else zoo.task
        codec = Codec.from_pretrained(args.model, zoo.layout)
        judge = _Judge(zoo, codec, task)
        generator = torch.Generator().manual_seed(args.seed)

        rows = choose_anchors(zoo, args.anchors, args.seed)
        anchor_tokens = codec.tokens(zoo.stacked("train", rows))
        anchors, latents = judge.flat(anchor_tokens), codec.encode(anchor_tokens)
        std = judge.train.std(0)

        def draw(mode: str, bandwidth: float) -> dict[str, Any]:
            sampler = KernelDensitySampler(mode=mode, bandwidth=bandwidth).fit(latents)
            return judge(judge.flat(codec.decode(sampler.sample(args.count, generator=generator))))

        sets = {mode: draw(mode, args.bandwidth) for mode in args.mode}
        curves = {mode: [_point("bandwidth", b, draw(mode, b)) for b in args.bandwidths] for mode in args.mode}
        noisy = {s: judge(noise_around(anchors, std, s, args.count, generator)) for s in args.noises}
        curves["noise"] = [_point("strength", strength, result) for strength, result in noisy.items()]
        # noise is compared where it is as far from the training data as the samples are
        reference = sets[args.mode[0]]["figures"]["nearest_train_distance"]
        strength = min(noisy, key=lambda s: abs(noisy[s]["figures"]["nearest_train_distance"] - reference))
        sets["noise"] = noisy[strength]
        sets["noise"]["figures"]["strength"] = strength
        subset = min(args.average, len(anchors))
        sets["average"] = judge(average_anchors(anchors, args.count, subset, generator))
        sets["anchors"] = judge(anchors)
        sets["decoded_anchors"] = judge(judge.flat(codec.decode(latents)))
        unseen = np.flatnonzero(zoo.column("test", "epoch") == zoo.column("test", "epoch").max())
        sets["unseen"] = judge(judge.flat(codec.tokens(zoo.stacked("test", unseen))))

        results = {name: result["figures"] for name, result in sets.items()}
        _write(folder, args, zoo, sets, results, curves, rows)
    return results


def choose_anchors(zoo: Zoo, rule: str, seed: int) -> np.ndarray:
    """Rows of the train split to sample around: last checkpoints, the best on validation images or random ones.

    Raises:
        ValueError: If the split holds fewer models than asked for.
    """
    kind, _, number = rule.partition(":")
    epochs = zoo.column("train", "epoch")
    last = np.flatnonzero(epochs == epochs.max())
    if int(number) > len(last):
        raise ValueError(
            f"--anchors {rule} asks for more than the {len(last)} models of the train split of {zoo.name}."
        )
    if kind == "random":
        return np.random.default_rng(seed).choice(last, int(number), replace=False)
    return last[np.argsort(-zoo.column("train", "validation_accuracy")[last], kind="stable")[: int(number)]]


def _point(name: str, value: float, result: Mapping[str, Any]) -> dict[str, float]:
    figures = result["figures"]
    return {name: value, **{key: figures[key] for key in ("accuracy_mean", "nearest_train_distance")}}


def _write(
    folder: Path, args: SampleArguments, zoo: Zoo, sets: dict, results: dict, curves: dict, rows: np.ndarray
) -> None:
    best = {
        name: result["order"][: args.keep]
        for name, result in sets.items()
        if name not in ("unseen", "decoded_anchors")
    }
    networks = {name: {k: t[index.copy()] for k, t in sets[name]["tensors"].items()} for name, index in best.items()}
    row = zoo.rows("train")[int(rows[0])]
    info = {
        "architecture": row["architecture"],
        "architecture_kwargs": row["architecture_kwargs"],
        "task": args.task or zoo.info["task"],
        "anchors": [zoo.rows("train")[int(i)]["model_id"] for i in rows],
        "arguments": public_settings(asdict(args)),
        "sets": {
            name: [
                {"file": f"{name}/{i:03d}.safetensors", "test_accuracy": float(sets[name]["accuracy"][k]),
                 "nearest_train_distance": float(sets[name]["distance"][k])}
                for i, k in enumerate(index)
            ]
            for name, index in best.items()
        },
    }  # fmt: skip
    save_networks(folder / NETWORKS_FOLDER, networks, info)
    name = args.push_to_hub or f"Networks generated from {Path(zoo.name).name}"
    write_text(folder / NETWORKS_FOLDER / "README.md", networks_card(name, args.model, zoo, results, info))
    shown = {name: result["accuracy"] for name, result in sets.items()}
    plots.accuracy_histogram(shown).savefig(folder / "accuracy.png")
    scatter = {name: (result["distance"], result["accuracy"]) for name, result in sets.items()}
    plots.accuracy_against_distance(scatter).savefig(folder / "accuracy_against_distance.png")
    write_json(
        folder / "results.json",
        {"sample": results, "curves": curves, "anchors": info["anchors"], "arguments": asdict(args)},
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane sample`."""
    args = parse_arguments(SampleArguments, argv, PROGRAM)

    def command(args: SampleArguments) -> None:
        for name, figures in sample(args).items():
            print(
                f"{name:<16} accuracy {figures['accuracy_mean']:.3f}, top {TOP} {figures[f'accuracy_top{TOP}']:.3f}, "
                f"distance to the nearest training checkpoint {figures['nearest_train_distance']:.1f}"
            )
        networks = Path(args.output_dir) / NETWORKS_FOLDER
        print(f"networks in {networks}")
        if args.push_to_hub:
            where = publish_folder(
                networks, args.push_to_hub, private=args.hub_private, message="Upload generated networks"
            )
            print(f"published at {where}")

    run_command(command, args, PROGRAM)


if __name__ == "__main__":
    main()
