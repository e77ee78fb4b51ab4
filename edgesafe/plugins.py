"""Objects outside this package by the text that names them: an engine on the command line, an objective in a config."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgesafe.errors import EdgesafeError


def load_named(text: str, refused: Callable[[str], EdgesafeError]) -> Any:
    """The object that a text names.

    Modules are found as ``python -m`` finds them, the working folder last.

    Args:
        text: ``MODULE:NAME``; NAME may have dots.
        refused: Makes the error of what is wrong with the text.

    Raises:
        EdgesafeError: The text is of another form, or names no module that can be imported or nothing in it; or the module
            itself raises one.

    >>> load_named("math:pi", EdgesafeError)
    3.141592653589793
    >>> load_named("math:tau.wave", EdgesafeError)
    Traceback (most recent call last):
    edgesafe.errors.EdgesafeError: the module math has no tau.wave.
    """
    module, colon, name = text.partition(":")
    if not (colon and all(part.isidentifier() for part in [*module.split("."), *name.split(".")])):
        raise refused("the name has another form")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:  # a console script's path lacks it
        sys.path.append(here)
    try:
        found = importlib.import_module(module)
    except EdgesafeError:
        raise
    except Exception as error:  # a module may raise anything while it is imported
        raise refused(f"the module {module} can't be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise refused(f"the module {module} has no {name}")
        found = getattr(found, part)
    return found
