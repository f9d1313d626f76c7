"""from_pretrained: the same logits, and no byte read that isn't this rank's."""

import json

import pytest
import torch

import multicard as mc
import zoo
from snapshots import snapshot

NAMES = ("bert", "gemma3", "gpt2", "gpt_oss", "llama-tied", "mixtral", "phi3", "qwen2_moe", "t5_encoder")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Every architecture saved by transformers, in shards and in the layout that it publishes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in NAMES:
        zoo.build(name).save_pretrained(folder / name, max_shard_size="100KB")
    return folder


def load_and_compare(mesh, folder, references):
    from multicard.weights import Checkpoint

    read, original, found = [0], Checkpoint.read, {}

    def counting(self, *args):
        size = original(self, *args)
        read[0] += size[0]
        return size

    Checkpoint.read = counting
    try:
        for name, (reference, whole) in references.items():
            read[0] = 0
            model = mc.from_pretrained(folder / name, mesh, model_class=type(zoo.build(name)), dtype=torch.float32)
            found[name] = zoo.relative_error(zoo.forward(model, name), reference), read[0] / whole
    finally:
        Checkpoint.read = original
    return found


@pytest.mark.parametrize(
    "degrees", [pytest.param({"tp": 2}, marks=pytest.mark.seam), {"tp": 3}, {"ulysses": 2}], ids=str
)
def test_each_rank_reads_its_slices_only(run_on, oracles, checkpoints, degrees):
    sizes = {name: sum(path.stat().st_size for path in (checkpoints / name).glob("*.safetensors")) for name in NAMES}
    names = [name for name in NAMES if "tp" in degrees or name in ("gemma3", "llama-tied", "mixtral")]
    references = {name: (oracles[name][0], sizes[name]) for name in names}
    for rank in run_on(load_and_compare, checkpoints, references, **degrees):
        for name, (error, share) in rank.items():
            assert error <= 1e-5, name
            assert share <= (1.6 / degrees["tp"] + 0.15 if "tp" in degrees else 1), name


def test_a_snapshot_of_links(run_on, oracles, checkpoints, tmp_path):
    name = "qwen2_moe"
    size = sum(path.stat().st_size for path in (checkpoints / name).glob("*.safetensors"))
    snapshot(checkpoints / name, tmp_path).rename(tmp_path / "models--a--b" / "snapshots" / name)
    references = {name: (oracles[name][0], size)}
    for rank in run_on(load_and_compare, tmp_path / "models--a--b" / "snapshots", references, tp=2):
        assert rank[name][0] <= 1e-5


def test_damaged_checkpoints_are_refused_alike_on_every_rank(run_on, checkpoints, tmp_path):
    import shutil

    def check(mesh, folder):
        try:
            mc.from_pretrained(folder, mesh)
        except mc.errors.MulticardError as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"

    def broken(name, change):
        shutil.copytree(checkpoints / "gpt2", tmp_path / name)
        change(tmp_path / name)
        return run_on(check, tmp_path / name, tp=2)

    def drop_a_tensor(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        del index["weight_map"]["transformer.h.1.attn.c_attn.weight"]
        path.write_text(json.dumps(index))

    def change_config(**values):
        def change(folder):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | values))

        return change

    for name, change, wanted in (
        ("missing", drop_a_tensor, r"CheckpointError.*no tensor for 'transformer.h.1.attn.c_attn.weight'"),
        ("shape", change_config(n_inner=90), r"CheckpointError.*has shape \(60, 85\) where the config asks for"),
        ("class", change_config(architectures=["NoSuchModel"]), r"UnsupportedError.*NoSuchModel.*pass model_class="),
        ("quantized", change_config(quantization_config={"quant_method": "gptq"}), r"UnsupportedError.*quantized"),
    ):
        answers = broken(name, change)
        assert answers[0] == answers[1]
        with pytest.raises(AssertionError, match=wanted):
            raise AssertionError(answers[0])


def test_what_transformers_takes_and_we_dont_is_refused(checkpoints):
    for given in ({"device_map": "auto"}, {"tp_plan": "auto"}, {"quantization_config": {"load_in_8bit": True}}):
        with pytest.raises(mc.errors.ConfigError, match=f"{next(iter(given))}.*the mesh determines"):
            mc.from_pretrained(checkpoints / "gpt2", mc.single(), **given)
    assert mc.from_pretrained(checkpoints / "gpt2", mc.single(), dtype="auto").dtype == torch.float32


@pytest.mark.seam
def test_what_transformers_keeps_for_itself_is_asked_for_by_name(checkpoints, monkeypatch):
    from transformers import core_model_loading

    monkeypatch.delattr(core_model_loading, "rename_source_key")
    with pytest.raises(mc.errors.UnsupportedError, match=r"has no rename_source_key.*mc\.parallelize"):
        mc.from_pretrained(checkpoints / "gpt2", mc.single())


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(mc.errors.CheckpointError, match=r"no config\.json"):
        mc.from_pretrained(tmp_path, mc.single())
