"""The README's table of figures, from what `sane quickstart` measured.

python benchmarks/quickstart.py runs/quickstart/results.json              print the table
python benchmarks/quickstart.py runs/quickstart/results.json --update     keep the figures and put the table into the README
"""

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).parent / "results" / "quickstart.json"
BEGIN, END = "<!-- quickstart table -->\n", "<!-- end -->"


def table(results: dict) -> str:
    """Markdown table of the figures that matter."""
    reconstruction, sample = results["reconstruction"], results["sample"]

    def r2(name: str) -> str:
        kinds = results["probe"][name]
        shown = {"sane": "SANE", "layer_statistics": "s(W)", "weights": "W"}
        return ", ".join(
            f"{text} {kinds[kind]['r2']:.2f} ({kinds[kind]['r2_low']:.2f} to {kinds[kind]['r2_high']:.2f})"
            for kind, text in shown.items()
        )

    def drawn(name: str) -> str:
        return f"{sample[name]['accuracy_mean']:.3f} at distance {sample[name]['nearest_train_distance']:.1f}"

    def curve(name: str) -> str:
        values = results["finetune"][name]
        return f"{name} {values[0]:.3f} → {values[1]:.3f} → {values[-1]:.3f}"

    rows = [
        ("zoo", f"{results['zoo']['models']} networks, {results['zoo']['checkpoints']} checkpoints"),
        (
            "reconstruction of unseen networks",
            f"R² {reconstruction['r2']:.3f} (PCA of the same size {reconstruction['r2_pca']:.3f}) at {reconstruction['compression']:.2f} "
            f"weights per latent value",
        ),
        (
            "accuracy of unseen networks",
            f"{reconstruction['accuracy_original']:.3f} originals, {reconstruction['accuracy_decoded']:.3f} decoded; same answer on "
            f"{reconstruction['agreement']:.1%} of images",
        ),
        ("R² of predicted accuracy (95 % interval)", r2("test_accuracy")),
        ("R² of predicted epoch", r2("epoch")),
        ("R² of predicted generalisation gap", r2("generalization_gap")),
        ("anchors (best of the train split)", f"{sample['anchors']['accuracy_mean']:.3f}"),
        ("generated, no training: laplace", drawn("laplace")),
        ("generated: joint", drawn("joint")),
        ("generated: token; dimension", f"{drawn('token')}; {drawn('dimension')}"),
        (
            f"anchors with weight noise {sample['noise']['strength']}; averages",
            f"{drawn('noise')}; {drawn('average')}",
        ),
        ("real unseen networks", drawn("unseen")),
        ("fine-tuning, 0 → 1 → 5 epochs", "; ".join(curve(name) for name in ("generated", "anchors", "scratch"))),
        (
            "time and memory",
            f"{results['seconds']['total']:.0f} s on 2 cores, {results['peak_memory_bytes'] / 1e9:.1f} GB",
        ),
    ]
    return "| what | measured |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def main() -> None:
    """Print the table, or keep the figures and update the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of a quickstart")
    parser.add_argument(
        "--update", action="store_true", help="write benchmarks/results/quickstart.json and the README"
    )
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    if args.update:
        KEPT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        readme = ROOT / "README.md"
        parts = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
        text = parts.sub(lambda _: BEGIN + table(results) + END, readme.read_text(encoding="utf-8"))
        readme.write_text(text, encoding="utf-8")
    print(table(results), end="")


if __name__ == "__main__":
    main()
