"""How fast a zoo is written, read, imported, and cut into windows; JSON out.

python benchmarks/zoo_io.py --out results.json      about two minutes on two cores, 2 GB of disk
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.families import resnet18
from hub_scripts.import_zoo import ImportZooArguments, import_zoo
from hub_scripts.outputs import write_json
from hub_scripts.zoos.architectures import SmallCNN
from hub_scripts.zoos.schema import weights_to_bytes
from hub_scripts.zoos.token_cache import token_cache
from hub_scripts.zoos.writer import ZooWriter
from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import SaneWeightTokenizer

# name: module, rows, token size, tokens in a window
ZOOS = {
    "small_cnn": (lambda: SmallCNN(28, channels=(4, 6), hidden_size=8), 1000, 32, 64),
    "resnet18": (resnet18, 12, 288, 256),
}
TARGETS = {"window_speedup": 20.0, "import_seconds": 30.0}
PROPERTIES = {"test_accuracy": 0.5, "test_loss": 1.0, "generalization_gap": 0.1}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it gave."""
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def networks(build: Callable[[], nn.Module], count: int) -> Iterable[dict[str, torch.Tensor]]:
    """State dicts of other values each."""
    module = build()
    for number in range(count):
        yield {
            name: tensor + number if tensor.is_floating_point() else tensor
            for name, tensor in module.state_dict().items()
        }


def write_zoo(folder: Path, build: Callable[[], nn.Module], count: int, embed_limit: int) -> None:
    """A zoo whose rows all stand in the train split, through the writer that all commands use."""
    from datasets import Value

    layout = SaneWeightTokenizer().layout(build())
    writer = ZooWriter(folder, dict.fromkeys(PROPERTIES, Value("float64")), {"train": count}, embed_limit)
    writer.add_layout(layout)
    for number, state_dict in enumerate(networks(build, count)):
        row = {"model_id": f"m{number:05d}", "epoch": 0, "layout_id": layout.fingerprint, **PROPERTIES}
        writer.add("train", row, state_dict)
    writer.finish(folder.name, {"task": None})


def write_pickles(folder: Path, build: Callable[[], nn.Module], count: int) -> None:
    """One pickled file a checkpoint, with its properties, as the published zoos are."""
    folder.mkdir()
    for number, state_dict in enumerate(networks(build, count)):
        torch.save({"state_dict": state_dict, **PROPERTIES}, folder / f"{number:05d}.pt")


def rows_in_and_out(folder: Path, build: Callable[[], nn.Module], count: int) -> dict[str, Any]:
    """Rows a second, written and read, embedded in parquet, in files beside it, and as a pickle each."""
    figures: dict[str, Any] = {"rows": count, "row_bytes": len(weights_to_bytes(next(iter(networks(build, 1)))))}
    made, _ = timed(lambda: [None for _ in networks(build, count)])  # making the networks is no part of it
    for name, limit in (("embedded", 2**40), ("weights_file", 0)):
        seconds, _ = timed(lambda name=name, limit=limit: write_zoo(folder / name, build, count, limit))
        zoo = Zoo(folder / name)
        files = range(len(zoo.files["train"].files))
        read, total = timed(
            lambda zoo=zoo, files=files: sum(1 for number in files for _ in zoo.read_file("train", number))
        )
        assert total == count
        figures[name] = {
            "written_per_second": count / (seconds - made),
            "read_per_second": count / read,
            "bytes": sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file()),
        }
    seconds, _ = timed(lambda: write_pickles(folder / "pickles", build, count))
    files = sorted((folder / "pickles").iterdir())
    read, _ = timed(lambda: [torch.load(file, weights_only=True) and None for file in files])
    figures["pickles"] = {
        "written_per_second": count / (seconds - made),
        "read_per_second": count / read,
        "bytes": sum(file.stat().st_size for file in files),
    }
    figures["read_ratio"] = figures["embedded"]["read_per_second"] / figures["pickles"]["read_per_second"]
    figures["write_ratio"] = figures["embedded"]["written_per_second"] / figures["pickles"]["written_per_second"]
    return figures


def windows(folder: Path, token_size: int, window_size: int, repeats: int = 2000) -> dict[str, Any]:
    """Random windows a second, out of the token cache and out of the rows."""
    zoo = Zoo(folder)
    seconds, cache = timed(lambda: token_cache(zoo, "train", token_size, "dense"))
    layout = cache.layout
    size = min(window_size, layout.num_tokens)
    rng = np.random.default_rng(0)
    places = [(int(rng.integers(len(cache))), int(rng.integers(layout.num_tokens - size + 1))) for _ in range(repeats)]

    def from_cache() -> None:
        for row, start in places:
            cache.window(row, start, start + size)

    few = places[: 8 if zoo.layout.num_parameters > 1_000_000 else 200]
    # as a data set without a cache must do it, row by row; load_dataset has the whole zoo in its own cache
    rows = load_dataset("parquet", data_files=[str(f) for f in sorted((folder / "data").iterdir())], split="train")
    from safetensors.torch import load

    def from_rows() -> None:
        for row, start in few:
            layout.pack(load(rows[row]["weights"]))[start : start + size].clone()

    from_cache()
    warm = repeats / timed(from_cache)[0]
    slow = len(few) / timed(from_rows)[0]
    # what is mapped, or not on disk yet, cannot be dropped from memory
    path = Path(cache._raw.filename)
    del cache
    gc.collect()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cache = token_cache(zoo, "train", token_size, "dense")
    before = bytes_from_disk()
    cold_places = places[:50]
    for row, start in cold_places:
        cache.window(row, start, start + size)
    return {
        "window_bytes": 4 * size * token_size,
        "bytes_from_disk_per_window": (bytes_from_disk() - before) / len(cold_places),
        "cache_bytes": path.stat().st_size,
        "seconds_to_fill": seconds,
        "from_cache_per_second": warm,
        "from_rows_per_second": slow,
        "speedup": warm / slow,
    }


def bytes_from_disk() -> int:
    """What this process caused to be read from storage."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def import_folder(folder: Path, count: int = 1000) -> dict[str, Any]:
    """Import of small checkpoints, without alignment."""
    source = folder / "checkpoints"
    source.mkdir()
    lines = ["path,model_id,epoch,test_accuracy"]
    for number, state_dict in enumerate(networks(ZOOS["small_cnn"][0], count)):
        save_file(state_dict, source / f"{number:05d}.safetensors")
        lines.append(f"{number:05d}.safetensors,m{number // 4:05d},{number % 4},{number / count}")
    (source / "properties.csv").write_text("\n".join(lines) + "\n")
    args = ImportZooArguments(properties=str(source / "properties.csv"))
    args.source, args.output_dir = str(source), str(folder / "imported")
    seconds, info = timed(lambda: import_zoo(args))
    return {"checkpoints": info["num_checkpoints"], "seconds": seconds}


def main() -> None:
    """Measure everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"machine": {"threads": args.threads, "torch": torch.__version__}, "targets": TARGETS}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SANE_CACHE"] = str(Path(folder) / "cache")
        for name, (build, count, token_size, window_size) in ZOOS.items():
            place = Path(folder) / name
            place.mkdir()
            results[name] = rows_in_and_out(place, build, count)
            results[name]["windows"] = windows(place / "embedded", token_size, window_size)
        results["import"] = import_folder(Path(folder))
    results["ok"] = {
        "windows": all(results[name]["windows"]["speedup"] >= TARGETS["window_speedup"] for name in ZOOS),
        "import": results["import"]["seconds"] <= TARGETS["import_seconds"],
    }
    write_json(args.out, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
