"""Reading checkpoints: every fault is a CheckpointError that names the file, the same on every rank."""

import hashlib
import json
import os
import shutil
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_decoders as tiny
from multicard import collectives
from multicard.config import ParallelConfig
from multicard.errors import CheckpointError, ConfigError, UnsupportedError
from multicard.layers import ColumnParallelLinear
from multicard.layers.packed import pack
from multicard.layers.shard import Shard
from multicard.mesh import single
from multicard.models.load import check_folder, load_decoder
from multicard.weights import Checkpoint, Plain, checkpoint_path

NAME = "qwen2-6-over-2"
TENSOR = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return tiny.write(tmp_path, NAME)[0]


def header(path):
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(length)), file.read()


def rewrite(path, change):
    """Write the file again with its header changed."""
    found, data = header(path)
    change(found)
    text = json.dumps(found).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def truncate(path):
    os.truncate(path, path.stat().st_size - 100)


def overlap(found):
    ends = sorted((v["data_offsets"], k) for k, v in found.items() if k != "__metadata__")
    (_, last), size = ends[-1], ends[-1][0][1] - ends[-1][0][0]
    found[last]["data_offsets"] = [ends[-1][0][0] - 4, ends[-1][0][0] - 4 + size]


def as_float64(tensors):
    tensors[TENSOR] = tensors[TENSOR].double()


def as_other_shape(tensors):
    tensors[TENSOR] = tensors[TENSOR][:, :-1].contiguous()


FAULTS = {
    "truncated": (lambda f: truncate(f / "model.safetensors"), "truncated"),
    "cut in its header": (lambda f: os.truncate(f / "model.safetensors", 50), "truncated or not safetensors"),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "truncated or not safetensors"),
    "missing": (lambda f: (f / "model.safetensors").unlink(), "no such file"),
    "not JSON": (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"{{{{"), "damaged"),
    "overlapping": (lambda f: rewrite(f / "model.safetensors", overlap), "overlaps"),
    "bytes after the end": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"more"),
        "after its last tensor",
    ),
    "wrong shape": (
        lambda f: change_tensors(f, as_other_shape),
        r"shape \(48, 176\) where the config asks for \(48, 177\)",
    ),
    "wrong dtype": (lambda f: change_tensors(f, as_float64), "is F64"),
    "tensor missing": (lambda f: change_tensors(f, lambda t: t.pop(TENSOR)), f"no tensor '{TENSOR}'"),
    "tensor too many": (
        lambda f: change_tensors(f, lambda t: t.update({"model.layers.0.mlp.down_proj.bias": torch.zeros(48)})),
        "has no tensor 'model.layers.0.mlp.down_proj.bias'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_before_a_rank_starts(folder, fault):
    damage, expected = FAULTS[fault]
    damage(folder)
    with pytest.raises(CheckpointError, match=expected) as caught:
        check_folder(folder, ParallelConfig(tp=2))
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_or_config_that_is_not_there(tmp_path, folder):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        check_folder(tmp_path / "nowhere", ParallelConfig())
    (folder / "config.json").rename(folder / "other.json")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        check_folder(folder, ParallelConfig())
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        check_folder(folder, ParallelConfig())


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(UnsupportedError, match=r"can run code.*convert it: python -c .*save_pretrained"):
            check_folder(checkpoint_path(path), ParallelConfig())


def test_a_folders_only_file_stands_for_it(folder):
    assert checkpoint_path(folder) == folder
    file = (folder / "model.safetensors").rename(folder / "fine-tuned.safetensors")
    assert checkpoint_path(file) == checkpoint_path(folder) == folder
    check_folder(folder, ParallelConfig())
    shutil.copy(file, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"fine-tuned.safetensors isn't all of the weights in .*give the folder"):
        checkpoint_path(file)
    with pytest.raises(CheckpointError, match=r"model.safetensors: no such file"):
        check_folder(folder, ParallelConfig())
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json beside it"):
        checkpoint_path(file)


def test_more_ranks_than_heads(folder):
    with pytest.raises(ConfigError, match="tp=7 with 6 attention heads"):
        check_folder(folder, ParallelConfig(tp=7))


def test_an_index_of_shards(tmp_path):
    folder, model = tiny.write(tmp_path, NAME, max_shard_size="100KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3
    check_folder(folder, ParallelConfig(tp=3))
    *_, (loaded, report) = load_decoder(single(), folder)
    assert torch.equal(loaded.norm.weight, model.model.norm.weight)
    assert report.bytes_read == sum(p.numel() * 4 for p in model.parameters())

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files[1].rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{files[1].name}: no such file"):
        check_folder(folder, ParallelConfig())
    (folder / "elsewhere").rename(files[1])

    other = next(name for name, file in index["weight_map"].items() if file != files[0].name)
    index["weight_map"][other] = files[0].name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{files[0].name}: no tensor '{other}'"):
        check_folder(folder, ParallelConfig())
    index["weight_map"][other] = "../secret.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="isn't in its folder"):
        check_folder(folder, ParallelConfig())


def load_after_cutting(mesh, folder):
    """A file that is cut after its header was read, between rank 0's first tensor and the others'."""
    steps = load_decoder(mesh, folder)
    next(steps)
    collectives.barrier(mesh.world)
    if mesh.rank == 0:
        path = folder / "model.safetensors"
        os.truncate(path, path.stat().st_size // 2)
    collectives.barrier(mesh.world)
    try:
        for _ in steps:
            pass
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("tp", [1, 3])
def test_a_file_cut_while_it_is_read_is_the_same_error_on_every_rank(run_on, folder, tp):
    messages = run_on(load_after_cutting, folder, tp=tp)
    assert "model.safetensors is truncated: it ends at byte" in messages[0]
    assert len(set(messages)) == 1


def verified(mesh, folder):
    try:
        for _ in load_decoder(mesh, folder, checksums=True):
            pass
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_checksums(run_on, folder):
    path = folder / "model.safetensors"
    assert "no such file to verify with" in run_on(verified, folder, tp=2)[1]
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  model.safetensors\n")
    assert run_on(verified, folder, tp=2) == ["loaded"] * 2
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    messages = run_on(verified, folder, tp=2)  # rank 0 alone hashes the only file
    assert "is damaged" in messages[0]
    assert len(set(messages)) == 1


def high_water(mesh, folder):
    """Growth of the rank's largest resident size while it loads, beside what the loader says."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

    def resident(field):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

    warm = ColumnParallelLinear(256, 256, mesh.world)  # oneDNN's own code is paged in when it is first used
    pack(warm)
    warm(torch.zeros(1, 256))
    before = resident("VmRSS")
    *_, loaded = load_decoder(mesh, folder)
    return resident("VmHWM") - before, loaded[1]


def test_memory_while_loading_is_the_shard_and_little_more(run_on, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.COMMON, "intermediate_size", 16_001)
    monkeypatch.setitem(tiny.COMMON, "num_hidden_layers", 8)
    monkeypatch.setitem(tiny.CHECKPOINTS[NAME][1], "hidden_size", 288)
    folder, _ = tiny.write(tmp_path, NAME)
    for growth, report in run_on(high_water, folder, tp=2):
        assert report.shard_bytes > 150e6
        assert report.bytes_read == report.shard_bytes
        assert report.peak_bytes <= 1.1 * report.shard_bytes
        assert growth <= 1.2 * report.shard_bytes  # pages of 2 MB, as many as the kernel has at hand


@pytest.mark.seam
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_slice_is_what_safetensors_reads(tmp_path_factory, data):
    """Shapes, dtypes, dimensions and rows at random: the same numbers as the whole tensor's slice, and no byte more."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    whole = torch.randn(shape).to(dtype)
    folder = tmp_path_factory.mktemp("slice")
    safetensors.torch.save_file({"before": torch.zeros(3), "it": whole}, folder / "model.safetensors")
    dim = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim]))
    stop = data.draw(st.integers(start, shape[dim]))
    expected = whole.narrow(dim, start, stop - start)
    with Checkpoint(folder) as checkpoint:
        out = torch.full(expected.shape, torch.nan, dtype=torch.float32)
        size, _ = checkpoint.read("it", dim, range(start, stop), out)
    assert torch.equal(out, expected.float())
    assert size == expected.numel() * dtype.itemsize


def test_a_tensor_larger_than_the_staging_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr("multicard.weights.checkpoint.STAGING", 100)
    whole = torch.randn(13, 57)
    safetensors.torch.save_file({"it": whole}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        for dim, rows in ((0, range(2, 11)), (1, range(5, 50))):
            expected = whole.narrow(dim, rows.start, len(rows))
            out = torch.empty(expected.shape)
            checkpoint.read("it", dim, rows, out)
            assert torch.equal(out, expected)


def test_a_fused_parameter_is_read_from_its_parts():
    shard = Shard((8, 3), 0, (range(1, 3), range(4, 7)), (("q", 4), ("k", 2), ("v", 2)))
    found = [(name, spans) for name, spans in Plain("layers.0.attn.qkv.weight").slices(shard) if spans]
    assert found == [
        ("layers.0.attn.q.weight", (range(1, 3),)),
        ("layers.0.attn.k.weight", (range(0, 2),)),
        ("layers.0.attn.v.weight", (range(0, 1),)),
    ]
