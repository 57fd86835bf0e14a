"""Publish a zoo as a dataset repository on the Hub."""

from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.hub import publish_folder
from hub_scripts.zoos.schema import checksum
from hub_scripts.zoos.zoo import Zoo

PROGRAM = "sane push-zoo"


@dataclass
class PushZooArguments:
    """Check a zoo and publish it, with its card, as a dataset repository on the Hub, in one commit.

    Log in first with `hf auth login`, or set HF_TOKEN. What is uploaded already is not sent again, so an interrupted push is
    repeated with the same command.

    Example:
      sane push-zoo runs/zoo me/zoo --private
      python -c "from datasets import load_dataset; print(load_dataset('me/zoo', split='test', streaming=True))"
    """

    zoo: str = field(init=False, metadata={"help": "Folder of the zoo."})
    repo_id: str = field(init=False, metadata={"help": "Where it goes: namespace/name."})
    private: bool = field(default=False, metadata={"help": "Make the repository private, if it is new."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; made if it does not exist."})
    commit_message: str = field(default="Upload zoo", metadata={"help": "First line of the commit."})


def push_zoo(args: PushZooArguments) -> str:
    """Check the zoo, upload it and return the address of the commit.

    Raises:
        ValueError: If the folder is no zoo, or a file is not what `zoo.json` says.
    """
    if not Path(args.zoo).is_dir():
        raise ValueError(f"{args.zoo} is no folder; give the folder of a zoo.")
    zoo = Zoo(args.zoo)
    _check_files(zoo)
    return publish_folder(
        args.zoo,
        args.repo_id,
        "dataset",
        args.private,
        args.revision,
        args.commit_message,
        # a new version replaces the old one whole: a file that it does not have would be rows too many
        replace=["data/*", "weights/*", "layouts/*", "symmetries/*", "lineage.json"],
    )


def _check_files(zoo: Zoo) -> None:
    """Refuse a zoo whose files changed after it was made, or miss something; the first such file is named."""
    listed = zoo.info["files"]
    for name, found in tqdm(listed.items(), desc="check", unit="file", leave=False):
        if name not in zoo.source.sizes:
            raise ValueError(f"{zoo.name} misses {name}, which its zoo.json lists; build or import it again.")
        if checksum(zoo.source.fetch(name).read_bytes()) != found["sha256"]:
            raise ValueError(f"{zoo.name}: {name} is not the file that zoo.json lists; build or import the zoo again.")
    unlisted = [name for name in zoo.source.sizes if name.startswith("data/") and name not in listed]
    if unlisted:
        raise ValueError(f"{zoo.name} holds {unlisted[0]}, which its zoo.json does not list; remove it.")
    for rows in zoo.splits.values():
        missing = {name for name in rows["weights_file"] if name is not None} - zoo.source.sizes.keys()
        if missing:
            raise ValueError(f"{zoo.name} misses {sorted(missing)[0]}, which a row names; import that model again.")
    for layout_id in zoo.layout_ids:
        zoo.read_layout(layout_id)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sane push-zoo`."""
    args = parse_arguments(PushZooArguments, argv, PROGRAM)
    run_command(lambda a: print(f"{a.zoo} is at {push_zoo(a)}"), args, PROGRAM)


if __name__ == "__main__":
    main()
