"""Generate new networks around good ones, beside what critics ask for: noise, averages, and distances to the training data."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.codec import load_pretrained
from hub_scripts.evaluation import generation_plots, plots
from hub_scripts.evaluation.baselines import average_anchors, noise_around
from hub_scripts.evaluation.functional import build_module
from hub_scripts.generation.anchors import Anchors, check_rules, load_anchors
from hub_scripts.generation.draws import FLOWS, Sensitivity, check_modes, fit_flow, fit_sampler
from hub_scripts.generation.growth import GrowthReport, grow_networks
from hub_scripts.generation.heads import HEADS, adapt_task, replace_head, require_classes
from hub_scripts.generation.judge import NORMS, TOP, Judge, Judged
from hub_scripts.generation.refinement import THROUGH, probabilities, refine
from hub_scripts.generation.target_codec import codec_for
from hub_scripts.hub import publish_folder
from hub_scripts.model_cards import networks_card, public_name, public_settings
from hub_scripts.outputs import new_folder, write_json, write_text
from hub_scripts.symmetries import cached_symmetries
from hub_scripts.zoos.networks import save_in_own_class, save_networks
from hub_scripts.zoos.tasks import load_task
from hub_scripts.zoos.zoo import Zoo
from modeling_sane.generation_sane import LatentSampler
from tokenization_sane import SaneWeightTokenizer

PROGRAM = "sane sample"
NETWORKS_FOLDER = "networks"
SAMPLER_FOLDER = "sampler"
TARGETS = ("anchors", "labels")
AT_CHANCE = 3  # exit code
GROWTH_IMAGES = 64  # on which functions before and after are compared
AVERAGE_SHARES = (0.1, 0.2, 0.35, 0.5, 1.0)  # from an anchor itself to the plain average of some
ANCHOR_STEPS, MOST_FITTED = 100, 1_000_000
MOST_GRADIENT_VALUES = 2**32  # of mode laplace for one anchor: images times weights; 16 GB
NOT_WRITTEN = ("unseen", "decoded_anchors", "fitted_anchors")
TIE_NOISE = 0.1  # of copies of one unit, so that training can move them apart


@dataclass
class SampleArguments:
    """Generate networks: fit a density to the latents of good networks of the train split, draw, decode, keep the best.

    Beside each set stand its accuracy at epoch 0 and its distance to the nearest training checkpoint, and the same for the
    anchors, anchors plus noise, averages of anchors, and real networks of the test split.

    Example:
      sane sample --model runs/model --zoo runs/zoo --output-dir runs/sample --anchors top:10 --count 50 --keep 10
      sane sample --model runs/model --zoo runs/zoo --output-dir runs/wish --anchors near:10 --condition validation_accuracy=0.8
      sane sample --model runs/model --zoo runs/zoo --output-dir runs/mine --anchors a.safetensors b.safetensors --mode laplace
    """

    model: str = field(metadata={"help": "Folder or Hub repository of a SANE model with its tokenizer."})
    zoo: str = field(metadata={"help": "Folder of a zoo, or a dataset repository on the Hub."})
    output_dir: str = field(metadata={"help": "Folder for networks, results.json and plots; must not exist yet."})
    anchors: list[str] = field(
        default_factory=lambda: ["top:10"],
        metadata={
            "help": "Networks to sample around: last checkpoints of the train split by a rule (top:N on validation images, random:N, "
            "ids:NAME,NAME), the checkpoints of any epoch that are nearest to --condition (near:N), or checkpoints: files, folders, "
            "Hub repositories, or a set that was generated (DIR/networks/flow)."
        },
    )
    anchor_steps: int | None = field(
        default=None,
        metadata={
            "help": "Gradient steps that bring the latents of each anchor to where its decoded network says what the anchor says on "
            f"images of the task (no labels); 0 takes the encoder's. Default {ANCHOR_STEPS} for networks of up to {MOST_FITTED:,} "
            "weights, else 0 (each step decodes every anchor), and 0 where only flows draw."
        },
    )
    mode: list[str] = field(
        default_factory=lambda: ["laplace", "joint", "token", "dimension"],
        metadata={
            "help": "How to draw. laplace: around an anchor, in directions that hardly change what it says on images of the task (no "
            "labels); joint, token, dimension: kernel density that takes the whole network, each token or each value from one "
            "anchor; gaussian: mean and covariance of the anchors; interpolation: between and beyond anchors; flow and "
            "token_flow: trained on the whole train split, without anchors, on whole networks or on their tokens. With some "
            "hundred independent networks flow gives those networks again, and token_flow only noise."
        },
    )
    bandwidth: float = field(
        default=0.2, metadata={"help": "Standard deviation of the kernels in the latents' own unit."}
    )
    bandwidths: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.2, 0.4],
        metadata={"help": "More bandwidths, for the plot of accuracy against distance."},
    )
    laplace_bandwidth: float = field(
        default=0.7, metadata={"help": "The same for mode laplace, which can go further from the anchors."}
    )
    laplace_bandwidths: list[float] = field(
        default_factory=lambda: [0.2, 0.4, 0.7, 1.0, 1.3], metadata={"help": "More of them, for the plot."}
    )
    laplace_images: int = field(
        default=2000,
        metadata={
            "help": "Images of the task's train split on which mode laplace and --anchor-steps keep what anchors say."
        },
    )
    flow_steps: int | None = field(
        default=None, metadata={"help": "Training steps of modes flow and token_flow; default 5000 and 1500."}
    )
    condition: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Properties that networks shall have, NAME=VALUE: numeric columns of the zoo. Flows aim at them, and "
            "--anchors near:N looks for them."
        },
    )
    noises: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.2, 0.4, 0.8],
        metadata={"help": "Weight noise of the noise baseline, in standard deviations over the train split; the first results "
                  "take the one whose distance is nearest to that of the first mode's samples."},
    )  # fmt: skip
    average: int = field(default=2, metadata={"help": "Anchors in an average."})
    count: int = field(default=50, metadata={"help": "Networks to draw for each set."})
    keep: int = field(default=10, metadata={"help": "Networks of each set to write, the best on validation images."})
    rounds: int = field(
        default=1,
        metadata={
            "help": "More than 1: the kept networks become the anchors of the next round (bootstrap), for each mode but flows."
        },
    )
    refine_steps: int = field(
        default=0,
        metadata={
            "help": "Gradient steps on the drawn latents through the frozen decoder, as further sets NAME_refined; 0 for none."
        },
    )
    refine_target: str = field(
        default="anchors",
        metadata={
            "help": "What they aim at: anchors (what the anchors together say; no labels) or labels of the task's images."
        },
    )
    refine_through: str = field(
        default="latents", metadata={"help": "latents, or weights: the same steps without decoder."}
    )
    refine_learning_rate: float = field(
        default=0.02, metadata={"help": "Of these steps and of --anchor-steps, in standard deviations."}
    )
    refine_batch_size: int = field(default=128, metadata={"help": "Images in such a step."})
    norms: str = field(
        default="data",
        metadata={
            "help": "Running statistics of norms: data (measured on train images for each network) or none (as decoded)."
        },
    )
    window_size: int | None = field(
        default=None, metadata={"help": "Tokens that a window of the decoder gives; default the model's."}
    )
    halo: int | None = field(
        default=None, metadata={"help": "Context tokens on both sides of a window; default the model's."}
    )
    task: str | None = field(default=None, metadata={"help": "Task to judge them on; by default the zoo's own."})
    resize: bool = field(
        default=False, metadata={"help": "Bring images of --task that do not fit the networks to a size that does."}
    )
    new_head: str | None = field(
        default=None,
        metadata={
            "help": "Give the networks a new classifier for --task: ridge (solved in closed form on labelled samples) or init "
            "(random). Needed where it has another number of classes."
        },
    )
    shots: int = field(default=20, metadata={"help": "Labelled images of each class for --new-head ridge."})
    target_architecture: str | None = field(
        default=None,
        metadata={
            "help": "Generate networks of another architecture, 'package.module:Callable': the anchors are mapped to it first "
            "(wider, deeper, other kernels; the function is kept where that is possible)."
        },
    )
    target_kwargs: str | None = field(
        default=None, metadata={"help": "Its arguments as JSON, where they differ from those of the zoo's networks."}
    )
    push_to_hub: str | None = field(
        default=None,
        metadata={"help": "Publish the networks that are kept, with their card, as this model repository."},
    )
    hub_private: bool = field(default=False, metadata={"help": "Make the repository private, if it is new."})
    on_error: str = field(
        default="refuse",
        metadata={"help": "Rows with damaged or non-finite weights: refuse (stop and name the row) or skip."},
    )
    seed: int = field(default=0, metadata={"help": "Of anchors, draws and noise."})

    def __post_init__(self):
        self.anchors = [self.anchors] if isinstance(self.anchors, str) else self.anchors
        check_rules(self.anchors)
        check_modes(self.mode, num_anchors=2)
        if self.count < 1 or not 1 <= self.keep <= self.count:
            raise ValueError(f"--keep is {self.keep} and --count {self.count}, expected 1 <= keep <= count.")
        for name, least in (("rounds", 1), ("anchor_steps", 0), ("refine_steps", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least {least}.")
        for name, known in (("norms", NORMS), ("refine_through", THROUGH), ("refine_target", TARGETS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)!r}, expected {' or '.join(known)}."
                )
        if self.new_head is not None and self.new_head not in HEADS:
            raise ValueError(f"--new-head is {self.new_head!r}, expected {' or '.join(HEADS)}.")
        near = self.anchors[0].startswith("near:")
        if self.condition and not near and not set(FLOWS) & set(self.mode):
            raise ValueError("--condition needs --anchors near:N, or --mode flow, which has no anchors.")
        if near and not self.condition:
            raise ValueError(f"--anchors {self.anchors[0]} needs --condition NAME=VALUE, to which they are near.")
        self.conditions()

    def conditions(self) -> dict[str, float]:
        """`--condition` as names and values."""
        found = {}
        for text in self.condition:
            name, separator, value = text.partition("=")
            try:
                found[name] = float(value)
            except ValueError:
                separator = ""
            if not separator:
                raise ValueError(f"--condition is {text!r}, expected NAME=VALUE, such as validation_accuracy=0.8.")
        return found


class _Sampling:
    """Draws sets of networks and judges them."""

    def __init__(self, args: SampleArguments):
        self.args = args
        self.zoo = Zoo(args.zoo, on_error=args.on_error)
        self.module = self.zoo.module
        self.task = adapt_task(self.module, load_task(args.task) if args.task else self.zoo.task, args.resize)
        require_classes(self.module, self.task, args.new_head)
        model, tokenizer = load_pretrained(args.model)
        model.requires_grad_(False)
        self.anchors = load_anchors(self.zoo, args.anchors, tokenizer, args.seed, args.conditions())
        check_modes(args.mode, len(self.anchors))
        row = self.zoo.rows("train")[0]
        self.architecture, self.kwargs = row["architecture"], json.loads(row["architecture_kwargs"] or "{}")
        self.growth: GrowthReport | None = None
        if args.new_head:
            self._replace_head()
        if args.target_architecture or args.target_kwargs:
            self._grow(tokenizer)
        # not by fingerprints: those of a module and of the zoo's checkpoints may differ in what is no weight
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in self.anchors.tensors.items()}
        self.is_new_layout = shapes != {name: tuple(tensor.shape) for name, tensor in self.zoo.layout.tensors.items()}
        if self.is_new_layout and set(FLOWS) & set(args.mode):
            raise ValueError(
                "--mode flow learns the networks of the zoo; for another architecture or other classes take another mode."
            )
        layout = tokenizer.layout(self.module) if self.is_new_layout else self.zoo.layout
        self.codec = codec_for(model, tokenizer, layout, self.anchors.tensors)
        self.codec.window_size, self.codec.halo = args.window_size, args.halo
        self._check_size()
        self.judge = Judge(self.zoo, self.codec, self.module, self.task, args.keep, args.norms, self.is_new_layout)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.anchor_tokens = self.codec.tokens(self.anchors.tensors)
        self.encoded = self.codec.encode(self.anchor_tokens)
        # the anchors are finite: they were checked when they were read
        if not self.codec.decode(self.encoded).isfinite().all():
            raise ValueError(
                f"the model {args.model} turns its anchors into values that are not finite, so it cannot generate; its training has "
                "diverged, or its weights are damaged. Train it again or take another one."
            )
        if args.anchor_steps is None:
            is_small, needs_anchors = self.codec.layout.num_parameters <= MOST_FITTED, set(args.mode) - set(FLOWS)
            args.anchor_steps = ANCHOR_STEPS if is_small and needs_anchors else 0
        self.latents = self._fit_anchors() if args.anchor_steps else self.encoded
        self.sets: dict[str, Judged] = {}
        self.curves: dict[str, list[dict[str, float]]] = {}
        self.samplers: dict[str, LatentSampler] = {}
        self._drawn: dict[str, torch.Tensor] = {}  # latents of each mode

    def _check_size(self) -> None:
        weights = self.codec.layout.num_parameters
        if "laplace" in self.args.mode and weights * self.args.laplace_images > MOST_GRADIENT_VALUES:
            raise ValueError(
                f"--mode laplace needs the gradient of each of {self.args.laplace_images:,} images in {weights:,} weights, more than fits "
                f"in memory. Lower --laplace-images to {max(1, MOST_GRADIENT_VALUES // weights):,}, or take another --mode, such as joint."
            )

    def _replace_head(self) -> None:
        """Give the anchors a classifier for the task; what follows takes them as they are then."""
        self.module, self.kwargs, tensors = replace_head(
            self.architecture, self.kwargs, self.anchors.tensors, self.task, self.args.new_head, self.args.shots, self.args.seed
        )  # fmt: skip
        self.anchors = Anchors(tensors, self.anchors.names)

    def _grow(self, tokenizer: SaneWeightTokenizer) -> None:
        """Map the anchors to the target architecture, which takes the place of the zoo's own."""
        if self.args.target_architecture:
            self.architecture, self.kwargs = self.args.target_architecture, {}
        self.kwargs |= json.loads(self.args.target_kwargs or "{}")
        target = build_module(self.architecture, self.kwargs).eval()
        images = self.task.images["train"][:GROWTH_IMAGES]
        spec = cached_symmetries(target, tokenizer.layout(target), images[:2])
        before = (
            self.zoo.symmetries
            if not self.args.new_head
            else cached_symmetries(self.module, tokenizer.layout(self.module), images[:2])
        )
        tensors, self.growth = grow_networks(
            self.anchors.tensors, self.module, before, target, spec, images, TIE_NOISE, torch.Generator().manual_seed(self.args.seed)
        )  # fmt: skip
        self.anchors, self.module = Anchors(tensors, self.anchors.names), target

    def _fit_anchors(self) -> torch.Tensor:
        """Latents from which the decoder gives what the anchors say: an autoencoder loses some of it."""
        images, _ = self._some_images(self.args.laplace_images)
        own = probabilities(self.module, self.anchors.tensors, images)
        return self._steps(self.encoded, images, own, self.args.anchor_steps)

    @property
    def sensitivity(self) -> Sensitivity:
        return Sensitivity(self.module, self._some_images(self.args.laplace_images)[0])

    def _some_images(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Train images and labels, the same for all who ask for as many."""
        images, labels = self.task.images["train"], self.task.labels["train"]
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.args.seed))[:count]
        return images[chosen], labels[chosen]

    def generate(self) -> None:
        """The sets of all modes, and their curves of accuracy against distance."""
        for mode in self.args.mode:
            if mode in FLOWS:
                self._flow(mode)
                continue
            is_laplace = mode == "laplace"
            bandwidth = self.args.laplace_bandwidth if is_laplace else self.args.bandwidth
            sampler = self._fit(mode, self.latents, bandwidth)
            self._keep(mode, sampler, sampler.sample(self.args.count, generator=self.generator))
            if hasattr(sampler, "bandwidth"):
                self.curves[mode] = list(
                    self._curve(sampler, self.args.laplace_bandwidths if is_laplace else self.args.bandwidths)
                )
            self._bootstrap(mode, bandwidth)
        if self.args.refine_steps:
            for mode in self.args.mode:
                self.sets[f"{mode}_refined"] = self.judge(self._refined(self._drawn[mode]))

    def _fit(self, mode: str, latents: torch.Tensor, bandwidth: float) -> LatentSampler:
        return fit_sampler(mode, self.codec, latents, bandwidth, self.sensitivity, self.generator)

    def _flow(self, mode: str) -> None:
        conditions = self.args.conditions()
        sampler = fit_flow(mode, self.zoo, self.codec, conditions, self.args.flow_steps, self.args.seed)
        asked = torch.tensor(list(conditions.values())) if conditions else None
        self._keep(mode, sampler, sampler.sample(self.args.count, asked, generator=self.generator))

    def _keep(self, mode: str, sampler: LatentSampler, drawn: torch.Tensor) -> None:
        self.samplers[mode], self._drawn[mode] = sampler, drawn
        self.sets[mode] = self.judge(self._networks(drawn))

    @property
    def _curve_count(self) -> int:
        return max(1, self.args.count // 2)

    def _curve(self, sampler: LatentSampler, bandwidths: list[float]) -> Iterator[dict[str, float]]:
        before = sampler.bandwidth
        for bandwidth in bandwidths:
            sampler.bandwidth = bandwidth
            drawn = sampler.sample(self._curve_count, generator=self.generator)
            yield {"bandwidth": bandwidth, **self.judge.point(self._networks(drawn))}
        sampler.bandwidth = before

    def _bootstrap(self, mode: str, bandwidth: float) -> None:
        """Rounds after the first: the best of the last one are the anchors of the next."""
        for _ in range(self.args.rounds - 1):
            best = self._drawn[mode][self.sets[mode].order[: self.args.keep].copy()]
            sampler = self._fit(mode, best, bandwidth)
            self._keep(mode, sampler, sampler.sample(self.args.count, generator=self.generator))

    def _networks(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.codec.tensors(self.codec.decode(latents))

    def _refined(self, start: torch.Tensor, through: str | None = None) -> dict[str, torch.Tensor]:
        """Networks after some gradient steps from latents, or from tokens where the steps go through weights."""
        images, labels = self._some_images(len(self.task.labels["train"]))
        if self.args.refine_target == "anchors":
            images = images[: self.args.laplace_images]
            labels = probabilities(self.module, self.anchors.tensors, images).mean(0)
        through = through or self.args.refine_through
        if through == "weights" and start.shape[-1] != self.codec.tokenizer.token_size:
            start = self.codec.decode(start)
        values = self._steps(start, images, labels, self.args.refine_steps, through)
        return self._networks(values) if through == "latents" else self.codec.tensors(values)

    def _steps(
        self, start: torch.Tensor, images: torch.Tensor, targets: torch.Tensor, steps: int, through: str = "latents"
    ) -> torch.Tensor:
        return refine(
            self.codec, self.module, start, images, targets, steps=steps, learning_rate=self.args.refine_learning_rate,
            batch_size=self.args.refine_batch_size, generator=torch.Generator().manual_seed(self.args.seed), through=through,
        )  # fmt: skip

    def compare(self) -> None:
        """The sets that generated ones stand beside."""
        flat = self.judge.flat(self.anchor_tokens)
        # networks of a new layout have no training checkpoints; their normalised weights have a standard deviation of 1
        std = torch.ones(flat.shape[1]) if self.is_new_layout else self.judge.train_std()
        count, judge = self.args.count, self.judge

        def networks(flat: torch.Tensor) -> dict[str, torch.Tensor]:
            return self.codec.tensors(judge.tokens(flat))

        noisy = {s: noise_around(flat, std, s, count, self.generator) for s in self.args.noises}
        few = self._curve_count
        self.curves["noise"] = [{"strength": s, **judge.point(networks(v[:few]))} for s, v in noisy.items()]
        # noise is compared where it is as far from the training data as the samples are
        reference = self.sets[self.args.mode[0]].figures["nearest_train_distance"]
        reference = 0.0 if math.isnan(reference) else reference
        nearest = min(
            self.curves["noise"], key=lambda point: abs(np.nan_to_num(point["nearest_train_distance"]) - reference)
        )
        strength = nearest["strength"]
        self.sets["noise"] = judge(networks(noisy[strength]))
        self.sets["noise"].figures["strength"] = strength
        if self.args.refine_steps:
            self.sets["noise_refined"] = judge(self._refined(judge.tokens(noisy[strength]), "weights"))
        subset = min(self.args.average, len(flat))
        averages = {share: average_anchors(flat, count, subset, self.generator, share) for share in AVERAGE_SHARES}
        self.curves["average"] = [{"share": s, **judge.point(networks(v[:few]))} for s, v in averages.items()]
        self.sets["average"] = judge(networks(averages[1.0]))
        self.sets["anchors"] = judge(self.anchors.tensors)
        self.sets["decoded_anchors"] = judge(self._networks(self.encoded))
        if self.args.anchor_steps:
            self.sets["fitted_anchors"] = judge(self._networks(self.latents))
        if self.is_new_layout:
            return
        self.sets["unseen"] = judge(self.zoo.stacked("test", self.zoo.last_rows("test")))


def sample(args: SampleArguments) -> dict[str, Any]:
    """Draw, judge, select and write; returns what `results.json` holds under `sample`."""
    with new_folder(args.output_dir) as folder:
        sampling = _Sampling(args)
        sampling.generate()
        sampling.compare()
        results = {name: set_.figures | sampling.judge.together(set_) for name, set_ in sampling.sets.items()}
        for name in sampling.args.mode:
            results[name]["is_at_chance"] = sampling.judge.is_at_chance(sampling.sets[name])
        _write(folder, sampling, results)
    return results


def _write(folder: Path, sampling: _Sampling, results: dict[str, Any]) -> None:
    args, zoo, sets = sampling.args, sampling.zoo, sampling.sets
    best = {name: judged.order[: args.keep] for name, judged in sets.items() if name not in NOT_WRITTEN}
    networks = {name: {k: t[index.copy()] for k, t in sets[name].tensors.items()} for name, index in best.items()}
    info = {
        "architecture": sampling.architecture,
        "architecture_kwargs": json.dumps(sampling.kwargs),
        "task": args.task or zoo.info["task"],
        "anchors": [public_name(name) for name in sampling.anchors.names],
        "arguments": public_settings(asdict(args)),
        "sets": {
            name: [
                {"file": f"{name}/{i:03d}.safetensors", "test_accuracy": float(sets[name].accuracy[k]),
                 "nearest_train_distance": float(sets[name].distance[k])}
                for i, k in enumerate(index)
            ]
            for name, index in best.items()
        },
    }  # fmt: skip
    save_networks(folder / NETWORKS_FOLDER, networks, info)
    first = networks[args.mode[0]]
    save_in_own_class(folder / NETWORKS_FOLDER / "best", sampling.module, {name: t[0] for name, t in first.items()})
    for mode, sampler in sampling.samplers.items():
        if mode in FLOWS:  # the others are fitted again in seconds
            sampler.save_pretrained(folder / SAMPLER_FOLDER / mode)
    name = args.push_to_hub or f"Networks generated from {Path(zoo.name).name}"
    write_text(folder / NETWORKS_FOLDER / "README.md", networks_card(name, args.model, zoo, results, info))
    shown = {name: judged.accuracy for name, judged in sets.items()}
    plots.accuracy_histogram(shown).savefig(folder / "accuracy.png")
    scatter = {name: (judged.distance, judged.accuracy) for name, judged in sets.items()}
    plots.accuracy_against_distance(scatter).savefig(folder / "accuracy_against_distance.png")
    generation_plots.curves(sampling.curves, results).savefig(folder / "curves.png")
    write_json(
        folder / "results.json",
        {"sample": results, "curves": sampling.curves, "anchors": sampling.anchors.names, "arguments": asdict(args)}
        | ({"growth": asdict(sampling.growth)} if sampling.growth else {}),
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane sample`."""
    args = parse_arguments(SampleArguments, argv, PROGRAM)

    def command(args: SampleArguments) -> None:
        results = sample(args)
        for name, figures in results.items():
            print(
                f"{name:<16} accuracy {figures['accuracy_mean']:.3f}, top {TOP} {figures[f'accuracy_top{TOP}']:.3f}, "
                f"distance to the nearest training checkpoint {figures['nearest_train_distance']:.1f}"
                + (f"; {figures['not_finite']} are not finite" if figures["not_finite"] else "")
            )
        networks = Path(args.output_dir) / NETWORKS_FOLDER
        print(f"networks in {networks}")
        if args.push_to_hub:
            where = publish_folder(
                networks, args.push_to_hub, private=args.hub_private, message="Upload generated networks"
            )
            print(f"published at {where}")
        if all(results[mode]["is_at_chance"] for mode in args.mode):
            print("All generated networks are at chance on validation images; they are kept. Try a smaller --bandwidth, --mode "
                  "laplace or joint, or --refine-steps.")  # fmt: skip
            raise SystemExit(AT_CHANCE)

    run_command(command, args, PROGRAM)


if __name__ == "__main__":
    main()
