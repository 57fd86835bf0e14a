"""Cards of what is made from a zoo: a SANE model, and networks that it generated."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hub_scripts.zoos.zoo import Zoo

TAGS = ["sane", "weight-space-learning", "model-zoo"]


def model_card(zoos: list[Zoo], results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """README.md of a SANE model.

    Args:
        zoos (`list[Zoo]`): what it was trained on, each of one layout.
        results (`Mapping`): what training measured: `steps`, `seconds`, `compression`, `validation`.
        settings (`Mapping`): the arguments of training.
    """
    scores = results["validation"]
    metrics = [
        {"type": kind, "value": round(scores[key], 4), "name": text}
        for key, kind, text in (
            ("r2", "r_squared", "R2 of reconstructed weights"),
            ("accuracy_decoded", "accuracy", "accuracy of decoded networks"),
        )
        if key in scores
    ]
    at = f"at {results['compression']:.2f} weight values a latent value"
    measured = f"R² of the weights {scores['r2']:.3f} {at}" if "r2" in scores else f"nothing yet, {at}"
    if "accuracy_decoded" in scores:
        measured += (
            f"; decoded networks reach accuracy {scores['accuracy_decoded']:.3f}, the originals "
            f"{scores['accuracy_original']:.3f}"
        )
    rows = "\n".join(f"| `{key}` | {value} |" for key, value in public_settings(settings).items() if key != "zoo")
    name = ", ".join(dict.fromkeys(_title(zoo) for zoo in zoos))
    front = _front_matter(
        f"SANE on {name}",
        {"type": "feature-extraction", "name": "embedding and reconstruction of network weights"},
        {"type": name, "name": name, "split": "validation"},
        metrics,
        datasets=zoos,
        base_model=settings.get("model_name_or_path"),
        library_name="transformers",
    )
    return f"""{front}

# SANE on {name}

A sequential autoencoder for neural embeddings (SANE): it reads the weights of a neural network as a sequence of tokens and gives
one latent vector a token; the decoder turns latents into working weights. Trained on
{_trained_on(zoos)}

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("path or repo", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path or repo", trust_remote_code=True)
batch = tokenizer(state_dict)  # of a network of the same architecture
latents = model.encode_sequence(batch["token_values"], batch["position_ids"], layer_kind_ids=batch["layer_kind_ids"])
```

Measured on networks of the validation split: {measured}.
Trained for {results["steps"]} steps in {results["seconds"]:.0f} s on {results["num_processes"]} process(es), seed {results["seed"]}.

It knows networks like those of its zoo; others can be tokenised, but what the model makes of them was not measured.

| setting | value |
|---|---|
{rows}
"""


def probe_section(zoo: Zoo, results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What a model's card says of what can be predicted with it, as Markdown.

    Args:
        zoo (`Zoo`): on which it was measured.
        results (`Mapping`): what `sane probe` measured: `probe`, `checkpoints`, `left_out`, `categories`, `transfer`.
        settings (`Mapping`): its arguments.
    """
    parts = []
    for key, which in (
        ("probe", f"checkpoints of epoch {settings['first_epoch']} and later"),
        ("probe_all_epochs", "all checkpoints"),
    ):
        header = ("representation", "features", "ridge R² (95 % interval)", "Kendall's τ", "trees R² (95 % interval)")
        for name, kinds in results.get(key, {}).items():
            rows = [
                (f"`{kind}`", f["num_features"], _interval(f, "r2"), f["kendall_tau"], _interval(f, "trees_r2"))
                for kind, f in kinds.items()
            ]
            parts.append(_table(f"{name.replace('_', ' ')}, {which}", header, rows))
    for name, kinds in results["categories"].items():
        header = ("representation", "logistic regression", "F1", "trees", "F1", "always the commonest")
        keys = ("accuracy", "f1", "trees_accuracy", "trees_f1", "majority")
        rows = [(f"`{kind}`", *(f[key] for key in keys)) for kind, f in kinds.items()]
        parts.append(_table(f"{name}, a category", header, rows))
    for source, names in results["transfer"].items():
        header = ("property", "representation", "ridge τ", "trees τ", "bias", "mean absolute error")
        rows = []
        for name, kinds in names.items():
            for kind, f in kinds.items():
                taus = (f[probe]["kendall_tau"] for probe in ("ridge", "trees"))
                rows.append((name, f"`{kind}`", *taus, f["ridge"]["bias"], f["ridge"]["mean_absolute_error"]))
        parts.append(_table(f"Used on {Path(source).name}", header, rows))
    counts = ", ".join(f"{count} {split}" for split, count in results["checkpoints"].items())
    left = "".join(
        f" `{name}` is missing for {sum(counts.values())} of them, which are left out for it."
        for name, counts in results["left_out"].items()
    )
    return (
        f"""## What can be predicted

On {_title(zoo)}: {counts} checkpoints, split by model.{left} Probes are fitted on the train split, their strength is chosen on the
validation split; intervals are of a bootstrap over models. `layer_statistics` is s(W), `weights` are the flattened weights.

![R² of all representations](probes.png)

"""
        + "\n\n".join(parts)
        + "\n"
    )


def _interval(figures: Mapping[str, float], key: str) -> str:
    return f"{figures[key]:.3f} ({figures[f'{key}_low']:.3f} to {figures[f'{key}_high']:.3f})"


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table under its title; fractions with three digits."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return f"### {title}\n\n" + "\n".join(lines)


def networks_card(
    name: str, model: str, zoo: Zoo, figures: Mapping[str, Mapping[str, Any]], info: Mapping[str, Any]
) -> str:
    """README.md of generated networks.

    Args:
        name (`str`): title.
        model (`str`): folder or repository of the SANE model that decoded them.
        zoo ([`Zoo`]): where the anchors are from.
        figures (`Mapping`): by set, what `results.json` holds under `sample`.
        info (`Mapping`): what `networks.json` holds.
    """
    arguments = info["arguments"]
    first = next(iter(info["sets"]))
    front = _front_matter(
        name,
        {"type": "image-classification", "name": f"image classification, {info['task']}"},
        {"type": info["task"], "name": info["task"], "split": "test"},
        [{"type": "accuracy", "value": round(float(figures[first]["accuracy_mean"]), 4),
          "name": f"mean accuracy of {figures[first]['count']} networks drawn ({first}), without training"}],
        datasets=[zoo],
        base_model=model,
        library_name="pytorch",
    )  # fmt: skip
    sets = "\n".join(
        f"| `{key}` | {found['count']} | {found['accuracy_mean']:.3f} | {found['accuracy_top5']:.3f} | "
        f"{found['accuracy_ensemble']:.3f} | {found['disagreement']:.3f} | {found['nearest_train_distance']:.1f} |"
        for key, found in figures.items()
    )
    networks = "\n".join(
        f"| `{network['file']}` | {network['test_accuracy']:.3f} | {network['nearest_train_distance']:.1f} |"
        for found in info["sets"].values()
        for network in found
    )
    return f"""{front}

# {name}

Networks whose weights were generated, not trained: latents drawn by {_drawn(arguments)}, decoded by the SANE model
`{arguments["model"]}`, and chosen by their accuracy on validation images ({arguments["keep"]} of {arguments["count"]} in each set).
Sets called `refined` took {arguments["refine_steps"]} gradient steps towards {arguments["refine_target"]}. Beside them, for comparison: the
anchors themselves, the anchors with noise, and averages of anchors. Task `{info["task"]}`, seed {arguments["seed"]}.

* Architecture: `{info["architecture"]}` with `{info["architecture_kwargs"]}`
* Anchors, of the zoo `{_title(zoo)}`: {", ".join(f"`{anchor}`" for anchor in info["anchors"])}

All networks drawn, measured on test images. Distance is to the nearest checkpoint of the train split, in normalised weights:
`unseen` is what networks of other runs have. Ensemble and disagreement are of the {arguments["keep"]} networks that were kept: accuracy of their
averaged probabilities, and share of images on which two of them predict different classes.

| set | networks | accuracy | best {5} by validation | ensemble | disagreement | distance |
|---|---|---|---|---|---|---|
{sets}

```python
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

state_dict = load_file(hf_hub_download("namespace/name of this repository", "{info["sets"][first][0]["file"]}"))
```

| file | test accuracy | distance |
|---|---|---|
{networks}
"""


def _drawn(arguments: Mapping[str, Any]) -> str:
    """The samplers of some networks in words."""
    learned = f"trained on the train split, {', '.join(arguments['condition']) or 'no condition'}"
    texts = {
        "laplace": f"`laplace` (Laplace approximation around anchors, bandwidth {arguments['laplace_bandwidth']})",
        "gaussian": "`gaussian` (mean and covariance of the anchors)",
        "interpolation": "`interpolation` (between anchors)",
        "flow": f"`flow` (of whole networks; {learned})",
        "token_flow": f"`token_flow` (of their tokens; {learned})",
    }
    kernel = f"kernel density, bandwidth {arguments['bandwidth']}"
    return ", ".join(texts.get(mode, f"`{mode}` ({kernel})") for mode in arguments["mode"])


def _front_matter(
    name: str,
    task: Mapping[str, str],
    dataset: Mapping[str, str],
    metrics: list[dict[str, Any]],
    datasets: list[Zoo],
    base_model: str | None,
    library_name: str,
) -> str:
    """YAML that the Hub reads; it names only what is on the Hub, not folders of this machine."""
    data: dict[str, Any] = {"library_name": library_name, "tags": TAGS}
    repositories = list(dict.fromkeys(zoo.name for zoo in datasets if not Path(zoo.name).is_dir()))
    if repositories:
        data["datasets"] = repositories
    if base_model and not Path(base_model).exists():
        data["base_model"] = base_model
    data["model-index"] = [
        {"name": name, "results": [{"task": dict(task), "dataset": dict(dataset), "metrics": metrics}]}
    ]
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()}\n---"


def _trained_on(zoos: list[Zoo]) -> str:
    lines = []
    for zoo in zoos:
        task = f", task `{zoo.info['task']}`" if zoo.info.get("task") else ""
        kind = next(rows["architecture"][0] for rows in zoo.splits.values() if len(rows)) or "an unnamed architecture"
        lines.append(
            f"* `{_title(zoo)}`: {zoo.num_models:,} networks of {kind} ({zoo.layout.num_parameters:,} values), "
            f"{len(zoo.rows('train')):,} checkpoints in the train split{task}"
        )
    return "\n" + "\n".join(lines)


def _title(zoo: Zoo) -> str:
    """A zoo's name, without the folders above it."""
    return public_name(zoo.name)


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a command without the folders of this machine."""
    hidden = ("output_dir", "push_to_hub", "hub_model_id", "hub_private")
    return {
        key: _public_value(value) if key in ("zoo", "model", "model_name_or_path", "task", "anchors") else value
        for key, value in settings.items()
        if key not in hidden
    }


def _public_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_public_value(one) for one in value]
    return public_name(value) if value else value


def public_name(source: str) -> str:
    """A repository's name, or a folder's without what is above it."""
    return Path(source).resolve().name if Path(source).exists() else source
