"""The ``edgesafe`` command line: finds the command by its name, parses, and maps errors to exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.util
import io
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import edgesafe.commands
from edgesafe import __version__
from edgesafe.commands._shared import add_command
from edgesafe.errors import ConfigError, EdgesafeError

# The packages that an extra brings: where one of them is missing, the install lacks the extra; any other is a bug.
_EXTRAS = {
    "torch": "align",
    "transformers": "align",
    "huggingface_hub": "align",
    "safetensors": "align",
    "jinja2": "align",
    "peft": "align",
    "accelerate": "align",
    "matplotlib": "align",
    "edgesafe_export": "export",
    "gguf": "smol",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "optimum": "export",
    "sympy": "export",
    "model_signing": "sign",
}
# Both extras bring torch and transformers: these commands need the other one, or both.
_EXTRA_OF = {"plan": "export", "export": "export", "ship": "align,export"}
_INTERRUPTED = 130
_BROKEN_PIPE = 141
# No room, no quota, or a file larger than a limit on files allows: all three are fixed by making room.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RESUMABLE = ("align", "reward-model")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0, an error's own exit code (errors.py), 2 for wrong usage, or 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A terminal that can't show a character gets a mark for it, not a traceback in the middle of an answer.
    for stream, mark in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=mark)
    command = next((word for word in arguments if not word.startswith("-")), "")
    return guarded(command, lambda: _run(arguments, command))


def guarded(command: str, run: Callable[[], int]) -> int:
    """Run a command's work: its exit code, or that of the error that ended it, which is printed."""
    try:
        return run()
    except EdgesafeError as error:
        return _fail(error, command)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        return _fail(_missing_extra(missing, command), command)
    except KeyboardInterrupt:
        print("edgesafe: interrupted; the earlier output is untouched", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does. Python must not try to flush it again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        return _fail(_system_error(error, command), command)


def commands() -> dict[str, str]:
    """The commands' modules by their names on the command line: all below the folder but those that begin with ``_``."""
    named = ((module.rpartition(".")[2], module) for module in _modules(edgesafe.commands.__path__, "edgesafe.commands."))
    return {name.replace("_", "-"): module for name, module in sorted(named) if not name.startswith("_")}


def _modules(folders: Iterable[str], prefix: str) -> Iterator[str]:
    """The modules in folders of packages and in those below, by name; none is loaded for it."""
    for info in pkgutil.iter_modules(folders, prefix):
        if info.ispkg:
            spec = importlib.util.find_spec(info.name)
            yield from _modules(spec.submodule_search_locations or () if spec else (), f"{info.name}.")
        else:
            yield info.name


def _run(arguments: list[str], command: str) -> int:
    parser = argparse.ArgumentParser(prog="edgesafe", description="Certified early exits on the edge.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"edgesafe {__version__}")
    listed = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    known = commands()
    # Only the command that was asked for is loaded; for the list of them, which --help prints, every module's docstring is.
    for name in [command] if command in known else known:
        module = importlib.import_module(known[name])
        parsed = add_command(listed, name, module.__doc__ or name)
        if name == command:
            module.add_arguments(parsed)
            parsed.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return int(options.run(options))


def _fail(error: EdgesafeError, command: str) -> int:
    print(f"edgesafe {command}: {type(error).__name__}: {error}", file=sys.stderr)
    return error.exit_code


def _system_error(error: OSError, command: str) -> EdgesafeError:
    """What the system refused, as an error of the tree; one without a cause that a user can act on is raised as it is."""
    where = str(error.filename or "")
    if error.errno in _FULL:
        again = ", with --resume to continue from its last checkpoint" if command in _RESUMABLE else ""
        todo = f"make room and run the command again{again}; the earlier output is untouched"
        return EdgesafeError("the disk is full", where=where, todo=todo)
    if not where:
        raise error
    return EdgesafeError(f"the system refused: {error.strerror}", where=where, todo="check the path and its permissions")


def _missing_extra(package: str, command: str) -> ConfigError:
    extra = _EXTRA_OF.get(command, _EXTRAS[package])
    return ConfigError(
        f"this command needs the package {package}, which is not installed",
        expected=f"the {extra} extra",
        todo=f"pip install 'edgesafe[{extra}]'",
    )


if __name__ == "__main__":
    sys.exit(main())
