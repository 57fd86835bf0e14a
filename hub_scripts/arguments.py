"""What all commands share: arguments from flags or one file, and errors as one sentence."""

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser

Arguments = TypeVar("Arguments")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of the example as they are."""


def parse_arguments(
    kind: type[Arguments], argv: list[str] | None, program: str, positional: dict[str, str] | None = None
) -> Arguments:
    """Read a dataclass of arguments from flags, or from one YAML or JSON file given instead of flags.

    Args:
        kind (`type`): a dataclass; its docstring is the description and the example of `--help`.
        argv (`list[str]`, *optional*): words after the command; default the process' own.
        program (`str`): how users call it, e.g. `"sane train"`.
        positional (`dict[str, str]`, *optional*): field name to help text of arguments that are given without a flag.

    Raises:
        SystemExit: With code 2 and one sentence, if the arguments are wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(kind, prog=program, description=kind.__doc__, formatter_class=_HelpFormatter)
    parser.allow_abbrev = False
    for name, text in (positional or {}).items():
        parser.add_argument(name, nargs="+", help=text)
    try:
        if len(argv) == 1 and Path(argv[0]).suffix in (".json", ".yaml", ".yml"):
            read = parser.parse_json_file if Path(argv[0]).suffix == ".json" else parser.parse_yaml_file
            return read(argv[0])[0]
        if not positional:
            return parser.parse_args_into_dataclasses(argv)[0]
        found = vars(parser.parse_args(argv))
        return kind(**found)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def run_command(command: Callable[[Any], Any], arguments: Any, program: str) -> None:
    """Run a command; what users can mend ends in one sentence on stderr and exit code 1."""
    try:
        command(arguments)
    except OSError as error:
        reason = "there is no space left on the device; free some and start again" if error.errno == errno.ENOSPC else error
        _fail(program, reason)
    except ValueError as error:
        _fail(program, error)
    except KeyboardInterrupt:
        _fail(program, "interrupted; the same command goes on from here", code=130)


def _fail(program: str, reason: Any, code: int = 1) -> None:
    sys.stderr.write(f"{program}: error: {reason}\n")
    raise SystemExit(code)
