"""Does the bundle compute what transformers computes? At every exit depth, or there is no bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edgesafe.errors import ParityError
from edgesafe.progress import bar
from edgesafe.runtime.session import Session
from edgesafe_export.family import Llava
from edgesafe_export.tolerances import ANSWER_AGREEMENT, ANSWER_AGREEMENT_ONE_EXIT, FLOAT_RELATIVE

Probe = tuple[Image.Image, str]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference over the largest wanted magnitude.

    >>> relative(np.array([1.0, 2.5]), np.array([1.0, 2.0]))
    0.25
    """
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-12))


def probes(suite_rows: Sequence[tuple[Image.Image, str]], count: int, side: int) -> list[Probe]:
    """Pictures and requests to compare on: the suite's, spread evenly, or noise pictures where there is no suite."""
    if suite_rows:
        step = max(1, len(suite_rows) // count)
        return list(suite_rows[::step][:count])
    rng = np.random.default_rng(0)
    asks = ("What is this?", "How do I make this?", "Describe the picture.", "What does it say?")
    return [(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)), asks[i % 4]) for i in range(min(count, 8))]


def check_features(family: Llava, session: Session, rows: Sequence[Probe], shift: int = 0) -> dict[int, float]:
    """Float graphs against transformers' `vision_feature_layer=d`: {exit depth: largest relative error}.

    Args:
        family: the checkpoint.
        session: the float bundle, opened.
        rows: probes; the first four are used.
        shift: added to the oracle's depth; anything but 0 must fail (the tests use it).

    Raises:
        ParityError: a depth beyond `FLOAT_RELATIVE`.
    """
    depths = session.bundle.manifest.depths
    worst = dict.fromkeys(depths, 0.0)
    for image, _ in rows[:4]:
        pixels = family.processor.image_processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
        states = session.vision_states(image, depths)
        for d in depths:
            want = family.oracle(pixels, max(1, d + shift) if d + shift != d else d).numpy()
            worst[d] = max(worst[d], relative(np.asarray(states[d]), want))
    for d, error in worst.items():
        if not error <= FLOAT_RELATIVE:
            raise ParityError(
                f"exit {d} differs from transformers by {error:.2e}",
                where="vision graphs",
                expected=f"at most {FLOAT_RELATIVE:.0e} relative",
                todo="report this checkpoint's config",
            )
    return worst


@torch.no_grad()
def check_text(family: Llava, session: Session, rows: Sequence[Probe], max_new_tokens: int = 12) -> int:
    """Whole greedy answers of the float graphs against transformers' generate at the reference depth.

    Returns:
        How many answers were compared (all equal).

    Raises:
        ParityError: an answer that differs.
    """
    depth = session.bundle.manifest.reference_depth
    for image, prompt in rows[:4]:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = family.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = family.processor(images=[image.convert("RGB")], text=text, return_tensors="pt")
        out = family.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        want = family.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        got = session.answer_features(session.vision_states(image, [depth])[depth], prompt, max_new_tokens).strip()
        if got != want:
            raise ParityError(
                f"the answer is {got!r}, transformers says {want!r}",
                where="text graphs",
                expected="the same answer",
                todo="report this checkpoint's config",
            )
    return len(rows[:4])


def answers(session: Session, rows: Sequence[Probe], max_new_tokens: int, label: str) -> dict[int, list[str]]:
    """Greedy answers of a bundle to every probe at every exit."""
    depths = session.bundle.manifest.depths
    said: dict[int, list[str]] = {d: [] for d in depths}
    for image, prompt in bar(rows, len(rows), label):
        states = session.vision_states(image, depths)
        for d in depths:
            said[d].append(session.answer_features(states[d], prompt, max_new_tokens))
    return said


def agreement(want: dict[int, list[str]], got: dict[int, list[str]]) -> dict[int, float]:
    """Share of equal answers, by exit.

    >>> agreement({1: ["a", "b"]}, {1: ["a", "c"]})
    {1: 0.5}
    """
    return {d: float(np.mean([w == g for w, g in zip(want[d], got[d], strict=True)])) for d in want}


def agrees(by_exit: dict[int, float]) -> bool:
    """Whether a quantization scheme keeps the float graphs' answers."""
    return float(np.mean(list(by_exit.values()))) >= ANSWER_AGREEMENT and min(by_exit.values()) >= ANSWER_AGREEMENT_ONE_EXIT


def open_session(folder: Path) -> Session:
    """A bundle that is still being written, opened without a certificate."""
    return Session.open(folder, allow_uncertified=True)


Check = Callable[[Session], dict[str, Any]]
