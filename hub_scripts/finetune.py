"""Fine-tune sets of networks under one budget: generated ones, their anchors, and networks from scratch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.evaluation import plots
from hub_scripts.evaluation.functional import build_module, finetune_networks
from hub_scripts.outputs import new_folder, write_json
from hub_scripts.zoos.networks import load_networks
from hub_scripts.zoos.tasks import load_task

PROGRAM = "sane finetune"
SCRATCH = "scratch"


@dataclass
class FinetuneArguments:
    """Fine-tune sets of networks on a task, all with the same steps, and compare their accuracy after each epoch.

    Example:
      sane finetune --init runs/sample/networks/joint runs/sample/networks/anchors scratch --epochs 5 --output-dir runs/finetune
    """

    init: list[str] = field(
        metadata={"help": "Sets of networks that `sane sample` wrote, and 'scratch' for as many with random weights."}
    )
    output_dir: str = field(metadata={"help": "Folder for results.json and plots; must not exist yet."})
    task: str | None = field(default=None, metadata={"help": "Task to train on; by default the one of the networks."})
    epochs: int = field(default=5, metadata={"help": "Passes over the training images."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of AdamW."})
    batch_size: int = field(default=32, metadata={"help": "Images in a step."})
    seed: int = field(default=0, metadata={"help": "Of the order of images and of the networks from scratch."})

    def __post_init__(self):
        if self.epochs < 1:
            raise ValueError(f"--epochs is {self.epochs}, expected at least 1.")
        if all(name == SCRATCH for name in self.init):
            raise ValueError(
                "--init needs at least one set of networks beside 'scratch': it says which architecture to train."
            )


def finetune(args: FinetuneArguments) -> dict[str, Any]:
    """Train all sets; returns what `results.json` holds under `finetune`."""
    with new_folder(args.output_dir) as folder:
        loaded = {Path(name).name: load_networks(name) for name in args.init if name != SCRATCH}
        info = next(iter(loaded.values()))[1]
        module = build_module(info["architecture"], json.loads(info["architecture_kwargs"]))
        sets = {name: tensors for name, (tensors, _) in loaded.items()}
        if SCRATCH in args.init:
            sets[SCRATCH] = _scratch(module, max(len(next(iter(t.values()))) for t in sets.values()), args.seed)
        task = load_task(args.task or info["task"])
        curves = {}
        for name, tensors in sets.items():
            curves[name] = finetune_networks(
                module,
                tensors,
                task.images["train"],
                task.labels["train"],
                learning_rate=args.learning_rate,
                epochs=args.epochs,
                batch_size=args.batch_size,
                generator=torch.Generator().manual_seed(args.seed),  # the same batches for every set
                eval_images=task.images["test"],
                eval_labels=task.labels["test"],
            )
        results = {"epochs": list(range(args.epochs + 1))}
        results |= {name: curve.mean(1).tolist() for name, curve in curves.items()}
        results["std"] = {name: curve.std(1).tolist() for name, curve in curves.items()}
        plots.finetuning_curves(curves).savefig(folder / "finetuning.png")
        write_json(folder / "results.json", {"finetune": results, "task": task.name, "arguments": asdict(args)})
    return results


def _scratch(module: nn.Module, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Networks as the architecture's own modules initialise themselves."""
    networks = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(count):
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
            networks.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane finetune`."""
    args = parse_arguments(FinetuneArguments, argv, PROGRAM)

    def command(args: FinetuneArguments) -> None:
        results = finetune(args)
        for name, curve in results.items():
            if name not in ("epochs", "std"):
                print(f"{name:<16} " + "  ".join(f"{value:.3f}" for value in curve))

    run_command(command, args, PROGRAM)


if __name__ == "__main__":
    main()
