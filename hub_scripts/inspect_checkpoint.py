"""What is in a checkpoint, from its header alone."""

import json
from dataclasses import dataclass, field
from typing import Any

from hub_scripts.arguments import parse_arguments, run_command
from tokenization_sane import SaneWeightTokenizer

PROGRAM = "sane inspect-checkpoint"


@dataclass
class InspectArguments:
    """Show the layers of a checkpoint, their kinds, and the tokens they are cut into; no weight is read.

    Example:
      sane inspect-checkpoint model.safetensors --token_size 288
      sane inspect-checkpoint folder_with_shards --json
    """

    token_size: int = field(default=288, metadata={"help": "Weight values in a token."})
    packing: str = field(default="dense", metadata={"help": "How layers are cut: dense, flat or paper."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})
    source: list[str] = field(
        default_factory=list, init=False, metadata={"help": "A safetensors file, or a folder with them."}
    )


def inspect_checkpoint(source: str, token_size: int = 288, packing: str = "dense") -> dict[str, Any]:
    """The layers, tied and passed-through tensors and token counts of a checkpoint."""
    layout = SaneWeightTokenizer(token_size, packing).layout(source)
    return {
        "source": source,
        "num_parameters": layout.num_parameters,
        "num_tokens": layout.num_tokens,
        "fill": layout.fill,
        "fingerprint": layout.fingerprint,
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "rows": layer.rows,
                "columns": layer.columns,
                "num_tokens": layer.num_tokens,
                "dtypes": sorted({tensor.dtype for tensor in layer.tensors}),
                "tensors": [tensor.name for tensor in layer.tensors],
            }
            for layer in layout.layers
        ],
        "passthrough": [spec.name for spec in layout.passthrough],
        "ties": dict(layout.ties),
    }


def _table(found: dict[str, Any]) -> str:
    width = max([len(layer["name"]) for layer in found["layers"]] + [5])
    lines = [f"{'layer':<{width}}  {'kind':<9} {'rows':>8} {'columns':>8} {'tokens':>8}  dtype"]
    lines += [
        f"{y['name']:<{width}}  {y['kind']:<9} {y['rows']:>8} {y['columns']:>8} {y['num_tokens']:>8}  {', '.join(y['dtypes'])}"
        for y in found["layers"]
    ]
    lines.append(
        f"{found['num_parameters']:,} values in {found['num_tokens']:,} tokens, fill {found['fill']:.3f}; "
        f"{len(found['passthrough'])} tensors pass through, {len(found['ties'])} are tied"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane inspect-checkpoint`."""
    args = parse_arguments(InspectArguments, argv, PROGRAM)

    def command(args: InspectArguments) -> None:
        found = [inspect_checkpoint(source, args.token_size, args.packing) for source in args.source]
        print(json.dumps(found, indent=2) if args.json else "\n\n".join(_table(one) for one in found))

    run_command(command, args, PROGRAM)


if __name__ == "__main__":
    main()
