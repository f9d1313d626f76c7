"""GGUF files: every type's numbers, slices that cut blocks, split files; faults are errors that name the file."""

import hashlib
import os
import struct

import gguf
import gguf.quants
import numpy as np
import pytest
import torch

import tiny_ggufs as tiny
from multicard.config import ParallelConfig
from multicard.errors import CheckpointError, MulticardError, UnsupportedError
from multicard.layers.shard import shard_of
from multicard.mesh import single
from multicard.models.compiler import outline
from multicard.models.load import check_folder, load_decoder
from multicard.models.outline import sources
from multicard.quantized.types import BLOCK_TYPES
from multicard.quantized.weight import blocks_of
from multicard.quantized.words import dequantize
from multicard.weights import open_files
from multicard.weights.gguf.files import GGUFFiles
from multicard.weights.gguf.header import read_header
from multicard.weights.source import Reader

ROWS, COLUMNS = 5, 768
HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
HALVES |= {
    kind: [at for at, _ in (tiny.SCALES[kind], tiny.MINIMA.get(kind, (None, 0))) if at is not None]
    for kind in tiny.SCALES
}
"""By type, where float16 numbers are in a block; all other bytes may be anything."""


@pytest.mark.seam
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_stand_for_what_gguf_says(kind):
    _, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(1)
    raw = generator.integers(0, 256, (64, 3, width), dtype=np.uint8)
    for at in HALVES[kind]:
        numbers = generator.normal(0, 10.0 ** generator.integers(-6, 4, (64, 3))).astype(np.float16)
        raw[..., at : at + 2] = numbers[..., None].view(np.uint8)
    expected = gguf.quants.dequantize(raw.reshape(64, -1), gguf.GGMLQuantizationType[kind])
    assert np.abs(expected).max() > 100
    assert torch.equal(dequantize(kind, torch.tensor(raw)), torch.tensor(expected))


@pytest.fixture(scope="module")
def every_type(tmp_path_factory):
    """A file with one matrix of each type, one vector, and their numbers."""
    path, generator = tmp_path_factory.mktemp("types") / "types.gguf", np.random.default_rng(0)
    writer, expected = gguf.GGUFWriter(path, "llama"), {}
    for kind in tiny.TYPES:
        raw = tiny.blocks(kind, ROWS, COLUMNS, generator)
        writer.add_tensor(kind, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        expected[kind] = torch.tensor(tiny.numbers(kind, raw))
    raw = tiny.blocks("Q8_0", 1, COLUMNS, generator)
    writer.add_tensor("vector", raw[0], raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    expected["vector"] = torch.tensor(tiny.numbers("Q8_0", raw)[0])
    finish(writer)
    return path, expected


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SLICES = [(0, 0, 5), (0, 1, 4), (1, 0, 768), (1, 256, 512), (1, 7, 8), (1, 250, 601), (1, 31, 33), (0, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", tiny.TYPES)
def test_slices_are_those_of_the_whole(every_type, kind, dtype):
    path, expected = every_type
    with GGUFFiles(path) as files:
        elements, size = files.tensors[kind].kind.columns, files.tensors[kind].kind.size
        for dim, start, stop in SLICES:
            part = expected[kind].narrow(dim, start, stop - start).to(dtype)
            around = torch.full((part.shape[0] + 2, part.shape[1] + 2), -7.0, dtype=dtype)
            read, _ = files.read(kind, dim, range(start, stop), around[1:-1, 1:-1])
            assert torch.equal(around[1:-1, 1:-1], part)
            assert (around == -7.0).sum() >= around.numel() - part.numel()  # nothing else was written
            covered = -(-stop // elements) - start // elements if dim else COLUMNS // elements
            assert read == (ROWS if dim else stop - start) * covered * size * bool(part.numel())


def test_a_vector_is_cut_too(every_type):
    path, expected = every_type
    with GGUFFiles(path) as files:
        out = torch.empty(50)
        assert files.read("vector", 0, range(40, 90), out)[0] == 2 * 34
        assert torch.equal(out, expected["vector"][40:90])


def test_large_tensors_are_read_in_pieces(every_type, monkeypatch):
    path, expected = every_type
    monkeypatch.setattr("multicard.weights.gguf.files.STAGING", 2 * 4 * COLUMNS)
    with GGUFFiles(path) as files:
        out = torch.empty(ROWS, COLUMNS)
        _, staging = files.read("Q6_K", 0, range(ROWS), out)
        assert torch.equal(out, expected["Q6_K"])
        assert staging == 2 * COLUMNS * 4 + 2 * 3 * 210


def test_blocks_as_they_are(every_type):
    path, expected = every_type
    with GGUFFiles(path) as files:
        for kind in BLOCK_TYPES:
            raw, inside = files.blocks(kind, range(ROWS), range(250, 601))
            assert raw.shape[0] == ROWS
            assert torch.equal(dequantize(kind, raw)[:, inside.start : inside.stop], expected[kind][:, 250:601])
            raw, inside = files.blocks(kind, range(1, 3), range(COLUMNS))
            assert (len(raw), inside) == (2, range(COLUMNS))


@pytest.mark.parametrize("family", tiny.MODELS)
def test_blocks_are_read_some_rows_at_a_time(tmp_path, monkeypatch, family):
    """Pieces of 32 rows, a whole head's, of parts that end inside a piece and inside a tile."""
    path, several = tmp_path / "m.gguf", set()
    tiny.write(path, family, types=["Q8_0", "Q6_K", "Q4_0"])
    for rank in range(3):
        model = outline(str(path), rank, 3, 1, torch.float32)
        with GGUFFiles(path) as files:
            source_of = sources(model.config, files, model)
            for name, parameter in model.named_parameters():
                weight, found = blocks_of(parameter), {}
                if weight is None:
                    continue
                for piece in (1, 1 << 30):
                    monkeypatch.setattr("multicard.weights.blocks.PIECE", piece)
                    reader, out = Reader(files), torch.zeros(weight.words, dtype=torch.int32)
                    source_of(name).fill(reader, name, shard_of(parameter), out)
                    found[piece] = out, reader
                (small, pieces), (whole, together) = found.values()
                assert torch.equal(small, whole)
                assert pieces.bytes_read == together.bytes_read
                assert pieces.staging <= 3 * 32 * max(part.width * part.type.size for part in weight.parts)
                several.add(pieces.staging < together.staging)
    assert True in several


def numbers(parameter):
    """Of a parameter in blocks, or a plain one."""
    weight = blocks_of(parameter)
    return parameter if weight is None else weight.numbers(parameter)


@pytest.mark.parametrize("options", [{"split_max_tensors": 7}, {"split_max_tensors": 9, "small_first_shard": True}])
def test_a_split_file(tmp_path, options):
    model = tiny.write(tmp_path / "m.gguf", "qwen2", **options)
    first, second, *others = sorted(tmp_path.glob("m-*.gguf"))
    assert others
    *_, (loaded, report) = load_decoder(single(), first, torch.float32, reorder=False)
    for ours, theirs in (
        (loaded.lm_head.weight, model.lm_head.weight),
        (loaded.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight),
    ):
        assert torch.equal(numbers(ours), theirs)
    assert report.bytes_read == report.shard_bytes < report.parameter_bytes
    assert report.dequantized_bytes  # of layers that are in blocks in part
    with pytest.raises(UnsupportedError, match=rf"{second.name} is part 2 of .*: give the first, m-00001-of"):
        check_folder(second, ParallelConfig())
    second.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"{second.name}: no such file"):
        check_folder(first, ParallelConfig())
    others[0].rename(second)
    with pytest.raises(CheckpointError, match=f"{second.name} says that it is part 2 of .*; expected 1 of"):
        check_folder(first, ParallelConfig())
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(
        CheckpointError, match=r"other.gguf says that it is a part of .: its name has to end in -00001-of"
    ):
        check_folder(tmp_path / "other.gguf", ParallelConfig())


def text(said):
    return struct.pack("<Q", len(said)) + said


def value(key, kind, packed):
    return text(key) + struct.pack("<I", kind) + packed


def tensor(name, shape, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def file(values=(), tensors=(), data=b"", version=3, counts=None):
    """A file of such parts, each as its bytes."""
    head = (
        b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(values)))) + b"".join([*values, *tensors])
    )
    return head + bytes(-len(head) % 32) + data


A, B = tensor(b"a", (4,)), tensor(b"b", (2, 4), 1, 32)
WHOLE = file([value(b"k", 8, text(b"v"))], [A, B], bytes(48))
LONG = 1 << 62
FAULTS = {
    "empty": (b"", "is not a GGUF file"),
    "another format": (b"PK\3\4" * 20, "is not a GGUF file: it begins with b'PK"),
    "magic only": (b"GGUF", "is truncated or damaged: 4 bytes, and its header asks for 4 at byte 4"),
    "version 1": (file(version=1), "is GGUF version 1: readable are"),
    "big-endian": (file(version=3 << 24), "is big-endian"),
    "absurd counts": (file(counts=(LONG, 0)), "tensors; 65536 and 131072 at most"),
    "counts beyond the file": (file(counts=(7, 0)), "is truncated or damaged: 32 bytes"),
    "key beyond the file": (file([struct.pack("<Q", 5000)]), "asks for 5000 at byte"),
    "absurd key": (file([struct.pack("<Q", LONG)]), f"a text of {LONG} bytes"),
    "text beyond the file": (file([value(b"k", 8, struct.pack("<Q", 1000))]), "asks for 1000 at byte"),
    "key twice": (file([value(b"k", 4, b"1234")] * 2), "the key 'k' twice"),
    "key that isn't UTF-8": (file([value(b"\xff", 4, b"1234")]), "a text that isn't UTF-8"),
    "text that isn't UTF-8": (file([value(b"k", 8, text(b"\xc3("))]), "a text that isn't UTF-8"),
    "unknown value": (file([value(b"k", 13, b"")]), "a value of type 13"),
    "array of arrays": (file([value(b"k", 9, struct.pack("<IQ", 9, 1))]), "an array of values of type 9"),
    "absurd array": (file([value(b"k", 9, struct.pack("<IQ", 8, LONG))]), f"an array of {LONG} values"),
    "array beyond the file": (file([value(b"k", 9, struct.pack("<IQ", 4, 99))]), "an array of 99 values in a file of"),
    "neither true nor false": (file([value(b"k", 7, b"\2")]), "a truth value other than 0 and 1"),
    "alignment": (
        file([value(b"general.alignment", 4, struct.pack("<I", 12))], [A]),
        "general.alignment 12, not a power",
    ),
    "alignment 0": (file([value(b"general.alignment", 4, bytes(4))], [A]), "general.alignment 0"),
    "no dimensions": (file([], [tensor(b"a", ())]), "'a' has 0 dimensions"),
    "five dimensions": (file([], [tensor(b"a", (1,) * 5)]), "'a' has 5 dimensions"),
    "no elements": (file([], [tensor(b"a", (4, 0))]), r"'a' has shape \(4, 0\)"),
    "absurd shape": (file([], [tensor(b"a", (LONG, LONG))]), "'a' has shape"),
    "unknown type": (file([], [tensor(b"a", (32,), 99)]), "'a' is of the unknown type 99; readable are F32, F16, Q4_0"),
    "type that isn't readable": (file([], [tensor(b"a", (32,), 23)]), "'a' is IQ4_XS; readable are"),
    "part of a block": (file([], [tensor(b"a", (2, 33), 2)], bytes(36)), "'a' has rows of 33, and blocks of 32"),
    "tensor twice": (file([], [A, A], bytes(48)), "the tensor 'a' twice"),
    "overlap": (file([], [A, tensor(b"b", (2, 4), 1, 0)], bytes(48)), "overlaps another tensor"),
    "gap": (file([], [A, tensor(b"b", (2, 4), 1, 64)], bytes(96)), r"isn't where the one before it ends \(byte"),
    "not aligned": (file([], [A, tensor(b"b", (2, 4), 1, 16)], bytes(48)), "isn't where the one before it ends"),
    "truncated": (WHOLE[:-1], "is truncated: "),
    "without its data": (WHOLE[:-48], "is truncated: "),
    "bytes after the end": (WHOLE + bytes(40), "has 40 bytes after its last tensor"),
}


def test_a_whole_file_is_read(tmp_path):
    path = tmp_path / "whole.gguf"
    path.write_bytes(WHOLE)
    header = read_header(path)
    assert header.metadata == {"k": "v"}
    assert [(entry.name, entry.shape, entry.kind.name) for entry in header.tensors] == [
        ("a", (4,), "F32"),
        ("b", (2, 4), "F16"),
    ]
    assert header.tensors[1].offset == len(WHOLE) - 16


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_by_file(tmp_path, fault):
    damaged, said = FAULTS[fault]
    path = tmp_path / "model.gguf"
    path.write_bytes(damaged)
    with pytest.raises((CheckpointError, UnsupportedError), match=rf"model.gguf.*{said}") as caught:
        GGUFFiles(path)
    assert "\n" not in str(caught.value)


def test_values_of_every_type(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    numbers = {
        "uint8": 255,
        "int8": -1,
        "uint16": 65535,
        "int16": -2,
        "uint32": 1 << 31,
        "int32": -3,
        "uint64": 1 << 63,
    }
    for kind, number in {**numbers, "int64": -4, "float32": 0.5, "float64": 0.1, "bool": True, "string": "é"}.items():
        getattr(writer, f"add_{kind}")(kind, number)
    for name, values in {"texts": ["a", "", "é\0"], "ints": [1, -2], "floats": [0.5], "bools": [True, False]}.items():
        writer.add_array(name, values)
    finish(writer)
    found = read_header(tmp_path / "m.gguf").metadata
    assert numbers.items() <= found.items()
    assert found["float64"] == 0.1
    assert found["bool"] is True
    assert (found["string"], found["texts"], found["bools"]) == ("é", ["a", "", "é\0"], [True, False])
    assert (found["ints"], found["floats"]) == ([1, -2], [0.5])


def test_headers_longer_than_one_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    texts = ["x" * (number % 37) for number in range(150_000)]
    writer.add_array("texts", texts)
    writer.add_array("numbers", list(range(300_000)))
    finish(writer)
    found = read_header(tmp_path / "m.gguf").metadata
    assert found["texts"] == texts
    assert found["numbers"] == list(range(300_000))


def cut_while_loading(mesh, path):
    """What loading says on this rank where the file is cut after its header was read."""
    steps = load_decoder(mesh, path)
    next(steps)
    if mesh.rank == 0:
        os.truncate(path, 100_000)
    try:
        for _ in steps:
            pass
    except MulticardError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("tp", [1, 3])
def test_a_file_cut_while_it_is_read_is_the_same_error_on_every_rank(run_on, tmp_path, tp):
    path = tmp_path / "m.gguf"
    tiny.write(path)
    messages = run_on(cut_while_loading, path, tp=tp)
    assert "m.gguf is truncated: it ends at byte" in messages[0]
    assert len(set(messages)) == 1


def test_checksums(tmp_path):
    path = tmp_path / "m.gguf"
    tiny.write(path)
    with pytest.raises(CheckpointError, match=r"make it with `sha256sum \*.gguf > SHA256SUMS`"):
        list(load_decoder(single(), path, checksums=True))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  m.gguf\n")
    assert list(load_decoder(single(), path, checksums=True))
    (tmp_path / "SHA256SUMS").write_text(f"{digest[::-1]}  m.gguf\n")
    with pytest.raises(CheckpointError, match=r"m.gguf is damaged: its SHA-256"):
        list(load_decoder(single(), path, checksums=True))


def test_what_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"m.gguf: no such file"):
        open_files(tmp_path / "m.gguf")
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"m.gguf is not a regular file"):
        open_files(tmp_path / "m.gguf")
