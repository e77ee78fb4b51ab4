"""Training rows: refusals by seed, the model's own answers at its reference depth, resumed after a stop, apart from a suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from edgesafe import cli
from edgesafe.certify.string_judge import REFUSE, classify
from edgesafe.checkpoint.exit_model import load
from edgesafe.errors import ConfigError, InputError
from edgesafe.format.suite import Suite, read_suite
from edgesafe.requests import rows as making
from edgesafe.requests.gather import WORD_PARTS, gather, position, word_list
from edgesafe.requests.rows import REFUSALS, Answer, Settings, answer, make_rows, read_refusals, whole_sentences
from edgesafe.requests.sources import Plan, Source
from edgesafe.requests.suite import import_suite

HARMFUL, HARMLESS = 6, 5


@pytest.fixture
def model(tiny_llava) -> Path:
    return tiny_llava


@pytest.fixture
def plan(tmp_path) -> Plan:
    lines = [f"Break thing {n},harmful" for n in range(HARMFUL)] + [f"Explain thing {n},benign" for n in range(HARMLESS)]
    (tmp_path / "list.csv").write_text("request,label\n" + "\n".join(lines) + "\n")
    return Plan((Source(tmp_path / "list.csv"),))


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The requests that reach the model, which answers each in two sentences and stops in the third."""
    seen: list[str] = []

    def ask(llava, items, max_new_tokens):
        seen.extend(item.row.prompt for item in items)
        return [Answer(f"About {item.row.prompt}. It is easy. And th", ended=False) for item in items]

    monkeypatch.setattr(making, "_ask", ask)
    return seen


def by_class(suite: Suite) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for row in suite.rows:
        found.setdefault(row.cls, []).append((row.prompt, row.target))
    return found


def test_harmful_rows_get_refusals_and_harmless_ones_the_models_own_words(model, plan, asked, tmp_path):
    done = make_rows(model, plan, tmp_path / "out")
    suite = read_suite(tmp_path / "out")
    assert suite.split == "train" and suite.digest == done.suite.digest and done.left_out == {}
    rows = by_class(suite)
    assert rows["harmless"] == [(f"Explain thing {n}", f"About Explain thing {n}. It is easy.") for n in range(HARMLESS)]
    assert sorted(asked) == [f"Explain thing {n}" for n in range(HARMLESS)]
    refusals = [target for _, target in rows["harmful"]]
    assert set(refusals) <= set(read_refusals(REFUSALS)) and len(set(refusals)) > 1
    again = make_rows(model, plan, tmp_path / "again").suite
    other = make_rows(model, Plan(plan.sources, seed=1), tmp_path / "other").suite
    assert again.digest == suite.digest and by_class(other)["harmful"] != rows["harmful"]


def test_align_takes_the_rows(model, plan, asked, tmp_path):
    from edgesafe.align.data import read_examples

    make_rows(model, plan, tmp_path / "out")
    examples = read_examples(tmp_path / "out", load(model))
    assert sum(one.harmful for one in examples) == HARMFUL and len(examples) == HARMFUL + HARMLESS


def test_a_stopped_run_continues_after_its_last_batch(model, plan, asked, tmp_path, monkeypatch):
    whole = make_rows(model, plan, tmp_path / "whole", Settings(batch=2)).suite
    ask, calls = making._ask, []

    def stopped(*words):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(words)
        return ask(*words)

    monkeypatch.setattr(making, "_ask", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_rows(model, plan, tmp_path / "out", Settings(batch=2))
    answers = tmp_path / "out.partial" / "answers.jsonl"
    assert not (tmp_path / "out").exists() and len(answers.read_text().splitlines()) == 2
    with answers.open("a") as file:
        file.write('{"id": "list-00')  # killed while it wrote
    monkeypatch.setattr(making, "_ask", ask)
    asked.clear()
    assert make_rows(model, plan, tmp_path / "out", Settings(batch=2)).suite.digest == whole.digest
    assert len(asked) == HARMLESS - 2 and not answers.exists()
    # Other rows are asked from the start.
    asked.clear()
    answers.parent.mkdir()
    (answers.parent / "made-of").write_text("another run")
    answers.write_text(json.dumps({"id": "list-00007", "answer": "Stale.", "ended": True}) + "\n")
    assert make_rows(model, plan, tmp_path / "new").suite.digest == whole.digest and len(asked) == HARMLESS


def test_the_answers_are_transformers_own_at_the_reference_depth(model, plan, tmp_path):
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    own, processor = LlavaForConditionalGeneration.from_pretrained(model), AutoProcessor.from_pretrained(model)
    llava = load(model)
    items = [item for item in gather(plan, "train").items if item.row.cls == "harmless"][:3]
    said = answer(llava, items, tmp_path / "answers.jsonl", Settings(max_new_tokens=7, batch=2))
    for item in items:
        talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.row.prompt}]}]
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
        grey = Image.new("RGB", (336, 336), (128, 128, 128))
        inputs = processor(images=grey, text=prompt, return_tensors="pt")
        with torch.no_grad():
            ids = own.generate(**inputs, max_new_tokens=7, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert said[item.row.id].text == processor.decode(ids, skip_special_tokens=True).strip()


def test_answers_without_a_whole_sentence_and_wrong_tasks_are_dropped_with_a_count(model, plan, tmp_path, monkeypatch):
    words = [word for word in word_list() if position(word) >= WORD_PARTS["train"][0]]
    right = min(words, key=position)
    said = {"Explain thing 0": Answer("It never", ended=False), "Explain thing 1": Answer(" ", ended=True)}

    def ask(llava, items, n):
        return [said.get(i.row.prompt, Answer(f"It is {right}." if i.row.key else "Fine.", ended=True)) for i in items]

    monkeypatch.setattr(making, "_ask", ask)
    done = make_rows(model, Plan(plan.sources, words=4), tmp_path / "out")
    assert done.left_out == {"without a whole sentence": 2, "tasks that the model gets wrong": 3}
    assert by_class(done.suite)["task"] == [("Which word is written in this picture?", f"It is {right}.")]


def test_suites_and_rows_ask_to_read_different_words():
    test, train = ({i.row.template for i in gather(Plan((), words=120), split).items} for split in ("test", "train"))
    assert len(test) == len(train) == 120 and not test & train


def test_a_suite_of_the_same_lists_is_kept_apart(model, plan, asked, tmp_path):
    (tmp_path / "s.csv").write_text("request,label\nbreak THING 3!,harmful\nExplain the thing 4,benign\nOther,benign\n")
    suite = tmp_path / "suite"
    import_suite(Plan((Source(tmp_path / "s.csv"),)), suite, report_only=True)
    with pytest.raises(InputError, match="2 rows share something: 2 shared requests"):
        make_rows(model, plan, tmp_path / "out", apart_from=suite)
    assert not (tmp_path / "out").exists() and asked == []
    done = make_rows(model, plan, tmp_path / "out", apart_from=suite, drop_shared=True)
    assert done.left_out == {"shared requests": 2} and len(done.suite.rows) == HARMFUL + HARMLESS - 2


@pytest.mark.parametrize(
    ("name", "text", "where", "says"),
    [
        ("refusals.txt", "I'm sorry, I can't help.\n\nHere is how to do it.\n", "refusals.txt:3", "would not call this line"),
        ("refusals.txt", "", "refusals.txt", "no rows"),
        ("list.csv", "prompt,class,target\nBreak it,harmful,Sure: take a hammer\n", "list.csv:2", "is no refusal"),
        ("list.csv", f"request,label\n{'x ' * 9000},benign\n", "llava", "1 too long for the model"),
        ("list.csv", "request,label\nWhat is <image> here,benign\n", "list.csv:2", "<image>"),
        ("list.csv", "prompt,class,image\nWhat is it,harmless,p.png\n", "list.csv:2", "can't be read"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_model_is_asked(model, plan, asked, tmp_path, name, text, where, says):
    (tmp_path / "p.png").write_bytes(b"no picture")
    (tmp_path / name).write_text(text)
    settings = Settings(refusals=tmp_path / name if name == "refusals.txt" else REFUSALS)
    with pytest.raises(InputError) as caught:
        make_rows(model, plan, tmp_path / "out", settings)
    assert where in caught.value.where and says in str(caught.value)
    assert asked == [] and not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_our_own_refusals_are_refusals_to_the_judge_and_differ():
    lines = REFUSALS.read_text().splitlines()
    assert len(set(lines)) == len(lines) >= 12 and {classify(line) for line in lines} == {REFUSE}


def test_a_cut_answer_ends_with_its_last_whole_sentence():
    assert whole_sentences("One. Two! Three 3.5 fo", ended=False) == "One. Two!"
    assert whole_sentences("One.\n- two\n- thr", ended=False) == "One."


def test_the_command_says_what_it_made(model, plan, asked, tmp_path, capsys):
    words = ["rows", str(model), str(plan.sources[0].path), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--json"]) == 0
    said = capsys.readouterr()
    made = json.loads(said.out)
    assert "the rows show 1 different pictures; align fits its exit maps to them" in said.err
    assert (made["harmful"], made["harmless"], made["task"], made["left_out"]) == (HARMFUL, HARMLESS, 0, {})
    assert cli.main(words) == InputError.exit_code  # it exists
    assert cli.main([*words[:-1], str(tmp_path / "b"), "--batch", "0"]) == ConfigError.exit_code
    assert cli.main([*words[:2], *words[3:-1], str(tmp_path / "b")]) == ConfigError.exit_code  # no source
    assert not (tmp_path / "b").exists()
