"""Output folders: whole or not at all, and never over somebody else's files."""

import errno
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from safetensors import SafetensorError

from hub_scripts.arguments import parse_arguments, run_command
from hub_scripts.outputs import MARKER, claim_folder, new_folder, write_json


def test_a_folder_appears_when_all_is_written(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail():
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("1")
    with pytest.raises(ValueError, match="already holds something"), new_folder(tmp_path):
        pass
    with pytest.raises(ValueError, match="already holds something"):
        claim_folder(tmp_path, "train", {})
    assert (tmp_path / "precious").read_text() == "1"


def test_a_claimed_folder_goes_on_with_the_same_settings_alone(tmp_path):
    assert not claim_folder(tmp_path / "out", "train", {"seed": 1, "rate": [0.1]})
    assert claim_folder(tmp_path / "out", "train", {"seed": 1, "rate": (0.1,)})
    with pytest.raises(ValueError, match="begun with --seed 1, now it is 2"):
        claim_folder(tmp_path / "out", "train", {"seed": 2, "rate": [0.1]})
    with pytest.raises(ValueError, match="belongs to `sane train`"):
        claim_folder(tmp_path / "out", "quickstart", {})


def test_a_claim_that_was_killed_half_way_is_begun_anew(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{MARKER}.12345").write_text('{"comm')
    assert not claim_folder(tmp_path / "out", "train", {"seed": 1})
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MARKER]


def test_json_is_written_whole_with_plain_numbers(tmp_path):
    write_json(tmp_path / "a.json", {"x": np.float32(0.5), "nan": float("nan"), "list": np.arange(2), 3: (1, 2)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 0.5, "nan": None, "list": [0, 1], "3": [1, 2]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text())["x"] == 0.5


@dataclass
class Example:
    """An example.

    Example:
      sane example --size 3 a b
    """

    size: int = field(default=2, metadata={"help": "How many."})
    names: list[str] = field(default_factory=list, init=False, metadata={"help": "Which."})

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"--size is {self.size}, expected at least 1.")


def test_flags_words_and_files_give_the_same_arguments(tmp_path):
    parsed = parse_arguments(Example, ["--size", "3", "a", "b"], "sane example")
    assert (parsed.size, parsed.names) == (3, ["a", "b"])
    (tmp_path / "a.yaml").write_text("size: 4\n")
    assert parse_arguments(Example, [str(tmp_path / "a.yaml")], "sane example").size == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sise", "3", "a"], "unrecognized arguments: --sise"),
        (["--size", "x", "a"], "invalid int value: 'x'"),
        (["--size", "0", "a"], "--size is 0, expected at least 1."),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_arguments_end_in_one_sentence_and_exit_code_2(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Example, argv, "sane example")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("the zoo is empty."), "sane x: error: the zoo is empty."),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the device; free some"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "no space left on the device; free some",
        ),
    ],
)
def test_what_users_can_mend_ends_in_one_sentence(capsys, error, message):
    def command(_):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(command, None, "sane x")
    assert stopped.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        run_command(command, None, "sane x")
    assert message in capsys.readouterr().err


def test_our_own_mistakes_keep_their_traceback():
    def command(_):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_command(command, None, "sane x")
