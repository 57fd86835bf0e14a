"""Make a zoo out of checkpoints that lie elsewhere, in the formats of other zoos, tools and the Hub."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, require_source, run_command
from hub_scripts.evaluation.functional import build_module
from hub_scripts.outputs import new_folder
from hub_scripts.symmetries import cached_symmetries
from hub_scripts.zoos.alignment import ZooAligner
from hub_scripts.zoos.importers import IMPORTERS, importer
from hub_scripts.zoos.importers.checkpoint import Checkpoint
from hub_scripts.zoos.importers.options import ImportOptions
from hub_scripts.zoos.lineage import Lineage
from hub_scripts.zoos.schema import check_weights, column_types
from hub_scripts.zoos.splits import split_models
from hub_scripts.zoos.tasks import load_task
from hub_scripts.zoos.writer import EMBED_LIMIT, ZooWriter
from tokenization_sane import CheckpointLayout, SaneWeightTokenizer, SymmetrySpec

PROGRAM = "sane import-zoo"
# by which a reference is chosen; test figures take no part in making a zoo
QUALITY = ("validation_accuracy", "train_accuracy")


@dataclass
class ImportZooArguments:
    r"""Make a zoo (a Hugging Face dataset) out of checkpoints: a folder and a table, a published zoo, Trainer runs, Hub models.

    Example:
      sane import-zoo --format folder checkpoints runs/zoo --properties checkpoints/properties.csv \
          --architecture package.module:Callable --input-shape 1,28,28 --align
      sane import-zoo --format modelzoos tune_zoo_mnist runs/zoo --allow-pickle
      sane import-zoo --format hub repositories.txt runs/zoo --revisions all
    """

    source: str = field(
        init=False, metadata={"help": "Folder, file with a list of repositories, or one repository; by --format."}
    )
    output_dir: str = field(init=False, metadata={"help": "Folder of the zoo; must not exist yet."})
    format: str = field(
        default="folder",
        metadata={
            "help": "folder (checkpoint files and a table), modelzoos (ray tune trees of the published Model Zoos), unterthiner "
            "(weights.npy, metrics.csv.gz, layout.csv), checkpoints (checkpoint-N folders of Trainer), hub (repositories)."
        },
    )
    properties: str | None = field(
        default=None,
        metadata={
            "help": "CSV, JSON or parquet with a row for each checkpoint: path, model_id, epoch, and any properties."
        },
    )
    path_column: str = field(default="path", metadata={"help": "Column of the table that names the file."})
    model_column: str = field(default="model_id", metadata={"help": "Column of the table that names the network."})
    epoch_column: str = field(default="epoch", metadata={"help": "Column of the table that holds the epoch."})
    split_column: str = field(
        default="split",
        metadata={
            "help": "Column of the table that holds train, validation or test; drawn by --seed if there is none."
        },
    )
    hparams: list[str] = field(
        default_factory=list, metadata={"help": "Columns that are hyper-parameters; they get the name hparams_NAME."}
    )
    ignore: list[str] = field(default_factory=list, metadata={"help": "Columns to leave out."})
    revisions: list[str] = field(
        default_factory=list,
        metadata={"help": "For hub: branches or tags that are the epochs of a network, or 'all'."},
    )
    architecture: str | None = field(
        default=None,
        metadata={"help": "The networks, as 'package.module:Callable', where the source does not say it."},
    )
    architecture_kwargs: str = field(default="{}", metadata={"help": "Its keyword arguments, as JSON."})
    input_shape: str | None = field(
        default=None,
        metadata={"help": "Shape of one input without the batch axis, as 1,28,28; needed to find symmetries."},
    )
    align: bool = field(
        default=False,
        metadata={"help": "Align all networks to one of the train split; needs --architecture and --input-shape."},
    )
    task: str | None = field(
        default=None,
        metadata={"help": "What the networks were trained on: digits, idx:DIR or a dataset; to run them."},
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the weights, as the Hub calls it: mit."})
    embed_limit: int = field(
        default=EMBED_LIMIT, metadata={"help": "Weights of more bytes get files of their own beside the rows."}
    )
    allow_pickle: bool = field(
        default=False, metadata={"help": "Open pickles too, with weights_only=True; only of people you trust."}
    )
    on_error: str = field(
        default="refuse",
        metadata={"help": "Checkpoints that cannot be read or do not fit: refuse (stop and name it) or skip."},
    )
    seed: int = field(default=0, metadata={"help": "Of the splits."})

    def __post_init__(self):
        if self.format not in IMPORTERS:
            raise ValueError(f"--format is {self.format!r}, expected one of {', '.join(IMPORTERS)}.")
        if self.on_error not in ("refuse", "skip"):
            raise ValueError(f"--on-error is {self.on_error!r}, expected refuse or skip.")
        if self.input_shape is not None and not all(part.isdigit() for part in self.input_shape.split(",")):
            raise ValueError(f"--input-shape is {self.input_shape!r}, expected whole numbers such as 1,28,28.")
        if self.properties is not None and self.format != "folder":
            raise ValueError(
                f"--properties is a table for --format folder; --format {self.format} has its own figures."
            )
        if self.align and self.input_shape is None:
            raise ValueError("--align needs --input-shape, to find the symmetries of the networks by running them.")


def import_zoo(args: ImportZooArguments) -> dict[str, Any]:
    """List, split, read, check, align and write; returns what `zoo.json` holds."""
    started = time.perf_counter()
    require_source(args.source, "the source")
    options = ImportOptions(
        properties=args.properties,
        path_column=args.path_column,
        model_column=args.model_column,
        epoch_column=args.epoch_column,
        split_column=args.split_column,
        hparam_columns=args.hparams,
        ignore_columns=args.ignore,
        revisions=args.revisions,
        allow_pickle=args.allow_pickle,
        on_error=args.on_error,
    )
    with new_folder(args.output_dir) as folder:
        checkpoints = importer(args.format)(args.source, options)
        checkpoints = sorted(checkpoints, key=lambda one: (one.model_id, one.epoch))
        _check(checkpoints, args.source, options.skipped)
        splits = _splits(checkpoints, args.seed)
        counts = Counter(splits[one.model_id] for one in checkpoints)
        types = column_types((one.where, one.columns) for one in checkpoints)
        writer = ZooWriter(folder, types, counts, args.embed_limit)
        kinds = _Kinds(args, writer, checkpoints, splits)
        lineage = Lineage()
        written: Counter[str] = Counter()
        skipped = options.skipped
        with tqdm(total=len(checkpoints), desc="import", unit="checkpoint") as bar:
            for model_id, run in groupby(checkpoints, key=lambda one: one.model_id):
                run = list(run)
                for one, row, state_dict, last in _read_run(run, kinds, options):
                    split = splits[model_id]
                    lineage.add_checkpoint(one.where, writer.add(split, row, state_dict))
                    written[split] += 1
                    if last is not None:
                        lineage.add_model(model_id, split, row["layout_id"], last)
                bar.update(len(run))
        if not written:
            raise ValueError(f"no checkpoint of {args.source} could be imported; the first: {skipped[0]}")
        info = {
            "task": args.task,
            **_pixels(args.task),
            "imported_from": Path(args.source).name if Path(args.source).exists() else args.source,
            "import_format": args.format,
            "license": args.license,
            "num_models": len(lineage),
            "num_checkpoints": sum(written.values()),
            "skipped": skipped,
            "seconds": round(time.perf_counter() - started, 2),
            "arguments": {k: v for k, v in asdict(args).items() if k not in ("source", "output_dir", "properties")},
        }
        info = writer.finish(Path(args.output_dir).name, info, lineage.report())
    return info


def _check(checkpoints: list[Checkpoint], source: str, skipped: list[str]) -> None:
    if not checkpoints:
        first = f"; the first: {skipped[0]}" if skipped else "."
        raise ValueError(f"{source} holds no checkpoint that could be imported{first}")
    seen: dict[tuple[str, int], Checkpoint] = {}
    for one in checkpoints:
        other = seen.setdefault((one.model_id, one.epoch), one)
        if other is not one:
            raise ValueError(
                f"{other.where} and {one.where} are both epoch {one.epoch} of model {one.model_id!r}; "
                "a model and its epoch name one checkpoint."
            )


def _splits(checkpoints: list[Checkpoint], seed: int) -> dict[str, str]:
    """Split of each model: the source's own, or drawn."""
    given: dict[str, tuple[str | None, str]] = {}
    for one in checkpoints:
        split, where = given.setdefault(one.model_id, (one.split, one.where))
        if split != one.split:
            raise ValueError(
                f"model {one.model_id!r} stands in the split {split} in {where} and in {one.split} in {one.where}; "
                "a model must stand in one split with all its checkpoints."
            )
    without = [model_id for model_id, (split, _) in given.items() if split is None]
    if not without:
        return {model_id: split for model_id, (split, _) in given.items()}
    if len(without) != len(given):
        raise ValueError(f"model {without[0]!r} has no split, others have one; give all of them one, or none.")
    return {without[i]: split for split, numbers in split_models(len(without), seed).items() for i in numbers}


def _pixels(task: str | None) -> dict[str, float]:
    if task is None:
        return {}
    loaded = load_task(task)
    return {"pixel_mean": loaded.pixel_mean, "pixel_std": loaded.pixel_std}


def _read_run(
    run: list[Checkpoint], kinds: "_Kinds", options: ImportOptions
) -> Iterator[tuple[Checkpoint, dict[str, Any], Mapping[str, torch.Tensor], Mapping[str, torch.Tensor] | None]]:
    """Checkpoints of one network with their rows and (aligned) weights; the last one also with its own weights."""
    draw = None
    last: tuple[Checkpoint, Mapping[str, torch.Tensor], CheckpointLayout] | None = None
    # the last one that can be read comes first: its alignment is that of all
    for one in reversed(run):
        with options.skipping():
            last = (one, *kinds.read(one))
            break
    if last is None:
        return
    aligner = kinds.aligner(last[0])
    if aligner is not None:
        draw = aligner.match(last[1])
    for one in run[: run.index(last[0]) + 1]:
        found = last[1:] if one is last[0] else None
        if found is None:
            with options.skipping():
                found = kinds.read(one)
        if found is None:
            continue
        state_dict, layout = found
        own = state_dict if one is last[0] else None
        row = {
            "model_id": one.model_id,
            "epoch": one.epoch,
            "layout_id": layout.fingerprint,
            **kinds.architecture(one),
            "source": kinds.public(one.where),
            **one.columns,
        }
        if aligner is not None:
            state_dict, columns = aligner.apply(state_dict, draw)
            row |= columns
        yield one, row, state_dict, own


class _Kinds:
    """The kinds of networks in a zoo: their layouts, symmetries and references."""

    def __init__(
        self,
        args: ImportZooArguments,
        writer: ZooWriter,
        checkpoints: Iterable[Checkpoint],
        splits: Mapping[str, str],
    ):
        self.args, self.writer = args, writer
        self._tokenizer = SaneWeightTokenizer()
        self._layouts: dict[tuple, CheckpointLayout] = {}  # by what the tensors of a checkpoint are
        self._known: dict[tuple, tuple[CheckpointLayout, SymmetrySpec | None]] = {}  # by architecture
        self._aligners: dict[tuple, ZooAligner] = {}
        self._references: dict[tuple, Checkpoint] = {}
        if args.align:
            self._references = _choose_references(
                [one for one in checkpoints if splits[one.model_id] == "train"], self._key
            )

    def public(self, where: str) -> str:
        """Where a checkpoint came from, without the folders of this machine."""
        return where.replace(f"{Path(self.args.source).parent}/", "") if Path(self.args.source).exists() else where

    def architecture(self, one: Checkpoint) -> dict[str, str | None]:
        """Columns that name the architecture."""
        name, kwargs = self._key(one)
        return {"architecture": name, "architecture_kwargs": kwargs}

    def _key(self, one: Checkpoint) -> tuple[str | None, str | None]:
        if one.architecture is not None:
            return one.architecture, json.dumps(dict(one.architecture_kwargs), sort_keys=True)
        if self.args.architecture is not None:
            return self.args.architecture, json.dumps(json.loads(self.args.architecture_kwargs), sort_keys=True)
        return None, None

    def read(self, one: Checkpoint) -> tuple[Mapping[str, torch.Tensor], CheckpointLayout]:
        """Weights and layout of a checkpoint, after checking that they fit.

        Raises:
            ValueError: Naming the file and the tensor.
        """
        try:
            state_dict = one.read()
        except OSError as error:  # other errors name the file themselves
            raise ValueError(f"{one.where}: {error}") from error
        try:
            layout = self._layout(one, state_dict)
            if not layout.tensors:
                raise ValueError("it holds no floating-point tensor, so it has no weights.")
            check_weights(state_dict, layout)
            unknown = set(state_dict) - {*layout.order, *layout.ties}
            if unknown:
                raise ValueError(f"{sorted(unknown)[0]} is not a tensor of {self._key(one)[0]}.")
        except ValueError as error:
            raise ValueError(f"{one.where}: {error}") from error
        return state_dict, layout

    def _layout(self, one: Checkpoint, state_dict: Mapping[str, torch.Tensor]) -> CheckpointLayout:
        key = self._key(one)
        if key[0] is not None:
            return self._with_module(key)[0]
        tensors = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items())
        if tensors not in self._layouts:
            source = state_dict if one.layout_source is None else one.layout_source
            layout = self._tokenizer.layout(source, self.args.allow_pickle)
            self.writer.add_layout(layout)
            self._layouts[tensors] = layout
        return self._layouts[tensors]

    def _with_module(self, key: tuple[str, str]) -> tuple[CheckpointLayout, SymmetrySpec | None]:
        if key not in self._known:
            module = build_module(key[0], json.loads(key[1])).eval()
            layout, spec = self._tokenizer.layout(module), None
            if self.args.input_shape is not None:
                shape = [int(size) for size in self.args.input_shape.split(",")]
                spec = cached_symmetries(
                    module, layout, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
                )
            self.writer.add_layout(layout, spec)
            self._known[key] = layout, spec
        return self._known[key]

    def aligner(self, one: Checkpoint) -> ZooAligner | None:
        """Aligns networks of this kind, if that was asked for."""
        if not self.args.align:
            return None
        key = self._key(one)
        if key[0] is None:
            raise ValueError("--align needs --architecture: symmetries are found by running the network.")
        if key not in self._references:
            raise ValueError(f"no model of {key[0]} is in the train split, so there is none to align to.")
        if key not in self._aligners:
            reference = self._references[key]
            self._aligners[key] = ZooAligner(self._with_module(key)[1], reference.model_id, self.read(reference)[0])
        return self._aligners[key]


def _choose_references(train: list[Checkpoint], key) -> dict[tuple, Checkpoint]:
    """Of each kind the model whose last checkpoint is best; the first one where nothing tells."""
    last = {one.model_id: one for one in train}  # they are in the order of epochs

    def quality(one: Checkpoint) -> float:
        return next((v for name in QUALITY if isinstance(v := one.columns.get(name), int | float)), float("-inf"))

    best: dict[tuple, Checkpoint] = {}
    for one in last.values():
        if key(one) not in best or quality(one) > quality(best[key(one)]):
            best[key(one)] = one
    return best


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane import-zoo`."""
    args = parse_arguments(ImportZooArguments, argv, PROGRAM)

    def command(args: ImportZooArguments) -> None:
        info = import_zoo(args)
        print(
            f"{info['num_models']} models, {info['num_checkpoints']} checkpoints in {args.output_dir} ({info['seconds']:.1f} s); "
            "its README.md tells what is in them, duplicates and lineage."
        )
        for reason in info["skipped"]:
            print(f"  skipped: {reason}")
        if info["skipped"]:
            print(f"{len(info['skipped'])} skipped.")

    run_command(command, args, PROGRAM)


if __name__ == "__main__":
    main()
