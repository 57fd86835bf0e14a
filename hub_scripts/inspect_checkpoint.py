"""What is in a checkpoint, from its headers alone; with its symmetries, if they are known or asked for."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.evaluation.functional import build_module
from hub_scripts.symmetries import cached_symmetries
from tokenization_sane import PACKINGS, CheckpointFiles, CheckpointLayout, SymmetrySpec

PROGRAM = "sane inspect-checkpoint"
LONGEST_LIST = 5  # names of a kind that the table shows
MOST_PARAMETERS = 1_000_000_000  # a search runs the network in float64, at several times its size


@dataclass
class InspectArguments:
    r"""Show the layers of a checkpoint, their kinds, and the tokens they are cut into; no weight is read.

    A checkpoint is a safetensors file, a folder of shards, a Hub repository (only headers are downloaded), an .npz or Keras .h5
    file, or a torch pickle (--allow-pickle). Its symmetries are shown if they were saved beside it, in symmetries/; --symmetries
    searches for them, in the network that config.json or --architecture names.

    Example:
      sane inspect-checkpoint model.safetensors --token-size 288
      sane inspect-checkpoint namespace/name@main folder_with_shards --json
      sane inspect-checkpoint old.pth --allow-pickle
      sane inspect-checkpoint folder_with_config --symmetries
      sane inspect-checkpoint net.safetensors --architecture timm:create_model --input-shape 3,32,32 \
        --architecture-kwargs '{"model_name": "resnet18"}'
    """

    token_size: int = field(default=288, metadata={"help": "Weight values in a token."})
    packing: str = field(default="dense", metadata={"help": "How layers are cut: dense, flat or paper."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})
    allow_pickle: bool = field(
        default=False, metadata={"help": "Also open .bin, .pt and .pth files, with weights_only=True."}
    )
    symmetries: bool = field(default=False, metadata={"help": "Search for the network's symmetries; takes seconds."})
    architecture: str | None = field(
        default=None,
        metadata={"help": "package.module:Name of the network, called as you write it; by default config.json tells."},
    )
    architecture_kwargs: str = field(default="{}", metadata={"help": "Its keyword arguments, as JSON."})
    input_shape: str | None = field(
        default=None,
        metadata={"help": "Sizes of one input without the batch axis, e.g. 3,32,32; by default it is guessed."},
    )
    source: list[str] = field(
        default_factory=list, init=False, metadata={"help": "Files, folders or Hub repositories (name@revision)."}
    )

    def __post_init__(self) -> None:
        CheckpointLayout.build([], self.token_size, self.packing)  # checks both
        keyword_arguments(self.architecture_kwargs)
        input_sizes(self.input_shape)
        if not self.architecture and self.architecture_kwargs != "{}":
            raise ValueError("--architecture-kwargs needs --architecture.")
        if self.input_shape and not (self.symmetries or self.architecture):
            raise ValueError("--input-shape is for --symmetries; add that flag.")


def inspect_checkpoint(
    source: str | Path, token_size: int = 288, packing: str = "dense", allow_pickle: bool = False
) -> tuple[dict[str, Any], CheckpointLayout]:
    """The layers, tied and passed-through tensors and token counts of a checkpoint, and its layout.

    Args:
        source (`str` or `Path`): file, folder or Hub repository.
        token_size (`int`): weight values in a token.
        packing (`str`): how layers are cut.
        allow_pickle (`bool`): True opens pickles too.

    Raises:
        ValueError: If the checkpoint cannot be read, see [`CheckpointFiles`].
    """
    with CheckpointFiles(source, allow_pickle) as files:
        layout = CheckpointLayout.build(files.specs, token_size, packing, files.ties)
    cuts = {name: layout.repack(packing=name) for name in PACKINGS}
    kinds, dtypes = Counter(), Counter()
    for layer in layout.layers:
        kinds[layer.kind] += layer.numel
        for tensor in layer.tensors:
            dtypes[tensor.dtype] += tensor.numel
    found = {
        "source": str(source),
        "files": files.files,
        "skipped_files": files.skipped,
        "fingerprint": layout.fingerprint,
        "token_size": token_size,
        "packing": packing,
        "num_parameters": layout.num_parameters,
        "num_tokens": layout.num_tokens,
        "fill": layout.fill,
        "packings": {name: {"num_tokens": cut.num_tokens, "fill": cut.fill} for name, cut in cuts.items()},
        "parameters_by_kind": dict(kinds.most_common()),
        "parameters_by_dtype": dict(dtypes.most_common()),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "rows": layer.rows,
                "columns": layer.columns,
                "num_tokens": layer.num_tokens,
                "dtypes": sorted({tensor.dtype for tensor in layer.tensors}),
                "tensors": [
                    {
                        "name": tensor.name,
                        "shape": list(tensor.shape),
                        "dtype": tensor.dtype,
                        "row_axis": tensor.row_axis,
                    }
                    for tensor in layer.tensors
                ],
            }
            for layer in layout.layers
        ],
        "passthrough": [
            {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype} for spec in layout.passthrough
        ],
        "ties": dict(layout.ties),
        "ignored": dict(files.ignored),
        "symmetries": None,
    }
    return found, layout


# ---------------------------------------------------------------------------------------------------- symmetries
def saved_symmetries(source: str | Path, layout: CheckpointLayout) -> SymmetrySpec | None:
    """The symmetries that a zoo or tokenizer keeps beside a checkpoint, if it knows this layout.

    Args:
        source (`str` or `Path`): the checkpoint; looked for in its folder and the one above.
        layout ([`CheckpointLayout`]): its fingerprint is the file's name.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(source).absolute()
    for folder in (path, *path.parents[:2]):
        file = folder / "symmetries" / f"{layout.fingerprint}.json"
        if file.is_file():
            try:
                return SymmetrySpec.from_json(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
    return None


def describe_symmetries(spec: SymmetrySpec, layout: CheckpointLayout, origin: str) -> dict[str, Any]:
    """Groups by kind, and the share of the layout's values that a permutation moves along at least one axis.

    Args:
        spec ([`SymmetrySpec`]): symmetries of the network.
        layout ([`CheckpointLayout`]): of the checkpoint.
        origin (`str`): where they come from, in words.
    """
    return {
        "origin": origin,
        "groups": dict(Counter(group.kind for group in spec.groups)),
        "units": dict(sum((Counter({group.kind: group.size}) for group in spec.groups), Counter())),
        "covered": spec.coverage({name: tensor.real_shape for name, tensor in layout.tensors.items()}),
        "max_error": max((group.max_error for group in spec.groups), default=0.0),
        "rejected": [{"name": group.name, "size": group.size, "reason": group.reason} for group in spec.rejected],
    }


def search_symmetries(
    source: str | Path,
    layout: CheckpointLayout,
    architecture: str | None = None,
    architecture_kwargs: str = "{}",
    input_shape: str | None = None,
) -> dict[str, Any]:
    """Build the network that a checkpoint belongs to, with weights of its own, and search for its symmetries.

    Args:
        source (`str` or `Path`): the checkpoint; `config.json` beside it names the architecture, unless it is given.
        layout ([`CheckpointLayout`]): of the checkpoint.
        architecture (`str`, *optional*): `"package.module:Name"`. It is called whatever it is.
        architecture_kwargs (`str`): its keyword arguments, as JSON.
        input_shape (`str`, *optional*): sizes of one input without the batch axis, joined by commas.

    Raises:
        ValueError: If the network cannot be built, is not the checkpoint's, or does not run on the inputs.
    """
    if layout.num_parameters > MOST_PARAMETERS:
        raise ValueError(
            f"{source} has {layout.num_parameters:,} values; a search builds the network several times over, so it is done "
            f"up to {MOST_PARAMETERS:,}. Search a smaller network of the same family."
        )
    kwargs = keyword_arguments(architecture_kwargs)
    # the user has typed the name, so it may be a function too
    module = build_module(architecture, kwargs, trust=True) if architecture else _module_from_config(source)
    names = {*module.state_dict()}
    unknown = [name for name in layout.order if name not in names]
    if len(unknown) == len(layout.order):
        raise ValueError(
            f"{type(module).__name__} has no tensor called like any in {source}, whose first is {layout.order[0]}; give "
            "its architecture with --architecture."
        )
    spec = cached_symmetries(module.eval(), layout, example_inputs(module, input_sizes(input_shape)))
    found = describe_symmetries(spec, layout, f"found in {type(module).__name__}")
    return found | {"tensors_not_in_network": unknown}


def _module_from_config(source: str | Path) -> nn.Module:
    """The transformers model that `config.json` beside the checkpoint names; code from a repository is never run."""
    path, revision = Path(source), None
    remedy = "Give the network with --architecture package.module:Name."
    place: str | Path = path if path.is_dir() else path.parent
    if not path.exists():
        place, _, revision = str(source).partition("@")
    elif not (place / "config.json").is_file():
        raise ValueError(f"there is no config.json beside {source}, which would tell the architecture. {remedy}")
    try:
        config = transformers.AutoConfig.from_pretrained(place, revision=revision or None, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"config.json of {source} cannot be used: {reason} {remedy}") from error
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(
            f"config.json of {source} names the architectures {names}, transformers has none such. {remedy}"
        )
    return model_class(config)


def example_inputs(module: nn.Module, sizes: tuple[int, ...] | None) -> Any:
    """Small inputs for a network: of the given sizes, or as its transformers configuration implies."""
    generator = torch.Generator().manual_seed(0)
    config = getattr(module, "config", None)
    name = getattr(module, "main_input_name", None)
    if sizes is None and name == "pixel_values":
        side = getattr(config, "image_size", None) or 32
        side = list(side) if isinstance(side, (list, tuple)) else [side, side]
        sizes = (getattr(config, "num_channels", 3), *side)
    if sizes is not None:
        values = torch.randn(2, *sizes, generator=generator)
        return {name: values} if isinstance(name, str) and isinstance(module, transformers.PreTrainedModel) else values
    if isinstance(module, transformers.PreTrainedModel) and name == "input_ids":
        inputs = dict(module.dummy_inputs)
        inputs["input_ids"] = inputs["input_ids"] % config.get_text_config().vocab_size
        return inputs
    raise ValueError(
        f"the inputs of {type(module).__name__} are not known; give their sizes, e.g. --input-shape 3,32,32."
    )


def keyword_arguments(text: str) -> dict[str, Any]:
    """Keyword arguments of an architecture, from JSON."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--architecture-kwargs is no JSON: {error}.") from error
    if not isinstance(found, dict) or "trust_remote_code" in text:
        raise ValueError("--architecture-kwargs must be a JSON object, without trust_remote_code.")
    return found


def input_sizes(text: str | None) -> tuple[int, ...] | None:
    """Sizes of one input, from a text such as 3,32,32; None stays."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"--input-shape is {text!r}, expected sizes joined by commas, such as 3,32,32.")
    return tuple(int(part) for part in parts)


# ---------------------------------------------------------------------------------------------------- table
def _table(found: Mapping[str, Any]) -> str:
    width = max([len(layer["name"]) for layer in found["layers"]] + [5])
    files = _listed(found["files"])
    lines = [
        f"{found['source']}" + (f" ({files})" if files != Path(found["source"]).name else ""),
        f"{'layer':<{width}}  {'kind':<9} {'rows':>8} {'columns':>8} {'tokens':>8}  dtype",
    ]
    for layer in found["layers"]:
        axes = sorted({tensor["row_axis"] for tensor in layer["tensors"]} - {0})
        note = f"  rows are axis {', '.join(map(str, axes))}" if axes else ""
        lines.append(
            f"{layer['name']:<{width}}  {layer['kind']:<9} {layer['rows']:>8} {layer['columns']:>8} "
            f"{layer['num_tokens']:>8}  {', '.join(layer['dtypes'])}{note}"
        )
    total = found["num_parameters"]
    lines += [
        "",
        f"{total:,} values in {len(found['layers'])} layers, fingerprint {found['fingerprint']}",
        f"tokens of {found['token_size']}: "
        + "; ".join(
            f"{name} {cut['num_tokens']:,}, fill {cut['fill']:.3f}" for name, cut in found["packings"].items()
        ),
    ]
    for title in ("kind", "dtype"):
        shares = [f"{name} {_percent(count, total)}" for name, count in found[f"parameters_by_{title}"].items()]
        lines.append(f"{title}s: {', '.join(shares)}")
    beside = [f"{spec['name']} ({spec['dtype']} {tuple(spec['shape'])})" for spec in found["passthrough"]]
    for title, names in (
        ("tied", [f"{name} = {kept}" for name, kept in found["ties"].items()]),
        ("passed through", beside),
        ("ignored, no tensors", [f"{name} ({kind})" for name, kind in found["ignored"].items()]),
        ("files not read", found["skipped_files"]),
    ):
        if names:
            lines.append(f"{title}, {len(names)}: {_listed(names)}")
    if found["symmetries"]:
        lines += _symmetry_lines(found["symmetries"])
    return "\n".join(lines)


def _symmetry_lines(found: Mapping[str, Any]) -> list[str]:
    counts = [f"{count} {kind} ({found['units'][kind]:,} units)" for kind, count in found["groups"].items()]
    lines = [
        f"symmetry groups, {found['origin']}: {', '.join(counts) or 'none'}; permutations move "
        f"{100 * found['covered']:.1f} % of the values, largest error {found['max_error']:.0e}"
    ]
    rejected = [f"{group['name']} ({group['reason']})" for group in found["rejected"]]
    unknown = found.get("tensors_not_in_network", [])
    if rejected:
        lines.append(f"groups that did not hold, {len(rejected)}: {_listed(rejected)}")
    if unknown:
        lines.append(f"tensors that this network does not have, {len(unknown)}: {_listed(unknown)}")
    return lines


def _percent(part: int, total: int) -> str:
    return f"{100 * part / total:.1f} %" if total else "0 %"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - LONGEST_LIST
    return ", ".join(names[:LONGEST_LIST]) + (f", and {more} more (--json shows all)" if more > 0 else "")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane inspect-checkpoint`."""
    args = parse_arguments(InspectArguments, argv, PROGRAM)

    def command(args: InspectArguments) -> None:
        results = []
        for source in args.source:
            found, layout = inspect_checkpoint(source, args.token_size, args.packing, args.allow_pickle)
            saved = saved_symmetries(source, layout)
            if saved is not None:
                found["symmetries"] = describe_symmetries(saved, layout, "as saved beside it")
            elif args.symmetries or args.architecture:
                found["symmetries"] = search_symmetries(
                    source, layout, args.architecture, args.architecture_kwargs, args.input_shape
                )
            results.append(found)
        print(json.dumps(results, indent=2) if args.json else "\n\n".join(map(_table, results)))

    run_command(command, args, PROGRAM)


if __name__ == "__main__":
    main()
