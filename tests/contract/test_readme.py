"""The documents say what is so: their Python runs, their commands, options and targets exist, their links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edgesafe.cli import main
from edgesafe.runtime import measure
from handmade import ANSWER
from study.documents import blocks

ROOT = Path(__file__).resolve().parents[2]
FIRST_SCREEN, WHOLE = 40, 150  # lines of README before its first section, and in all
PAGES = ("README.md", "RESULTS.md", "CONTRIBUTING.md")
ROOMS = ("align", "checkpoint", "evaluate", "hub", "requests", "runtime", "serve")
# Its Python needs a server: tests/serve/test_serve_readme.py runs it.
SERVED = "edgesafe/serve/README.md"
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
DOCUMENTS |= {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        *(f"edgesafe/{room}/README.md" for room in ROOMS),
        "export/README.md",
        "export/examples/README.md",
        "edgesafe/align/LOG.md",
        "tests/bench/LOG.md",
    )
}
COMMAND = re.compile(r"(?:^|`|\$ |^    )edgesafe ([a-z-]+)([^`\n]*)", re.M)
_LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")


def _code(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_readme_is_short():
    lines = DOCUMENTS["README.md"].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("## "))
    assert first <= FIRST_SCREEN and len(lines) <= WHOLE


@pytest.mark.parametrize("name", [name for name, text in DOCUMENTS.items() if name != SERVED and _code(text, "python")])
def test_the_python_runs(name, handmade, tmp_path, monkeypatch, capsys):
    measure(shutil.copytree(handmade, tmp_path / "build" / "rpi5" / "bundle"), seconds=0.1)
    Image.new("RGB", (9, 7)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    for code in _code(DOCUMENTS[name], "python"):
        exec(compile(code, name, "exec"), {})
    assert ANSWER in capsys.readouterr().out


def _commands() -> dict[str, set[str]]:
    r"""{command: options that the documents give it}; a `\` at a line's end continues it."""
    found: dict[str, set[str]] = {}
    for text in DOCUMENTS.values():
        for command, rest in COMMAND.findall(re.sub(r"\\\n\s*", " ", text)):
            found.setdefault(command, set()).update(re.findall(r"--[a-z-]+", rest))
    return found


@pytest.mark.parametrize("command", sorted(_commands()))
def test_every_command_and_option_exists(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and command in shown
    # Commands with actions (suite import, reference data) list their options one level deeper.
    for action in re.findall(r"^    ([a-z]+) ", shown, re.M) if "ACTION" in shown else ():
        with pytest.raises(SystemExit):
            main([command, action, "--help"])
        shown += capsys.readouterr().out
    assert [option for option in sorted(_commands()[command]) if option not in shown] == []


def test_every_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {target for text in DOCUMENTS.values() for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M)}
    assert {"export", "test"} <= named and named - targets == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_within_the_project_leads_somewhere(name):
    wrong = []
    for path, anchor in _LINK.findall(DOCUMENTS[name]):
        if "://" in path:
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text(encoding="utf-8"))):
            wrong.append(f"{path}#{anchor}")
    assert wrong == []


def _anchors(text: str) -> set[str]:
    """Headings as GitHub links to them."""
    heads = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_scripts_and_files_in_backticks_are_there(name):
    paths = re.findall(r"`(?:python )?((?:edgesafe|tests|export|devices)/[\w./-]+)", DOCUMENTS[name])
    assert [path for path in paths if not (ROOT / path).exists()] == []


def _tables_without_markers(text: str) -> list[str]:
    """Lines of Markdown tables with a digit that no command wrote."""
    lines = text.split("\n")
    inside = {i for block in blocks(lines, "RESULTS.md") for i in range(block.first, block.last)}
    return [line for i, line in enumerate(lines) if i not in inside and line.startswith("|") and re.search(r"\d", line)]


def test_every_table_of_results_is_generated():
    assert _tables_without_markers(DOCUMENTS["RESULTS.md"]) == []
    assert len(blocks(DOCUMENTS["RESULTS.md"].split("\n"), "RESULTS.md")) > 10
    by_hand = "| exit | rate |\n|---|---|\n| 6 | 0.8 |"
    assert _tables_without_markers(f"{DOCUMENTS['RESULTS.md']}\n{by_hand}") == ["| 6 | 0.8 |"]


_SCRIPTS = sorted(
    path
    for folder in (ROOT / "tests", *(ROOT / "tests" / name for name in ("bench", "long", "tools")))
    for path in folder.glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_starts_from_where_it_lies(script, tmp_path):
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
