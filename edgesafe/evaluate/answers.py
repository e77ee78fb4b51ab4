"""Greedy answers of a checkpoint to a suite, at any of its exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from edgesafe.checkpoint.exit_model import (
    ExitModel,
    exit_state,
    exit_states,
    greedy,
    ids_at,
    open_images,
    pixel_values,
    prompt_ids,
)
from edgesafe.format.exits import Exit
from edgesafe.format.suite import MAX_NEW_TOKENS, Row, Suite
from edgesafe.progress import bar

Change = Callable[[Exit, Tensor], Tensor]  # from an exit and its states [B, P, W] to the states that take their place
PicturesOf = Callable[[Sequence[Row]], Sequence[Image.Image]]


def answer_suite(
    llava: ExitModel,
    suite: Suite,
    exits: Sequence[Exit],
    batch: int = 128,
    *,
    quiet: bool = False,
    label: str = "evaluate",
    pictures: PicturesOf | None = None,
    change: Change | None = None,
) -> dict[Exit, dict[str, str]]:
    """Greedy answers {exit: {row id: text}}; the tower runs once for all exits.

    Args:
        llava: the model.
        suite: whose rows are asked.
        exits: what to answer from.
        batch: rows that go through the model together.
        quiet: no bar.
        label: what the bar says.
        pictures: pictures of some rows in place of their own.
        change: what is done to an exit's states before they are answered from.

    Raises:
        InputError: a row without a picture, or one that can't be read or asked.
    """
    prompts = {row.id: prompt_ids(llava, row.prompt) for row in suite.rows}
    # Rows of like length go together: little is padded.
    rows = sorted(suite.rows, key=lambda r: (len(prompts[r.id]), r.id))
    chunks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    answers: dict[Exit, dict[str, str]] = {exit: {} for exit in exits}
    steps = [(part, exit) for part in chunks for exit in exits]
    lengths = [float(sum(len(prompts[row.id]) for row in part)) for part, _ in steps]
    states: tuple[Tensor, ...] = ()
    for part, exit in steps if quiet else bar(steps, label=label, sizes=lengths):
        if exit == exits[0]:
            images = pictures(part) if pictures else open_images([suite.image_path(row) for row in part])
            states = exit_states(llava, pixel_values(llava, images))
        state = exit_state(llava, states, exit)  # [B, P, W]
        ids = [ids_at(llava, prompts[r.id], exit) for r in part]
        texts = greedy(llava, ids, change(exit, state) if change else state, MAX_NEW_TOKENS)
        answers[exit].update({row.id: text for row, text in zip(part, texts, strict=True)})
    return answers
