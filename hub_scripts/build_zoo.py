"""Train a population of small networks and write it as a zoo, aligned and split by model."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.evaluation.functional import OPTIMIZERS, plain_logits, trains_one_by_one
from hub_scripts.outputs import claim_folder, new_folder, release_folder, require_empty
from hub_scripts.symmetries import cached_symmetries
from hub_scripts.zoos.alignment import ZooAligner
from hub_scripts.zoos.lineage import Lineage
from hub_scripts.zoos.population import (
    INITIALISATIONS,
    Training,
    build_network,
    one_thread,
    read_checkpoint,
    read_group,
    train_groups,
)
from hub_scripts.zoos.schema import HPARAM, ZOO_FILE, column_types
from hub_scripts.zoos.splits import split_models
from hub_scripts.zoos.sweep import SWEEPS, Member, draw_classes, draw_members, make_groups, num_combinations
from hub_scripts.zoos.tasks import Task, load_task
from hub_scripts.zoos.writer import ZooWriter
from tokenization_sane import CheckpointLayout, SaneWeightTokenizer, SymmetrySpec

PROGRAM = "sane build-zoo"
MODELS_PER_BATCH = 64
ONE_BY_ONE_PER_BATCH = 8  # nothing is gained by more, and a killed build loses what its groups have begun
NOT_IN_ARGUMENTS = ("output_dir", "num_workers")  # what the networks do not depend on


@dataclass
class BuildZooArguments:
    r"""Train a population of networks with swept settings and write them as a model zoo (a Hugging Face dataset).

    Killed and started again with the same flags, it goes on; finished groups of networks stay in .NAME.parts beside the zoo.

    Example:
      sane build-zoo --output-dir runs/zoo --num-models 128 --epochs 10
      sane build-zoo --output-dir runs/fashion --task idx:/usr/share/datasets/fashion-mnist \
          --architecture hub_scripts.zoos.architectures:ModelZooCNN --num-models 1000 --batch-size 128 --epochs 25 \
          --keep-epochs 0 1 2 5 10 15 20 25 --sweep random --sweep-architecture '{"activation": ["tanh", "relu", "gelu"]}' \
          --dropouts 0 0.2 --data-fractions 0.5 1 --num-workers 2
      sane build-zoo --output-dir runs/tasks --classes-per-network 4 --num-models 210 --epochs 12 --sweep random
    The second one trains a thousand CNNs on Fashion-MNIST (apt-get install dataset-fashion-mnist), the third one networks of
    many tasks, for `sane prompt`.
    """

    output_dir: str = field(metadata={"help": "Folder of the zoo; must not exist yet."})
    task: str = field(
        default="digits",
        metadata={
            "help": "What the networks learn: digits (in scikit-learn, 8x8 images), idx:DIR (IDX files, as MNIST and "
            "Fashion-MNIST come) or dataset:NAME[@CONFIG] (images and labels that datasets.load_dataset reads)."
        },
    )
    architecture: str = field(
        default="hub_scripts.zoos.architectures:SmallCNN",
        metadata={
            "help": "The networks, as 'package.module:Callable' or 'transformers:ResNetForImageClassification'."
        },
    )
    architecture_kwargs: str = field(default="{}", metadata={"help": "Its keyword arguments, as JSON."})
    num_models: int = field(default=128, metadata={"help": "Networks to train."})
    epochs: int = field(default=10, metadata={"help": "Passes over the training images."})
    keep_epochs: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={"help": "Epochs at which checkpoints are kept: all, last, or numbers; 0 is before training."},
    )
    batch_size: int = field(default=32, metadata={"help": "Images in a training step."})
    sweep: str = field(
        default="grid",
        metadata={
            "help": "grid: every combination of the settings below in turn; random: each network draws each setting."
        },
    )
    sweep_architecture: str = field(
        default="{}",
        metadata={
            "help": 'Arguments of the architecture to sweep over, as JSON: \'{"activation": ["tanh", "relu"]}\'.'
        },
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 2e-3, 5e-3, 1e-2], metadata={"help": "Learning rates to sweep over."}
    )
    weight_decays: list[float] = field(
        default_factory=lambda: [0.0, 1e-1], metadata={"help": "Weight decays to sweep over."}
    )
    initialisations: list[str] = field(
        default_factory=lambda: ["kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"],
        metadata={"help": f"Initialisations to sweep over: {', '.join(INITIALISATIONS)}."},
    )
    optimizers: list[str] = field(
        default_factory=lambda: ["adamw"],
        metadata={"help": f"Optimizers to sweep over: {', '.join(OPTIMIZERS)} (the last with momentum 0.9)."},
    )
    dropouts: list[float] = field(
        default_factory=list,
        metadata={"help": "Values of the architecture's argument dropout to sweep over; empty leaves it alone."},
    )
    data_fractions: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Shares of the training images to sweep over; each network draws its own images."},
    )
    label_noises: list[float] = field(
        default_factory=lambda: [0.0],
        metadata={"help": "Shares of a network's training images with a wrong label to sweep over."},
    )
    classes_per_network: int | None = field(
        default=None,
        metadata={
            "help": "Give each network so many classes of the task, drawn and ordered for it (column hparams_classes, as 3-1-4-5): it "
            "learns these alone, and its figures are of these; networks of the validation and test splits have orders that "
            "no train network has. num_classes (num_labels for transformers) follows. By default all know all classes."
        },
    )
    models_per_batch: int | None = field(
        default=None,
        metadata={
            "help": f"Networks that train together, and that a killed build has to train again: {MODELS_PER_BATCH} by default, "
            f"{ONE_BY_ONE_PER_BATCH} where convolutions are so large that they are faster one after another."
        },
    )
    num_workers: int = field(
        default=0,
        metadata={
            "help": "Processes that train, each on one core; 0 trains in this one, also on one core. The networks do not "
            "depend on it."
        },
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the weights, as the Hub calls it: mit."})
    seed: int = field(default=0, metadata={"help": "Of initial weights, settings, order of images, and splits."})

    def __post_init__(self):
        if self.num_models < 3:
            raise ValueError(f"--num-models is {self.num_models}, expected at least 3: one for each split.")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("--epochs and --batch-size must be at least 1.")
        if self.num_workers < 0 or self.seed < 0 or (self.models_per_batch is not None and self.models_per_batch < 1):
            raise ValueError("--num-workers and --seed must not be negative, and --models-per-batch at least 1.")
        if self.classes_per_network is not None and self.classes_per_network < 2:
            raise ValueError(f"--classes-per-network is {self.classes_per_network}, expected at least 2.")
        for name, values in self.settings().items():
            if not values:
                raise ValueError(f"--{name.replace('_', '-')}s is empty, expected at least one value.")
        for name, values, known in (
            ("initialisations", self.initialisations, INITIALISATIONS),
            ("optimizers", self.optimizers, OPTIMIZERS),
            ("sweep", [self.sweep], SWEEPS),
        ):
            unknown = [value for value in values if value not in known]
            if unknown:
                raise ValueError(f"--{name} {unknown[0]} is not known, expected some of {', '.join(known)}.")
        for name in ("learning_rates", "weight_decays", "dropouts", "data_fractions", "label_noises"):
            text = [value for value in getattr(self, name) if not isinstance(value, int | float)]
            if text:  # in a YAML file, 1e-3 is text
                raise ValueError(f"--{name.replace('_', '-')} holds {text[0]!r}, expected numbers such as 1.0e-3.")
        if not all(0 < share <= 1 for share in self.data_fractions):
            raise ValueError("--data-fractions must be above 0 and at most 1.")
        if not all(0 <= share <= 1 for share in [*self.label_noises, *self.dropouts]):
            raise ValueError("--label-noises and --dropouts must be from 0 to 1.")
        # these refuse what they cannot read
        self.kept_epochs()
        self.kwargs()
        self.swept_kwargs()

    def kept_epochs(self) -> tuple[int, ...]:
        """The epochs at which checkpoints are kept, ascending."""
        words = [str(word) for word in self.keep_epochs]
        if words in (["all"], ["last"]):
            return tuple(range(self.epochs + 1)) if words == ["all"] else (self.epochs,)
        if not words or not all(word.isdigit() and int(word) <= self.epochs for word in words):
            raise ValueError(
                f"--keep-epochs is {' '.join(words) or 'empty'}, expected all, last, or numbers from 0 to {self.epochs}."
            )
        return tuple(sorted({int(word) for word in words}))

    def kwargs(self) -> dict[str, Any]:
        """The architecture's arguments that all networks share."""
        given = _json_object(self.architecture_kwargs, "--architecture-kwargs", '{"hidden_size": 20}')
        if self.classes_per_network is None:
            return given
        name = "num_labels" if self.architecture.startswith("transformers:") else "num_classes"
        return {name: self.classes_per_network, **given}

    def swept_kwargs(self) -> dict[str, list[Any]]:
        """The architecture's arguments that are swept over, with their values."""
        swept = _json_object(self.sweep_architecture, "--sweep-architecture", '{"activation": ["tanh", "relu"]}')
        for name, values in swept.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"--sweep-architecture: {name} is {values!r}, expected a list of its values.")
        taken = [n for n in swept if n in (*self.settings(), "seed", "classes") or (n == "dropout" and self.dropouts)]
        if taken:
            raise ValueError(f"--sweep-architecture: {taken[0]} has a flag of its own, leave it out.")
        return swept | ({"dropout": self.dropouts} if self.dropouts else {})

    def settings(self) -> dict[str, list[Any]]:
        """What else is swept over, with its values."""
        return {
            "learning_rate": self.learning_rates,
            "weight_decay": self.weight_decays,
            "initialisation": self.initialisations,
            "optimizer": self.optimizers,
            "data_fraction": self.data_fractions,
            "label_noise": self.label_noises,
        }


def _json_object(text: str, flag: str, example: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} is no JSON: {error}; expected for instance '{example}'.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{flag} is {text}, expected names and values, for instance '{example}'.")
    return found


def build_zoo(args: BuildZooArguments) -> dict[str, Any]:
    """Train, align, split and write; returns what `zoo.json` holds."""
    target = Path(args.output_dir)
    work = target.with_name(f".{target.name}.parts")
    if (target / ZOO_FILE).is_file():  # a build was killed when only this was left to do
        shutil.rmtree(work, ignore_errors=True)
    require_empty(target)
    with one_thread():
        task = load_task(args.task)
        members = draw_members(
            args.settings(), args.swept_kwargs(), args.kwargs(), args.num_models, args.sweep, args.seed
        )
        column_types((member.model_id, member.hparams) for member in members)  # refuses settings that do not mix
        splits = {
            members[i].model_id: split
            for split, numbers in split_models(len(members), args.seed).items()
            for i in numbers
        }
        if args.classes_per_network is not None:
            if args.classes_per_network > task.num_classes:
                raise ValueError(
                    f"--classes-per-network is {args.classes_per_network}, but {args.task} has {task.num_classes} classes."
                )
            members = draw_classes(members, splits, task.num_classes, args.classes_per_network, args.seed)
        kinds = _find_kinds(args, members, splits, task)
        sizes = {kwargs: args.models_per_batch or kind.models_per_batch for kwargs, kind in kinds.items()}
        groups = {
            work / f"group-{number:05d}": group for number, group in enumerate(make_groups(members, sizes.__getitem__))
        }
        with _claim(work, args):
            _train(args, groups, task)
            with new_folder(target) as folder:
                info = _assemble(args, folder, groups, splits, kinds, task)
            shutil.rmtree(work)
    return info


@contextmanager
def _claim(work: Path, args: BuildZooArguments) -> Iterator[None]:
    """Make the folder of finished groups this build's, or go on with it; nothing is left if no group was finished.

    Raises:
        ValueError: If it was begun with other settings, or another process is at it.
    """
    work.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process is building {args.output_dir}; wait for it, or end it.") from error
    try:
        leave_out = (*NOT_IN_ARGUMENTS, "license")
        settings = {k.replace("_", "-"): v for k, v in asdict(args).items() if k not in leave_out}
        claim_folder(work, "build-zoo", settings)
        try:
            yield
        finally:
            if work.is_dir():
                release_folder(work)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


# --- what kinds of networks there are


@dataclass(frozen=True)
class _Kind:
    """Networks with the same arguments of their architecture."""

    layout: CheckpointLayout
    spec: SymmetrySpec  # what holds for all networks of this layout, whatever their arguments
    models_per_batch: int


def _find_kinds(
    args: BuildZooArguments, members: Sequence[Member], splits: Mapping[str, str], task: Task
) -> dict[str, _Kind]:
    """Build, run and analyse one network for each set of arguments, before hours are spent on training; by their JSON.

    Raises:
        ValueError: If one cannot be built, does not fit the task, or has no network in the train split to align to.
    """
    kinds: dict[str, _Kind] = {}
    distinct = {member.architecture_kwargs: member for member in members}
    for text, member in tqdm(distinct.items(), desc="symmetries", unit="kind", disable=len(distinct) < 10):
        module = build_network(args.architecture, member.kwargs, args.seed)
        _check_fits(args, module, member.kwargs, task)
        alone = trains_one_by_one(module, task.images["train"][:1], args.batch_size)
        layout = SaneWeightTokenizer().layout(module)
        kinds[text] = _Kind(
            layout,
            cached_symmetries(module, layout, task.images["train"][:2]),
            ONE_BY_ONE_PER_BATCH if alone else MODELS_PER_BATCH,
        )
    in_train = {
        kinds[member.architecture_kwargs].layout.fingerprint
        for member in members
        if splits[member.model_id] == "train"
    }
    for text, kind in kinds.items():
        if kind.layout.fingerprint not in in_train:
            raise ValueError(
                f"of the networks with {text} and their like none is in the train split, to align the others to; give more "
                "--num-models, fewer shapes in --sweep-architecture, or another --seed."
            )
    return {text: replace(kind, spec=_common(kind, kinds.values())) for text, kind in kinds.items()}


def _common(kind: _Kind, kinds: Iterable[_Kind]) -> SymmetrySpec:
    """Symmetries that all kinds of this layout have: a zoo keeps one file a layout, but signs hold for tanh and not for ReLU."""
    alike = [other.spec.groups for other in kinds if other.layout.fingerprint == kind.layout.fingerprint]
    return replace(
        kind.spec, groups=tuple(group for group in kind.spec.groups if all(group in groups for groups in alike))
    )


@torch.no_grad()
def _check_fits(args: BuildZooArguments, module: nn.Module, kwargs: Mapping[str, Any], task: Task) -> None:
    config = getattr(module, "config", None)  # of transformers' models, which take any argument
    unknown = [] if config is None else [name for name in kwargs if not hasattr(type(config)(), name)]
    if unknown:
        raise ValueError(f"{args.architecture} does not know the argument {unknown[0]!r}.")
    shape = " x ".join(map(str, task.images["train"].shape[1:]))
    try:
        output = module.eval()(task.images["train"][:2])
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{args.architecture} with {json.dumps(kwargs)} cannot read the images of {args.task}, which are {shape}: "
            f"{str(error).splitlines()[0]}. Say so in --architecture-kwargs, for instance with image_size."
        ) from error
    logits = plain_logits(output)
    expected = args.classes_per_network or task.num_classes
    if logits.dim() != 2 or logits.shape[1] < expected:
        raise ValueError(
            f"{args.architecture} with {json.dumps(kwargs)} gives an output of shape {tuple(logits.shape)} for 2 images, expected "
            f"(2, {expected}); give num_classes (num_labels for transformers) in --architecture-kwargs."
        )


# --- training


def _train(args: BuildZooArguments, groups: Mapping[Path, Sequence[Member]], task: Task) -> None:
    """Train the groups that are not done yet."""
    kept = args.kept_epochs()
    combinations = num_combinations(args.settings(), args.swept_kwargs())
    if args.sweep == "grid" and combinations > args.num_models:
        print(
            f"{args.num_models} networks take the first {args.num_models} of {combinations} combinations of settings; "
            "--sweep random draws from all."
        )
    training = Training(args.architecture, args.task, kept, args.batch_size, args.seed)
    done = sum(len(group) for folder, group in groups.items() if folder.exists())
    with tqdm(
        total=args.num_models * kept[-1],
        initial=done * kept[-1],
        desc=f"train {args.num_models} networks",
        unit="model-epoch",
    ) as bar:

        def report(networks: int, accuracy: float | None) -> None:
            bar.update(networks)
            if accuracy is not None:
                bar.set_postfix(validation_accuracy=f"{accuracy:.3f}")

        left = {folder: group for folder, group in groups.items() if not folder.exists()}
        if left:
            train_groups(left, training, task, args.num_workers, report)


# --- the zoo


@dataclass(frozen=True)
class _Run:
    """A trained network: what it is and what was measured."""

    member: Member
    kind: _Kind
    split: str
    folder: Path  # of its group
    place: int  # in its group
    metrics: dict[int, dict[str, float | None]]  # by epoch

    def read(self, epoch: int) -> dict[str, torch.Tensor]:
        """Weights as they were trained."""
        return read_checkpoint(self.folder, self.place, epoch)

    def properties(self, epoch: int) -> dict[str, Any]:
        """Columns that differ from zoo to zoo."""
        metrics = self.metrics[epoch]
        return {
            **metrics,
            "generalization_gap": metrics["train_accuracy"] - metrics["test_accuracy"],
            **{f"{HPARAM}{name}": value for name, value in self.member.hparams.items()},
        }


def _assemble(
    args: BuildZooArguments,
    folder: Path,
    groups: Mapping[Path, Sequence[Member]],
    splits: Mapping[str, str],
    kinds: Mapping[str, _Kind],
    task: Task,
) -> dict[str, Any]:
    """Align and write the checkpoints one by one; memory holds their figures."""
    started = time.perf_counter()
    runs, seconds_train = _read_runs(groups, splits, kinds)
    skipped = [
        f"{run.member.model_id} from epoch {min(missing)}: its weights are not finite"
        for run in runs
        if (missing := set(args.kept_epochs()) - set(run.metrics))
    ]
    runs = [run for run in runs if run.metrics]
    aligners = _choose_references(runs)
    types = column_types((run.member.model_id, run.properties(epoch)) for run in runs for epoch in run.metrics)
    counts = Counter(run.split for run in runs for _ in run.metrics)
    writer, lineage = ZooWriter(folder, types, counts), Lineage()
    for kind in kinds.values():
        writer.add_layout(kind.layout, kind.spec)
    for run in tqdm(runs, desc="align", unit="network"):
        _write_run(args, run, aligners[run.kind.layout.fingerprint], writer, lineage)
    references = {layout_id: aligner.reference_id for layout_id, aligner in aligners.items()}
    info = {
        "task": args.task,
        "pixel_mean": task.pixel_mean,
        "pixel_std": task.pixel_std,
        "classes_per_network": args.classes_per_network,
        "license": args.license,
        "num_models": len(runs),
        "num_checkpoints": sum(counts.values()),
        "skipped": skipped,
        "alignment_reference": references if len(references) > 1 else next(iter(references.values())),
        "seconds_train": round(seconds_train, 2),
        "seconds_align": round(time.perf_counter() - started, 2),
        "arguments": {k: v for k, v in asdict(args).items() if k not in NOT_IN_ARGUMENTS},
    }
    return writer.finish(Path(args.output_dir).name, info, lineage.report())


def _read_runs(
    groups: Mapping[Path, Sequence[Member]], splits: Mapping[str, str], kinds: Mapping[str, _Kind]
) -> tuple[list[_Run], float]:
    """All networks and their figures, and the seconds of training, those of processes side by side added up."""
    runs, seconds = [], 0.0
    for folder, members in groups.items():
        found, took = read_group(folder)
        seconds += took
        for place, (member, metrics) in enumerate(zip(members, found, strict=True)):
            kind = kinds[member.architecture_kwargs]
            runs.append(_Run(member, kind, splits[member.model_id], folder, place, metrics))
    return runs, seconds


def _choose_references(runs: Sequence[_Run]) -> dict[str, ZooAligner]:
    """For each layout, align to the network of the train split whose last checkpoint is best on the validation images."""
    best: dict[str, tuple[float, _Run]] = {}
    for run in runs:
        quality = run.metrics[max(run.metrics)]["validation_accuracy"]
        layout_id = run.kind.layout.fingerprint
        if run.split == "train" and (layout_id not in best or quality > best[layout_id][0]):
            best[layout_id] = quality, run
    without = [run for run in runs if run.kind.layout.fingerprint not in best]
    if without or not runs:
        raise ValueError(
            "the weights of all networks of the train split "
            + (f"with the shape of {without[0].member.model_id} " if without else "")
            + "became infinite in training; build the zoo again with smaller --learning-rates."
        )
    return {
        layout_id: ZooAligner(run.kind.spec, run.member.model_id, run.read(max(run.metrics)))
        for layout_id, (_, run) in best.items()
    }


def _write_run(args: BuildZooArguments, run: _Run, aligner: ZooAligner, writer: ZooWriter, lineage: Lineage) -> None:
    """The rows of one network, by epoch."""
    last = run.read(max(run.metrics))
    draw = aligner.match(last)
    for epoch in sorted(run.metrics):
        aligned, alignment = aligner.apply(run.read(epoch), draw)
        row = {
            "model_id": run.member.model_id,
            "epoch": epoch,
            "layout_id": run.kind.layout.fingerprint,
            "architecture": args.architecture,
            "architecture_kwargs": run.member.architecture_kwargs,
            **run.properties(epoch),
            **alignment,
        }
        lineage.add_checkpoint(f"{run.member.model_id} epoch {epoch}", writer.add(run.split, row, aligned))
    lineage.add_model(run.member.model_id, run.split, run.kind.layout.fingerprint, last)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane build-zoo`."""
    args = parse_arguments(BuildZooArguments, argv, PROGRAM)

    def command(args: BuildZooArguments) -> None:
        info = build_zoo(args)
        print(f"{info['num_models']} networks, {info['num_checkpoints']} checkpoints in {args.output_dir}")
        for reason in info["skipped"]:
            print(f"  left out: {reason}")

    run_command(command, args, PROGRAM)


if __name__ == "__main__":
    main()
