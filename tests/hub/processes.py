"""Fresh processes that find the tests' Hub: the clients read their settings when they are imported."""

import contextlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub.server import HubServer

ROOT = Path(__file__).parents[2]
PACKAGES = ("hub_scripts", "modeling_sane", "tokenization_sane")
PROBE = "import importlib.util, sys; print(sorted(n for n in sys.argv[1:] if importlib.util.find_spec(n)))"


@dataclass
class Result:
    """What a process left behind."""

    returncode: int
    stdout: str
    stderr: str
    home: Path  # its caches; give its name as `home` to the next process to keep them
    value: Any = None  # what the function returned, as JSON brings it over


class Runner:
    """Runs functions, scripts and commands in fresh processes that find `hub`, each with caches of its own.

    Args:
        hub ([`HubServer`]): the Hub that they find.
        folder (`Path`): where their files go.
        clean_python (`Path`): an interpreter that lacks our packages.
    """

    def __init__(self, hub: HubServer, folder: Path, clean_python: Path):
        self.hub, self.folder, self.clean_python = hub, folder, clean_python
        self.count = 0

    def __call__(
        self,
        program: Callable | str | Sequence[str],
        *arguments: Any,
        package: bool = True,
        home: str | None = None,
        token: str | None = HubServer.token,
        client: str | None = None,
        expect: int | None = 0,
        timeout: float = 120.0,
        **variables: str,
    ) -> Result:
        """Run a program and fail with what it printed if it ends with another code than expected.

        Args:
            program (`Callable`, `str` or `Sequence[str]`): a function, whose source is sent and which must import all
                that it uses; or the text of a script; or the words of a command: `python`, `sane`, `accelerate`.
            arguments: for the function or the script, as JSON can hold them; paths become text.
            package (`bool`, defaults to `True`): False for an interpreter in which our packages cannot be imported.
            home (`str`, *optional*): name of the folder with the caches; the default is a fresh one.
            token (`str`, *optional*): None for a process that is not logged in.
            client (`str`, *optional*): the process's name in the Hub's log.
            expect (`int`, *optional*): the exit code; None if any will do.
            timeout (`float`, defaults to 120): seconds after which the process and its children are killed.
            variables (`str`): more environment variables.

        Returns:
            [`Result`]: with `value`, what the function returned.
        """
        self.count += 1
        home_folder = self.folder / (home or f"home-{self.count}")
        work = self.folder / f"work-{self.count}"
        work.mkdir(parents=True)
        python = Path(sys.executable) if package else self.clean_python
        variables = {"PYTHONPATH": str(ROOT)} | variables if package else variables
        environment = self.hub.environment(home_folder, token, client, **variables)
        environment["PATH"] = os.pathsep.join([str(python.parent), environment.get("PATH", os.defpath)])
        # not in the working folder: a script's own folder is the first that Python imports from
        script, answer = self.folder / f"script-{self.count}" / "script.py", self.folder / f"answer-{self.count}.json"
        if isinstance(program, str) or callable(program):
            script.parent.mkdir()
            words = [json.dumps(arguments, default=str), str(answer)] if callable(program) else map(str, arguments)
            script.write_text(_script_of(program) if callable(program) else program, encoding="utf-8")
            command = [str(python), str(script), *words]
        else:
            program = [str(word) for word in program]
            command = [shutil.which(program[0], path=environment["PATH"]) or program[0], *program[1:]]
        result = _run(command, work, environment, timeout)
        result.home = home_folder
        if expect is not None and result.returncode != expect:
            pytest.fail(
                f"exit code {result.returncode} instead of {expect}\n{result.stdout}\n{result.stderr}", pytrace=False
            )
        if answer.exists():
            result.value = json.loads(answer.read_text(encoding="utf-8"))
        return result


def _script_of(function: Callable) -> str:
    source = textwrap.dedent(inspect.getsource(function))
    return f"""{source}

if __name__ == "__main__":
    import json, pathlib, sys

    answer = {function.__name__}(*json.loads(sys.argv[1]))
    pathlib.Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
"""


def _run(command: list[str], work: Path, environment: dict[str, str], timeout: float) -> Result:
    process = subprocess.Popen(
        command,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # its children end with it
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"not done after {timeout} s\n{stdout}\n{stderr}", pytrace=False)
    return Result(process.returncode, stdout, stderr, work)


def make_clean_python(folder: Path) -> Path:
    """An interpreter with the installed packages but without ours.

    Ours is installed in place, by a `.pth` file; those in a folder that a `.pth` file names are not read.
    """
    venv.EnvBuilder(symlinks=os.name != "nt").create(folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    where = _output([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)
    (Path(where) / "installed.pth").write_text("\n".join(installed) + "\n", encoding="utf-8")
    found = _output([str(python), "-c", PROBE, *PACKAGES, "transformers"], folder)
    assert found == "['transformers']", (
        f"the clean interpreter finds {found}: install the package with -e for the tests"
    )
    return python


def _output(command: list[str], folder: Path) -> str:
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()
