"""A bundle's exits beside each other: what each costs here and what its certificate says of it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from edgesafe.device import profile_of
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import Certificate, ExitVerdict, Rate, certified_exits, read_certificate
from edgesafe.format.exits import Exit
from edgesafe.format.tiles import ALONE
from edgesafe.progress import table
from edgesafe.runtime.choose import QUANTILE
from edgesafe.runtime.engine import Engine
from edgesafe.runtime.ort import OnnxRuntime
from edgesafe.runtime.standing import standing
from edgesafe.runtime.threads import forecast, tune
from edgesafe.runtime.tokenizer import encode_prompt, load_tokenizer, unchecked_ids

QUESTION = "What is in the picture?"
_HEADERS = ("exit", "image tokens", "first token ms", "verdict", "harmful %", "over-refusal %", "accuracy %", "first reason")
_NONE = "not certified"


@dataclass(frozen=True)
class Rung:
    """One exit.

    Attributes:
        exit: Which one.
        image_tokens: Tokens that it makes of a picture, or of a tile; where exits differ in tiles, of a picture of 640 x 480.
        ttft_ms: The predicted time to the first token of a short question about as much; None where nothing predicts it.
        certified: Whether it is certified on this machine.
        verdict: The certificate's, or None without one.
    """

    exit: Exit
    image_tokens: int
    ttft_ms: float | None
    certified: bool
    verdict: ExitVerdict | None


@dataclass(frozen=True)
class Ladder:
    """Every exit, in the order of certification: from the one that computes the most to the one that computes the least.

    Attributes:
        reference: The exit that the model was trained to use.
        rungs: All exits.
        prediction: What the times rest on: `measured`, `estimated` or `none`.
        notes: What the reader should know, in sentences.
    """

    reference: Exit
    rungs: tuple[Rung, ...]
    prediction: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        exits = [
            {
                **asdict(rung),
                "exit": str(rung.exit),
                "verdict": rung.verdict.verdict if rung.verdict else None,
                "reasons": rung.verdict.reasons if rung.verdict else [],
                **{name: asdict(rate) if rate else None for name, rate in _rates(rung).items()},
            }
            for rung in self.rungs
        ]
        notes = list(self.notes)
        return {"reference": str(self.reference), "prediction": self.prediction, "notes": notes, "exits": exits}

    def text(self) -> str:
        """The table and the notes."""
        lines = [
            [
                f"{rung.exit}{'*' if rung.exit == self.reference else ''}",
                rung.image_tokens,
                "-" if rung.ttft_ms is None else f"{rung.ttft_ms:.2f}",
                rung.verdict.verdict if rung.verdict else _NONE,
                *("-" if rate is None else f"{100 * rate.rate:.1f}" for rate in _rates(rung).values()),
                next(iter(rung.verdict.reasons), "") if rung.verdict else "",
            ]
            for rung in self.rungs
        ]
        return "\n".join([table(lines, _HEADERS), "", "* the reference", *self.notes])


def _rates(rung: Rung) -> dict[str, Rate | None]:
    return {name: getattr(rung.verdict, name) if rung.verdict else None for name in ("harmful", "overrefusal", "accuracy")}


def read_ladder(path: str | os.PathLike[str], engine: Engine | None = None) -> Ladder:
    """A bundle's exits with their times and verdicts; no graph is opened.

    Args:
        path: The bundle's folder.
        engine: What would run the graphs: measurements and certificates hold for one. By default Python's onnxruntime.

    Raises:
        BundleError: The folder is not a bundle, or its bytes are not those that were sealed.
        CertificateError: Its certificate is of other bytes.
    """
    bundle, engine = Bundle.open(path), engine or OnnxRuntime()
    manifest, certificate, profile = bundle.manifest, read_certificate(bundle), profile_of(bundle)
    here, tuning = standing(bundle, certificate, engine), tune(bundle, profile, None, engine)
    tokenizer = load_tokenizer(bundle.root / manifest.tokenizer)
    whole = forecast(bundle, tuning, profile, len(encode_prompt(tokenizer, manifest, QUESTION)))
    verdicts = {verdict.exit: verdict for verdict in certificate.exits} if certificate else {}
    rungs = []
    for exit in reversed(manifest.by_cost):
        cut = manifest.told_cut(exit)
        # The picture that times are told for may be too large for the context.
        ids = unchecked_ids(tokenizer, manifest, QUESTION, cut, exit)
        tokens = manifest.tokens_of(exit) if cut == ALONE else ids.count(manifest.image_token_id)
        times = forecast(bundle, tuning, profile, len(ids)).tiled(cut.tiles)
        ttft_ms = times.ttft_ms(manifest.exit(exit).graphs, QUANTILE)
        rungs.append(Rung(exit, tokens, ttft_ms, exit in here.exits, verdicts.get(exit)))
    notes = tuple(note for note in (whole.note, here.why, _told(certificate)) if note)
    return Ladder(manifest.reference, tuple(rungs), whole.source, notes)


def _told(certificate: Certificate | None) -> str:
    if certificate is None:
        return "there is no certificate: run edgesafe certify"
    passed = certified_exits(certificate)
    return f"certified: {', '.join(map(str, passed))}" if passed else "no exit passed"
