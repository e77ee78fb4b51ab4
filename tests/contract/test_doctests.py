"""The examples in the docstrings of all packages are run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import edgesafe
import edgesafe_boards
import edgesafe_export

MODULES = [
    module.name
    for package in (edgesafe, edgesafe_export, edgesafe_boards)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


def test_there_are_examples_to_run():
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(tests) > 90
