"""The answer's text as it grows: half characters, runs of byte tokens and stop texts."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgesafe.errors import InputError
from edgesafe.format.bundle import Bundle
from edgesafe.runtime.tokenizer import TextStream, encode_prompt
from handmade import make_tokenizer


def test_text_stream_holds_half_a_character_back():
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode(" é€x").ids]
    # Leading white space is dropped; bytes that are no whole character yet give nothing.
    assert pieces == ["", "", "é", "", "", "€", "x"]
    assert stream.finish() == "" and stream.text == "é€x"


def _in_llama_s_manner() -> Tokenizer:
    """Words, and a token a byte for what is none; ``</s>`` is special."""
    words = {word: i for i, word in enumerate(["<unk>", "one", "two", *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.mark.parametrize(
    ("said", "pieces"),
    [
        ("one C E4 two one", ["one", "", "", "\ufffd\ufffdtwo", "one"]),
        ("C3 A9 FF two", ["", "", "", "\ufffd\ufffd\ufffdtwo"]),
        ("C3 A9 two", ["", "", "\u00e9two"]),
        ("one C3 </s> A9 two", ["one", "", "", "", "\u00e9two"]),
        ("one C3 A9 </s> FF", ["one", "", "", "", ""]),
        ("one 0A", ["one", ""]),
    ],
)
def test_text_stream_loses_nothing_where_bytes_spell_no_character(said, pieces):
    tokenizer = _in_llama_s_manner()
    ids = [tokenizer.token_to_id(t if t.startswith(("o", "t", "</")) else f"<0x{int(t, 16):02X}>") for t in said.split()]
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == pieces
    rest = stream.finish()
    assert "".join(pieces) + rest == stream.text == tokenizer.decode(ids, skip_special_tokens=True).lstrip()


def test_a_stop_text_of_bytes_ends_the_answer_at_once():
    tokenizer = _in_llama_s_manner()
    stream = TextStream(tokenizer, stop=("\n",))
    assert [stream.push(tokenizer.token_to_id(t)) for t in ("one", "<0x0A>")] == ["one", ""]
    assert stream.ended and stream.finish() == "" and stream.text == "one"


@pytest.mark.parametrize("unknown", ["<unk>", "[UNK]"])
def test_a_word_that_the_tokenizer_does_not_know_is_no_control_text(handmade, unknown):
    manifest = Bundle.open(handmade).manifest
    words = ["what", "U", "A", ":", "?"]
    vocabulary = {manifest.image_token: manifest.image_token_id}
    free = (i for i in range(99) if i != manifest.image_token_id)
    vocabulary |= {word: next(free) for word in (unknown, *words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([unknown, manifest.image_token])
    assert vocabulary[unknown] in encode_prompt(tokenizer, manifest, "what zebra?")
    with pytest.raises(InputError, match="control text"):
        encode_prompt(tokenizer, manifest, f"what {unknown}?")
