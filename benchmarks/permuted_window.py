"""What a permuted training window costs: the same in a network of 2.4 thousand parameters and in one of 11 million.

python benchmarks/permuted_window.py --out results.json     print the table and write the figures

The two networks take turns, at the same number of random windows; times are microseconds, and the ratio is large over small.
`draw` is the permutation of a window alone (which value comes from where), `sample` the whole training sample with both views,
masks and noise, from tokens that are memory-mapped. A last row has the large network's permuted window beside a gather of as
many values whose positions are known.
"""

import argparse
import itertools
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.families import resnet18
from hub_scripts.zoos.architectures import SmallCNN
from hub_scripts.zoos.token_cache import TokenCache
from hub_scripts.zoos.views import Sample, WindowDataset
from tokenization_sane import SaneWeightTokenizer, SymmetrySpec, find_symmetries

TARGET = 1.3
SETTINGS = ((32, 64), (288, 8))  # token size, tokens in a window: both networks are longer
# what training draws; and permutations alone, since the small network (tanh) has signs that the large one (ReLU) has not
KINDS = (("permutation", "sign"), ("permutation",))
LARGE_SETTING = (288, 256)
NUM_ROWS = 4  # checkpoints in the memory-mapped file


def dataset(
    module: nn.Module, spec: SymmetrySpec, token_size: int, window_size: int, folder: Path, kinds: tuple[str, ...]
) -> WindowDataset:
    """Windows of a few checkpoints of a network, memory-mapped as `hub_scripts/train.py` has them."""
    state_dict = module.state_dict()
    tokenizer = SaneWeightTokenizer(token_size, normalization="zoo").fit([state_dict])
    layout = tokenizer.layout(state_dict)
    tokens = layout.pack(state_dict).numpy()
    path = folder / f"{layout.fingerprint}_{token_size}.npy"
    if not path.exists():
        np.save(path, np.repeat(tokens[None], NUM_ROWS, axis=0))
    statistics = tokenizer.zoo[layout.fingerprint]["statistics"]
    cache = TokenCache(np.load(path, mmap_mode="r"), layout)
    return WindowDataset(cache, statistics, window_size, spec, 0.1, 0, kinds)


def interleaved(functions: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Microseconds of every call; the functions take turns, so that what else the machine does meets them alike."""
    times = {name: np.zeros(repeats) for name in functions}
    for repeat in range(-repeats // 10, repeats):  # the first ones warm up
        for name, function in functions.items():
            start = time.perf_counter()
            function(repeat)
            if repeat >= 0:
                times[name][repeat] = 1e6 * (time.perf_counter() - start)
    return times


def draw_of(views: WindowDataset) -> Callable[[int], Any]:
    """Draws a symmetry for a window at a random start."""
    size, rng = min(views.window_size, views.num_tokens), np.random.default_rng(0)
    starts = rng.integers(0, views.num_tokens - size + 1, 1000).tolist()
    return lambda repeat: views.gather.draw(starts[repeat % 1000], starts[repeat % 1000] + size, rng)


def sample_of(views: WindowDataset) -> Callable[[int], Any]:
    """Makes a training sample, its window at a random start."""
    return lambda repeat: views[Sample(repeat + 1_000_000, repeat % NUM_ROWS)]


def compare(small: WindowDataset, large: WindowDataset, repeats: int) -> dict[str, Any]:
    """Draw and whole sample of both networks; `ratio` is of the medians, over windows at random places."""
    result = {}
    for name, make in (("draw", draw_of), ("sample", sample_of)):
        times = interleaved({"small": make(small), "large": make(large)}, repeats)
        ratio = float(np.median(times["large"]) / np.median(times["small"]))
        result[name] = {f"{network}_us": summary(values) for network, values in times.items()} | {"ratio": ratio}
    return result


def against_gather(views: WindowDataset, repeats: int) -> dict[str, Any]:
    """A permuted window of one network beside a gather of as many values from positions that are known."""
    size, rng = views.window_size, np.random.default_rng(1)
    values = views.cache._flat[0]
    starts = rng.integers(0, views.num_tokens - size + 1, 32).tolist()
    known = [views.gather.draw(start, start + size, rng)[0] for start in starts]

    def permuted(repeat: int) -> np.ndarray:
        start = starts[repeat % 32]
        return values.take(views.gather.draw(start, start + size, rng)[0])

    times = interleaved({"gather": lambda repeat: values.take(known[repeat % 32]), "permuted": permuted}, repeats)
    ratio = float(np.median(times["permuted"]) / np.median(times["gather"]))
    return {f"{name}_us": summary(found) for name, found in times.items()} | {"ratio": ratio}


def summary(times: np.ndarray) -> dict[str, float]:
    """Least, median and 90th percentile."""
    return {"min": float(times.min()), "median": float(np.median(times)), "p90": float(np.quantile(times, 0.9))}


def measure(repeats: int = 3000) -> dict[str, Any]:
    """All figures, as a dictionary for JSON."""
    torch.manual_seed(0)
    networks = {"small": (SmallCNN(), (1, 1, 8, 8)), "large": (resnet18(), (1, 3, 64, 64))}
    specs = {name: find_symmetries(module, torch.randn(shape)) for name, (module, shape) in networks.items()}
    results: dict[str, Any] = {
        "parameters": {n: sum(p.numel() for p in module.parameters()) for n, (module, _) in networks.items()},
        "kinds": {n: sorted({group.kind for group in spec.groups}) for n, spec in specs.items()},
        "windows": {},
    }
    with tempfile.TemporaryDirectory() as folder:

        def views(name: str, setting: tuple[int, int], kinds: tuple[str, ...]) -> WindowDataset:
            return dataset(networks[name][0], specs[name], *setting, Path(folder), kinds)

        for setting, kinds in itertools.product(SETTINGS, KINDS):
            small, large = views("small", setting, kinds), views("large", setting, kinds)
            name = "{}x{} {}".format(*setting, "+".join(kinds))
            results["windows"][name] = compare(small, large, repeats)
        large = views("large", LARGE_SETTING, KINDS[0])
        results["large_window"] = against_gather(large, repeats // 5)
        results["gather_bytes"] = len(pickle.dumps(large.gather))
    ratios = [figures[part]["ratio"] for figures in results["windows"].values() for part in ("draw", "sample")]
    return results | {"max_ratio": max(ratios), "target": TARGET, "ok": bool(max(ratios) <= TARGET)}


def table(results: dict[str, Any]) -> str:
    """The figures as text."""
    rows = [
        f"{part:6} {name:23} small {figures[part]['small_us']['median']:6.0f} us, large "
        f"{figures[part]['large_us']['median']:6.0f} us, ratio {figures[part]['ratio']:.2f} (medians; least "
        f"{figures[part]['small_us']['min']:.0f} and {figures[part]['large_us']['min']:.0f} us)"
        for name, figures in results["windows"].items()
        for part in ("draw", "sample")
    ]
    large = results["large_window"]
    rows.append(
        f"large network, 288x256: permuted window {large['permuted_us']['median']:.0f} us, known gather "
        f"{large['gather_us']['median']:.0f} us, ratio {large['ratio']:.2f}"
    )
    rows.append(f"memory of the large network's symmetries: {results['gather_bytes'] / 1e6:.2f} MB")
    header = f"token size x window, kinds; target: ratio <= {results['target']}, met: {results['ok']}"
    return "\n".join([header, *rows])


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    parser.add_argument("--repeats", type=int, default=3000, help="windows of each network")
    args = parser.parse_args()
    results = measure(args.repeats)
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
