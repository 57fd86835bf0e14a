"""Symmetries of the families that people use, alignment, and the cost of a permuted window; JSON out.

python benchmarks/symmetry.py --out results.json                     everything, about a quarter of an hour on two cores
python benchmarks/symmetry.py --out results.json --only mlp resnet18   some families
python benchmarks/symmetry.py --out results.json --wheels DIR        with real pairs: DIR holds the wheel mhcnuggets-2.4.1
"""

import argparse
import json
import platform
import sys
import tempfile
import time
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import permuted_window
from benchmarks.families import FAMILIES, resnet18, small_cnn
from tokenization_sane import CheckpointFiles, SymmetrySpec, WeightMatcher, find_symmetries, weight_distance

NUM_SMALL = 1000


def measure_family(name: str) -> dict[str, Any]:
    """Find the symmetries of one family, permute a network of it at random and bring it back."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    module, inputs = family.build().eval(), family.inputs()
    start = time.perf_counter()
    spec = find_symmetries(module, inputs, select_outputs=family.select_outputs)
    seconds = time.perf_counter() - start
    shapes = {parameter_name: parameter.shape for parameter_name, parameter in module.named_parameters()}
    permutations = spec.of_kind("permutation")
    return {
        "parameters": sum(shape.numel() for shape in shapes.values()),
        "groups": len(permutations.groups) + len(spec.rejected),
        "verified": len(permutations.groups),
        "covered": spec.coverage(shapes),
        "max_error": max(group.max_error for group in spec.groups),
        "seconds": seconds,
        "signs": len(spec.of_kind("sign").groups),
        "scales": len(spec.of_kind("scale").groups),
        "rejected": {group.name: group.reason for group in spec.rejected},
        "twin": measure_twin(module, spec),
    }


def measure_twin(module: nn.Module, spec: SymmetrySpec) -> dict[str, Any]:
    """A network and its random twin: is the twin brought back?"""
    generator = torch.Generator().manual_seed(1)
    state = {  # a new network has biases of zero, which cannot tell units apart
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in module.state_dict().items()
    }
    draw = spec.draw(generator)
    twin = spec.apply(state, draw)
    start = time.perf_counter()
    found = WeightMatcher(spec, state).align(twin)
    seconds = time.perf_counter() - start
    back = [
        (ours == theirs).sum().item()
        for group, ours, theirs in zip(spec.groups, found.draw, spec.invert(draw), strict=True)
        if group.kind == "permutation"
    ]
    return {
        "distance_before": found.distance_before,
        "distance_after": found.distance_after,
        "units_back": sum(back) / sum(group.size for group in spec.of_kind("permutation").groups),
        "seconds": seconds,
    }


def measure_many() -> dict[str, Any]:
    """Align 1,000 independent small CNNs to one, and one independent ResNet-18 to another."""
    torch.manual_seed(0)
    networks = [small_cnn().state_dict() for _ in range(NUM_SMALL + 1)]
    spec = find_symmetries(small_cnn(), FAMILIES["cnn"].inputs())
    start = time.perf_counter()
    found = list(WeightMatcher(spec, networks[0]).align_all(networks[1:]))
    small = time.perf_counter() - start
    first, second = resnet18(), resnet18()
    spec = find_symmetries(first, FAMILIES["resnet18"].inputs())
    start = time.perf_counter()
    pair = WeightMatcher(spec, first.state_dict()).align(second.state_dict())
    return {
        "small_cnns": {
            "networks": NUM_SMALL,
            "seconds": small,
            "distance_before": sum(one.distance_before for one in found) / NUM_SMALL,
            "distance_after": sum(one.distance_after for one in found) / NUM_SMALL,
        },
        "resnet18_pair": {
            "seconds": time.perf_counter() - start,
            "distance_before": pair.distance_before,
            "distance_after": pair.distance_after,
        },
    }


class PeptideReader(nn.Module):
    """The networks of mhcnuggets: LSTM over amino acids, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.hidden, self.head = nn.LSTM(21, 64, batch_first=True), nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        return self.head(self.hidden(self.lstm(rows)[0][:, -1]).tanh()).sigmoid()


def peptide_state(path: Path) -> dict[str, torch.Tensor]:
    """A Keras file of mhcnuggets as torch has it: kernels are (in, out) there, and the gates stand in the same order."""
    with CheckpointFiles(path) as files:
        tensors = list(files.read().values())
    by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for tensor in tensors:
        by_shape.setdefault(tuple(tensor.shape), []).append(tensor)
    bias = by_shape[256,][0]
    return {
        "lstm.weight_ih_l0": by_shape[21, 256][0].T.contiguous(), "lstm.weight_hh_l0": by_shape[64, 256][0].T.contiguous(),
        "lstm.bias_ih_l0": bias, "lstm.bias_hh_l0": torch.zeros_like(bias),
        "hidden.weight": by_shape[64, 64][0].T.contiguous(), "hidden.bias": by_shape[64,][0],
        "head.weight": by_shape[64, 1][0].T.contiguous(), "head.bias": by_shape[1,][0],
    }  # fmt: skip


def measure_real_pairs(wheels: Path, count: int = 40) -> dict[str, Any]:
    """Neighbours in the list of real networks that others trained for use: how far apart, before and after alignment."""
    spec = find_symmetries(PeptideReader(), torch.randn(2, 9, 21))
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(next(wheels.glob("mhcnuggets-*.whl"))) as wheel:
            names = sorted(n for n in wheel.namelist() if "saves/production" in n and n.endswith(".h5"))[: count + 1]
            wheel.extractall(folder, names)
        states = [peptide_state(Path(folder, name)) for name in names]
    pairs = [(WeightMatcher(spec, one).align(other), weight_distance(one, other)) for one, other in pairwise(states)]
    return {
        "pairs": len(pairs),
        "distance_before": sum(pair.distance_before for pair, _ in pairs) / len(pairs),
        "distance_after": sum(pair.distance_after for pair, _ in pairs) / len(pairs),
        "share_nearer": sum(pair.distance_after < pair.distance_before for pair, _ in pairs) / len(pairs),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=[*FAMILIES], help="families to measure, and nothing else")
    parser.add_argument("--wheels", type=Path, help="folder with the wheel of mhcnuggets, for real pairs")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "machine": {"threads": args.threads, "torch": torch.__version__, "processor": platform.machine()},
        "families": {},
    }
    for name in args.only or FAMILIES:
        results["families"][name] = row = measure_family(name)
        print(f"{name:<20} {row['verified']}/{row['groups']} groups, covered {row['covered']:.2%}, error {row['max_error']:.0e}, "
              f"{row['seconds']:.1f} s; twin back {row['twin']['units_back']:.2%} at distance {row['twin']['distance_after']:.1e} "
              f"in {row['twin']['seconds']:.1f} s", flush=True)  # fmt: skip
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if not args.only:
        results["alignment"] = measure_many()
        if args.wheels:
            results["real_pairs"] = measure_real_pairs(args.wheels)
        results["permuted_window"] = permuted_window.measure()
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(json.dumps({key: results[key] for key in results if key not in ("families", "machine")}, indent=2))


if __name__ == "__main__":
    main()
