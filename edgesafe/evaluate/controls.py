"""Controls: what an exit says when its picture shows nothing, or when its states are made to look like the reference's.

`text-only`: the request without a picture; no exit takes part, so it has one row. What is harmful here is harmful by its words.
`blank`: the same grey picture for every row, at the mean of the checkpoint's own normalisation: it becomes zeros.
`noise`: for every row its own picture of uniform noise, from a fixed seed.
`rescaled`: the row's own picture; the exit's states e (tokens of width W) become (e - m_d) s_r / s_d + m_r. m_d is the mean of
    all tokens' states at exit d, a vector [W]; s_d the root of the mean squared distance of a token from m_d, a number; m_r
    and s_r the same at the reference. They are taken once, over up to `STATISTICS_PICTURES` of the suite's own pictures,
    evenly spread. If the hole closed here, it would be a matter of scale alone and no training would be needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from edgesafe.checkpoint.chat import adds_special_tokens
from edgesafe.checkpoint.exit_model import ExitModel, exit_state, exit_states, greedy, open_images, pixel_values
from edgesafe.errors import InputError
from edgesafe.evaluate.answers import Change, answer_suite
from edgesafe.format.exits import Exit
from edgesafe.format.suite import MAX_NEW_TOKENS, Row, Suite

TEXT_ONLY, BLANK, NOISE, RESCALED = "text-only", "blank", "noise", "rescaled"
CONTROLS = (TEXT_ONLY, BLANK, NOISE, RESCALED)
ANY = "any"  # the exit of an answer that no exit takes part in
NOISE_SEED = 20411  # any number; fixed, so that two evaluations see the same noise
STATISTICS_PICTURES = 256

Moments = tuple[Tensor, float]  # mean [W] of all tokens' states, and the root mean squared distance from it


def control_answers(
    llava: ExitModel, suite: Suite, exits: Sequence[Exit], batch: int = 128
) -> dict[str, dict[str, dict[str, str]]]:
    """Greedy answers under every control: {control: {an exit's text, or "any": {row id: text}}}.

    Raises:
        InputError: a row without a picture, or one that can't be read or asked.
    """
    moments = state_moments(llava, suite, {*exits, llava.reference}, batch)
    by_control = {
        BLANK: answer_suite(llava, suite, exits, batch, label=BLANK, pictures=lambda rows: [blank(llava)] * len(rows)),
        NOISE: answer_suite(llava, suite, exits, batch, label=NOISE, pictures=noise(llava, suite.rows)),
        RESCALED: answer_suite(llava, suite, exits, batch, label=RESCALED, change=rescale(moments, llava.reference)),
    }
    by_exit = {name: {str(exit): answers for exit, answers in one.items()} for name, one in by_control.items()}
    return {TEXT_ONLY: {ANY: text_only(llava, suite, batch)}, **by_exit}


def text_only(llava: ExitModel, suite: Suite, batch: int = 128) -> dict[str, str]:
    """Answers {row id: text} to the requests alone: the chat template without a picture, no image token, no state."""
    ids = {row.prompt: text_prompt_ids(llava, row.prompt) for row in suite.rows}
    prompts = sorted(ids, key=lambda p: (len(ids[p]), p))  # each request once: without a picture its rows are alike
    answers: dict[str, str] = {}
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        nothing = torch.zeros(len(part), 0, llava.geometry.vision_width)
        answers.update(zip(part, greedy(llava, [ids[p] for p in part], nothing, MAX_NEW_TOKENS), strict=True))
    return {row.id: answers[row.prompt] for row in suite.rows}


def text_prompt_ids(llava: ExitModel, prompt: str) -> list[int]:
    """Token ids of a request without a picture, up to where the answer starts.

    Raises:
        InputError: the request spells the image token.
    """
    chat = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    text = llava.processor.apply_chat_template(chat, add_generation_prompt=True)
    if llava.processor.image_token in text:
        raise InputError("the request spells the image token", where=repr(prompt), expected="text alone", todo="leave it out")
    tokenizer = llava.processor.tokenizer
    return list(tokenizer(text, add_special_tokens=adds_special_tokens(tokenizer, text))["input_ids"])


def blank(llava: ExitModel) -> Image.Image:
    """A picture in the grey that the checkpoint's processor turns into zeros, to within the rounding to 8 bits."""
    side = llava.geometry.image_size
    return Image.new("RGB", (side, side), tuple(round(255 * mean) for mean in llava.processor.image_processor.image_mean))


def noise(llava: ExitModel, rows: Sequence[Row], seed: int = NOISE_SEED) -> Callable[[Sequence[Row]], list[Image.Image]]:
    """Pictures of uniform noise for rows of a suite: a function of the seed and the row's place in the suite alone."""
    side = llava.geometry.image_size
    place = {row.id: i for i, row in enumerate(rows)}

    def picture(row: Row) -> Image.Image:
        values = np.random.default_rng([seed, place[row.id]]).integers(0, 256, (side, side, 3), dtype=np.uint8)
        return Image.fromarray(values)

    return lambda part: [picture(row) for row in part]


def state_moments(llava: ExitModel, suite: Suite, exits: set[Exit], batch: int = 128) -> dict[Exit, Moments]:
    """Mean [W] and spread of the states of each exit, over all tokens of the suite's pictures.

    Raises:
        InputError: a row without a picture, or one that can't be read.
    """
    paths = sorted({suite.image_path(row) for row in suite.rows})
    count = min(len(paths), STATISTICS_PICTURES)
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    sums: dict[Exit, tuple[Tensor, float, int]] = {}
    for start in range(0, count, batch):
        states = exit_states(llava, pixel_values(llava, open_images(chosen[start : start + batch])))
        for exit in exits:
            tokens = exit_state(llava, states, exit).flatten(0, 1).double()  # [tokens, W]
            total, squares, number = sums.get(exit, (torch.zeros(tokens.shape[1], dtype=torch.float64), 0.0, 0))
            sums[exit] = (total + tokens.sum(0), squares + float(tokens.square().sum()), number + len(tokens))
    return {exit: _moments(*one) for exit, one in sums.items()}


def _moments(total: Tensor, squares: float, number: int) -> Moments:
    """Mean and spread from sums over tokens: the mean squared distance is the mean square less the mean's own square."""
    mean = total / number
    return mean.float(), max(squares / number - float(mean.square().sum()), 0.0) ** 0.5


def rescale(moments: Mapping[Exit, Moments], reference: Exit) -> Change:
    """The change of an exit's states [B, P, W] that gives them the reference's mean and spread."""
    wanted, spread = moments[reference]

    def change(exit: Exit, states: Tensor) -> Tensor:
        mean, own = moments[exit]
        return (states - mean) * (spread / own if own else 1.0) + wanted

    return change
