"""What several commands share: their common arguments, MODEL and engines by name, and printing JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesafe.errors import ConfigError, EdgesafeError, InputError
from edgesafe.format.targets import check_name, shown_path
from edgesafe.plugins import load_named

if TYPE_CHECKING:
    from edgesafe.runtime.engine import Engine

_ENGINE = "MODULE:NAME, where NAME is an engine, or makes one when called without arguments"


def add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A parser of its own for a command or for an action of one.

    Args:
        commands: What ``add_subparsers`` gave.
        name: The word on the command line.
        text: The help: one line for the list of commands, more lines, and last an example after ``Example:``.
    """
    described, mark, example = text.strip().partition("Example:")
    first = described.partition("\n")[0].rstrip(".")
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=first[:1].lower() + first[1:],
        description=described.strip(),
        epilog=mark + example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def add_bundle(parser: argparse.ArgumentParser, *, needed: bool = True) -> None:
    """BUNDLE; where it is not `needed`, something else may be named in its place."""
    many = None if needed else "?"
    text = "the bundle's folder, as `edgesafe export` wrote it"
    parser.add_argument("bundle", type=folder, metavar="BUNDLE", nargs=many, help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document instead of text")


def add_accept_damage(parser: argparse.ArgumentParser) -> None:
    """``--accept-damage``."""
    text = "write the bundle even if a named scheme changes what the model says; the bundle says so for ever"
    parser.add_argument("--accept-damage", action="store_true", help=text)


def add_schemes(parser: argparse.ArgumentParser) -> None:
    """What is to be made of MODEL: the device, the graphs, the schemes, the exits."""
    parser.add_argument("--device", type=utf8, required=True, help="profile name (`edgesafe devices`), or a TOML file")
    text = "one graph per segment, or one whole graph per exit (default: %(default)s)"
    parser.add_argument("--layout", choices=("chain", "standalone"), default="chain", help=text)
    text = "weights of the vision tower: int8-dynamic or fp32 (default: the device's)"
    parser.add_argument("--vision-scheme", metavar="SCHEME", help=text)
    text = "weights of the text model: auto (the smallest that answers and reads as the checkpoint does), int4-gptq, "
    text += "mixed-gptq, int4-block32, int4-block64, int4-block128, int8-block32 or fp32 (default: the device's)"
    parser.add_argument("--text-scheme", metavar="SCHEME", help=text)
    text = 'exits to export, e.g. "3,6,9", "1-11", "every:2" or "all"; "6-12@9" have 9 visual tokens, where a picture is one '
    text += 'square of them, "6-12x1" one tile, where it is cut (default: all of a small tower, eight of a large one)'
    parser.add_argument("--exits", metavar="EXITS", help=text)


def add_export(parser: argparse.ArgumentParser) -> None:
    """What `edgesafe export` and `optimum-cli export edgesafe` ask for beside MODEL and the bundle's folder."""
    add_schemes(parser)
    parser.add_argument("--suite", type=folder, metavar="DIR", help="certification suite to put into the bundle")
    text = "recorded in the bundle; picks the text that weights are calibrated on (default: %(default)s)"
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    add_accept_damage(parser)
    add_json(parser)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """``--engine``."""
    text = "run the graphs with this engine, an object of your own (default: onnxruntime)"
    parser.add_argument("--engine", metavar="MODULE:NAME", help=text)


def add_model(parser: argparse.ArgumentParser, *, default: Path | None = None) -> None:
    """MODEL, which ``model_folder`` turns into a folder; without it the ``default``, where there is one."""
    from edgesafe.checkpoint.recipe import load_recipes

    families = ", ".join(sorted(load_recipes()))
    text = f"checkpoint folder, or ORG/NAME[@REVISION] on the Hugging Face hub; its model_type is one of {families}"
    if default is None:
        parser.add_argument("model", type=utf8, metavar="MODEL", help=text)
    else:
        text += " (default: the reference model of a clone)"
        parser.add_argument("model", type=utf8, metavar="MODEL", nargs="?", default=str(default), help=text)


def folder(text: str) -> Path:
    """A folder's path, held to ``check_name``."""
    return Path(utf8(text))


def utf8(text: str) -> str:
    """The name of something that libraries in C++ and Rust will open too, held to ``check_name``."""
    check_name(text, ConfigError)
    return text


def keep_apart(out: Path, option: str = "--out", **inputs: Path | str | None) -> None:
    """Refuse an output that is one of the inputs, or lies in one: it would change what it is made from.

    Args:
        out: The output.
        option: Its name on the command line.
        inputs: The inputs by their names; None is one that was not given.

    Raises:
        InputError: It is or does.
    """
    for name, given in inputs.items():
        if given is None or not os.path.lexists(given):
            continue
        place, source = (Path(os.path.realpath(path)) for path in (out, given))  # Path.resolve fails on a link to itself
        if source in (place, *place.parents):
            what = "is" if place == source else "lies in"
            raise InputError(
                f"{option} {what} {name}, which this command only reads",
                where=shown_path(out),
                expected="a place of its own",
                todo=f"name another {option}",
            )


def model_folder(model: str) -> Path:
    """The folder of MODEL, fetched from the Hugging Face hub where it is an id."""
    from edgesafe.checkpoint.hub import resolve_model

    return resolve_model(model)[0]


def print_json(obj: object) -> None:
    """Print one JSON document; where stdout can't show a character, as an escape that JSON readers know."""
    text = json.dumps(obj, indent=1, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(obj, indent=1)
    print(text)


def quiet_libraries() -> None:
    """Leave out the libraries' own bars and notices, which say nothing that a person can act on."""
    logging = importlib.import_module("transformers.utils.logging")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def engine_option(args: argparse.Namespace) -> Engine | None:
    """The engine that ``--engine`` names; None, which is onnxruntime, where it was not given."""
    return engine_of(args.engine) if args.engine is not None else None


def engine_of(text: str) -> Engine:
    """The engine that a text names: an object, or what a class or function of that name makes.

    Modules are found as ``python -m`` finds them, the working folder last.

    Args:
        text: ``MODULE:NAME``; NAME may have dots.

    Raises:
        ConfigError: The text is of another form, names no module or nothing in it, or what it names isn't an engine.
    """
    found = load_named(text, lambda what: _bad_engine(text, what))
    if isinstance(found, type) or (callable(found) and not hasattr(found, "open")):
        found = _made(text, found)
    wrong = _missing(found)
    if wrong:
        module, _, name = text.partition(":")
        raise _bad_engine(text, f"{name} in the module {module} isn't an engine: it has no {wrong}")
    engine: Engine = found
    return engine


def _made(text: str, make: Any) -> Any:
    try:
        return make()
    except EdgesafeError:
        raise
    except Exception as error:  # so may a constructor
        raise _bad_engine(text, f"the engine can't be made: {type(error).__name__}: {error}") from error


def _missing(engine: Any) -> str:
    """What an object lacks of an engine: of the protocol ``edgesafe.runtime.engine.Engine``, what every engine has."""
    for name in ("name", "version"):
        if not isinstance(getattr(engine, name, None), str):
            return f"text {name}"
    return "" if callable(getattr(engine, "open", None)) else "method open"


def _bad_engine(text: str, what: str) -> ConfigError:
    return ConfigError(what, where=f"--engine {text}", expected=_ENGINE, todo="see edgesafe.runtime.engine.Engine")
