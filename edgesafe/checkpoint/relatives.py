"""Families that transformers does not know by their name: it is told that they are built as those which their recipes extend.

Tier 1. A family that it knows, by itself or because somebody registered it, is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def introduce(name: str, parents: Mapping[str, str]) -> None:
    """Let transformers load a family's checkpoints, with the classes and the names of weights of its nearest known relative.

    Args:
        name: The family.
        parents: What each family's recipe extends, "" for the root's; without a circle.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, conversion_mapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parent = parents[name]
    if name in CONFIG_MAPPING or not parent:
        return
    introduce(parent, parents)
    known = CONFIG_MAPPING[parent]
    mine = type(known.__name__, (known,), {"model_type": name, "__module__": known.__module__})
    AutoConfig.register(name, mine)
    mapping: Any = AutoModelForImageTextToText._model_mapping  # the one place that has all classes by their configs
    # Its name is taken, and has to be the one that the model's class wants.
    AutoModelForImageTextToText.register(mine, mapping[known], exist_ok=True)
    renamed = conversion_mapping.get_checkpoint_conversion_mapping(parent)  # type: ignore[no-untyped-call]  # untyped there
    if renamed is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(name, renamed)


def native_type(config: Any) -> str:
    """The model type under which transformers itself has a config's class, or the class that it is made from."""
    from transformers.models.auto import configuration_auto

    module: Any = configuration_auto  # the table of its own families is not among what it exports
    types = (str(getattr(kind, "model_type", "")) for kind in type(config).__mro__)
    return next((name for name in types if name in module.CONFIG_MAPPING_NAMES), "")
