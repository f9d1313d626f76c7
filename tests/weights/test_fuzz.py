"""Damaged configs and weight files: they load, or one of our errors says why not; never anything else, never a hang."""

import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_decoders as tiny
from multicard.config import ParallelConfig
from multicard.errors import MulticardError
from multicard.models.load import check_folder
from multicard.weights import Checkpoint

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = st.integers(-(1 << 70), 1 << 70) | st.integers(-2, 70) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("fuzz"), "llama-6-over-2")[0]


def check(call):
    """Whether it works; an error that isn't ours is raised."""
    try:
        call()
    except MulticardError:
        return False
    return True


def changed(data, whole, values):
    """``whole`` with some of its values changed or left out, at the top or one level down."""
    result = json.loads(json.dumps(whole))
    for _ in range(data.draw(st.integers(1, 3))):
        inner = [value for value in result.values() if isinstance(value, dict) and value]
        target = data.draw(st.sampled_from([result, *inner]))
        name = data.draw(st.sampled_from(sorted(target)) if target else st.text(max_size=5))
        if data.draw(st.booleans()):
            target[name] = data.draw(values)
        else:
            target.pop(name, None)
    return result


@FUZZ
@given(st.data())
def test_configs(folder, data):
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        whole = path.read_text()
        try:
            path.write_text(json.dumps(changed(data, json.loads(whole), VALUES)))
            check(lambda: check_folder(folder, ParallelConfig(tp=2)))
        finally:
            path.write_text(whole)
    assert check(lambda: check_folder(folder, ParallelConfig(tp=2)))


TENSORS = {
    "a": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    "empty": {"dtype": "F16", "shape": [0, 4], "data_offsets": [26, 26]},
    "c": {"dtype": "F16", "shape": [5], "data_offsets": [26, 36]},
}
SIZE = 36


def read_all(folder):
    with Checkpoint(folder) as checkpoint:
        for name, entry in checkpoint.tensors.items():
            entry.check_dtype()
            if entry.shape:
                checkpoint.read(name, 0, range(entry.shape[0]), torch.empty(entry.shape))


def write(path, header, length=None):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(range(SIZE)))


@FUZZ
@given(st.data())
def test_headers(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("header")
    path = folder / "model.safetensors"
    write(path, json.dumps(TENSORS).encode())
    assert check(lambda: read_all(folder))
    write(path, json.dumps(changed(data, TENSORS, VALUES)).encode())
    check(lambda: read_all(folder))
    header = bytearray(json.dumps(TENSORS).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    write(path, bytes(header), data.draw(st.none() | st.integers(0, (1 << 64) - 1) | st.integers(0, 400)))
    check(lambda: read_all(folder))


NESTED = b"[" * 100_000


@pytest.mark.parametrize("damage", [NESTED, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe", b"", b"[]", b"null", b'"x"'])
def test_json_that_is_none(folder, tmp_path, damage):
    (tmp_path / "config.json").write_bytes(damage)
    assert not check(lambda: check_folder(tmp_path, ParallelConfig()))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    write(tmp_path / "model.safetensors", damage)
    assert not check(lambda: check_folder(tmp_path, ParallelConfig()))
    (tmp_path / "model.safetensors.index.json").write_bytes(damage)
    assert not check(lambda: check_folder(tmp_path, ParallelConfig()))


def test_what_is_no_file_is_refused_and_not_waited_for(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    os.mkfifo(tmp_path / "model.safetensors")
    assert not check(lambda: check_folder(tmp_path, ParallelConfig()))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert not check(lambda: check_folder(tmp_path, ParallelConfig()))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"__metadata__": {"format": 3}}', "__metadata__ holds what isn't text"),
        (b'{"__metadata__": [1]}', "AttributeError"),
        (b'{"a": {"data_offsets":' * 200_000, "a header of 200000 tensors; 131072 at most"),
    ],
)
def test_headers_that_are_refused_by_file(tmp_path, header, said):
    write(tmp_path / "model.safetensors", header)
    with pytest.raises(MulticardError, match=rf"model.safetensors: .*{said}"):
        Checkpoint(tmp_path)
