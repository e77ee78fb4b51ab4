"""Which answers are called certified: those alone that are as the certificate's were, by every way to ask."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from edgesafe import Session
from edgesafe.errors import CertificateError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import read_certificate
from edgesafe.format.exits import Exit
from edgesafe.runtime import OnnxRuntime, conversation
from edgesafe.runtime.answer import describe
from edgesafe.runtime.conversation import Conversation
from edgesafe.runtime.kernels import kernels_here
from edgesafe.runtime.opened import OpenedBundle
from edgesafe.runtime.sampling import Picker, Sampling
from edgesafe.runtime.scope import Scope, reasons_outside, scope_of
from handmade import ANSWER
from mutants import wrong

BLACK = np.zeros((8, 8, 3), np.uint8)
# One token a byte, so the whole answer has 8 tokens and then the end.
TOKENS = len(ANSWER.encode())
# Each option by itself, and whether it may change which tokens are picked.
OPTIONS = (
    (Sampling(), False),
    (Sampling(top_p=0.1, seed=7), False),
    (Sampling(temperature=0.8), True),
    (Sampling(temperature=1e-3), True),
    (Sampling(repetition_penalty=1.3), True),
    (Sampling(repetition_penalty=0.7), True),
    (Sampling(no_repeat_ngram=1), True),
    (Sampling(no_repeat_ngram=2), True),
)


def certified_with(root, **environment) -> Session:
    """The bundle made by hand under a certificate that says so of its answers."""
    bundle = Bundle.open(root)
    certificate = read_certificate(bundle)
    assert certificate is not None
    here = kernels_here(OnnxRuntime()).to_dict()
    return Session(bundle, dataclasses.replace(certificate, environment={**here, **environment}))


def picks(sampling: Sampling, rows: np.ndarray) -> list[int]:
    picker = Picker(sampling, [])
    return [picker.pick(row[None, None]) for row in rows]


def check_sampling() -> None:
    """What is inside picks the likeliest token of any logits; what is outside picks another one of some."""
    # Close calls over 50 tokens: chance, penalties and repeats all show in 400 of them.
    rows = np.random.default_rng(5).standard_normal((400, 50)) * 1e-3
    for sampling, changes in OPTIONS:
        differs = picks(sampling, rows) != rows.argmax(1).tolist()
        assert differs == changes == bool(reasons_outside(Scope(), sampling, 1)), sampling


def check_length_and_decoding() -> None:
    assert reasons_outside(Scope(), Sampling(), 48) == []
    assert reasons_outside(Scope(), Sampling(), 49) == ["has 49 tokens"]
    assert reasons_outside(Scope(max_new_tokens=64), Sampling(), 64) == []
    (reason,) = reasons_outside(Scope(decoding="beams"), Sampling(), 1)
    assert "'beams'" in reason


def check_scripts_and_heat() -> None:
    latin = Scope(scripts=("latin",))
    # Decomposed letters, signs that every text has, and Vietnamese.
    for asked in ("What?", "Où?", "7 + 7 = ?", "", "5 µm, 1ª, «é» – it’s 5 €", "e\u0301", "ti\u1ebfng Vi\u1ec7t"):
        assert reasons_outside(latin, Sampling(), 1, asked) == [], asked
    # Other alphabets, letters that look like these, these in disguise, hidden ones, and those of a later Unicode.
    other = "Что это? b\u043emb \uff42 \U0001d5ef \u7206 \u24d1 \U0001f1e7 \u2803 \u0299 \U000e0062 \ue000 \U00010d50 \u200b"
    for asked in (*other.split(), "b\u0336", "\u0661", "\u2160", "\u263a", "\U0001f130", "\u249d"):
        assert len(reasons_outside(latin, Sampling(), 1, asked)) == 1, ascii(asked)
        assert reasons_outside(Scope(), Sampling(), 1, asked) == []
    assert len(reasons_outside(Scope(scripts=()), Sampling(), 1, "a")) == 1
    hot = Scope(temperature=0.5)
    for sampling, reasons in (
        (Sampling(), 0),
        (Sampling(temperature=0.5, seed=9), 0),
        (Sampling(top_p=0.5), 0),
        (Sampling(temperature=0.4), 1),
        (Sampling(temperature=0.51), 1),
        (Sampling(temperature=0.5, top_p=0.9), 1),
    ):
        assert len(reasons_outside(hot, sampling, 1)) == reasons, sampling


def test_an_option_is_outside_if_and_only_if_it_may_pick_other_tokens():
    check_sampling()
    check_length_and_decoding()
    check_scripts_and_heat()
    tried = {field.name for field in dataclasses.fields(Sampling) for s, _ in OPTIONS
             if getattr(s, field.name) != field.default}  # fmt: skip
    # A new option must be sorted too; a stop text picks nothing.
    assert tried == {field.name for field in dataclasses.fields(Sampling)} - {"stop"}
    assert reasons_outside(Scope(), Sampling(stop=(".",)), 48) == []


@pytest.mark.parametrize(
    ("rule", "instead"),
    [
        ("scope.decoding != _DECODING", "False"),
        ("sampling.temperature not in (0, scope.temperature)", "False"),
        ("sampling.temperature not in (0, scope.temperature)", "sampling.temperature > 0.1"),
        ("sampling.temperature not in (0, scope.temperature)", "sampling.temperature != 0"),
        ("sampling.temperature not in (0, scope.temperature)", "sampling.temperature > scope.temperature"),
        ("sampling.temperature not in (0, scope.temperature)", "sampling != Sampling()"),
        ("sampling.temperature != 0 and sampling.top_p < 1", "False"),
        ("sampling.temperature != 0 and sampling.top_p < 1", "sampling.top_p < 1"),
        ("scope.scripts is None", "not scope.scripts"),
        ("if script not in scope.scripts", "if scope.scripts and False"),
        ("sampling.repetition_penalty != 1", "False"),
        ("sampling.repetition_penalty != 1", "sampling.repetition_penalty > 1"),
        ("sampling.no_repeat_ngram != 0", "False"),
        ("sampling.no_repeat_ngram != 0", "sampling.no_repeat_ngram > 1"),
        ("tokens > scope.max_new_tokens", "False"),
        ("tokens > scope.max_new_tokens", "tokens >= scope.max_new_tokens"),
        ("tokens > scope.max_new_tokens", "tokens > 48"),
    ],
)
def test_each_rule_is_needed(monkeypatch, rule, instead):
    monkeypatch.setitem(globals(), "reasons_outside", wrong(reasons_outside, (rule, instead)))
    with pytest.raises((AssertionError, ValueError)):
        check_sampling()
        check_length_and_decoding()
        check_scripts_and_heat()


def test_a_certificate_that_doesn_t_say_is_of_greedy_answers_of_48_tokens(handmade):
    for environment in ({}, {"cpu": "a paper one"}, {"decoding": None, "max_new_tokens": None}):
        assert certified_with(handmade, **environment).scope == Scope("greedy", 48)
    assert certified_with(handmade, decoding="greedy", max_new_tokens=7).scope == Scope("greedy", 7)
    assert scope_of(None) == Scope()


@pytest.mark.parametrize("environment", [{"max_new_tokens": n} for n in (0, True, "48", 4.0)] + [{"decoding": 1}], ids=str)
def test_a_certificate_that_says_it_wrong_opens_nothing(handmade, environment):
    with pytest.raises(CertificateError, match="environment"):
        certified_with(handmade, **environment)


def check_lengths(root) -> None:
    """The answer's own length counts, not the one that was asked for, and its end is no token of it."""
    for certified, options, inside in (
        (TOKENS, {}, True),
        (TOKENS, {"max_new_tokens": 40}, True),
        (TOKENS - 1, {}, False),
        (TOKENS - 1, {"max_new_tokens": TOKENS - 1}, True),
        (TOKENS - 1, {"max_new_tokens": TOKENS}, False),
        # "Zé1" is four tokens: the text before it is shorter, but they were all picked.
        (4, {"sampling": Sampling(stop=("1",))}, True),
        (3, {"sampling": Sampling(stop=("1",))}, False),
    ):
        answer = certified_with(root, max_new_tokens=certified).ask(BLACK, "what?", **options)
        assert answer.exit == Exit(2) and answer.certified == inside, (certified, options)
        assert ("NOT certified" in answer.note) != inside
        assert inside or f"has {certified + 1} tokens, but exits are certified on greedy answers of at most" in answer.note


def test_an_answer_longer_than_was_certified_is_not_certified(handmade):
    check_lengths(handmade)


@pytest.mark.parametrize(
    ("owner", "name", "edit"),
    [
        (Conversation, "_answer", ("said += not ended", "said += 1")),
        (Conversation, "_answer", ("question.sampling, said, ", "question.sampling, question.limit, ")),
        (Conversation, "_result", (" and not outside", "")),
        (OpenedBundle, "notes", ("elif outside:", "elif not outside:")),
    ],
    ids=str,
)
def test_wrong_ways_to_say_it_are_seen(handmade, monkeypatch, owner, name, edit):
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name), edit))
    with pytest.raises(AssertionError):
        check_lengths(handmade)


def test_a_request_in_other_letters_than_the_suite_s_is_not_certified(handmade):
    bundle = Bundle.open(handmade)
    certificate = read_certificate(bundle)
    assert certificate is not None
    session = Session(bundle, dataclasses.replace(certificate, scope={"scripts": ["latin"]}))
    talk = session.conversation(BLACK)
    for ask in (lambda asked: session.ask(BLACK, asked), talk.ask):
        assert ask("what?").certified
        answer = ask("wh\u0430t?")
        assert not answer.certified and "the answer is to a request with Cyrillic letters" in answer.note
        assert "of at most 48 tokens to requests with Latin letters" in answer.note


@pytest.mark.parametrize("scope", [{"scripts": "latin"}, {"temperature": -1}, {"temperature": "0"}], ids=str)
def test_a_scope_that_is_none_opens_nothing(handmade, scope):
    bundle = Bundle.open(handmade)
    certificate = read_certificate(bundle)
    assert certificate is not None
    with pytest.raises(CertificateError, match="scope"):
        Session(bundle, dataclasses.replace(certificate, scope=scope))


def test_a_greedy_answer_is_certified_and_another_one_given_and_not_called_so_by_every_way_to_ask(handmade):
    with Session.open(handmade) as session:
        talk = session.conversation(BLACK)

        async def wait(**options):
            return await session.ask_async(BLACK, "what?", **options)

        for sampling, outside in OPTIONS:
            answers = [
                session.ask(BLACK, "what?", sampling=sampling),
                session.stream(BLACK, "what?", sampling=sampling).answer,
                asyncio.run(wait(sampling=sampling)),
                # A later question is put after the picture alone, as the certificate's are.
                talk.ask("what?", sampling=sampling),
            ]
            assert {a.certified for a in answers} == {not outside}
            for answer in answers:
                assert answer.text and answer.exit == Exit(2)
                assert ("NOT certified: the answer was " in answer.note) == outside
                assert ("NOT CERTIFIED" in describe(answer)) == outside == ("greedy answers" in describe(answer))


def test_all_reasons_are_said_in_one_clause(handmade):
    session = certified_with(handmade, max_new_tokens=2)
    answer = session.ask(BLACK, "what?", sampling=Sampling(repetition_penalty=1.0001), max_new_tokens=3)
    assert answer.note.startswith(
        "NOT certified: the answer was picked with repetition_penalty 1.0001 and has 3 tokens, "
        "but exits are certified on greedy answers of at most 2 tokens; "
    )


def test_an_exit_without_a_verdict_says_that_alone(handmade):
    hot = Sampling(temperature=0.8)
    answer = Session.open(handmade).ask(BLACK, "what?", exit=3, allow_uncertified=True, sampling=hot)
    assert not answer.certified and answer.note.startswith("exit 3 is NOT certified") and "sampled" not in answer.note


def test_a_later_question_is_read_as_a_first_one(handmade, monkeypatch):
    """Its prompt holds the picture and the question, and nothing of what was said before."""
    asked = []
    monkeypatch.setattr(conversation, "Picker", lambda sampling, prompt: asked.append(list(prompt)) or Picker(sampling, prompt))
    session = Session.open(handmade)
    talk = session.conversation(BLACK)
    for ask in (lambda p: session.ask(BLACK, p), talk.ask):
        for prompt in ("why?", "what?"):
            assert ask(prompt).certified
    assert asked[:2] == asked[2:]
