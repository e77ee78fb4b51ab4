"""The benches' tables: figures worked out by hand from small results, and a result that is not there."""

from __future__ import annotations

import json

import pytest

from study.benches import bench_tables

RUN = {"date": "2026-01-02T03:04:05+00:00", "machine": "a machine", "threads": 2, "rounds": 3}


def _ratios(**of):
    return {"times_as_fast_as_first": of}


def test_tables_say_what_the_results_say(tmp_path):
    # The peer's prefill takes 200 ms to our 100 and its token 4 ms to our 5: 2.00 and 0.80 times ours.
    ours = {"prefill_ms": 100.0, "decode_ms": 5.0, "prefill_cpu_ms": 180.0, "decode_cpu_ms": 9.0}
    peer = {"prefill_ms": 200.0, "decode_ms": 4.0, "prefill_cpu_ms": 360.0, "decode_cpu_ms": 9.0}
    engines = {
        "edgesafe": ours | _ratios(**dict.fromkeys(ours, 1.0)),
        "peer": peer | _ratios(prefill_ms=0.5, decode_ms=1.25, prefill_cpu_ms=0.5, decode_cpu_ms=1.0),
    }
    vision = {"fp32": {"picture_ms": 30.0} | _ratios(picture_ms=1.0), "int8": {"picture_ms": 10.0} | _ratios(picture_ms=3.0)}
    speed = {"engines": engines, "peers": ["peer==1"], "vision": vision, "vision_blocks": 8}
    speed |= {"vision_agreement": {"least_cosine": 0.5}, "runs": {"engines": RUN, "vision": RUN, "session": RUN}}
    speed |= {
        "conversation": {"second_over_first": 0.25},
        "memory": {"peak_mib": 90.04, "imports_mib": 50.0, "limit_mib": 99.9},
    }
    speed |= {"cold_start": {"import_edgesafe_ms": 0.5, "with_session_ms": 99.6}}
    speed |= {"by_exit": {"1": {"ttft_ms": 4.0}, "2": {"ttft_ms": 5.0}, "3": {"ttft_ms": 6.0}}}
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    policies = {name: {"miss_rate": 0.025, "depth_of_oracle": 0.9} for name in ("edgesafe", "static", "oracle")}
    budget = RUN | {"quantile": 0.95, "traces": {"quiet": {"requests": 40, "policies": policies}}}
    (tmp_path / "budget.json").write_text(json.dumps(budget))
    names = ("edgesafe", "depths", "oracle")
    right = {name: {"miss_rate": 0.025 * i, "accuracy_of_oracle": 0.96 + i / 100} for i, name in enumerate(names, 1)}
    rungs = {"traces": {"quiet": {"requests": 43, "too_short": 3, "policies": right}}, "accuracy_from": "hand"}
    (tmp_path / "budget-rungs.json").write_text(json.dumps(budget | rungs))
    tables = bench_tables(tmp_path)
    assert (
        "| quiet | 40 | 3 | 2.5 / 97.0 | 5.0 / 98.0 |" in tables["budget-rungs"] and "Accuracy: hand." in tables["budget-rungs"]
    )
    assert "| peer | 200 | 4.0 | 2.00 | 0.80 | 2.00 | 1.00 |" in tables["engines"]
    assert "2026-01-02, a machine, 2 threads. peer==1; 3 rounds" in tables["engines"]
    assert "| int8 | 10 | 3.00 |" in tables["vision-speed"] and "float32 one: 0.5." in tables["vision-speed"]
    assert "| quiet | 40 | 2.5 / 90 | 2.5 / 90 |" in tables["budget"]  # the oracle is the measure, not a column
    assert "MiB | 90.0 | 99.9 |" in tables["session"] and "with Session, ms | 100 | 150 |" in tables["session"]
    assert "exit 1, ms | 4.0 |" in tables["session"] and "exit 3, ms | 6.0 |" in tables["session"]
    assert tables["tower-schemes"] == "Not run: schemes.json"


@pytest.mark.parametrize("earlier", [False, True])
def test_full_size_shapes_stand_in_the_order_of_their_weights(tmp_path, earlier):
    def named(key, depth):
        return {f"{key}_depth": depth} if earlier else {key: str(depth)}

    def result(name, millions, seconds):
        asked = [
            {**named("exit", 6), "ttft_ms": 1000.0, "predicted_ms": 1100.0, "token_ms": 7.0},
            {**named("exit", 12), "ttft_ms": 2000.0, "predicted_ms": 1900.0, "token_ms": 8.0},
        ]
        plan = {"weights": millions * 10**6, "export_gib": 1.5, "bundle_bytes": 2e9, "run_gib": 2.5, **named("reference", 12)}
        return RUN | {
            "model": name,
            "plan": plan,
            "export": {"seconds": seconds, "peak_gib": 1.25, "bytes": 2.01e9},
            "ask": {"peak_gib": 2.75},
            "every_exit": {"rows": asked},
        }

    unmeasured = result("a", 7000, 400.4)
    unmeasured["every_exit"]["rows"] = [{**named("exit", 12), "ttft_ms": 30.4e3, "token_ms": 150.0}]
    (tmp_path / "fullsize-a.json").write_text(json.dumps(unmeasured))
    (tmp_path / "fullsize-b.json").write_text(json.dumps(result("b", 256, 48)))
    table = bench_tables(tmp_path)["fullsize"].splitlines()
    # The exit at half depth takes 1000 ms and was predicted at 1100: 10 % too much; the other is 5 % too little.
    assert table[2] == "| b | 256 | 48 | 1.25 (1.50) | 2.010 (2.000) | 2.75 (2.50) | 2.00 at 12 | 1.00 at 6 | +10 | 8 |"
    assert table[3].startswith("| a | 7000 | 400 |") and table[3].endswith("| 30.40 at 12 | 30.40 at 12 | - | 150 |")
    assert table[-1] == "a machine; b 2026-01-02, a 2026-01-02."


def test_long_runs_and_memory_say_what_the_results_say(tmp_path):
    soak = RUN | {"asks": 20, "threads": 4, "wrong": ["x"], "interleaved": 2, "growth": 0.0123}
    counts = {"cases": 9, "refused": 8, "answered": 1, "failures": ["y"]}
    fuzz = RUN | {"kinds": {"sealed": counts, "request": counts | {"date": "2026-01-09T00:00:00"}}}
    load = RUN | {
        "wrong": [],
        "ways": {"whole, sync": 3, "stream, async": 4},
        "connections": 2,
        "first_event_ms": {"median": 0.42},
    }
    load |= {"tokens_after_close": {"0": 3, "1": 2, "2": 1}, "budgets": {"asked": 9, "ask": {"kept": 7}, "serve": {"kept": 8}}}
    killed = {"peak_gib": 2.5}, {"peak_gib": 2.25}
    aligned = RUN | {"model": "a", "method": "l-sft", "estimated_gib": 3.0, "update_seconds": [7.0, 9.0]}
    aligned |= {"promises": {"one": True, "two": False}, "runs": dict(zip(("whole", "resumed"), killed, strict=True))}
    for name, result in (("soak", soak), ("load", load), ("fuzz", fuzz), ("align-a-l-sft", aligned)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    tables = bench_tables(tmp_path)
    # One wrong answer and two mixed up are three failures; no chaos was run.
    assert "| `make soak` | 20 requests | from 4 threads; memory +1.2 % | 3 | 2026-01-02 |" in tables["long-runs"]
    assert "| 9 | 8 refused, 1 answered | 1 | 2026-01-02 |" in tables["long-runs"] and "chaos" not in tables["long-runs"]
    assert "| `make fuzz`: HTTP requests | 9 | 8 refused, 1 answered | 1 | 2026-01-09 |" in tables["long-runs"]
    assert "| `make load` | 7 HTTP requests, 2 connections | first event 0.4 ms after the first token;" in tables["long-runs"]
    assert "5 of 6 closed streams ended within a token; 8 of 9 budgets kept, by `ask` 7 | 0 |" in tables["long-runs"]
    assert "| a | l-sft | 3.00 | 2.50 | 8 | no |" in tables["align-memory"]


def test_maps_that_open_and_what_maps_cost_say_what_the_results_say(tmp_path):
    own = {key: {"rate": rate, "n": 40} for key, rate in (("harmful", 0.025), ("overrefusal", 0.1), ("accuracy", 0.9))}
    more = own | {"harmful": {"rate": 0.5, "n": 40}, "kinds": {"named": 15, "mistaken": 4, "other": 1}}
    ways = {"as it is": own | {"kinds": {"named": 0, "mistaken": 1, "other": 0}}, "whole": more}
    (tmp_path / "open-map.json").write_text(json.dumps(RUN | {"updates": 60, "split": "val", "exits": {"5": ways}}))
    cost = {"bytes": {"map": 1_100_000, "ratio": 1.0061, "maps": 23}, "folded": {"ratio": 1.0242}, "load_average": [3.0]}
    cost |= {"ms": {"map": 4.0, "segment": 90.0, "head": 33.0}, "first_token": {"ratio": 1.0002}}
    (tmp_path / "map-cost.json").write_text(json.dumps(RUN | cost | {"tower": {"segment_blocks": 3}}))
    tables = bench_tables(tmp_path)
    assert "| 5 | as it ships | 2.5 | 10.0 | 90.0 | 0 / 1 / 0 |" in tables["map-opened"]
    assert "| 5 | trained | 50.0 | 10.0 | 90.0 | 15 / 4 / 1 |" in tables["map-opened"]
    assert "60 updates of one map; 40 harmful requests of the val split." in tables["map-opened"]
    assert "all 23 maps, without them = 1 | 1.0061 | 1.01 |" in tables["map-cost"]
    assert "| 4.0 / 90.0 / 33.0 |" in tables["map-cost"] and "load was 3;" in tables["map-cost"]
    assert "| a map, MB | 1.10 |" in tables["map-cost"] and "without them = 1 | 1.0242 | - |" in tables["map-cost"]


def test_flips_stand_beside_the_published_precision(tmp_path):
    def run(helped, refused):
        return {
            "harmful": {"k": helped, "n": 8, "rate": helped / 8},
            "overrefusal": {"k": refused, "n": 4, "rate": refused / 4},
        }

    harm = {"difference": 0.25, "lower_95": -0.01, "upper_95": 0.5, "b": 1, "c": 3, "p": 0.625}
    small = run(4, 0) | {"against own": {"identical": 7, "classes": {"harmful": harm}}}
    found = RUN | {"variants": {"system": {"system": "Be careful.", "Q4_1": run(2, 1), "Q4_0": small}}}
    (tmp_path / "endpoint-flips.json").write_text(json.dumps(found))
    table = bench_tables(tmp_path)["endpoint-flips"]
    assert "| system | Q4_1 | 25.0 (2 of 8) | 25.0 (1 of 4) | - | - | - |" in table
    assert "| system | Q4_0 | 50.0 (4 of 8) | 0.0 (0 of 4) | +25.0 [-1.0, +50.0] | 3 / 1, 0.625 | 7 |" in table


def test_exits_that_see_less_stand_beside_what_they_cost(tmp_path):
    one = {"ttft_ms": 900.0, "vision_ms": 700.0, "prefill_ms": 100.0, "tiles": 1, "times_as_fast": 10.0}
    exits = {"12x1": one, "12": one | {"ttft_ms": 9000.0, "tiles": 13, "times_as_fast": 1.0}}
    found = {"model": "s", "picture": "640x480", "clock": "a clock", "exits": exits}
    found |= {"bytes": {"with": 1010, "without": 1000}, "peak_mib": {"with": 300.0, "without": 300.0}}
    (tmp_path / "rungs-s.json").write_text(json.dumps(RUN | found))
    table = bench_tables(tmp_path)["rungs"]
    assert "| s | 12x1 | 1 | 0.90 | 0.70 | 0.10 | 10.0 |" in table and table.index("| s | 12 | 13 | 9.00") < table.index("12x1")
    assert "s on 640x480, 2026-01-02: bundle 1.01000 and most memory 1.000 times those without such exits (300 MiB)" in table
