"""A session used from several threads: one ask at a time, in order, cancelled within a token, closed from anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref

import numpy as np
import pytest

import edgesafe.runtime.turns as turns_module
from edgesafe import Session
from edgesafe.errors import BusyError, CancelledError, ClosedError, InputError, UncertifiedExitError
from edgesafe.runtime import Cancel, Progress
from edgesafe.runtime.turns import Turn, Turns
from engines import Watched
from handmade import ANSWER
from mutants import wrong

BLACK = np.zeros((8, 8, 3), np.uint8)
DECODER = "text/decoder_model_merged.onnx"


@pytest.fixture
def session(handmade, gate):
    with Session.open(handmade, engine=Watched(gate)) as opened:
        yield opened


@pytest.fixture
def refusing(handmade, gate):
    with Session.open(handmade, engine=Watched(gate), when_busy="refuse") as opened:
        yield opened


def in_threads(count, work):
    """What work(i) returned or raised in each of so many threads."""
    out = [None] * count

    def run(i):
        try:
            out[i] = work(i)
        except Exception as error:
            out[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return out


def runs_by_ask(session):
    """The graphs in the order they ran, cut where another thread took over."""
    ran = session.engine.ran
    cuts = [i for i in range(1, len(ran)) if ran[i][0] != ran[i - 1][0]]
    return [[name for _, name in ran[a:b]] for a, b in zip([0, *cuts], [*cuts, len(ran)], strict=True)]


def asks_do_not_interleave(handmade):
    """Four threads ask at once; every graph of an ask runs before the first one of the next."""
    with Session.open(handmade, engine=Watched(lambda path: time.sleep(0.001))) as session:
        answers = in_threads(4, lambda i: session.ask(BLACK, "what?", exit=1 + i % 2))
        assert [a.text for a in answers] == [ANSWER] * 4 and [str(a.exit) for a in answers] == ["1", "2", "1", "2"]
        parts = runs_by_ask(session)
    assert len(parts) == 4
    for names in parts:
        vision = [name for name in names if name.startswith("vision/")]
        blocks = [f"vision/blocks_0{d}-0{d + 1}.onnx" for d in range(len(vision) - 1)]
        assert vision == [*blocks, "vision/head.onnx"] and len(names) == len(vision) + 2 * 9


def test_asks_of_four_threads_do_not_interleave(handmade):
    asks_do_not_interleave(handmade)


def test_that_check_fails_where_nobody_waits(handmade, monkeypatch):
    waiting = "self._changed.wait_for(lambda: self._closed or turn.cancel.cancelled or self._line[0] is turn)"
    monkeypatch.setattr(Turns, "wait", wrong(Turns.wait, (waiting, "pass")))
    with pytest.raises(AssertionError):
        asks_do_not_interleave(handmade)


def test_asks_are_answered_in_the_order_of_asking(session, gate):
    done = []
    first = session.ask_async(BLACK, "what?")
    gate.reached()
    later = [session.ask_async(BLACK, "what?", progress=lambda p, i=i: done.append(i)) for i in range(5)]
    gate.go()
    assert [p.result(60).text for p in (first, *later)] == [ANSWER] * 6
    assert list(dict.fromkeys(done)) == [0, 1, 2, 3, 4] and done == sorted(done)


def test_a_refusing_session_says_busy_and_answers_again_later(refusing, gate):
    pending = refusing.ask_async(BLACK, "what?")
    gate.reached()
    for ask in (refusing.ask, refusing.stream, refusing.ask_async):
        with pytest.raises(BusyError) as caught:
            ask(BLACK, "what?")
    assert caught.value.exit_code == 71 and not pending.done()
    gate.go()
    assert pending.result(60).text == ANSWER == refusing.ask(BLACK, "what?").text


def asks_are_handed_over_in_line(session, monkeypatch):
    """Two threads ask at once, and the first to stand in line would be the second to reach the worker."""
    submit, overtaken = session.worker.submit, threading.Event()

    def slow(work):
        if threading.current_thread().name == "first":
            overtaken.wait(1)
        done = submit(work)
        overtaken.set()
        return done

    monkeypatch.setattr(session.worker, "submit", slow)
    out = []
    first = threading.Thread(target=lambda: out.append(session.ask_async(BLACK, "what?")), name="first")
    first.start()
    while not session.turns._line:
        time.sleep(0.01)
    out.append(session.ask_async(BLACK, "what?"))
    first.join(60)
    try:
        assert [pending.result(5).text for pending in out] == [ANSWER] * 2
    finally:
        for pending in out:
            pending.cancel()


def test_two_threads_handing_over_at_once_do_not_wait_for_each_other(session, gate, monkeypatch):
    gate.go()
    asks_are_handed_over_in_line(session, monkeypatch)


def test_that_check_fails_where_standing_in_line_and_handing_over_are_two_steps(session, gate, monkeypatch):
    gate.go()
    session.handing_over = contextlib.nullcontext()
    with pytest.raises(TimeoutError):
        asks_are_handed_over_in_line(session, monkeypatch)


def test_what_to_do_when_busy_is_one_of_two(handmade):
    with pytest.raises(InputError, match="when_busy"):
        Session.open(handmade, when_busy="panic")


def cancel_stops_within_a_token(session, gate):
    cancel = Cancel()
    pending = session.ask_async(BLACK, "what?", cancel=cancel)
    gate.reached()
    cancel.cancel()
    gate.go()
    with pytest.raises(CancelledError) as caught:
        pending.result(60)
    assert caught.value.exit_code == 72
    # The third run was held up while it was cancelled, so it ended and no fourth one began; nine is the whole answer.
    assert [name for _, name in session.engine.ran].count(DECODER) == 3


def test_cancel_from_another_thread_stops_within_a_token(session, gate):
    cancel_stops_within_a_token(session, gate)
    assert session.ask(BLACK, "what?").text == ANSWER


def test_that_check_fails_where_cancel_is_not_looked_at(session, gate, monkeypatch):
    monkeypatch.setattr(Turn, "step", wrong(Turn.step, ("self.check()", "pass")))
    with pytest.raises(BaseException):  # noqa: B017  (pytest's own Failed is no Exception)
        cancel_stops_within_a_token(session, gate)


def test_cancel_ends_an_ask_that_waits_in_line(session, gate):
    running = session.ask_async(BLACK, "what?")
    gate.reached()
    waiting = threading.Event()
    cancel, raised = Cancel(), []

    def ask():
        waiting.set()
        with pytest.raises(CancelledError) as caught:
            session.ask(BLACK, "what?", cancel=cancel)
        raised.append(caught.value)

    thread = threading.Thread(target=ask)
    thread.start()
    waiting.wait(60)
    cancel.cancel()
    thread.join(60)
    assert raised and not running.done()  # it didn't have to wait for the one ahead
    gate.go()
    assert running.result(60).text == ANSWER


def test_a_cancel_that_was_used_ends_the_next_ask_too_and_leaves_the_line(session, gate):
    gate.go()
    cancel = Cancel()
    cancel.cancel()
    for _ in range(2):
        with pytest.raises(CancelledError):
            session.ask(BLACK, "what?", cancel=cancel)
    assert session.engine.ran == [] and session.ask(BLACK, "what?").text == ANSWER


def test_progress_counts_graphs_and_tokens(session, gate):
    gate.go()
    told = []
    session.ask(BLACK, "what?", exit=2, progress=told.append)
    assert told[:3] == [Progress("vision", i, 3) for i in (1, 2, 3)]
    assert told[3:] == [Progress("decode", i, 48) for i in range(1, 10)]


def test_a_callback_that_raises_ends_the_ask_alone(session, gate):
    gate.go()

    def broken(progress):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.ask(BLACK, "what?", progress=broken)
    assert session.ask(BLACK, "what?").text == ANSWER


def test_a_wrong_ask_gives_its_turn_up(session, gate):
    gate.go()
    for options in ({"max_new_tokens": 0}, {"exit": 9}):
        with pytest.raises(InputError):
            session.ask(BLACK, "what?", **options)
        with pytest.raises(InputError):
            session.ask_async(BLACK, "what?", **options).result(60)
    with pytest.raises(UncertifiedExitError):
        session.ask_async(BLACK, "what?", exit=3).result(60)
    assert session.ask(BLACK, "what?").text == ANSWER


def test_a_thread_does_not_wait_for_its_own_stream(session, gate):
    gate.go()
    with session.stream(BLACK, "what?") as stream:
        assert next(stream) == "Z"
        with pytest.raises(BusyError, match="itself"):
            session.ask(BLACK, "what?")
        assert next(stream) == "é"
    assert session.ask(BLACK, "what?").text == ANSWER
    with pytest.raises(InputError, match="closed before"):
        _ = stream.answer


def test_a_stream_that_nobody_keeps_gives_its_turn_up(session, gate):
    gate.go()
    next(session.stream(BLACK, "what?"))
    gc.collect()
    assert session.ask(BLACK, "what?").text == ANSWER


def test_a_stream_is_cancelled_from_another_thread(session, gate):
    gate.go()
    stream = session.stream(BLACK, "what?")
    assert next(stream) == "Z"
    in_threads(1, lambda _: stream.cancel())
    with pytest.raises(CancelledError):
        _ = stream.answer
    assert session.ask(BLACK, "what?").text == ANSWER


def test_await_and_a_cancelled_task(session, gate):
    async def both():
        task = asyncio.ensure_future(asyncio.wait_for(session.ask_async(BLACK, "what?"), 60))
        await asyncio.to_thread(gate.reached)
        second = session.ask_async(BLACK, "what?")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.go()
        return await second

    assert asyncio.run(both()).text == ANSWER
    # The first was cancelled in its third run, the second ran to its end: 3 + 9.
    assert [name for _, name in session.engine.ran].count(DECODER) == 12


def test_result_times_out_and_the_ask_goes_on(session, gate):
    pending = session.ask_async(BLACK, "what?")
    gate.reached()
    with pytest.raises(TimeoutError):
        pending.result(0.01)
    gate.go()
    assert pending.result(60).text == ANSWER


def test_close_ends_what_runs_and_what_waits(session, gate):
    running = session.ask_async(BLACK, "what?")
    gate.reached()
    waiting = [session.ask_async(BLACK, "what?") for _ in range(3)]
    closer = threading.Thread(target=session.close)
    closer.start()
    gate.go()
    closer.join(60)
    assert not closer.is_alive()
    for pending in (running, *waiting):
        with pytest.raises(ClosedError):
            pending.result(60)
    for ask in (session.ask, session.stream, session.ask_async):
        with pytest.raises(ClosedError):
            ask(BLACK, "what?")
    with pytest.raises(ClosedError):
        session.vision_states(BLACK, [1])
    session.close()


def test_close_ends_an_unread_stream_and_its_own_callback_may_close(session, handmade, gate):
    gate.go()
    stream = session.stream(BLACK, "what?")
    next(stream)
    session.close()
    assert list(stream) == []
    with Session.open(handmade) as other, pytest.raises(ClosedError):
        other.ask(BLACK, "what?", progress=lambda p: other.close())
    with Session.open(handmade) as other, pytest.raises(ClosedError):
        other.ask_async(BLACK, "what?", progress=lambda p: other.close()).result(60)


def everything_is_freed(handmade):
    with Session.open(handmade) as session:
        session.ask_async(BLACK, "what?").result(60)
        graphs = [weakref.ref(graph) for graph in session._graphs.values()]
    gc.collect()
    # The session object is still there; what it held is not.
    assert len(graphs) == 6 and [g for g in graphs if g() is not None] == []
    for thread in threading.enumerate():
        if thread.name.startswith("edgesafe-ask"):
            thread.join(60)
            assert not thread.is_alive()


def test_the_context_manager_frees_every_graph_and_thread(handmade):
    everything_is_freed(handmade)


def test_that_check_fails_where_close_keeps_the_graphs(handmade, monkeypatch):
    monkeypatch.setattr(Session, "close", wrong(Session.close, ("self._graphs.clear()", "pass")))
    with pytest.raises(AssertionError):
        everything_is_freed(handmade)


def test_a_turn_is_left_once(handmade):
    turns = turns_module.Turns("wait")
    first, second = turns.enter(), turns.enter()
    first.wait()
    first.leave()
    first.leave()
    second.wait()
    second.leave()
