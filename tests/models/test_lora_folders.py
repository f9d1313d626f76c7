"""LoRA adapters in peft's folders on our own decoder: peft's merged model, at every degree; and what is refused."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch

import loras
import multicard as mc
import tiny_decoders as tiny
from multicard.cli import main
from multicard.errors import CheckpointError, ConfigError, UnsupportedError
from multicard.models import generate as decoding
from multicard.models.load import load_decoder

NAMES = ("llama-7-heads", "llama-6-over-2", "qwen3-9-over-3")
IDS = tiny.prompts(NAMES[0])[0]


@pytest.fixture(scope="module", params=NAMES)
def folders(request, tmp_path_factory):
    """A checkpoint's folder, two adapters', and the model with both, by peft."""
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def some_folders(tmp_path_factory):
    return write(tmp_path_factory.mktemp("some"), NAMES[1])


def write(folder, name):
    path, model = tiny.write(folder, name)
    one = {
        "r": 5,
        "rank_pattern": {"1.self_attn.q_proj": 3, "o_proj": 2},
        "alpha_pattern": {"^model.layers.0.mlp.down_proj": 11},
    }
    heads = [] if model.config.tie_word_embeddings else ["lm_head"]
    model = loras.adapted(model, (*loras.LLAMA, *heads), **one)
    model.save_pretrained(folder / "one", save_embedding_layers=False)
    model = loras.adapted(model.merge_and_unload(), ("q_proj", "down_proj"), 4, r=2, use_rslora=True)
    model.save_pretrained(folder / "two")
    return path, (folder / "one", folder / "two"), model.merge_and_unload()


@pytest.mark.parametrize("degrees", [{"tp": 1}, {"tp": 2}, {"tp": 3}, {"tp": 4}, {"ring": 2}], ids=str)
def test_logits_of_the_merged_model(run_on, folders, degrees):
    path, adapters, merged = folders
    with torch.no_grad():
        alone = merged.double()(torch.tensor([IDS])).logits[0]

    def here(mesh):
        *_, (model, report) = load_decoder(mesh, path, adapters=adapters)
        return decoding.logits(model, IDS), report.bytes_read

    def plain(mesh):
        *_, (model, report) = load_decoder(mesh, path)
        return decoding.logits(model, IDS), report.bytes_read

    whole = sum((folder / "adapter_model.safetensors").stat().st_size for folder in adapters)
    for (logits, read), (without, fewer) in zip(run_on(here, **degrees), run_on(plain, **degrees), strict=True):
        assert error(logits, alone) <= 1e-5
        assert error(without, alone) > 0.05
        assert read - fewer <= (whole if degrees == {"tp": 1} or "ring" in degrees else 0.85 * whole)


def error(logits, reference):
    return float((logits.double() - reference).abs().max() / reference.abs().max())


def test_one_rounding(run_on, folders):
    """The weights of bfloat16 are the exact sum's, rounded once."""
    path, adapters, _ = folders
    found = []
    for dtype in (torch.float32, torch.bfloat16):

        def here(mesh, dtype=dtype):
            *_, (model, _) = load_decoder(mesh, path, dtype, adapters=adapters, reorder=False)
            return model.state_dict()

        found.append(run_on(here, tp=3))
    for exact, half in zip(*found, strict=True):
        assert all(torch.equal(half[name], exact[name].bfloat16()) for name in exact)


def test_tokens_of_the_merged_model(some_folders):
    path, (one, two), merged = some_folders
    with torch.no_grad():
        tokens = merged.float().generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)[0, len(IDS) :]
    with mc.LLM(path, tp=2, lora=[one, str(two)], timeout=30) as llm:
        assert llm.generate(IDS, max_new_tokens=6).token_ids == tokens.tolist()
        assert llm.lora == (one, two)


def remove(name):
    return lambda folder: (folder / name).unlink()


def change_config(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def change_tensors(change):
    def changed(folder):
        file = folder / "adapter_model.safetensors"
        safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)

    return changed


def without_one(tensors):
    tensors.pop(max(tensors))
    return tensors


REFUSED = {
    "no folder": (shutil.rmtree, CheckpointError, "no such folder of a LoRA adapter"),
    "no config": (remove("adapter_config.json"), CheckpointError, "adapter_config.json: no such file"),
    "no tensors": (remove("adapter_model.safetensors"), CheckpointError, "adapter_model.safetensors: no such file"),
    "DoRA": (change_config(use_dora=True), UnsupportedError, "use_dora=True, which isn't plain LoRA"),
    "a setting of a later release": (change_config(use_what=3), UnsupportedError, "use_what=3"),
    "biases": (change_config(bias="all"), UnsupportedError, "bias='all'"),
    "PiSSA": (change_config(init_lora_weights="pissa"), UnsupportedError, "init_lora_weights='pissa'"),
    "saved modules": (change_config(modules_to_save=["lm_head"]), UnsupportedError, "modules_to_save="),
    "another kind": (change_config(peft_type="LOHA"), UnsupportedError, "peft_type='LOHA'"),
    "no rank": (change_config(r=0), CheckpointError, "r=0 and lora_alpha=7"),
    "another rank": (change_config(r=3), CheckpointError, "has rank 2, and adapter_config.json says 3"),
    "a pattern": (change_config(rank_pattern={"(a+)+b": 3}), UnsupportedError, r"the pattern '(a+)+b'"),
    "half a pair": (change_tensors(without_one), CheckpointError, "has a LoRA matrix A and not the other one"),
    "an embedding's": (
        change_tensors(lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 4)}),
        UnsupportedError, "lora_embedding_A isn't a LoRA matrix of a linear layer",
    ),
    "another width": (
        change_tensors(lambda t: {name: torch.cat([x, x], 1) if "lora_A" in name else x for name, x in t.items()}),
        CheckpointError, "an adapter of another model",
    ),
    "another depth": (
        change_tensors(lambda t: {name.replace("layers.1.", "layers.7."): x for name, x in t.items()}),
        CheckpointError, "where .* has no such linear layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_rank_starts(tmp_path, some_folders, case, capsys):
    path, (_, two), _ = some_folders
    damage, kind, said = REFUSED[case]
    folder = shutil.copytree(two, tmp_path / "adapter")
    damage(folder)
    with pytest.raises(kind, match=said if ".*" in said else re.escape(said)) as caught:
        mc.LLM(path, tp=2, lora=folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--model", str(path), "--lora", str(folder), "hello"])
    assert re.search(said if ".*" in said else re.escape(said), capsys.readouterr().err)


def test_values_that_are_no_folder(some_folders):
    with pytest.raises(ConfigError, match=r"lora=\[3\]: must be a path"):
        mc.LLM(some_folders[0], lora=[3])
