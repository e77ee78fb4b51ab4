"""Settings: the shipped files are valid, everything else wrong is a ConfigError that names its key."""

from __future__ import annotations

import pytest

from edgesafe.align.config import default_config, parse_config, read_config
from edgesafe.align.settings import AlignConfig
from edgesafe.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("stepz = 3", "did you mean 'steps'"),
        ("steps = 0", "steps"),
        ("steps = 1.0", "steps"),
        ('method = "ppo"', "'l-sft'"),
        ('[eval]\nsuite = "s"\nevery = 1\npatience = 2', "eval.choose"),
        ("lr = true", "lr"),
        ("lr = nan", "lr"),
        ("lr = 0", "lr"),
        ("harm_weight = 0", "harm_weight"),
        ("batch_size = 4\nreference_rows = 5", "reference_rows"),
        ("warmup = 1.0", "warmup"),
        ('precision = "int8"', "precision"),
        ("focus = [0.5]", "focus"),
        ("focus = [0.7, 0.4]", "focus"),
        ("focus_share = 1.5", "focus_share"),
        ("steps = ", "TOML"),
        ("lora = 3", "lora"),
        ("[lora]\nrank = 3", "unknown key 'rank'"),
        ("[lora]\nalfa = 3", "did you mean 'alpha'"),
        ("[lora]\ndropout = 1.0", "dropout"),
        ("[lora]\ntargets = []", "targets"),
        ("[eval]\nevery = 10", "eval.suite"),
    ],
)
def test_bad_settings_are_config_errors(text, names, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=names):
        read_config(path)


@pytest.mark.parametrize("name", ["self-distill", "l-sft", "l-dpo", "l-ppo", "l-ppo-paper"])
def test_the_shipped_settings_are_valid_and_say_their_method(name):
    assert read_config(default_config().with_name(f"{name}.toml"), data="x").method == name.removesuffix("-paper")


@pytest.mark.parametrize("name", ["self-distill", "l-sft"])
def test_the_shipped_settings_of_a_supervised_method_are_the_defaults(name):
    assert read_config(default_config().with_name(f"{name}.toml"), data="x") == parse_config({"method": name, "data": "x"}, "")


def test_a_given_value_wins_over_the_file_s_table_of_exits_and_leaves_the_rest_of_it(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[exits]\ntrain = "2,4"\nmap = "none"')
    found = {(config.exits, config.exit_map) for config in (read_config(path, exit_map="linear"), read_config(path, exits="6"))}
    assert found == {("2,4", "linear"), ("6", "none")}
    assert read_config(path).exit_map == "none" and read_config(path).exits == "2,4"


def test_the_papers_way_is_one_depth_and_nothing_at_the_reference_depth():
    config = read_config(default_config().with_name("l-ppo-paper.toml"))
    assert config.exits.isdecimal() and config.reference_rows == 0


def test_the_default_is_l_sft():
    assert read_config(default_config()).method == "l-sft"


def test_arguments_win_over_the_file_and_none_does_not():
    config = read_config(default_config(), data="d", seed=None)
    assert (config.data, config.seed) == ("d", AlignConfig().seed)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError):
        read_config(tmp_path / "none.toml")
