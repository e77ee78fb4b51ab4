"""Whole greedy answers of every family's float graphs, against transformers' own path: processor, generate, decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgesafe.format.exits import Exit
from edgesafe.runtime import decode
from edgesafe.runtime.session import Session
from edgesafe_export import parity_model as parity
from edgesafe_export.export import write
from tiny_families import NAMES, truncated

PAIRS, SHALLOW_PAIRS, NEW_TOKENS = 50, 10, 16
ASKS = (
    "What is this?",
    "Describe  the picture.",
    " How do I make it?",
    "na\u00efve caf\u00e9 \u20ac5 \u2713",
    "line\nbreak",
    "the user: x, my assistant: y",
    "What colour is it?\n\nSay.",
    "a",
    "Read the words. ",
    "Which one,\tleft or right?",
)
Said = tuple[list[int], str]  # an answer's ids, its end token included, and its text


def pairs(side: int) -> list[parity.Probe]:
    """Different pictures, sized as a tile, wide, tall, tiny, large or anyhow, each with its own prompt."""
    rng = np.random.default_rng(5)
    rows = []
    for i in range(PAIRS):
        anyhow = (int(rng.integers(1, 3 * side)), int(rng.integers(1, 3 * side)))
        tiny, wide, tall = (1 + i % 7, 1 + i % 5), (3 * side, side // 2), (side // 3, 2 * side)
        size = [(side, side), wide, tall, tiny, (5 * side, 4 * side), anyhow][i % 6]
        # Blotches with noise on them: noise alone is grey once a large picture is made small.
        blotches = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
        ask = ASKS[i % len(ASKS)]
        rows.append((Image.blend(blotches, noise, 0.3), f"{ask} {i}" if i % 2 else f"{i}: {ask}"))
    return rows


def generated(family: Any, image: Image.Image, prompt: str, **layer: int) -> Said:
    """What transformers answers, reading the layer that the checkpoint's config names, or else the one given."""
    inputs = parity.processed(family, image, prompt)
    with torch.no_grad():
        out = family.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **layer)
    ids = out[0, inputs["input_ids"].shape[1] :].tolist()
    # The one thing that the runtime leaves out is white space at the start.
    return ids, family.processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()


def asked(session: Session, image: Image.Image, prompt: str, exit: Exit) -> Said:
    """What the bundle answers; the ids are kept too, for bytes that spell no character all look alike as text."""
    ids: list[int] = []
    generate = decode.generate

    def kept(*args: Any) -> Any:
        for token in generate(*args):
            ids.append(token)
            yield token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "generate", kept)
        answer = session.ask(image, prompt, exit=exit, max_new_tokens=NEW_TOKENS)
    return ids, answer.text


@dataclass(frozen=True)
class Judged:
    """A family's session, its pairs, and what transformers says to them at the reference."""

    family: Any
    session: Session
    rows: list[parity.Probe]
    want: list[Said]

    def wrong(self, want: list[Said], exit: Exit, edit: Callable[[str], str] = str) -> list[int]:
        """The pairs that the bundle answers otherwise than `want`; `edit` changes the prompt before the bundle sees it."""
        rows = enumerate(zip(self.rows, want, strict=False))
        return [i for i, ((image, prompt), said) in rows if asked(self.session, image, edit(prompt), exit) != said]


@pytest.fixture(scope="module", params=["llava", *NAMES])
def judged(request, cases, tmp_path_factory) -> Judged:
    case = cases(request.param)
    write(case.job, folder := tmp_path_factory.mktemp("answers") / "b", case.parts, {"vision": "fp32", "text": "fp32"}, {})
    rows = pairs(case.family.geometry.image_size)
    want = [generated(case.family, image, prompt) for image, prompt in rows]
    return Judged(case.family, parity.open_session(folder), rows, want)


# The two best logits never tie here: over all families the closest lie 2.7e-5 of the largest logit apart, the graphs' own
# differences are about 1e-6 of it. So the answers have to be equal, every one of them.
def test_fifty_answers_are_transformers_own(judged):
    assert judged.wrong(judged.want, judged.family.geometry.reference) == []
    assert np.median([len(ids) for ids, _ in judged.want]) == NEW_TOKENS
    assert len({tuple(ids) for ids, _ in judged.want}) > PAIRS // 4  # a random model's answers are alike now and then
    assert len({image.size for image, _ in judged.rows}) > PAIRS // 4 and len({prompt for _, prompt in judged.rows}) == PAIRS


def test_a_shallow_exit_answers_as_the_truncated_model(judged):
    with truncated(judged.family, 1) as layer:
        want = [generated(judged.family, image, prompt, **layer) for image, prompt in judged.rows[:SHALLOW_PAIRS]]
    assert judged.wrong(want, 1) == []
    assert want != judged.want[:SHALLOW_PAIRS] and judged.wrong(want, 2)


def test_an_exit_one_block_off_is_seen(judged):
    assert judged.wrong(judged.want, Exit(judged.family.geometry.reference_depth - 1))


def test_white_space_joined_in_the_prompt_is_seen(judged):
    assert judged.wrong(judged.want, judged.family.geometry.reference, lambda prompt: " ".join(prompt.split()))


def test_a_part_of_the_picture_left_out_is_seen(judged, monkeypatch):
    look = judged.session.look

    def less(image: Image.Image, exit: Exit | None = None) -> Any:
        """The first tile is the last one again; where there are no tiles, the upper half is the lower one again."""
        pixels = look(image, exit)
        if isinstance(pixels, list):
            return [pixels[-1], *pixels[1:]]
        half = pixels.shape[2] // 2
        return np.concatenate([pixels[:, :, half:], pixels[:, :, half:]], axis=2)

    monkeypatch.setattr(judged.session, "look", less)
    assert judged.wrong(judged.want, judged.family.geometry.reference)
