"""Other engines behind the runtime's seam.

They are onnx's reference evaluator, one that a test can hold up between two graphs, and one whose graphs take the time that a
test says, by a clock that only they move.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgesafe import Session, runtime
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import read_certificate
from edgesafe.runtime import RunnableGraph


class ReferenceEvaluator:
    """onnx's own evaluator, in Python, slow and independent of onnxruntime."""

    name, version = "onnx-reference", "1"

    def open(self, path: str, spec: Any, threads: int) -> RunnableGraph:
        from onnx.reference import ReferenceEvaluator as Evaluator

        evaluator = Evaluator(path)

        def run(inputs: dict[str, Any]) -> dict[str, Any]:
            return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))

        return RunnableGraph(spec, run, path)


def known() -> tuple[str, str, tuple[str, ...]]:
    """What certificates and measurements know onnxruntime by, beside its name."""
    ours = runtime.OnnxRuntime()
    return ours.version, ours.build, ours.providers


class Watched:
    """onnxruntime, telling every run of a graph: ``before(path)`` is called first, and ``ran`` lists (thread, path)."""

    name = "onnxruntime"

    def __init__(self, before: Callable[[str], None] = lambda path: None) -> None:
        self.before, self.ran, self.opened = before, [], 0
        self.version, self.build, self.providers = known()

    def open(self, path: str, spec: Any, threads: int) -> RunnableGraph:
        self.opened += 1
        graph = runtime.OnnxRuntime().open(path, spec, threads)
        name = "/".join(path.replace("\\", "/").split("/")[-2:])

        def run(inputs: dict[str, Any]) -> dict[str, Any]:
            self.ran.append((threading.get_ident(), name))
            self.before(name)
            return graph.run(inputs)

        return RunnableGraph(spec, run, path)


class Gate:
    """Holds a thread up at a graph until it is let on: ``reached`` waits for it to come, ``go`` opens for good."""

    def __init__(self, path: str, nth: int = 1) -> None:
        self.path, self.left = path, nth
        self._here, self._open = threading.Event(), threading.Event()

    def __call__(self, path: str) -> None:
        if path == self.path and not self._open.is_set():
            self.left -= 1
            if self.left == 0:
                self._here.set()
                assert self._open.wait(60)

    def reached(self) -> None:
        assert self._here.wait(60)

    def go(self) -> None:
        self._open.set()


class Slow:
    """onnxruntime with a clock that stands still but for vision blocks (``block_ms`` each) and decoder runs (``step_ms``)."""

    name = "onnxruntime"

    def __init__(self, block_ms: float, step_ms: float) -> None:
        self.block_ms, self.step_ms, self.now_s = block_ms, step_ms, 0.0
        self.version, self.build, self.providers = known()

    def clock(self) -> float:
        return self.now_s

    def open(self, path: str, spec: Any, threads: int) -> RunnableGraph:
        graph, name = runtime.OnnxRuntime().open(path, spec, threads), Path(path).name

        def run(inputs: dict[str, Any]) -> dict[str, Any]:
            self.now_s += (self.block_ms * ("blocks" in name) + self.step_ms * ("decoder" in name)) / 1e3
            return graph.run(inputs)

        return RunnableGraph(spec, run, path)


def slow_session(root: Any, block_ms: float = 10.0, step_ms: float = 0.0) -> Session:
    """A session of whose graphs only vision blocks and the decoder take time."""
    bundle, engine = Bundle.open(root), Slow(block_ms, step_ms)
    return Session(bundle, read_certificate(bundle), engine=engine, clock=engine.clock)
