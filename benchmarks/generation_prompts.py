"""Networks from data prompts beside retrieval and training from scratch, on digits, four classes a task; JSON out.

python benchmarks/generation_prompts.py --out results.json                    half an hour on one core
python benchmarks/generation_prompts.py --out results.json --seeds 0 --work-dir runs/prompts

210 CNNs of 2,020 weights, each trained on four of the ten digits in an order of its own (`sane build-zoo --classes-per-network 4`);
one SANE model on their train split (`--preset small-cnn`, as many steps for all). Then for each seed `sane prompt` with its defaults:
the seed is of the prompt's weights, the tasks it is trained on, the samples of the test tasks, the networks from scratch and the order
of images in fine-tuning. All methods get the same ten samples of each class. Test tasks are those of the test networks: orders of
four digits that no train network has; the sets of digits, in any order, are kept out of the prompt's training as well. Learning rates
of fine-tuning are chosen for each method and epoch on the tasks of the validation networks. Figures are means over the test tasks,
then over the seeds, with the standard deviation over the seeds.

`ablation`, the first seed, epoch 0: the correction on top of the mean of the anchors (the default) or of their mixture, and the
mixture alone.

`unseen_classes`, the first seed, epoch 0: zoo, SANE model and prompt made of the digits 0 to 7 alone, then used on 60 tasks each with
none, one or both of the digits 8 and 9, of which nothing was seen in training.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.training_quality import command
from hub_scripts.evaluation.functional import OTHER_CLASS, evaluate
from hub_scripts.generation.episodes import draw_samples
from hub_scripts.generation.prompts import Prompter
from hub_scripts.generation.retrieval import retrieve
from hub_scripts.outputs import read_json, write_json
from hub_scripts.prompt import DATA, METHODS, SHOWN_EPOCHS
from hub_scripts.zoos.tasks import load_task, renumber
from hub_scripts.zoos.zoo import Zoo

SEEDS = (0, 1, 2)
STEPS = 160  # of the SANE model
ZOO = [
    *("--classes-per-network", "4", "--num-models", "210", "--epochs", "12", "--keep-epochs", "0", "1", "2", "4", "8", "12"),
    *("--learning-rates", "2e-3", "5e-3", "1e-2", "--sweep", "random"),
]  # fmt: skip
SHORT = ["--finetune-epochs", "1", "--finetune-learning-rates", "3e-3"]  # where epoch 0 alone is looked at
UNSEEN_TASKS = 60
ABLATION = {
    "mean of the anchors and a correction": [],
    "mixture of the anchors and a correction": ["--anchors", "all"],
    "mixture of the anchors alone": ["--anchors", "all", "--no-correct"],
}


def measure(folder: Path, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Build, train and compare; what is in the folder already is not made again.

    Args:
        folder (`Path`): for zoo, model and prompts.
        seeds (`Sequence[int]`): of prompts and fine-tuning.
    """
    zoo, model = _zoo_and_model(folder)
    sources = ["--model", str(model), "--zoo", str(zoo)]
    runs = {}
    for seed in seeds:
        output = folder / f"prompt-{seed}"
        if not output.exists():
            command("prompt.py", *sources, "--output-dir", str(output), "--seed", str(seed))
        runs[str(seed)] = read_json(output / "results.json")["prompt"]
        print(seed, {name: runs[str(seed)]["train"][name]["accuracy"][0] for name in METHODS}, flush=True)
    return {
        "seeds": list(seeds),
        "sane": read_json(model / "results.json")["validation"],
        "trained_accuracy": runs[str(seeds[0])]["trained_accuracy"],
        "tasks": runs[str(seeds[0])]["tasks"],
        "tasks_of_new_sets": runs[str(seeds[0])]["tasks_of_new_sets"],
        "table": {key: _table(runs, key) for key in ("accuracy", "accuracy_new_sets")},
        "ablation": _ablation(folder, sources, seeds[0], runs),
        "unseen_classes": _unseen(folder / "unseen", seeds[0]),
        "runs": runs,
    }


def _zoo_and_model(folder: Path, *flags: str) -> tuple[Path, Path]:
    """A zoo and a SANE model of it, made once."""
    zoo, model = folder / "zoo", folder / "model"
    if not zoo.exists():
        command("build_zoo.py", "--output-dir", str(zoo), *flags, *ZOO)
    if not (model / "results.json").exists():
        steps = ["--max-steps", str(STEPS), "--eval-steps", str(STEPS)]
        command("train.py", "--preset", "small-cnn", "--zoo", str(zoo), "--output-dir", str(model), *steps)
    return zoo, model


def _table(runs: dict[str, Any], key: str) -> dict[str, Any]:
    """By data, method and epoch: mean and standard deviation over the seeds."""
    found: dict[str, Any] = {}
    for data in DATA:
        for method in METHODS:
            curves = np.array([run[data][method][key] for run in runs.values()])  # (seeds, epochs + 1)
            found.setdefault(data, {})[method] = {
                str(epoch): {"mean": curves[:, epoch].mean(), "std": curves[:, epoch].std()} for epoch in SHOWN_EPOCHS
            }
    return found


def _ablation(folder: Path, sources: list[str], seed: int, runs: dict[str, Any]) -> dict[str, float]:
    """Accuracy at epoch 0; fine-tuning is cut short."""
    found = {}
    for number, (name, flags) in enumerate(ABLATION.items()):
        output = folder / f"ablation-{number}"
        if flags and not output.exists():
            command("prompt.py", *sources, "--output-dir", str(output), "--seed", str(seed), *SHORT, *flags)
        results = read_json(output / "results.json")["prompt"] if flags else runs[str(seed)]
        found[name] = results["train"]["prompted"]["accuracy"][0]
    return found


def _unseen(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy without training by number of classes that nothing was learned from."""
    zoo, model = _zoo_and_model(folder, "--task", "digits[0,1,2,3,4,5,6,7]")
    output = folder / "prompt"
    if not output.exists():
        sources = ["--model", str(model), "--zoo", str(zoo), "--output-dir", str(output), "--seed", str(seed)]
        command("prompt.py", *sources, *SHORT)
    opened, prompter = Zoo(zoo), Prompter.from_pretrained(output)
    known = opened.stacked("train", opened.last_rows("train"))
    task, generator = load_task("digits"), np.random.default_rng(seed)
    found = {}
    for count in (0, 1, 2):
        chosen = [_with_unseen(count, generator) for _ in range(UNSEEN_TASKS)]
        drawn = [draw_samples(task.labels["train"], classes, 10, generator) for classes in chosen]
        images = torch.stack([task.images["train"][rows] for rows, _ in drawn])
        labels = torch.stack([numbers for _, numbers in drawn])
        wanted = torch.stack([renumber(task.labels["test"], classes) for classes in chosen])
        prompted = evaluate(opened.module, prompter(images, labels), task.images["test"], wanted)
        best = retrieve(opened.module, known, images, labels, match=True)
        moved = torch.where(wanted == OTHER_CLASS, wanted, best.outputs.gather(1, wanted.clamp(min=0)))
        tensors = {name: tensor[best.rows] for name, tensor in known.items()}
        retrieved = evaluate(opened.module, tensors, task.images["test"], moved)
        found[str(count)] = {"prompted": prompted.accuracy.mean(), "retrieved_matched": retrieved.accuracy.mean()}
    return found


def _with_unseen(count: int, generator: np.random.Generator) -> list[int]:
    """Four digits, so many of them 8 or 9, in random order."""
    digits = [*generator.permutation(8)[: 4 - count], *(8 + generator.permutation(2)[:count])]
    return [int(digit) for digit in generator.permutation(digits)]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of prompts and fine-tuning")
    parser.add_argument("--work-dir", type=Path, help="keep zoo, model and prompts here, and go on from what is there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work_dir or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["SANE_CACHE"] = str(folder / "cache")
        results = measure(folder, args.seeds)
    results["machine"] = {"torch": torch.__version__, "cores": os.cpu_count()}
    write_json(args.out, results)
    print(json.dumps({key: results[key] for key in ("table", "ablation", "unseen_classes")}, indent=2, default=float))


if __name__ == "__main__":
    main()
