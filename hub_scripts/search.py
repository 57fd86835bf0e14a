"""Which networks of an index are nearest to a network: copies, relatives and the likely parent."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import disable_progress_bars

from hub_scripts.arguments import parse_arguments, require_source, run_command
from hub_scripts.embed import fingerprint, load_embedder, read_network, stack
from hub_scripts.evaluation.embedder import Embedder
from hub_scripts.evaluation.index import EmbeddingIndex
from hub_scripts.evaluation.search_plots import cluster_map
from hub_scripts.outputs import new_folder, require_empty, write_json

PROGRAM = "sane search"
DUPLICATE_DISTANCE = 1e-3  # of the typical distance between neighbours; rounding is far below, training far above


@dataclass
class SearchArguments:
    """Find the networks of an index that are nearest to a network, near-duplicates and the likely parent among them.

    The index is a folder of `sane embed`. A query is a checkpoint file, a Hub repository, or a row of the index.

    Example:
      sane search --index runs/embeddings network.safetensors
      sane search --index runs/embeddings --k 10 --output-dir runs/search me/network m0007@25
    """

    index: str = field(metadata={"help": "Folder that `sane embed` wrote."})
    model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub repository of the model that made the index; default the one it names."},
    )
    k: int = field(default=5, metadata={"help": "Networks to show for each query."})
    allow_pickle: bool = field(
        default=False, metadata={"help": "Open checkpoint files that are pickles, with weights_only=True."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results.json and a map of the networks; must not exist yet."}
    )
    queries: list[str] = field(
        default_factory=list,
        init=False,
        metadata={"help": "Checkpoint files or folders, Hub models (name or name@revision), or rows: model_id@epoch."},
    )

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"--k is {self.k}, expected at least 1.")


@dataclass
class _Query:
    name: str
    layout_id: str
    vector: np.ndarray  # (1, features) float32
    row: int | None = None  # where it is one of the index
    model: str | None = None  # whose checkpoint it is, where that is known


def search(args: SearchArguments) -> list[dict[str, Any]]:
    """Look for all queries.

    Returns:
        `list[dict]`: for each query its `query`, `layout_id`, `spacing` (the typical distance between neighbours), `hits` (each
        with `rank`, `distance`, `row`, `source`, `model_id`, `epoch`, `near_duplicate`, `likely_parent`), and `likely_parent`
        (such a hit, or None). Where the index has no network of the layout there are no hits, and `message` says so.

    Raises:
        ValueError: If the index is none or was made by another model or tokenizer, or a query is not there.
    """
    index = EmbeddingIndex.from_folder(args.index)
    if args.output_dir is not None:
        require_empty(args.output_dir)
    asked = [(name, _row(index, name)) for name in args.queries]
    for name, row in asked:
        if row is None:
            require_source(name, "the query")
    # rows are embedded already, so that a model is needed only to check it or for other queries
    needs_model = args.model is not None or any(row is None for _, row in asked)
    embedder = _embedder(index, args) if needs_model else None
    queries = [
        _from_row(index, *pair) if pair[1] is not None else _read(index, embedder, pair[0], args) for pair in asked
    ]
    results = [_found(index, query, args.k) for query in queries]
    if args.output_dir is not None:
        with new_folder(args.output_dir) as folder:
            _draw(index, queries, folder)
            write_json(folder / "results.json", {"index": args.index, "k": args.k, "queries": results})
    return results


def _row(index: EmbeddingIndex, query: str) -> int | None:
    """The row that a query names; None if it names a file or repository."""
    if Path(query).exists():
        return None
    models = np.asarray(index.rows["model_id"][:], object)
    if (models == query).any():
        raise ValueError(f"{query} is a model of the index; say which of its checkpoints you mean: {query}@EPOCH.")
    match = re.fullmatch(r"(.+)@(\d+)", query)
    if match is None:
        return None
    model, epoch = match[1], int(match[2])
    of_model = np.flatnonzero(models == model)
    if not len(of_model):
        if "/" in model:  # a repository and its revision
            return None
        raise ValueError(f"the index has no model {model!r}; it has {_some(models)}.")
    epochs = np.asarray(index.rows["epoch"][:], object)[of_model]
    rows = of_model[epochs == epoch]
    if not len(rows):
        raise ValueError(f"the index has no epoch {epoch} of model {model!r}; it has {_some(epochs)}.")
    if len(rows) > 1:
        sources = [index.rows[int(row)]["source"] for row in rows[:2]]
        raise ValueError(
            f"{query} stands in the index more than once, in {sources[0]} and {sources[1]}; embed them into indices apart."
        )
    return int(rows[0])


def _some(values: np.ndarray) -> str:
    known = sorted({value for value in values.tolist() if value is not None})
    return ", ".join(map(str, known[:5])) + (f" and {len(known) - 5} more" if len(known) > 5 else "") or "none"


def _embedder(index: EmbeddingIndex, args: SearchArguments) -> Embedder:
    """The model that made the index; another would give embeddings that mean something else."""
    if "model_sha256" not in index.made_with:
        raise ValueError(f"the index {args.index} does not say which model made it; embed the networks again.")
    name = args.model or index.made_with["model"]
    embedder = load_embedder(name, index.made_with["feature"])
    found = fingerprint(embedder.model, embedder.tokenizer)
    for kind in ("model", "tokenizer"):
        if found[f"{kind}_sha256"] != index.made_with[f"{kind}_sha256"]:
            raise ValueError(
                f"the index {args.index} was made by another {kind} than that of {name}; give the one that made it with "
                "--model, or embed the networks again."
            )
    return embedder


def _from_row(index: EmbeddingIndex, name: str, row: int) -> _Query:
    found = index.rows[row]
    return _Query(name, found["layout_id"], index.embeddings([row]), row, _model(found))


def _read(index: EmbeddingIndex, embedder: Embedder, name: str, args: SearchArguments) -> _Query:
    layout, tensors = read_network(name, embedder.tokenizer, args.allow_pickle)
    if layout.fingerprint not in index.layout_ids:  # the tokenizer may not know it either
        return _Query(name, layout.fingerprint, np.zeros((1, 0), np.float32))
    return _Query(name, layout.fingerprint, embedder(stack([tensors]), layout))


def _model(row: dict[str, Any]) -> str:
    """Whose checkpoint a row is; a file is a model of its own."""
    return row["source"] if row["model_id"] is None else row["model_id"]


def _models(index: EmbeddingIndex, layout_id: str) -> np.ndarray:
    """Whose checkpoint each row of a layout is, `(rows,)`."""
    table = index.rows.select_columns(["source", "model_id"]).select(index.numbers(layout_id)).to_pandas()
    return table["model_id"].fillna(table["source"]).to_numpy(object)


def _found(index: EmbeddingIndex, query: _Query, k: int) -> dict[str, Any]:
    result = {"query": query.name, "layout_id": query.layout_id, "hits": [], "likely_parent": None}
    if query.layout_id not in index.layout_ids:
        return result | {"message": f"the index holds no network of the layout of {query.name}."}
    spacing = index.spacing(query.layout_id)
    all_hits = _hits(index, query, k, spacing)
    model = query.model
    if model is None and all_hits and all_hits[0]["near_duplicate"]:
        model = all_hits[0]["model"]  # a copy is of the model that it is a copy of
    own = int((_models(index, query.layout_id) == model).sum())
    parent = next((hit for hit in _hits(index, query, max(k, own + 1), spacing) if hit["model"] != model), None)
    if parent is not None:
        result["likely_parent"] = parent | {"likely_parent": True}
    hits = [hit | {"likely_parent": parent is not None and hit["row"] == parent["row"]} for hit in all_hits[:k]]
    return result | {"spacing": spacing, "hits": hits}


def _hits(index: EmbeddingIndex, query: _Query, k: int, spacing: float) -> list[dict[str, Any]]:
    """The `k` nearest rows that are not the query itself."""
    distances, numbers = index.query(query.vector, query.layout_id, k + 1)
    near = [(d, n) for d, n in zip(distances[0].tolist(), numbers[0].tolist(), strict=True) if n != query.row][:k]
    rows = _names(index, [number for _, number in near])
    return [
        {
            "rank": rank,
            "distance": distance,
            "row": number,
            **row,
            "model": _model(row),
            "near_duplicate": distance < DUPLICATE_DISTANCE * spacing,
        }
        for rank, ((distance, number), row) in enumerate(zip(near, rows, strict=True), start=1)
    ]


def _names(index: EmbeddingIndex, numbers: Any) -> list[dict[str, Any]]:
    return index.rows.select_columns(["source", "model_id", "epoch"]).select(numbers).to_list()


def _draw(index: EmbeddingIndex, queries: list[_Query], folder: Path) -> None:
    """A map for each layout that was asked for."""
    known = [layout_id for layout_id in index.layout_ids if any(q.layout_id == layout_id for q in queries)]
    for layout_id in known:
        asked = [query for query in queries if query.layout_id == layout_id]
        models = _models(index, layout_id).tolist()
        vectors = index.standardise(np.concatenate([query.vector for query in asked]), layout_id)
        figure = cluster_map(index.vectors(layout_id), models, vectors, [query.name for query in asked])
        figure.savefig(folder / ("clusters.png" if len(known) == 1 else f"clusters_{layout_id}.png"))


def _table(result: dict[str, Any]) -> str:
    if "message" in result:
        return f"{result['query']}: {result['message']}"
    header = ("rank", "distance", "source", "model_id", "epoch", "")
    rows = [header, *map(_cells, result["hits"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    parent = result["likely_parent"]
    if parent is not None and parent["rank"] > len(result["hits"]):
        lines.append("  ".join(_cells(parent)))
    return "\n".join([f"{result['query']} (neighbours in the index are {result['spacing']:.3g} apart):", *lines])


def _cells(hit: dict[str, Any]) -> tuple[str, ...]:
    what = [
        text for key, text in (("near_duplicate", "near-duplicate"), ("likely_parent", "likely parent")) if hit[key]
    ]
    names = (str("-" if hit[name] is None else hit[name]) for name in ("source", "model_id", "epoch"))
    return (str(hit["rank"]), f"{hit['distance']:.4g}", *names, ", ".join(what))


def _command(args: SearchArguments) -> None:
    disable_progress_bars()  # of datasets, which would show one for each layout
    print("\n\n".join(map(_table, search(args))))
    if args.output_dir is not None:
        print(f"\nresults and a map in {args.output_dir}")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane search`."""
    args = parse_arguments(SearchArguments, argv, PROGRAM)
    run_command(_command, args, PROGRAM)


if __name__ == "__main__":
    main()
