"""Cards: of a zoo, made from its data, and of a model trained on one."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hub_scripts.zoos.schema import PROPERTIES
from hub_scripts.zoos.tasks import SPLITS

LARGEST_FOR_CATEGORY = 1_000_000


def zoo_card(name: str, rows: Mapping[str, list[dict[str, Any]]], info: Mapping[str, Any]) -> str:
    """README.md of a zoo.

    Args:
        name (`str`): title.
        rows (`Mapping[str, list[dict]]`): rows by split.
        info (`Mapping`): what `zoo.json` holds.
    """
    everything = [row for split in SPLITS for row in rows.get(split, ())]
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in SPLITS if rows.get(split))
    counts = "\n".join(
        f"| {split} | {len({row['model_id'] for row in rows[split]})} | {len(rows[split])} |"
        for split in SPLITS
        if rows.get(split)
    )
    ranges = "\n".join(
        f"| `{prop}` | {min(values):.4g} | {sum(values) / len(values):.4g} | {max(values):.4g} |"
        for prop in PROPERTIES
        if (values := [row[prop] for row in everything if row.get(prop) is not None])
    )
    architectures = "\n".join(
        f"* `{architecture}` with `{kwargs}`: {count} checkpoints"
        for (architecture, kwargs), count in Counter(
            (row["architecture"], row["architecture_kwargs"]) for row in everything
        ).items()
    )
    hparams = sorted({key for row in everything for key in row if key.startswith("hparams_")})
    before = [row["alignment_distance_before"] for row in everything]
    after = [row["alignment_distance_after"] for row in everything]
    return f"""---
pretty_name: {name}
library_name: datasets
tags:
- model-zoo
- weight-space-learning
- sane
size_categories:
- {_size_category(len(everything))}
configs:
- config_name: default
  data_files:
{files}
---

# {name}

A model zoo: each row is one checkpoint of one network, its weights as safetensors bytes, its properties and
hyper-parameters as columns. Splits are by model: all checkpoints of a network stand in one split.

| split | models | checkpoints |
|---|---|---|
{counts}

Task: `{info["task"]}`. Architectures:

{architectures}

| property | lowest | mean | highest |
|---|---|---|---|
{ranges}

Hyper-parameter columns: {", ".join(f"`{key}`" for key in hparams) or "none"}.

All networks are aligned by weight matching to `{info["alignment_reference"]}`, a network of the train split: mean distance
{sum(before) / len(before):.2f} before, {sum(after) / len(after):.2f} after. `alignment_permutations` holds what was done, so that the
original order of the neurons can be restored.

```python
import safetensors.torch
from datasets import load_dataset

zoo = load_dataset("path or repo of this zoo", split="test")
state_dict = safetensors.torch.load(zoo[0]["weights"])
```
"""


def model_card(zoo: Any, results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """README.md of a SANE model.

    Args:
        zoo ([`Zoo`]): what it was trained on.
        results (`Mapping`): what training measured: `steps`, `seconds`, `compression`, `validation`.
        settings (`Mapping`): the arguments of training.
    """
    scores = results["validation"]
    metrics = "\n".join(
        f"    - type: {kind}\n      value: {scores[key]:.4f}\n      name: {text}"
        for key, kind, text in (
            ("r2", "r_squared", "R2 of reconstructed weights"),
            ("accuracy_decoded", "accuracy", "accuracy of decoded networks"),
        )
    )
    rows = "\n".join(f"| `{key}` | {value} |" for key, value in settings.items() if key not in ("output_dir", "zoo"))
    name = zoo.folder.name if zoo.folder.is_dir() and zoo.name == str(zoo.folder) else zoo.name
    return f"""---
library_name: transformers
tags:
- sane
- weight-space-learning
- model-zoo
model-index:
- name: SANE on {name}
  results:
  - task:
      type: feature-extraction
      name: embedding and reconstruction of network weights
    dataset:
      type: {name}
      name: {name}
      split: validation
    metrics:
{metrics}
---

# SANE on {name}

A sequential autoencoder for neural embeddings (SANE): it reads the weights of a neural network as a sequence of tokens and gives
one latent vector a token; the decoder turns latents into working weights. Trained on {zoo.num_models} networks
({len(zoo.rows("train"))} checkpoints in the train split) of the task `{zoo.info["task"]}`.

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("path or repo", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path or repo", trust_remote_code=True)
batch = tokenizer(state_dict)  # of a network of the same architecture
latents = model.encode_sequence(batch["token_values"], batch["position_ids"], layer_kind_ids=batch["layer_kind_ids"])
```

Measured on networks of the validation split: R² of the weights {scores["r2"]:.3f} at {results["compression"]:.2f} weight values a latent
value; decoded networks reach accuracy {scores["accuracy_decoded"]:.3f}, the originals {scores["accuracy_original"]:.3f}.
Trained for {results["steps"]} steps in {results["seconds"]:.0f} s on {results["num_processes"]} process(es), seed {results["seed"]}.

It knows networks like those of its zoo; others can be tokenised, but what the model makes of them was not measured.

| setting | value |
|---|---|
{rows}
"""


def _size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    for limit, text in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if rows < limit:
            return text
    return "100K<n<1M" if rows < LARGEST_FOR_CATEGORY else "n>1M"
