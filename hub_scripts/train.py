"""Pre-train SANE on a zoo.

On one CPU or GPU:       accelerate launch hub_scripts/train.py --zoo runs/zoo --output-dir runs/model
On two CPU processes:    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 hub_scripts/train.py ...
On all GPUs of a host:   accelerate launch --multi_gpu hub_scripts/train.py ...
"""

import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, require_source, run_command
from hub_scripts.codec import Codec
from hub_scripts.evaluation.functional import accuracy, batched_logits, behavioural_loss
from hub_scripts.hub import publish_folder
from hub_scripts.model_cards import model_card, public_settings
from hub_scripts.outputs import claim_folder, read_json, release_folder, write_json, write_text
from hub_scripts.zoos.token_cache import STORED, TokenCache, token_cache
from hub_scripts.zoos.views import StepSampler, WindowDataset, collate
from hub_scripts.zoos.zoo import Zoo
from modeling_sane import SaneConfig, SaneForPreTraining
from tokenization_sane import SaneWeightTokenizer

PROGRAM = "sane train"
LOG_FILE = "training_log.json"
RESULTS_FILE = "results.json"
POSITION_FILE = "position.json"  # of a checkpoint: where the run stood


@dataclass
class TrainArguments:
    """Pre-train SANE on a zoo; writes model, tokenizer and card into one folder that `from_pretrained` reads.

    Example:
      accelerate launch hub_scripts/train.py --zoo runs/zoo --output-dir runs/model --max-steps 800
      accelerate launch hub_scripts/train.py training.yaml
    """

    zoo: str = field(metadata={"help": "Folder of a zoo, or a dataset repository on the Hub."})
    output_dir: str = field(metadata={"help": "Folder for the model; also holds the checkpoints while training."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the zoo on the Hub."})
    layout_id: str | None = field(
        default=None, metadata={"help": "Of a zoo with several layouts: the one to train on."}
    )
    cache_dtype: str = field(
        default="float32",
        metadata={
            "help": "How tokens are kept in the cache: float32, or bfloat16 for half the space and three digits."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Start from this model (folder or Hub repository) and its tokenizer's token size and packing."
        },
    )
    token_size: int = field(default=32, metadata={"help": "Weight values in a token."})
    packing: str = field(default="flat", metadata={"help": "How layers are cut: dense, flat or paper."})
    latent_size: int = field(default=30, metadata={"help": "Latent values for a token."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the transformer blocks."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Blocks of the encoder, and of the decoder."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads of a block."})
    position_encoding: str = field(
        default="sinusoidal", metadata={"help": "sinusoidal (no maximum length) or learned."}
    )
    window_size: int | None = field(
        default=None, metadata={"help": "Tokens in a training window; by default the whole network, 256 at the most."}
    )
    initializer_range: float = field(default=0.06, metadata={"help": "Standard deviation of the initial weights."})
    linear_start: bool = field(
        default=True,
        metadata={"help": "Start from the best linear autoencoder of the tokens instead of random projections."},
    )
    batch_size: int = field(default=64, metadata={"help": "Checkpoints in an optimizer step, over all processes."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Parts that a step's batch is computed in."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate of AdamW."})
    weight_decay: float = field(default=3e-9, metadata={"help": "Weight decay of AdamW; the paper's default."})
    warmup_ratio: float = field(
        default=0.05, metadata={"help": "Share of the run in which the learning rate rises; a cosine follows."}
    )
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradients are clipped to this norm; 0 for no clipping."}
    )
    epochs: int = field(default=50, metadata={"help": "Passes over the train split, if --max-steps is not given."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimizer steps."})
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "End after so many minutes of training at the latest; the learning rate follows."},
    )
    contrastive_weight: float = field(
        default=0.05, metadata={"help": "Weight of the contrastive loss between the two views; 0 for none."}
    )
    permute: bool = field(
        default=True, metadata={"help": "Second view: a random symmetry of the network, not only other noise."}
    )
    noise: float = field(default=0.1, metadata={"help": "Multiplicative Gaussian noise on both views; 0 for none."})
    behavioural_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the loss between the outputs of decoded and original networks; 0 for none. By default 0.1 "
            "where the zoo says how its networks are run and a window holds a whole one, else 0."
        },
    )
    behavioural_networks: int = field(
        default=16, metadata={"help": "Networks of a batch that are decoded and run for that loss."}
    )
    behavioural_images: int = field(
        default=48, metadata={"help": "Images of the task's train split that they are run on."}
    )
    normalize_targets: bool = field(
        default=False, metadata={"help": "Measure a token's error in its own standard deviation (mixed zoos)."}
    )
    eval_steps: int = field(
        default=100, metadata={"help": "Optimizer steps between evaluations on the validation split."}
    )
    save_steps: int = field(default=100, metadata={"help": "Optimizer steps between checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints that are kept."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'latest' goes on from the newest checkpoint in --output-dir (or starts, if there is none)."
        },
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that make batches beside each training process."})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16."})
    report_to: str = field(
        default="none", metadata={"help": "Tracker that Accelerate knows (tensorboard, trackio, wandb), or none."}
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Publish the finished model, tokenizer and card, in one commit."}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Where it goes, namespace/name; by default the name of --output-dir."}
    )
    hub_private: bool = field(default=False, metadata={"help": "Make the repository private, if it is new."})
    on_error: str = field(
        default="refuse",
        metadata={"help": "Rows with damaged or non-finite weights: refuse (stop and name the row) or skip."},
    )
    seed: int = field(default=0, metadata={"help": "Of initial weights, windows, views and order."})

    def __post_init__(self):
        for name in ("learning_rate", "weight_decay", "noise", "behavioural_weight", "max_grad_norm", "warmup_ratio"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, str):  # YAML reads 1e-4 as text
                raise ValueError(f"--{name.replace('_', '-')} is the text {value!r}; in YAML write 1.0e-4, not 1e-4.")
            if value < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected 0 or more.")
        for name in (
            "batch_size",
            "epochs",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1.")
        if self.resume_from_checkpoint not in (None, "latest"):
            raise ValueError(f"--resume-from-checkpoint is {self.resume_from_checkpoint!r}, expected 'latest'.")
        if self.cache_dtype not in STORED:
            raise ValueError(f"--cache-dtype is {self.cache_dtype!r}, expected {' or '.join(STORED)}.")
        if self.batch_size == 1 and self.contrastive_weight:
            raise ValueError("--batch-size 1 has nothing to contrast; use more, or --contrastive-weight 0.")


def train(args: TrainArguments) -> dict[str, Any]:
    """Train, evaluate and save; returns what `results.json` holds."""
    accelerator = _accelerator(args)
    with accelerator.main_process_first():
        _claim(args, Path(args.output_dir), accelerator.is_main_process)
    try:
        return _train(args, accelerator, Path(args.output_dir))
    except BaseException:
        if accelerator.is_main_process:
            release_folder(args.output_dir)  # a run that wrote nothing leaves nothing
        raise


def _train(args: TrainArguments, accelerator: Accelerator, output_dir: Path) -> dict[str, Any]:
    set_seed(args.seed)
    if args.report_to != "none":
        settings = {name: value for name, value in asdict(args).items() if value is not None}
        accelerator.init_trackers("trackers", config=settings)

    with accelerator.main_process_first():
        zoo = Zoo(args.zoo, args.revision, args.on_error, args.layout_id)
    tokenizer = _tokenizer(args)
    # all processes read the zoo together, each row once
    cache = {
        split: token_cache(
            zoo,
            split,
            tokenizer.token_size,
            tokenizer.packing,
            args.cache_dtype,
            accelerator.process_index,
            accelerator.num_processes,
        )
        for split in ("train", "validation")
    }
    layout = cache["train"].layout
    tokenizer.set_moments({layout.fingerprint: (zoo.layout, cache["train"].moments)})
    statistics = tokenizer.zoo[layout.fingerprint]["statistics"]
    if zoo.has_symmetries:
        tokenizer.symmetries = {layout.fingerprint: zoo.symmetries.to_json()}

    model = _model(args, tokenizer, cache["train"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    config = model.config
    if args.behavioural_weight is None:
        args = replace(
            args, behavioural_weight=0.1 if zoo.can_run and config.window_size >= layout.num_tokens else 0.0
        )
    model, optimizer = accelerator.prepare(model, optimizer)
    run = _Run(args, accelerator, len(cache["train"]))
    if args.resume_from_checkpoint:
        run.load(output_dir)
    run.set_learning_rate(optimizer)

    spec = zoo.symmetries if args.permute and zoo.has_symmetries else None
    if args.permute and spec is None:
        accelerator.print(f"{zoo.name} has no symmetries, so the two views differ by noise alone.")
    dataset = WindowDataset(cache["train"], statistics, config.window_size, spec, args.noise, args.seed)
    sampler = StepSampler(
        len(dataset),
        args.batch_size,
        run.step,
        run.max_steps,
        args.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.num_workers)
    codec = Codec(accelerator.unwrap_model(model).sane, tokenizer, layout)
    behaviour = _Behaviour(args, zoo, codec, accelerator.device) if args.behavioural_weight else None
    validation = _Validation(zoo, codec, cache["validation"], accelerator)

    accelerator.print(
        f"{model.__class__.__name__}: {sum(p.numel() for p in model.parameters()):,} parameters, {layout.num_tokens} tokens of "
        f"{layout.token_size} values a network, {compression(layout, config.latent_size):.2f} weight values per latent value; "
        f"{len(dataset)} checkpoints, {run.max_steps} steps, {accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    with tqdm(
        total=run.max_steps, initial=run.step, desc="train", unit="step", disable=not accelerator.is_main_process
    ) as bar:
        for batch in loader:
            losses = _step(args, accelerator, model, optimizer, run, batch, behaviour)
            bar.update()
            last = run.finished
            if run.step % args.eval_steps == 0 or last:
                scores = validation(model)
                run.log(losses, scores)
                shown = {"loss": losses["loss"], "r2": scores["r2"], "accuracy": scores.get("accuracy_decoded")}
                bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items() if value is not None})
            if run.step % args.save_steps == 0 or last:
                run.save(output_dir)
            if last:
                break
    accelerator.wait_for_everyone()
    results = _finish(args, accelerator, model, tokenizer, zoo, layout, run, output_dir)
    accelerator.end_training()
    return results


def compression(layout, latent_size: int) -> float:
    """Real weight values per latent value."""
    return layout.num_parameters / (layout.num_tokens * latent_size)


def _accelerator(args: TrainArguments) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )
    if args.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"--report-to {args.report_to} is not installed; try pip install 'sane-hub[track]'.")
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != accelerator.num_processes:
        raise ValueError(
            f"{wanted} processes were launched but each runs alone and would overwrite the others; on CPU set "
            "ACCELERATE_USE_CPU=true and launch with --multi_gpu --num_processes N."
        )
    return accelerator


def _claim(args: TrainArguments, output_dir: Path, is_main_process: bool) -> None:
    """Refuse folders of others, and our own unless the run shall go on."""
    if not is_main_process:
        return
    changeable = {"output_dir", "resume_from_checkpoint", "num_workers", "report_to", "save_total_limit"}
    changeable |= {"push_to_hub", "hub_model_id", "hub_private"}
    claimed = claim_folder(output_dir, "train", {k: v for k, v in asdict(args).items() if k not in changeable})
    if claimed and not args.resume_from_checkpoint:
        raise ValueError(
            f"{output_dir} already holds a training run; add --resume-from-checkpoint latest to go on with it."
        )


def _tokenizer(args: TrainArguments) -> SaneWeightTokenizer:
    """A tokenizer whose statistics are still to come: from the train split."""
    if args.model_name_or_path:
        require_source(args.model_name_or_path, "the model")
        source = SaneWeightTokenizer.from_pretrained(args.model_name_or_path)
        return SaneWeightTokenizer(source.token_size, source.packing, "zoo")
    return SaneWeightTokenizer(args.token_size, args.packing, "zoo")


def _model(args: TrainArguments, tokenizer: SaneWeightTokenizer, cache: TokenCache) -> SaneForPreTraining:
    if args.model_name_or_path:
        return SaneForPreTraining.from_pretrained(args.model_name_or_path)
    layout = cache.layout
    window_size = args.window_size or min(256, layout.num_tokens)
    learned = args.position_encoding == "learned"
    config = SaneConfig(
        token_size=layout.token_size,
        latent_size=args.latent_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        position_encoding=args.position_encoding,
        max_position_embeddings=(layout.position_ids.amax(0) + 1).tolist() if learned else None,
        window_size=window_size,
        halo=min(32, window_size // 4),
        initializer_range=args.initializer_range,
        contrastive_weight=args.contrastive_weight,
        normalize_targets=args.normalize_targets,
    )
    model = SaneForPreTraining(config)
    if args.linear_start:
        chosen = np.random.default_rng(args.seed).permutation(len(cache))[:256]
        sample = tokenizer.normalize(cache.tokens(np.sort(chosen)), layout)
        kinds = layout.layer_kind_ids.expand(len(sample), -1)
        mask = layout.value_mask.expand(len(sample), -1, -1)
        model.sane.initialize_linear(sample, layout.position_ids, value_mask=mask, layer_kind_ids=kinds)
    return model


def _step(args, accelerator, model, optimizer, run, batch, behaviour) -> dict[str, float]:
    """One optimizer step on this process' share of the batch; returns the losses."""
    model.train()
    count = len(batch["row"])
    parts = args.gradient_accumulation_steps
    losses: dict[str, float] = {}
    for part in torch.arange(count).chunk(parts):
        inputs = {name: values[part].to(accelerator.device) for name, values in batch.items() if name != "row"}
        if not args.permute and not args.contrastive_weight:
            inputs = {name: values for name, values in inputs.items() if not name.startswith("second_")}
        with accelerator.accumulate(model), accelerator.autocast():
            output = model(**inputs)
            loss = output.loss
            terms = {"loss_reconstruction": output.loss_reconstruction, "loss_contrastive": output.loss_contrastive}
            if behaviour is not None:
                terms["loss_behavioural"] = behaviour(output.reconstruction, inputs["labels"], run.step)
                loss = loss + args.behavioural_weight * terms["loss_behavioural"]
            terms["loss"] = loss
            if not torch.isfinite(loss):
                rows = batch["row"][part].tolist()
                raise ValueError(
                    f"the loss is {loss.item()} at step {run.step}; the batch held rows {rows} of the train split."
                )
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                terms["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in terms.items():
            if value is not None:
                losses[name] = losses.get(name, 0.0) + float(value.detach()) * (
                    1 if name == "grad_norm" else len(part) / count
                )
    run.advance(optimizer)
    return losses


class _Run:
    """Where a run stands: step, time, learning rate, log; saved with each checkpoint."""

    def __init__(self, args: TrainArguments, accelerator: Accelerator, num_checkpoints: int):
        self.args, self.accelerator = args, accelerator
        self.max_steps = args.max_steps or args.epochs * (num_checkpoints // args.batch_size)
        self.step, self.seconds_before, self.history = 0, 0.0, []
        self.started = time.perf_counter()
        self.seconds = 0.0

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end, whichever of steps and minutes is nearer to its end."""
        by_time = self.seconds / (60 * self.args.max_minutes) if self.args.max_minutes else 0.0
        return min(1.0, max(self.step / self.max_steps, by_time))

    @property
    def finished(self) -> bool:
        return self.progress >= 1.0

    def advance(self, optimizer) -> None:
        """Count a step and set the learning rate of the next one."""
        self.step += 1
        # one clock for all processes: they must agree on the learning rate and on the last step
        now = torch.tensor(self.seconds_before + time.perf_counter() - self.started, dtype=torch.float64)
        self.seconds = broadcast(now.to(self.accelerator.device)).item() if self.args.max_minutes else now.item()
        self.set_learning_rate(optimizer)

    def set_learning_rate(self, optimizer) -> None:
        """Linear warm-up, then a cosine to zero, over the run's progress."""
        warmup = self.args.warmup_ratio
        at = max(self.progress, 1 / self.max_steps)
        scale = at / warmup if at < warmup else 0.5 * (1 + math.cos(math.pi * (at - warmup) / max(1e-9, 1 - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = self.args.learning_rate * scale

    def log(self, losses: dict[str, float], scores: dict[str, float]) -> None:
        entry = {"step": self.step, "seconds": round(self.seconds, 1), **losses, **scores}
        self.history.append(entry)
        self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=self.step)
        if self.accelerator.is_main_process:
            write_json(Path(self.args.output_dir) / LOG_FILE, self.history)

    def save(self, output_dir: Path) -> None:
        """Write a checkpoint under another name first, then remove the oldest."""
        folder, partial = output_dir / f"step_{self.step:06d}", output_dir / f".step_{self.step:06d}.partial"
        try:
            self.accelerator.save_state(str(partial))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            position = {"step": self.step, "seconds": self.seconds, "history": self.history}
            write_json(partial / POSITION_FILE, position | {"num_processes": self.accelerator.num_processes})
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            for old in sorted(output_dir.glob("step_*"))[: -self.args.save_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self, output_dir: Path) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = sorted(output_dir.glob("step_*"))
        if not found:
            return
        position = read_json(found[-1] / POSITION_FILE)
        if position["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"{found[-1]} was saved by {position['num_processes']} processes, this run has {self.accelerator.num_processes}; "
                "launch with as many as before."
            )
        self.accelerator.load_state(str(found[-1]))
        self.step, self.seconds_before, self.history = position["step"], position["seconds"], position["history"]
        self.started, self.seconds = time.perf_counter(), self.seconds_before


class _Behaviour:
    """Loss between what decoded networks and their originals say about images of the task (arXiv 2503.17138)."""

    def __init__(self, args: TrainArguments, zoo: Zoo, codec: Codec, device: torch.device):
        self.args, self.codec, self.module = args, codec, zoo.module.to(device)
        self.images = zoo.task.images["train"].to(device)
        self.mask = codec.layout.value_mask.to(device)

    def __call__(self, reconstruction: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        """Loss of the first networks of a batch: decoded and original tokens `(batch, tokens, token_size)`."""
        count = min(self.args.behavioural_networks, len(labels))
        if labels.shape[1] < self.codec.layout.num_tokens:
            raise ValueError(
                f"the behavioural loss needs whole networks, but a window of {labels.shape[1]} tokens holds only a part of "
                f"{self.codec.layout.num_tokens}; use --behavioural-weight 0 or a larger --window-size."
            )
        rng = np.random.default_rng([self.args.seed, step])
        chosen = rng.choice(len(self.images), min(self.args.behavioural_images, len(self.images)), replace=False)
        images, size = self.images[torch.from_numpy(chosen)], self.codec.layout.num_tokens
        with torch.no_grad():
            original = batched_logits(self.module, self.codec.tensors(labels[:count, :size]), images)
        decoded = self.codec.tensors(reconstruction[:count, :size].float() * self.mask)
        return behavioural_loss(batched_logits(self.module, decoded, images), original)


class _Validation:
    """Reconstruction and function of the validation split's networks, shared out among the processes."""

    max_networks = 64  # whose function is measured: last checkpoints
    max_values = 50_000_000  # weights that are held in memory; of a larger split, checkpoints at equal distances

    def __init__(self, zoo: Zoo, codec: Codec, cache: TokenCache, accelerator: Accelerator):
        self.codec, self.accelerator = codec, accelerator
        every = -(-len(cache) * codec.layout.num_tokens * codec.layout.token_size // self.max_values)
        rows = np.arange(0, len(cache), every)[accelerator.process_index :: accelerator.num_processes]
        self.tokens = codec.normalize(cache.tokens(rows))
        self.module = zoo.module if zoo.can_run else None
        if self.module is not None:
            epochs = zoo.column("validation", "epoch")
            self.last = torch.from_numpy(epochs[rows] == epochs.max())
            self.images, self.labels = zoo.task.images["validation"], zoo.task.labels["validation"]

    def __call__(self, model) -> dict[str, float]:
        """`r2` over all real values; `accuracy_decoded` and `accuracy_original` on the task's validation images, if it has one."""
        model.eval()
        decoded = self.codec.decode(self.codec.encode(self.tokens))
        mask = self.codec.layout.value_mask
        values = self.tokens[:, mask].double()
        sums = [((decoded[:, mask] - values) ** 2).sum(), values.sum(), (values**2).sum(), values.numel()]
        if self.module is not None:
            self.module.to("cpu")
            chosen = self.last.nonzero().flatten()[: self.max_networks]
            sums += [self._accuracy(tokens[chosen]) * len(chosen) for tokens in (decoded, self.tokens)]
            sums.append(len(chosen))
        totals = torch.tensor([float(s) for s in sums], dtype=torch.float64)
        error, total, squares, count, *hits = self.accelerator.reduce(
            totals.to(self.accelerator.device), "sum"
        ).tolist()
        scores = {"r2": 1 - error / (squares - total**2 / count)}
        if hits:
            scores |= {"accuracy_decoded": hits[0] / hits[2], "accuracy_original": hits[1] / hits[2]}
        return scores

    def _accuracy(self, tokens: torch.Tensor) -> float:
        """Mean accuracy of networks given as tokens; 0 if this process has none."""
        if not len(tokens):
            return 0.0
        logits = batched_logits(self.module, self.codec.tensors(tokens), self.images)
        return accuracy(logits, self.labels).mean().item()


def _finish(args, accelerator, model, tokenizer, zoo, layout, run, output_dir) -> dict[str, Any]:
    """Save model, tokenizer, card, arguments and results into the output folder."""
    final = run.history[-1]
    results = {
        "steps": run.step,
        "seconds": round(run.seconds, 1),
        "compression": compression(layout, accelerator.unwrap_model(model).config.latent_size),
        "num_processes": accelerator.num_processes,
        "seed": args.seed,
        "validation": {k: final[k] for k in ("r2", "accuracy_decoded", "accuracy_original") if k in final},
    }
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
        write_json(output_dir / "training_args.json", public_settings(asdict(args)))
        write_text(output_dir / "README.md", model_card(zoo, results, asdict(args)))
        write_json(output_dir / RESULTS_FILE, results)
        if args.push_to_hub:
            repo_id = args.hub_model_id or output_dir.resolve().name
            ignore = ["step_*/*", "trackers/*"]
            print(publish_folder(output_dir, repo_id, private=args.hub_private, message="Upload SANE", ignore=ignore))
    accelerator.wait_for_everyone()
    return results


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane train`."""
    run_command(train, parse_arguments(TrainArguments, argv, PROGRAM), PROGRAM)


if __name__ == "__main__":
    main()
