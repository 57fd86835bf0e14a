"""New networks: how good, how far from copies, how fast they learn; JSON out.

python benchmarks/generation.py --out results.json --mnist FOLDER                everything; about six hours on one core
python benchmarks/generation.py --out results.json --part quality --zoo runs/fm  some parts; others are kept

The zoo is one of 210 CNNs of the published Model Zoos on Fashion-MNIST (`apt-get install dataset-fashion-mnist`); for each of three
seeds its models are split anew, a SANE is trained on the train split (`--preset small-cnn`, 200 steps), anchors are the 20 best of the
train split on validation images, selection is on validation images, and all figures are of test images.

`quality`: `sane sample` with all modes around anchors, 50 networks each; and the same Laplace sampling in weights, without SANE.
`independent`: the same on a zoo of MNIST (`--mnist`), on which no setting was chosen.
`behaviour`: the same for encoders trained without behavioural loss and with five times its weight.
`flow`: networks like the whole train split, and with accuracies that are asked for.  `few_shot`: 1, 3, 5 and 10 anchors.
`finetune`: generated networks, anchors, noise, averages and scratch, on Fashion-MNIST and on MNIST (`--mnist`, a folder of IDX files).
`batch_norm`: norms as decoded or measured, windows with and without halo.  `architectures`: wider, deeper, another kernel.
`prompts`: a data set alone gives a network (`benchmarks/generation_prompts.py`).  `speed`: of sampling and decoding.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from sklearn.neighbors import KernelDensity
from transformers import ResNetConfig, ResNetForImageClassification

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.analysis import batch_norm_zoo, split_anew
from benchmarks.generation_prompts import measure as measure_prompts
from benchmarks.training_quality import command, fashion_zoo
from hub_scripts.codec import Codec
from hub_scripts.evaluation.functional import evaluate
from hub_scripts.generation.anchors import load_anchors
from hub_scripts.generation.draws import Sensitivity, fit_flow, fit_sampler
from hub_scripts.generation.judge import Judge
from hub_scripts.generation.refinement import probabilities, refine
from hub_scripts.outputs import read_json, write_json
from hub_scripts.sample import ANCHOR_STEPS, SampleArguments
from hub_scripts.zoos.zoo import Zoo
from modeling_sane import KernelDensitySampler, SaneConfig, SaneModel
from tokenization_sane import SaneWeightTokenizer

SEEDS = (0, 1, 2)
STEPS = 200  # of an encoder
ANCHORS = "top:20"
COUNT, KEEP = 50, 10
AROUND_ANCHORS = ("laplace", "joint", "token", "dimension", "gaussian", "interpolation")
REFINE_STEPS = 20
SHOTS = (1, 3, 5, 10)
WISH = "validation_accuracy"
ASKED = (0.1, 0.65, 0.7, 0.725, 0.75, 0.775, 0.8)  # of it: at random, and over the range that trained networks have
ASKED_COUNT = 10


class Bench:
    """Zoos and models of each seed, made when they are first asked for."""

    def __init__(self, folder: Path, zoo: Path, batch_norm: Path | None, mnist: str | None, seeds: tuple[int, ...]):
        self.folder, self.source, self.given_batch_norm, self.mnist, self.seeds = folder, zoo, batch_norm, mnist, seeds

    def zoo(self, seed: int) -> Path:
        """The zoo with the splits of a seed."""
        folder = self.folder / f"seed{seed}" / "zoo"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            split_anew(self.source, folder, seed)
        return folder

    def model(self, seed: int, name: str = "model", *flags: str) -> Path:
        """An encoder of a seed's train split."""
        return train(self.zoo(seed), self.folder / f"seed{seed}" / name, "--seed", str(seed), *flags)

    def batch_norm(self) -> tuple[Path, Path]:
        """A zoo with batch norm, and an encoder of it."""
        zoo = self.given_batch_norm or batch_norm_zoo(self.folder / "batchnorm")
        return zoo, train(zoo, self.folder / "batchnorm-model")

    def sample(self, seed: int, name: str, *flags: str, model: Path | None = None) -> Path:
        """`sane sample` on a seed's zoo; done once."""
        output = self.folder / f"seed{seed}" / name
        sample(model or self.model(seed), self.zoo(seed), output, "--seed", str(seed), *flags)
        return output


def train(zoo: Path, folder: Path, *flags: str) -> Path:
    """An encoder, trained once."""
    if not folder.exists():
        settings = ["--preset", "small-cnn", "--max-steps", str(STEPS), *flags]
        command("train.py", "--zoo", str(zoo), "--output-dir", str(folder), *settings)
    return folder


def sample(model: Path, zoo: Path, output: Path, *flags: str) -> dict[str, Any]:
    """`sane sample`, done once; what `results.json` holds."""
    if not output.exists():
        command("sample.py", "--model", str(model), "--zoo", str(zoo), "--output-dir", str(output), *flags)
    return read_json(output / "results.json")


# --- quality


def measure_quality(bench: Bench) -> dict[str, Any]:
    """All modes around anchors at epoch 0, by seed; and whether the targets are met."""
    runs = {}
    for seed in bench.seeds:
        flags = ["--anchors", ANCHORS, "--count", str(COUNT), "--keep", str(KEEP), "--mode", *AROUND_ANCHORS]
        output = bench.sample(seed, "quality", *flags, "--refine-steps", str(REFINE_STEPS))
        found = read_json(output / "results.json")
        file = output.parent / "weights.json"
        if not file.exists():
            write_json(file, laplace_in_weights(bench.zoo(seed), bench.model(seed), seed))
        found["curves"]["laplace_in_weights"] = read_json(file)
        found["sample"] |= measure_far(bench, seed)
        runs[str(seed)] = {"sample": found["sample"], "curves": found["curves"], "targets": targets(found)}
        print("quality", seed, json.dumps(runs[str(seed)]["targets"]), flush=True)
    return {"runs": runs, "mean": mean_of([run["sample"] for run in runs.values()])}


def measure_far(bench: Bench, seed: int) -> dict[str, Any]:
    """Laplace draws as far from the training data as unseen networks are."""
    flags = [
        "--anchors",
        ANCHORS,
        "--count",
        str(COUNT),
        "--keep",
        str(KEEP),
        "--mode",
        "laplace",
        "--laplace-bandwidth",
        "1.25",
    ]
    cheap = ["--laplace-bandwidths", "1.25", "--noises", "0.8", "--refine-steps", str(REFINE_STEPS)]
    found = read_json(bench.sample(seed, "far", *flags, *cheap) / "results.json")["sample"]
    return {"laplace_far": found["laplace"], "laplace_far_refined": found["laplace_refined"]}


def targets(found: dict[str, Any]) -> dict[str, float]:
    """What is asked of generated networks at epoch 0, from one run."""
    sets, curves = found["sample"], found["curves"]
    laplace, anchors, unseen = sets["laplace"], sets["anchors"], sets["unseen"]
    return {
        "mean_of_anchors": laplace["accuracy_mean"] / anchors["accuracy_mean"],
        "kept_of_anchors": laplace["accuracy_kept"] / anchors["accuracy_mean"],
        "refined_mean_of_anchors": sets["laplace_refined"]["accuracy_mean"] / anchors["accuracy_mean"],
        "refined_kept_of_anchors": sets["laplace_refined"]["accuracy_kept"] / anchors["accuracy_mean"],
        "distance_of_unseen": laplace["nearest_train_distance"] / unseen["nearest_train_distance"],
        **{
            f"above_{name}": laplace["accuracy_mean"] - at_distance(curves[name], laplace["nearest_train_distance"])
            for name in ("joint", "noise", "average", "laplace_in_weights")
            if name in curves
        },
    }


def at_distance(curve: list[dict[str, float]], distance: float) -> float:
    """Accuracy of a curve at a distance, straight between its points; beyond them, of the last one."""
    points = sorted((p["nearest_train_distance"], p["accuracy_mean"]) for p in curve)
    return float(np.interp(distance, *np.asarray(points).T))


class WeightCodec(Codec):
    """Networks as their own latents: what sampling does without SANE."""

    def encode(self, token_values: torch.Tensor) -> torch.Tensor:
        """The tokens."""
        return torch.as_tensor(token_values)

    def decode(self, latents: torch.Tensor, gradient: bool = False) -> torch.Tensor:
        """The latents, zero where a token has no value."""
        return latents.masked_fill(~self.layout.value_mask, 0.0)


def laplace_in_weights(zoo_folder: Path, model: Path, seed: int) -> list[dict[str, float]]:
    """The curve of Laplace sampling whose latents are the weights themselves."""
    torch.set_num_threads(1)
    zoo = Zoo(zoo_folder)
    codec = Codec.from_pretrained(model, zoo.layout)
    plain = WeightCodec(codec.model, codec.tokenizer, zoo.layout)
    anchors = load_anchors(zoo, [ANCHORS], codec.tokenizer, seed)
    judge = Judge(zoo, plain, zoo.module, zoo.task, KEEP)
    generator = torch.Generator().manual_seed(seed)
    images = zoo.task.images["train"]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:2000]]
    latents = plain.tokens(anchors.tensors)
    sampler = fit_sampler("laplace", plain, latents, 0.0, Sensitivity(zoo.module, images), generator)
    points = []
    for bandwidth in (0.2, 0.4, 0.6, 0.8, 1.1):
        sampler.bandwidth = bandwidth
        tensors = plain.tensors(plain.decode(sampler.sample(COUNT // 2, generator=generator)))
        points.append({"bandwidth": bandwidth, **judge.point(tensors)})
    return points


def mean_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of several seeds: their mean, entry by entry, where all have numbers."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: mean_of([run[key] for run in runs]) for key in first if all(key in run for run in runs)}
    return float(np.mean(runs)) if all(isinstance(run, (int, float)) for run in runs) else first


# --- behavioural training


def measure_behaviour(bench: Bench) -> dict[str, Any]:
    """What the behavioural loss of the encoder does to generated networks, one seed; with the encoder's latents and with fitted ones."""
    seed = bench.seeds[0]
    found: dict[str, Any] = {}
    for weight in ("0", "0.1", "0.5"):
        name = "model" if weight == "0.1" else f"model-behaviour-{weight}"
        flags = [] if weight == "0.1" else ["--behavioural-weight", weight]
        model = bench.model(seed, name, *flags)
        modes = ["--mode", "laplace", "joint", "--anchors", ANCHORS, "--count", str(COUNT), "--keep", str(KEEP)]
        found[weight] = {}
        for anchor_steps in ("0", str(ANCHOR_STEPS)):
            output = bench.sample(
                seed, f"behaviour-{weight}-{anchor_steps}", *modes, "--anchor-steps", anchor_steps, model=model
            )
            results = read_json(output / "results.json")
            sets = ("laplace", "joint", "decoded_anchors", "fitted_anchors", "anchors", "unseen")
            found[weight][anchor_steps] = {
                "curves": {name: results["curves"][name] for name in ("laplace", "joint")},
                "sample": {name: results["sample"][name] for name in sets if name in results["sample"]},
            }
        print(
            "behaviour", weight, json.dumps({k: v["sample"]["laplace"] for k, v in found[weight].items()}), flush=True
        )
    return found


# --- a zoo that nothing was chosen on


def measure_independent(bench: Bench) -> dict[str, Any]:
    """The same on MNIST, on which no setting was looked at: bandwidth, stiffness and rates were chosen on Fashion-MNIST."""
    assert bench.mnist is not None  # main() asks for it
    folder = bench.folder / "independent"
    folder.mkdir(exist_ok=True)
    zoo = fashion_zoo(folder / "zoo", bench.mnist)
    flags = ["--anchors", ANCHORS, "--count", str(COUNT), "--keep", str(KEEP), "--mode", "laplace", "joint"]
    model = train(zoo, folder / "model", "--seed", "0")
    found = sample(model, zoo, folder / "quality", "--seed", "0", *flags, "--refine-steps", str(REFINE_STEPS))
    return {"runs": {"0": {"sample": found["sample"], "curves": found["curves"], "targets": targets(found)}}}


# --- few anchors


def measure_few_shot(bench: Bench) -> dict[str, Any]:
    """Generation from 1, 3, 5 and 10 anchors, by seed."""
    runs = {}
    for seed in bench.seeds:
        runs[str(seed)] = {}
        for shots in SHOTS:
            flags = ["--anchors", f"top:{shots}", "--count", "20", "--keep", "5", "--mode", "laplace", "joint"]
            cheap = ["--bandwidths", "0.2", "--laplace-bandwidths", "0.7", "--refine-steps", str(REFINE_STEPS)]
            found = read_json(bench.sample(seed, f"shots{shots}", *flags, *cheap) / "results.json")["sample"]
            runs[str(seed)][str(shots)] = {
                name: found[name]
                for name in ("laplace", "joint", "laplace_refined", "joint_refined", "noise", "average", "anchors")
            }
    return {"runs": runs, "mean": mean_of(list(runs.values()))}


# --- batch norm


def measure_batch_norm(bench: Bench) -> dict[str, Any]:
    """Norms as decoded or measured on data, windows of 32 tokens with and without a halo: naive, halo, conditioning, both."""
    zoo, model = bench.batch_norm()
    found = {}
    for name, halo, norms in (
        ("naive", 0, "none"),
        ("halo", 16, "none"),
        ("conditioning", 0, "data"),
        ("both", 16, "data"),
    ):
        flags = ["--anchors", ANCHORS, "--count", str(COUNT), "--keep", str(KEEP), "--mode", "laplace", "joint"]
        windows = [
            "--window-size",
            "16",
            "--halo",
            str(halo),
            "--norms",
            norms,
            "--bandwidths",
            "0.2",
            "--laplace-bandwidths",
            "0.7",
        ]
        results = sample(model, zoo, bench.folder / f"norms-{name}", *flags, *windows)["sample"]
        found[name] = {key: results[key] for key in ("laplace", "joint", "decoded_anchors", "anchors", "unseen")}
        print(name, {key: round(figures["accuracy_mean"], 3) for key, figures in found[name].items()}, flush=True)
    return found


# --- without chosen anchors


def measure_flow(bench: Bench) -> dict[str, Any]:
    """Networks like the whole train split, and with properties that are asked for, by seed.

    `laplace`: around last checkpoints at random; asked for an accuracy, around the train checkpoints that are nearest to it.
    `flow`, and for one seed `token_flow`: trained on the split; asked for an accuracy, on all its checkpoints.
    """
    runs: dict[str, Any] = {}
    for seed in bench.seeds:
        zoo = Zoo(bench.zoo(seed))
        accuracy = float(zoo.column("train", "test_accuracy")[zoo.last_rows("train")].mean())
        run = runs[str(seed)] = {"zoo_accuracy_mean": accuracy}
        for name in ("laplace", "flow", *(["token_flow"] if seed == bench.seeds[0] else [])):
            file = bench.folder / f"seed{seed}" / f"without-anchors-{name}.json"
            if not file.exists():
                write_json(file, without_anchors(zoo, bench.model(seed), seed, name))
            run[name] = read_json(file)
            run[name]["of_zoo"] = run[name]["accuracy_mean"] / accuracy
            print("flow", seed, name, json.dumps(run[name]), flush=True)
    return {"runs": runs, "mean": mean_of(list(runs.values()))}


def without_anchors(zoo: Zoo, model: Path, seed: int, name: str) -> dict[str, Any]:
    """Accuracies and distances of one seed and sampler."""
    torch.set_num_threads(1)
    codec = Codec.from_pretrained(model, zoo.layout)
    codec.model.requires_grad_(False)
    judge = Judge(zoo, codec, zoo.module, zoo.task, KEEP)
    generator = torch.Generator().manual_seed(seed)
    images = zoo.task.images["train"]
    images = images[torch.randperm(len(images), generator=generator)[: SampleArguments.laplace_images]]
    steps = {"steps": ANCHOR_STEPS, "learning_rate": SampleArguments.refine_learning_rate}
    steps["batch_size"] = SampleArguments.refine_batch_size

    def around(rule: str, count: int, wish: dict[str, float] | None = None) -> torch.Tensor:
        tensors = load_anchors(zoo, [rule], codec.tokenizer, seed, wish).tensors
        own = probabilities(zoo.module, tensors, images)
        latents = codec.encode(codec.tokens(tensors))
        latents = refine(codec, zoo.module, latents, images, own, generator=generator, **steps)
        bandwidth = SampleArguments.laplace_bandwidth
        sampler = fit_sampler("laplace", codec, latents, bandwidth, Sensitivity(zoo.module, images), generator)
        return sampler.sample(count, generator=generator)

    if name == "laplace":
        free = around(f"random:{COUNT}", COUNT)
    else:
        free = fit_flow(name, zoo, codec, {}, None, seed).sample(COUNT, generator=generator)
        asked = fit_flow(name, zoo, codec, {WISH: 0}, None, seed)

    def draw(wish: float) -> torch.Tensor:
        if name == "laplace":
            return around(f"near:{ASKED_COUNT}", ASKED_COUNT, {WISH: wish})
        return asked.sample(ASKED_COUNT, torch.tensor([wish]), generator=generator)

    figures = judge(codec.tensors(codec.decode(free))).figures
    wanted, measured, points = [], [], []
    for wish in ASKED:
        tensors = codec.tensors(codec.decode(draw(wish)))
        accuracy = evaluate(zoo.module, tensors, zoo.task.images["test"], zoo.task.labels["test"]).accuracy
        wanted += [wish] * ASKED_COUNT
        measured += accuracy.tolist()
        points.append({"asked": wish, "measured_mean": float(accuracy.mean()), "measured_std": float(accuracy.std()),
                       "nearest_train_distance": float(np.nanmean(judge.distances(tensors)))})  # fmt: skip
    return figures | {"asked": points, "kendall_tau": float(kendalltau(wanted, measured).statistic)}


# --- other architectures

ARCHITECTURES = {
    "itself": {},
    "twice as wide": {"channels": [16, 24], "hidden_size": 40},
    "deeper": {"channels": [8, 12, 12]},
    "kernel 5": {"kernel_size": 5},
    "narrower": {"channels": [6, 9], "hidden_size": 15},
}


def measure_architectures(bench: Bench) -> dict[str, Any]:
    """Small CNNs on digits mapped to other architectures, drawn there, and trained for an epoch beside scratch, one seed."""
    zoo = bench.folder / "digits"
    if not zoo.exists():
        command("build_zoo.py", "--output-dir", str(zoo), "--num-models", "64", "--epochs", "5")
    model, found = train(zoo, bench.folder / "digits-model"), {}
    for name, kwargs in ARCHITECTURES.items():
        output = bench.folder / f"architecture-{name.replace(' ', '-')}"
        flags = [
            "--anchors",
            "top:5",
            "--count",
            "20",
            "--keep",
            "5",
            "--mode",
            "laplace",
            "joint",
            "--bandwidths",
            "0.1",
        ]
        where = [
            "--laplace-images",
            "500",
            "--laplace-bandwidth",
            "0.4",
            "--laplace-bandwidths",
            "0.2",
            "--target-kwargs",
            json.dumps(kwargs),
        ]
        results = sample(model, zoo, output, *flags, *where)
        rates = ["--learning-rates", "1e-3", "3e-3", "1e-2", "--epochs", "1"]
        tuned = finetune(output, output.with_name(f"{output.name}-tuned"), ["anchors", "joint", "laplace"], *rates)
        found[name] = {
            "kwargs": kwargs,
            "max_change": results["growth"]["max_change"],
            "sample": {key: results["sample"][key] for key in ("anchors", "decoded_anchors", "joint", "laplace")},
            "finetune": {key: tuned[key] for key in ("anchors", "joint", "laplace", "scratch")},
        }
        print(name, found[name]["finetune"], flush=True)
    return found


# --- fine-tuning


def finetune(samples: Path, output: Path, sets: list[str], *flags: str) -> dict[str, Any]:
    """`sane finetune` on sets of networks beside scratch; done once."""
    if not output.exists():
        init = [*(str(samples / "networks" / name) for name in sets), "scratch"]
        command("finetune.py", "--init", *init, "--output-dir", str(output), *flags)
    return read_json(output / "results.json")["finetune"]


SETS = ["laplace", "laplace_refined", "anchors", "noise", "average"]
MORE_IN_DOMAIN = ["joint_refined", "interpolation_refined"]  # nearer to the training data
TUNING = [
    "--learning-rates",
    "1e-3",
    "3e-3",
    "--batch-size",
    "128",
    "--num-networks",
    "5",
    "--max-train-images",
    "5000",
    "--evaluations",
    "2",
]

FEW_LABELS = ["--new-head", "ridge", "--shots", "20", "--batch-size", "20"]  # of each class


def measure_finetune(bench: Bench) -> dict[str, Any]:
    """The networks of `quality`, five of each set, on their own task and on another one, by seed of the zoo's split."""
    runs: dict[str, Any] = {}
    for seed in bench.seeds:
        samples = bench.folder / f"seed{seed}" / "quality"
        tasks: dict[str, list[str]] = {"fashion_mnist": []}
        if bench.mnist:
            tasks["mnist"] = ["--task", f"idx:{bench.mnist}"]
            tasks["mnist_with_a_ridge_head"] = [*tasks["mnist"], *FEW_LABELS]
        for name, flags in tasks.items():
            settings = [*TUNING, "--epochs", "5", "--seed", str(seed), "--reach", "0.5", "0.7", "0.8", *flags]
            output = bench.folder / f"seed{seed}" / f"finetune-{name}"
            sets = SETS + (MORE_IN_DOMAIN if name == "fashion_mnist" else [])
            runs.setdefault(name, {})[str(seed)] = finetune(samples, output, sets, *settings)
            print(
                "finetune",
                name,
                seed,
                {key: value for key, value in runs[name][str(seed)].items() if key in sets},
                flush=True,
            )
    return {name: {"runs": found, "mean": mean_of(list(found.values()))} for name, found in runs.items()}


# --- speed


def measure_speed(bench: Bench) -> dict[str, Any]:
    """Sampling against a loop over scikit-learn, decoding against the bare decoder, and a ResNet-18 from end to end."""
    torch.set_num_threads(os.cpu_count() or 1)
    return {"sampling": sampling_speed(), "decoding": decoding_speed(bench), "resnet18": resnet18_speed()}


def seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """The fastest of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def sampling_speed(count: int = 1000, anchors: int = 30, tokens: int = 104, latent_size: int = 30) -> dict[str, float]:
    """Draws of the paper's kernel density, for each token and dimension, in one go and one after another."""
    latents = torch.randn(anchors, tokens, latent_size, generator=torch.Generator().manual_seed(0))
    found = {
        mode: seconds(lambda mode=mode: KernelDensitySampler(mode).fit(latents).sample(count))
        for mode in ("joint", "token", "dimension")
    }

    def loop(per_dimension: bool) -> None:
        for token in latents.transpose(0, 1).numpy():
            for values in token.T[:, :, None] if per_dimension else [token]:
                KernelDensity(bandwidth=0.2).fit(values).sample(count)

    found |= {"loop_token": seconds(lambda: loop(False), 3), "loop_dimension": seconds(lambda: loop(True), 1)}
    ratios = {f"times_faster_{mode}": found[f"loop_{mode}"] / found[mode] for mode in ("token", "dimension")}
    return {"count": count, "tokens": tokens, "latent_size": latent_size, "seconds": found} | ratios


def decoding_speed(bench: Bench, count: int = 256) -> dict[str, float]:
    """Latents to state dicts, beside the decoder alone on the same windows."""
    zoo = Zoo(bench.zoo(bench.seeds[0]))
    codec = Codec.from_pretrained(bench.model(bench.seeds[0]), zoo.layout)
    latents = torch.randn(count, codec.layout.num_tokens, codec.model.config.latent_size)
    windows, kinds = codec._windows(), codec.layout.layer_kind_ids

    @torch.no_grad()
    def bare() -> None:
        for part in latents.split(windows):
            codec.model.decode(part, codec.layout.position_ids, layer_kind_ids=kinds.expand(len(part), -1))

    ours, alone = seconds(lambda: codec.tensors(codec.decode(latents))), seconds(bare)
    return {"networks": count, "seconds": ours, "bare_seconds": alone, "share_of_bare_speed": alone / ours}


def resnet18_speed() -> dict[str, Any]:
    """Generate a ResNet-18 from two anchors' latents; beside two passes of the bare decoder over its tokens."""
    network = ResNetForImageClassification(
        ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=10)
    )
    tokenizer = SaneWeightTokenizer(token_size=288)
    layout = tokenizer.layout(network)
    model = SaneModel(SaneConfig()).eval()
    codec = Codec(model, SaneWeightTokenizer(token_size=288), layout)
    latents = torch.randn(2, layout.num_tokens, model.config.latent_size)
    sampler = KernelDensitySampler("joint").fit(latents)
    before = peak_memory()

    def generate() -> None:
        codec.tensors(codec.decode(sampler.sample(1)))

    ours = seconds(generate, 2)
    memory = peak_memory() - before
    width, kinds = model.config.window_size, layout.layer_kind_ids

    @torch.no_grad()
    def bare() -> None:
        for at in torch.arange(layout.num_tokens).split(width * codec._windows()):
            for part in at.split(width):
                model.decode(latents[:1, part], layout.position_ids[part], layer_kind_ids=kinds[None, part])

    alone = seconds(bare, 2)
    return {"tokens": layout.num_tokens, "seconds": ours, "bare_pass_seconds": alone, "passes": ours / alone,
            "memory_mb": memory / 2**20, "weights_mb": 4 * layout.num_parameters / 2**20}  # fmt: skip


def peak_memory() -> int:
    """Largest resident memory of the process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "quality": measure_quality,
    "independent": measure_independent,
    "behaviour": measure_behaviour,
    "flow": measure_flow,
    "few_shot": measure_few_shot,
    "finetune": measure_finetune,
    "batch_norm": measure_batch_norm,
    "architectures": measure_architectures,
    "prompts": lambda bench: measure_prompts(bench.folder / "prompts", bench.seeds),
    "speed": measure_speed,
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="the JSON file; parts not measured are kept as it has them"
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument(
        "--zoo", type=Path, help="a zoo of CNNs on Fashion-MNIST; by default it is built, in half an hour"
    )
    parser.add_argument("--batch-norm-zoo", type=Path, help="a zoo with batch norm; by default it is built")
    parser.add_argument("--mnist", help="folder of MNIST's IDX files, for `independent` and as new task of `finetune`")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of splits, encoders and draws")
    parser.add_argument(
        "--work-dir", type=Path, help="keep zoos, models and networks here; what is there is not made again"
    )
    args = parser.parse_args()
    if "independent" in args.part and not args.mnist:  # now, not after hours of the parts before it
        parser.error("--part independent needs --mnist, a folder of MNIST's IDX files.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work_dir or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["SANE_CACHE"] = str(folder / "cache")
        zoo = (args.zoo or fashion_zoo(folder / "fashion")).resolve()
        bench = Bench(folder, zoo, args.batch_norm_zoo, args.mnist, tuple(args.seeds))
        for name in args.part:
            found = PARTS[name](bench)
            results: dict[str, Any] = read_json(args.out) if args.out.exists() else {}
            results[name] = found
            results.setdefault("machine", {})[name] = {"torch": torch.__version__, "cores": os.cpu_count()}
            write_json(args.out, results)
    print(json.dumps({name: results[name] for name in args.part if name in results}, indent=2)[:4000])


if __name__ == "__main__":
    main()
