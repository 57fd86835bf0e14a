"""Embeddings of checkpoints: one row each, as parquet; by many processes if there are, and going on where it was interrupted."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, require_source, run_command
from hub_scripts.evaluation.embedder import DEFAULT_EMBEDDING, EMBEDDINGS, Embedder
from hub_scripts.evaluation.index import EMBEDDINGS_FILE, RESULTS_FILE
from hub_scripts.hub import explain
from hub_scripts.outputs import claim_folder, read_json, release_folder, write_json
from hub_scripts.zoos.schema import ZOO_FILE, property_columns
from hub_scripts.zoos.zoo import Zoo
from modeling_sane import SaneModel
from tokenization_sane import CheckpointLayout, SaneWeightTokenizer, check_finite
from tokenization_sane.checkpoint_sane import read_checkpoint

logger = logging.getLogger(__name__)

PROGRAM = "sane embed"
PARTS_FOLDER = ".parts"
PART_ROWS = 64  # of a zoo; an interrupted run loses less than one part of each process
PART_FILES = 16
BATCH_VALUES = 2**25  # weights that are held at once, unless one checkpoint has more: 128 MB as float32
JOINED_PARTS = 64  # parts that become one row group
LONGEST_WAIT = timedelta(days=30)  # of a process for the others, whose shares may take much longer

# weights by name, and what stands where in them
Weights = tuple[CheckpointLayout, dict[str, torch.Tensor]]


@dataclass
class EmbedArguments:
    """Embed the checkpoints of zoos, or checkpoints in files or on the Hub, and write one parquet row each.

    The same command goes on where it was interrupted. `accelerate launch hub_scripts/embed.py ...` shares the work among
    processes.

    Example:
      sane embed --model runs/model --output-dir runs/embeddings runs/zoo
      sane embed --model runs/model --output-dir runs/mine a.safetensors me/network me/network@v2 @more.txt
    """

    model: str = field(metadata={"help": "Folder or Hub repository of a SANE model with its tokenizer."})
    output_dir: str = field(metadata={"help": "Folder for embeddings.parquet; new, or of the same command before."})
    feature: str = field(
        default=DEFAULT_EMBEDDING, metadata={"help": f"What the vector is made of: {', '.join(EMBEDDINGS)}."}
    )
    on_error: str = field(
        default="refuse",
        metadata={
            "help": "Checkpoints that cannot be embedded: refuse (stop and name the first) or skip (and count)."
        },
    )
    allow_pickle: bool = field(
        default=False, metadata={"help": "Open checkpoint files that are pickles, with weights_only=True."}
    )
    sources: list[str] = field(
        default_factory=list,
        init=False,
        metadata={
            "help": "Zoos (folder or Hub dataset), checkpoint files or folders, Hub models (name or name@revision), or "
            "@list.txt with one of these a line."
        },
    )

    def __post_init__(self):
        if self.feature not in EMBEDDINGS:
            raise ValueError(f"--feature is {self.feature!r}, expected one of {', '.join(EMBEDDINGS)}.")
        if self.on_error not in ("refuse", "skip"):
            raise ValueError(f"--on-error is {self.on_error!r}, expected refuse or skip.")


def embed(args: EmbedArguments) -> dict[str, Any]:
    """Embed all sources, or what is left of them.

    Returns:
        `dict`: what `results.json` holds: `checkpoints` and `skipped` are counts, `skipped_checkpoints` says why, and
        `feature`, `model`, `model_sha256`, `tokenizer_sha256` say what the embeddings were made with.

    Raises:
        ValueError: If a source is not there, a checkpoint cannot be embedded (unless those are skipped), none can, or the
            folder holds something else.
    """
    state = _processes()
    sources = _expand(args.sources)
    embedder = load_embedder(args.model, args.feature)
    made_with = {"feature": args.feature, "model": args.model, **fingerprint(embedder.model, embedder.tokenizer)}
    kinds = [[_is_zoo(source) for source in sources] if state.is_main_process else None]
    broadcast_object_list(kinds)  # the Hub is asked by one process
    parts, schema = _plan(sources, kinds[0], args.allow_pickle, embedder.tokenizer)
    work = _digest([part.name for part in parts])

    folder = Path(args.output_dir)
    with state.main_process_first():
        claim_folder(folder, "embed", _settings(args, sources, made_with))
    results_file, parts_folder = folder / RESULTS_FILE, folder / PARTS_FOLDER
    if results_file.is_file():
        results = read_json(results_file)
        if results["work"] == work and (args.on_error == "skip" or not results["skipped"]):
            return results
    parts_folder.mkdir(exist_ok=True)
    left = [part for part in parts if not _is_done(parts_folder / part.name, args.on_error)]
    state.wait_for_everyone()  # all must see the same parts before one writes more
    try:
        with state.split_between_processes(left) as mine, _progress(parts, left, mine, state) as bar:
            for part in mine:
                _write(part, parts_folder, schema, *_embed_part(part, embedder, args.on_error))
                bar.update(part.size)
    except ValueError:
        if state.num_processes == 1 and not any(parts_folder.glob("*.parquet")):  # nothing to go on from
            shutil.rmtree(parts_folder)
            release_folder(folder)
        raise
    state.wait_for_everyone()
    if state.is_main_process:
        count, skipped = _join(parts, parts_folder, folder / EMBEDDINGS_FILE, schema)
        found = {"checkpoints": count, "skipped": len(skipped), "skipped_checkpoints": skipped}
        write_json(results_file, found | made_with | {"work": work})
        shutil.rmtree(parts_folder)
    state.wait_for_everyone()
    return read_json(results_file)


def load_embedder(model: str | Path, feature: str) -> Embedder:
    """Model and tokenizer from a folder or the Hub, on this process's device."""
    embedder = Embedder.from_pretrained(model, feature)
    embedder.model.to(_processes().device)
    return embedder


def fingerprint(model: SaneModel, tokenizer: SaneWeightTokenizer) -> dict[str, str]:
    """Checksums of a model's weights and of what its tokenizer does; the same from a folder, from shards and from the Hub."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    names = ("token_size", "packing", "normalization", "zoo", "symmetries")  # others say where it came from
    config = {name: getattr(tokenizer, name) for name in names}
    return {"model_sha256": weights.hexdigest(), "tokenizer_sha256": _digest(config)}


def read_network(source: str, tokenizer: SaneWeightTokenizer, allow_pickle: bool = False) -> Weights:
    """Layout and weights of a checkpoint file, folder or Hub repository.

    Raises:
        ValueError: If it cannot be read or holds NaN or infinite values; the source is named.
    """
    try:
        layout = tokenizer.layout(source, allow_pickle)
        tensors = read_checkpoint(source, allow_pickle)
        check_finite(tensors)
    except ValueError as error:
        raise _naming(source, error) from error.__cause__
    return layout, {name: tensors[name] for name in layout.tensors}


def stack(networks: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Networks of one layout side by side: name to `(networks, *shape)`, float32."""
    return {name: torch.stack([network[name].float() for network in networks]) for name in networks[0]}


# ---------------------------------------------------------------------------------------------------- what there is to do
@dataclass(frozen=True)
class _Checkpoint:
    where: str  # for messages
    row: dict[str, Any]  # its columns but layout and embedding
    read: Callable[[], Weights]


@dataclass(frozen=True)
class _Part:
    """A share of the work that is written at once."""

    name: str  # of its file; another one if what it is made of changes
    size: int
    checkpoints: Callable[[], Iterator[_Checkpoint]]


def _plan(
    sources: list[str], zoos: list[bool], allow_pickle: bool, tokenizer: SaneWeightTokenizer
) -> tuple[list[_Part], pa.Schema]:
    """Parts in the order of the sources, and the columns of all rows."""
    parts: list[_Part] = []
    properties = pa.schema([])
    for is_zoo, group in groupby(zip(sources, zoos, strict=True), key=lambda pair: pair[1]):
        names = [source for source, _ in group]
        if not is_zoo:
            for start in range(0, len(names), PART_FILES):
                files = names[start : start + PART_FILES]
                stamps = [_stamp(source) for source in files]
                reader = partial(_files, files, allow_pickle, tokenizer)
                parts.append(_Part(f"{_digest([files, stamps])}.parquet", len(files), reader))
            continue
        for source in names:
            zoo = Zoo(*_split_revision(source))
            parts += _zoo_parts(source, zoo)
            for table in zoo.splits.values():
                found = table.features.arrow_schema
                found = pa.schema([found.field(name) for name in property_columns(table.features)])
                try:
                    properties = pa.unify_schemas([properties, found], promote_options="permissive")
                except pa.ArrowTypeError as error:
                    raise ValueError(f"{source}: {error}; embed zoos with such columns apart.") from error
    if "embedding" in properties.names:
        raise ValueError("a zoo has a property 'embedding', which would be mixed up with the embeddings; rename it.")
    text, number = pa.string(), pa.int64()
    first = {"source": text, "split": text, "model_id": text, "epoch": number, "layout_id": text}
    return parts, pa.schema([*first.items(), *properties, ("embedding", pa.list_(pa.float32()))])


def _zoo_parts(source: str, whole: Zoo) -> Iterator[_Part]:
    """Layout by layout and split by split."""
    identity = whole.source.identity
    for zoo in map(whole.of_layout, whole.layout_ids):
        rows = min(PART_ROWS, max(1, BATCH_VALUES // max(1, zoo.layout.num_parameters)))
        for split, table in zoo.splits.items():
            for start in range(0, len(table), rows):
                stop = min(start + rows, len(table))
                name = f"{_digest([identity, zoo.layout_id, split, start, stop])}.parquet"
                yield _Part(name, stop - start, partial(_zoo_rows, source, zoo, split, start, stop))


def _zoo_rows(source: str, zoo: Zoo, split: str, start: int, stop: int) -> Iterator[_Checkpoint]:
    table = zoo.splits[split]
    table = table.select_columns(["model_id", "epoch", *property_columns(table.features)])
    for index in range(start, stop):

        def read(index: int = index) -> Weights:
            tensors = zoo.state_dict(split, index)
            return zoo.layout, {name: tensors[name] for name in zoo.layout.tensors}

        yield _Checkpoint(zoo.where(split, index), {"source": source, "split": split, **table[index]}, read)


def _files(sources: list[str], allow_pickle: bool, tokenizer: SaneWeightTokenizer) -> Iterator[_Checkpoint]:
    for source in sources:
        yield _Checkpoint(source, {"source": source}, partial(read_network, source, tokenizer, allow_pickle))


def _expand(sources: list[str]) -> list[str]:
    """Sources with lists in place of their names."""
    expanded: list[str] = []
    for source in sources:
        if not source.startswith("@"):
            expanded.append(source)
            continue
        file = Path(source[1:])
        if not file.is_file():
            raise ValueError(f"the list {file} does not exist.")
        lines = map(str.strip, file.read_text(encoding="utf-8").splitlines())
        expanded += [line for line in lines if line and not line.startswith("#")]
    if not expanded:
        raise ValueError("there is nothing to embed; give at least one source.")
    for source in expanded:
        require_source(source, "the source")
    return expanded


def _is_zoo(source: str) -> bool:
    """A folder with a zoo's side file, or a dataset repository that has one; other repositories are networks."""
    if Path(source).exists():
        return (Path(source) / ZOO_FILE).is_file()
    repo_id, revision = _split_revision(source)
    try:
        return HfApi().file_exists(repo_id, ZOO_FILE, repo_type="dataset", revision=revision)
    except HfHubHTTPError as error:
        raise ValueError(f"{source} cannot be read: {explain(error, revision)}.") from error
    except (HTTPError, OSError):  # the Hub cannot be reached
        return isinstance(try_to_load_from_cache(repo_id, ZOO_FILE, repo_type="dataset", revision=revision), str)
    except ValueError:  # no name of a repository
        return False


def _split_revision(source: str) -> tuple[str, str | None]:
    if Path(source).exists():
        return source, None
    repo_id, _, revision = source.partition("@")
    return repo_id, revision or None


def _stamp(source: str) -> list:
    """Changes when a file of the source does; a repository is told by its name alone."""
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _settings(args: EmbedArguments, sources: list[str], made_with: dict[str, str]) -> dict[str, str]:
    """What must be the same for going on, short enough to be read in a message."""
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    made_by = _digest([made_with["model_sha256"], made_with["tokenizer_sha256"]])
    return {
        "model": f"{args.model} (checksum {made_by})",
        "feature": args.feature,
        "sources": f"{' '.join(sources[:3])}{more} (checksum {_digest(sources)})",
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------- doing it
def _processes() -> PartialState:
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)  # as Accelerator does
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != state.num_processes:
        raise ValueError(
            f"{wanted} processes were launched but each runs alone and would do the work of all; on CPU set "
            "ACCELERATE_USE_CPU=true and launch with --multi_gpu --num_processes N."
        )
    return state


def _progress(parts: list[_Part], left: list[_Part], mine: list[_Part], state: PartialState) -> tqdm:
    """A bar over this process's share, of which those of before are no part."""
    if len(left) < len(parts) and state.is_main_process:
        print(f"going on: {len(parts) - len(left)} of {len(parts)} parts are there")
    total = sum(part.size for part in mine)
    return tqdm(total=total, desc="embed", unit="checkpoint", disable=not state.is_local_main_process)


def _embed_part(part: _Part, embedder: Embedder, on_error: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a part, and what is said of the checkpoints that are left out."""
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []

    def refuse(error: ValueError) -> None:
        if on_error == "refuse" or _is_of_the_hub(error):
            raise error
        logger.warning("skipped: %s", error)
        skipped.append(str(error))

    def readable() -> Iterator[tuple[_Checkpoint, Weights]]:
        for checkpoint in part.checkpoints():
            try:
                layout, tensors = checkpoint.read()
                _known(layout, checkpoint.where, embedder)
            except ValueError as error:
                refuse(error)
            else:
                yield checkpoint, (layout, tensors)

    for batch in _batches(readable()):
        layout = batch[0][1][0]
        features = embedder(stack([tensors for _, (_, tensors) in batch]), layout)
        for (checkpoint, _), feature in zip(batch, features, strict=True):
            if np.isfinite(feature).all():
                rows.append(checkpoint.row | {"layout_id": layout.fingerprint, "embedding": feature})
            else:
                refuse(ValueError(f"{checkpoint.where}: its embedding is not finite; its weights may be too large."))
    return rows, skipped


def _known(layout: CheckpointLayout, where: str, embedder: Embedder) -> None:
    """Refuse a layout that the tokenizer cannot normalise."""
    try:
        embedder.codec(layout)
    except ValueError as error:
        raise _naming(where, error) from error.__cause__


def _batches(
    checkpoints: Iterator[tuple[_Checkpoint, Weights]],
) -> Iterator[list[tuple[_Checkpoint, Weights]]]:
    """Neighbours of one layout, as many as may be held at once."""
    batch: list[tuple[_Checkpoint, Weights]] = []
    for checkpoint in checkpoints:
        layout = checkpoint[1][0]
        is_full = (len(batch) + 1) * layout.num_parameters > BATCH_VALUES
        if batch and (is_full or layout.fingerprint != batch[0][1][0].fingerprint):
            yield batch
            batch = []
        batch.append(checkpoint)
    if batch:
        yield batch


def _naming(where: str, error: ValueError) -> ValueError:
    """The same error with its checkpoint."""
    return error if where in str(error) else ValueError(f"{where}: {error}")


def _is_of_the_hub(error: BaseException) -> bool:
    """True if the Hub or the way to it failed, which says nothing about the checkpoint."""
    for cause in (error, error.__cause__):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return cause.response.status_code not in (401, 403, 404)
        if isinstance(cause, (HTTPError, LocalEntryNotFoundError, ConnectionError)):
            return True
    return False


# ---------------------------------------------------------------------------------------------------- files
def _write(part: _Part, folder: Path, schema: pa.Schema, rows: list[dict[str, Any]], skipped: list[str]) -> None:
    table = pa.Table.from_pylist(rows, schema.with_metadata({"skipped": json.dumps(skipped)}))
    partial_file = folder / f".{part.name}.{os.getpid()}"
    pq.write_table(table, partial_file)
    partial_file.replace(folder / part.name)


def _is_done(file: Path, on_error: str) -> bool:
    """True if a part was written, and has all that this run would have in it."""
    return file.is_file() and (on_error == "skip" or not _skipped(pq.read_schema(file)))


def _skipped(schema: pa.Schema) -> list[str]:
    return json.loads(schema.metadata[b"skipped"])


def _join(parts: list[_Part], folder: Path, target: Path, schema: pa.Schema) -> tuple[int, list[str]]:
    """One file of all parts, in order; returns how many rows it has and what is said of those left out."""
    count, skipped = 0, []
    partial_file = target.with_name(f".{target.name}.partial")
    with pq.ParquetWriter(partial_file, schema) as writer:
        for start in range(0, len(parts), JOINED_PARTS):
            tables = []
            for part in parts[start : start + JOINED_PARTS]:
                if not (folder / part.name).is_file():
                    raise ValueError(
                        f"{folder / part.name} is missing, as if sources had changed while they were embedded, or processes "
                        "had no folder in common; start again, the same command goes on."
                    )
                tables.append(pq.ParquetFile(folder / part.name).read())
                skipped += _skipped(tables[-1].schema)
            table = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
            count += len(table)
            if len(table):
                writer.write_table(table)
    if not count:
        partial_file.unlink()
        raise ValueError(f"none of the {len(skipped)} checkpoints could be embedded; the first: {skipped[0]}")
    partial_file.replace(target)
    return count, skipped


def _command(args: EmbedArguments) -> None:
    results = embed(args)
    if PartialState().is_main_process:
        print(
            f"{results['checkpoints']} embeddings in {args.output_dir}/{EMBEDDINGS_FILE}, {results['skipped']} skipped"
        )


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane embed`."""
    args = parse_arguments(EmbedArguments, argv, PROGRAM)
    run_command(_command, args, PROGRAM)


if __name__ == "__main__":
    main()
