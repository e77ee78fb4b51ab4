"""Wrong versions of functions, made from their shipped source, to see that a check fails on them."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any


def wrong(function: Callable[..., Any], *edits: tuple[str, str], **names: Any) -> Callable[..., Any]:
    """A function with edits in its source; `names` are added to what it can see.

    An edit whose text is not there exactly once fails, so a wrong version can't silently become the right one.
    """
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in edits:
        assert source.count(old) == 1, f"{function.__name__} has {source.count(old)} of {old!r}: bring the edit up to date"
        source = source.replace(old, new)
    space = {**vars(sys.modules[function.__module__]), **names}
    exec(compile("from __future__ import annotations\n" + source, f"wrong {function.__name__}", "exec"), space)
    made: Callable[..., Any] = space[function.__name__]
    return made
