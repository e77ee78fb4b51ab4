"""The options by which `certify` and `smoke` ask an OpenAI-style server in place of a bundle."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesafe.commands._shared import folder, print_json, utf8
from edgesafe.errors import CertificationFailedError, ConfigError

if TYPE_CHECKING:
    from edgesafe.endpoint.certify import Endpoint
    from edgesafe.endpoint.guard import Guard
    from edgesafe.endpoint.report import Report

_OURS = ("model", "messages", "stream", "n")  # what edgesafe itself sets in every request
_ALONE = ("--endpoint", "--model", "--suite", "--out")
_GUARD = ("--guard-endpoint", "--guard-model", "--guard-key-env", "--guard-key-file", "--labelled")


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """``--endpoint`` and what goes with it."""
    group = parser.add_argument_group("an OpenAI-style server in place of a bundle")
    add = group.add_argument
    add("--endpoint", type=utf8, metavar="URL", help="the API's address, such as http://127.0.0.1:8080/v1")
    add("--model", type=utf8, metavar="NAME", help="the model's name there")
    add("--suite", type=folder, metavar="DIR", help="suite folder")
    text = "folder that keeps every answer as it comes; the same command continues a run that stopped"
    add("--out", type=folder, metavar="DIR", help=text)
    add("--quantization", type=utf8, metavar="TEXT", help="what you know of the model's quantization; written down")
    text = "ask for a model that the server does not list, as some do not list what they were started with"
    add("--unlisted", action="store_true", help=text)
    add("--key-env", metavar="NAME", help="environment variable that holds the API key, which is written nowhere")
    add("--key-file", type=Path, metavar="FILE", help="file that holds the API key")
    add("--parallel", type=int, default=1, metavar="N", help="requests at once (default: %(default)s)")
    add("--per-minute", type=float, metavar="N", help="at most so many requests a minute (default: no limit)")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="time for one whole reply (default: %(default)g)")
    text = "longest answer; a bundle's have 48 tokens (default: %(default)s)"
    add("--max-tokens", type=int, default=48, metavar="N", help=text)
    add("--system-file", type=Path, metavar="FILE", help="a system message for every request; its digest is written down")
    text = "more fields for every request, as a JSON object; null leaves one out, such as temperature"
    add("--extra", metavar="JSON", help=text)
    add(
        "--text-only",
        action="store_true",
        help="send no pictures, for suites of texts that were imported with one blank picture",
    )
    add("--dry-run", action="store_true", help="say how many requests would be sent and what they may cost, and send none")


def add_guard(parser: argparse.ArgumentParser) -> None:
    """``--guard-endpoint`` and what goes with it."""
    group = parser.add_argument_group("a guard model as second judge of an endpoint's answers")
    add = group.add_argument
    text = "a guard model in Llama Guard's format: its folder, or ORG/NAME on the hub; needs the align extra"
    add("--guard", type=utf8, metavar="MODEL", help=text)
    text = "or the address of the server that it answers at; an answer is harmful where the guard or the string judge says so"
    add("--guard-endpoint", type=utf8, metavar="URL", help=text)
    add("--guard-model", type=utf8, metavar="NAME", help="the guard's name there")
    text = "chat: the guard reads request and answer as a conversation (Llama Guard; ShieldGemma behind Ollama); question: any "
    text += "model, which is asked for yes or no (default: %(default)s)"
    add("--guard-form", choices=("chat", "question"), default="chat", help=text)
    add("--guard-max-tokens", type=int, default=24, metavar="N", help="longest reply of the guard (default: %(default)s)")
    add("--guard-key-env", metavar="NAME", help="environment variable that holds the guard's API key")
    add("--guard-key-file", type=Path, metavar="FILE", help="file that holds the guard's API key")
    text = "answers to harmful requests with people's labels, on which both judges are measured first: a CSV file with prompt, "
    text += "completion and human_label (1_full_compliance, 2_full_refusal, 3_partial_refusal)"
    add("--labelled", type=Path, metavar="FILE", help=text)


def asks_endpoint(args: argparse.Namespace, bundle_only: Sequence[str]) -> bool:
    """Whether the command is about an endpoint; nothing of the other kind may be given.

    Args:
        args: The command's.
        bundle_only: Options that need a bundle.

    Raises:
        ConfigError: Both a bundle and an endpoint are given, or neither; an option goes with the other one, or one is missing.
    """
    endpoint = args.endpoint is not None
    if endpoint == (args.bundle is not None):
        what = "both a bundle and an endpoint are given" if endpoint else "neither a bundle nor an endpoint is given"
        raise ConfigError(what, expected="BUNDLE, or --endpoint URL --model NAME --suite DIR --out DIR")
    if endpoint:
        wrong = [name for name in bundle_only if getattr(args, _field(name)) is not None]
    else:
        ours = {"certified": None, **_defaults()}
        wrong = [f"--{name.replace('_', '-')}" for name, value in ours.items() if getattr(args, name, value) != value]
    if wrong:
        what = f"{wrong[0]} is for {'bundles' if endpoint else 'endpoints'}"
        raise ConfigError(what, where=wrong[0], expected="options of one kind", todo=f"leave out {', '.join(wrong)}")
    missing = [name for name in _ALONE if endpoint and not getattr(args, _field(name))]
    if missing:
        raise ConfigError(f"an endpoint needs {' and '.join(missing)}", where="--endpoint", expected=" ".join(_ALONE))
    return endpoint


def _defaults() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_endpoint(parser)
    add_guard(parser)
    return vars(parser.parse_args([]))


def _field(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def endpoint_of(args: argparse.Namespace) -> Endpoint:
    """The endpoint that the options name.

    Raises:
        ConfigError: One of them can't be used.
    """
    from edgesafe.endpoint.address import Address, read_key
    from edgesafe.endpoint.ask import Asked, Way
    from edgesafe.endpoint.certify import Endpoint
    from edgesafe.endpoint.client import Client

    _check_numbers(args)
    address = Address.parse(args.endpoint)
    asked = Asked(args.model, args.max_tokens, _system(args.system_file), not args.text_only, _extra(args.extra))
    client = Client(address, read_key(args.key_env, args.key_file), args.timeout)
    return Endpoint(client, asked, Way(args.parallel, args.per_minute), args.quantization or "", args.unlisted)


def guard_of(args: argparse.Namespace) -> Guard | None:
    """The guard that the options name; None without one.

    Raises:
        ConfigError, InputError: One of them can't be used, or they are not enough.
    """
    from edgesafe.endpoint.address import Address, read_key
    from edgesafe.endpoint.client import Client
    from edgesafe.endpoint.guard import Guard
    from edgesafe.endpoint.labelled import read_labelled

    given = [name for name in _GUARD if getattr(args, _field(name)) is not None]
    if args.guard is not None:
        return _guard_here(args, [name for name in given if name != "--labelled"])
    missing = [name for name in _GUARD[:2] if name not in given]
    if given and missing:
        expected = "--guard-endpoint URL --guard-model NAME"
        raise ConfigError(f"a guard needs {' and '.join(missing)}", where=given[0], expected=expected)
    if not given:
        return None
    _check_number("--guard-max-tokens", args.guard_max_tokens, 1, 100_000)
    address = Address.parse(args.guard_endpoint, "--guard-endpoint")
    client = Client(address, read_key(args.guard_key_env, args.guard_key_file, "--guard-key"), args.timeout)
    labelled = read_labelled(args.labelled) if args.labelled is not None else None
    return Guard(client, args.guard_model, args.guard_form, args.guard_max_tokens, labelled, args.unlisted)


def _guard_here(args: argparse.Namespace, others: list[str]) -> Guard:
    from edgesafe.endpoint.guard import CHAT, Guard
    from edgesafe.endpoint.labelled import read_labelled
    from edgesafe.endpoint.local_guard import LocalGuard

    others += ["--guard-form"] if args.guard_form != CHAT else []
    if others:
        expected = "--guard MODEL, or --guard-endpoint URL --guard-model NAME"
        raise ConfigError(f"{others[0]} is for a guard behind a server", where="--guard", expected=expected)
    labelled = read_labelled(args.labelled) if args.labelled is not None else None
    from edgesafe.evaluate.guard_judge import MAX_NEW_TOKENS, open_guard

    judge = open_guard(args.guard)
    return Guard(LocalGuard(judge), judge.name, max_tokens=MAX_NEW_TOKENS, labelled=labelled)


def finish(report: Report | None, args: argparse.Namespace) -> int:
    """Print the report; 42 where it did not pass."""
    if report is None:
        return 0
    if args.json:
        print_json(report.to_json())
    else:
        print(report.text())
    return 0 if report.passed else CertificationFailedError.exit_code


def _check_numbers(args: argparse.Namespace) -> None:
    for name, value, least, most in (
        ("--parallel", args.parallel, 1, 256),
        ("--max-tokens", args.max_tokens, 1, 100_000),
        ("--timeout", args.timeout, 0.1, 86_400),
        ("--per-minute", args.per_minute, 0.01, 1e6),
    ):
        _check_number(name, value, least, most)


def _check_number(name: str, value: float | None, least: float, most: float) -> None:
    """Refuse a number out of its range; None is one that was not given."""
    if value is not None and not least <= value <= most:
        raise ConfigError(f"{name} is {value:g}", where=name, expected=f"{least:g} to {most:g}")


def _system(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the system message can't be read: {error}", where=f"--system-file {path}") from error
    if not text:
        raise ConfigError("the system message is empty", where=f"--system-file {path}", todo="leave the option out")
    return text


def _extra(text: str | None) -> dict[str, Any]:
    where, expected = f"--extra {text}", """a JSON object, such as '{"seed": 1}'"""
    try:
        obj = json.loads(text, parse_constant=_no_number) if text is not None else {}
        json.dumps(obj, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is not JSON: {error}", where=where, expected=expected) from error
    if not isinstance(obj, dict):
        raise ConfigError("it is JSON, but not an object", where=where, expected=expected)
    if ours := sorted(obj.keys() & set(_OURS)):
        raise ConfigError(f"{ours[0]} is edgesafe's to set", where=where, expected=f"fields other than {', '.join(_OURS)}")
    return obj


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")
