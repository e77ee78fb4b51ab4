"""A fork after a session was opened: what it asks there is refused, what it never touches does no harm, and nothing waits.

Each case runs in a process of its own, whose child ends by itself or is killed, so that a hang fails the test and nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from handmade import ANSWER

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
# Long for a child that does nothing heavy, and short for a suite in which one of them hangs.
LONGEST_S = 60
FRAME = """
import asyncio, gc, multiprocessing, os, signal, sys, threading, warnings
import numpy as np
from edgesafe import Session
from edgesafe.errors import ClosedError
warnings.simplefilter("ignore")  # Python's own advice on forks of processes with threads
BLACK = np.zeros((8, 8, 3), np.uint8)
def refused(work):
    try:
        work()
    except ClosedError as error:
        assert error.exit_code == 73 and "a fork of it" in str(error) and "after the fork" in str(error), error
        return
    raise AssertionError("not refused")
session = Session.open(sys.argv[1], threads=2)
session.ask(BLACK, "what?")
{before}
sys.stdout.flush()
child = os.fork()
if child == 0:
    signal.alarm({seconds})
{inside}
    print("child ended", flush=True)
    {leave}
_, status = os.waitpid(child, 0)
{parent}
print("status", os.waitstatus_to_exitcode(status), session.ask(BLACK, "what?").text, flush=True)
{end}
"""


def forked(handmade, inside: str, *, before: str = "", parent: str = "", leave: str = "sys.exit(0)", end: str = "") -> str:
    """Standard output of a process that opens, forks, and answers again when its child has ended."""
    parts = {"before": textwrap.dedent(before), "parent": textwrap.dedent(parent), "leave": leave, "end": end}
    code = FRAME.format(inside=textwrap.indent(textwrap.dedent(inside).strip(), "    "), seconds=LONGEST_S // 2, **parts)
    done = subprocess.run(
        [sys.executable, "-c", code, str(handmade)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=LONGEST_S,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done.stdout


# A C library whose farewell never returns. onnxruntime's waits so in most children, but not in all of them.
STUCK = 'import ctypes; ctypes.CDLL(None)["__cxa_atexit"](ctypes.CDLL(None).pause, None, None)'
GOOD = f"child ended\nstatus 0 {ANSWER}\n"
ENTRIES = (
    'session.ask(BLACK, "what?")',
    'session.stream(BLACK, "what?")',
    'session.ask_async(BLACK, "what?")',
    "session.conversation(BLACK)",
    "session.vision_states(BLACK, [1])",
    'session.answer_features(features, "what?")',
    "list(session.tokens(features, [1, 2], 3))",
    "session.run_exits(session.look(BLACK), [1])",
    "session.reader(8)",
    'session.graph("vision/head.onnx")',
    'kept.run({"hidden_states": np.zeros((1, 5, 4), np.float32)})',
    "next(stream)",
    "stream.answer",
    'talk.ask("why?")',
    'talk.stream("why?")',
    "pending.result()",
    "asyncio.run(wait())",
)
BEFORE = """
talk = session.conversation(BLACK)
talk.ask("what?")
(features,) = session.vision_states(BLACK, [1]).values()
kept = session.graph("vision/head.onnx")
stream = session.stream(BLACK, "what?")
next(stream)
pending = session.ask_async(BLACK, "what?")  # it waits for the stream
async def wait():
    await pending
"""
READ = "list(stream); pending.result()"


def test_every_entry_is_refused_in_the_child_and_the_parent_goes_on(handmade):
    refusals = "\n".join(f"refused(lambda: {call})" for call in ENTRIES)
    assert forked(handmade, refusals, before=BEFORE, parent=READ) == GOOD


@pytest.mark.parametrize(
    "inside",
    [
        "pass",
        "stream.close(); pending.cancel(); session.close()",
        "session = talk = stream = pending = kept = None; gc.collect()",
    ],
)
def test_a_child_that_asks_nothing_ends_in_peace(handmade, inside):
    assert forked(handmade, inside, before=BEFORE, parent=READ) == GOOD


def test_a_child_does_not_wait_for_the_farewell_of_a_library(handmade):
    assert forked(handmade, "signal.alarm(5)", before=STUCK, end="os._exit(0)") == GOOD


@pytest.mark.parametrize(("leave", "status"), [("sys.exit(3)", 3), ("os._exit(4)", 4), ("raise SystemExit", 0)])
def test_a_child_ends_with_its_own_status(handmade, leave, status):
    assert f"status {status} " in forked(handmade, "pass", leave=leave)


def test_what_a_child_wrote_through_c_is_not_lost(handmade):
    out = forked(handmade, 'import ctypes; ctypes.CDLL(None).puts(b"through C")')
    assert "through C" in out


def test_a_child_opens_a_session_of_its_own_and_so_does_its_child(handmade):
    inside = """
    refused(lambda: session.ask(BLACK, "what?"))
    own = Session.open(sys.argv[1], threads=2)
    assert own.ask(BLACK, "what?").text == own.ask_async(BLACK, "what?").result(20).text
    grandchild = os.fork()
    if grandchild == 0:
        refused(lambda: own.ask(BLACK, "what?"))
        with Session.open(sys.argv[1], threads=2) as third:
            third.ask(BLACK, "what?")
        sys.exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 5
    own.close()
    """
    assert forked(handmade, inside) == GOOD


def test_a_fork_while_another_thread_asks(handmade):
    before = """
    ended = threading.Event()
    def ask():
        while not ended.is_set():
            session.ask(BLACK, "what?")
    thread = threading.Thread(target=ask)
    thread.start()
    """
    inside = 'refused(lambda: session.ask(BLACK, "what?")); session.close(); session = None; gc.collect()'
    parent = """
    for _ in range(20):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            refused(lambda: session.ask_async(BLACK, "what?"))
            session.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ended.set()
    thread.join()
    """
    assert forked(handmade, inside, before=before, parent=parent, leave="os._exit(0)") == GOOD


def test_a_worker_of_multiprocessing_is_told_and_ends(handmade):
    inside = "pass"
    parent = """
    def work(_):
        refused(lambda: session.ask(BLACK, "what?"))
        with Session.open(sys.argv[1], threads=1) as own:
            return own.ask(BLACK, "what?").text == "Z\u00e91\u20ac."
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(work, range(4)) == [True] * 4
    """
    assert forked(handmade, inside, parent=parent) == GOOD


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("edgesafe.runtime.opened._keep_graphs.__code__", "session = None; gc.collect()"),
        ("edgesafe.runtime.turns.check_process.__code__", 'refused(lambda: session.ask(BLACK, "what?"))'),
        ("edgesafe.runtime.ort._leave_at_once.__code__", "pass"),
    ],
)
def test_these_checks_fail_without_what_they_check(handmade, place, wrong):
    before = f"import edgesafe.runtime.ort\n{place} = (lambda *_: None).__code__\n{STUCK}"
    try:
        out = forked(handmade, f"signal.alarm(5)\n{wrong}", before=before, end="os._exit(0)")
    except AssertionError:
        return
    assert out != GOOD
