"""Preference pairs: the shapes of a line, the split by prompt, and every line that is refused."""

from __future__ import annotations

import gzip
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from edgesafe.align.reward import train as reward_train
from edgesafe.align.reward.preferences import in_validation, parse_dialogue, read_pairs, render
from edgesafe.align.reward.train import train_reward_model
from edgesafe.errors import InputError
from tiny_reward import LIKED, NOUNS, SMALL, WORDS, make_gpt2, toy, write_lines


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_gpt2(tmp_path_factory.mktemp("base") / "gpt2")


def _ids(turns):
    return [ord(letter) for _, text in turns for letter in text]


HH = "\n\nHuman: What is it?\n\nAssistant: A {}.\n\nHuman: And that?\n\nAssistant: A {}."


@pytest.mark.parametrize(
    ("line", "prompt", "chosen"),
    [
        ({"prompt": "What?", "chosen": "pen", "rejected": "cup"}, "What?", "What?pen"),
        (
            {"chosen": HH.format("pen", "cup"), "rejected": HH.format("pen", "jar")},
            "What is it?",
            "What is it?A pen.And that?A cup.",
        ),
        (
            {"prompt": "\n\nHuman: What?\n\nAssistant:", "chosen": " A pen.", "rejected": " A cup.", "source": "x"},
            "What?",
            "What?A pen.",
        ),
    ],
    ids=["prompt", "HH-RLHF", "HH-RLHF with the prompt apart"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_shapes_of_a_line(tmp_path, line, prompt, chosen, packed):
    path = write_lines(tmp_path / "p.jsonl", [line])
    if packed:
        (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "p.jsonl.gz"
    [pair], skipped = read_pairs(path, _ids, 100)
    assert skipped == 0 and pair.prompt == prompt and "".join(map(chr, pair.chosen)) == chosen and pair.chosen != pair.rejected


def test_hh_text_comes_out_as_it_went_in():
    text = HH.format("pen", "cup")
    assert render(SimpleNamespace(chat_template=None), parse_dialogue(text)) == text
    assert parse_dialogue("\n\nHuman: What is it?") is None and parse_dialogue("pen\n\nAssistant: A pen.") is None


def test_the_split_goes_by_prompt_and_not_by_row(base, tmp_path):
    data = [{**pair, "prompt": f"tell me about {NOUNS[i % 12]}"} for i, pair in enumerate(toy(240))]
    run = reward_train.prepare(str(base), write_lines(tmp_path / "p.jsonl", data), replace(SMALL, val_share=0.3))
    asked = [{p.prompt for p in part} for part in (run.train, run.val)]
    assert asked[0] and asked[1] and not asked[0] & asked[1] and len(run.train) + len(run.val) == 240
    turned = reward_train.prepare(str(base), write_lines(tmp_path / "q.jsonl", data[::-1]), replace(SMALL, val_share=0.3))
    assert {p.prompt for p in turned.val} == asked[1]
    share = sum(in_validation(f"{i}", 0.1) for i in range(5000)) / 5000
    assert abs(share - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 5000)


GOOD = {"prompt": "tell me", "chosen": "gladly", "rejected": "it is"}
BAD = {
    "not JSON": ("{", "not JSON"),
    "a list": ("[1]", "table"),
    "a missing key": ({"prompt": "a", "chosen": "gladly"}, "'rejected' is missing"),
    "a misspelt key": ({"prompt": "a", "chosen": "gladly", "rejcted": "it"}, "rejcted"),
    "a number": ({**GOOD, "chosen": 3}, "chosen is the int 3"),
    "an empty answer": ({**GOOD, "chosen": " "}, "empty"),
    "an empty dialogue": ({"chosen": "", "rejected": HH.format("a", "b")}, "empty"),
    "an empty last turn": ({"chosen": HH.format("a", "b") + "\n\nAssistant:", "rejected": HH.format("a", "b")}, "empty"),
    "the same twice": ({**GOOD, "rejected": "gladly"}, "the same"),
    "too long": ({**GOOD, "rejected": "it " * 80}, "too long"),
    "no prompt": ({"chosen": "gladly", "rejected": "it"}, "no prompt"),
    "the same to the tokenizer": ({**GOOD, "chosen": "qqq", "rejected": "zzz"}, "the same"),
    "an empty line": ("", "not JSON"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_line_is_named_and_leaves_nothing(base, tmp_path, what):
    line, names = BAD[what]
    data = write_lines(tmp_path / "p.jsonl", [*toy(40), line, GOOD])
    with pytest.raises(InputError, match=names) as caught:
        train_reward_model(str(base), data, SMALL, tmp_path / "out")
    assert f"{data}:41" in caught.value.where and [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]
    pairs, skipped = read_pairs(data, lambda turns: _words(turns), 64, skip_bad=True)
    assert skipped == 1 and len(pairs) == 41


def _words(turns):
    """Token ids as the tiny tokenizer gives them, near enough: unknown words are one."""
    known = {w: i for i, w in enumerate([*NOUNS, *WORDS, LIKED, "tell", "me", "about"])}
    return [known.get(word, -1) for _, text in turns for word in text.split()]


def test_all_bad_lines_are_counted(base, tmp_path):
    data = write_lines(tmp_path / "p.jsonl", [GOOD, "{", GOOD, *["x"] * 12])
    with pytest.raises(InputError, match="lines 4, 5, 6, 7, 8, 9, 10, 11 and 4 more") as caught:
        train_reward_model(str(base), data, SMALL, tmp_path / "out")
    assert caught.value.where == f"{data}:2"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", None], ids=["empty", "blank", "not UTF-8", "no file"])
def test_a_file_that_is_none(base, tmp_path, content):
    data = tmp_path / "p.jsonl"
    if content is not None:
        data.write_bytes(content)
    with pytest.raises(InputError, match=r"p\.jsonl"):
        train_reward_model(str(base), data, SMALL, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
