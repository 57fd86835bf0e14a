"""`sane <command>`: one door to all commands."""

import importlib
import sys

COMMANDS = {
    "quickstart": "zoo, training, embeddings, prediction and generation on the embedded digits task, in one go",
    "build-zoo": "train a population of small networks and write it as a zoo",
    "import-zoo": "make a zoo out of checkpoints: folders, published zoos, Trainer runs, Hub repositories",
    "push-zoo": "publish a zoo as a dataset on the Hub",
    "train": "pre-train SANE on a zoo (also: accelerate launch hub_scripts/train.py)",
    "embed": "embeddings of the checkpoints of zoos, files and Hub models (also: accelerate launch hub_scripts/embed.py)",
    "search": "the nearest networks among embedded ones: near-duplicates and the likely parent",
    "probe": "predict properties of networks from their embeddings, against the baselines",
    "sample": "generate new networks around good ones, against the baselines",
    "prompt": "networks from a few labelled samples: train a data prompt on a zoo of many tasks, or use one",
    "finetune": "fine-tune sets of networks under one budget",
    "diff": "which layers moved between two checkpoints, after aligning them",
    "profile-layers": "layers of a zoo over epochs and depth, and which one is an outlier",
    "inspect-checkpoint": "what is in a checkpoint: layers, tokens, fill",
}


def _usage() -> str:
    lines = "\n".join(f"  {name:<20}{text}" for name, text in COMMANDS.items())
    return (
        "usage: sane COMMAND [options]\n\nModel weights as a modality: tokenize, embed, predict and generate neural networks.\n\n"
        f"commands:\n{lines}\n\n`sane COMMAND --help` explains every option and shows an example.\n\nexample:\n"
        "  sane quickstart --output-dir runs/quickstart\n"
    )


def main() -> None:
    """Entry point of `sane`."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), end="")
        return
    if words[0] not in COMMANDS:
        sys.stderr.write(f"sane: error: there is no command {words[0]!r}; known are {', '.join(COMMANDS)}.\n")
        raise SystemExit(2)
    # a command's libraries take seconds to import, so only its own are
    module = importlib.import_module(f"hub_scripts.{words[0].replace('-', '_')}")
    module.main(words[1:])


if __name__ == "__main__":
    main()
