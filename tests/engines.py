"""Other engines behind the runtime's seam: onnx's reference evaluator, and one that a test can hold up between two graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from edgesafe.runtime.backend import OnnxRuntime, RunnableGraph


class ReferenceEvaluator:
    """onnx's own evaluator, in Python, slow and independent of onnxruntime."""

    name, version = "onnx-reference", "1"

    def open(self, path: str, spec: Any, threads: int) -> RunnableGraph:
        from onnx.reference import ReferenceEvaluator as Evaluator

        evaluator = Evaluator(path)

        def run(inputs: dict[str, Any]) -> dict[str, Any]:
            return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))

        return RunnableGraph(spec, run, path)


class Watched:
    """onnxruntime, telling every run of a graph: ``before(path)`` is called first, and ``ran`` lists (thread, path)."""

    name = "onnxruntime"

    def __init__(self, before: Callable[[str], None] = lambda path: None) -> None:
        self.before, self.ran, self.opened = before, [], 0
        self.version = OnnxRuntime().version

    def open(self, path: str, spec: Any, threads: int) -> RunnableGraph:
        self.opened += 1
        graph = OnnxRuntime().open(path, spec, threads)
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
