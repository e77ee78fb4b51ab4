"""Digests of code: whether what made an answer has changed since."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgesafe.errors import AlignError

_REPOSITORY = Path(__file__).resolve().parents[2]
_ROOMS = ("edgesafe.align.", "edgesafe.evaluate.", "edgesafe.checkpoint.", "edgesafe.runtime.", "edgesafe_export.")


def digest(obj: Any) -> str:
    """The sha256 of an object's JSON."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()


def code_digest(roots: Sequence[str], without: Sequence[str] = ()) -> str:
    """Digest of what is executed in some modules and in what they import of the rooms that make answers.

    Comments and docstrings do not count, so a reworded one makes nothing run again.

    Args:
        roots: modules; "module:function" is that function alone, without its imports.
        without: modules that are left out, with what they import.
    """
    texts, left = {}, [root for root in roots if root not in without]
    while left:
        name = left.pop()
        if name in texts:
            continue
        module, _, function = name.partition(":")
        tree = without_docstrings(ast.parse(_source(module)))
        if function:
            texts[name] = [ast.dump(node) for node in tree.body if getattr(node, "name", "") == function]
            continue
        texts[name] = [ast.dump(tree)]
        left += [m for m in _imports(tree) if m.startswith(_ROOMS) and m not in without and _path(m)]
    return digest(texts)


def source_digest(path: Path) -> str:
    """The sha256 of a source file; of Python what is executed alone, so that a reworded comment changes nothing."""
    data = path.read_bytes()
    if path.suffix == ".py":
        data = ast.dump(without_docstrings(ast.parse(data))).encode()
    return hashlib.sha256(data).hexdigest()


def _imports(tree: ast.Module) -> set[str]:
    """Modules that a module imports, anywhere in it; `from a import b` may mean a module a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return found


def _path(module: str) -> Path | None:
    home = _REPOSITORY / "export" if module.startswith("edgesafe_export") else _REPOSITORY
    path = home.joinpath(*module.split(".")).with_suffix(".py")
    return path if path.is_file() else None


def _source(module: str) -> str:
    path = _path(module)
    if path is None:
        raise AlignError(f"there is no module {module}", where=str(_REPOSITORY), expected="a file of this repository")
    return path.read_text(encoding="utf-8")


def without_docstrings(tree: ast.Module) -> ast.Module:
    r"""The tree with every docstring taken out, in place.

    >>> ast.unparse(without_docstrings(ast.parse("def f():\n    'doc'\n    return 1")))
    'def f():\n    return 1'
    """
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[:1] = []
    return tree
