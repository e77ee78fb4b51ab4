"""Several questions about one picture, which is looked at and read once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgesafe.errors import InputError
from edgesafe.runtime import decode
from edgesafe.runtime.choose import Prediction
from edgesafe.runtime.decode import Array, Reader
from edgesafe.runtime.options import MAX_NEW_TOKENS, check_max_new_tokens, check_options
from edgesafe.runtime.sampling import GREEDY, Picker, Sampling
from edgesafe.runtime.tokenizer import encode_prompt

if TYPE_CHECKING:
    from edgesafe.runtime.session import Answer, AnswerStream, Session

# A later question's time rests on what is left to read, which nothing predicts.
_LATER = Prediction(None, "none", "the picture was read before: no time was predicted")


class Conversation:
    """Asks about one picture at one exit; made by ``Session.conversation``.

    Each question is answered as ``ask`` answers it: it is put after the picture alone, never after earlier answers. The
    certificate was made so, and a history could talk a model out of its refusals. What is saved is work, not text: the
    picture's features are kept, and so is the decoder's cache of the tokens that two prompts begin with. ``reused_tokens`` says
    how many the last question found there.
    """

    def __init__(self, session: Session, pixels: Array, depth: int, prediction: Prediction) -> None:
        self.exit_depth = depth
        self.reused_tokens = 0
        self._session, self._prediction = session, prediction
        self._pixels: Array | None = pixels
        self._features: Array | None = None
        self._reader: Reader | None = None
        self._read: list[int] = []
        self._turn = 0

    def ask(self, prompt: str, *, max_new_tokens: int = MAX_NEW_TOKENS, sampling: Sampling = GREEDY) -> Answer:
        """Answer a question about the picture; see ``Session.ask``."""
        return self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling).answer

    def stream(self, prompt: str, *, max_new_tokens: int = MAX_NEW_TOKENS, sampling: Sampling = GREEDY) -> AnswerStream:
        """Like ``ask``, but yields the text as it comes; the stream before it ends here."""
        from edgesafe.runtime.session import AnswerStream

        start = time.perf_counter()
        check_max_new_tokens(max_new_tokens)
        check_options(None, sampling)
        ids = encode_prompt(self._session.tokenizer, self._session.manifest, prompt)
        prediction = self._prediction if self._features is None else _LATER
        self._turn += 1
        tokens = self._tokens(ids, max_new_tokens, sampling, self._turn)
        return AnswerStream(self._session.answer_of(tokens, self.exit_depth, sampling, prediction, start))

    def _tokens(self, ids: list[int], limit: int, sampling: Sampling, turn: int) -> Iterator[int]:
        self._check(turn)
        reader, logits = self._continue(ids, limit)
        for token in decode.generate(reader, logits, self._session.manifest.text, limit, Picker(sampling, ids).pick):
            yield token
            self._check(turn)

    def _check(self, turn: int) -> None:
        if turn != self._turn:
            raise InputError("another question was asked before this answer had ended", todo="read an answer to its end")

    def _continue(self, ids: list[int], limit: int) -> tuple[Reader, Array]:
        """Read what the cache doesn't hold yet of a prompt; its logits."""
        if self._features is None:
            assert self._pixels is not None
            self._features = self._session.run_exits(self._pixels, [self.exit_depth])[self.exit_depth]
            self._pixels = None
        if self._reader is None:
            self._reader = self._session.reader(len(ids) + limit)
        # The last token is read in any case: the answer begins with what the decoder says to it.
        kept = min(common_prefix(self._read, ids), len(ids) - 1)
        self._read = ids[:kept]
        self._reader.rewind(kept)
        self._reader.reserve(min(len(ids) + limit, self._session.manifest.text.context_length))
        logits = self._reader.read(self._session.merged(self._features, ids)[:, kept:])
        self._read, self.reused_tokens = ids, kept
        return self._reader, logits


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two prompts begin with alike.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5]), common_prefix([1], [1, 2])
    (2, 1)
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
