"""Questions about one picture, which is looked at and read once; a plain ask is a conversation of one question."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgesafe.format.manifest import ExitSpec
from edgesafe.format.tiles import Cut
from edgesafe.runtime import decode
from edgesafe.runtime import threads as tune
from edgesafe.runtime.allowed import allowed_exits
from edgesafe.runtime.answer import Answer
from edgesafe.runtime.asking import AnswerStream
from edgesafe.runtime.choose import Budget
from edgesafe.runtime.deadline import Course, run_anytime
from edgesafe.runtime.decode import Array, Reader, State
from edgesafe.runtime.forecast import DECODE, PREPROCESS, WAIT, Forecast
from edgesafe.runtime.image import Picture
from edgesafe.runtime.options import MAX_NEW_TOKENS, check_max_new_tokens, check_options
from edgesafe.runtime.sampling import GREEDY, Picker, Sampling
from edgesafe.runtime.tokenizer import TextStream, encode_prompt
from edgesafe.runtime.turns import Cancel, Progress, Turn

if TYPE_CHECKING:
    from edgesafe.runtime.session import Session

_READ_BEFORE = "the picture was read before: no time was predicted"


@dataclass(frozen=True)
class _Question:
    """A prompt's ids, the answer's longest length, how tokens are picked, and the ask's course and turn."""

    ids: list[int]
    limit: int
    sampling: Sampling
    course: Course
    turn: Turn


class Conversation:
    """Asks about one picture at one exit; made by ``Session.conversation``.

    Each question is answered as ``ask`` answers it: it is put after the picture alone, never after earlier answers. The
    certificate was made so, and a history could talk a model out of its refusals. What is saved is work, not text: the
    picture's features are kept, and so is the decoder's cache of the tokens that two prompts begin with. ``reused_tokens`` says
    how many the last question found there.

    The first question looks at the picture, within its budget, and the exit that it takes is every later one's: until then
    ``exit_depth`` is None. Each question takes its own turn, from any thread; a later one's time to the first token rests on
    what is left to read, which nothing predicts, but its budget's ``total_ms`` still ends it in time.
    """

    def __init__(self, session: Session, image: Picture, budget: Budget | None, exit_depth: int | None, allow: bool) -> None:
        self.reused_tokens = 0
        self._session, self._budget, self._asked_depth = session, budget, exit_depth
        self._allow = allow or session.allow_uncertified
        self._image: Any = image  # a Picture, until it was looked at
        self._taken: ExitSpec | None = None
        self._features: State = None
        self._cut: Cut | None = None
        self._reader: Reader | None = None
        self._read: list[int] = []

    @property
    def exit_depth(self) -> int | None:
        """The exit that answers, once the picture was looked at."""
        return self._taken.exit_depth if self._taken else None

    def ask(
        self,
        prompt: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        cancel: Cancel | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Answer:
        """Answer a question about the picture; see ``Session.ask``."""
        return self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling, cancel=cancel, progress=progress).answer

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        cancel: Cancel | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> AnswerStream[Answer]:
        """Like ``ask``, but yields the text as it comes; see ``Session.stream``."""
        start_s = self._session.clock()
        turn = self._session.turns.enter(cancel, progress)
        return self.begin(turn, start_s, prompt, max_new_tokens, sampling)

    def begin(self, turn: Turn, start_s: float, prompt: str, max_new_tokens: int, sampling: Sampling) -> AnswerStream[Answer]:
        """Check the options, wait for the turn and begin; whatever goes wrong, the turn is given up."""
        session = self._session
        try:
            check_max_new_tokens(max_new_tokens)
            check_options(self._budget, sampling)
            limit = min(max_new_tokens, (self._budget and self._budget.max_new_tokens) or max_new_tokens)
            image = self._image  # before the cut: another thread may be about to let go of the picture
            self._cut = self._cut or session.cut(image)
            ids = encode_prompt(session.tokenizer, session.manifest, prompt, self._cut)
            exits, why = allowed_exits(session.bundle, session.certificate, self._budget, self._asked_depth, self._allow)
            turn.wait()
            course = Course(
                self._forecast(len(ids)), session.correction, self._budget, clock=session.clock, start_s=start_s, tokens=limit
            )
            course.actual_ms[WAIT] = course.elapsed_ms
            course.why = why if self._taken is None else "the picture was looked at before"
            pixels = self._open_picture(course, exits) if self._taken is None else None
            question = _Question(ids, limit, sampling, course, turn)
            return AnswerStream(self._answer(question, exits, pixels), turn, session.tuning.cores)
        except BaseException:
            turn.leave()
            raise

    def forget(self) -> None:
        """Free what was kept; the session calls it when it closes."""
        self._features = self._reader = self._image = None

    def _forecast(self, prompt_tokens: int) -> Forecast:
        whole = self._session.predict(prompt_tokens, self._cut.tiles if self._cut else 1)
        return whole if self._taken is None else whole.only(DECODE, _READ_BEFORE)

    def _open_picture(self, course: Course, exits: list[ExitSpec]) -> State:
        """The pixels, and the plan that the budget allows."""
        session = self._session
        if self._budget is not None:
            tune.check_measured(course.forecast, self._budget, session.bundle)
        # A picture is decoded when it is its turn, so that a line of asks holds no line of pictures in memory.
        pixels = course.timed(PREPROCESS, lambda: session.look(self._image))
        if self._budget is not None:
            course.plan(exits)
        return pixels

    def _look(self, question: _Question, exits: list[ExitSpec], pixels: State) -> None:
        """Run the vision side as deep as the clock allows, and keep what it gave."""
        ran: list[str] = []

        def run(path: str, state: State) -> State:
            out = question.course.timed(path, lambda: self._run(path, state, question.turn))
            ran.append(path)
            question.turn.step("vision", len(ran), len(exits[-1].graphs))
            return out

        assert self._cut is not None
        self._taken, state = run_anytime(exits, run, pixels, question.course.goes_on)
        self._features = self._session.joined(state, self._cut)
        self._image = None

    def _run(self, path: str, state: State, turn: Turn) -> State:
        """One vision graph, which a cancelled ask leaves between two tiles."""
        if not isinstance(state, list):
            return self._session.run_vision_graph(path, state)
        out = []
        for tile in state:
            turn.check()
            out.append(self._session.run_vision_graph(path, tile))
        return out

    def _answer(self, question: _Question, exits: list[ExitSpec], pixels: State) -> Generator[str | Answer, None, None]:
        """The answer's pieces, then the answer."""
        session, course, ids = self._session, question.course, question.ids
        question.turn.check()
        if pixels is not None:
            self._look(question, exits, pixels)
        text, reason, made = TextStream(session.tokenizer, question.sampling.stop), "length", 0
        tokens = self._tokens(question)
        while made == 0 or not course.out_of_time(len(ids) + made):
            token = course.timed_token(len(ids) + made, lambda: next(tokens, None))
            if token is None:
                break
            made += 1
            question.turn.step("decode", made, question.limit)
            ended = token in session.manifest.text.eos_token_ids
            if not ended and (piece := text.push(token)):
                yield piece
            if ended or text.ended:
                reason = "stop"
                break
        else:
            reason = "deadline"
        if piece := text.finish():
            yield piece
        session.correction = course.correction
        yield self._told(text.text, reason, course)

    def _tokens(self, question: _Question) -> Iterator[int]:
        """The answer's ids; the first of them costs reading the prompt."""
        reader, logits = self._continue(question.ids, question.limit)
        pick = Picker(question.sampling, question.ids).pick
        yield from decode.generate(reader, logits, self._session.manifest.text, question.limit, pick)

    def _continue(self, ids: list[int], limit: int) -> tuple[Reader, Array]:
        """Read what the cache doesn't hold yet of a prompt; its logits."""
        if self._reader is None:
            self._reader = self._session.reader(len(ids) + limit)
            self._session.talks.add(self)
        # The last token is read in any case: the answer begins with what the decoder says to it.
        kept = min(common_prefix(self._read, ids), len(ids) - 1)
        self._read = ids[:kept]
        self._reader.rewind(kept)
        self._reader.reserve(min(len(ids) + limit, self._session.manifest.text.context_length))
        logits = self._reader.read(self._session.merged(self._features, ids)[:, kept:])
        self._read, self.reused_tokens = ids, kept
        return self._reader, logits

    def _told(self, text: str, reason: str, course: Course) -> Answer:
        """The answer with all that is known about how it came about."""
        assert self._taken is not None
        total_ms, depth = course.elapsed_ms, self._taken.exit_depth
        return Answer(
            text=text,
            finish_reason=reason,
            exit_depth=depth,
            certified=depth in self._session.certified,
            predicted_ttft_ms=course.predicted_ttft_ms(self._taken.graphs),
            prediction=course.forecast.source,
            ttft_ms=course.ttft_ms,
            total_ms=total_ms,
            note=self._session.notes(depth, course.forecast),
            why=course.why,
            planned_depth=course.planned_depth,
            deadline_met=course.deadline_met(total_ms),
            predicted_ms=course.predicted_ms(self._taken.graphs),
            actual_ms=course.actual_ms,
        )


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two prompts begin with alike.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5]), common_prefix([1], [1, 2])
    (2, 1)
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
