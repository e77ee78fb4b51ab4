"""Questions about one picture, which is encoded and read once; a plain request is a conversation of one question."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypedDict, Unpack

from edgesafe.errors import InputError
from edgesafe.format.exits import Exit
from edgesafe.format.specs import ExitSpec
from edgesafe.format.suite import MAX_NEW_TOKENS
from edgesafe.format.tiles import Cut
from edgesafe.runtime import decode
from edgesafe.runtime.answer import Answer, AnswerStream
from edgesafe.runtime.choose import Budget, allowed_exits, check_max_new_tokens
from edgesafe.runtime.deadline import Course, run_anytime, trunks
from edgesafe.runtime.engine import Array, Reader, State
from edgesafe.runtime.forecast import DECODE, PREPROCESS, WAIT, Forecast
from edgesafe.runtime.image import Picture, is_encoded, load_picture, picture_size
from edgesafe.runtime.opened import OpenedBundle
from edgesafe.runtime.sampling import GREEDY, Picker, Sampling
from edgesafe.runtime.scope import reasons_outside
from edgesafe.runtime.threads import check_measured
from edgesafe.runtime.tokenizer import TextStream, check_fits, fits, unchecked_ids
from edgesafe.runtime.turns import Cancel, Progress, Turn

# A prompt's ids as exits read it, by their number of visual tokens or tiles (`Exit.fewer`).
Prompts: TypeAlias = Mapping[int | None, list[int]]
_READ_BEFORE = "the picture was read before: no time was predicted"


class QuestionOptions(TypedDict, total=False):
    """The options of each question; see ``Options``."""

    max_new_tokens: int
    sampling: Sampling
    cancel: Cancel | None
    progress: Callable[[Progress], None] | None


class AskOptions(QuestionOptions, total=False):
    """The options of a request or a conversation beside its budget; see ``Options``."""

    exit: Exit | int | str | None
    max_image_tokens: int | None
    allow_uncertified: bool


@dataclass(frozen=True)
class Options:
    """The options of a request beside its picture and its prompt.

    Args:
        budget: Take the deepest certified exit that fits, predicted at first and by the clock between vision
            segments; without one, the deepest certified. Its times count from the call, waiting for the turn
            included. Its ``max_new_tokens`` counts where it is smaller.
        exit: Take this exit instead: an exit, its depth or its text.
        max_image_tokens: Take no exit that makes more tokens of the picture; it is refused where there is none.
        allow_uncertified: Use an exit without a passed verdict; the answer then says so.
        max_new_tokens: The answer's longest length in tokens. An answer longer than was certified says that it isn't.
        sampling: How tokens are picked and which texts end the answer. Exits are certified on greedy answers, by default;
            others say so.
        cancel: Ends the request from another thread, within one token.
        progress: Called between steps, in the asking thread; what it raises ends the request.
    """

    budget: Budget | None = None
    exit: Exit | int | str | None = None
    max_image_tokens: int | None = None
    allow_uncertified: bool = False
    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: Sampling = GREEDY
    cancel: Cancel | None = None
    progress: Callable[[Progress], None] | None = None

    def check(self) -> None:
        """Refuse options that no request can be made with.

        Raises:
            InputError: A length, a budget or a sampling is not one.
        """
        check_max_new_tokens(self.max_new_tokens)
        if self.max_image_tokens is not None:
            check_max_new_tokens(self.max_image_tokens, "max_image_tokens")
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise InputError(f"{self.budget!r} is not a budget", expected="Budget(ttft_ms=...)")
        if not isinstance(self.sampling, Sampling):
            raise InputError(f"{self.sampling!r} is not a sampling", expected="Sampling(temperature=...)")

    def for_question(self, **changes: Unpack[QuestionOptions]) -> Options:
        """The same but for one question's changes.

        Raises:
            TypeError: A change is not one that a question may make.
        """
        wrong = sorted(changes.keys() - QuestionOptions.__annotations__.keys())
        if wrong:
            raise TypeError(f"a question of a conversation has no option {wrong[0]!r}")
        return replace(self, **changes)

    @property
    def limit(self) -> int:
        """The answer's longest length: the smaller one of the request's and its budget's."""
        of_budget = self.budget.max_new_tokens if self.budget is not None else None
        return min(self.max_new_tokens, of_budget or self.max_new_tokens)


@dataclass(frozen=True)
class _Question:
    """A prompt and its ids, the answer's length, how tokens are picked, and the request's course and turn."""

    prompt: str
    ids: Prompts
    limit: int
    sampling: Sampling
    course: Course
    turn: Turn


class Conversation:
    """Asks about one picture at one exit; made by ``Session.conversation``.

    Each question is answered as ``ask`` answers it: it is put after the picture alone, never after earlier answers. The
    certificate was made so, and a history could talk a model out of its refusals. What is saved is work, not text: the
    picture's features are kept, and so is the decoder's cache of the tokens that two prompts begin with. ``reused_tokens`` says
    how many the last question found there, and ``prompt_tokens`` of how many.

    The first question looks at the picture, within its budget, and the exit that it takes is every later one's: until then
    ``exit`` is None. Each question takes its own turn, from any thread; a later one's time to the first token rests on
    what is left to read, which nothing predicts, but its budget's ``total_ms`` still ends it in time.
    """

    def __init__(self, session: OpenedBundle, image: Picture, options: Options) -> None:
        self.reused_tokens = self.prompt_tokens = 0
        self._session, self._options = session, options
        self._image: Any = image  # a Picture, until it is encoded
        self._taken: ExitSpec | None = None
        self._features: State = None
        self._cuts: dict[int | None, Cut] = {}  # by the exits' tiles
        self._reader: Reader | None = None
        self._read: list[int] = []

    @property
    def exit(self) -> Exit | None:
        """The exit that answers, once the picture is encoded."""
        return self._taken.exit if self._taken else None

    def ask(self, prompt: str, **options: Unpack[QuestionOptions]) -> Answer:
        """Answer a question about the picture; see ``Session.ask``. Options that it doesn't name are the conversation's."""
        return self.stream(prompt, **options).answer

    def stream(self, prompt: str, **options: Unpack[QuestionOptions]) -> AnswerStream[Answer]:
        """Like ``ask``, but yields the text as it comes; see ``Session.stream``."""
        start_s, asked = self._session.clock(), self._options.for_question(**options)
        turn = self._session.turns.enter(asked.cancel, asked.progress)
        return self.begin(turn, start_s, prompt, asked)

    def check(self) -> None:
        """Refuse options that no question could be asked with; each question checks its own.

        Raises:
            InputError, UncertifiedExitError, ClosedError: As by ``Session.ask``.
        """
        self._session.turns.check_open()
        self._options.check()
        self._allowed(self._options)

    def begin(self, turn: Turn, start_s: float, prompt: str, asked: Options) -> AnswerStream[Answer]:
        """Check the options, wait for the turn and begin; whatever goes wrong, the turn is given up.

        Args:
            turn: The question's place in the line.
            start_s: The session's clock at the call.
            prompt: The question.
            asked: Its options.
        """
        session = self._session
        try:
            asked.check()
            image = self._image  # before the cut: another thread may be about to let go of the picture
            kinds = {exit.tiles: exit for exit in session.manifest.ladder}
            self._cuts = self._cuts or {tiles: session.cut(image, exit) for tiles, exit in kinds.items()}
            exits, why = self._allowed(asked)
            ids = self._encoded(prompt, self._seen(exits))
            exits = [spec for spec in exits if spec.exit.fewer in ids]
            turn.wait()
            seen = self._seen(exits)
            if seen[0].fewer not in ids:  # another thread's question has taken an exit at which this one doesn't fit
                self._encoded(prompt, seen)
            course = Course(
                self._forecast(ids, next((exit for exit in seen if exit.whole), seen[-1])),
                session.correction,
                asked.budget,
                clock=session.clock,
                start_s=start_s,
                tokens=asked.limit,
                runs=session.runs,
                fewer=self._fewer(ids, exits) if self._taken is None else {},
            )
            course.actual_ms[WAIT] = course.elapsed_ms
            course.why = why if self._taken is None else "the picture was already encoded"
            pixels = self._open_picture(course, exits) if self._taken is None else None
            if course.planned_exit is not None:
                exits = [spec for spec in exits if spec.exit.tiles == course.planned_exit.tiles]
            question = _Question(prompt, ids, asked.limit, asked.sampling, course, turn)
            return AnswerStream(self._answer(question, exits, pixels), turn, session.tuning.cores)
        except BaseException:
            turn.leave()
            raise

    def forget(self) -> None:
        """Free what was kept; the session calls it when it closes."""
        self._features = self._reader = self._image = None

    def _allowed(self, asked: Options) -> tuple[list[ExitSpec], str]:
        session, allow = self._session, asked.allow_uncertified or self._session.allow_uncertified
        exit = Exit.of(asked.exit) if asked.exit is not None else None
        certificate, most = session.certificate, asked.max_image_tokens
        return allowed_exits(session.bundle, certificate, session.standing, asked.budget, exit, allow, most, self._cuts)

    def _seen(self, exits: list[ExitSpec]) -> list[Exit]:
        """The exits that may answer: the one that was taken, or these."""
        return [spec.exit for spec in exits] if self._taken is None else [self._taken.exit]

    def _encoded(self, prompt: str, exits: list[Exit]) -> Prompts:
        """A prompt's ids at those of these exits that leave the context room for an answer; one at least, or it is refused."""
        session, kinds = self._session, {exit.fewer: exit for exit in exits}
        ids = {
            fewer: unchecked_ids(session.tokenizer, session.manifest, prompt, self._cuts[exit.tiles], exit)
            for fewer, exit in kinds.items()
        }
        shortest = min(ids, key=lambda fewer: len(ids[fewer]))
        capped = ", or ask at an exit that sees less of it (exit=, max_image_tokens=)"
        more = capped if None in ids and len(ids) == 1 and any(not exit.whole for exit in session.certified) else ""
        check_fits(ids[shortest], session.manifest, self._cuts[kinds[shortest].tiles], more)
        return {fewer: one for fewer, one in ids.items() if fits(one, session.manifest)}

    def _fewer(self, ids: Prompts, exits: list[ExitSpec]) -> dict[int, Forecast]:
        """The times of the shorter prompts that exits with fewer visual tokens or tiles read, by their number."""
        fewer = {spec.exit.fewer: spec.exit for spec in exits}
        return {count: self._forecast(ids, exit) for count, exit in fewer.items() if count is not None}

    def _forecast(self, ids: Prompts, exit: Exit) -> Forecast:
        """The times of the prompt that an exit reads, and of its tiles."""
        length = len(ids[exit.fewer])
        whole = self._session.predict(length, self._cuts[exit.tiles].tiles)
        if self._taken is not None:
            return whole.only(DECODE, _READ_BEFORE)
        height, width = picture_size(self._image)
        return whole.for_picture(height * width, is_encoded(self._image))

    def _open_picture(self, course: Course, exits: list[ExitSpec]) -> State:
        """The pixels, and the plan that the budget allows."""
        session = self._session
        if course.budget is not None:
            check_measured(course.forecast, course.budget, session.bundle)
        # A picture is decoded when it is its turn, so that a line of requests holds no line of pictures in memory.
        if len({spec.exit.tiles for spec in exits}) == 1:
            pixels = course.timed(PREPROCESS, lambda: session.look(self._image, exits[0].exit))
            if course.budget is not None:
                course.plan(exits)
            return pixels
        picture = course.timed(PREPROCESS, lambda: load_picture(self._image))
        planned = course.plan(exits)  # without a budget there is one exit
        return course.timed(PREPROCESS, lambda: session.look(picture, planned))

    def _look(self, question: _Question, exits: list[ExitSpec], pixels: State) -> None:
        """Run the vision side as deep as the clock allows, and keep what it gave."""
        ran: list[str] = []
        most = max(len(spec.graphs) for spec in exits)

        def run(path: str, state: State) -> State:
            out = question.course.timed(path, lambda: self._run(path, state, question.turn))
            ran.append(path)
            question.turn.step("vision", len(ran), most)
            return out

        trunk, state = run_anytime(trunks(exits), run, pixels, question.course.goes_on)
        taken = question.course.settle([spec for spec in exits if spec.exit.depth == trunk.exit.depth])
        for path in taken.graphs[len(trunk.graphs) :]:
            state = run(path, state)
        self._features = self._session.joined(state, self._cuts[taken.exit.tiles])
        self._taken, self._image = taken, None  # at last: what ends the request before leaves the picture to the next one

    def _run(self, path: str, state: State, turn: Turn) -> State:
        """One vision graph, which a cancelled request leaves between two tiles."""
        if not isinstance(state, list):
            return self._session.run_vision_graph(path, state)
        out = []
        for tile in state:
            turn.check()
            out.append(self._session.run_vision_graph(path, tile))
        return out

    def _answer(self, question: _Question, exits: list[ExitSpec], pixels: State) -> Generator[str | Answer, None, None]:
        """The answer's pieces, then the answer."""
        session, course = self._session, question.course
        question.turn.check()
        if pixels is not None:
            self._look(question, exits, pixels)
        assert self._taken is not None
        ids = question.ids[self._taken.exit.fewer]
        text, reason, made, said = TextStream(session.tokenizer, question.sampling.stop), "length", 0, 0
        tokens = self._tokens(question, ids)
        while made == 0 or not course.out_of_time(len(ids) + made):
            token = course.timed_token(len(ids) + made, lambda: next(tokens, None))
            if token is None:
                break
            made += 1
            question.turn.step("decode", made, question.limit)
            ended = token in session.manifest.text.eos_token_ids
            said += not ended
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
        outside = reasons_outside(session.scope, question.sampling, said, question.prompt)
        yield self._result(text.text, reason, course, outside)

    def _tokens(self, question: _Question, ids: list[int]) -> Iterator[int]:
        """The answer's ids; the first of them costs reading the prompt."""
        reader, logits = self._continue(ids, question.limit)
        pick = Picker(question.sampling, ids).pick
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
        self._read, self.reused_tokens, self.prompt_tokens = ids, kept, len(ids)
        return self._reader, logits

    def _result(self, text: str, reason: str, course: Course, outside: list[str]) -> Answer:
        """The answer with all that is known about how it came about; ``outside`` is why its exit's verdict is not its own."""
        assert self._taken is not None
        total_ms, exit = course.elapsed_ms, self._taken.exit
        return Answer(
            text=text,
            finish_reason=reason,
            exit=exit,
            certified=exit in self._session.certified and not outside,
            predicted_ttft_ms=course.predicted_ttft_ms(self._taken.graphs),
            prediction=course.forecast.source,
            ttft_ms=course.ttft_ms,
            total_ms=total_ms,
            note=self._session.notes(exit, course.forecast, outside),
            why=course.why,
            planned_exit=course.planned_exit,
            deadline_met=course.deadline_met(total_ms),
            predicted_ms=course.predicted_ms(self._taken.graphs),
            actual_ms=course.actual_ms,
            reference=self._session.manifest.reference,
            estimated_for=course.forecast.device,
            source=self._session.bundle.source,
        )


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two prompts begin with alike.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5]), common_prefix([1], [1, 2])
    (2, 1)
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
