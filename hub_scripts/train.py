"""Pre-train SANE on a zoo.

On one CPU or GPU:       accelerate launch hub_scripts/train.py --zoo runs/zoo --output-dir runs/model
On two CPU processes:    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 hub_scripts/train.py ...
On all GPUs of a host:   accelerate launch --multi_gpu hub_scripts/train.py ...
"""

import os
import signal
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, require_source, run_command
from hub_scripts.codec import Codec, compression
from hub_scripts.model_cards import model_card, public_settings
from hub_scripts.outputs import claim_folder, release_folder, write_json, write_text
from hub_scripts.training.behaviour import Behaviour
from hub_scripts.training.order import Order, StepSampler
from hub_scripts.training.parts import MixedWindows, Part, open_parts
from hub_scripts.training.publishing import Publisher
from hub_scripts.training.run import Run
from hub_scripts.training.sharding import gathered, whole_model
from hub_scripts.training.validation import Validation
from hub_scripts.zoos.token_cache import STORED
from hub_scripts.zoos.views import Sample, WindowDataset, collate
from hub_scripts.zoos.zoo import Zoo
from modeling_sane import SaneConfig, SaneForPreTraining
from tokenization_sane import SaneWeightTokenizer

PROGRAM = "sane train"
PRESETS = Path(__file__).parent / "configs" / "train"
RESULTS_FILE = "results.json"
SCORES = ("r2", "accuracy_decoded", "accuracy_original", "effective_rank", "dead_latents")


@dataclass
class TrainArguments:
    """Pre-train SANE on a zoo; writes model, tokenizer and card into one folder that `from_pretrained` reads.

    Example:
      accelerate launch hub_scripts/train.py --zoo runs/zoo --output-dir runs/model --max-steps 800
      accelerate launch hub_scripts/train.py training.yaml
    """

    zoo: list[str] = field(
        metadata={"help": "Folders of zoos, or dataset repositories on the Hub: one, or many that are mixed."}
    )
    output_dir: str = field(metadata={"help": "Folder for the model; also holds the checkpoints while training."})
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Defaults from hub_scripts/configs/train/NAME.yaml: tiny, small-cnn, resnet18 or multi-zoo."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the zoo on the Hub."})
    layout_id: str | None = field(
        default=None, metadata={"help": "Of a zoo with several layouts: the one to train on; by default all."}
    )
    zoo_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of each zoo in an epoch, one number for each; by default each checkpoint is shown once."
        },
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
    mask_tokens: float = field(
        default=0.0, metadata={"help": "Share of the tokens that each view hides, to be decoded from the others."}
    )
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
    save_minutes: float | None = field(
        default=None, metadata={"help": "Minutes between checkpoints, beside --save-steps."}
    )
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints that are kept."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'latest' goes on from the newest checkpoint in --output-dir (or starts, if there is none)."
        },
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that make batches beside each training process."})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations again in backward instead of keeping them: less memory."}
    )
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model; the first steps take minutes."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention as transformers calls it: sdpa (default), eager, flash_attention_2."},
    )
    report_to: str = field(
        default="none", metadata={"help": "Tracker that Accelerate knows (tensorboard, trackio, wandb), or none."}
    )
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Publish model, tokenizer and card after each checkpoint, and when the run is finished."},
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
        self.zoo = [self.zoo] if isinstance(self.zoo, str) else self.zoo
        if len(set(self.zoo)) != len(self.zoo):
            raise ValueError("--zoo names a zoo twice; give --zoo-weights if one shall count more.")
        if self.zoo_weights is not None and (len(self.zoo_weights) != len(self.zoo) or min(self.zoo_weights) <= 0):
            raise ValueError(
                f"--zoo-weights has {len(self.zoo_weights)} numbers for {len(self.zoo)} zoos, expected one above 0 for each."
            )
        if len(self.zoo) > 1 and (self.revision or self.layout_id):
            raise ValueError("--revision and --layout-id choose within one zoo, but --zoo names several.")
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
        if not 0 <= self.mask_tokens < 1:
            raise ValueError(f"--mask-tokens is {self.mask_tokens}, expected at least 0 and less than 1.")
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
        zoos = [Zoo(name, args.revision, args.on_error, args.layout_id) for name in args.zoo]
    tokenizer = _tokenizer(args)
    # all processes read the zoos together, each row once
    parts = open_parts(zoos, tokenizer, args.cache_dtype, accelerator.process_index, accelerator.num_processes)
    model = _model(args, parts)
    if args.gradient_checkpointing:
        # the older name is deprecated, the newer one is not in every version that this package allows
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    config = model.config
    dataset, order = _data(args, parts, config.window_size, accelerator)
    if args.linear_start and not args.model_name_or_path:
        _start_linear(model, dataset, args.seed)
    codecs = [Codec(model.sane, tokenizer, part.layout) for part in parts]
    runnable = [
        (number, part, codecs[number])
        for number, part in enumerate(parts)
        if part.zoo.can_run and config.window_size >= part.layout.num_tokens
    ]
    if args.behavioural_weight is None:
        args = replace(args, behavioural_weight=0.1 if runnable else 0.0)
    elif args.behavioural_weight and not runnable:
        longest = max(part.layout.num_tokens for part in parts)
        raise ValueError(
            f"the behavioural loss needs whole networks and a task to run them on, but a window of {config.window_size} tokens "
            f"holds only a part of {longest}, or the zoo does not name architecture and task; use --behavioural-weight 0 or a "
            "larger --window-size."
        )
    validation = Validation(list(zip(parts, codecs, strict=True)), accelerator)

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    behaviour = None
    if args.behavioural_weight:
        behaviour = Behaviour(
            runnable, args.behavioural_networks, args.behavioural_images, args.seed, accelerator.device
        )
    run = Run(args, accelerator, len(order))
    if args.resume_from_checkpoint:
        run.load(output_dir)
    run.set_learning_rate(optimizer)
    sampler = StepSampler(
        order, args.batch_size, run.step, run.max_steps, accelerator.process_index, accelerator.num_processes
    )
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.num_workers)

    accelerator.print(
        f"{model.__class__.__name__}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{compression([part.layout for part in parts], config.latent_size):.2f} weight values per latent value; {len(dataset)} checkpoints, "
        f"{run.max_steps} steps, {accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    for part in parts:
        accelerator.print(
            f"  {part.name}: {len(part.train)} checkpoints of {part.layout.num_parameters:,} values in {part.layout.num_tokens} "
            f"tokens of {part.layout.token_size}"
        )
    publisher = None
    if args.push_to_hub and accelerator.is_main_process:
        publisher = Publisher(args.hub_model_id or output_dir.resolve().name, args.hub_private)

    def publish_checkpoint() -> None:
        if args.push_to_hub and not run.finished:
            whole = whole_model(model, accelerator)
            if publisher is not None:
                publisher.checkpoint(run.step, lambda folder: _write(args, whole, tokenizer, parts, run, folder))

    _loop(args, accelerator, model, optimizer, run, loader, behaviour, validation, output_dir, publish_checkpoint)
    accelerator.wait_for_everyone()
    if run.is_told_to_end and not run.finished:
        accelerator.print(f"ended at step {run.step}; --resume-from-checkpoint latest goes on from there")
        accelerator.end_training()
        raise SystemExit(128 + signal.SIGTERM)
    results, whole = _results(args, parts, config.latent_size, run), whole_model(model, accelerator)
    if accelerator.is_main_process:
        _write(args, whole, tokenizer, parts, run, output_dir)
        write_json(output_dir / RESULTS_FILE, results)
        if publisher is not None:
            print(publisher.finish(output_dir))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def _loop(args, accelerator, model, optimizer, run, loader, behaviour, validation, output_dir, after_save) -> None:
    """Steps, evaluations and checkpoints until the run is over or told to end."""
    hidden = not accelerator.is_main_process
    with run, tqdm(total=run.max_steps, initial=run.step, desc="train", unit="step", disable=hidden) as bar:
        for batch in loader:
            losses = _step(args, accelerator, model, optimizer, run, batch, behaviour)
            bar.update()
            if run.step % args.eval_steps == 0 or run.finished:
                with gathered(model):
                    scores = validation(model)
                run.log(losses, scores)
                shown = {"loss": losses["loss"], "r2": scores["r2"], "accuracy": scores.get("accuracy_decoded")}
                bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items() if value is not None})
            if run.should_save:
                run.save(output_dir)
                after_save()
            if run.finished or run.is_told_to_end:
                break


def _data(args: TrainArguments, parts: list[Part], window_size: int, accelerator) -> tuple[MixedWindows, Order]:
    windows = []
    for part in parts:
        spec = part.zoo.symmetries if args.permute and part.zoo.has_symmetries else None
        if args.permute and spec is None:
            accelerator.print(f"{part.name} has no symmetries, so its two views differ by noise alone.")
        views = {"noise": args.noise, "seed": args.seed, "masked": args.mask_tokens}
        windows.append(WindowDataset(part.train, part.statistics, window_size, spec, **views))
    weights = None
    if args.zoo_weights is not None:
        # a zoo's share is divided among its layouts by their checkpoints
        share = dict(zip(args.zoo, args.zoo_weights, strict=True))
        rows = {name: sum(len(part.train) for part in parts if part.zoo.name == name) for name in args.zoo}
        weights = [share[part.zoo.name] * len(part.train) / rows[part.zoo.name] for part in parts]
    return MixedWindows(windows), Order([len(one) for one in windows], args.seed, weights)


def _accelerator(args: TrainArguments) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dynamo_backend="inductor" if args.torch_compile else None,
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


def _model(args: TrainArguments, parts: list[Part]) -> SaneForPreTraining:
    attention = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    if args.model_name_or_path:
        return SaneForPreTraining.from_pretrained(args.model_name_or_path, **attention)
    layouts = [part.layout for part in parts]
    window_size = args.window_size or min(256, max(layout.num_tokens for layout in layouts))
    learned = args.position_encoding == "learned"
    largest = torch.stack([layout.position_ids.amax(0) for layout in layouts]).amax(0)
    return SaneForPreTraining._from_config(
        SaneConfig(
            token_size=layouts[0].token_size,
            latent_size=args.latent_size,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=args.num_attention_heads,
            position_encoding=args.position_encoding,
            max_position_embeddings=(largest + 1).tolist() if learned else None,
            window_size=window_size,
            halo=min(32, window_size // 4),
            initializer_range=args.initializer_range,
            contrastive_weight=args.contrastive_weight,
            normalize_targets=args.normalize_targets,
        ),
        **attention,
    )


def _start_linear(model: SaneForPreTraining, dataset: MixedWindows, seed: int) -> None:
    """Start from the best linear autoencoder of some windows of all parts."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:256])
    batch = collate([dataset[Sample(0, int(row))] for row in rows])
    model.sane.initialize_linear(
        batch["labels"],
        batch["position_ids"],
        attention_mask=batch["attention_mask"],
        value_mask=batch["value_mask"],
        layer_kind_ids=batch["layer_kind_ids"],
    )


def _step(args, accelerator, model, optimizer, run, batch, behaviour) -> dict[str, float]:
    """One optimizer step on this process' share of the batch; returns the losses."""
    model.train()
    count = len(batch["row"])
    parts = args.gradient_accumulation_steps
    losses: dict[str, float] = {}
    for part in torch.arange(count).chunk(parts):
        inputs = {name: values[part].to(accelerator.device) for name, values in batch.items()}
        rows, source = inputs.pop("row"), inputs.pop("part")
        if not args.permute and not args.contrastive_weight:
            inputs = {name: values for name, values in inputs.items() if not name.startswith("second_")}
        with accelerator.accumulate(model), accelerator.autocast():
            output = model(**inputs)
            loss = output.loss
            terms = {"loss_reconstruction": output.loss_reconstruction, "loss_contrastive": output.loss_contrastive}
            if behaviour is not None:
                terms["loss_behavioural"] = behaviour(output.reconstruction, inputs["labels"], source, run.step)
                loss = loss + args.behavioural_weight * terms["loss_behavioural"]
            terms["loss"] = loss
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss.item()} at step {run.step}; the batch held rows {rows.tolist()} of the train splits of the "
                    f"parts {source.tolist()}. Lower --learning-rate, or look at these rows."
                )
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                terms["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in terms.items():
            if value is not None:
                value = value.full_tensor() if isinstance(value, DTensor) else value  # FSDP2's gradient norm
                losses[name] = losses.get(name, 0.0) + float(value.detach()) * (
                    1 if name == "grad_norm" else len(part) / count
                )
    everyone = accelerator.num_processes
    run.advance(optimizer, count * everyone, int(batch["attention_mask"].sum()) * everyone)
    return losses


def _results(args: TrainArguments, parts: list[Part], latent_size: int, run: Run) -> dict[str, Any]:
    """Figures of the run as it stands."""
    last = run.history[-1] if run.history else {}
    return {
        "steps": run.step,
        "seconds": round(run.seconds, 1),
        "compression": compression([part.layout for part in parts], latent_size),
        "num_processes": run.accelerator.num_processes,
        "seed": args.seed,
        "validation": {k: v for k, v in last.items() if k.partition("/")[0] in SCORES},
    }


def _write(
    args: TrainArguments, model: SaneForPreTraining, tokenizer, parts: list[Part], run: Run, folder: Path
) -> None:
    """Save model, tokenizer, arguments and card into a folder that `from_pretrained` reads."""
    results = _results(args, parts, model.config.latent_size, run)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "training_args.json", public_settings(asdict(args)))
    write_text(folder / "README.md", model_card([part.zoo for part in parts], results, asdict(args)))


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane train`."""
    run_command(train, parse_arguments(TrainArguments, argv, PROGRAM, PRESETS), PROGRAM)


if __name__ == "__main__":
    main()
