"""Plain English that no scheme is calibrated on, read by the finished bundle token by token behind a request.

Answers to familiar requests are often sure of each token, and a coarse decoder still gives them. Running text is not: there it
shows by how much the distributions over the next token have moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edgesafe.runtime.sampling import last_row
from edgesafe.runtime.session import Session
from edgesafe.runtime.tokenizer import encode_prompt
from edgesafe_export.parity_model import Probe
from edgesafe_export.scoring import Answered, Score
from edgesafe_export.tolerances import SAME_TOKENS, TEXT_NATS

# Written for this; at least 256 tokens in any vocabulary, as there are more words.
PASSAGES = (
    "The ferry leaves the small harbour at seven in the morning, and again at four when the school is out. In winter "
    "only one boat runs, because the captain's brother, who owns the second one, repairs its engine from November to "
    "March. People on the island have learned to plan their week around it: bread comes on Tuesdays, letters on "
    "Thursdays, and the doctor every other Friday if the wind allows.",
    "To make a simple soup for four people, cut two onions, three carrots and a stick of celery into small pieces. Warm "
    "a spoon of oil in a large pot, add the vegetables and stir them for about ten minutes, until the onions are soft "
    "but not brown. Pour in one litre of water, add a cup of red lentils and half a teaspoon of salt, and let it simmer "
    "for twenty-five minutes.",
    "Question: A train travels 180 kilometres in two hours, stops for 30 minutes, and then needs one more hour for the "
    "last 75 kilometres. What is its average speed over the whole journey?\nAnswer: The whole distance is 180 + 75 = 255 "
    "kilometres. The whole time is 2 + 0.5 + 1 = 3.5 hours. So the average speed is 255 / 3.5, which is about 73 "
    "kilometres per hour.",
    "Dear Ms Okafor, thank you for your letter of 12 May about the broken lamp. We are sorry that it arrived in this "
    "state. A new one has been sent today and should reach you within three working days; you need not return the old "
    "one. If anything else is missing, please call us between nine and five. Kind regards, the service team.",
    'def mean(values):\n    """The average of some numbers."""\n    if not values:\n        raise '
    'ValueError("there are no values")\n    total = 0.0\n    for value in values:\n        total += value\n    return '
    "total / len(values)\n",
    "Rivers carry more than water. Every year they move billions of tons of sand and clay from the mountains to the sea, "
    "and where the current slows down, this load sinks to the ground. Over thousands of years a delta grows. Its soil is "
    "rich, so farmers settle there early; but it is also low and flat, which makes it one of the first places to be "
    'flooded when the sea rises. I asked an old farmer whether he was afraid. "No," he said, "but my children are, '
    'and they are right."',
)


def read(session: Session, request: Probe) -> Iterator[Answered]:
    """Each passage as if it were the bundle's answer to a request at the reference exit, with what the bundle gave instead."""
    (image, prompt), exit, tokenizer = request, session.manifest.reference, session.tokenizer
    cut, features = session.cut(image), session.vision_states(image, [exit])[exit]
    prompt_ids = encode_prompt(tokenizer, session.manifest, prompt, cut)
    room = session.manifest.text.context_length - len(prompt_ids)
    texts = [tokenizer.encode(text, add_special_tokens=False).ids[:room] for text in PASSAGES]
    with session.turns.enter():
        reader = session.reader(len(prompt_ids) + max(map(len, texts)))
        first = last_row(reader.read(session.merged(features, prompt_ids))).copy()
        for text, ids in zip(PASSAGES, texts, strict=True):
            reader.rewind(len(prompt_ids))
            rows = [first, *(last_row(reader.read_token(token)).copy() for token in ids[:-1])]
            yield Answered(image, prompt, exit, cut, tuple(prompt_ids), tuple(ids), text, np.stack(rows))


def figures(texts: Sequence[Answered], scores: Sequence[Score]) -> dict[str, float]:
    """How many tokens were read, the share of places where both decoders think the same token best, and the mean divergence."""
    same = np.concatenate([one.logits.argmax(axis=1) == found.best for one, found in zip(texts, scores, strict=True)])
    apart = np.concatenate([found.divergence for found in scores])
    return {"tokens": len(same), "same": round(float(same.mean()), 4), "divergence": round(float(apart.mean()), 4)}


def lost(found: dict[str, float]) -> str:
    """Why a decoder doesn't read text as its checkpoint does; an empty text where it does."""
    if found["same"] >= SAME_TOKENS and found["divergence"] <= TEXT_NATS:
        return ""
    return (
        f"plain text: {100 * found['same']:.1f} % of {found['tokens']} likeliest tokens are the checkpoint's (at least "
        f"{100 * SAME_TOKENS:.0f} %), divergence {found['divergence']:.3f} nats (at most {TEXT_NATS})"
    )
