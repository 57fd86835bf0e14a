"""Check what `sane quickstart --preset tiny` left behind: files, figures, and that the model loads."""

import json
import sys
from pathlib import Path

import transformers

FILES = (
    *("results.json", "report.html", "zoo/README.md", "zoo/zoo.json", "model/config.json", "model/model.safetensors"),
    *(
        "model/README.md",
        "model/preprocessor_config.json",
        "model/tokenizer_config.json",
        "embeddings/embeddings.parquet",
    ),
    *("reconstruction/filters.png", "probe/predicted_test_accuracy.png", "sample/accuracy_against_distance.png"),
    *(
        "sample/networks/laplace/000.safetensors",
        "finetune/finetuning.png",
        "plots/embeddings.png",
        "plots/training.png",
    ),
)


def check(claim: bool, text: str) -> None:
    """Fail loudly, also under `python -O`."""
    print("ok  " if claim else "FAIL", text)
    if not claim:
        raise SystemExit(1)


def main(folder: Path) -> None:
    """Check one output folder."""
    for name in FILES:
        check((folder / name).is_file() and (folder / name).stat().st_size > 0, f"{name} was written")
    check(not list(folder.rglob("*.partial*")), "nothing half-written is left")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    reconstruction, sample, finetune = results["reconstruction"], results["sample"], results["finetune"]
    check(reconstruction["compression"] >= 1, f"compression is {reconstruction['compression']:.2f}")
    check(reconstruction["r2"] >= reconstruction["r2_pca"] - 0.05, f"R² is {reconstruction['r2']:.3f}")
    lost = reconstruction["accuracy_original"] - reconstruction["accuracy_decoded"]
    check(lost <= 0.1, f"decoding costs {lost:.3f} of accuracy")
    anchors = sample["anchors"]["accuracy_mean"]
    for mode in ("joint", "laplace"):
        accuracy = sample[mode]["accuracy_mean"]
        check(accuracy >= 0.8 * anchors, f"{mode} networks have accuracy {accuracy:.3f}, their anchors {anchors:.3f}")
        check(sample[mode]["nearest_train_distance"] > 0, f"{mode} networks are no copies")
    ahead = all(g > s for g, s in zip(finetune["generated"], finetune["scratch"], strict=True))
    check(ahead, "sampled networks stay ahead of scratch")
    model = transformers.AutoModel.from_pretrained(folder / "model", trust_remote_code=True)
    check(type(model).__name__ == "SaneModel", "AutoModel loads the model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
