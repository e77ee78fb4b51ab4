"""Ways to break a bundle; each takes its randomness from the caller."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgesafe.format.bundle import CERTIFICATE, MANIFEST, file_specs
from edgesafe.format.seal import seal, unseal

Change = Callable[[Path, random.Random], None]
ESCAPES = ("../outside", "/etc/passwd", "vision/../../outside", "..", "a\\..\\b", "./x", "vision//head.onnx", "/", "\0")
ABSURD = (0, -1, 1, 2**31, 2**63, 10**12, 10**400, 1.5, 1e308, True, None, "", "x", "é\u202e", "x" * 100_000, [], {}, [[]])
ABSURD = (*ABSURD, {"a": 1}, ["../outside"], *ESCAPES)


def files(root: Path) -> list[Path]:
    """All plain files, in a fixed order."""
    return sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())


def flip(data: bytes, rng: random.Random) -> bytes:
    """One to eight bytes changed; never the same bytes again."""
    out = bytearray(data or b"\0")
    for at in rng.sample(range(len(out)), min(len(out), rng.randint(1, 8))):
        out[at] ^= rng.randint(1, 255)
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    """A part from the start, or with a piece missing from its middle."""
    if rng.random() < 0.5:
        return data[: rng.randrange(len(data))]
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randint(1, 64) :]


def grow(data: bytes, rng: random.Random) -> bytes:
    """Bytes added somewhere."""
    at = rng.randint(0, len(data))
    return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]


def _edit(edit: Callable[[bytes, random.Random], bytes]) -> Change:
    def change(root: Path, rng: random.Random) -> None:
        path = rng.choice(files(root))
        path.write_bytes(edit(path.read_bytes(), rng))

    return change


def _swap(root: Path, rng: random.Random) -> None:
    while True:
        a, b = rng.sample(files(root), 2)
        if a.read_bytes() != b.read_bytes():
            break
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def _remove(root: Path, rng: random.Random) -> None:
    listed = [p for p in files(root) if p.name != CERTIFICATE]  # without a certificate a bundle is whole, only not certified
    rng.choice(listed).unlink()


def _add(root: Path, rng: random.Random) -> None:
    folder = rng.choice([root, root / "vision", root / "new", root / "suite" / "deep" / "er"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / rng.choice(["x.onnx", ".hidden", "manifest.json.old", "weights.bin", "é"])).write_bytes(rng.randbytes(9))


def _link(root: Path, rng: random.Random) -> None:
    path = rng.choice([*files(root), root / "vision", root / "suite"])
    aside = root.parent / "aside"
    path.rename(aside)
    path.symlink_to(aside if rng.random() < 0.7 else "/dev/zero")


def _special(root: Path, rng: random.Random) -> None:
    path = rng.choice(files(root))
    path.unlink()
    if rng.random() < 0.5:
        os.mkfifo(path)
    else:
        path.mkdir()


def _rename(root: Path, rng: random.Random) -> None:
    path = rng.choice([p for p in files(root) if p.name != CERTIFICATE])
    path.rename(path.with_name(rng.choice([path.name.upper() + "X", path.name + ".bak", "é"])))


def _respell(root: Path, rng: random.Random) -> None:
    """A sealed file that says the same in another spelling."""
    path = root / rng.choice([MANIFEST, CERTIFICATE])
    data = path.read_bytes()
    obj = json.loads(data)
    path.write_bytes(
        rng.choice(
            [
                b"\xef\xbb\xbf" + data,
                data.replace(b"\n", b"\r\n"),
                data + b" ",
                json.dumps(obj).encode(),
                json.dumps(dict(reversed(obj.items())), indent=1).encode(),
                data.replace(b'"digest"', b'"digest": 1,\n "digest"', 1),
            ]
        )
    )


def _behind_the_seal(root: Path, rng: random.Random) -> None:
    """A sealed file's object edited while its digest stays."""
    path = root / rng.choice([MANIFEST, CERTIFICATE])
    obj = json.loads(path.read_bytes())
    _edit_tree(obj, rng)
    path.write_bytes((json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def _edit_tree(obj: Any, rng: random.Random) -> None:
    """One place of a JSON tree replaced, removed, doubled or added."""
    spots: list[tuple[Any, Any]] = []
    stack = [obj]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            if key != "digest" or node is not obj:
                spots.append((node, key))
            if isinstance(node[key], dict | list):
                stack.append(node[key])
    node, key = rng.choice(spots)
    how = rng.random()
    if how < 0.7:
        was = node[key]
        # As JSON, because 1 == True == 1.0 in Python.
        node[key] = rng.choice([v for v in ABSURD if json.dumps(v) != json.dumps(was)])
    elif how < 0.85:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice(["new", key + "x", ""])] = node[key]
    else:
        node.append(node[key])


def _manifest_edit(root: Path, rng: random.Random) -> None:
    obj = json.loads((root / MANIFEST).read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        _edit_tree(obj, rng)
    (root / MANIFEST).write_bytes(json.dumps(obj).encode())


def tiles_edit(root: Path, rng: random.Random) -> None:
    """The manifest's tiles table made absurd, another one, or one that the rest of the manifest doesn't fit."""
    obj = json.loads((root / MANIFEST).read_bytes())
    how = rng.random()
    if how < 0.5:
        part = {"tiles": obj.pop("tiles")}
        _edit_tree(part, rng)
        obj |= part
    elif how < 0.8:
        _other_tiles(obj["tiles"], rng)
    elif how < 0.9:
        obj["format_version"] = rng.choice([0, 1, 3, True, "2", None])
    else:
        obj |= rng.choice(
            [{"image_tokens": n} for n in (0, 1, 3, 5, 9, 2**31)] + [{"image_token": t} for t in ("", "w", "</s>")]
        )
        if rng.random() < 0.3:
            del obj["tiles"]
    (root / MANIFEST).write_bytes(json.dumps(obj).encode())


def _other_tiles(table: dict[str, Any], rng: random.Random) -> None:
    """One or two keys with values of the right type."""
    sizes = [
        [],
        [[8, 8]],
        [[8, 16]],
        [[16, 8], [8, 8]],
        [[8, 12]],
        [[0, 8]],
        [[-8, 8]],
        [[4096, 8]],
        [[128, 128]],
        [[136, 128]],
    ]
    texts = [
        "",
        "<image>",
        "x",
        "<image><image>",
        "{row}<image>",
        "{",
        "{0}<image>",
        "{row.x}<image>",
        "</s><image>",
        "\0<image>",
    ]
    values: dict[str, Any] = {
        "cut": ["never", "grid", "canvas"],
        "longest_edge": [0, 1, 7, 8, 9, 17, 64, 128, 129, 4096, 4097],
        "canvases": sizes,
        "limit": [None, 0, 1, 9, 4096],
        "newline": [False, True],
    }
    for key in rng.sample([*values, "texts"], rng.choice([1, 1, 2])):
        if key == "texts":
            named = ("tile", "row_end", "whole", "alone")
            table[key] = {**(table[key] or dict.fromkeys(named, "<image>")), rng.choice(named): rng.choice(texts)}
        else:
            table[key] = rng.choice(values[key])


def _huge(root: Path, rng: random.Random) -> None:
    """A number of the manifest made absurdly large."""
    obj = json.loads((root / MANIFEST).read_bytes())
    text, image = obj["text"], obj["image"]
    keys = ("num_layers", "num_kv_heads", "head_dim", "hidden_size", "vocab_size", "context_length")
    spots = [(text, key) for key in keys]
    spots += [(obj, "image_tokens"), (obj, "n_blocks"), (image["size"], "height"), (image["size"], "width")]
    spots += [(image["resize_to"], 0), (image["resize_to"], 1), (image["std"], 0), (image, "rescale_factor")]
    for node, key in rng.sample(spots, rng.choice([1, 1, 2, len(spots)])):
        node[key] = rng.choice([2**20, 2**31, 2**40, 10**18, 10**400])
    (root / MANIFEST).write_bytes(json.dumps(obj).encode())


def _escape(root: Path, rng: random.Random) -> None:
    """A path of the manifest that leaves the bundle, in every place that holds one, with the file listed too."""
    obj = json.loads((root / MANIFEST).read_bytes())
    away = rng.choice(ESCAPES)
    where = rng.choice(["tokenizer", "embed_tokens", "graph", "suite", "files"])
    old = {"tokenizer": obj["tokenizer"], "embed_tokens": obj["text"]["embed_tokens"], "graph": "vision/head.onnx"}.get(where)
    if old is not None:
        text = json.dumps(obj).replace(json.dumps(old), json.dumps(away))
        obj = json.loads(text)
    elif where == "suite":
        obj["suite"]["path"] = away
    else:
        obj["files"][away] = {"sha256": "0" * 64, "bytes": 0}
    (root / MANIFEST).write_bytes(json.dumps(obj).encode())


def _file_edit(edit: Callable[[bytes, random.Random], bytes]) -> Change:
    """A listed file changed; sealing again gives it its new digest."""

    def change(root: Path, rng: random.Random) -> None:
        path = rng.choice([p for p in files(root) if p.name not in (MANIFEST, CERTIFICATE)])
        path.write_bytes(edit(path.read_bytes(), rng))

    return change


def _tokenizer(root: Path, rng: random.Random) -> None:
    path = root / "tokenizer.json"
    obj = json.loads(path.read_bytes())
    _edit_tree(obj, rng)
    path.write_bytes(json.dumps(obj).encode("utf-8", "replace"))


def _shape(root: Path, rng: random.Random) -> None:
    """A graph whose inner sizes are other ones, or whose weights lie outside."""
    import onnx

    path = rng.choice([p for p in files(root) if p.suffix == ".onnx"])
    model = onnx.load(str(path))
    graph = model.graph
    how = rng.randrange(4)
    if how == 0 and graph.initializer:
        tensor = rng.choice(list(graph.initializer))
        tensor.dims.append(rng.choice([0, 2, 2**40]))
    elif how == 1:
        node = rng.choice(list(graph.node))
        node.op_type = rng.choice(["Add", "MatMul", "Identity", "Loop", "Nope", "Reshape", "Gather"])
    elif how == 2:
        node = rng.choice(list(graph.node))
        node.input[0] = rng.choice([*(t.name for t in graph.initializer), "nowhere", ""])
    else:
        for tensor in graph.initializer:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            entry = {"location": rng.choice(["../outside", "/etc/passwd", "nowhere", "../../../../dev/zero"]), "length": "4"}
            for key, value in entry.items():
                tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def reseal(root: Path, *, forge: bool) -> None:
    """List the files with their digests of now and seal the manifest; ``forge`` makes the certificate fit it."""
    obj = json.loads((root / MANIFEST).read_bytes())
    listed = obj.get("files")
    if isinstance(listed, dict):
        for path, spec in file_specs(root).items():
            if isinstance(listed.get(path), dict):
                listed[path] |= {"sha256": spec.sha256, "bytes": spec.bytes}
    data = seal(obj)
    (root / MANIFEST).write_bytes(data)
    if forge:
        certificate = unseal((root / CERTIFICATE).read_bytes(), CERTIFICATE)
        certificate["manifest_digest"] = unseal(data, MANIFEST)["digest"]
        suite = obj.get("suite")
        if isinstance(suite, dict):
            certificate["suite_digest"] = suite.get("digest")
        (root / CERTIFICATE).write_bytes(seal(certificate))


SEALED: list[tuple[str, Change]] = [
    ("flip", _edit(flip)),
    ("flip", _edit(flip)),
    ("cut", _edit(cut)),
    ("grow", _edit(grow)),
    ("empty", _edit(lambda data, rng: b"")),
    ("swap", _swap),
    ("remove", _remove),
    ("add", _add),
    ("link", _link),
    ("special", _special),
    ("rename", _rename),
    ("respell", _respell),
    ("behind the seal", _behind_the_seal),
]
RESEALED: list[tuple[str, Change]] = [
    ("manifest edit", _manifest_edit),
    ("manifest edit", _manifest_edit),
    ("manifest edit", _manifest_edit),
    ("huge", _huge),
    ("escape", _escape),
    ("file flip", _file_edit(flip)),
    ("file cut", _file_edit(cut)),
    ("file empty", _file_edit(lambda data, rng: b"")),
    ("tokenizer", _tokenizer),
    ("shape", _shape),
]
MUST_REFUSE = ("escape",)
