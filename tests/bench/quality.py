"""`make bench-quality`: what each text scheme costs on weights that nobody here made, beside llama.cpp's. Writes quality.json.

SmolLM2-135M (`tests/tools/smollm.py`) is exported in every scheme of `edgesafe.device`, and the finished bundles' own graphs
read a text of 20,440 tokens and answer 60 requests. llama.cpp quantizes the same float weights and reads the same tokens. The
text is read a second time with weights whose grid, on which they came, was dithered away. Speed is measured in turns.

What is there is kept: an interrupted run continues, and a bundle is exported again when its folder is removed. The exit code
is 1 if the default scheme is refused, strays from the float bundle, or answers a request for a sentence with something else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from every_logit import EveryLogit
from PIL import Image
from quality_text import ANSWER_TOKENS, REQUESTS, Text, make_text, on_subject
from smollm import SMOLLM2, fetch, write_decoder, write_dithered, write_llava
from speed import Engine, in_turns, versions

from edgesafe.device import TEXT_SCHEMES, load_device
from edgesafe.format.bundle import Bundle
from edgesafe.machine import host_cores
from edgesafe.progress import bar, step
from edgesafe.runtime import Session
from results import circumstances, write_json
from study.benches import quality_table

HERE = Path(__file__).parent
PEERS = ("Q8_0", "Q4_K_M", "Q4_0")
FLOAT = "fp32"
# The weights as they are, and with the grid dithered away on which they came.
PLAIN, DITHERED = "rows", "dithered"
PROMPT, STEPS = 300, 48
# What is asked of the default: the share of places with the float bundle's best token, and the divergence in nats.
TOP1, KL = 0.90, 0.05


class Reads(Protocol):
    """Logits [S,V] of tokens [S], from an empty cache."""

    def read(self, ids: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Place:
    """Where a run keeps what it makes of one kind of weights."""

    work: Path
    peers: Path
    threads: int

    @property
    def decoder(self) -> Path:
        return self.work / "decoder"

    def bundle(self, scheme: str) -> Path:
        return self.work / "bundles" / scheme

    def gguf(self, kind: str) -> Path:
        return self.work / f"{kind}.gguf"


class Llama:
    """llama.cpp in a process of its own, over one GGUF file."""

    def __init__(self, place: Place, kind: str) -> None:
        self._files = place.work / "ids.npy", place.work / "logits.npy"
        words = [place.peers, HERE / "llama_logits.py", "serve", place.gguf(kind), place.threads]
        self._process = subprocess.Popen(list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self, ids: np.ndarray) -> np.ndarray:
        np.save(self._files[0], ids)
        self._process.stdin.write(" ".join(map(str, self._files)) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != "done\n":
            raise SystemExit("llama.cpp ended: run tests/bench/llama_logits.py by hand")
        return np.load(self._files[1])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        for file in self._files:
            file.unlink(missing_ok=True)


class Kept:
    """The float bundle's logits, which every other reader is compared with: read once, then kept as files (4 GB)."""

    def __init__(self, place: Place) -> None:
        self._place, self._folder = place, place.work / "float"
        self._reader: EveryLogit | None = None

    def read(self, ids: np.ndarray) -> np.ndarray:
        file = self._folder / f"{hashlib.sha256(ids.tobytes()).hexdigest()[:16]}.npy"
        if not file.is_file():
            self._reader = self._reader or EveryLogit(self._place.bundle(FLOAT), self._folder / "bundle", self._place.threads)
            np.save(self._folder / "partial.npy", self._reader.read(ids))
            (self._folder / "partial.npy").rename(file)
        return np.load(file)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def compare(want: np.ndarray, got: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """Sums over the places of a window that predict a token of it: nats lost, divergence, equal best tokens.

    Args:
        want: Float logits [S,V].
        got: Logits [S,V].
        ids: Tokens [S].

    >>> rows = np.log(np.array([[0.75, 0.25], [0.5, 0.5]]))
    >>> {key: round(value, 3) for key, value in compare(rows, np.zeros((2, 2)), np.array([0, 1])).items()}
    {'nats': 0.693, 'kl': 0.131, 'top1': 1.0}
    """
    want, got = log_softmax(want[:-1]), log_softmax(got[:-1])
    nats = -got[np.arange(len(got)), ids[1:]].sum(dtype=np.float64)
    best = float((want.argmax(1) == got.argmax(1)).sum())
    got -= want
    divergence = -np.einsum("sv,sv->s", np.exp(want), got).sum(dtype=np.float64)
    return {"nats": float(nats), "kl": float(divergence), "top1": best}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [S,V] in the logits' own precision."""
    rows = logits - logits.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows


def read_text(reader: Reads, float_: Reads, text: Text, label: str) -> dict[str, Any]:
    """A reader's perplexity, in whole and by part, and its mean divergence and equal best tokens against the float bundle."""
    rows = [compare(float_.read(ids), reader.read(ids), ids) for ids in bar(text.windows, len(text.windows), label)]
    each = text.predicted / len(rows)
    found: dict[str, Any] = {"perplexity": perplexity(rows, each)}
    found["by_part"] = {
        part: perplexity([row for row, its in zip(rows, text.parts, strict=True) if its == part], each)
        for part in dict.fromkeys(text.parts)
    }
    return found | {key: round(sum(row[key] for row in rows) / text.predicted, 5) for key in ("kl", "top1")}


def perplexity(rows: list[dict[str, float]], each: float) -> float:
    """The exponential of the mean nats of a token, over windows of `each` predicted tokens."""
    return round(float(np.exp(sum(row["nats"] for row in rows) / (each * len(rows)))), 4)


def answers(bundle: Path, threads: int) -> list[str]:
    """Greedy answers to the requests, by the shipped session at the reference exit."""
    picture = Image.radial_gradient("L").convert("RGB")
    with Session.open(bundle, allow_uncertified=True, threads=threads) as session:
        options = {"exit": session.manifest.reference, "max_new_tokens": ANSWER_TOKENS}
        return [session.ask(picture, request, **options).text for request in bar(REQUESTS, len(REQUESTS), "answers")]


def export(place: Place, scheme: str) -> None:
    """A scheme's bundle for this machine, unless it is there, whatever damage it does; auto takes one that does none."""
    from edgesafe_export import export_bundle

    out = place.bundle(scheme)
    if out.is_dir():
        return
    named = scheme != "auto"
    with step(f"export: {scheme}"):
        export_bundle(place.work / "llava", out, load_device("host"), text_scheme=scheme, accept_damage=named)


def text_mib(root: Path) -> float:
    """The whole text side of a bundle, MiB: every file beside its text graphs, the embedding among them."""
    bundle = Bundle.open(root, verify=False)
    folders = {str(Path(path).parent) for path in (bundle.manifest.text.embed_tokens, bundle.manifest.text.decoder)}
    files = bundle.manifest.files.items()
    return round(sum(file.bytes for path, file in files if str(Path(path).parent) in folders) / 2**20, 2)


def bundle_row(place: Place, scheme: str, text: Text, float_: Kept, known: list[str] | None) -> dict[str, Any]:
    """A scheme's quality and bytes; with the float bundle's answers given, its own beside them."""
    root = place.bundle(scheme)
    bundle = Bundle.open(root)
    reader = EveryLogit(root, place.work / "every", place.threads)
    reader.check(text.windows[0])
    row = {"engine": "edgesafe", "taken": bundle.manifest.quantization["text"], "digest": bundle.digest}
    row |= {"refused": without_quotes(bundle.manifest.parity.get("damage")), "mib": text_mib(root)}
    row |= read_text(reader, float_, text, f"the text in {scheme}")
    if known is None:
        return row
    said = answers(root, place.threads)
    row["equal"] = sum(a == b for a, b in zip(said, known, strict=True))
    return row | {"on_subject": sum(on_subject(said)), "answers": said[: len(on_subject(said))]}


def without_quotes(reason: str | None) -> str | None:
    r"""Why a scheme is refused, without the answers that the export quotes.

    >>> without_quotes("exit 3 keeps 8 % of its answers, below 90 %: 'How?': 'So [...] in place of \'No ...\'")
    'exit 3 keeps 8 % of its answers, below 90 %'
    """
    return None if reason is None else re.split(r": ['\"]", reason)[0]


def peer_row(place: Place, kind: str, text: Text, float_: Kept) -> dict[str, Any]:
    """llama.cpp's scheme from the same float weights, on the same tokens."""
    source, target = place.gguf("F32"), place.gguf(kind)
    if not source.is_file():
        subprocess.run([place.peers, HERE / "gguf_file.py", place.decoder, source, "--kind", "F32"], check=True)
    if not target.is_file():
        subprocess.run([place.peers, HERE / "llama_logits.py", "quantize", source, target, kind], check=True)
    llama = Llama(place, kind)
    found = read_text(llama, float_, text, f"the text in llama.cpp's {kind}")
    llama.close()
    return {"engine": "llama.cpp", "mib": round(target.stat().st_size / 2**20, 2)} | found


def prepare(work: Path, peers: Path, threads: int) -> dict[str, Place]:
    """Both checkpoints, and where the rest goes."""
    places = {kind: Place(work / kind, peers, threads) for kind in (PLAIN, DITHERED)}
    for kind, place in places.items():
        if not (place.work / "llava").is_dir():
            with step(f"SmolLM2: {kind}"):
                if kind == PLAIN:
                    write_decoder(fetch(SMOLLM2, work / "wheel"), place.decoder)
                else:
                    write_dithered(places[PLAIN].decoder, place.decoder)
                write_llava(place.decoder, place.work / "llava.partial").rename(place.work / "llava")
    return places


def float_answers(place: Place) -> list[str]:
    """What the float bundle answers, kept beside it: part of the text, so that it never changes under a run."""
    export(place, FLOAT)
    file = place.work / "answers.json"
    if not file.is_file():
        write_json(file, {"answers": answers(place.bundle(FLOAT), place.threads)})
    return json.loads(file.read_text(encoding="utf-8"))["answers"]


def text_of(place: Place, known: list[str]) -> Text:
    """The text, in the float bundle's tokenizer and chat format."""
    from edgesafe.runtime.tokenizer import load_tokenizer

    root = place.bundle(FLOAT)
    manifest = Bundle.open(root, verify=False).manifest
    around = manifest.chat.prefix.replace(manifest.image_token, ""), manifest.chat.suffix
    return make_text(load_tokenizer(root / manifest.tokenizer), around, known)


def measure_rows(place: Place, text: Text, known: list[str] | None, names: list[str], found: dict[str, Any]) -> Iterator[None]:
    """Every row that is not there yet, or whose bundle is another one; yields after each."""
    float_ = Kept(place)
    for name in names:
        if name not in PEERS:
            export(place, name)
        digest = None if name in PEERS else Bundle.open(place.bundle(name), verify=False).digest
        if name in found and found[name].get("digest") == digest:
            continue
        peer = name in PEERS
        found[name] = peer_row(place, name, text, float_) if peer else bundle_row(place, name, text, float_, known)
        yield
    float_.close()


def speed(place: Place, names: list[str], rounds: int) -> dict[str, Any]:
    """Prefill of 300 tokens and the tokens behind it, in turns; as fast as the first, which is Q4_K_M."""
    first = "Q4_K_M"
    opened = {name: _engine(place, name) for name in (first, *(name for name in names if name != first))}

    def run(engine: Engine) -> dict[str, float]:
        times = engine.run(PROMPT, STEPS)
        return {k: statistics.median(v) if isinstance(v, list) else v for k, v in times.items()}

    found = in_turns({name: lambda e=engine: run(e) for name, engine in opened.items()}, rounds, "speed")
    for engine in opened.values():
        engine.close()
    return found


def _engine(place: Place, name: str) -> Engine:
    if name in PEERS:
        return Engine("llama.cpp", place.peers, place.gguf(name), place.threads)
    return Engine("bundle", Path(sys.executable), place.bundle(name), place.threads)


def faults(found: Mapping[str, Any], default: str) -> list[str]:
    """What is wrong with the default scheme."""
    row = found[PLAIN][default]
    wrong = [f"the default scheme {default} is refused: {row['refused']}"] if row["refused"] else []
    if row["top1"] < TOP1 or row["kl"] > KL:
        wrong.append(f"{default}: best token same {row['top1']}, below {TOP1}, or divergence {row['kl']}, above {KL}")
    if row["on_subject"] < len(row["answers"]):
        wrong.append(f"{default}: {row['on_subject']} of {len(row['answers'])} answers are on their subject: {row['answers']}")
    return wrong


def main() -> int:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="models, bundles and what was measured")
    parser.add_argument("--peers", type=Path, default=Path("build/bench/peers/bin/python"), help="the peers' Python")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quality.json")
    parser.add_argument("--schemes", default=",".join(TEXT_SCHEMES), help="default: all that there are")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=host_cores())
    parser.add_argument("--plain", action="store_true", help="leave out the weights whose grid was dithered away")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    words = parser.parse_args()
    places = prepare(words.work, words.peers.absolute(), words.threads)
    if words.plain:
        del places[DITHERED]
    known = float_answers(places[PLAIN])
    text = text_of(places[PLAIN], known)
    found = json.loads(words.out.read_text(encoding="utf-8")) if words.out.is_file() else {}
    about = {"digest": text.digest, "tokens": text.predicted, "windows": len(text.windows), "requests": len(REQUESTS)}
    if found.get("text") != about:
        found = {"text": about}
    names = [FLOAT, *PEERS, *(name for name in words.schemes.split(",") if name != FLOAT)]
    for kind, place in places.items():
        export(place, FLOAT)
        for _ in measure_rows(place, text, known if kind == PLAIN else None, names, found.setdefault(kind, {})):
            write_json(words.out, found | circumstances())
    began = circumstances() | {"threads": words.threads, "rounds": words.rounds}
    found |= {"speed": speed(places[PLAIN], names, words.rounds), "speed_run": began, "peers": versions(words.peers)}
    default = load_device("host").text_scheme
    found |= circumstances() | {"default": default}
    write_json(words.out, found)
    print(json.dumps(found) if words.json else quality_table(words.out.parent))
    wrong = faults(found, default) if default in names else []
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
