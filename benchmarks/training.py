"""What training costs: a step beside the published one, packings, samples, processes, memory; JSON out.

python benchmarks/training.py --out results.json                   everything; three hours on two cores
python benchmarks/training.py --out results.json --part step       some parts; others are kept as the file has them

The parts `quality`, `ablation` and `architectures` are described in `benchmarks/training_quality.py`.

`step` trains on a zoo of 1,024 small CNNs of random weights (2,146 values in 71 tokens), a whole network in a window.
Ours is `SaneForPreTraining` as `hub_scripts/train.py` runs it: both views in one pass, losses, backward, clipping,
AdamW. The other side is `benchmarks/published_step.py`. Both have the same widths, layers, tokens and batch, float32
and the same threads, and they take turns: ours loads a batch and takes a step, then the published code does, then a
matrix product is timed. `step_speedup` is the published time over ours, of the medians of the steps alone,
`step_with_loading_speedup` that of the medians of loading and step together; both at the size `small_cnn`, which is
our preset of that name.

Loading is, on our side, `DataLoader` over `WindowDataset` out of the memory-mapped token cache: new permutations and
signs for each sample. On the published side it is `DataLoader` over one file a sample, whose whole sequence is
permuted by one of five index tables that were made beforehand; `memory` has it out of a Python list instead. All
without workers.

The size `large` has the width and depth that `SaneConfig` has by default; `resnet18` trains such a model on windows
of 256 of the 38,976 tokens of a ResNet-18. Medians and minima are of wall time; `speedup_of_cpu_time` is the ratio of
the medians of CPU time, which other programs on the machine disturb less.

Operations are those of the matrix products of layers and attention, two for each product and sum, backward twice the
forward; softmax, norms, GELU, losses and optimizer are not counted. The peak is what a product of two 2048 x 2048
matrices reaches in the turns.

`kills` trains a small model on that zoo with one and with two processes, once without and once with five SIGKILLs at random
times; each time the same command goes on. It tells the largest difference of the last loss and of any weight.
"""

import argparse
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from datasets import Value
from safetensors.torch import load_file
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import permuted_window, training_quality
from benchmarks.published_step import PERMUTATIONS, PublishedDataset, PublishedStep, Sizes, two_views
from hub_scripts.outputs import read_json, write_json
from hub_scripts.training.order import Order, StepSampler
from hub_scripts.training.parts import MixedWindows, Part, open_parts
from hub_scripts.zoos.architectures import SmallCNN
from hub_scripts.zoos.token_cache import TokenCache
from hub_scripts.zoos.views import LazyDraw, SymmetryGather, WindowDataset, collate
from hub_scripts.zoos.writer import ZooWriter
from hub_scripts.zoos.zoo import Zoo
from modeling_sane import SaneConfig, SaneForPreTraining
from tokenization_sane import SaneWeightTokenizer, find_symmetries

ROOT = Path(__file__).parents[1]
TARGETS = {
    "step_speedup": 1.0,
    "step_with_loading_speedup": 3.0,
    "resnet": 1.3,
    "sample_cost": 1.3,  # at most
    "processes": 1.6,
    "memory_growth_mb": 5.0,  # at most
    "quality_speedup": 5.0,
    "architectures_loss_of_r2": 0.03,  # at most
    "kills_one_process": 0.0,  # at most
    "kills_two_processes": 1e-4,  # at most
}
PRESET = yaml.safe_load((ROOT / "hub_scripts" / "configs" / "train" / "small-cnn.yaml").read_text(encoding="utf-8"))
MODEL_FIELDS = ("token_size", "latent_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# name: zoo, packing, settings of the model, batch size, pairs of steps
SIZES = {
    "small_cnn": ("small_cnn", "flat", {name: PRESET[name] for name in MODEL_FIELDS}, PRESET["batch_size"], 40),
    "large": ("small_cnn", "flat", {"token_size": 32, "latent_size": 30}, 16, 20),
    "resnet18": ("resnet18", "dense", {"token_size": 288}, 4, 20),
}
# name: network, shape of its inputs, rows of the splits
ZOOS = {
    "small_cnn": (SmallCNN, (1, 1, 8, 8), {"train": 1024, "validation": 16}),
    "resnet18": (permuted_window.resnet18, (1, 3, 64, 64), {"train": 8, "validation": 1}),
}


# ---------------------------------------------------------------------------------------------------- data
def open_zoo(folder: Path, name: str = "small_cnn", packing: str = "flat", token_size: int = 32) -> Part:
    """A zoo of networks of random weights, with their symmetries; it is made when it is first asked for."""
    if not (folder / name).exists():
        torch.manual_seed(0)
        build, inputs, rows = ZOOS[name]
        module = build()
        layout = SaneWeightTokenizer().layout(module)
        writer = ZooWriter(folder / name, {"test_accuracy": Value("float64")}, rows)
        writer.add_layout(layout, find_symmetries(module, torch.randn(inputs)))
        for split, count in rows.items():
            for number in range(count):
                state_dict = {
                    key: 0.3 * torch.randn(tensor.shape) if tensor.is_floating_point() else tensor
                    for key, tensor in module.state_dict().items()
                }
                row = {
                    "model_id": f"{split}{number}",
                    "epoch": 0,
                    "layout_id": layout.fingerprint,
                    "test_accuracy": 0.5,
                }
                writer.add(split, row, state_dict)
        writer.finish(name, {"task": None})
    return open_parts([Zoo(folder / name)], SaneWeightTokenizer(token_size, packing, "zoo"))[0]


def endless(loader: Callable[[], DataLoader]) -> Iterator[Any]:
    """Batches of one epoch after another."""
    while True:
        yield from loader()


def our_batches(part: Part, batch_size: int, window: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches as `hub_scripts/train.py` makes them."""
    windows = WindowDataset(part.train, part.statistics, window, part.zoo.symmetries, 0.1, 0)
    order = Order([len(windows)], 0)
    sampler = StepSampler(order, batch_size, 0, 1_000_000)
    return iter(DataLoader(MixedWindows([windows]), batch_sampler=sampler, collate_fn=collate))


def published_samples(part: Part) -> Iterator[tuple[torch.Tensor, ...]]:
    """Standardised tokens, mask, positions and properties of each checkpoint, as the published code prepares them."""
    layout = part.layout
    gather = SymmetryGather(layout, part.zoo.symmetries)
    means, stds = (
        torch.from_numpy(
            gather.spread({name: pair[place] for name, pair in part.statistics.items()}, 0, layout.num_tokens, place)
        )
        for place in (0, 1)
    )
    mask, positions = layout.value_mask, layout.position_ids.int()
    for row in range(len(part.train)):
        yield (part.train.tokens(slice(row, row + 1))[0] - means) / stds, mask, positions, torch.zeros(3)


def index_tables(part: Part) -> list[torch.Tensor]:
    """Where each value of a flattened network comes from after each of the permutations made beforehand."""
    layout, spec = part.layout, part.zoo.symmetries
    gather = SymmetryGather(layout, spec, ("permutation",))
    own, real = np.arange(layout.num_tokens * layout.token_size), layout.value_mask.numpy().ravel()
    rng = np.random.default_rng(0)
    drawn = (gather.window(0, layout.num_tokens, LazyDraw(spec.groups, rng))[0] for _ in range(PERMUTATIONS))
    return [torch.from_numpy(np.where(real, source.ravel(), own)) for source in drawn]


def published_batches(
    samples: list, tables: list[torch.Tensor], batch_size: int, window: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches as the published code makes them, out of files or of memory."""
    data = PublishedDataset(samples, tables, window)
    return map(two_views, endless(lambda: DataLoader(data, batch_size, shuffle=True, drop_last=True)))


# ---------------------------------------------------------------------------------------------------- step
class OurStep:
    """`SaneForPreTraining` with its optimizer; called on a batch it takes one step, as `hub_scripts/train.py` does."""

    def __init__(self, config: SaneConfig):
        self.model = SaneForPreTraining(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=3e-9, fused=True)

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Take a step; gives the loss."""
        loss = self.model(**{name: values for name, values in batch.items() if name not in ("row", "part")}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def operations(config: SaneConfig, batch_size: int, tokens: int) -> int:
    """Floating point operations of the matrix products of a step on two views."""
    width, rows = config.hidden_size, 2 * batch_size * tokens
    block = rows * (4 * width**2 + 2 * width * config.mlp_size) + 2 * rows * tokens * width
    ends = 2 * rows * width * (config.token_size + config.latent_size)
    head = 2 * batch_size * (config.window_size * config.latent_size + config.projection_size) * config.projection_size
    return 3 * 2 * ((config.num_hidden_layers + config.decoder_layers) * block + ends + head)


def in_turns(functions: dict[str, Callable[[int], Any]], turns: int) -> dict[str, np.ndarray]:
    """Wall and CPU seconds of each call, `(2, turns)`; beside the functions, a matrix product takes part as `peak`."""
    left, right = torch.randn(2, 2048, 2048)
    functions = functions | {"peak": lambda _: left @ right}
    times = {name: np.zeros((2, turns)) for name in functions}
    for turn in range(-3, turns):  # the first ones warm up
        for name, function in functions.items():
            start = time.perf_counter(), time.process_time()
            function(turn)
            if turn >= 0:
                times[name][:, turn] = time.perf_counter() - start[0], time.process_time() - start[1]
    return times


def summary(times: np.ndarray) -> dict[str, float]:
    """Median and least wall time, median CPU time."""
    return {
        "median_s": float(np.median(times[0])),
        "min_s": float(times[0].min()),
        "cpu_s": float(np.median(times[1])),
    }


def ratio(published: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Published over ours."""
    wall, cpu = np.median(published, axis=1) / np.median(ours, axis=1)
    minima = published[0].min() / ours[0].min()
    return {"speedup": float(wall), "speedup_of_minima": float(minima), "speedup_of_cpu_time": float(cpu)}


def measure_size(folder: Path, zoo: str, packing: str, settings: dict, batch_size: int, turns: int) -> dict[str, Any]:
    """Steps and loading of one size."""
    part = open_zoo(folder, zoo, packing, settings["token_size"])
    layout = part.layout
    window = min(256, layout.num_tokens)
    config = SaneConfig(**settings, window_size=window)
    maxima = tuple((layout.position_ids.amax(0) + 1).tolist())
    widths = (config.token_size, config.latent_size, config.hidden_size, config.num_hidden_layers)
    ours = OurStep(config)
    published = PublishedStep(Sizes(*widths, config.num_attention_heads, window, maxima))
    samples, tables = list(published_samples(part)), index_tables(part)
    batches = {
        "ours": our_batches(part, batch_size, window),
        "published": published_batches(sample_files(folder / "samples", samples), tables, batch_size, window),
        "memory": published_batches(samples, tables, batch_size, window),
    }
    loaded: dict[str, Any] = {}

    def load(side: str) -> Callable[[int], None]:
        return lambda _: loaded.update({side: next(batches[side])})

    times = in_turns(
        {
            "ours_load": load("ours"),
            "ours_step": lambda _: ours(loaded["ours"]),
            "memory_load": load("memory"),
            "published_load": load("published"),
            "published_step": lambda _: published(loaded["published"]),
        },
        turns,
    )
    both = {side: times[f"{side}_load"] + times[f"{side}_step"] for side in ("ours", "published")}
    in_memory = times["memory_load"] + times["published_step"]
    count, peak_s = operations(config, batch_size, window), float(np.median(times["peak"][0]))
    tokens, peak = 2 * batch_size * window, 2 * 2048**3 / peak_s
    found: dict[str, Any] = {
        "settings": {name: getattr(config, name) for name in MODEL_FIELDS}
        | {"batch_size": batch_size, "turns": turns},
        "tokens": layout.num_tokens,
        "window": window,
        "parameters": sum(parameter.numel() for parameter in ours.model.parameters()),
        "gigaflop": count / 1e9,
        "peak_gflops": peak / 1e9,
    }
    for side in ("ours", "published"):
        seconds = float(np.median(times[f"{side}_step"][0]))
        found[side] = {
            "step": summary(times[f"{side}_step"]),
            "load": summary(times[f"{side}_load"]),
            "load_and_step": summary(both[side]),
            "tokens_per_second": tokens / seconds,
            "share_of_peak": count / seconds / peak,
        }
    return found | {
        "step": ratio(times["published_step"], times["ours_step"]),
        "load": ratio(times["published_load"], times["ours_load"]),
        "load_and_step": ratio(both["published"], both["ours"]),
        "memory": {
            "load": ratio(times["memory_load"], times["ours_load"]),
            "load_and_step": ratio(in_memory, both["ours"]),
        },
    }


def sample_files(folder: Path, samples: list) -> list[Path]:
    """One file a sample, as `torch.save` writes it."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number:05d}.pt" for number in range(len(samples))]
    for file, sample in zip(files, samples, strict=True):
        torch.save(sample, file)
    return files


def measure_step(folder: Path) -> dict[str, Any]:
    """Steps of all sizes."""
    return {name: measure_size(folder, *size) for name, size in SIZES.items()}


# ---------------------------------------------------------------------------------------------------- other parts
def measure_resnet(folder: Path, turns: int = 10) -> dict[str, Any]:
    """One pass over a ResNet-18 in windows of 256 tokens of 288 values, as both packings cut it."""
    module = permuted_window.resnet18()
    state_dict = module.state_dict()
    step = OurStep(SaneConfig(token_size=288))
    layouts, batches = {}, {}
    for packing in ("dense", "paper"):
        tokenizer = SaneWeightTokenizer(288, packing, "zoo").fit([state_dict])
        layouts[packing] = layout = tokenizer.layout(state_dict)
        statistics = tokenizer.zoo[layout.fingerprint]["statistics"]
        windows = WindowDataset(TokenCache(layout.pack(state_dict).numpy()[None], layout), statistics, 256, noise=0.1)
        batches[packing] = [collate([windows[(2 * turn + sample, 0)] for sample in range(2)]) for turn in range(turns)]
    times = in_turns({name: lambda turn, name=name: step(batches[name][turn % turns]) for name in layouts}, turns)
    per_token = {name: float(np.median(times[name][0])) / (2 * 2 * 256) for name in layouts}
    found: dict[str, Any] = {
        name: {
            "tokens": layout.num_tokens,
            "fill": float(layout.value_mask.float().mean()),
            "microseconds_per_token": 1e6 * per_token[name],
            "seconds_per_network": layout.num_tokens * per_token[name],
        }
        for name, layout in layouts.items()
    }
    found["token_ratio"] = layouts["paper"].num_tokens / layouts["dense"].num_tokens
    return found | {"ratio": found["paper"]["seconds_per_network"] / found["dense"]["seconds_per_network"]}


def measure_sample_cost(folder: Path) -> dict[str, Any]:
    """A training sample of an 11M ResNet-18 over one of a 2.4k CNN; `benchmarks/permuted_window.py` says how."""
    sources = {"small": ZOOS["small_cnn"], "large": ZOOS["resnet18"]}
    networks = {name: (build(), inputs) for name, (build, inputs, _) in sources.items()}
    specs = {name: find_symmetries(module, torch.randn(shape)) for name, (module, shape) in networks.items()}
    found: dict[str, Any] = {}
    for setting in permuted_window.SETTINGS:
        for kinds in permuted_window.KINDS:
            small, large = (
                permuted_window.dataset(module, specs[name], *setting, folder, kinds)
                for name, (module, _) in networks.items()
            )
            found["{}x{} {}".format(*setting, "+".join(kinds))] = permuted_window.compare(small, large, 1000)
    return {"windows": found, "ratio": max(figures["sample"]["ratio"] for figures in found.values())}


def launch(count: int, *arguments: str) -> subprocess.Popen:
    """`hub_scripts/train.py` on CPU processes of one thread each, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        str(count),
        "--main_process_port",
        port,
    ]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu"] if count > 1 else ["--cpu"]
    command += [str(ROOT / "hub_scripts" / "train.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, **streams)


def finish(process: subprocess.Popen) -> None:
    """Wait; a failure is told with the end of what it printed."""
    _, printed = process.communicate()
    if process.returncode:
        raise RuntimeError(printed[-3000:])


def measure_processes(folder: Path, steps: int = 60, rounds: int = 2) -> dict[str, Any]:
    """Samples per second of `hub_scripts/train.py --preset small-cnn`, by one and two processes of one thread."""
    open_zoo(folder)
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for count in speeds:
            output = folder / f"run_{count}_{number}"
            arguments = ["--preset", "small-cnn", "--zoo", str(folder / "small_cnn"), "--output-dir", str(output)]
            finish(launch(count, *arguments, "--max-steps", str(steps), "--eval-steps", str(steps // 6)))
            # the first entry holds what happens once
            speeds[count] += [entry["samples_per_second"] for entry in read_json(output / "training_log.json")[1:]]
    best, median = ({count: float(pick(found)) for count, found in speeds.items()} for pick in (max, np.median))
    return {
        "samples_per_second": {"best": best, "median": median},
        "ratio": median[2] / median[1],
        "ratio_of_best": best[2] / best[1],
    }


def measure_kills(folder: Path, steps: int = 200, kills: int = 5, seed: int = 0) -> dict[str, Any]:
    """How far a run that is killed again and again ends from one that is not."""
    open_zoo(folder)
    rng = np.random.default_rng(seed)
    sizes = ["--hidden-size", "32", "--num-hidden-layers", "1", "--latent-size", "8", "--batch-size", "8"]
    arguments = ["--zoo", str(folder / "small_cnn"), *sizes, "--max-steps", str(steps), "--save-steps", "5"]
    arguments += ["--eval-steps", "5", "--resume-from-checkpoint", "latest"]
    found = {}
    for count in (1, 2):
        outputs = {name: folder / f"{name}_{count}" for name in ("whole", "killed")}
        finish(launch(count, *arguments, "--output-dir", str(outputs["whole"])))
        seen, begun = [], time.perf_counter()
        points = sorted(rng.choice(np.arange(5, steps - 5), kills, replace=False).tolist())
        for point in points:
            process = launch(count, *arguments, "--output-dir", str(outputs["killed"]))
            # no checkpoint says that the point is reached, so the delay after the last one before it is random as well
            while process.poll() is None and last_step(outputs["killed"]) < point - 5:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            kill(process)
            seen.append(last_step(outputs["killed"]))
        finish(launch(count, *arguments, "--output-dir", str(outputs["killed"])))
        logs = [read_json(output / "training_log.json") for output in outputs.values()]
        weights = [load_file(output / "model.safetensors") for output in outputs.values()]
        found[f"processes_{count}"] = {
            "last_checkpoint_at_kill": seen,
            "seconds": time.perf_counter() - begun,
            "loss": [log[-1]["loss"] for log in logs],
            "loss_difference": max(abs(one["loss"] - two["loss"]) for one, two in zip(*logs, strict=True)),
            "weight_difference": max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0]),
        }
    return {"steps": steps, "seed": seed, **found}


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for the launcher and all it started: workers have sessions of their own."""
    try:
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        everyone = []
    for one in everyone:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(everyone)
    process.communicate()


def last_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name.partition("_")[2]) for path in folder.glob("step_*")), default=0)


def measure_memory(folder: Path, steps: int = 10_000, seconds: float = 180.0) -> dict[str, Any]:
    """Anonymous memory over steps of a tiny model, with their data."""
    part = open_zoo(folder)
    sizes = {"token_size": 32, "latent_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    step, batches = (
        OurStep(SaneConfig(**sizes, window_size=part.layout.num_tokens)),
        our_batches(part, 4, part.layout.num_tokens),
    )
    begin, used = time.perf_counter(), []
    while len(used) < steps and time.perf_counter() - begin < seconds:
        step(next(batches))
        used.append(anonymous_mb())
    quarter = len(used) // 4
    first, last = float(np.median(used[:quarter])), float(np.median(used[-quarter:]))
    return {"steps": len(used), "first_quarter_mb": first, "last_quarter_mb": last, "growth_mb": last - first}


def anonymous_mb() -> float:
    """Memory of this process that is no file's."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


# ---------------------------------------------------------------------------------------------------- all
PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "memory": measure_memory,  # first: what others leave behind would hide what it looks for
    "step": measure_step,
    "resnet": measure_resnet,
    "sample_cost": measure_sample_cost,
    "processes": measure_processes,
    "kills": measure_kills,
    "ablation": training_quality.measure_ablation,
    "architectures": training_quality.measure_architectures,
    "quality": training_quality.measure_quality,
}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    names = {"processor": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    return names | {"threads": torch.get_num_threads(), "torch": torch.__version__, "load": os.getloadavg()[0]}


def judge(results: dict[str, Any]) -> None:
    """Add the top-level figures, and for what is there whether it is good enough."""
    ok = {}
    if "sizes" in results:
        size = results["sizes"]["small_cnn"]
        results["step_speedup"] = size["step"]["speedup"]
        results["step_with_loading_speedup"] = size["load_and_step"]["speedup"]
        ok |= {name: results[name] >= TARGETS[name] for name in ("step_speedup", "step_with_loading_speedup")}
    ok |= {name: results[name]["ratio"] >= TARGETS[name] for name in ("resnet", "processes") if name in results}
    if "sample_cost" in results:
        ok["sample_cost"] = results["sample_cost"]["ratio"] <= TARGETS["sample_cost"]
    if "memory" in results:
        ok["memory"] = results["memory"]["growth_mb"] <= TARGETS["memory_growth_mb"]
    if "kills" in results:
        for count, name in ((1, "kills_one_process"), (2, "kills_two_processes")):
            ok[name] = results["kills"][f"processes_{count}"]["loss_difference"] <= TARGETS[name]
    if "architectures" in results:
        ok["architectures"] = results["architectures"]["largest_loss_of_r2"] <= TARGETS["architectures_loss_of_r2"]
    for compression, found in results.get("quality", {}).items():
        speedups = [found[f"speedup_{name}"] for name in ("r2", "accuracy_decoded")]
        ok[f"quality_{compression}"] = None not in speedups and min(speedups) >= TARGETS["quality_speedup"]
    results["ok"] = ok


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="the JSON file; parts that are not measured are kept as it has them"
    )
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure")
    parser.add_argument(
        "--zoo", type=Path, help="zoo for quality and ablation; by default 210 CNNs on Fashion-MNIST are trained first"
    )
    parser.add_argument("--minutes", type=float, default=30, help="of the published recipe in the part quality")
    parser.add_argument("--threads", type=int, default=1, help="of torch; processes have one each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = read_json(args.out) if args.out.exists() else {}
    results |= {"targets": TARGETS}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SANE_CACHE"] = str(Path(folder) / "cache")
        for name in (name for name in PARTS if name in args.part):
            arguments: dict[str, Any] = {}
            if name in ("quality", "ablation"):
                arguments["zoo"] = args.zoo or training_quality.fashion_zoo(Path(folder) / "fashion")
            if name == "quality":
                arguments["minutes"] = args.minutes
            results["sizes" if name == "step" else name] = PARTS[name](Path(folder), **arguments)
            results.setdefault("machine", {})[name] = machine()
            judge(results)
            write_json(args.out, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
