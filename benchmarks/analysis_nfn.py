"""What a weight-space network reads from weights: a neural functional network, trained on properties of zoos; JSON out.

python benchmarks/analysis_nfn.py --zoos runs/fashion runs/batchnorm        three seeds of three minutes for each zoo

It needs the packages `nfn` (0.1.2) and `einops`, which nothing else here does: `pip install --no-deps nfn einops`. The `nfn` wheel brings
a top-level package `tests`; a folder of its own (`--target`, then `PYTHONPATH`) keeps that apart.

For each zoo and seed one network of equivariant layers (Zhou et al. 2023, arXiv 2302.14040: `HNPLinear`, the variant for which hidden units
have no order but inputs and classes do) reads all weights of a checkpoint and tells `PROPERTIES` together. It is trained from nothing
on the train split, checkpoints of epoch 1 and later; test checkpoints are told by the epoch that had the smallest error on the validation
split, for each property its own, as the ridge of `sane probe` has a strength for each. The test split is used for nothing else.
Intervals are those of `sane probe`: 95 %, a bootstrap over models. Seeds are of initial weights, batches and noise; the zoo's splits stay.

Input: matrices and kernels with their vectors, in the order of the layers, each tensor less its mean and divided by its standard
deviation over the train split (one number of each for a tensor, so that units stay interchangeable). Layers of `nfn` know one bias for a
layer; here biases have several channels, and scale, shift, running mean and running variance of a batch norm are further channels beside the bias
of the layer before it. The first linear layer sees each channel of the last convolution at several places, so its columns become a
kernel with that many places. Counts of batches are left out: they tell the epoch.

Not known to it: signs of tanh units and scales of ReLU units, which are symmetries as well (zoos of `sane build-zoo` are aligned, which fixes most of
them), how the network runs and what it was trained on. The recipe
(`CHANNELS` to `WEIGHT_DECAY`) is one for all zoos. A dozen were tried for about a minute each on the Fashion-MNIST zoo, and this one was best on
its validation split: 4, 8 and 16 channels, the layers of `nfn` for which inputs and classes have no order either, dropout, noise, random signs,
learning rates. Whichever is taken overfits within some epochs: 210 models are few for it.

`minutes` are CPU minutes of one thread, for each zoo and seed, with validation in them; the learning rate falls with them.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_scripts.evaluation.probes import bootstrap_r2
from hub_scripts.outputs import write_json
from hub_scripts.zoos.tasks import SPLITS
from hub_scripts.zoos.zoo import Zoo

PROPERTIES = ("test_accuracy", "epoch", "generalization_gap")
SEEDS = (0, 1, 2)
CHANNELS = 4  # of each equivariant layer
EQUIVARIANT_LAYERS = 3
HIDDEN = 256  # of the perceptron behind the pooling
DROPOUT = 0.5
NOISE = 0.3  # standard deviation of what is added to the input in training
BATCH = 32
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
SMALLEST_STD = 1e-6  # a tensor that varies less is constant up to rounding


def import_nfn():
    """The packages `nfn.common` and `nfn.layers`."""
    try:
        import nfn.common
        import nfn.layers
    except ImportError as error:
        raise ImportError(
            "the weight-space network needs the packages nfn and einops: pip install --no-deps nfn einops."
        ) from error
    return nfn.common, nfn.layers


# ---------------------------------------------------------------------------------------------------- input
class ChainLayer(NamedTuple):
    """One matrix or kernel and the vectors of its outputs.

    Args:
        matrix (`str`): name of the tensor `(out, in, *kernel)`.
        vectors (`list[str]`): names of the tensors `(out,)`: its bias and those of a norm behind it.
        places (`int`): columns of a linear layer that belong to one unit of the layer before; 1 but behind a flattened image.
    """

    matrix: str
    vectors: list[str]
    places: int


def chain(zoo: Zoo) -> list[ChainLayer]:
    """Layers in the order in which they run.

    Raises:
        ValueError: If they do not run one after the other, or a tensor fits none of them.
    """
    if not isinstance(zoo.module, nn.Sequential):
        raise ValueError(f"{type(zoo.module).__name__} is no nn.Sequential; the layers of nfn want a chain of layers.")
    layers: list[ChainLayer] = []
    before = None  # units of the layer before
    for name, tensor in zoo.module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1:
            columns = tensor.shape[1]
            places = 1 if before is None else columns // before
            if before is not None and (columns % before or (places > 1 and tensor.ndim > 2)):
                raise ValueError(f"{name} has {columns} inputs, which do not fit the {before} units before it.")
            layers.append(ChainLayer(name, [], places))
            before = tensor.shape[0]
        elif before == len(tensor):
            layers[-1].vectors.append(name)
        else:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected one value for each of {before} units.")
    return layers


class Scaler:
    """Mean and standard deviation of each tensor, a number each, over the checkpoints that it is made from."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        doubles = {name: values.double() for name, values in tensors.items()}
        self.mean = {name: values.mean().item() for name, values in doubles.items()}
        self.std = {name: max(values.std().item(), SMALLEST_STD) for name, values in doubles.items()}

    def __call__(self, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """One of them, standardised."""
        return (tensors[name] - self.mean[name]) / self.std[name]


def weight_space(
    tensors: Mapping[str, torch.Tensor], layers: Sequence[ChainLayer], scaler: Scaler
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Matrices `(checkpoints, channels, out, in, *kernel)` and biases `(checkpoints, channels, out)` as `nfn` wants them.

    Both have as many channels as the layer with most vectors; what a layer does not have is 0.
    """
    channels = max(1, *(len(layer.vectors) for layer in layers))
    matrices, biases = [], []
    for layer in layers:
        matrix = scaler(tensors, layer.matrix)
        if layer.places > 1:
            matrix = matrix.unflatten(2, (-1, layer.places))[..., None]  # flattened channel by channel
        padded = matrix.new_zeros(len(matrix), channels, *matrix.shape[1:])
        padded[:, 0] = matrix
        bias = matrix.new_zeros(len(matrix), channels, matrix.shape[1])
        for channel, name in enumerate(layer.vectors):
            bias[:, channel] = scaler(tensors, name)
        matrices.append(padded)
        biases.append(bias)
    return matrices, biases


# ---------------------------------------------------------------------------------------------------- network
def build(matrices: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], outputs: int) -> nn.Module:
    """Equivariant layers, means over units, and a perceptron; from an input of any number of checkpoints."""
    common, layers = import_nfn()
    spec = common.network_spec_from_wsfeat(common.WeightSpaceFeatures(matrices, biases))
    parts: list[nn.Module] = []
    width = matrices[0].shape[1]
    for _ in range(EQUIVARIANT_LAYERS):
        parts += [layers.HNPLinear(spec, width, CHANNELS), layers.TupleOp(nn.ReLU())]
        width = CHANNELS
    pooled = width * layers.HNPPool.get_num_outs(spec)
    parts += [layers.HNPPool(spec), nn.Flatten(), nn.Dropout(DROPOUT), nn.Linear(pooled, HIDDEN), nn.ReLU()]
    return nn.Sequential(*parts, nn.Dropout(DROPOUT), nn.Linear(HIDDEN, outputs))


class Part(NamedTuple):
    """A split: input, properties `(checkpoints, properties)`, models, and how many checkpoints lack a property."""

    matrices: list[torch.Tensor]
    biases: list[torch.Tensor]
    y: np.ndarray
    model_ids: np.ndarray
    left_out: int


def read(zoo: Zoo, layers: Sequence[ChainLayer]) -> dict[str, Part]:
    """All splits, from epoch 1 on, without checkpoints that lack a property."""
    parts: dict[str, Part] = {}
    scaler = None
    for split in SPLITS:
        y = np.stack([np.asarray(zoo.column(split, name), np.float64) for name in PROPERTIES], axis=1)
        trained, complete = zoo.column(split, "epoch") >= 1, np.isfinite(y).all(1)
        rows = np.flatnonzero(trained & complete)
        tensors = zoo.stacked(split, rows)
        scaler = scaler or Scaler(tensors)  # the train split comes first
        matrices, biases = weight_space(tensors, layers, scaler)
        parts[split] = Part(
            matrices, biases, y[rows], zoo.column(split, "model_id")[rows], int((trained & ~complete).sum())
        )
    return parts


def predict(model: nn.Module, part: Part) -> np.ndarray:
    """Standardised properties `(checkpoints, properties)`."""
    model.eval()
    with torch.no_grad():
        chunks = [run(model, part, rows) for rows in torch.arange(len(part.y)).split(256)]
    return torch.cat(chunks).double().numpy()


def run(model: nn.Module, part: Part, rows: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """What the model says about some rows."""
    common, _ = import_nfn()
    matrices, biases = ([values[rows] for values in kind] for kind in (part.matrices, part.biases))
    if noise:  # channels that a layer does not have stay 0
        matrices, biases = ([x + noise * torch.randn_like(x) * (x != 0) for x in kind] for kind in (matrices, biases))
    return model(common.WeightSpaceFeatures(matrices, biases))


# ---------------------------------------------------------------------------------------------------- training
def train(parts: Mapping[str, Part], seed: int, minutes: float) -> dict[str, Any]:
    """Train one network for some CPU minutes; figures on the test split."""
    torch.manual_seed(seed)
    fit, unseen, test = (parts[split] for split in SPLITS)
    model = build(fit.matrices, fit.biases, len(PROPERTIES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    mean, std = fit.y.mean(0), fit.y.std(0)
    std = np.where(std > 0, std, 1.0)
    target = torch.from_numpy((fit.y - mean) / std).float()
    best = [(np.inf, 0, np.empty(0))] * len(PROPERTIES)  # error on the validation split, epoch, test predictions
    begin, budget, epoch = time.process_time(), 60 * minutes, 0
    while (spent := time.process_time() - begin) < budget:
        epoch += 1
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * spent / budget)) / 2
        for rows in torch.randperm(len(target)).split(BATCH):
            loss = nn.functional.mse_loss(run(model, fit, rows, NOISE), target[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        errors = np.square(predict(model, unseen) * std + mean - unseen.y).mean(0)
        better = [place for place, error in enumerate(errors) if error < best[place][0]]
        told = predict(model, test) * std + mean if better else None
        for place in better:
            best[place] = (errors[place], epoch, told[:, place])
    return {
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.process_time() - begin,
        "epochs": epoch,
        "train_r2": dict(zip(PROPERTIES, r2(fit.y, predict(model, fit) * std + mean), strict=True)),  # in the end
        "properties": {
            name: figures(test, unseen, place, *best[place]) for place, name in enumerate(PROPERTIES)
        },
    }  # fmt: skip


def r2(y: np.ndarray, predictions: np.ndarray) -> list[float]:
    """Share of the variance explained of each column; NaN where it has none."""
    error, total = np.square(y - predictions).sum(0), np.square(y - y.mean(0)).sum(0)
    return np.where(total > 0, 1 - error / np.where(total > 0, total, 1), np.nan).tolist()


def figures(test: Part, unseen: Part, place: int, error: float, epoch: int, told: np.ndarray) -> dict[str, Any]:
    """Of one property, on the test split, and R² on the validation split."""
    y = test.y[:, place]
    low, high = bootstrap_r2(y, told, test.model_ids)
    return {
        "r2": r2(y[:, None], told[:, None])[0],
        "r2_low": low,
        "r2_high": high,
        "kendall_tau": float(kendalltau(y, told).statistic),
        "validation_r2": float(1 - error / unseen.y[:, place].var()),
        "best_epoch": epoch,
    }


def measure_nfn(zoos: list[Path], seeds: tuple[int, ...] = SEEDS, minutes: float = 3) -> dict[str, Any]:
    """Figures by zoo: runs of all seeds, and mean R² and τ of each property over them.

    Raises:
        ImportError: If `nfn` or `einops` is not installed.
        ValueError: If the layers of a zoo's networks are no chain, or the zoo does not know their code.
    """
    import_nfn()
    torch.set_num_threads(1)  # CPU time is then the time of the run
    found: dict[str, Any] = {"minutes": minutes, "seeds": list(seeds), "zoos": {}}
    for path in zoos:
        zoo = Zoo(path)
        layers = chain(zoo)
        parts = read(zoo, layers)
        runs = []
        for seed in seeds:
            runs.append(train(parts, seed, minutes))
            shown = {name: round(one["r2"], 3) for name, one in runs[-1]["properties"].items()}
            print(path.name, "seed", seed, shown, flush=True, file=sys.stderr)
        found["zoos"][path.name] = {
            "layers": [layer._asdict() for layer in layers],
            "checkpoints": {split: len(part.y) for split, part in parts.items()},
            "left_out": {split: part.left_out for split, part in parts.items()},
            "mean": {
                name: {key: float(np.mean([run["properties"][name][key] for run in runs])) for key in ("r2", "kendall_tau")}
                for name in PROPERTIES
            },
            "runs": runs,
        }  # fmt: skip
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoos", type=Path, nargs="+", required=True, help="folders of zoos")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--minutes", type=float, default=3, help="CPU minutes for each zoo and seed")
    parser.add_argument("--out", type=Path, help="a JSON file for what is printed")
    args = parser.parse_args()
    found = measure_nfn([zoo.resolve() for zoo in args.zoos], tuple(args.seeds), args.minutes)
    if args.out:
        write_json(args.out, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
