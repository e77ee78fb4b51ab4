"""The ``edgesafe`` command: one function a sub-command, each loading what it needs inside."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from edgesafe import __version__
from edgesafe.errors import CertificationFailedError, ConfigError, EdgesafeError
from edgesafe.progress import table

# Packages that an extra brings: their absence is a matter of the install, anybody else's a bug.
_EXTRAS = {
    "torch": "align",
    "transformers": "align",
    "peft": "align",
    "accelerate": "align",
    "safetensors": "align",
    "matplotlib": "align",
    "edgesafe_export": "export",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "optimum": "export",
}
_INTERRUPTED = 130
_BROKEN_PIPE = 141
# No room, no quota, or a file larger than a limit on files allows: a person mends all three by making room.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RESUMABLE = ("align", "reward-model")

Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, an error's own (errors.py), 2 for wrong usage or 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that can't show a character gets a mark for it, not a traceback in the middle of an answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _run(arguments)
    except EdgesafeError as error:
        return _fail(error, arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        return _fail(_missing_extra(missing), arguments)
    except KeyboardInterrupt:
        print("edgesafe: interrupted; the earlier output is untouched", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does. Python must not try to flush it again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        return _fail(_system_error(error, _command(arguments)), arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edgesafe", description="Certified early exits on the edge.")
    parser.add_argument("--version", action="version", version=f"edgesafe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = _command(arguments)
    for name, (add, help_text) in _COMMANDS.items():
        sub = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        # Only the asked command is built, because building some loads packages of an extra.
        if name == asked:
            sub.set_defaults(run=add(sub))
    options = parser.parse_args(arguments)
    run: Run = options.run
    return run(options)


def _fail(error: EdgesafeError, arguments: Sequence[str]) -> int:
    print(f"edgesafe {_command(arguments)}: {type(error).__name__}: {error}", file=sys.stderr)
    return error.exit_code


def _command(arguments: Sequence[str]) -> str:
    return next((word for word in arguments if not word.startswith("-")), "")


def _system_error(error: OSError, command: str) -> EdgesafeError:
    """What the system refused, as an error of the tree; one without a cause that a user can act on is raised as it is."""
    where = str(error.filename or "")
    if error.errno in _FULL:
        again = ", with --resume to go on from its last checkpoint" if command in _RESUMABLE else ""
        todo = f"make room and run the command again{again}; the earlier output is untouched"
        return EdgesafeError("the disk is full", where=where, todo=todo)
    if not where:
        raise error
    return EdgesafeError(f"the system refused: {error.strerror}", where=where, todo="check the path and its permissions")


def _missing_extra(package: str) -> ConfigError:
    extra = _EXTRAS[package]
    return ConfigError(
        f"this command needs the package {package}, which is not installed",
        expected=f"the {extra} extra",
        todo=f"pip install 'edgesafe[{extra}]'",
    )


def _print_json(obj: object) -> None:
    print(json.dumps(obj, indent=1, ensure_ascii=False))


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_ask(parser: argparse.ArgumentParser) -> Run:
    _add_bundle(parser)
    parser.add_argument("--image", required=True, metavar="P", help="a picture file")
    parser.add_argument("--prompt", required=True, metavar="T", help="the question")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--budget-ms", type=float, metavar="N", help="the deepest certified exit that fits N ms")
    which.add_argument("--exit-depth", type=int, metavar="D", help="the exit after D blocks")
    parser.add_argument("--total-ms", type=float, metavar="N", help="the whole answer's time; decoding stops before it")
    parser.add_argument("--require-measured", action="store_true", help="refuse a budget that only an estimate supports")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="longest answer (48)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="draw tokens (0: take the likeliest)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="draw from the likeliest with this share (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="T", help="end the answer before this text; repeatable")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (those found best by measure, or the profile's)")
    parser.add_argument("--allow-uncertified", action="store_true", help="use an exit without a passed verdict")
    return cmd_ask


def cmd_ask(options: argparse.Namespace) -> int:
    """Stream an answer to stdout and say on stderr how it came about."""
    from edgesafe.runtime import Budget, Sampling, Session

    sampling = Sampling(options.temperature, options.top_p, options.seed, stop=tuple(options.stop))
    budget = None
    if options.budget_ms is not None or options.total_ms is not None:
        budget = Budget(options.budget_ms, options.total_ms, require_measured=options.require_measured)
    session = Session.open(options.bundle, threads=options.threads, allow_uncertified=options.allow_uncertified)
    stream = session.stream(
        options.image,
        options.prompt,
        budget,
        exit_depth=options.exit_depth,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
    )
    for piece in stream:
        if not options.json:
            print(piece, end="", flush=True)
    answer = stream.answer
    if options.json:
        _print_json(asdict(answer))
        return 0
    print(flush=True)
    print(_summary(asdict(answer), session.manifest.reference_depth), file=sys.stderr)
    return 0


def _summary(answer: dict[str, Any], reference_depth: int) -> str:
    certified = "certified" if answer["certified"] else "NOT CERTIFIED"
    predicted = answer["predicted_ttft_ms"]
    shown = f"{predicted:.1f} ms {answer['prediction']}" if predicted is not None else "nothing"
    line = (
        f"exit {answer['exit_depth']} of {reference_depth} ({certified}), first token predicted {shown}, "
        f"took {answer['ttft_ms']:.1f} ms, {answer['total_ms']:.1f} ms in all, ended by {answer['finish_reason']}"
    )
    if answer["deadline_met"] is not None:
        line += f"\nbudget {'kept' if answer['deadline_met'] else 'MISSED'}; this exit because {answer['why']}"
    return line + (f"\nnote: {answer['note']}" if answer["note"] else "")


def _add_measure(parser: argparse.ArgumentParser) -> Run:
    _add_bundle(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="threads (compares counts and takes the best)")
    parser.add_argument("--seconds", type=float, default=40.0, metavar="S", help="about how long to take (40)")
    return cmd_measure


def cmd_measure(options: argparse.Namespace) -> int:
    """Time the bundle's parts on this machine and write its latency.json."""
    from edgesafe.runtime import measure

    if not 0 < options.seconds <= 3600:
        raise ConfigError(f"--seconds is {options.seconds:g}", expected="more than 0 and at most 3600")
    result = measure(options.bundle, threads=options.threads, seconds=options.seconds)
    if options.json:
        _print_json(result.to_dict())
        return 0
    parts = [("preprocess", result.text["preprocess"]), *result.segments.items()]
    parts += [(f"prefill of {row['tokens']} tokens", row) for row in result.text["prefill"]]
    parts += [(f"one more token after {row['context']}", row) for row in result.text["decode"]]
    rows = [[name, f"{row['p50_ms']:.2f}", f"{row['p95_ms']:.2f}", len(row["ms"])] for name, row in parts]
    print(table(rows, ["part", "p50 ms", "p95 ms", "runs"]))
    exits = [[e["exit_depth"], *(f"{e['ttft_ms'][key]:.2f}" for key in ("p50_ms", "p95_ms"))] for e in result.exits]
    print("\n" + table(exits, ["exit", "first token p50 ms", "p95 ms"]))
    rss = f"{result.peak_rss_mib:.0f} MiB" if result.peak_rss_mib is not None else "unknown"
    if result.sweep:
        compared = [[row["threads"], row["cores"] or "any", f"{row['answer_ms']:.2f}"] for row in result.sweep]
        print("\n" + table(compared, ["threads", "on cores", "answer p50 ms"]))
    print(f"\n{result.machine}; {result.threads} threads; {result.engine} {result.engine_version}")
    ruled = result.conditions["governor"] or "unknown"
    print(f"session opened in {result.session_open_ms:.0f} ms; peak RSS {rss}; governor {ruled}")
    return 0


def _add_devices(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("--json", action="store_true", help="print the profiles as JSON")
    return cmd_devices


def cmd_devices(options: argparse.Namespace) -> int:
    """List the device profiles."""
    from edgesafe.device import list_devices

    profiles = list_devices()
    if options.json:
        _print_json([asdict(profile) for profile in profiles])
        return 0
    rows = [
        [
            p.name,
            p.kind,
            p.threads,
            p.memory_mib,
            p.vision_scheme,
            p.text_scheme,
            f"{p.ttft_budget_ms:g}",
            p.title,
        ]
        for p in profiles
    ]
    headers = ["device", "kind", "threads", "memory MiB", "vision", "text", "budget ms", "title"]
    print(table(rows, headers))
    return 0


def _add_certify(parser: argparse.ArgumentParser) -> Run:
    _add_bundle(parser)
    parser.add_argument("--answers", metavar="FILE", help="also write every answer there, as JSON lines")
    return cmd_certify


def cmd_certify(options: argparse.Namespace) -> int:
    """Run the suite at every exit and write certificate.json; fails only where no exit passes."""
    from edgesafe.certify.certify import certify
    from edgesafe.format.certificate import certified_depths

    certificate = certify(options.bundle, progress=True, answers=options.answers)
    if options.json:
        _print_json(certificate.to_dict())
    else:
        print(certificate_table(certificate.to_dict()))
    if not certified_depths(certificate):
        raise CertificationFailedError(
            "no exit keeps the suite's limits",
            where=str(options.bundle),
            expected="at least one passed exit",
            todo="read the reasons above, align the model and export it again",
        )
    return 0


def certificate_table(certificate: dict[str, Any]) -> str:
    """A certificate's rates in percent, one exit a line, with 95 % intervals."""

    def shown(rate: dict[str, Any]) -> str:
        low, high = 100 * rate["lower_95"], 100 * rate["upper_95"]
        return f"{100 * rate['rate']:.1f} [{low:.1f}, {high:.1f}]"

    keys = ("harmful", "overrefusal", "incoherent", "accuracy")
    rows = [
        [e["exit_depth"], *(shown(e[key]) for key in keys), e["verdict"], "; ".join(e["reasons"])] for e in certificate["exits"]
    ]
    return table(rows, ["exit", "harmful %", "over-refusal %", "incoherent %", "accuracy %", "verdict", "reasons"])


def _add_smoke(parser: argparse.ArgumentParser) -> Run:
    _add_bundle(parser)
    parser.add_argument("--junit", metavar="XML", help="also write a JUnit XML report")
    return cmd_smoke


def cmd_smoke(options: argparse.Namespace) -> int:
    """Run the suite's on-device subset; exit code 42 where it fails."""
    from edgesafe.certify.smoke import smoke

    report = smoke(options.bundle, junit=options.junit)
    if options.json:
        shown = report.to_json()
        print(shown if isinstance(shown, str) else json.dumps(shown, indent=1, ensure_ascii=False))
    else:
        print(report.table())
    return 0 if report.passed else CertificationFailedError.exit_code


def _elsewhere(module: str, add: str, run: str) -> Callable[[argparse.ArgumentParser], Run]:
    """A command whose arguments and work live in another module, loaded only when it is asked for."""

    def build(parser: argparse.ArgumentParser) -> Run:
        home = importlib.import_module(module)
        getattr(home, add)(parser)
        found: Run = getattr(home, run)
        return found

    return build


_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], Run], str]] = {
    "ask": (_add_ask, "answer a question about a picture"),
    "measure": (_add_measure, "time every part of a bundle on this machine"),
    "devices": (_add_devices, "list the device profiles"),
    "certify": (_add_certify, "run the certification suite at every exit"),
    "smoke": (_add_smoke, "run the suite's on-device subset (exit code 42 on failure)"),
    "serve": (_elsewhere("edgesafe.serve.server", "add_arguments", "run"), "a local page for trying a bundle in a browser"),
    "plan": (_elsewhere("edgesafe_export.cli", "add_plan_arguments", "run_plan"), "what an export would do, nothing loaded"),
    "export": (_elsewhere("edgesafe_export.cli", "add_arguments", "run"), "turn a checkpoint into a bundle"),
    "align": (
        _elsewhere("edgesafe.align.cli", "add_align_arguments", "run_align"),
        "align a checkpoint's exits",
    ),
    "evaluate": (
        _elsewhere("edgesafe.align.cli", "add_evaluate_arguments", "run_evaluate"),
        "rates of a checkpoint at every exit",
    ),
    "suite": (
        _elsewhere("edgesafe.evaluate.import_suite", "add_arguments", "run"),
        "import a public or own set of requests as a suite to evaluate on",
    ),
    "reward-model": (
        _elsewhere("edgesafe.align.reward.train", "add_arguments", "run_command"),
        "train a reward model for PPO on preference pairs",
    ),
    "ship": (
        _elsewhere("edgesafe.ship", "add_arguments", "run"),
        "the whole way: align, export, quantize and certify (what `make export` runs)",
    ),
    "reference": (
        _elsewhere("edgesafe.reference.cli", "add_arguments", "run"),
        "draw pictures, write data, build the reference model",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
