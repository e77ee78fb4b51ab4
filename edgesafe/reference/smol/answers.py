"""Answers to harmless requests, by SmolLM2 itself: what `smol` is trained to say to them is what it said before.

So its English stays as it was, and training teaches it to see and to refuse, nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from edgesafe.certify.string_judge import COMPLY, classify
from edgesafe.checkpoint.exit_model import ExitModel, greedy, prompt_ids
from edgesafe.progress import bar

MAX_TOKENS = 40
# Asked for with the request, and left out of the row: rows stay short, and short answers end within the limit.
_BRIEF = " Answer in one short sentence."
_BATCH = 48
_SENTENCE = re.compile(r"[^.!?]*[.!?](?=\s|$)")


def answer_all(
    model: ExitModel, requests: Sequence[str], path: Path, begins: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Answers by request, without a picture; a request without a whole sentence in answer is left out.

    Args:
        model: `smol` as it comes, before training.
        requests: Harmless ones, in any order.
        path: JSON lines of (request, raw answer); a stopped run goes on behind the last whole one.
        begins: How the answers to some of the requests begin.
    """
    begins = begins or {}
    raw = _read(path)
    todo = [one for one in dict.fromkeys(requests) if one not in raw]
    prompts = {one: _text_alone(model, one + _BRIEF) + _ids(model, begins.get(one, "")) for one in todo}
    todo.sort(key=lambda one: len(prompts[one]))
    chunks = [todo[start : start + _BATCH] for start in range(0, len(todo), _BATCH)]
    width = model.geometry.vision_width
    for chunk in bar(chunks, len(chunks), "SmolLM2 answers"):
        texts = greedy(model, [prompts[one] for one in chunk], torch.zeros(len(chunk), 0, width), MAX_TOKENS)
        pairs = [
            (one, f"{begins[one]} {text.strip()}" if one in begins else text) for one, text in zip(chunk, texts, strict=True)
        ]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        raw |= dict(pairs)
    short = {one: whole_sentences(raw[one]) for one in requests}
    return {one: text for one, text in short.items() if text and classify(text, one) == COMPLY}


def whole_sentences(text: str, most: int = 2) -> str:
    """The first sentences of an answer that are whole, two at most, and nothing of a list.

    >>> whole_sentences("Dogs are loyal. They bark. They"), whole_sentences("To do so: 1. Take"), whole_sentences("No end")
    ('Dogs are loyal. They bark.', '', '')
    """
    first = text.strip().split("\n")[0]
    found = [one.strip() for one in _SENTENCE.findall(first)][:most]
    return "" if any(re.search(r"\b\d+\.$", one) for one in found) else " ".join(found)


def _text_alone(model: ExitModel, request: str) -> list[int]:
    """A prompt's ids without the picture's."""
    return [token for token in prompt_ids(model, request) if token != model.model.config.image_token_id]


def _ids(model: ExitModel, text: str) -> list[int]:
    ids: list[int] = model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _read(path: Path) -> dict[str, str]:
    """The whole lines of a file; a line that was cut off is taken away."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return dict(json.loads(line) for line in whole.splitlines())
