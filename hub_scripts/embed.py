"""Embeddings of checkpoints: one row each, as parquet."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, require_source, run_command
from hub_scripts.codec import Codec, load_pretrained
from hub_scripts.evaluation.features import DEFAULT_FEATURE, FEATURES
from hub_scripts.outputs import new_folder, write_json
from hub_scripts.zoos.schema import ZOO_FILE, property_columns
from hub_scripts.zoos.zoo import Zoo
from modeling_sane import SaneModel
from tokenization_sane import SaneWeightTokenizer

PROGRAM = "sane embed"
EMBEDDINGS_FILE = "embeddings.parquet"


@dataclass
class EmbedArguments:
    """Embed the checkpoints of a zoo, or checkpoint files, and write one parquet row each.

    Example:
      sane embed --model runs/model --output-dir runs/embeddings runs/zoo
      sane embed --model runs/model --output-dir runs/mine a.safetensors b.safetensors
    """

    model: str = field(metadata={"help": "Folder or Hub repository of a SANE model with its tokenizer."})
    output_dir: str = field(metadata={"help": "Folder for embeddings.parquet; must not exist yet."})
    feature: str = field(
        default=DEFAULT_FEATURE, metadata={"help": f"How latents become one vector: {', '.join(FEATURES)}."}
    )
    on_error: str = field(
        default="refuse",
        metadata={"help": "Rows with damaged or non-finite weights: refuse (stop and name the row) or skip."},
    )
    sources: list[str] = field(
        default_factory=list,
        init=False,
        metadata={"help": "A zoo (folder or Hub dataset), or safetensors files or folders."},
    )

    def __post_init__(self):
        if self.feature not in FEATURES:
            raise ValueError(f"--feature is {self.feature!r}, expected one of {', '.join(FEATURES)}.")


def embed_split(zoo: Zoo, split: str, codec: Codec) -> np.ndarray:
    """Latents of all checkpoints of a split: `(checkpoints, tokens, latent_size)` float32."""
    latents = []
    count = len(zoo.rows(split))
    for start in tqdm(range(0, count, codec.chunk_size), desc=f"embed {split}", unit="batch", leave=False):
        rows = np.arange(start, min(start + codec.chunk_size, count))
        latents.append(codec.encode(codec.tokens(zoo.stacked(split, rows))).numpy())
    return np.concatenate(latents)


def embed(args: EmbedArguments) -> dict[str, Any]:
    """Embed all sources; returns counts."""
    model, tokenizer = load_pretrained(args.model)
    function = FEATURES[args.feature]
    with new_folder(args.output_dir) as folder:
        rows: list[dict[str, Any]] = []
        for source in args.sources:
            require_source(source, "the source")
            if _is_zoo(source):
                rows += _embed_zoo(source, args.on_error, model, tokenizer, function)
            else:
                layout = tokenizer.layout(source)
                codec = Codec(model, tokenizer, layout)
                batch = tokenizer(source, layout, non_finite="error")
                feature = function(codec.encode(batch["token_values"]), codec.layout.layer_ids)[0]
                rows.append({"source": source, "layout_id": layout.fingerprint, "embedding": feature.tolist()})
        Dataset.from_list(rows).to_parquet(str(folder / EMBEDDINGS_FILE))
        results = {"checkpoints": len(rows), "feature": args.feature, "model": args.model}
        write_json(folder / "results.json", results)
    return results


def _is_zoo(source: str) -> bool:
    """A folder with a zoo's side file, or what is no path at all: a repository."""
    return (Path(source) / ZOO_FILE).is_file() or not Path(source).exists()


def _embed_zoo(
    source: str, on_error: str, model: SaneModel, tokenizer: SaneWeightTokenizer, function
) -> list[dict[str, Any]]:
    """Rows with the zoo's own properties, layout by layout."""
    rows = []
    whole = Zoo(source, on_error=on_error)
    for zoo in map(whole.of_layout, whole.layout_ids):
        codec = Codec(model, tokenizer, zoo.layout)
        for split, table in zoo.splits.items():
            if not len(table):
                continue
            features = function(embed_split(zoo, split, codec), codec.layout.layer_ids)
            columns = ["model_id", "epoch", "layout_id", *property_columns(table.features)]
            for row, feature in zip(table.select_columns(columns), features, strict=True):
                rows.append({"source": zoo.name, "split": split, **row, "embedding": feature.tolist()})
    return rows


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane embed`."""
    args = parse_arguments(EmbedArguments, argv, PROGRAM)
    run_command(
        lambda a: print(f"{embed(a)['checkpoints']} embeddings in {a.output_dir}/{EMBEDDINGS_FILE}"), args, PROGRAM
    )


if __name__ == "__main__":
    main()
