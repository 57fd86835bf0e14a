"""Train a population of small networks and write it as a zoo, aligned and split by model."""

import itertools
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.evaluation.functional import build_module
from hub_scripts.outputs import new_folder, write_json
from hub_scripts.zoos.cards import zoo_card
from hub_scripts.zoos.population import INITIALISATIONS, Member, Snapshot, train_population
from hub_scripts.zoos.schema import ZOO_FILE, ZOO_FORMAT, features, weights_to_bytes, write_split
from hub_scripts.zoos.tasks import SPLITS, load_task
from tokenization_sane import SaneWeightTokenizer, SymmetrySpec, WeightMatcher, find_symmetries, weight_distance

PROGRAM = "sane build-zoo"
SPLIT_SHARES = (0.7, 0.15, 0.15)


@dataclass
class BuildZooArguments:
    """Train a population of small networks at once and write them as a model zoo (a Hugging Face dataset).

    Example:
      sane build-zoo --output-dir runs/zoo --num-models 128 --epochs 10
      python -c "from datasets import load_dataset; print(load_dataset('runs/zoo'))"
    """

    output_dir: str = field(metadata={"help": "Folder of the zoo; must not exist yet."})
    task: str = field(
        default="digits", metadata={"help": "What the networks learn: 'digits' (in scikit-learn, 8x8 images)."}
    )
    architecture: str = field(
        default="hub_scripts.zoos.architectures:SmallCNN",
        metadata={"help": "The networks, as 'package.module:Callable'."},
    )
    architecture_kwargs: str = field(default="{}", metadata={"help": "Its keyword arguments, as JSON."})
    num_models: int = field(default=128, metadata={"help": "Networks to train."})
    epochs: int = field(
        default=10, metadata={"help": "Passes over the training images; a checkpoint is kept at epochs 0, 1, ..."}
    )
    batch_size: int = field(default=32, metadata={"help": "Images in a training step."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 2e-3, 5e-3, 1e-2], metadata={"help": "AdamW learning rates to sweep over."}
    )
    weight_decays: list[float] = field(
        default_factory=lambda: [0.0, 1e-1], metadata={"help": "AdamW weight decays to sweep over."}
    )
    initialisations: list[str] = field(
        default_factory=lambda: [*INITIALISATIONS],
        metadata={"help": f"Initialisations to sweep over: {', '.join(INITIALISATIONS)}."},
    )
    seed: int = field(default=0, metadata={"help": "Of initial weights, order of images, and splits."})

    def __post_init__(self):
        if self.num_models < 3:
            raise ValueError(f"--num-models is {self.num_models}, expected at least 3: one for each split.")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("--epochs and --batch-size must be at least 1.")
        for name in ("learning_rates", "weight_decays", "initialisations"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} is empty, expected at least one value.")
        unknown = set(self.initialisations) - set(INITIALISATIONS)
        if unknown:
            raise ValueError(
                f"--initialisations {unknown.pop()} is not known, expected some of {', '.join(INITIALISATIONS)}."
            )


def build_zoo(args: BuildZooArguments) -> dict[str, Any]:
    """Train, align, split and write; returns what `zoo.json` holds."""
    with new_folder(args.output_dir) as folder:
        started = time.perf_counter()
        task = load_task(args.task)
        module = build_module(args.architecture, json.loads(args.architecture_kwargs))
        layout = SaneWeightTokenizer().layout(module)
        spec = find_symmetries(module, task.images["train"][:2])
        members = _members(args)
        snapshots = list(
            tqdm(
                train_population(module, members, task, args.epochs, args.batch_size, args.seed),
                total=args.epochs + 1,
                desc=f"train {len(members)} networks",
                unit="epoch",
            )
        )
        seconds_train = time.perf_counter() - started
        splits = _split_models(len(members), args.seed)
        reference = _reference(snapshots[-1], splits["train"])
        alignment = _align(snapshots, reference, spec)
        seconds_align = time.perf_counter() - started - seconds_train
        info = {
            "format": ZOO_FORMAT,
            "task": args.task,
            "pixel_mean": task.pixel_mean,
            "pixel_std": task.pixel_std,
            "num_models": len(members),
            "num_checkpoints": len(members) * len(snapshots),
            "alignment_reference": members[reference].model_id,
            "seconds_train": round(seconds_train, 2),
            "seconds_align": round(seconds_align, 2),
            "arguments": {k: v for k, v in asdict(args).items() if k != "output_dir"},
        }
        rows = {
            split: _rows(args, members, snapshots, models, alignment, reference, layout)
            for split, models in splits.items()
        }
        columns = features(members[0].hparams)
        for split in SPLITS:
            write_split(folder, split, rows[split], columns)
        write_json(folder / "layouts" / f"{layout.fingerprint}.json", layout.to_dict())
        write_json(folder / "symmetries" / f"{layout.fingerprint}.json", json.loads(spec.to_json()))
        write_json(folder / ZOO_FILE, info)
        (folder / "README.md").write_text(zoo_card(Path(args.output_dir).name, rows, info), encoding="utf-8")
    return info


def _members(args: BuildZooArguments) -> list[Member]:
    """The sweep: every combination of settings in turn, each network with its own seed, equal settings side by side."""
    sweep = list(itertools.product(args.learning_rates, args.weight_decays, args.initialisations))
    chosen = sorted(i % len(sweep) for i in range(args.num_models))
    members = []
    for number, place in enumerate(chosen):
        learning_rate, weight_decay, initialisation = sweep[place]
        hparams = {
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "initialisation": initialisation,
            "seed": args.seed * 1_000_003 + number,
        }
        members.append(Member(f"model-{number:05d}", hparams))
    return members


def _split_models(count: int, seed: int) -> dict[str, list[int]]:
    """Models of each split, drawn at random; each split gets at least one."""
    order = np.random.default_rng(seed).permutation(count)
    held_out = [max(1, round(share * count)) for share in SPLIT_SHARES[1:]]
    ends = np.cumsum([count - sum(held_out), *held_out])
    parts = np.split(order, ends[:-1])
    return {split: sorted(part.tolist()) for split, part in zip(SPLITS, parts, strict=True)}


def _reference(last: Snapshot, train: list[int]) -> int:
    """The model to align to: the best of the train split, by validation accuracy."""
    return train[int(last.metrics["validation_accuracy"][train].argmax())]


def _align(snapshots: list[Snapshot], reference: int, spec: SymmetrySpec) -> list[dict[str, Any]]:
    """Match each model's last checkpoint to the reference; all its checkpoints get the same permutation.

    One permutation for a whole run keeps the run continuous, and matching a trained checkpoint means more than matching
    an initial one. The snapshots' tensors are permuted in place.
    """
    last = snapshots[-1].tensors
    target = {name: tensor[reference] for name, tensor in last.items()}
    spec = spec.of_kind("permutation", "sign")  # scales would change the values that statistics are made of
    matcher = WeightMatcher(spec, target)
    alignment = []
    for number in tqdm(range(len(next(iter(last.values())))), desc="align", unit="network"):
        draw = matcher.match({name: tensor[number] for name, tensor in last.items()})
        for snapshot in snapshots:
            before = {name: tensor[number] for name, tensor in snapshot.tensors.items()}
            after = spec.apply(before, draw)
            distances = {
                "alignment_distance_before": weight_distance(before, target),
                "alignment_distance_after": weight_distance(after, target),
            }
            for name, tensor in snapshot.tensors.items():
                tensor[number] = after[name]
            alignment.append({"epoch": snapshot.epoch, "model": number, "draw": draw, **distances})
    return alignment


def _rows(args, members, snapshots, models, alignment, reference, layout) -> list[dict[str, Any]]:
    """The rows of one split, by model and then by epoch."""
    aligned = {(entry["model"], entry["epoch"]): entry for entry in alignment}
    rows = []
    for model, snapshot in itertools.product(models, snapshots):
        member, entry = members[model], aligned[model, snapshot.epoch]
        metrics = {name: float(values[model]) for name, values in snapshot.metrics.items()}
        rows.append(
            {
                "model_id": member.model_id,
                "epoch": snapshot.epoch,
                "layout_id": layout.fingerprint,
                "architecture": args.architecture,
                "architecture_kwargs": args.architecture_kwargs,
                "weights": weights_to_bytes({name: tensor[model] for name, tensor in snapshot.tensors.items()}),
                **metrics,
                "generalization_gap": metrics["train_accuracy"] - metrics["test_accuracy"],
                **{f"hparams_{name}": value for name, value in member.hparams.items()},
                "alignment_reference": members[reference].model_id,
                "alignment_distance_before": entry["alignment_distance_before"],
                "alignment_distance_after": entry["alignment_distance_after"],
                "alignment_permutations": [value.long().tolist() for value in entry["draw"]],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane build-zoo`."""
    args = parse_arguments(BuildZooArguments, argv, PROGRAM)

    def command(args: BuildZooArguments) -> None:
        info = build_zoo(args)
        print(f"{info['num_models']} networks, {info['num_checkpoints']} checkpoints in {args.output_dir}")

    run_command(command, args, PROGRAM)


if __name__ == "__main__":
    main()
