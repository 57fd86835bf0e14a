"""Card of a zoo, made from its data."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from datasets import Features

from hub_scripts.zoos.schema import CLASSES, checksum, hparam_columns, is_missing, property_columns

LARGEST_FOR_CATEGORY = 1_000_000
MOST_SHOWN = 8
BARS = " ▁▂▃▄▅▆▇█"


def zoo_card(
    name: str,
    tables: Mapping[str, pa.Table],
    columns: Features,
    info: Mapping[str, Any],
    lineage: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a zoo, made from its rows.

    Args:
        name (`str`): title.
        tables (`Mapping[str, pyarrow.Table]`): rows by split, without weights.
        columns (`Features`): types of all columns.
        info (`Mapping`): what `zoo.json` holds.
        lineage (`Mapping`, *optional*): what `lineage.json` holds.
    """
    everything = pa.concat_tables(tables.values())
    splits = "\n".join(
        f"| {split} | {len(set(table['model_id'].to_pylist())):,} | {len(table):,} | {_megabytes(table)} | {_digest(split, info)} |"
        for split, table in tables.items()
    )
    parts = [
        _front_matter(name, tables, info),
        f"# {name}",
        "A model zoo: each row is one checkpoint of one network, its weights as safetensors bytes, its properties and "
        "hyper-parameters as columns. Splits are by model: all checkpoints of a network stand in one split.",
        "| split | models | checkpoints | weights | SHA-256 of its files |\n|---|---|---|---|---|\n" + splits,
        _provenance(everything, info),
        _table_of_numbers("property", property_columns(columns), everything),
        _table_of_numbers("hyper-parameter", hparam_columns(columns), everything),
        _alignment(everything),
        _lineage(lineage),
        _how_to_load(everything, info),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(name: str, tables: Mapping[str, pa.Table], info: Mapping[str, Any]) -> str:
    """YAML that the Hub reads; `datasets` takes the files of each split from it."""
    data = {
        "pretty_name": name,
        "library_name": "datasets",
        "tags": ["model-zoo", "weight-space-learning", "sane"],
        "size_categories": [_size_category(sum(len(table) for table in tables.values()))],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in tables],
            }
        ],
    }
    if info.get("license"):
        data["license"] = info["license"]
    if info.get("source_datasets"):
        data["source_datasets"] = info["source_datasets"]
    return f"---\n{yaml.safe_dump(data, sort_keys=False).strip()}\n---"


def _provenance(everything: pa.Table, info: Mapping[str, Any]) -> str:
    lines = []
    if info.get("task"):
        lines.append(f"* Task: `{info['task']}`; pixels standardised by mean {info['pixel_mean']:.4g} and standard deviation "
                     f"{info['pixel_std']:.4g}.")  # fmt: skip
    if info.get("classes_per_network"):
        lines.append(f"* Each network knows {info['classes_per_network']} of its classes, in the order of its outputs in `{CLASSES}`.")  # fmt: skip
    if info.get("imported_from"):
        lines.append(f"* Imported from `{info['imported_from']}` (format `{info['import_format']}`).")
    lines.append(f"* Licence: {info.get('license') or 'not given'}.")
    kinds = Counter(
        zip(*(everything[c].to_pylist() for c in ("architecture", "architecture_kwargs", "layout_id")), strict=True)
    )
    for (architecture, kwargs, layout_id), count in kinds.most_common(MOST_SHOWN):
        what = (
            f"`{architecture}`" + (f" with `{kwargs}`" if kwargs not in (None, "{}") else "")
            if architecture
            else "Unnamed"
        )
        lines.append(f"* {what}: {count:,} checkpoints, layout `{layout_id}`.")
    if len(kinds) > MOST_SHOWN:
        lines.append(f"* {len(kinds) - MOST_SHOWN} more architectures.")
    return "\n".join(lines)


def _table_of_numbers(title: str, names: list[str], everything: pa.Table) -> str:
    """Range and histogram of each numeric column, the most frequent values of each other."""
    lines = []
    for name in names:
        values = [value for value in everything[name].to_pylist() if not is_missing(value)]
        if not values:
            continue
        missing = len(everything) - len(values)
        if isinstance(values[0], str | bool):
            common = Counter(values).most_common(MOST_SHOWN)
            lines.append(
                f"| `{name}` | {missing} | | | | {', '.join(f'{value} ({count})' for value, count in common)} |"
            )
        else:
            low, mean, high = min(values), sum(values) / len(values), max(values)
            lines.append(f"| `{name}` | {missing} | {low:.4g} | {mean:.4g} | {high:.4g} | {_histogram(values)} |")
    if not lines:
        return ""
    return f"| {title} | missing | lowest | mean | highest | distribution |\n|---|---|---|---|---|---|\n" + "\n".join(
        lines
    )


def _histogram(values: list[float]) -> str:
    """Counts in equal bins from the lowest to the highest value, as a row of bars."""
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if not len(finite) or finite.min() == finite.max():
        return ""
    counts, _ = np.histogram(finite, bins=16)
    heights = np.ceil(counts / counts.max() * (len(BARS) - 1)).astype(int)
    return "".join(BARS[height] for height in heights)


def _alignment(everything: pa.Table) -> str:
    references = sorted({r for r in everything["alignment_reference"].to_pylist() if r is not None})
    if not references:
        return "The networks are not aligned: their neurons stand in the order of training."
    before, after = (
        np.mean([v for v in everything[f"alignment_distance_{when}"].to_pylist() if v is not None])
        for when in ("before", "after")
    )
    return (
        f"The networks are aligned by weight matching to {', '.join(f'`{r}`' for r in references[:MOST_SHOWN])}, of the train "
        f"split: mean distance {before:.2f} before, {after:.2f} after. `alignment_permutations` holds what was done, so that the "
        "original order of the neurons can be restored."
    )


def _lineage(lineage: Mapping[str, Any] | None) -> str:
    """What networks have to do with one another, as their weights say."""
    if not lineage:
        return ""
    lines = [
        "## Lineage",
        f"Cosine similarity of the weights, last checkpoint of each of {lineage['num_models']:,} networks, before alignment. "
        f"{lineage['share_of_near_pairs']:.1%} of all pairs of one layout are nearly equal (above {lineage['near']}): such networks "
        "were fine-tuned from one another or from a common parent.",
        f"* {lineage['num_duplicates']:,} checkpoints are exact copies of another one.",
        f"* {lineage['num_families']:,} families of nearly equal networks hold {lineage['num_related']:,} networks"
        + (":" if lineage["families"] else "."),
    ]
    for family in lineage["families"][:MOST_SHOWN]:
        names = ", ".join(f"`{name}`" for name in family["members"][:MOST_SHOWN])
        more = f" and {family['size'] - MOST_SHOWN} more" if family["size"] > MOST_SHOWN else ""
        lines.append(f"  * {family['size']} networks: {names}{more}")
    if lineage["num_leaks"]:
        lines.append(
            f"* {lineage['num_leaks']} networks of the validation and test splits have a nearly equal one in the train split: "
            "scores on those measure memory, not generalisation."
        )
    cosines = [cosine for *_, cosine in lineage["nearest"]]
    if cosines:
        lines.append(
            f"* Similarity to the nearest other network: from {min(cosines):.2f} to {max(cosines):.2f} {_histogram(cosines)}"
        )
    return lines[0] + "\n\n" + lines[1] + "\n\n" + "\n".join(lines[2:])


def _how_to_load(everything: pa.Table, info: Mapping[str, Any]) -> str:
    in_files = everything["weights_file"].null_count < len(everything)
    read = (
        'path = hf_hub_download(repo, row["weights_file"], repo_type="dataset")\nstate_dict = safetensors.torch.load_file(path)'
        if in_files
        else 'state_dict = safetensors.torch.load(row["weights"])'
    )
    imports = "from huggingface_hub import hf_hub_download\n" if in_files else ""
    return f"""## How to load

```python
import safetensors.torch
from datasets import load_dataset
{imports}
repo = "namespace/name of this zoo, or its folder"
row = load_dataset(repo, split="{next(iter(info["files"])).split("/")[1].split("-")[0]}", streaming=True).take(1)
row = next(iter(row))
{read}
```

`layouts/` says what stands where in the weights, `symmetries/` (where it is known) which permutations, signs and scales leave
the networks' functions unchanged. Train on it: `accelerate launch hub_scripts/train.py --zoo <repo> --output-dir <folder>`."""


def _megabytes(table: pa.Table) -> str:
    return f"{sum(table['weights_size'].to_pylist()) / 1e6:,.1f} MB"


def _digest(split: str, info: Mapping[str, Any]) -> str:
    """One checksum of a split: of the checksums of its files, in order."""
    digests = [found["sha256"] for name, found in info["files"].items() if name.startswith(f"data/{split}-")]
    return f"`{checksum(''.join(digests).encode())[:16]}…`"


def _size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    for limit, text in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if rows < limit:
            return text
    return "100K<n<1M" if rows < LARGEST_FOR_CATEGORY else "n>1M"
