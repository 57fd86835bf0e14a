"""Which layers moved between two checkpoints, once their units stand in the same order."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.evaluation import layer_plots
from hub_scripts.evaluation.embedder import Embedder
from hub_scripts.evaluation.functional import build_module
from hub_scripts.evaluation.layer_profiles import layer_embeddings, spectral_norm
from hub_scripts.inspect_checkpoint import (
    MOST_PARAMETERS,
    example_inputs,
    input_sizes,
    keyword_arguments,
    saved_symmetries,
)
from hub_scripts.outputs import new_folder, require_empty, write_json
from hub_scripts.symmetries import cached_symmetries
from tokenization_sane import Alignment, CheckpointFiles, CheckpointLayout, SymmetrySpec, TensorLayout, WeightMatcher
from tokenization_sane.checkpoint_sane import read_checkpoint

PROGRAM = "sane diff"
MARKED = 3  # tensors with the largest relative change that are marked


@dataclass
class DiffArguments:
    r"""Show which layers moved between two checkpoints A and B: by how much, and in which direction.

    A checkpoint is anything `sane inspect-checkpoint` reads. Tensors are read one after another. Where the network's symmetries
    are known (to the SANE model, from --architecture, or saved beside a checkpoint) both are read whole and B is first brought
    into A's order by weight matching over permutations and signs, so that permuted twins do not differ. Scales of units stay as
    they are: they are part of what moved.

    Example:
      sane diff base.safetensors finetuned.safetensors
      sane diff namespace/name@main folder_with_shards --model runs/model --output-dir runs/diff
      sane diff a.safetensors b.safetensors --architecture hub_scripts.zoos.architectures:SmallCNN --input-shape 1,8,8
    """

    model: str | None = field(
        default=None,
        metadata={"help": "SANE model (folder or Hub repository): also compare the latents of each layer."},
    )
    align: str = field(
        default="auto",
        metadata={"help": "auto: align B to A where symmetries are known; never: compare them as they are."},
    )
    architecture: str | None = field(
        default=None, metadata={"help": "package.module:Name of the network, to find its symmetries."}
    )
    architecture_kwargs: str = field(default="{}", metadata={"help": "Its keyword arguments, as JSON."})
    input_shape: str | None = field(
        default=None, metadata={"help": "Sizes of one input of it without the batch axis, e.g. 1,8,8."}
    )
    allow_pickle: bool = field(
        default=False, metadata={"help": "Also open .bin, .pt and .pth files, with weights_only=True."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results.json and a plot; must not exist yet."}
    )
    a: str = field(default="", init=False, metadata={"help": "File, folder or Hub repository (name@revision)."})
    b: str = field(default="", init=False, metadata={"help": "The checkpoint that is compared with it."})

    def __post_init__(self) -> None:
        if self.align not in ("auto", "never"):
            raise ValueError(f"--align is {self.align!r}, expected auto or never.")
        keyword_arguments(self.architecture_kwargs)
        input_sizes(self.input_shape)
        if not self.architecture and (self.architecture_kwargs != "{}" or self.input_shape):
            raise ValueError("--architecture-kwargs and --input-shape need --architecture.")
        if self.architecture and self.align == "never":
            raise ValueError("--architecture is for aligning; leave it out, or leave out --align never.")


# ---------------------------------------------------------------------------------------------------- tensors
def compare(a: CheckpointFiles, b: CheckpointFiles) -> dict[str, Any]:
    """Figures of each tensor in A and B; two tensors are in memory at a time, as float64.

    Args:
        a ([`CheckpointFiles`]): an open checkpoint, or a wrapped state dict.
        b ([`CheckpointFiles`]): the one that is compared with it.

    Returns:
        `dict[str, Any]`: `tensors` (one entry each, in A's order), `only_in_a`, `only_in_b`, `other_shapes`, `other_dtypes`
        and `counts`. Names that are tied to another in both checkpoints are counted, and compared under that other name.
    """
    ours, theirs = _tensors(a), _tensors(b)
    tied = {name for name in a.ties if b.ties.get(name) == a.ties[name]}
    tensors, other_shapes, other_dtypes = [], [], []
    for name, one in ours.items():
        other = theirs.get(name)
        if name in tied or other is None:
            continue
        if one.shape != other.shape:
            other_shapes.append({"name": name, "shape_a": list(one.shape), "shape_b": list(other.shape)})
            continue
        is_comparable = _has_weights(one) == _has_weights(other)
        if one.dtype != other.dtype:
            found = {"name": name, "dtype_a": one.dtype, "dtype_b": other.dtype, "compared": is_comparable}
            other_dtypes.append(found)
        if is_comparable:
            tensors.append({"name": name, "shape": list(one.shape), "dtype": one.dtype, **_figures(a, one, b, other)})
    most = sorted((t for t in tensors if t.get("relative_change")), key=lambda t: -t["relative_change"])[:MARKED]
    for entry in tensors:
        entry["moved_most"] = any(entry is one for one in most)
    found = {
        "tensors": tensors,
        "only_in_a": [name for name in ours if name not in theirs],
        "only_in_b": [name for name in theirs if name not in ours],
        "other_shapes": other_shapes,
        "other_dtypes": other_dtypes,
    }
    found["counts"] = {
        "compared": len(tensors),
        "unchanged": sum(entry["different_values"] == 0 for entry in tensors),
        "tied": len(tied),
        **{kind: len(found[kind]) for kind in ("only_in_a", "only_in_b", "other_shapes", "other_dtypes")},
    }
    return found


def _tensors(files: CheckpointFiles) -> dict[str, TensorLayout]:
    """All names of a checkpoint, tied ones last; a tied name has the layout of the tensor it stands for."""
    known = CheckpointLayout.build(files.specs).tensors
    found = {
        spec.name: known.get(spec.name) or TensorLayout(spec.name, tuple(spec.shape), spec.dtype)
        for spec in files.specs
    }
    return found | {name: found[kept] for name, kept in files.ties.items()}


def _has_weights(tensor: TensorLayout) -> bool:
    """False for integers and the like, of which no norm makes sense."""
    return tensor.torch_dtype.is_floating_point or tensor.torch_dtype.is_complex


def _figures(a: CheckpointFiles, one: TensorLayout, b: CheckpointFiles, other: TensorLayout) -> dict[str, Any]:
    """Figures of one tensor in A and B; None where a figure is not defined."""
    first, second = (files.rows(tensor, 0, tensor.rows) for files, tensor in ((a, one), (b, other)))
    if not _has_weights(one):
        return {"values": one.numel, "different_values": int((first != second).sum())}
    first, second = first.double(), second.double()
    names = ("norm_a", "norm_b", "relative_change", "cosine", "spectral_norm_a", "spectral_norm_b")
    figures: dict[str, Any] = {
        "values": one.numel,
        "different_values": int((first != second).sum()),
        "not_finite_a": int((~first.isfinite()).sum()),
        "not_finite_b": int((~second.isfinite()).sum()),
        **dict.fromkeys(names),
    }
    if figures["not_finite_a"] or figures["not_finite_b"]:
        return figures
    sizes = first.norm().item(), second.norm().item()
    figures["norm_a"], figures["norm_b"] = sizes
    if sizes[0]:
        figures["relative_change"] = (second - first).norm().item() / sizes[0]
    elif not sizes[1]:
        figures["relative_change"] = 0.0
    if sizes[0] and sizes[1]:
        cosine = torch.dot(first.flatten(), second.flatten()).item() / math.prod(sizes)
        figures["cosine"] = max(-1.0, min(1.0, cosine))
    if len(one.real_shape) > 1 and one.numel:
        figures["spectral_norm_a"], figures["spectral_norm_b"] = (
            spectral_norm(one.to_table(tensor)).item() for tensor in (first, second)
        )
    return figures


# ---------------------------------------------------------------------------------------------------- alignment
def known_symmetries(
    args: DiffArguments, layout: CheckpointLayout, embedder: Embedder | None
) -> tuple[SymmetrySpec | None, str]:
    """Permutations and signs of the network, and where they come from; (None, why not) if they are not known.

    Args:
        args ([`DiffArguments`]): an architecture goes before the SANE model, and that before what is saved beside a checkpoint.
        layout ([`CheckpointLayout`]): of A.
        embedder ([`Embedder`], *optional*): of the SANE model.

    Raises:
        ValueError: If the architecture cannot be built or run, or is not the checkpoint's.
    """
    spec, origin = None, "symmetries are not known; give --architecture, or a --model that knows them"
    if args.architecture:
        spec, origin = _search(args, layout), f"found in {args.architecture}"
    elif embedder is not None and embedder.has_symmetries(layout):
        text = embedder.tokenizer.symmetries[layout.fingerprint]
        spec, origin = SymmetrySpec.from_json(text), f"of {args.model}"
    else:
        for source in (args.a, args.b):
            if spec is None and Path(source).exists():
                spec = saved_symmetries(source, layout)
                origin = origin if spec is None else f"saved beside {source}"
    return (None, origin) if spec is None else (spec.of_kind("permutation", "sign"), origin)


def _search(args: DiffArguments, layout: CheckpointLayout) -> SymmetrySpec:
    if layout.num_parameters > MOST_PARAMETERS:
        raise ValueError(
            f"{args.a} has {layout.num_parameters:,} values; symmetries are searched in networks of up to "
            f"{MOST_PARAMETERS:,}. Leave out --architecture."
        )
    module = build_module(args.architecture, keyword_arguments(args.architecture_kwargs), trust=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, tensor in layout.tensors.items():
        if shapes.get(name) != tensor.shape:
            found = f"of shape {shapes[name]}" if name in shapes else "missing"
            raise ValueError(
                f"{args.architecture} is not the network of {args.a}: {name} has shape {tensor.shape} in the file and is "
                f"{found} in the network; check --architecture-kwargs."
            )
    return cached_symmetries(module.eval(), layout, example_inputs(module, input_sizes(args.input_shape)))


def describe_alignment(alignment: Alignment, spec: SymmetrySpec) -> dict[str, Any]:
    """How many units took another place or sign, and the L2 distance over what the symmetries move, before and after."""
    counts = {"units": 0, "units_moved": 0, "signs": 0, "signs_flipped": 0}
    for group, draw in zip(spec.groups, alignment.draw, strict=True):
        kind, changed = ("units", "units_moved") if group.kind == "permutation" else ("signs", "signs_flipped")
        still = torch.arange(group.size) if group.kind == "permutation" else torch.ones(group.size)
        counts[kind] += group.size
        counts[changed] += int((draw != still).sum())
    return {**counts, "distance_before": alignment.distance_before, "distance_after": alignment.distance_after}


# ---------------------------------------------------------------------------------------------------- latents
def latent_distances(
    embedder: Embedder,
    a: Mapping[str, torch.Tensor],
    b: Mapping[str, torch.Tensor],
    spec: SymmetrySpec | None,
) -> dict[str, float]:
    """Distance between mean and standard deviation of the latents of each layer, by the names of its tensors.

    Args:
        embedder ([`Embedder`]): of the SANE model.
        a (`Mapping[str, torch.Tensor]`): a state dict.
        b (`Mapping[str, torch.Tensor]`): another of the same layout.
        spec ([`SymmetrySpec`], *optional*): both are encoded in A's canonical order; without it as they are.

    Raises:
        ValueError: If the model does not know the layout, or a weight is not finite.
    """
    tokenizer = embedder.tokenizer
    a, b = ({n: t.float() if t.dtype == torch.float64 else t for n, t in one.items()} for one in (a, b))
    codec = embedder.codec(tokenizer.layout(a))
    layout = codec.layout
    if spec is not None and embedder.has_symmetries(layout):
        # a model reads zoo networks in this order; B must follow A, as its own may differ where two units are of nearly one size
        stacked = embedder.canonical({name: tensor[None] for name, tensor in a.items()}, layout)
        a = {name: tensor[0] for name, tensor in stacked.items()}
        b = WeightMatcher(spec, a).align(b).state_dict
    tokens = torch.cat([tokenizer(one, layout, non_finite="error")["token_values"] for one in (a, b)])
    embeddings = layer_embeddings(codec.encode(tokens), layout.layer_ids)  # (2, layers, features)
    distances = np.linalg.norm(embeddings[1] - embeddings[0], axis=-1).tolist()
    found = {}
    for index, distance in zip(np.unique(layout.layer_ids), distances, strict=True):
        found |= {tensor.name: distance for tensor in layout.layers[index].tensors}
    return found


# ---------------------------------------------------------------------------------------------------- command
def diff(args: DiffArguments) -> dict[str, Any]:
    """Compare two checkpoints; returns what `results.json` holds under `diff`.

    Raises:
        ValueError: If one cannot be read, or what was asked for does not fit them.
    """
    if args.output_dir:
        require_empty(args.output_dir)
    embedder = Embedder.from_pretrained(args.model) if args.model else None
    with CheckpointFiles(args.a, args.allow_pickle) as a, CheckpointFiles(args.b, args.allow_pickle) as b:
        layout, other = (CheckpointLayout.build(files.specs, ties=files.ties) for files in (a, b))
        if embedder is not None and layout.fingerprint != other.fingerprint:
            raise ValueError(
                f"{args.b} has other tensors or shapes than {args.a}, so their latents cannot be compared; leave out --model."
            )
        if embedder is not None:
            layout = embedder.tokenizer.layout(args.a, args.allow_pickle)  # in the order that the model knows
        spec, origin = None, "--align never"
        if args.align == "auto":
            spec, origin = known_symmetries(args, layout, embedder)
        aligned, alignment = None, {"aligned": False, "reason": origin}
        whole = None
        if spec is not None or embedder is not None:
            whole = read_checkpoint(args.a, args.allow_pickle)
            aligned = read_checkpoint(args.b, args.allow_pickle)
        if spec is not None:
            try:
                found = WeightMatcher(spec, whole).align(aligned)
                aligned = found.state_dict
                alignment = {"aligned": True, "symmetries": origin, **describe_alignment(found, spec)}
            except (
                ValueError
            ) as error:  # a tensor is missing, has another shape or is not finite: the comparison tells
                spec, alignment = None, {"aligned": False, "reason": str(error)}
        results = {"a": args.a, "b": args.b, "alignment": alignment}
        results |= compare(a, b if spec is None else CheckpointFiles(aligned))
        results["ignored"] = {"a": dict(a.ignored), "b": dict(b.ignored)}
    if embedder is not None:
        distances = latent_distances(embedder, whole, aligned, spec)
        for entry in results["tensors"]:
            entry["latent_distance"] = distances.get(entry["name"])
    if args.output_dir:
        with new_folder(args.output_dir) as folder:
            write_json(folder / "results.json", {"diff": results, "arguments": asdict(args)})
            entries = [entry for entry in results["tensors"] if entry.get("relative_change") is not None]
            if entries:
                names, changes, marked = (
                    [entry[key] for entry in entries] for key in ("name", "relative_change", "moved_most")
                )
                layer_plots.relative_changes(names, changes, marked).savefig(folder / "relative_change.png")
    return results


def _table(found: Mapping[str, Any]) -> str:
    names = [entry["name"] for key in ("tensors", "other_shapes", "other_dtypes") for entry in found[key]]
    width = max(map(len, [*names, *found["only_in_a"], *found["only_in_b"], "tensor"])) + 2
    has_latents = any("latent_distance" in entry for entry in found["tensors"])
    titles = f"{'tensor':<{width}} {'values':>12} {'norm of A':>11} {'change':>10} {'cosine':>9} {'spectral':>10}"
    lines = [f"A  {found['a']}", f"B  {found['b']}", titles + f" {'latents':>9}" * has_latents]
    for entry in found["tensors"]:
        mark = "* " if entry["moved_most"] else "  "
        line = f"{mark + entry['name']:<{width}} {entry['values']:>12,} {_cells(entry)}"
        if has_latents:
            line += f" {_number(entry['latent_distance'], '.4g'):>9}"
        lines.append(line.rstrip())
    for key, text in (("only_in_a", "only in A"), ("only_in_b", "only in B")):
        lines += [f"{'  ' + name:<{width}} {text}" for name in found[key]]
    for entry in found["other_shapes"]:
        shapes = " and ".join(str(tuple(entry[key])) for key in ("shape_a", "shape_b"))
        lines.append(f"{'  ' + entry['name']:<{width}} other shapes: {shapes}")
    for entry in found["other_dtypes"]:
        note = "" if entry["compared"] else ", not compared"
        dtypes = f"{entry['dtype_a']} and {entry['dtype_b']}"
        lines.append(f"{'  ' + entry['name']:<{width}} other dtypes: {dtypes}{note}")
    counts = found["counts"]
    lines += [
        "",
        f"{counts['compared']:,} tensors compared, {counts['unchanged']:,} of them unchanged; only in A "
        f"{counts['only_in_a']:,}, only in B {counts['only_in_b']:,}, other shapes {counts['other_shapes']:,}, other dtypes "
        f"{counts['other_dtypes']:,}, tied in both {counts['tied']:,}",
    ]
    ignored = [f"{name} of {side.upper()} ({kind})" for side in "ab" for name, kind in found["ignored"][side].items()]
    if ignored:
        lines.append(f"ignored, no tensors, {len(ignored)}: {', '.join(ignored)}")
    most = sorted((e for e in found["tensors"] if e["moved_most"]), key=lambda entry: -entry["relative_change"])
    if most:
        lines.append(f"moved most (*): {', '.join(entry['name'] for entry in most)}")
    return "\n".join([*lines, _alignment_line(found["alignment"])])


def _cells(entry: Mapping[str, Any]) -> str:
    if "norm_a" not in entry:
        changed = entry["different_values"]
        return f"{'':>11} {f'{changed:,} differ' if changed else 'equal':>10} {'':>9} {'':>10}"
    if entry["norm_a"] is None:
        return f"not finite: {entry['not_finite_a']:,} values of A, {entry['not_finite_b']:,} of B"
    change, spectral = entry["relative_change"], ""
    if entry["spectral_norm_a"]:
        spectral = f"{100 * (entry['spectral_norm_b'] / entry['spectral_norm_a'] - 1):+.1f} %"
    return (
        f"{entry['norm_a']:>11.4g} {'A is zero' if change is None else f'{change:.4g}':>10} "
        f"{_number(entry['cosine'], '.4f'):>9} {spectral:>10}"
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _alignment_line(found: Mapping[str, Any]) -> str:
    if not found["aligned"]:
        return f"not aligned: {found['reason']}"
    signs = f" and {found['signs_flipped']:,} of {found['signs']:,} signs flipped" if found["signs"] else ""
    return (
        f"B was aligned to A (symmetries {found['symmetries']}): {found['units_moved']:,} of {found['units']:,} units moved"
        f"{signs}; distance {found['distance_before']:.4g} before, {found['distance_after']:.4g} after"
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane diff`."""
    args = parse_arguments(DiffArguments, argv, PROGRAM)

    def command(args: DiffArguments) -> None:
        results = diff(args)
        print(json.dumps(results, indent=2, allow_nan=False) if args.json else _table(results))

    run_command(command, args, PROGRAM)


if __name__ == "__main__":
    main()
