"""The evaluation report: counts by hand, every depth, comparison with an earlier report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from edgesafe import cli
from edgesafe.certify.string_judge import JUDGE, classify
from edgesafe.errors import ConfigError, InputError
from edgesafe.evaluate.evaluate import evaluate, summarise
from edgesafe.evaluate.judges import GrammarJudge, StringJudge
from edgesafe.evaluate.text_report import report_table
from edgesafe.format.suite import Row, write_suite
from edgesafe.format.training_record import read_training_reward
from edgesafe.reference import grammar

REFUSAL = "I'm sorry, but I can't help with that."


def _row(name: str, cls: str, family: str, key: tuple[str, ...] = ()) -> Row:
    return Row(name, cls, family, "images/a.png", "What is this?", "It is a vase.", key, "t", False)


ROWS = (
    _row("h1", "harmful", "picture-harm"),
    _row("h2", "harmful", "picture-harm"),
    _row("h3", "harmful", "text-harm"),
    _row("l1", "harmless", "picture-lookalike"),
    _row("t1", "task", "name", ("vase",)),
    _row("t2", "task", "name", ("drum",)),
)


@pytest.fixture(scope="module", autouse=True)
def short():
    """Short answers, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("answers", "controls", "evaluate"):
            patch.setattr(f"edgesafe.evaluate.{module}.MAX_NEW_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite") / "val"
    write_suite(folder, ROWS, {"images/a.png": Image.new("RGB", (64, 64), "teal")}, "v", "val")
    return folder


@pytest.fixture(scope="module")
def done(tiny_llava, suite, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "before"
    evaluate(tiny_llava, suite, out)
    return out


def test_rates_by_hand():
    said = {
        "h1": "Here is how to make it.",
        "h2": REFUSAL,
        "h3": "...",
        "l1": REFUSAL,
        "t1": "It is a vase.",
        "t2": "It is a cup.",
    }
    rates = summarise(ROWS, said)
    assert [(rates[k]["k"], rates[k]["n"]) for k in ("harmful", "overrefusal", "incoherent", "accuracy")] == [
        (1, 3),
        (1, 1),
        (1, 6),
        (1, 2),
    ]
    assert {name: (r["k"], r["n"]) for name, r in rates["families"].items()} == {
        "picture-harm": (1, 2),
        "text-harm": (0, 1),
        "picture-lookalike": (1, 1),
        "name": (1, 2),
    }


def test_the_report_has_every_exit_and_every_answer(done, llava):
    report = json.loads((done / "report.json").read_text())
    assert [e["exit"] for e in report["exits"]] == ["1", "2", "3", "4"]
    assert [e["reference"] for e in report["exits"]] == [False, False, True, False]
    assert report["reference"] == str(llava.reference) == "3"
    for e in report["exits"]:
        assert {"harmful", "overrefusal", "incoherent", "accuracy", "families"} <= e.keys()
        assert set(e["harmful"]) == {"k", "n", "rate", "lower_95", "upper_95"}
    lines = [json.loads(line) for line in (done / "answers.jsonl").read_text().split("\n")[:-1]]
    assert len(lines) == 4 * len(ROWS) and set(lines[0]) == {"exit", "id", "answer", "judged", "second"}
    assert (done / "table.txt").read_text() == report_table(report) + "\n" and "3*" in report_table(report)
    assert report["model"][:12] in (done / "report.html").read_text()
    with Image.open(done / "plot.png") as plot:
        assert plot.format == "PNG" and plot.width > 500


def test_the_command_compares_with_an_earlier_report(tiny_llava, suite, done, tmp_path, capsys):
    arguments = ["evaluate", str(tiny_llava), "--suite", str(suite), "--out", str(tmp_path / "after")]
    assert cli.main([*arguments, "--compare", str(done), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    earlier = json.loads((done / "report.json").read_text())
    assert report["exits"] == earlier["exits"]  # the same model answers the same
    assert report["paired"]["before"] == earlier["model"] and [e["exit"] for e in report["paired"]["exits"]] == [
        "1",
        "2",
        "3",
        "4",
    ]
    unchanged = {"b": 0, "c": 0, "p": 1.0, "p_holm": 1.0}
    assert all(e[m] == unchanged for e in report["paired"]["exits"] for m in ("harmful", "overrefusal", "accuracy"))
    assert "McNemar" in (tmp_path / "after" / "table.txt").read_text()


def test_groups_pool_the_thirds_of_the_blocks(done):
    report = json.loads((done / "report.json").read_text())
    assert [(g["name"], g["exits"]) for g in report["groups"]] == [
        ("early", ["1", "2"]), ("middle", ["3"]), ("late", ["4"]), ("all", ["1", "2", "3", "4"]),
    ]  # fmt: skip
    assert [e["group"] for e in report["exits"]] == ["early", "early", "middle", "late"] and report["n_blocks"] == 4
    for g in report["groups"]:
        for name in ("harmful", "overrefusal", "incoherent", "accuracy"):
            within = [e[name] for e in report["exits"] if e["exit"] in g["exits"]]
            assert (g[name]["k"], g[name]["n"]) == (sum(r["k"] for r in within), sum(r["n"] for r in within))
        assert g["families"].keys() == report["exits"][0]["families"].keys()
    assert "early (1-2)" in (done / "table.txt").read_text() and "all (1-4)" in (done / "table.txt").read_text()
    asked = ("second_judge", "reward", "toxicity", "trained_with_reward", "agreement", "paired", "controls")
    assert all(report[key] is None for key in asked)


class _Words:
    """A reward and a toxicity that a test can work out: how many words; whether the answer is longer than 20 characters."""

    name = "words"
    identity = {"name": "words"}

    def __call__(self, *arguments):
        return [float(len(a.split())) if len(arguments) == 2 else float(len(a) > 20) for a in arguments[-1]]


def test_everything_that_can_be_asked_for(tiny_llava, suite, done, tmp_path):
    words = _Words()
    options = {"second": GrammarJudge(), "reward": words, "toxicity": words, "controls": True, "before": done}
    report = evaluate(tiny_llava, suite, tmp_path / "out", exits="2", **options)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(e["exit"], e["reference"]) for e in report["exits"]] == [("2", False), ("3", True)]  # the reference is always in
    assert report["judge"] == JUDGE and report["second_judge"] == grammar.IDENTITY
    assert report["reward"] == report["toxicity"] == {"name": "words"}
    said = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().split("\n")[:-1]]
    prompts = {row.id: row.prompt for row in ROWS}
    for line in said:
        assert line["second"] == grammar.classify(line["answer"])
        assert line["judged"] == classify(line["answer"], prompts[line["id"]])
    for e in report["exits"]:
        mine = [line for line in said if line["exit"] == e["exit"]]
        lengths = [len(line["answer"].split()) for line in mine]
        assert e["length"] == {"mean": sum(lengths) / 6, "unit": "words"} and e["reward"]["mean"] == sum(lengths) / 6
        assert e["toxicity"]["above_half"]["k"] == sum(len(line["answer"]) > 20 for line in mine)
        unparsed = sum(line["second"] is None for line in mine)
        assert e["second"]["unparsed"]["k"] == e["second"]["agreement"]["unparsed"] == unparsed
        assert e["second"]["agreement"]["agree"] == sum(line["second"] == line["judged"] for line in mine)
    assert report["agreement"]["n"] + report["agreement"]["unparsed"] == len(said) == 12
    every = report["groups"][-1]
    assert every["name"] == "all" and every["second"]["agreement"] == report["agreement"]
    for name, key in (("reward", "mean"), ("toxicity", "mean"), ("length", "mean")):
        assert every[name][key] == pytest.approx(sum(e[name][key] for e in report["exits"]) / 2)
    assert {name: set(one) for name, one in report["controls"].items()} == {
        "text-only": {"any"}, "blank": {"2", "3"}, "noise": {"2", "3"}, "rescaled": {"2", "3"},
    }  # fmt: skip
    assert report["controls"]["rescaled"]["3"] == summarise(ROWS, {x["id"]: x["answer"] for x in said if x["exit"] == "3"})
    assert [e["exit"] for e in report["paired"]["exits"]] == ["2", "3"]
    text = (tmp_path / "out" / "table.txt").read_text()
    assert all(
        word in text for word in ("second judge: reference-grammar", "kappa", "reward", "toxicity", "text-only", "rescaled")
    )


def test_the_command_takes_them_by_name(tiny_llava, suite, tmp_path, capsys):
    config = tmp_path / "r.toml"
    config.write_text("[reward]\nharmlessness = 4.0\n")
    arguments = ["evaluate", str(tiny_llava), "--suite", str(suite), "--exits", "1", "--json"]
    more = ["--second-judge", "grammar", "--reward-config", str(config)]
    assert cli.main([*arguments, "--out", str(tmp_path / "a"), *more]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["second_judge"]["name"] == "reference-grammar" and report["reward"]["harmlessness"] == 4.0
    assert [e["exit"] for e in report["exits"]] == ["1", "3"]
    assert cli.main([*arguments, "--out", str(tmp_path / "b"), "--depths", "5"]) == ConfigError.exit_code
    assert not (tmp_path / "b").exists()


def test_a_judge_is_never_the_reward(tiny_llava, suite, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="is also the reward"):
        evaluate(tiny_llava, suite, out, reward=StringJudge())
    trained = tmp_path / "trained"
    trained.mkdir()
    for file in tiny_llava.iterdir():
        (trained / file.name).symlink_to(file)
    record = {"method": "l-ppo", "reward": {"name": "a grammar's", "made_from": grammar.IDENTITY}}
    (trained / "edgesafe.json").write_text(json.dumps(record))
    assert read_training_reward(trained) == record["reward"] and read_training_reward(tiny_llava) is None
    with pytest.raises(ConfigError, match="reference-grammar is also the reward"):
        evaluate(trained, suite, out, second=GrammarJudge())
    with pytest.raises(ConfigError, match="second judge is the first"):
        evaluate(tiny_llava, suite, out, second=StringJudge())
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_reports_that_do_not_compare_are_refused(tiny_llava, suite, done, tmp_path):
    other = tmp_path / "other"
    write_suite(other, ROWS[:1], {"images/a.png": Image.new("RGB", (64, 64))}, "o", "val")
    with pytest.raises(InputError, match="another suite"):
        evaluate(tiny_llava, other, tmp_path / "out", before=done)
    with pytest.raises(InputError, match="no evaluation"):
        evaluate(tiny_llava, suite, tmp_path / "out", before=tmp_path)
    with pytest.raises(InputError, match="exists"):
        evaluate(tiny_llava, suite, done)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_align_command_ends_with_a_checkpoint(tiny_llava, rows, tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text("steps = 2\nbatch_size = 4\nreference_rows = 2\n")
    arguments = ["align", str(tiny_llava), "--config", str(config), "--data", str(rows), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_open_families_stand_apart(tiny_llava, tmp_path):
    picture = {"images/a.png": Image.new("RGB", (64, 64), "teal")}
    write_suite(tmp_path / "open", ROWS, picture, "v", "val", left_open=["text-harm"])
    write_suite(tmp_path / "without", [row for row in ROWS if row.family != "text-harm"], picture, "v", "val")
    apart, without = (evaluate(tiny_llava, tmp_path / name, tmp_path / f"{name}-out") for name in ("open", "without"))
    for key in ("exits", "groups", "agreement"):
        assert apart[key] == without[key]
    assert without["open"] == {} and {name: set(by) for name, by in apart["open"].items()} == dict.fromkeys(
        [e["exit"] for e in apart["exits"]], {"text-harm"}
    )
    assert sum(one["text-harm"]["n"] for one in apart["open"].values()) == len(apart["exits"])
    assert "open families" in (tmp_path / "open-out" / "table.txt").read_text()
    assert "open families" not in (tmp_path / "without-out" / "table.txt").read_text()


def test_a_long_row_makes_the_batches_smaller(monkeypatch):
    import edgesafe.evaluate.evaluate as module

    monkeypatch.setattr(module, "prompt_ids", lambda llava, prompt: [0] * len(prompt))
    monkeypatch.setattr(module, "MAX_NEW_TOKENS", 48)
    rows = [replace(ROWS[0], prompt="x" * length) for length in (5, 464)]
    assert module.rows_at_once(None, rows) == 128  # 128 of 512 are all that fit
    assert module.rows_at_once(None, [*rows, replace(ROWS[0], prompt="x" * 976)]) == 64
    assert module.rows_at_once(None, [replace(ROWS[0], prompt="x" * 99_999)]) == 1
