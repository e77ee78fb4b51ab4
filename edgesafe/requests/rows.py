"""Training rows from lists of requests: refusals in several wordings, and the model's own answers to all that it may answer.

A model keeps its way of speaking if what it is taught for harmless requests is what it says itself, at its reference depth.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgesafe.certify.string_judge import REFUSE, classify
from edgesafe.errors import InputError
from edgesafe.format.files import digest_folder, replacing, sha256_file, write_atomically
from edgesafe.format.suite import DEFAULT_LIMITS, MAX_NEW_TOKENS, Suite
from edgesafe.format.targets import NEW, check_target
from edgesafe.progress import bar
from edgesafe.requests.apart import part_from
from edgesafe.requests.gather import Item, gather
from edgesafe.requests.pictures import draw
from edgesafe.requests.sources import Plan
from edgesafe.requests.suite import describe, write_items
from edgesafe.requests.tables import read_table

if TYPE_CHECKING:
    from edgesafe.checkpoint.exit_model import ExitModel

SPLIT = "train"
BATCH = 16
REFUSALS = Path(__file__).parent / "refusals.txt"
_ANSWERS = "answers.jsonl"  # in the work folder: what was answered before the run was stopped
_FEW = 100  # pictures; with fewer, exit maps are poor
_SENTENCE = re.compile(r".*[.!?](?=\s|$)", re.S)


@dataclass(frozen=True)
class Rows:
    """The written rows, and how many were left out, by why."""

    suite: Suite
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class Settings:
    """How rows are made.

    refusals: a text file with one refusal per line. max_new_tokens: of the model's own answers. batch: requests that go
    through the model together.
    """

    refusals: Path = REFUSALS
    max_new_tokens: int = MAX_NEW_TOKENS
    batch: int = BATCH


@dataclass(frozen=True)
class Answer:
    """What the model said, and whether it ended by itself."""

    text: str
    ended: bool


def make_rows(
    model: Path,
    plan: Plan,
    out: Path,
    settings: Settings | None = None,
    *,
    apart_from: Path | None = None,
    drop_shared: bool = False,
) -> Rows:
    """Write a plan's sources as training rows; a run that was stopped continues.

    Args:
        model: checkpoint folder; it answers what has no answer of its own in its source.
        plan: sources and the seed of the refusals.
        out: new folder.
        settings: how rows are made.
        apart_from: a suite, with which the rows may share no request and no picture.
        drop_shared: leave out what is shared, instead of refusing it.

    Raises:
        InputError: `out` exists; a row, a picture, a file or the checkpoint can't be used; something is shared; or the wanted
            answer to a harmful row is no refusal.
        UnsupportedModelError: as `edgesafe.checkpoint.exit_model.load`.
    """
    from edgesafe.checkpoint.exit_model import load

    settings = settings or Settings()
    check_target(out, model=model, known=(_ANSWERS,))
    refusals = read_refusals(settings.refusals)
    found = gather(plan, SPLIT)
    items, left_out = part_from(found.items, apart_from, drop=drop_shared)
    check_pictures(items)
    llava = load(model)
    fitting = [item for item in items if _fits(llava, item, settings.max_new_tokens)]
    left_out["too long for the model"] = len(items) - len(fitting)
    items = [_refused(item, refusals, plan.seed) for item in fitting]
    with replacing(out, key=_key(model, items, settings), model=model) as work:
        answers = answer(llava, [item for item in items if not item.row.target], work / _ANSWERS, settings)
        done = [_answered(item, answers.get(item.row.id)) for item in items]
        left_out += Counter(why for why in done if isinstance(why, str))
        kept = [item for item in done if isinstance(item, Item)]
        if not kept:
            what = "no row is left: " + ", ".join(f"{n} {why}" for why, n in left_out.items())
            raise InputError(what, where=str(model), expected="rows with a wanted answer", todo="take other sources")
        suite = write_items(work / NEW, kept, name=describe(found, kept), split=SPLIT, limits=DEFAULT_LIMITS)
    return Rows(replace(suite, root=out), +(found.left_out + left_out))


def read_refusals(file: Path) -> list[str]:
    """The wordings of a refusal, one a line.

    Raises:
        InputError: the file can't be read, or has a line that the certificate's judge would not call a refusal.
    """
    lines = read_table(file)
    for line in lines:
        if classify(line.fields.get("prompt", "")) != REFUSE:
            what = "the certificate's judge would not call this line a refusal, and would count it as help"
            todo = "say within its first words that it won't be done, such as: I'm sorry, but I can't help with that"
            raise InputError(what, where=line.where, expected="a refusal", todo=todo)
    return list(dict.fromkeys(line.fields["prompt"] for line in lines))


def check_pictures(items: Sequence[Item]) -> None:
    """Refuse a picture that can't be read or drawn, before hours of answers, and say where there are few.

    Raises:
        InputError: there is one.
    """
    pictures = {item.picture: item.where for item in items}
    for picture, where in pictures.items():
        draw(picture, where)
    if len(pictures) < _FEW:
        text = f"  the rows show {len(pictures)} different pictures; align fits its exit maps to them, and needs at least two"
        print(f'{text}, better some hundred: --pictures DIR, or map = "none"', file=sys.stderr, flush=True)


def answer(llava: ExitModel, items: Sequence[Item], file: Path, settings: Settings) -> dict[str, Answer]:
    """The model's greedy answers at its reference depth, by row id; each batch is written down before the next.

    Args:
        llava: the model.
        items: what is asked.
        file: answers of a stopped run, if it is there; new ones are added.
        settings: length and batch.

    Raises:
        InputError: a picture can't be read.
    """
    answers = dict(_earlier(file))
    write_atomically(file, b"".join(_line(name, said) for name, said in answers.items()))
    missing = sorted((item for item in items if item.row.id not in answers), key=lambda i: (len(i.row.prompt), i.row.id))
    batches = [missing[start : start + settings.batch] for start in range(0, len(missing), settings.batch)]
    label = f"{len(missing)} answers of the model" + (f", {len(answers)} are there already" if answers else "") + ": batch"
    with file.open("ab") as log:
        for batch in bar(batches, len(batches), label) if batches else ():
            for item, said in zip(batch, _ask(llava, batch, settings.max_new_tokens), strict=True):
                answers[item.row.id] = said
                log.write(_line(item.row.id, said))
            log.flush()
    return answers


def whole_sentences(text: str, *, ended: bool) -> str:
    """An answer that ends where a sentence does; one that was cut off goes without its last, unfinished sentence.

    >>> whole_sentences("It is a cup. It has a", ended=False), whole_sentences("a cup", ended=True)
    ('It is a cup.', 'a cup')
    >>> whole_sentences("It has a", ended=False)
    ''
    """
    if ended:
        return text.strip()
    found = _SENTENCE.match(text)
    return found[0].strip() if found else ""


def _fits(llava: ExitModel, item: Item, max_new_tokens: int) -> bool:
    from edgesafe.checkpoint.exit_model import answer_ids, prompt_ids

    try:
        prompt = prompt_ids(llava, item.row.prompt)
    except InputError as error:
        todo = "take the row out of its source"
        raise InputError(error.what, where=item.where, expected=error.expected, todo=todo) from error
    longest = len(answer_ids(llava, item.row.target)) if item.row.target else max_new_tokens
    return len(prompt) + longest <= llava.context_length


def _refused(item: Item, refusals: Sequence[str], seed: int) -> Item:
    """A harmful row with its own refusal, or one of the list."""
    if item.row.cls != "harmful":
        return item
    if item.row.target:
        if classify(item.row.target, item.row.prompt) != REFUSE:
            todo = "write a refusal, or leave the column empty"
            raise InputError(
                "the wanted answer to a harmful row is no refusal", where=item.where, expected="a refusal", todo=todo
            )
        return item
    drawn = int(hashlib.sha256(f"{seed} {item.row.id}".encode()).hexdigest(), 16) % len(refusals)
    return replace(item, row=replace(item.row, target=refusals[drawn]))


def _answered(item: Item, said: Answer | None) -> Item | str:
    """The item with its wanted answer, or why it has none."""
    if said is None:
        return item
    target = whole_sentences(said.text, ended=said.ended)
    if not target:
        return "without a whole sentence"
    if item.row.cls == "task" and not any(re.search(rf"(?<!\w){re.escape(k)}(?!\w)", target, re.I) for k in item.row.key):
        return "tasks that the model gets wrong"
    return replace(item, row=replace(item.row, target=target))


def _ask(llava: ExitModel, items: Sequence[Item], max_new_tokens: int) -> list[Answer]:
    from edgesafe.checkpoint.exit_model import decode, exit_state, exit_states, generate, pixel_values, prompt_ids

    images = [draw(item.picture, item.where) for item in items]
    states = exit_states(llava, pixel_values(llava, images), llava.reference.depth)
    state = exit_state(llava, states, llava.reference)  # [B, P, W]
    prompts = [prompt_ids(llava, item.row.prompt) for item in items]
    said = generate(llava, prompts, state, max_new_tokens, lambda logits, *_: logits.argmax(-1))
    return [Answer(decode(llava, ids), ended=bool(set(ids) & {*llava.eos_ids})) for ids in said]


def _line(name: str, said: Answer) -> bytes:
    return json.dumps({"id": name, "answer": said.text, "ended": said.ended}).encode() + b"\n"


def _earlier(file: Path) -> Iterator[tuple[str, Answer]]:
    """What a stopped run had answered, without a line that was cut off."""
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            one = json.loads(line)
            yield one["id"], Answer(one["answer"], one["ended"])


def _key(model: Path, items: Sequence[Item], settings: Settings) -> str:
    """Digest of what the answers depend on: of another model or other rows none is taken over."""
    files = {file: sha256_file(file) for file in {item.picture.file for item in items} if file}
    rows = [[i.row.id, i.row.prompt, i.picture.text, files[i.picture.file] if i.picture.file else ""] for i in items]
    made_of = [digest_folder(model), rows, settings.max_new_tokens, settings.batch]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
