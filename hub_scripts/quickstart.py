"""The whole of SANE in one go, on a task that needs no download."""

import importlib.metadata
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.build_zoo import BuildZooArguments, build_zoo
from hub_scripts.codec import Codec
from hub_scripts.embed import EMBEDDINGS_FILE, EmbedArguments, embed
from hub_scripts.evaluation import plots
from hub_scripts.evaluation.reconstruction import measure_reconstruction
from hub_scripts.evaluation.report import Picture, Section, Table, write_report
from hub_scripts.finetune import FinetuneArguments, finetune
from hub_scripts.outputs import claim_folder, new_folder, read_json, write_json
from hub_scripts.probe import ProbeArguments, probe
from hub_scripts.sample import NETWORKS_FOLDER, SampleArguments, sample
from hub_scripts.train import TrainArguments, train
from hub_scripts.training.run import LOG_FILE
from hub_scripts.zoos.zoo import Zoo

PROGRAM = "sane quickstart"
PRESETS = ("default", "tiny")
STEPS_FILE = "steps.json"
GENERATED = "laplace"  # the set of `sane sample` that is fine-tuned
PACKAGES = (
    "sane-hub",
    "torch",
    "transformers",
    "huggingface-hub",
    "datasets",
    "accelerate",
    "safetensors",
    "scikit-learn",
)


@dataclass
class QuickstartArguments:
    """Train a zoo of small networks and a SANE model on it, then embed, predict and generate networks, and write a report.

    It goes on where it was interrupted when started again with the same folder.

    Example:
      sane quickstart --output-dir runs/quickstart
    """

    output_dir: str = field(metadata={"help": "Folder for zoo, model, figures and report.html."})
    preset: str = field(
        default="default", metadata={"help": "default (under ten minutes on two cores) or tiny (about a minute)."}
    )
    seed: int = field(default=0, metadata={"help": "Of everything that is drawn."})

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"--preset is {self.preset!r}, expected one of {', '.join(PRESETS)}.")


class _Steps:
    """Runs the steps that are not done yet, and keeps their times."""

    def __init__(self, folder: Path):
        self.file = folder / STEPS_FILE
        self.done = read_json(self.file) if self.file.exists() else {"seconds": {}, "peak_memory_bytes": 0}

    def __call__(self, name: str, why: str, step: Callable[[], Any]) -> None:
        number = len(self.done["seconds"]) + 1
        if name in self.done["seconds"]:
            print(f"[{name}] done before, in {self.done['seconds'][name]:.0f} s")
            return
        print(f"\n[{number}/7 {name}] {why}", flush=True)
        started = time.perf_counter()
        step()
        self.done["seconds"][name] = round(time.perf_counter() - started, 2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        self.done["peak_memory_bytes"] = max(self.done["peak_memory_bytes"], peak)
        write_json(self.file, self.done)


def quickstart(args: QuickstartArguments) -> dict[str, Any]:
    """Run all steps; returns what `results.json` holds."""
    folder = Path(args.output_dir)
    claim_folder(folder, "quickstart", {"preset": args.preset, "seed": args.seed})
    name = "quickstart.yaml" if args.preset == "default" else f"quickstart-{args.preset}.yaml"
    settings = yaml.safe_load((Path(__file__).parent / "configs" / name).read_text(encoding="utf-8"))
    zoo, model, seed = str(folder / "zoo"), str(folder / "model"), args.seed
    steps = _Steps(folder)

    steps(
        "zoo",
        "Training a population of small networks on handwritten digits, with different settings and seeds: the data of SANE.",
        lambda: _unless(zoo, lambda: build_zoo(BuildZooArguments(output_dir=zoo, seed=seed, **settings["build_zoo"]))),
    )
    steps(
        "train",
        "Training SANE on their weights: each network is a sequence of tokens; it learns to compress them so that the decoded "
        "network still works.",
        lambda: train(
            TrainArguments(zoo=zoo, output_dir=model, seed=seed, resume_from_checkpoint="latest", **settings["train"])
        ),
    )
    steps(
        "embed",
        "Embedding every checkpoint: one vector that says what kind of network it is.",
        lambda: _unless(
            folder / "embeddings" / "results.json", lambda: _embed(zoo, model, str(folder / "embeddings"))
        ),
    )
    steps(
        "reconstruct",
        "Encoding and decoding networks that SANE has not seen, and running them: are they still good?",
        lambda: _unless(folder / "reconstruction", lambda: _reconstruct(zoo, model, folder / "reconstruction")),
    )
    steps(
        "probe",
        "Predicting accuracy, epoch and generalisation gap of unseen networks from their embeddings, against simple statistics.",
        lambda: _unless(
            folder / "probe",
            lambda: probe(
                ProbeArguments(model=model, zoo=zoo, output_dir=str(folder / "probe"), seed=seed, **settings["probe"])
            ),
        ),
    )
    steps(
        "sample",
        "Generating new networks around the best ones of the train split, and measuring how good and how new they are.",
        lambda: _unless(
            folder / "sample",
            lambda: sample(
                SampleArguments(
                    model=model, zoo=zoo, output_dir=str(folder / "sample"), seed=seed, **settings["sample"]
                )
            ),
        ),
    )
    networks = folder / "sample" / NETWORKS_FOLDER
    steps(
        "finetune",
        "Fine-tuning generated networks, their anchors, and networks from scratch, with the same steps each.",
        lambda: _unless(
            folder / "finetune",
            lambda: finetune(
                FinetuneArguments(
                    init=[str(networks / GENERATED), str(networks / "anchors"), "scratch"],
                    output_dir=str(folder / "finetune"),
                    seed=seed,
                    **settings["finetune"],
                )
            ),
        ),
    )
    results = _collect(folder, steps.done, seed)
    _report(folder, results)
    write_json(folder / "results.json", results)
    return results


def _unless(target: str | Path, step: Callable[[], Any]) -> None:
    """Steps write their folder whole or not at all, so a folder that is there is done."""
    if not Path(target).exists():
        step()


def _embed(zoo: str, model: str, output_dir: str) -> None:
    args = EmbedArguments(model=model, output_dir=output_dir)
    args.sources = [zoo]
    embed(args)


def _reconstruct(zoo: str, model: str, output_dir: Path) -> None:
    opened = Zoo(zoo)
    codec = Codec.from_pretrained(model, opened.layout)
    figures, tokens = measure_reconstruction(opened, codec)
    best = int(np.argmax(opened.column("test", "test_accuracy")[opened.last_rows("test")]))
    kernels = [
        next(t for t in codec.tensors(tokens[kind][best : best + 1]).values() if t.dim() == 5)[0].flatten(0, 1).numpy()
        for kind in ("original", "decoded")
    ]
    with new_folder(output_dir) as folder:
        plots.filter_rows(*kernels).savefig(folder / "filters.png")
        write_json(folder / "results.json", {"reconstruction": figures})


def _collect(folder: Path, done: dict[str, Any], seed: int) -> dict[str, Any]:
    """All figures in one place."""
    zoo = read_json(folder / "zoo" / "zoo.json")
    seconds = dict(done["seconds"])
    # a run that was interrupted and went on counts with all of its time
    seconds["train"] = max(seconds["train"], read_json(folder / "model" / "results.json")["seconds"])
    total = round(sum(seconds.values()), 2)
    seconds |= {"zoo": zoo["seconds_train"], "align": zoo["seconds_align"], "total": total}
    return {
        "zoo": {"models": zoo["num_models"], "checkpoints": zoo["num_checkpoints"], "seconds": zoo["seconds_train"]},
        "reconstruction": read_json(folder / "reconstruction" / "results.json")["reconstruction"],
        "probe": read_json(folder / "probe" / "results.json")["probe"],
        "sample": read_json(folder / "sample" / "results.json")["sample"],
        "sample_curves": read_json(folder / "sample" / "results.json")["curves"],
        "finetune": _named_generated(read_json(folder / "finetune" / "results.json")["finetune"]),
        "seconds": seconds,
        "peak_memory_bytes": done["peak_memory_bytes"],
        "seed": seed,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _named_generated(curves: dict[str, Any]) -> dict[str, Any]:
    """One set of samples stands for generated networks here."""
    return {
        "generated" if name == GENERATED else name: _named_generated(curve) if isinstance(curve, dict) else curve
        for name, curve in curves.items()
    }


def _report(folder: Path, results: dict[str, Any]) -> None:
    """Plots of training and embeddings, and `report.html`."""
    from datasets import Dataset  # only here is a parquet file read

    embeddings = Dataset.from_parquet(str(folder / "embeddings" / EMBEDDINGS_FILE))
    plots_folder = folder / "plots"
    plots_folder.mkdir(exist_ok=True)
    plots.training_curves(read_json(folder / "model" / LOG_FILE)).savefig(plots_folder / "training.png")
    figure = plots.embedding_map(
        np.asarray(embeddings["embedding"]), np.asarray(embeddings["test_accuracy"]), np.asarray(embeddings["epoch"])
    )
    figure.savefig(plots_folder / "embeddings.png")
    reconstruction, samples, finetuned = results["reconstruction"], results["sample"], results["finetune"]
    sections = [
        Section(
            "The zoo",
            f"{results['zoo']['models']} small networks were trained on handwritten digits in {results['zoo']['seconds']:.0f} s, "
            f"and {results['zoo']['checkpoints']} checkpoints of them kept. Networks, not checkpoints, were split into train, "
            "validation and test: all figures below are of networks that the model has not seen.",
        ),
        Section(
            "Training",
            "SANE reads the weights of a network as a sequence of tokens and gives a latent vector for each. It was trained to "
            "bring the weights back, to tell networks apart whatever the order of their neurons, and to give decoded networks "
            "that answer as the originals do.",
            [Picture(plots_folder / "training.png", "training curves: losses, and R² and accuracy on validation networks")],
        ),
        Section(
            "Reconstruction",
            f"At {reconstruction['compression']:.2f} weight values per latent value, the decoded weights explain "
            f"{reconstruction['r2']:.1%} of the variance of the originals (a PCA of the same size: {reconstruction['r2_pca']:.1%}). "
            f"Decoded networks reach an accuracy of {reconstruction['accuracy_decoded']:.3f}, the originals "
            f"{reconstruction['accuracy_original']:.3f}; they agree on {reconstruction['agreement']:.1%} of the images.",
            [Picture(folder / "reconstruction" / "filters.png", "filters of the first layer: originals above, decoded below")],
        ),
        Section(
            "Embeddings",
            "Each point is a checkpoint, placed by its embedding. Training moves a network through this space.",
            [Picture(plots_folder / "embeddings.png", "embeddings in two dimensions, coloured by accuracy and by epoch")],
        ),
        Section(
            "Prediction",
            "What can be read from the weights alone? Ridge regression and boosted trees on SANE's representation, on its latents "
            "alone, on statistics of each layer, and on the weights themselves, fitted on train networks and measured on test "
            "networks (epoch 1 and later).",
            [Picture(folder / "probe" / "predicted_test_accuracy.png", "predicted against true accuracy for each feature")],
            [
                Table(
                    ("R², ridge | trees", *(name.replace("_", " ") for name in results["probe"])),
                    [
                        (kind, *(f"{found[kind]['r2']:.3f} | {found[kind]['trees_r2']:.3f}" for found in results["probe"].values()))
                        for kind in results["probe"]["test_accuracy"]
                    ],
                )
            ],
        ),
        Section(
            "Generation",
            "New networks were drawn around the ten best networks of the train split, without any training. A generator that only "
            "copied would stand at distance zero from its training data; so each set stands beside its distance to the nearest "
            "training checkpoint, beside noise added to the weights, averages of networks, and real networks that were not seen.",
            [
                Picture(folder / "sample" / "accuracy.png", "accuracy histograms of generated, anchor, noise and zoo networks"),
                Picture(folder / "sample" / "accuracy_against_distance.png", "accuracy against distance to the training data"),
            ],
            [
                Table(
                    ("set", "accuracy", "top 5", "distance"),
                    [
                        (n.replace("_", " "), f"{s['accuracy_mean']:.3f}", f"{s['accuracy_top5']:.3f}", f"{s['nearest_train_distance']:.1f}")
                        for n, s in samples.items()
                    ],
                )
            ],
        ),
        Section(
            "Fine-tuning",
            "Generated networks, their anchors and networks from scratch, trained with the same steps.",
            [Picture(folder / "finetune" / "finetuning.png", "accuracy after each epoch of fine-tuning")],
            [
                Table(
                    ("start", *(f"epoch {e}" for e in finetuned["epochs"])),
                    [(n, *(f"{v:.3f}" for v in finetuned[n])) for n in finetuned["sets"]],
                )
            ],
        ),
    ]  # fmt: skip
    write_report(folder / "report.html", "SANE quickstart", sections, results)


def _print(results: dict[str, Any], output_dir: str) -> None:
    reconstruction, samples = results["reconstruction"], results["sample"]
    probes = results["probe"]["test_accuracy"]
    finetuned = results["finetune"]
    first, last = ({name: finetuned[name][i] for name in finetuned["sets"]} for i in (0, -1))
    print(
        f"""
In {results["seconds"]["total"]:.0f} s, all on networks that SANE has not seen:
  reconstruction   R² {reconstruction["r2"]:.3f} (PCA {reconstruction["r2_pca"]:.3f}) at {reconstruction["compression"]:.2f} weights per latent value;
                   accuracy {reconstruction["accuracy_decoded"]:.3f} decoded, {reconstruction["accuracy_original"]:.3f} original
  prediction       R² of accuracy: {", ".join(f"{k} {v['r2']:.3f}" for k, v in probes.items())}
  generation       accuracy {samples[GENERATED]["accuracy_mean"]:.3f} without training, anchors {samples["anchors"]["accuracy_mean"]:.3f}
  fine-tuning      {", ".join(f"{k} {first[k]:.3f} → {last[k]:.3f}" for k in last)}
Read {Path(output_dir) / "report.html"}; figures in {Path(output_dir) / "results.json"}.
Use it:
  from transformers import AutoModel
  model = AutoModel.from_pretrained("{Path(output_dir) / "model"}", trust_remote_code=True)"""
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane quickstart`."""
    args = parse_arguments(QuickstartArguments, argv, PROGRAM)
    run_command(lambda a: _print(quickstart(a), a.output_dir), args, PROGRAM)


if __name__ == "__main__":
    main()
