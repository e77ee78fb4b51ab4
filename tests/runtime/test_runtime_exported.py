"""The runtime on an exported tiny LLaVA against transformers itself: same ids, same features, same answers."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from edgesafe import Session
from edgesafe.errors import IntegrityError
from edgesafe.format.exits import Exit
from edgesafe.runtime import measure
from edgesafe.runtime.decode import GrowingReader
from edgesafe.runtime.ort import OrtGraph, SharedReader
from edgesafe.runtime.sampling import Sampling
from edgesafe.runtime.tokenizer import encode_prompt
from examples import NODE, PYTHON, asked, python, wanted

# Float32 graphs of a random model: the exporter's own parity bound is 1e-4 relative, and nothing is added here.
RTOL = 1e-4
PROMPTS = ["What is this?", "  two  spaces ", "naïve café €5 ✓", "line\nbreak", "my assistant: x", "a"]
NEW_TOKENS = 8
# Wrong versions of the example in plain onnxruntime, each of which must answer otherwise than the session.
WRONG = {
    "no crop": ('(img.height - size["height"]) // 2', "0"),
    "no std": (' / np.float32(spec["std"])', ""),
    "no features": ("embeds[ids == image_id] = state", "state"),
    "no chat": ('chat["prefix"] + sys.argv[3] + chat["suffix"]', 'chat["prefix"] + sys.argv[3]'),
    "lying": ("ImageOps.exif_transpose(Image.open(sys.argv[2]))", "Image.open(sys.argv[2])"),
}


@pytest.fixture(scope="module")
def session(tiny_bundle) -> Session:
    return Session.open(tiny_bundle, allow_uncertified=True)


@pytest.fixture(scope="module")
def processor(tiny_llava):
    return AutoProcessor.from_pretrained(tiny_llava)


@pytest.fixture(scope="module")
def model(tiny_llava):
    return LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (90, 70, 3), np.uint8))


def batch_of(processor, picture, prompt):
    turn = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}
    return processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_ids_are_the_processor_s(session, processor, picture, prompt):
    want = batch_of(processor, picture, prompt)["input_ids"][0].tolist()
    assert encode_prompt(session.tokenizer, session.manifest, prompt) == want


def test_features_and_answers_at_every_depth(session, processor, model, picture):
    batch = batch_of(processor, picture, PROMPTS[0])
    states = session.vision_states(picture, session.manifest.ladder)
    for exit in session.manifest.ladder:
        with torch.no_grad():
            got = model.get_image_features(pixel_values=batch["pixel_values"], vision_feature_layer=exit.depth)
            out = model.generate(**batch, vision_feature_layer=exit.depth, do_sample=False, max_new_tokens=NEW_TOKENS)
        want = got.pooler_output if hasattr(got, "pooler_output") else got
        want = torch.cat(list(want)).reshape(states[exit].shape).numpy()
        assert np.abs(states[exit] - want).max() <= RTOL * np.abs(want).max()
        new = out[0, batch["input_ids"].shape[1] :]
        answer = session.ask(picture, PROMPTS[0], exit=exit, max_new_tokens=NEW_TOKENS)
        assert answer.text == processor.tokenizer.decode(new, skip_special_tokens=True).lstrip()
        assert session.answer_features(states[exit], PROMPTS[0], NEW_TOKENS) == answer.text


def test_measured_exits_grow_with_depth(tiny_bundle, copy_of):
    table = measure(copy_of(tiny_bundle), seconds=0.5)
    times = [row["ttft_ms"]["p95_ms"] for row in table.exits]
    assert times == sorted(times) and times[0] > 0


def test_a_flipped_byte_in_each_file_is_refused(tiny_bundle, copy_of):
    root = copy_of(tiny_bundle)
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        at = len(whole) // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(IntegrityError):
            Session.open(root)
        path.write_bytes(whole)
    Session.open(root)


def test_the_exported_decoder_answers_alike_with_a_shared_and_with_a_growing_cache(session, picture, monkeypatch):
    assert isinstance(session.reader(8), SharedReader)
    asks = [(prompt, exit) for prompt in PROMPTS for exit in session.manifest.ladder]
    states = session.vision_states(picture, session.manifest.ladder)
    shared = [session.answer_features(states[exit], prompt, 30) for prompt, exit in asks]
    monkeypatch.setattr(OrtGraph, "share", lambda *_: None)
    assert isinstance(session.reader(8), GrowingReader)
    assert [session.answer_features(states[exit], prompt, 30) for prompt, exit in asks] == shared
    assert len(set(shared)) > len(PROMPTS)


def test_a_conversation_answers_as_ask_does(session, picture):
    for exit in session.manifest.ladder:
        talk = session.conversation(picture, exit=exit)
        for i, prompt in enumerate(PROMPTS):
            assert talk.ask(prompt, max_new_tokens=20).text == session.ask(picture, prompt, exit=exit, max_new_tokens=20).text
            assert (talk.reused_tokens >= session.manifest.image_tokens) == (i > 0)


def test_threads_take_turns_at_the_bound_buffers(session, picture):
    """Asks and a conversation's questions at once, each as it is answered alone."""
    talk = session.conversation(picture, exit=session.manifest.ladder[0])
    asks = [(prompt, exit) for prompt in PROMPTS for exit in session.manifest.ladder]
    alone = [session.ask(picture, prompt, exit=exit, max_new_tokens=12).text for prompt, exit in asks]

    def both(ask: tuple[str, Exit]) -> tuple[str, str]:
        text = session.ask(picture, ask[0], exit=ask[1], max_new_tokens=12).text
        return text, talk.ask(ask[0], max_new_tokens=12).text

    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(both, asks))
    first = {prompt: text for (prompt, exit), text in zip(asks, alone, strict=True) if exit == talk.exit}
    assert said == [(text, first[prompt]) for (prompt, _), text in zip(asks, alone, strict=True)]


def test_drawn_answers_differ_by_seed_and_not_by_run(session, picture):
    def said(seed: int) -> str:
        return session.ask(picture, PROMPTS[0], max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=seed)).text

    assert said(1) == said(1)
    assert len({said(seed) for seed in range(4)}) > 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A small grey picture, one that lies on its side by its EXIF tag, and one of the model's own size."""
    folder = tmp_path_factory.mktemp("pictures")
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256), 90)])
    Image.radial_gradient("L").resize((5, 9)).save(folder / "grey.png")
    lying.resize((70, 31)).save(folder / "lying.jpg", exif=exif)
    Image.effect_noise((28, 28), 90).convert("RGB").save(folder / "noise.png")
    return sorted(folder.iterdir())


def test_plain_onnxruntime_answers_as_the_session_does(session, tiny_bundle, pictures):
    answers = []
    for picture, exit, prompt in zip(pictures, session.manifest.ladder, PROMPTS[::2], strict=False):
        answers.append(wanted(session, picture, prompt, exit))
        assert asked(python(), tiny_bundle, picture, prompt, exit) == answers[-1]
    assert len({str(answer) for answer in answers}) == len(pictures) == 3


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_example_answers_otherwise(session, tiny_bundle, pictures, tmp_path, monkeypatch, capsys, name):
    source, (exit, case) = PYTHON.read_text(encoding="utf-8"), (session.manifest.reference, (pictures[1], PROMPTS[0]))
    assert source.count(WRONG[name][0]) == 1
    (tmp_path / "wrong.py").write_text(source.replace(*WRONG[name]), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["wrong.py", *map(str, (tiny_bundle, *case, exit))])
    runpy.run_path(str(tmp_path / "wrong.py"))
    assert json.loads(capsys.readouterr().out) != wanted(session, *case, exit)


def test_the_examples_are_short_and_know_nothing_of_edgesafe():
    nodes = [n for n in ast.walk(ast.parse(PYTHON.read_text(encoding="utf-8"))) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).partition(".")[0] for n in nodes}
    assert names == {"json", "sys", "pathlib", "numpy", "onnxruntime", "PIL", "tokenizers"}
    for path, most in ((PYTHON, 31), (NODE, 40)):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        assert sum(line != "" and not line.startswith(("#", "//", "import ", "from ", '"""')) for line in lines) <= most
