"""The floor plan: no circle of imports, no crowded room, nothing too long to read, and onnxruntime behind one door."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "edgesafe": ROOT / "edgesafe",
    "edgesafe_export": ROOT / "export" / "edgesafe_export",
    "edgesafe_boards": ROOT / "devices" / "edgesafe_boards",
}
MODULES = 16  # in a folder; the two rooms below hold one thing each that does not part well
CROWDED = {SOURCES["edgesafe"] / "runtime", SOURCES["edgesafe_export"]}
FILE_LINES, FUNCTION_LINES, FUNCTION_P90 = 400, 60, 25
ENGINE_DOOR = "edgesafe.runtime.ort"


def package_files() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(tree: ast.Module, known: Mapping[str, Path]) -> set[str]:
    """The packages' modules that a module imports anywhere in it, in functions and for types too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in inner}
    return names & known.keys()


def circles(arrows: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Each module that can reach itself, with a shortest way round."""
    for start in sorted(arrows):
        ways = [[start, step] for step in sorted(arrows[start])]
        reached = set(arrows[start])
        while ways:
            way = ways.pop(0)
            if way[-1] == start:
                yield way
                break
            fresh = sorted(arrows.get(way[-1], set()) - reached)
            reached.update(fresh)
            ways += [[*way, step] for step in fresh]


def functions() -> list[tuple[int, str]]:
    """Length in lines and place of every function and method of the packages."""
    found = []
    for path in package_files().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append((lines, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return sorted(found)


def test_no_circle_of_imports():
    files = package_files()
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    arrows = {name: imported(tree, files) - {name} for name, tree in trees.items()}
    # The root hands names on lazily: whoever imports it for its version imports nothing else by that.
    arrows["edgesafe"] = set()
    assert list(circles(arrows)) == []


def test_a_circle_is_seen():
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == [["b", "c", "b"], ["c", "b", "c"]]
    assert list(circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})) == []


def test_no_crowded_room():
    folders = {path.parent for path in package_files().values()} - CROWDED
    counts = {folder: len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) for folder in folders}
    assert {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > MODULES} == {}


@pytest.mark.parametrize("folder", ["edgesafe", "export", "devices", "tests"])
def test_no_long_file(folder):
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in sorted((ROOT / folder).rglob("*.py"))}
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > FILE_LINES} == {}


def test_no_long_function():
    lengths = functions()
    assert [row for row in lengths if row[0] > FUNCTION_LINES] == []
    assert lengths[int(0.9 * len(lengths))][0] <= FUNCTION_P90


def test_onnxruntime_has_one_door():
    doors = []
    for name, path in package_files().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # The exporter's quantizers are tools that happen to be packed with the engine.
            if any(n == "onnxruntime" or (n.startswith("onnxruntime.") and "quantization" not in n) for n in names):
                doors.append(name)
    assert doors == [ENGINE_DOOR]
