"""The examples that run a bundle without edgesafe, asked as a user would: in a process of their own, one question each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgesafe import Session

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "export" / "examples"
PYTHON, NODE = FOLDER / "plain_onnxruntime.py", FOLDER / "plain_onnxruntime.mjs"
_MOST_S = 120


def asked(line: list[str], bundle: Path, picture: Path, prompt: str, exit: object) -> dict[str, Any]:
    """What an example prints, ``{text, tokens}``; it runs far from the checkout and is told nothing of it."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [*line, str(bundle), str(picture), prompt, str(exit)]
    done = subprocess.run(words, cwd="/", env=clean, capture_output=True, text=True, timeout=_MOST_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def wanted(session: Session, picture: Path, prompt: str, exit: object) -> dict[str, Any]:
    """The same of a session: its answer's text, and the tokens that it is made of."""
    from edgesafe.runtime.tokenizer import encode_prompt

    answer = session.ask(picture, prompt, exit=str(exit))
    (features,) = session.vision_states(picture, [str(exit)]).values()
    tokens = list(session.tokens(features, encode_prompt(session.tokenizer, session.manifest, prompt), 48))
    return {"text": answer.text.strip(), "tokens": tokens}


def python(script: Path = PYTHON) -> list[str]:
    """The command line of the Python example; ``-I`` keeps the working folder and the user's packages out."""
    return [sys.executable, "-I", str(script)]
