"""The README's tables about checkpoints and symmetries, from the figures that the benchmarks measured.

python benchmarks/readme.py             print the tables
python benchmarks/readme.py --update    put them into the README
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- checkpoint tables -->\n", "<!-- end of checkpoint tables -->"


def tables() -> str:
    """Markdown of what `tokenizer.json` and `symmetry.json` hold."""
    tokenizer = json.loads((RESULTS / "tokenizer.json").read_text(encoding="utf-8"))
    symmetry = json.loads((RESULTS / "symmetry.json").read_text(encoding="utf-8"))
    return "\n".join([_tokenizer_table(tokenizer), _alignment_table(symmetry), _family_table(symmetry)])


def _tokenizer_table(results: dict) -> str:
    speed, memory, real = results["speed"], results["memory"]["checkpoints"], results["real_checkpoints"].values()
    largest = [*memory.values()][-1]["none"]
    exact = sum(all(one["exact"].values()) for one in real)
    rows = [
        ("tokenise a ResNet-18, beside copying its weights", f"{speed['encode_first_ratio']:.2f}x at first, then {speed['encode_ratio']:.2f}x (row by row: {speed['row_by_row_ratio']:.0f}x)"),
        ("decode it", f"{speed['decode_ratio']:.2f}x"),
        (f"layout of {speed['layout_tensors']} tensors", f"{speed['layout_ms']:.0f} ms"),
        (f"windows over {[*memory][-1].replace('_', ' ').upper()} of shards", f"{largest['peak_mb_above_torch']:.0f} MB above torch, {largest['seconds_per_gb']:.1f} s per GB"),
        ("real checkpoints of other people, bit for bit in all packings", f"{sum(one['checkpoints'] for one in real)} files, {exact} of {len(real)} packages exact"),
        *(
            (f"fill of {name}: dense, flat, paper", ", ".join(f"{row[packing]['fill']:.3f}" for packing in ("dense", "flat", "paper")))
            for name, row in results["fill"].items()
        ),
    ]  # fmt: skip
    return "| tokens | measured |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _alignment_table(results: dict) -> str:
    many, pair = results["alignment"]["small_cnns"], results["alignment"]["resnet18_pair"]
    rows = [
        (f"{many['networks']:,} independent small CNNs", many),
        ("two independent ResNet-18", pair),
        *([(f"{results['real_pairs']['pairs']} pairs of real LSTMs", results["real_pairs"])] if "real_pairs" in results else []),
    ]  # fmt: skip
    return "| alignment | distance before → after | seconds |\n|---|---|---|\n" + "".join(
        f"| {name} | {row['distance_before']:.1f} → {row['distance_after']:.1f} | {row.get('seconds', 0):.1f} |\n"
        if "seconds" in row
        else f"| {name} | {row['distance_before']:.2f} → {row['distance_after']:.2f} | |\n"
        for name, row in rows
    )


def _family_table(results: dict) -> str:
    head = "| family | parameters | permutation groups | signs, scales | covered | error | seconds | twin: units back, distance |\n|---|---|---|---|---|---|---|---|\n"
    return head + "".join(
        f"| {name} | {row['parameters'] / 1e6:.1f}M | {row['verified']} of {row['groups']} | {row['signs']}, {row['scales']} | {row['covered']:.2%} | "
        f"{row['max_error']:.0e} | {row['seconds']:.1f} | {row['twin']['units_back']:.1%}, {row['twin']['distance_after']:.0e} |\n"
        for name, row in results["families"].items()
    )


def main() -> None:
    """Print the tables, or update the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="put the tables into the README")
    args = parser.parse_args()
    if args.update:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        readme.write_text(text[:start] + tables() + text[end:], encoding="utf-8")
    print(tables(), end="")


if __name__ == "__main__":
    main()
