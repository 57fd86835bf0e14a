"""What the recipe reaches: time to the published recipe's quality, ablations, several architectures in one model.

These are parts of `benchmarks/training.py` (`--part quality ablation architectures`); they train on a zoo that
`sane build-zoo` made (`--zoo`), or on one of 210 CNNs on Fashion-MNIST that they build first, which takes a quarter of
an hour. Everything runs with one thread. Times are CPU times, which other programs on the machine disturb least; ours
are the wall times of the training log times the share of a core that the run had.

`quality`: `benchmarks/published_step.py` trains for `--minutes` with the paper's recipe: networks as they came out of
their training, not aligned; initial weights of 0.02; AdamW with OneCycle up to 1e-4; learned positions; batches of 32; five
permutations. Ours is `hub_scripts/train.py --preset small-cnn` on the aligned zoo for a third of that time. Both cut
networks into the same tokens and have the same widths, layers and compression. Each is judged on the validation split of its own
data, by the same code: R² of standardised weights, accuracy of decoded networks. The published time leaves validation
out, ours has it in. The floor is a PCA of each token position, fitted on the aligned train split.

`ablation`: the preset for a fixed number of steps with one switch changed at a time, three seeds each.

`architectures`: one model on three zoos of different architectures, beside one for each with the same budget: as many
steps on its own zoo as it has in the mixture, in which each zoo has an equal share of every batch.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from torch.utils.data import DataLoader

from benchmarks.published_step import PERMUTATIONS, PublishedDataset, PublishedSane, PublishedStep, Sizes, two_views
from hub_scripts.codec import Codec
from hub_scripts.evaluation.baselines import r2_score_masked, token_pca
from hub_scripts.outputs import read_json
from hub_scripts.training.parts import Part, open_parts
from hub_scripts.training.validation import Validation
from hub_scripts.zoos.alignment import unaligned
from hub_scripts.zoos.schema import hparam_columns, property_columns
from hub_scripts.zoos.views import LazyDraw, SymmetryGather
from hub_scripts.zoos.writer import ZooWriter
from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import SaneWeightTokenizer

ROOT = Path(__file__).parents[1]
PRESET = yaml.safe_load((ROOT / "hub_scripts" / "configs" / "train" / "small-cnn.yaml").read_text(encoding="utf-8"))
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # apt-get install dataset-fashion-mnist
LATENT_SIZES = {"1.0": 30, "2.0": 15}  # of 32 values in a token, by compression
SEEDS = (0, 1, 2)
ABLATION_STEPS = 60
# one switch each; {unaligned} is the zoo before alignment
ABLATIONS: dict[str, list[str]] = {
    "preset": [],
    "not aligned": ["--zoo", "{unaligned}"],
    "random start": ["--no-linear-start"],
    "random start, std 0.02": ["--no-linear-start", "--initializer-range", "0.02"],
    "learning rate 1e-4": ["--learning-rate", "1e-4"],
    "learning rate 3e-3": ["--learning-rate", "3e-3"],
    "learned positions": ["--position-encoding", "learned"],
    "dense packing": ["--packing", "dense"],
    "no permutations": ["--no-permute"],
    "no noise": ["--noise", "0"],
    "masks a tenth of the tokens": ["--mask-tokens", "0.1"],
    "no contrastive loss": ["--contrastive-weight", "0"],
    "contrastive weight 0.3": ["--contrastive-weight", "0.3"],
    "no behavioural loss": ["--behavioural-weight", "0"],
    "behavioural weight 0.5": ["--behavioural-weight", "0.5"],
}
# what `sane build-zoo` trains for `architectures`, each on the digits that scikit-learn brings
ARCHITECTURES = {
    "cnn": ["--architecture", "hub_scripts.zoos.architectures:SmallCNN"],
    "mlp": ["--architecture", "hub_scripts.zoos.architectures:MLP"],
    "resnet": ["--architecture", "hub_scripts.zoos.architectures:SmallResNet"],
}
ARCHITECTURE_STEPS = 150
ARCHITECTURE_BATCH = 32


# ---------------------------------------------------------------------------------------------------- zoos
def command(*arguments: str) -> tuple[float, float]:
    """Run one of the scripts with one thread; gives its wall and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    script, *rest = arguments
    line = [sys.executable, str(ROOT / "hub_scripts" / script), *rest]
    done = subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}\n{done.stderr.decode()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def fashion_zoo(folder: Path, images: str = FASHION_MNIST) -> Path:
    """A zoo of 210 CNNs of the published Model Zoos on Fashion-MNIST, or on the images of another folder of IDX files."""
    if not folder.exists():
        settings = ["--task", f"idx:{images}", "--num-models", "210", "--epochs", "5", "--batch-size", "128"]
        settings += ["--learning-rates", "3e-3", "1e-2", "--data-fractions", "0.2", "--num-workers", "2"]
        settings += ["--architecture", "hub_scripts.zoos.architectures:ModelZooCNN"]
        command("build_zoo.py", "--output-dir", str(folder), *settings)
    return folder


def unaligned_zoo(zoo: Zoo, folder: Path) -> Path:
    """The same zoo with the weights as training left them."""
    if folder.exists():
        return folder
    columns = next(iter(zoo.splits.values())).features
    kept = [*property_columns(columns), *hparam_columns(columns)]
    rows = {split: len(table) for split, table in zoo.splits.items()}
    writer = ZooWriter(folder, {name: columns[name] for name in kept}, rows)
    writer.add_layout(zoo.layout, zoo.symmetries)
    names = [*kept, "model_id", "epoch", "layout_id", "architecture", "architecture_kwargs"]
    for split, table in zoo.splits.items():
        for index, row in enumerate(table):
            state_dict = unaligned(zoo.symmetries, zoo.state_dict(split, index), row["alignment_permutations"])
            writer.add(split, {name: row[name] for name in names}, state_dict)
    writer.finish(folder.name, {key: zoo.info[key] for key in ("task", "pixel_mean", "pixel_std")})
    return folder


# ---------------------------------------------------------------------------------------------------- quality
class PublishedCodec(Codec):
    """The published model as the validation wants one."""

    def __init__(self, model: PublishedSane, part: Part, tokenizer: SaneWeightTokenizer):
        self.model, self.tokenizer, self.layout = model, tokenizer, part.layout
        self.mean, self.std = tokenizer.token_statistics(part.layout)

    @torch.no_grad()
    def encode(self, token_values: torch.Tensor) -> torch.Tensor:
        """Latents."""
        return torch.cat([self._both(chunk)[0] for chunk in torch.as_tensor(token_values).split(64)])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Tokens of latents."""
        model, positions = self.model, self.layout.position_ids
        chunks = (
            model.token_out(model.decoder(model.place(model.latent_in(chunk), positions.expand(len(chunk), -1, -1))))
            for chunk in latents.split(64)
        )
        return torch.cat(list(chunks)).masked_fill(~self.layout.value_mask, 0.0)

    def _both(self, chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.model(chunk, self.layout.position_ids.expand(len(chunk), -1, -1))


def published_run(folder: Path, latent_size: int, minutes: float) -> list[dict[str, float]]:
    """Train with the paper's recipe; figures at some times, in CPU seconds of training."""
    tokenizer = SaneWeightTokenizer(PRESET["token_size"], PRESET["packing"], "zoo")
    part = open_parts([Zoo(folder)], tokenizer)[0]
    layout = part.layout
    torch.manual_seed(0)
    maxima = tuple((layout.position_ids.amax(0) + 1).tolist())
    widths = (PRESET["token_size"], latent_size, PRESET["hidden_size"], PRESET["num_hidden_layers"])
    step = PublishedStep(Sizes(*widths, PRESET["num_attention_heads"], layout.num_tokens, maxima))
    codec = PublishedCodec(step.model, part, tokenizer)
    validation = Validation([(part, codec)], Accelerator(cpu=True))
    samples = [
        (codec.normalize(part.train.tokens(slice(row, row + 1)))[0], layout.value_mask, layout.position_ids, torch.zeros(3))
        for row in range(len(part.train))
    ]  # fmt: skip
    gather = SymmetryGather(layout, part.zoo.symmetries, ("permutation",))
    own, real = np.arange(layout.num_tokens * layout.token_size), layout.value_mask.numpy().ravel()
    rng = np.random.default_rng(0)
    draws = (LazyDraw(part.zoo.symmetries.groups, rng) for _ in range(PERMUTATIONS))
    tables = [
        torch.from_numpy(np.where(real, gather.window(0, layout.num_tokens, draw)[0].ravel(), own)) for draw in draws
    ]
    loader = DataLoader(PublishedDataset(samples, tables, layout.num_tokens), 32, shuffle=True, drop_last=True)

    begin, count, spent = time.process_time(), 0, 0.0
    for batch in loader:  # an epoch before the clock starts says how many steps the time has room for
        step(two_views(batch))
        count += 1
    per_step = (time.process_time() - begin) / count
    torch.manual_seed(0)
    step.__init__(Sizes(*widths, PRESET["num_attention_heads"], layout.num_tokens, maxima))
    codec.model = step.model
    total = max(count, int(60 * minutes / per_step))
    schedule = torch.optim.lr_scheduler.OneCycleLR(step.optimizer, 1e-4, total)
    curve: list[dict[str, float]] = []
    done, marks = 0, [round(total * share) for share in (1 / 30, 1 / 10, 1 / 6, 1 / 3, 2 / 3, 1)]
    while done < total:
        for batch in loader:
            begin = time.process_time()
            step.model.train()
            step(two_views(batch))
            done += 1
            if done < total:
                schedule.step()
            spent += time.process_time() - begin
            if done in marks:
                scores = validation(step.model)
                curve.append(
                    {"step": done, "cpu_s": spent} | {name: scores[name] for name in ("r2", "accuracy_decoded")}
                )
                print(curve[-1], flush=True)
            if done == total:
                break
    return curve


def our_run(zoo: Path, output: Path, *flags: str, every: int = 20) -> dict[str, Any]:
    """Train with `hub_scripts/train.py`; the curve over CPU time, and the last scores."""
    defaults = {"--preset": "small-cnn", "--zoo": str(zoo), "--output-dir": str(output), "--eval-steps": str(every)}
    defaults = [word for name, value in defaults.items() if name not in flags for word in (name, value)]
    wall, cpu = command("train.py", *defaults, *flags)
    log = read_json(output / "training_log.json")
    names = [name for name in log[-1] if name.partition("/")[0] in ("r2", "accuracy_decoded", "accuracy_original")]
    names = [name for name in names if not name.startswith("r2/") or ":" in name] + ["effective_rank"]
    curve = [
        {"step": entry["step"], "cpu_s": entry["seconds"] * cpu / wall} | {name: entry[name] for name in names}
        for entry in log
    ]
    return {"curve": curve, "compression": read_json(output / "results.json")["compression"]}


def pca_floor(part: Part, tokenizer: SaneWeightTokenizer, components: int) -> float:
    """R² of a PCA of each token position."""
    mean, std = tokenizer.token_statistics(part.layout)
    train, unseen = (((cache.tokens(slice(None)) - mean) / std).numpy() for cache in (part.train, part.validation))
    mask = part.layout.value_mask.numpy()
    return r2_score_masked(unseen, token_pca(train, mask, components).reconstruct(unseen), mask)


def measure_quality(folder: Path, zoo: Path, minutes: float) -> dict[str, Any]:
    """The published recipe and ours at two compressions."""
    raw = unaligned_zoo(Zoo(zoo), folder / "unaligned")
    found: dict[str, Any] = {}
    for compression, latent_size in LATENT_SIZES.items():
        tokenizer = SaneWeightTokenizer(PRESET["token_size"], PRESET["packing"], "zoo")
        floor = pca_floor(open_parts([Zoo(zoo)], tokenizer)[0], tokenizer, latent_size)
        flags = ["--latent-size", str(latent_size), "--max-minutes", str(minutes / 3)]
        ours = our_run(zoo, folder / f"ours_{compression}", *flags)
        published = published_run(raw, latent_size, minutes)
        found[compression] = {"latent_size": latent_size, "pca_r2": floor, "ours": ours, "published": published}
        found[compression] |= sooner(published, ours["curve"])
    return found


def sooner(published: list[Mapping[str, float]], ours: list[Mapping[str, float]]) -> dict[str, Any]:
    """How much earlier ours is as good as the published recipe in the end; None if it never is."""
    last = published[-1]
    reached = {
        name: next((entry["cpu_s"] for entry in ours if entry[name] >= last[name]), None)
        for name in ("r2", "accuracy_decoded")
    }
    found = {f"speedup_{name}": at and last["cpu_s"] / at for name, at in reached.items()}
    return found | {f"gain_{name}": ours[-1][name] - last[name] for name in reached}


# ---------------------------------------------------------------------------------------------------- ablation
def measure_ablation(folder: Path, zoo: Path, steps: int = ABLATION_STEPS) -> dict[str, Any]:
    """Scores of each switch after the same number of steps: mean and standard deviation over the seeds."""
    raw = unaligned_zoo(Zoo(zoo), folder / "unaligned")
    found: dict[str, Any] = {"steps": steps, "seeds": list(SEEDS)}
    for name, flags in ABLATIONS.items():
        runs = []
        for seed in SEEDS:
            output = folder / f"ablation_{list(ABLATIONS).index(name):02d}_{seed}"
            chosen = [flag.format(unaligned=raw) for flag in flags]
            result = our_run(zoo, output, *chosen, "--max-steps", str(steps), "--seed", str(seed), every=steps)
            runs.append(result["curve"][-1] | {"compression": result["compression"]})
        keys = ("r2", "accuracy_decoded", "accuracy_original", "effective_rank", "compression", "cpu_s")
        found[name] = {
            key: [float(np.mean(v)), float(np.std(v, ddof=1))] for key in keys for v in [[r[key] for r in runs]]
        }
        print(name, found[name], flush=True)
    return found


# ---------------------------------------------------------------------------------------------------- architectures
def measure_architectures(folder: Path, steps: int = ARCHITECTURE_STEPS) -> dict[str, Any]:
    """R² of one model on three zoos, and of a model of its own for each."""
    zoos = {name: folder / name for name in ARCHITECTURES}
    for name, flags in ARCHITECTURES.items():
        if not zoos[name].exists():
            settings = ["--num-models", "96", "--epochs", "6", "--output-dir", str(zoos[name])]
            command("build_zoo.py", *settings, *flags)
    size = {"hidden": "192", "layers": "3"}
    common = ["--preset", "multi-zoo", "--hidden-size", size["hidden"], "--num-hidden-layers", size["layers"]]
    common += ["--max-steps", str(steps), "--normalize-targets", "false"]

    def run(name: str, sources: list[Path], batch: int, *flags: str) -> dict[str, float]:
        output = folder / f"model_{name}"
        flags = ("--zoo", *map(str, sources), "--batch-size", str(batch), *common, *flags)
        return our_run(sources[0], output, *flags, every=steps)["curve"][-1]

    alone = {name: run(name, [zoo], ARCHITECTURE_BATCH) for name, zoo in zoos.items()}
    shares = ["--zoo-weights", *("1" for _ in zoos)]
    together = run("all", list(zoos.values()), len(zoos) * ARCHITECTURE_BATCH, *shares)
    found: dict[str, Any] = {}
    for name in zoos:
        (joint,) = (value for key, value in together.items() if key.startswith(f"r2/{name}:"))
        found[name] = {"r2_alone": alone[name]["r2"], "r2_together": joint, "loss_of_r2": alone[name]["r2"] - joint}
    return {"steps": steps, "zoos": found, "largest_loss_of_r2": max(one["loss_of_r2"] for one in found.values())}
