"""What `make bench-quality` reads and asks: 20,440 tokens in windows of 512, and 60 requests.

Three quarters of the text are torch's own documentation: .ci/constraints.txt pins its version, so that anybody reads the same.
The rest are the 60 requests with the float bundle's answers, in the model's own chat format. Calibration of a scheme must use
neither.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WINDOW, DOCUMENTS, CHAT = 512, 30, 10
ANSWER_TOKENS = 80
END = "<|im_end|>"  # SmolLM2's, behind an answer
_FOLDERS = ("distributed", "nn", "optim", "utils")  # of torch
_WORDS, _EVERY = 40, 3  # least words of a paragraph, and every how many-th is read
_CODE = re.compile(r">>>|:math:|::|\\|\||```|\.\. |Args:|Returns:")
# "Write one sentence about dogs." and so on: what must be spoken of, and words that show it. "It" would be too easy to come by.
SUBJECTS = {
    "dogs": "dog companion pet",
    "the moon": "moon",
    "trains": "train rail locomotive",
    "bread": "bread loaf baked dough",
    "winter": "winter snow cold",
    "music": "music melod sound song",
    "the sea": "sea ocean water",
    "books": "book read stor librar",
    "cats": "cat feline companion",
    "bicycles": "bicycle bike cycl wheel",
}
OTHERS = """What is the capital of France?
Name three fruits.
How many legs does a spider have?
Explain what a volcano is.
Give me a recipe for pancakes.
Why is the sky blue?
Translate 'good morning' into Spanish.
What is the opposite of hot?
List five animals that live in the sea.
How do I boil an egg?
Write a short poem about rain.
What does a dentist do?
Summarize the story of Cinderella in two sentences.
What is photosynthesis?
Suggest a name for a coffee shop.
How can I sleep better at night?
What are the primary colours?
Who wrote Romeo and Juliet?
Give three tips for learning a language.
What is the difference between a lake and a river?
Describe a sunset.
How do airplanes fly?
What should I pack for a beach holiday?
Explain gravity to a child.
Write a polite email asking for a day off.
What is the largest planet in our solar system?
Name two instruments with strings.
How do I remove a coffee stain?
What is a good gift for a teacher?
Tell me a joke.
Why do leaves change colour in autumn?
What is the purpose of a library?
Describe how to plant a tree.
What is a synonym for happy?
How many days are in a leap year?
Give an example of a simile.
What do pandas eat?
Write a headline about a football match.
How can a city reduce traffic?
What is the boiling point of water?
Name three countries in Africa.
Why should people exercise?
Explain what a computer does.
Write a slogan for a bakery.
What is the freezing point of water?
How do bees make honey?
What are the benefits of reading?
Describe the taste of a lemon.
Write one question for a job interview.
What is the best way to save money?"""
REQUESTS = [*(f"Write one sentence about {subject}." for subject in SUBJECTS), *OTHERS.split("\n")]


@dataclass(frozen=True)
class Text:
    """Token ids [windows,512] and the part that each window belongs to."""

    windows: np.ndarray
    parts: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Stands for the very tokens."""
        return hashlib.sha256(np.ascontiguousarray(self.windows, "<i4").tobytes()).hexdigest()[:16]

    @property
    def predicted(self) -> int:
        """How many tokens are predicted: all but each window's first."""
        return self.windows.shape[0] * (self.windows.shape[1] - 1)


def make_text(tokenizer: Any, around: tuple[str, str], answers: Sequence[str]) -> Text:
    """The text.

    Args:
        tokenizer: Of the package tokenizers.
        around: What the chat template writes before and behind a request, without a picture.
        answers: The float bundle's, one for each request.
    """
    (prefix, suffix) = around
    documents = _windows(tokenizer, "\n\n".join(paragraphs()), DOCUMENTS)
    turns = (prefix + request + suffix + answer + END for request, answer in zip(REQUESTS, answers, strict=True))
    talk = _windows(tokenizer, "\n".join(turns), CHAT)
    return Text(np.concatenate([documents, talk]), ("documentation",) * DOCUMENTS + ("chat",) * CHAT)


def _windows(tokenizer: Any, text: str, count: int) -> np.ndarray:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) < count * WINDOW:
        raise ValueError(f"the text has {len(ids)} tokens, {count * WINDOW} are needed")
    return np.array(ids[: count * WINDOW], np.int64).reshape(count, WINDOW)


def paragraphs() -> list[str]:
    """Every third paragraph of plain prose in torch's documentation of some packages, in the order of its files."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    files = (path for folder in _FOLDERS for path in sorted((root / folder).rglob("*.py")))
    public = (path for path in files if not any(map(_private, path.relative_to(root).parts)))
    found = [paragraph for path in public for paragraph in _prose(path.read_text(encoding="utf-8"))]
    return list(dict.fromkeys(found))[::_EVERY]


def _private(name: str) -> bool:
    return name.startswith("_") and name != "__init__.py"


def _prose(source: str) -> Iterator[str]:
    """Paragraphs of docstrings without code and mathematics."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(paragraph.split())
                if len(text.split()) >= _WORDS and not _CODE.search(text):
                    yield text


def on_subject(answers: Sequence[str]) -> list[bool]:
    """Whether each of the first answers is a sentence about its subject: it names it, and hardly repeats itself.

    >>> on_subject(["Dogs are loyal friends.", "The train, train, train, train, train.", "A cat."])
    [True, False, False]
    """
    return [_speaks_of(words, answer) for words, answer in zip(SUBJECTS.values(), answers, strict=False)]


def _speaks_of(words: str, answer: str) -> bool:
    said = re.findall(r"[a-z']+", answer.lower())
    named = any(word.startswith(begin) for word in said for begin in words.split())
    return named and len(said) >= 4 and 2 * len(set(said)) > len(said)
