"""Damaged GGUF files: they load, or one of our errors says why not; never anything else, never a hang."""

import pathlib
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_ggufs as tiny
from multicard.config import ParallelConfig
from multicard.errors import MulticardError
from multicard.models.load import check_folder
from multicard.models.tokenizer import Tokenizer

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
WORDS = st.sampled_from([0, 1, 2, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])


class Whole(typing.NamedTuple):
    """A file, its bytes, and where its data begins."""

    path: pathlib.Path
    content: bytes
    end: int

    def __repr__(self):
        return f"{self.path}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    tiny.write(path, "llama", ["Q4_0"])
    content = path.read_bytes()
    end = content.rindex(b"rope_freqs.weight") + 17 + 4 + 8 + 4 + 8
    return Whole(path, content, end)


def works(path):
    """Whether it can be used; an error that isn't ours, or doesn't name the file in one line, is raised."""
    try:
        check_folder(path, ParallelConfig(tp=2))
        return Tokenizer.of(path) is not None
    except MulticardError as error:
        if path.name not in str(error) or "\n" in str(error):
            raise
        return False


@FUZZ
@given(st.data())
def test_damaged_headers(whole, data):
    path, content, end = whole
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        if data.draw(st.booleans()):
            damaged[at] = data.draw(st.integers(0, 255))
        else:
            damaged[at : at + 8] = data.draw(WORDS).to_bytes(8, "little")
    cut = data.draw(st.none() | st.integers(0, end))
    path.write_bytes(damaged[:cut])
    assert not (works(path) and cut is not None)


def test_without_damage(whole):
    path, content, _ = whole
    path.write_bytes(content)
    assert works(path)


def test_every_cut_of_the_header(whole):
    path, content, end = whole
    for cut in range(0, end, 41):
        path.write_bytes(content[:cut])
        assert not works(path)
