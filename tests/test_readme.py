"""The README's first block of code runs and prints what its comments say."""

import json
import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_first_block_prints_what_its_comments_say(capsys):
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert len(promised) == len(printed) == 4
    for found, comment in zip(printed, promised, strict=True):
        assert comment.startswith(found), (found, comment)


def test_the_table_holds_the_figures_that_were_kept():
    from benchmarks.quickstart import BEGIN, END, KEPT, table

    assert BEGIN + table(json.loads(KEPT.read_text())) + END in README


def test_tables_hold_the_figures_that_were_kept():
    from benchmarks.readme import PLACES, ROOT

    for name, marker, make in PLACES:
        page = (ROOT / name).read_text(encoding="utf-8")
        assert f"<!-- {marker} -->\n" + make() + f"<!-- end of {marker} -->" in page, name


def test_every_command_of_the_readme_exists():
    from hub_scripts.cli import COMMANDS

    named = set(re.findall(r"`sane ([a-z-]+)", README))
    assert named == set(COMMANDS)


def test_the_simulation_page_holds_what_its_script_computes():
    from benchmarks.simulate_training import LARGE, PAPER, Device, table

    page = (Path(__file__).parents[1] / "docs" / "simulation.md").read_text(encoding="utf-8")
    for size in (PAPER, LARGE):
        assert table(size, Device(989.0, 0.45, 80.0, 50.0))[0] in page
