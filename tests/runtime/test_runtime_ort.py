"""The cache as one buffer: a decoder of one attention, made by hand, against the same arithmetic in numpy."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from attention import IDS, TABLE, TEXT, check_reads, close, make_graphs
from edgesafe.format import graph_io
from edgesafe.runtime import decode
from edgesafe.runtime import ort as ort_module
from edgesafe.runtime.ort import OrtGraph, SharedReader, session_options
from mutants import wrong


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> tuple[OrtGraph, OrtGraph]:
    """embed_tokens and the decoder, opened."""
    embed, decoder = make_graphs(tmp_path_factory.mktemp("by_hand"))
    return OrtGraph(*embed, 1), OrtGraph(*decoder, 1)


def test_a_shared_cache_and_a_growing_one_are_what_numpy_says(graphs):
    shared = decode.open_reader(*graphs, TEXT, 10)
    assert isinstance(shared, SharedReader)
    check_reads(shared)
    check_reads(decode.GrowingReader(*graphs, TEXT))


def test_a_prompt_read_in_parts_is_the_same_prompt(graphs, monkeypatch):
    monkeypatch.setattr(ort_module, "PART_TOKENS", 2)
    reader = decode.open_reader(*graphs, TEXT, 10)
    ran = []
    monkeypatch.setattr(SharedReader, "_run", lambda self, e, n, run=SharedReader._run: ran.append(n) or run(self, e, n))
    check_reads(reader)
    assert ran == [2, 2, 1, 1, 1, 2, 1, 2, 2]
    monkeypatch.setattr(SharedReader, "read", wrong(SharedReader.read, ("for part in parts]", "for part in parts[:-1]]")))
    with pytest.raises(AssertionError):
        check_reads(decode.open_reader(*graphs, TEXT, 10))


def test_nothing_is_copied_until_the_room_ends_and_then_what_was_read_is_kept(graphs):
    reader = decode.open_reader(*graphs, TEXT, 10)
    reader.read(TABLE[IDS[:60]][None])
    (key, value) = reader._cache.values()
    assert reader.room == 64 and np.abs(key[:, :, :60]).min() > 0 and not key[:, :, 60:].any()
    for n in range(61, 65):
        assert close(reader.read_token(int(IDS[n - 1])), IDS[:n])
    assert [id(key), id(value)] == [id(a) for a in reader._cache.values()] and key[:, :, 60:].any()
    assert close(reader.read_token(int(IDS[64])), IDS[:65])
    assert reader.room == 128


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("_run", ("total = self.length + tokens", "total = self.length + tokens + 1")),
        ("_run", ("self.length = total", "self.length = tokens")),
        ("read_token", ("self._token[0, 0] = token", "pass")),
        ("rewind", ("self.length = length", "pass")),
    ],
    ids=["one token too many", "the past forgotten", "an old token read again", "no rewind"],
)
def test_wrong_readers_are_seen(graphs, monkeypatch, name, edit):
    monkeypatch.setattr(SharedReader, name, wrong(getattr(SharedReader, name), edit))
    with pytest.raises(AssertionError):
        check_reads(decode.open_reader(*graphs, TEXT, 64))


def test_a_buffer_that_forgets_when_it_grows_is_seen(graphs, monkeypatch):
    monkeypatch.setattr(SharedReader, "reserve", wrong(SharedReader.reserve, ("if self.length:", "if False:")))
    with pytest.raises(AssertionError):
        test_nothing_is_copied_until_the_room_ends_and_then_what_was_read_is_kept(graphs)


def test_a_prompt_of_another_length_finds_no_leavings_of_the_last(graphs, monkeypatch):
    gave, given = [], ort_module._shrinking
    monkeypatch.setattr(ort_module, "_shrinking", lambda: gave.append(True) or given())
    assert given().get_run_config_entry("memory.enable_memory_arena_shrinkage") == "cpu:0"
    embed, decoder = graphs

    def read(*lengths: int) -> int:
        """How often memory was given back while one reader read so many tokens after each other."""
        gave.clear()
        reader = decode.open_reader(embed, decoder, TEXT, 64)
        for at, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
            assert close(reader.read(TABLE[IDS[at : at + length]][None]), IDS[: at + length])
        return len(gave)

    assert read(4) == read(5) == 0  # a cache so small is not worth it
    monkeypatch.setattr(ort_module, "_LARGE", 1)
    # In a new conversation too, and for each turn; not for as long a prompt again.
    assert [read(4), read(4), read(9), read(9), read(4), read(3, 1, 2)] == [1, 0, 1, 0, 1, 3]
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
    with pytest.raises(Exception, match="arena"):
        embed._session.run(None, {graph_io.INPUT_IDS: IDS[None, :1]}, options)
    monkeypatch.setattr(ort_module, "_shrinking", lambda: options)
    assert read(9) == 0  # what can't be given back stays, and the prompt is read


def test_a_decoder_of_the_older_kind_keeps_its_growing_cache(handmade):
    from edgesafe import Session

    session = Session.open(handmade)
    assert isinstance(session.reader(8), decode.GrowingReader)
    assert not decode.shares_cache(session.manifest.graphs[graph_io.DECODER_PATH])


def test_the_decoder_alone_waits_awake_and_not_for_long():
    key = "session.intra_op.{}".format
    for alone, spins in ((True, "1"), (False, "0")):
        options = session_options(2, alone=alone)
        assert options.get_session_config_entry(key("allow_spinning")) == spins
        assert int(options.get_session_config_entry(key("spin_duration_us"))) <= 100  # 500 was slower than 20 to 100
