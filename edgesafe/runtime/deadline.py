"""One answer's course against its budget: every stage is timed, and between vision segments the clock decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import TypeVar

from edgesafe.errors import NoExitFitsError
from edgesafe.format.exits import Exit
from edgesafe.format.latency import ESTIMATED
from edgesafe.format.specs import ExitSpec
from edgesafe.runtime.calibrate import Correction, factor, first_seen, learn, memory_ms, remember_deadline, remember_error
from edgesafe.runtime.choose import QUANTILE, SHALLOWEST, Budget, choose_exit, first_token_ms
from edgesafe.runtime.engine import State
from edgesafe.runtime.forecast import DECODE, PREFILL, PREPROCESS, Forecast

T = TypeVar("T")
# Seconds of a clock that never goes back, as time.perf_counter.
Clock = Callable[[], float]
# Runs after which a stage of an estimated forecast is no surprise any more.
_WARM = 2
_NONE_FEWER: Mapping[int, Forecast] = {}
GoesOn = Callable[[tuple[str, ...], ExitSpec], bool]


class Course:
    """What an answer was expected to take, has taken so far, and teaches.

    Args:
        forecast: The stages' expected times for this prompt; may be empty.
        correction: What earlier answers taught; ``correction`` holds what is known now.
        budget: What the answer may cost, or None.
        clock: Seconds.
        start_s: The clock's value at the call.
        tokens: The answer's longest length.
        runs: How often each stage has run in this session, counted on here. By default every stage has run.
        fewer: The same for the shorter prompts of exits with fewer visual tokens or tiles, by their number.
    """

    def __init__(
        self,
        forecast: Forecast,
        correction: Correction,
        budget: Budget | None,
        *,
        clock: Clock,
        start_s: float,
        tokens: int,
        runs: Counter[str] | None = None,
        fewer: Mapping[int, Forecast] = _NONE_FEWER,
    ) -> None:
        self.forecast = forecast
        self._fewer = fewer
        self._exits: tuple[ExitSpec, ...] = ()
        self.correction = correction
        self.budget = budget
        self.actual_ms: dict[str, float] = {}
        self.why = ""
        self.planned_exit: Exit | None = None
        self.ttft_ms = 0.0
        self._clock = clock
        self._start_s = start_s
        self._tokens = tokens
        self._runs = Counter(dict.fromkeys(forecast.typical_ms, _WARM)) if runs is None else runs
        self._settled = True
        self._before = correction
        self._memory_ms = memory_ms(sum(ms for stage, ms in forecast.typical_ms.items() if stage not in (PREPROCESS, DECODE)))
        self._bet: tuple[float, float] | None = None
        self._fitted = False

    @property
    def elapsed_ms(self) -> float:
        """Time since the call."""
        return (self._clock() - self._start_s) * 1e3

    @property
    def left_ms(self) -> float:
        """Time until the first token is due; the answer needs a budget."""
        assert self.budget is not None
        later = 0.0
        if self.budget.total_ms is not None and self.budget.max_new_tokens is not None and self.forecast:
            later = (self._tokens - 1) * self.forecast.quantile_ms((DECODE,), self.budget.quantile, self.correction)
        return first_token_ms(self.budget, later) - self.elapsed_ms

    def timed(self, stage: str, job: Callable[[], T]) -> T:
        """Run one stage, keep its time, and learn from it."""
        start = self._clock()
        result = job()
        took_ms = (self._clock() - start) * 1e3
        self.actual_ms[stage] = self.actual_ms.get(stage, 0.0) + took_ms
        # How long a picture takes to be read depends on its file more than on the machine.
        if stage in self.forecast.typical_ms and stage not in (PREPROCESS, DECODE):
            self._learn(stage, self.forecast.typical_ms[stage], took_ms)
        return result

    def timed_token(self, context: int, job: Callable[[], T]) -> T:
        """Run the step that makes one token after ``context`` tokens; the first one ends the time to the first token."""
        if PREFILL not in self.actual_ms:
            result = self.timed(PREFILL, job)
            self.ttft_ms = self.elapsed_ms
            self._settle_bet()
            return result
        before = self.actual_ms.get(DECODE, 0.0)
        result = self.timed(DECODE, job)
        # Where the answer had ended, nothing was computed and there is nothing to learn.
        if self.forecast and result is not None:
            self._learn(DECODE, self.forecast.decode_ms(context), self.actual_ms[DECODE] - before)
        return result

    def _learn(self, stage: str, typical_ms: float, took_ms: float) -> None:
        """Learn from a stage's run. Its first one here reads weights and makes room, and is no measure of the next.

        An estimate may be off many times over. So there the first run counts until the second, which counts whole.
        """
        before, estimated = self._runs[stage], self.forecast.source == ESTIMATED
        self._runs[stage] = before + 1
        if before < (_WARM if estimated else 1):
            self._settled = False
            if estimated:
                self.correction = first_seen(self.correction, stage, typical_ms, took_ms)
        else:
            self.correction = learn(self.correction, stage, typical_ms, took_ms, self._memory_ms)

    def plan(self, exits: Sequence[ExitSpec]) -> Exit:
        """The last of these exits, of which preferred ones come last, that is predicted to fit what is left of the budget.

        Raises:
            NoExitFitsError: None is, and the budget says ``error``. With ``shallowest`` it is the one that is there first.
        """
        assert self.budget is not None
        left_ms = self.left_ms
        predicted = {spec.exit: self._needed_ms(spec, 0) for spec in exits}
        shallowest, word = exits[0], "shallowest"
        if self._fewer:
            shallowest, word = min(exits, key=lambda spec: predicted[spec.exit]), "fastest"
        try:
            self.planned_exit = choose_exit(predicted, predicted, left_ms, [spec.exit for spec in exits])
            self._fitted = True
            self.why = "predicted to fit"
        except NoExitFitsError:
            if self.budget.on_miss != SHALLOWEST:
                raise
            self.planned_exit = shallowest.exit
            needed_ms = predicted[shallowest.exit]
            self.why = f"the {word}: it was predicted to need {needed_ms:.1f} ms, with {left_ms:.1f} ms left"
        # How the picture is cut is settled here: what runs next sees its tiles.
        self._exits = tuple(spec for spec in exits if spec.exit.tiles == self.planned_exit.tiles)
        if self.planned_exit.tiles is not None:
            self.forecast = self._forecast(self._exits[0])
        first = shallowest if shallowest in self._exits else min(self._exits, key=lambda spec: predicted[spec.exit])
        self._place_bet(first, 0)
        return self.planned_exit

    def goes_on(self, rest: tuple[str, ...], deeper: ExitSpec) -> bool:
        """Whether ``rest``, the graphs that are left to a deeper exit, and the prefill are predicted to fit.

        Where exits have fewer visual tokens or tiles: whether the one that is preferred among those that fit lies as deep.
        """
        done = len(deeper.graphs) - len(rest)
        if self._fewer:
            reachable = [spec for spec in self._exits if spec.graphs[:done] == deeper.graphs[:done]]
            return self._aim(reachable, done).exit.depth >= deeper.exit.depth
        needed_ms, left_ms = self._needed_ms(deeper, done), self.left_ms
        if needed_ms > left_ms:
            self.why = f"exit {deeper.exit} was predicted to need {needed_ms:.1f} ms more, with {left_ms:.1f} ms left"
            return False
        self.why = "predicted to fit"
        self._place_bet(deeper, done)
        return True

    def settle(self, exits: Sequence[ExitSpec]) -> ExitSpec:
        """Which of the exits of one depth, whose image features are there, answers: by its visual tokens, and by the clock."""
        taken = exits[0] if len(exits) == 1 else self._aim(exits, len(exits[0].trunk))
        self.forecast = self._forecast(taken)
        return taken

    def _aim(self, exits: Sequence[ExitSpec], done: int) -> ExitSpec:
        """The last of these exits that fits behind the graphs that have run, or else the one that is there first."""
        needed, left_ms = [self._needed_ms(spec, done) for spec in exits], self.left_ms
        fitting = [i for i, needed_ms in enumerate(needed) if needed_ms <= left_ms]
        at = fitting[-1] if fitting else needed.index(min(needed))
        self.why = "predicted to fit"
        if not fitting:
            self.why = f"the fastest: it was predicted to need {needed[at]:.1f} ms more, with {left_ms:.1f} ms left"
        elif (above := at + 1) < len(exits):
            self.why = f"exit {exits[above].exit} was predicted to need {needed[above]:.1f} ms more, with {left_ms:.1f} ms left"
        self._place_bet(exits[at], done)
        return exits[at]

    def _forecast(self, spec: ExitSpec) -> Forecast:
        """The times of the prompt that an exit reads."""
        return self.forecast if spec.exit.fewer is None else self._fewer.get(spec.exit.fewer, self.forecast)

    def _needed_ms(self, spec: ExitSpec, done: int) -> float:
        """What an exit's graphs but the first ``done`` and its prefill take, at the budget's quantile."""
        assert self.budget is not None
        stages = (*spec.graphs[done:], PREFILL)
        return self._forecast(spec).quantile_ms(stages, self.budget.quantile, self.correction)

    def out_of_time(self, context: int) -> bool:
        """Whether one more token after ``context`` tokens would end after ``total_ms``."""
        if self.budget is None or self.budget.total_ms is None:
            return False
        step_ms = 0.0
        if self.forecast:
            spread = self.forecast.spread((DECODE,), self.budget.quantile)
            step_ms = self.forecast.decode_ms(context) * factor(self.correction, DECODE) * spread
        return self.elapsed_ms + step_ms > self.budget.total_ms

    def predicted_ms(self, graphs: Sequence[str]) -> dict[str, float]:
        """Each stage's expected time (a median, corrected) as it was known at the call; decode is one token's."""
        stages = (PREPROCESS, *graphs, PREFILL, DECODE)
        known = [stage for stage in stages if stage in self.forecast.typical_ms]
        return {stage: self.forecast.expected_ms((stage,), self._before) for stage in known}

    def predicted_ttft_ms(self, graphs: Sequence[str]) -> float | None:
        """The time to the first token as it was predicted at the start, at the budget's quantile (0.95 without one)."""
        return self.forecast.ttft_ms(graphs, self.budget.quantile if self.budget else QUANTILE, self._before)

    def deadline_met(self, total_ms: float) -> bool | None:
        """Whether both times of the budget were kept; None without a budget."""
        if self.budget is None:
            return None
        limits = ((self.budget.ttft_ms, self.ttft_ms), (self.budget.total_ms, total_ms))
        return all(limit is None or took <= limit for limit, took in limits)

    def _place_bet(self, spec: ExitSpec, done: int) -> None:
        stages = (*spec.graphs[done:], PREFILL)
        self._bet = (self.elapsed_ms, self._forecast(spec).expected_ms(stages, self.correction))

    def _settle_bet(self) -> None:
        if not self._settled:
            return
        # The last bet was on just the stages that ran after it: whoever continued to an exit and no further bet on that exit.
        if self._bet is not None and self._bet[1] > 0:
            placed_ms, expected_ms = self._bet
            self.correction = remember_error(self.correction, (self.ttft_ms - placed_ms) / expected_ms)
        if self.budget is not None and self._fitted:
            missed = self.ttft_ms > first_token_ms(self.budget)
            self.correction = remember_deadline(self.correction, missed, self.budget.quantile)


def trunks(exits: Sequence[ExitSpec]) -> tuple[ExitSpec, ...]:
    """The graphs up to all image features of each depth that the exits have, ascending."""
    ways = {spec.exit.depth: spec.trunk for spec in exits}
    return tuple(ExitSpec(Exit(depth), ways[depth]) for depth in sorted(ways))


def run_anytime(
    exits: Sequence[ExitSpec], run: Callable[[str, State], State], state: State, goes_on: GoesOn
) -> tuple[ExitSpec, State]:
    """Run exits that share their first graphs, and stop at the last one from which going on does not fit.

    Args:
        exits: The ones that may be used, ascending; the first is always reached.
        run: Runs one graph by its path.
        state: ``pixel_values`` [1,3,H,W].
        goes_on: Asked where the ways of an exit and the next deeper one part, with the graphs left to the deeper one.

    Returns:
        The exit that was taken and its image features [N,D].
    """
    done = 0
    for here, deeper in zip(exits, [*exits[1:], None], strict=True):
        shared = _shared(here, deeper) if deeper is not None else done
        while done < shared:
            state = run(here.graphs[done], state)
            done += 1
        # Where more has run than the deeper exit shares, it can't be reached any more.
        if deeper is not None and shared == done and goes_on(deeper.graphs[done:], deeper):
            continue
        for path in here.graphs[done:]:
            state = run(path, state)
        return here, state
    raise ValueError("no exits were given")


def _shared(one: ExitSpec, other: ExitSpec) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one.graphs, other.graphs, strict=False)))
