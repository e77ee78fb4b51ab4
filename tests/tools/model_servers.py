"""Other people's OpenAI-style servers as processes: llama-cpp-python's and that of transformers, each with its own python."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Words = Sequence[str | Path | int]


def llama_cpp(python: Path, model: Path, name: str, port: int) -> Words:
    """The command of llama-cpp-python's server over a GGUF file, with one thread."""
    limits = ["--n_ctx", 1024, "--n_threads", 1, "--n_threads_batch", 1]
    return [python, "-m", "llama_cpp.server", "--model", model, "--model_alias", name, "--port", port, *limits]


def transformers(python: Path, model: Path, port: int) -> Words:
    """The command of `transformers serve` over a checkpoint's folder; it needs fastapi, uvicorn and the openai package."""
    code = "from transformers.cli.transformers import main; main()"
    return [python, "-c", code, "serve", model, "--port", port, "--device", "cpu"]


@contextlib.contextmanager
def served(words: Words, port: int, log: Path, env: Mapping[str, str] | None = None, seconds: float = 300) -> Iterator[str]:
    """The server while the block runs; gives the API's address."""
    with log.open("ab") as out:
        given = {**os.environ, **(env or {})}
        process = subprocess.Popen(list(map(str, words)), stdout=out, stderr=subprocess.STDOUT, env=given)
        try:
            _wait(f"http://127.0.0.1:{port}", process, log, seconds)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Until the server answers anything at all."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended: see {log}")
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=30).read()
            return
        except urllib.error.HTTPError:
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"the server does not answer: see {log}")
