"""Fine-tune sets of networks under one budget: generated ones, their anchors, and networks from scratch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.evaluation import finetune_plots
from hub_scripts.evaluation.baselines import from_scratch
from hub_scripts.evaluation.functional import batched_logits, build_module, ensemble_accuracy, evaluate, train_networks
from hub_scripts.evaluation.learning_curves import LearningCurve
from hub_scripts.evaluation.report import Picture, Section, Table, write_report
from hub_scripts.generation.heads import HEADS, adapt_task, replace_head, require_classes
from hub_scripts.outputs import new_folder, write_json
from hub_scripts.zoos.networks import load_networks
from hub_scripts.zoos.tasks import Task, load_task

PROGRAM = "sane finetune"
SCRATCH = "scratch"
SCRATCH_RIDGE = "scratch_ridge"
RESERVED = (SCRATCH, SCRATCH_RIDGE, "epochs", "std", "interval", "steps_per_epoch", "steps_to_reach", "steps_to_reach_median",
            "steps_to_reach_interval", "sets", "curves", "task")  # fmt: skip
HEAD_SHOTS = 20  # labelled images of each class for --new-head ridge


@dataclass
class FinetuneArguments:
    """Fine-tune sets of networks on a task, all with the same steps, and compare their accuracy while they learn.

    With several learning rates each set gets its own, from the same grid in the same way: the one with the best mean accuracy on
    validation images after all epochs of the first seed. A seed stands for an order of images, the same for all sets, for the
    labelled images where their number is limited, for new classifiers, and for the networks from scratch. Intervals are 95 % of a
    bootstrap that draws networks and seeds.

    Example:
      sane finetune --init runs/sample/networks/joint runs/sample/networks/anchors scratch --epochs 5 --output-dir runs/finetune
      sane finetune --init runs/sample/networks/laplace scratch --task idx:mnist --learning-rates 3e-4 1e-3 3e-3 --seeds 3
        --reach 0.8 0.9 --output-dir runs/mnist
      sane finetune --init runs/sample/networks/laplace scratch --task digits --resize --new-head ridge --shots 10 --output-dir runs/few
    """

    init: list[str] = field(
        metadata={"help": "Sets of networks that `sane sample` wrote, and 'scratch' for as many with random weights."}
    )
    output_dir: str = field(metadata={"help": "Folder for results.json, plots and report.html; must not exist yet."})
    task: str | None = field(default=None, metadata={"help": "Task to train on; by default the one of the networks."})
    resize: bool = field(
        default=False, metadata={"help": "Bring images that do not fit the networks to a size that does."}
    )
    new_head: str | None = field(
        default=None,
        metadata={
            "help": "Give the networks a new classifier: ridge (solved in closed form on labelled samples) or init (random). Needed "
            "where the task has another number of classes. With ridge a further set, scratch_ridge, tells what it does alone."
        },
    )
    shots: int | None = field(
        default=None,
        metadata={"help": f"Train on so many labelled images of each class only; ridge takes at most {HEAD_SHOTS} by default."},
    )  # fmt: skip
    max_train_images: int | None = field(default=None, metadata={"help": "Train on so many images at most."})
    epochs: int = field(default=5, metadata={"help": "Passes over the training images."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3],
        metadata={"help": "Learning rates of AdamW to choose from for each set; with one, nothing is tuned."},
    )
    batch_size: int = field(default=32, metadata={"help": "Images in a step."})
    seeds: int = field(default=1, metadata={"help": "How often all is repeated, each time with the next seed."})
    num_networks: int | None = field(
        default=None, metadata={"help": "Networks of a set at most, the first files (`sane sample` writes the best first)."}
    )  # fmt: skip
    reach: list[float] = field(
        default_factory=lambda: [0.5, 0.8],
        metadata={"help": "Accuracies for which the steps until they are reached are told."},
    )
    evaluations: int = field(default=4, metadata={"help": "How often within an epoch the accuracy is measured."})
    seed: int = field(default=0, metadata={"help": "The first seed."})

    def __post_init__(self):
        for name in ("epochs", "seeds", "batch_size", "evaluations", "shots", "max_train_images", "num_networks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least 1.")
        if all(name == SCRATCH for name in self.init):
            raise ValueError(
                "--init needs at least one set of networks beside 'scratch': it says which architecture to train."
            )
        if self.new_head is not None and self.new_head not in HEADS:
            raise ValueError(f"--new-head is {self.new_head!r}, expected {' or '.join(HEADS)}.")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"--learning-rates is {self.learning_rates}, expected numbers above 0.")
        if not self.reach or not 0 < min(self.reach) <= max(self.reach) <= 1:
            raise ValueError(f"--reach is {self.reach}, expected accuracies above 0 and up to 1.")


class _Loaded(NamedTuple):
    """Sets of one architecture, as they are on disk.

    Args:
        tensors (`dict[str, dict[str, torch.Tensor]]`): by set, stacked state dicts `(networks, *shape)`.
        files (`dict[str, list[str]]`): by set, the names of its files, one for each network.
        architecture (`str`): `"package.module:Name"`.
        kwargs (`dict[str, Any]`): its arguments.
        task (`str`): that the networks were made for.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    files: dict[str, list[str]]
    architecture: str
    kwargs: dict[str, Any]
    task: str


class _Comparison:
    """All sets under one budget: what each starts from with a seed, and how it is trained."""

    def __init__(self, args: FinetuneArguments, loaded: _Loaded):
        self.args, self.loaded = args, loaded
        self.kwargs = loaded.kwargs
        self.module = build_module(loaded.architecture, loaded.kwargs).eval()
        whole = adapt_task(self.module, load_task(args.task or loaded.task), args.resize)
        require_classes(self.module, whole, args.new_head)
        self.tasks = {seed: self._budget(whole, seed) for seed in range(args.seed, args.seed + args.seeds)}
        self.task = self.tasks[args.seed]
        if args.new_head:
            first = {name: tensor[:1] for name, tensor in next(iter(loaded.tensors.values())).items()}
            self.module, self.kwargs, _ = self._with_head(first, args.seed)
        self.names = list(loaded.tensors)
        if SCRATCH in args.init:
            # a ridge on random features is much better than chance: nothing of that is owed to the weights of the other sets
            self.names += [SCRATCH, SCRATCH_RIDGE] if args.new_head == "ridge" else [SCRATCH]
        self.steps_per_epoch = -(-len(self.task.labels["train"]) // args.batch_size)
        self.evaluations = min(args.evaluations, self.steps_per_epoch)

    @property
    def steps(self) -> np.ndarray:
        """Optimizer steps when accuracies are measured."""
        within = [-(-self.steps_per_epoch * part // self.evaluations) for part in range(1, self.evaluations + 1)]
        return np.array([0, *(epoch * self.steps_per_epoch + s for epoch in range(self.args.epochs) for s in within)])

    @property
    def ends(self) -> np.ndarray:
        """Which of [`~_Comparison.steps`] are the ends of epochs, the start among them."""
        return np.flatnonzero(self.steps % self.steps_per_epoch == 0)

    def _budget(self, whole: Task, seed: int) -> Task:
        task = whole if self.args.shots is None else whole.few(self.args.shots, seed)
        return task if self.args.max_train_images is None else task.first(self.args.max_train_images, seed)

    def _with_head(self, tensors: Mapping[str, torch.Tensor], seed: int) -> tuple[nn.Module, dict, dict]:
        # labelled images of the budget, no others
        return replace_head(
            self.loaded.architecture, self.loaded.kwargs, tensors, self.tasks[seed], self.args.new_head,
            shots=self.args.shots or HEAD_SHOTS, seed=seed,
        )  # fmt: skip

    def start(self, name: str, seed: int) -> dict[str, torch.Tensor]:
        """Stacked networks that a set starts from."""
        count = max(map(len, self.loaded.files.values()))
        if name == SCRATCH:
            return from_scratch(self.loaded.architecture, self.kwargs, count, seed)
        if name == SCRATCH_RIDGE:
            random = from_scratch(self.loaded.architecture, self.loaded.kwargs, count, seed)
            return self._with_head(random, seed)[2]
        tensors = self.loaded.tensors[name]
        return self._with_head(tensors, seed)[2] if self.args.new_head else tensors

    def _stages(self, start: Mapping[str, torch.Tensor], rate: float, seed: int, yields: int) -> Iterator[dict]:
        task = self.tasks[seed]
        return train_networks(
            self.module, start, task.images["train"], task.labels["train"], learning_rate=rate, epochs=self.args.epochs,
            batch_size=self.args.batch_size, yields_per_epoch=yields,
            generator=torch.Generator().manual_seed(seed),  # the same batches for every set
        )  # fmt: skip

    def validate(self, start: Mapping[str, torch.Tensor], rate: float, seed: int, bar: tqdm) -> float:
        """Mean accuracy on validation images after all epochs."""
        stages = self._stages(start, rate, seed, yields=1)
        trained = next(stages)
        for _ in stages:  # they are the same tensors, trained further
            bar.update(self.steps_per_epoch)
        found = evaluate(self.module, trained, self.task.images["validation"], self.task.labels["validation"])
        return float(found.accuracy.mean())

    def train(
        self, start: Mapping[str, torch.Tensor], rate: float, seed: int, bar: tqdm
    ) -> tuple[np.ndarray, list[float]]:
        """Accuracies on test images `(points, networks)`, and those of the networks together, before and after."""
        images, labels = self.task.images["test"], self.task.labels["test"]
        accuracy, together, steps = [], [], self.steps
        for point, stacked in enumerate(self._stages(start, rate, seed, self.evaluations)):
            accuracy.append(evaluate(self.module, stacked, images, labels).accuracy)
            if point in (0, len(steps) - 1):
                with torch.no_grad():
                    together.append(ensemble_accuracy(batched_logits(self.module, stacked, images), labels))
            bar.update(int(steps[point] - steps[point - 1]) if point else 0)
        return np.stack(accuracy), together

    def __call__(self, name: str, bar: tqdm) -> tuple[LearningCurve, dict[str, Any]]:
        """The curve of a set over all seeds, and what else is told of it."""
        args = self.args
        starts = {seed: self.start(name, seed) for seed in self.tasks}
        first, tried = starts[args.seed], {}
        if len(args.learning_rates) > 1:
            tried = {rate: self.validate(first, rate, args.seed, bar) for rate in args.learning_rates}
        rate = max(args.learning_rates, key=lambda one: tried.get(one, 0))
        runs = [self.train(start, rate, seed, bar) for seed, start in starts.items()]
        broken = [
            file for file, finite in zip(self.loaded.files[name], _finite(first), strict=True) if not finite
        ] if name in self.loaded.files else []  # fmt: skip
        return LearningCurve(self.steps, np.stack([accuracy for accuracy, _ in runs])), {
            "networks": len(_finite(first)),
            "not_finite": len(broken),
            "not_finite_networks": broken,
            "learning_rate": rate,
            "validation_of_learning_rates": {str(one): accuracy for one, accuracy in tried.items()},
            "ensemble": np.mean([together for _, together in runs], axis=0).tolist(),
        }


def finetune(args: FinetuneArguments) -> dict[str, Any]:
    """Train all sets; returns what `results.json` holds under `finetune`."""
    with new_folder(args.output_dir) as folder:
        comparison = _Comparison(args, _load(args))
        tuned = len(args.learning_rates) if len(args.learning_rates) > 1 else 0
        total = len(comparison.names) * (tuned + args.seeds) * int(comparison.steps[-1])
        curves, info = {}, {}
        with tqdm(total=total, desc="fine-tune", unit="step") as bar:
            for name in comparison.names:
                bar.set_postfix(set=name)
                curves[name], info[name] = comparison(name, bar)
        results = _results(args, comparison, curves, info)
        _write(folder, args, results, curves)
    return results


def _load(args: FinetuneArguments) -> _Loaded:
    folders = [name for name in args.init if name != SCRATCH]
    names = _names(folders)
    found = {name: load_networks(folder) for name, folder in zip(names, folders, strict=True)}
    kinds = {
        name: (info["architecture"], json.loads(info["architecture_kwargs"] or "{}"))
        for name, (_, info) in found.items()
    }
    first = names[0]
    for name, kind in kinds.items():
        if kind != kinds[first]:
            raise ValueError(
                f"{name} holds networks of {kind[0]} with {kind[1]}, {first} of {kinds[first][0]} with {kinds[first][1]}; sets of one "
                "comparison must be of one architecture: run `sane finetune` once for each."
            )
    tasks = dict.fromkeys(info["task"] for _, info in found.values())
    if len(tasks) > 1 and not args.task:
        raise ValueError(f"the sets were made for different tasks, {' and '.join(tasks)}; say which one with --task.")
    return _Loaded(
        {name: {k: t[: args.num_networks] for k, t in tensors.items()} for name, (tensors, _) in found.items()},
        {
            name: [file.name for file in sorted(Path(folder).glob("*.safetensors"))[: args.num_networks]]
            for name, folder in zip(names, folders, strict=True)
        },
        *kinds[first],
        next(iter(tasks)),
    )


def _names(folders: Sequence[str]) -> list[str]:
    """Names of sets: of their folders, with as many of the folders above as tell those apart that would be called the same."""
    parts = [Path(folder).absolute().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError(f"--init names {max(folders, key=list(folders).count)} twice.")
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        depth = 1 + (own[-1] in RESERVED)
        while any(other[-depth:] == own[-depth:] for other in others):
            depth += 1
        names.append("/".join(own[-depth:]))
    return names


def _finite(tensors: Mapping[str, torch.Tensor]) -> list[bool]:
    """For each network, True if all of its weights are finite."""
    finite = [t.isfinite().flatten(1).all(1) for t in tensors.values() if t.is_floating_point()]
    return torch.stack(finite).all(0).tolist()


def _results(
    args: FinetuneArguments,
    comparison: _Comparison,
    curves: Mapping[str, LearningCurve],
    info: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    ends, task = comparison.ends, comparison.task

    def of_levels(measure) -> dict[str, dict[str, Any]]:
        return {name: {str(level): measure(curve)(level) for level in args.reach} for name, curve in curves.items()}

    return {
        "epochs": list(range(args.epochs + 1)),
        **{name: curve.mean[ends].tolist() for name, curve in curves.items()},
        "std": {name: curve.std[ends].tolist() for name, curve in curves.items()},
        "interval": {name: curve.interval[ends].tolist() for name, curve in curves.items()},
        "steps_per_epoch": comparison.steps_per_epoch,
        "steps_to_reach": of_levels(lambda curve: curve.steps_to_reach),
        "steps_to_reach_median": of_levels(lambda curve: curve.median_steps_to_reach),
        "steps_to_reach_interval": of_levels(lambda curve: curve.steps_interval),
        "sets": dict(info),
        "curves": {
            "epochs": (comparison.steps / comparison.steps_per_epoch).tolist(),
            "steps": comparison.steps.tolist(),
            "mean": {name: curve.mean.tolist() for name, curve in curves.items()},
            "median": {name: curve.median.tolist() for name, curve in curves.items()},
            "interval": {name: curve.interval.tolist() for name, curve in curves.items()},
        },
        "task": {
            "name": task.name,
            "train_images": len(task.labels["train"]),
            "validation_images": len(task.labels["validation"]) if len(args.learning_rates) > 1 else 0,
            "image": list(task.images["train"].shape[1:]),
        },
    }


def _write(
    folder: Path, args: FinetuneArguments, results: dict[str, Any], curves: Mapping[str, LearningCurve]
) -> None:
    finetune_plots.accuracy_curves(curves, results["steps_per_epoch"]).savefig(folder / "finetuning.png")
    finetune_plots.steps_to_reach(curves, args.reach).savefig(folder / "steps_to_reach.png")
    write_json(
        folder / "results.json",
        {"finetune": results, "task": results["task"]["name"], "arguments": asdict(args)},
    )
    figures = {key: results[key] for key in ("sets", "steps_to_reach", "steps_to_reach_median")}
    write_report(folder / "report.html", "Fine-tuning", _sections(folder, args, results), figures)


def _sections(folder: Path, args: FinetuneArguments, results: dict[str, Any]) -> list[Section]:
    info, task, rates = results["sets"], results["task"], args.learning_rates
    repeats = "once" if args.seeds == 1 else f"{args.seeds} times, with other seeds"
    tuning = (
        f"Each set has its own of the learning rates {', '.join(f'{rate:g}' for rate in rates)}: the best on "
        f"{task['validation_images']} validation images after all epochs of the first seed."
        if len(rates) > 1
        else f"All sets have the learning rate {rates[0]:g}; it was not tuned."
    )
    broken = [f"{', '.join(one['not_finite_networks'])} of {name}" for name, one in info.items() if one["not_finite"]]
    note = (
        f"\n\nNetworks with weights that are not finite count as always wrong: {'; '.join(broken)}." if broken else ""
    )

    def reached(name: str, level: float) -> str:
        mean, median = (results[key][name][str(level)] for key in ("steps_to_reach", "steps_to_reach_median"))
        return " | ".join("never" if step is None else str(step) for step in (mean, median))

    return [
        Section(
            "Accuracy",
            f"All sets trained on as many images ({task['train_images']} of {task['name']}), the same ones in the same order, {repeats}. "
            "Epoch 0 is before training. Means are over networks and seeds; bands are their 95 % intervals, of a bootstrap that draws "
            f"networks and seeds anew.{note}",
            [Picture(folder / "finetuning.png", "accuracy on test images while fine-tuning, a line for each set")],
            [Table(("start", *(f"epoch {e}" for e in results["epochs"])), [(n, *(f"{v:.3f}" for v in results[n])) for n in info])],
        ),
        Section(
            "Steps to reach an accuracy",
            f"An epoch has {results['steps_per_epoch']} steps; accuracy was measured {args.evaluations} times in each, or after every "
            "step where there are fewer.",
            [Picture(folder / "steps_to_reach.png", "optimizer steps until the mean of each set reaches an accuracy")],
            [
                Table(
                    ("steps, mean | median network", *(f"accuracy {level:g}" for level in args.reach)),
                    [(name, *(reached(name, level) for level in args.reach)) for name in info],
                )
            ],
        ),
        Section(
            "Learning rates and ensembles",
            f"{tuning} An ensemble averages the probabilities of all networks of a set.",
            tables=[
                Table(
                    ("start", "networks", "learning rate", "ensemble before", "ensemble after"),
                    [
                        (name, one["networks"], f"{one['learning_rate']:g}", *(f"{v:.3f}" for v in one["ensemble"]))
                        for name, one in info.items()
                    ],
                )
            ],
        ),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane finetune`."""
    args = parse_arguments(FinetuneArguments, argv, PROGRAM)

    def command(args: FinetuneArguments) -> None:
        results = finetune(args)
        for name, one in results["sets"].items():
            lost = f"; not finite: {', '.join(one['not_finite_networks'])}" if one["not_finite"] else ""
            print(f"{name:<16} " + "  ".join(f"{value:.3f}" for value in results[name]) + lost)
        print(f"report in {Path(args.output_dir) / 'report.html'}")

    run_command(command, args, PROGRAM)


if __name__ == "__main__":
    main()
