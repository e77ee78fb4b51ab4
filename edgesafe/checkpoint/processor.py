"""A checkpoint's processor for pictures and text. Shared by align and export (tier 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Makes of pictures and text what the named one makes, and wants no package that spells numbers of video frames.
_ALIKE = {"SmolVLMProcessor": "Idefics3Processor"}


def read_processor(folder: Path, model_type: str) -> Any:
    """A checkpoint's processor as transformers has it, without its part for videos.

    That part needs torchvision, which would take the place of Pillow for pictures too; nothing here looks at videos.
    """
    import transformers
    from transformers.models.auto import processing_auto

    module: Any = processing_auto  # the table is not among what it exports, and has all families only there
    name = str(module.PROCESSOR_MAPPING_NAMES.get(model_type, ""))
    name = _ALIKE.get(name, name)
    kind = getattr(transformers, name, None)
    if kind is None or not (name in _ALIKE.values() or "video_processor" in kind.get_attributes()):
        return transformers.AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]  # untyped there
    return _without_videos(kind).from_pretrained(folder)


def _without_videos(kind: Any) -> Any:
    """The processor class with None where its video processor would be loaded."""
    from transformers import AutoImageProcessor, AutoTokenizer

    class Pictures(kind):  # type: ignore[misc]  # which class it is, the checkpoint says
        @classmethod
        def _get_arguments_from_pretrained(cls, path: Any, processor_dict: Any = None, **_: Any) -> list[Any]:
            loaded: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
            return [loaded[name].from_pretrained(path) if name in loaded else None for name in kind.get_attributes()]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    return Pictures
