"""What all commands share: arguments from flags or one file, and errors as one sentence."""

import argparse
import errno
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers import HfArgumentParser

Arguments = TypeVar("Arguments")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of the example as they are."""


def parse_arguments(
    kind: type[Arguments], argv: list[str] | None, program: str, presets: Path | None = None
) -> Arguments:
    """Read a dataclass of arguments from flags, or from one YAML or JSON file given instead of flags.

    Args:
        kind (`type`): a dataclass; its docstring is the description and the example of `--help`. A field that is not part of
            its `__init__` is a word given without a flag, or a list of them.
        argv (`list[str]`, *optional*): words after the command; default the process' own.
        program (`str`): how users call it, e.g. `"sane train"`.
        presets (`Path`, *optional*): folder of YAML files; `--preset NAME` takes defaults from one of them.

    Raises:
        SystemExit: With code 2 and one sentence, if the arguments are wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(kind, prog=program, description=kind.__doc__, formatter_class=_HelpFormatter)
    parser.allow_abbrev = False
    positional = [f for f in fields(kind) if not f.init]
    for field in positional:
        nargs = None if field.type is str else "+"
        parser.add_argument(field.name, nargs=nargs, metavar=field.name.upper(), help=field.metadata["help"])
    try:
        if len(argv) == 1 and Path(argv[0]).suffix in (".json", ".yaml", ".yml"):
            read = parser.parse_json_file if Path(argv[0]).suffix == ".json" else parser.parse_yaml_file
            return read(argv[0])[0]
        if presets is not None:
            _use_preset(parser, presets, argv)
        found = vars(parser.parse_args(argv))
        words = {field.name: found.pop(field.name) for field in positional}
        arguments = kind(**found)
        for name, value in words.items():
            setattr(arguments, name, value)
        return arguments
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def _use_preset(parser: argparse.ArgumentParser, folder: Path, argv: list[str]) -> None:
    """Defaults of `--preset NAME`; flags that are given count more."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset")
    name = finder.parse_known_args(argv)[0].preset
    if name is None:
        return
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ValueError(f"--preset is {name!r}, expected one of {known}.")
    parser.set_defaults(**yaml.safe_load(file.read_text(encoding="utf-8")))


def require_source(source: str | Path, what: str) -> None:
    """Refuse a path that is not there; what looks like `name` or `namespace/name` may be a repository.

    Raises:
        ValueError: The Hub's own message for a mistyped path would speak of repository names.
    """
    path = Path(source)
    looks_like_a_path = (
        path.is_absolute() or path.suffix == ".safetensors" or len(path.parts) > 2 or path.parts[:1] == ("..",)
    )
    if looks_like_a_path and not path.exists():
        raise ValueError(f"{what} {source} does not exist.")


def run_command(command: Callable[[Any], Any], arguments: Any, program: str) -> None:
    """Run a command; what users can mend ends in one sentence on stderr and exit code 1."""
    try:
        command(arguments)
    except ValueError as error:
        _fail(program, error)
    except HTTPError as error:  # of the Hub, after its client has tried again
        _fail(program, f"{str(error).strip().split(chr(10))[0]}; the same command goes on from here")
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors tell of a full disk in errors of their own
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full or "failed writing file" in str(error):
            _fail(program, "there is no space left on the device; free some and start again.")
        if not isinstance(error, OSError):
            raise
        _fail(program, error)
    except KeyboardInterrupt:
        _fail(program, "interrupted; the same command goes on from here", code=130)


def _fail(program: str, reason: Any, code: int = 1) -> None:
    sys.stderr.write(f"{program}: error: {reason}\n")
    raise SystemExit(code)
