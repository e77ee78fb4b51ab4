"""The objectives by the name that `method` gives them. A new one is its own module and its name here.

One that is not part of this package needs no entry: `method = "MODULE:NAME"` imports it.
"""

from __future__ import annotations

import difflib
from typing import Any

from edgesafe.align.objectives.l_dpo import L_DPO
from edgesafe.align.objectives.l_ppo import L_PPO
from edgesafe.align.objectives.l_sft import L_SFT, SELF_DISTILL
from edgesafe.align.settings import AlignConfig, Section
from edgesafe.align.trainer import Objective
from edgesafe.errors import ConfigError
from edgesafe.plugins import load_named

OBJECTIVES = {objective.name: objective for objective in (SELF_DISTILL, L_SFT, L_DPO, L_PPO)}
METHODS = tuple(OBJECTIVES)


def find_objective(method: str, where: str = "method") -> Objective:
    """The objective that a config's `method` names.

    Args:
        method: one of `METHODS`, or MODULE:NAME.
        where: the config's file, for the error.

    Raises:
        ConfigError: an unknown method, a module that can't be imported, or a name in it that is not an `Objective`.

    >>> find_objective("l-ppo").has_value_head
    True
    >>> find_objective("lsft")
    Traceback (most recent call last):
    edgesafe.errors.ConfigError: unknown method 'lsft', did you mean 'l-sft'? (method). Expected: ...
    """
    if method in OBJECTIVES:
        return OBJECTIVES[method]
    if ":" in method:
        return _outside(method, where)
    near = difflib.get_close_matches(method, METHODS, n=1)
    raise ConfigError(
        f"unknown method {method!r}" + (f", did you mean {near[0]!r}?" if near else ""),
        where=where,
        expected=" or ".join(map(repr, METHODS)) + ", or MODULE:NAME of an objective of your own",
        todo="change method",
    )


def sections_of(objective: Objective) -> list[Section[Any]]:
    """The sections that a config may have: the shipped objectives' and this one's."""
    sections = {o.section.name: o.section for o in (*OBJECTIVES.values(), objective) if o.section}
    return list(sections.values())


def _outside(method: str, where: str) -> Objective:
    """An objective outside this package."""
    objective = load_named(
        method,
        lambda what: ConfigError(
            f"no objective {method!r}: {what}",
            where=where,
            expected="MODULE:NAME, with a module that Python finds and a name in it",
            todo="correct the name, start where the module lies, or put its folder on PYTHONPATH",
        ),
    )
    if not isinstance(objective, Objective):
        raise ConfigError(
            f"{method} is a {type(objective).__name__}",
            where=where,
            expected="an edgesafe.align.trainer.Objective",
            todo="name the objective itself",
        )
    if objective.section:
        _check_name(method, objective.section.name, where)
    return objective


def _check_name(method: str, section: str, where: str) -> None:
    """Refuse an outside objective's section that has the name of another setting."""
    taken = {*vars(AlignConfig()), *(shipped.name for shipped in sections_of(L_SFT))}
    if section in taken:
        raise ConfigError(
            f"the section [{section}] of {method} has the name of another setting",
            where=where,
            expected="a name that is not one of " + ", ".join(sorted(taken)),
            todo="rename the section",
        )
