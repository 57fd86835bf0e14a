"""Networks from a few labelled samples: train a data prompt on a zoo of many tasks, or use one on a new task."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.codec import Codec
from hub_scripts.evaluation import finetune_plots, plots
from hub_scripts.evaluation.baselines import from_scratch, nearest_distances
from hub_scripts.evaluation.functional import OTHER_CLASS, evaluate, train_networks
from hub_scripts.evaluation.learning_curves import LearningCurve
from hub_scripts.generation.episodes import Episodes, draw_samples, train_prompter
from hub_scripts.generation.prompts import PromptConfig, PromptedGenerator, Prompter
from hub_scripts.generation.retrieval import retrieve
from hub_scripts.model_cards import public_name, public_settings
from hub_scripts.outputs import new_folder, write_json, write_text
from hub_scripts.zoos.networks import save_networks
from hub_scripts.zoos.tasks import load_task, renumber
from hub_scripts.zoos.zoo import Zoo

PROGRAM = "sane prompt"
NETWORKS_FOLDER, SET = "networks", "prompted"
SHOWN_EPOCHS = (0, 1, 10)  # of fine-tuning, in the table
METHODS = {
    "prompted": "data prompt",
    "retrieved": "best train network",
    "retrieved_matched": "best train network, outputs matched",
    "zoo_mean": "mean of the train networks",
    "scratch": "from scratch",
}
DATA = {"samples": "the prompt's samples", "train": "all training images of the task"}
SAMPLES_BATCH = 8  # of a few dozen samples; larger batches would leave hardly a step in an epoch


@dataclass
class PromptArguments:
    """A data prompt makes a network of some labelled samples of a task, without training it.

    With --zoo it is trained, on a zoo whose networks know different classes (`sane build-zoo --classes-per-network 4`): tasks are
    drawn from all choices of classes but those of the validation and test networks. Then it is measured on the tasks of the test
    networks, at epoch 0 and after fine-tuning, beside the train network that does best on the same samples, the mean of the
    train networks, and networks from scratch. With --prompt it makes networks for one task.

    Example:
      sane build-zoo --output-dir runs/tasks --classes-per-network 4 --num-models 210 --epochs 12 --sweep random
      sane train --preset small-cnn --zoo runs/tasks --output-dir runs/tasks-model --max-minutes 2
      sane prompt --model runs/tasks-model --zoo runs/tasks --output-dir runs/prompt
      sane prompt --prompt runs/prompt --task 'digits[3,1,4,5]' --output-dir runs/prompted
      sane finetune --init runs/prompted/networks/prompted scratch --epochs 10 --output-dir runs/prompted-finetune
    """

    output_dir: str = field(
        metadata={"help": "Folder for the prompt or the networks, results.json and plots; must not exist yet."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Train: folder or Hub repository of a SANE model with its tokenizer."}
    )
    zoo: str | None = field(
        default=None,
        metadata={"help": "Train: a zoo whose networks have classes of their own, folder or Hub dataset."},
    )
    prompt: str | None = field(default=None, metadata={"help": "Use: folder of a trained prompt."})
    task: str | None = field(
        default=None,
        metadata={"help": "Use: the task, with as many classes as the networks know, such as 'digits[3,1,4,5]'."},
    )
    count: int = field(default=5, metadata={"help": "Use: networks to make, each from samples of its own."})
    shots: int = field(default=10, metadata={"help": "Labelled samples of each class in a prompt."})
    steps: int = field(default=800, metadata={"help": "Train: steps, each on new tasks."})
    batch_size: int = field(default=16, metadata={"help": "Train: tasks in a step."})
    queries: int = field(
        default=16, metadata={"help": "Train: images of each class that a generated network is judged on in a step."}
    )
    learning_rate: float = field(default=5e-3, metadata={"help": "Train: highest learning rate of AdamW."})
    anchors: str = field(
        default="mean",
        metadata={
            "help": "Train: what generated latents are made of beside the correction: mean of the train networks, or all, "
            "mixed anew for each prompt."
        },
    )
    correct: bool = field(
        default=True, metadata={"help": "Train: add a correction to the anchors; without, they are only mixed."}
    )
    finetune_epochs: int = field(
        default=10, metadata={"help": "Train: epochs of fine-tuning on the tasks of test networks."}
    )
    finetune_learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2],
        metadata={
            "help": "Train: learning rates of fine-tuning; each method takes at each epoch the one that is best there for the "
            "tasks of validation networks, on validation images."
        },
    )
    finetune_batch_size: int = field(
        default=32,
        metadata={"help": f"Train: images in a step of fine-tuning; {SAMPLES_BATCH} on the prompt's samples."},
    )
    on_error: str = field(
        default="refuse",
        metadata={"help": "Rows with damaged or non-finite weights: refuse (stop and name the row) or skip."},
    )
    seed: int = field(default=0, metadata={"help": "Of weights, tasks, samples and the order of images."})

    def __post_init__(self):
        trains, uses = (self.model, self.zoo), (self.prompt, self.task)
        if not (all(trains) and not any(uses)) and not (all(uses) and not any(trains)):
            raise ValueError("give --model and --zoo to train a prompt, or --prompt and --task to use one.")
        for name in ("count", "shots", "steps", "batch_size", "queries", "finetune_epochs", "finetune_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1.")
        if self.anchors not in ("mean", "all"):
            raise ValueError(f"--anchors is {self.anchors!r}, expected mean or all.")
        if self.anchors == "mean" and not self.correct:
            raise ValueError(
                "--anchors mean without a correction is the same network for every prompt; use --anchors all."
            )
        if not self.finetune_learning_rates:
            raise ValueError("--finetune-learning-rates is empty, expected at least one number.")


# --- training


def train_prompt(args: PromptArguments) -> dict[str, Any]:
    """Train a prompt, measure and write it; returns what `results.json` holds under `prompt`."""
    with new_folder(args.output_dir) as folder:
        zoo = Zoo(args.zoo, on_error=args.on_error)
        if not zoo.has_own_classes:
            raise ValueError(
                f"all networks of {args.zoo} know the same classes; a prompt learns from a zoo of many tasks, as "
                "`sane build-zoo --classes-per-network 4` builds it."
            )
        prompter = _prompter(args, zoo)
        history = _fit(args, zoo, prompter)
        comparisons = {split: _Comparison(args, zoo, prompter, split) for split in ("validation", "test")}
        curves = {data: _best_curves(args, comparisons, data) for data in DATA}
        results = _figures(comparisons["test"], curves)
        prompter.save_pretrained(folder)
        for data, found in curves.items():
            # methods that have a style of their own in all plots keep it
            named = {
                name if name in plots.STYLES else METHODS[name]: LearningCurve(np.arange(len(curve)), curve[None])
                for name, curve in found.items()
            }
            finetune_plots.accuracy_curves(named, steps_per_epoch=1).savefig(folder / f"finetuning_{data}.png")
        settings = {"prompt": results, "history": history, "arguments": asdict(args)}
        write_json(folder / "results.json", settings)
        write_text(folder / "README.md", _card(args, prompter, results))
    return results


def _prompter(args: PromptArguments, zoo: Zoo) -> Prompter:
    """An untrained one, from the last checkpoints of the train split."""
    codec = Codec.from_pretrained(args.model, zoo.layout)
    last = zoo.last_rows("train")
    latents = codec.encode(codec.tokens(zoo.stacked("train", last)))
    row = zoo.rows("train")[int(last[0])]
    config = PromptConfig(
        tuple(zoo.whole_task.images["train"].shape[1:]), len(zoo.classes("train")[0]), correct=args.correct
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        anchors = latents if args.anchors == "all" else latents.mean(0, keepdim=True)
        generator = PromptedGenerator(config, anchors, codec.layout.layer_ids)
    kwargs = json.loads(row["architecture_kwargs"])
    return Prompter(generator, codec, row["architecture"], kwargs, zoo.info["task"])


def _fit(args: PromptArguments, zoo: Zoo, prompter: Prompter) -> list[dict[str, float]]:
    """Train; gives the loss every so many steps."""
    held_out = [chosen for split in ("validation", "test") for chosen in zoo.classes(split)]
    episodes = Episodes(zoo.whole_task, prompter.config.num_classes, held_out, np.random.default_rng([args.seed, 0]))
    every, history, losses = max(1, args.steps // 20), [], []
    with tqdm(total=args.steps, desc="train prompt", unit="step") as bar:

        def report(step: int, loss: float) -> None:
            bar.update()
            losses.append(loss)
            if step % every == 0 or step == args.steps:
                history.append({"step": step, "loss": float(np.mean(losses))})
                bar.set_postfix(loss=f"{history[-1]['loss']:.3f}")
                losses.clear()

        train_prompter(
            prompter,
            episodes,
            steps=args.steps,
            batch_size=args.batch_size,
            shots=args.shots,
            queries=args.queries,
            learning_rate=args.learning_rate,
            report=report,
        )
    return history


# --- what a prompt is compared with


class _Start(NamedTuple):
    """Networks before fine-tuning, one for each task, and the output of each that stands for each class."""

    tensors: dict[str, torch.Tensor]
    outputs: torch.Tensor  # (tasks, classes)


class _Comparison:
    """All methods on the tasks of the networks of a split, each given the same samples."""

    def __init__(self, args: PromptArguments, zoo: Zoo, prompter: Prompter, split: str):
        self.args, self.zoo, self.task, self.module, self.split = args, zoo, zoo.whole_task, zoo.module, split
        self.rows = zoo.last_rows(split)
        self.classes = [zoo.classes(split)[int(row)] for row in self.rows]
        generator = np.random.default_rng([args.seed, 1])
        train = self.task.labels["train"]
        drawn = [draw_samples(train, chosen, args.shots, generator) for chosen in self.classes]
        # prompts of one size, as small classes allow
        self.samples = torch.stack(_cut([rows for rows, _ in drawn], [numbers for _, numbers in drawn]))
        self.labels = torch.stack(
            [renumber(train[rows], c) for rows, c in zip(self.samples, self.classes, strict=True)]
        )
        images = self.task.images["train"][self.samples]
        train_rows = zoo.last_rows("train")
        known = zoo.stacked("train", train_rows)
        same = torch.arange(len(self.classes[0])).expand(len(self.classes), -1)
        self.starts = {"prompted": _Start(prompter(images, self.labels), same)}
        for name, match in (("retrieved", False), ("retrieved_matched", True)):
            found = retrieve(self.module, known, images, self.labels, match)
            self.starts[name] = _Start({key: t[found.rows] for key, t in known.items()}, found.outputs)
        means = {key: t.mean(0, keepdim=True).repeat_interleave(len(same), 0) for key, t in known.items()}
        self.starts["zoo_mean"] = _Start(means, same)
        random = from_scratch(prompter.architecture, prompter.architecture_kwargs, len(self.classes), args.seed)
        self.starts["scratch"] = _Start({name: random[name] for name in known}, same)
        self.trained = zoo.column(split, "test_accuracy")[self.rows]
        self.is_new = _new_sets(self.classes, [zoo.classes("train")[int(row)] for row in train_rows])
        self.distance = self._distances(prompter.codec, known, zoo.stacked(split, self.rows))

    def _distances(
        self, codec: Codec, known: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor]
    ) -> dict[str, float]:
        """Mean distance to the nearest train network, in normalised weights."""
        mask = codec.layout.value_mask
        train = codec.tokens(known)[:, mask]
        sets = {"prompted": self.starts["prompted"].tensors, "trained": trained}
        return {
            name: float(nearest_distances(codec.tokens(tensors)[:, mask], train).mean())
            for name, tensors in sets.items()
        }

    def own_labels(self, images: str, outputs: torch.Tensor) -> torch.Tensor:
        """Labels `(tasks, images)` of a split of the images, as the outputs of the networks stand for them."""
        own = self.zoo.labels(images, self.split, self.rows)
        moved = outputs.gather(1, own.clamp(min=0))
        return torch.where(own == OTHER_CLASS, own, moved)

    def curve(self, method: str, data: str, learning_rate: float) -> np.ndarray:
        """Accuracy on the split's images `(epochs + 1, tasks)` while a method's networks are fine-tuned."""
        start = self.starts[method]
        labels = self.own_labels("train", start.outputs)
        known = [(own != OTHER_CLASS).nonzero().flatten() for own in labels]
        # networks that train at once need as many images each
        subsets = self.samples if data == "samples" else torch.stack(_shuffled(known, self.args.seed))
        stages = train_networks(
            self.module,
            start.tensors,
            self.task.images["train"],
            labels,
            learning_rate=learning_rate,
            epochs=self.args.finetune_epochs,
            batch_size=SAMPLES_BATCH if data == "samples" else self.args.finetune_batch_size,
            generator=torch.Generator().manual_seed(self.args.seed),
            subsets=subsets,
        )
        images, wanted = self.task.images[self.split], self.own_labels(self.split, start.outputs)
        # images of other classes, which are not counted, fill up where a task has fewer than another
        most = int((wanted != OTHER_CLASS).sum(1).max())
        rows = (wanted == OTHER_CLASS).int().argsort(dim=1, stable=True)[:, :most]
        return np.stack([evaluate(self.module, stacked, images, wanted, subsets=rows).accuracy for stacked in stages])


def _cut(rows: list[torch.Tensor], numbers: list[torch.Tensor]) -> list[torch.Tensor]:
    """Prompts with as many samples of each class as all have."""
    fewest = min(int(found.bincount().min()) for found in numbers)
    return [
        torch.cat([own[found == number][:fewest] for number in range(int(found.max()) + 1)])
        for own, found in zip(rows, numbers, strict=True)
    ]


def _shuffled(known: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """As many rows of each task, those left out chosen at random."""
    generator, fewest = torch.Generator().manual_seed(seed), min(map(len, known))
    return [rows[torch.randperm(len(rows), generator=generator)[:fewest]] for rows in known]


def _new_sets(classes: Sequence[tuple[int, ...]], known: Sequence[tuple[int, ...]]) -> np.ndarray:
    """`(tasks,)` bool: no train network knows these classes together, in whatever order."""
    sets = {frozenset(chosen) for chosen in known}
    return np.array([frozenset(chosen) not in sets for chosen in classes])


def _best_curves(args: PromptArguments, comparisons: Mapping[str, _Comparison], data: str) -> dict[str, np.ndarray]:
    """For each method the test tasks' accuracies `(epochs + 1, tasks)`, at each epoch with the rate best on validation tasks."""
    found = {}
    for method in tqdm(METHODS, desc=f"fine-tune on {DATA[data]}", unit="method"):
        curves = {
            split: np.stack([one.curve(method, data, rate) for rate in args.finetune_learning_rates])
            for split, one in comparisons.items()
        }  # (rates, epochs + 1, tasks)
        best = curves["validation"].mean(2).argmax(0)
        found[method] = curves["test"][best, np.arange(len(best))]
    return found


def _figures(test: _Comparison, curves: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """What `results.json` holds: by data and method means, standard deviations over tasks, and means of new sets of classes."""
    results: dict[str, Any] = {
        "tasks": len(test.classes),
        "tasks_of_new_sets": int(test.is_new.sum()),
        "trained_accuracy": float(test.trained.mean()),
        "nearest_train_distance": test.distance,
    }
    for data, found in curves.items():
        results[data] = {
            method: {
                "accuracy": curve.mean(1).tolist(),
                "std": curve.std(1).tolist(),
                "accuracy_new_sets": curve[:, test.is_new].mean(1).tolist() if test.is_new.any() else None,
            }
            for method, curve in found.items()
        }
    return results


def table(results: Mapping[str, Any]) -> str:
    """Markdown table of what `results.json` holds under `prompt`."""
    last = len(results["train"]["scratch"]["accuracy"]) - 1
    epochs = [epoch for epoch in SHOWN_EPOCHS if epoch <= last]
    lines = [f"| start | {' | '.join(f'epoch {epoch}' for epoch in epochs)} |", "|---|" + "---|" * len(epochs)]
    for data, text in DATA.items():
        lines.append(f"| *fine-tuned on {text}* |" + " |" * len(epochs))
        for method, name in METHODS.items():
            cells = (f"{results[data][method]['accuracy'][epoch]:.3f}" for epoch in epochs)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _card(args: PromptArguments, prompter: Prompter, results: Mapping[str, Any]) -> str:
    settings = public_settings(asdict(args))
    hidden = ("prompt", "count", "on_error")
    rows = "\n".join(
        f"| `{key}` | {value} |" for key, value in settings.items() if key not in hidden and value is not None
    )
    distance = results["nearest_train_distance"]
    return f"""# Data prompt for {prompter.config.num_classes} classes of {public_name(prompter.task)}

Makes a network (`{prompter.architecture}` with `{json.dumps(prompter.architecture_kwargs)}`) of some labelled samples of a task,
without training it:

```bash
sane prompt --prompt FOLDER --task 'digits[3,1,4,5]' --output-dir runs/prompted
```

```python
from hub_scripts.generation.prompts import Prompter

prompter = Prompter.from_pretrained("FOLDER")
tensors = prompter(images, labels)  # (prompts, samples, channels, height, width) and (prompts, samples)
```

Accuracy on test images, mean over the tasks of the {results["tasks"]} networks of the test split of `{public_name(args.zoo)}`. Each task
is {prompter.config.num_classes} classes in an order that no train network has and that training never drew; {results["tasks_of_new_sets"]}
are sets of classes that no train network knows in any order. Each class alone was seen in training. Prompts hold {args.shots} training
images of each class. The networks that were trained on these tasks reach {results["trained_accuracy"]:.3f}. Learning rates of
fine-tuning are chosen for each method and epoch on the tasks of validation networks.

{table(results)}

Distance to the nearest train network in normalised weights: {distance["prompted"]:.1f} prompted, {distance["trained"]:.1f} the test
networks themselves.

| setting | value |
|---|---|
{rows}
"""


# --- use


def make_networks(args: PromptArguments) -> dict[str, Any]:
    """Make networks for one task; returns what `results.json` holds under `prompted`."""
    with new_folder(args.output_dir) as folder:
        prompter, task = Prompter.from_pretrained(args.prompt), load_task(args.task)
        generator = np.random.default_rng([args.seed, 2])
        train, classes = task.labels["train"], range(task.num_classes)
        drawn = [draw_samples(train, classes, args.shots, generator) for _ in range(args.count)]
        rows = torch.stack([found for found, _ in drawn])
        tensors = prompter(task.images["train"][rows], torch.stack([numbers for _, numbers in drawn]))
        module = prompter.module
        accuracies = {
            split: evaluate(module, tensors, task.images[split], task.labels[split]).accuracy
            for split in ("validation", "test")
        }
        results = {
            "accuracy_mean": float(accuracies["test"].mean()),
            "accuracy_std": float(accuracies["test"].std()),
            "accuracy_best_on_validation": float(accuracies["test"][accuracies["validation"].argmax()]),
            "count": args.count,
        }
        info = {
            "architecture": prompter.architecture,
            "architecture_kwargs": json.dumps(prompter.architecture_kwargs),
            "task": args.task,
            "arguments": public_settings(asdict(args)) | {"prompt": public_name(args.prompt)},
            "sets": {
                SET: [
                    {"file": f"{SET}/{i:03d}.safetensors", "test_accuracy": float(value)}
                    for i, value in enumerate(accuracies["test"])
                ]
            },
        }
        save_networks(folder / NETWORKS_FOLDER, {SET: tensors}, info)
        write_json(folder / "results.json", {"prompted": results, "task": task.name, "arguments": asdict(args)})
    return results


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane prompt`."""
    args = parse_arguments(PromptArguments, argv, PROGRAM)

    def command(args: PromptArguments) -> None:
        if args.zoo:
            results = train_prompt(args)
            print(table(results))
            print(f"networks trained on these tasks: {results['trained_accuracy']:.3f}; prompt in {args.output_dir}")
        else:
            results = make_networks(args)
            networks = Path(args.output_dir) / NETWORKS_FOLDER / SET
            print(
                f"{results['count']} networks, test accuracy {results['accuracy_mean']:.3f} without training, "
                f"{results['accuracy_best_on_validation']:.3f} the best on validation images; in {networks}"
            )

    run_command(command, args, PROGRAM)


if __name__ == "__main__":
    main()
