"""Encoders of pipelines split over all ranks of a replica: all outputs, hidden states too, are one process's."""

import pytest
import torch
import transformers as hf

import text_pipelines
import zoo
from multicard.errors import MismatchError, UnsupportedError
from multicard.integrations.styles import make
from multicard.integrations.transformers.part import weight_changes

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(2))
KEEP = torch.tensor([[1] * 9 + [0] * 3, [1] * 12])
TEXT = {"input_ids": IDS, "attention_mask": KEEP}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}
PATCHES = torch.randn(16, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(3))  # 3 colours, 2 frames, 2 x 2
SEEN = {
    "input_ids": torch.tensor([[5, 120, 122, 122, 122, 122, 121, 7, 9]]),
    "attention_mask": torch.ones(1, 9, dtype=torch.long),
    "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]]),
    "pixel_values": PATCHES, "image_grid_thw": torch.tensor([[1, 4, 4]]),
}  # fmt: skip
VISION = {
    "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 33, "image_size": 16,
    "patch_size": 4, "projection_dim": 13,
}  # fmt: skip
DECODER = text_pipelines.DECODER

ENCODERS = {
    "clip": (text_pipelines.clip, TEXT),
    "clip with projection": (lambda: text_pipelines.clip(20, 5, 15), TEXT),
    "clip vision": (lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**VISION)), PIXELS),
    "siglip vision": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)), PIXELS),
    "t5": (text_pipelines.t5, TEXT),
    "umt5": (lambda: text_pipelines.t5("UMT5"), TEXT),
    "gemma2": (lambda: hf.Gemma2Model(hf.Gemma2Config(**DECODER, query_pre_attn_scalar=6, sliding_window=7)), TEXT),
    "qwen2": (lambda: hf.Qwen2Model(hf.Qwen2Config(**DECODER)), TEXT),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, tie_word_embeddings=True)), TEXT),
    "qwen2.5-vl": (text_pipelines.qwen, TEXT),
    "qwen2.5-vl, with a picture": (text_pipelines.qwen, SEEN),
    "llama": (lambda: hf.LlamaModel(hf.LlamaConfig(**DECODER)), TEXT),
    "mistral": (lambda: hf.MistralModel(hf.MistralConfig(**DECODER, sliding_window=7)), TEXT),
    "glm": (lambda: hf.GlmModel(hf.GlmConfig(**DECODER)), TEXT),
}


def built(name):
    torch.manual_seed(0)
    return zoo.scramble(ENCODERS[name][0]())


@torch.no_grad()
def outputs(model, name):
    """All tensors of the model's output, of positions that aren't padding."""
    found = model(**ENCODERS[name][1], output_hidden_states=True)
    named = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    named |= {f"hidden {i}": x for i, x in enumerate(found.hidden_states)}
    if ENCODERS[name][1] is TEXT:
        named = {key: x[KEEP.bool()] if x.shape[:2] == KEEP.shape else x for key, x in named.items()}
    return named


def measured(mesh, expected):
    found = {}
    for name, wanted in expected.items():
        model = built(name)
        whole = sum(parameter.numel() for parameter in model.parameters())
        make(weight_changes(model, mesh.by_weights()))
        share = sum(parameter.numel() for parameter in model.parameters()) / whole
        got = outputs(model, name)
        assert got.keys() == wanted.keys()
        found[name] = max(zoo.relative_error(got[key], wanted[key]) for key in wanted), share, got
    return found


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"cfg": 3}, {"cfg": 2, "ulysses": 2}], ids=str)
def test_all_outputs_are_those_of_one_process(run_on, degrees):
    by_rank = run_on(measured, {name: outputs(built(name), name) for name in ENCODERS}, **degrees)
    for rank in by_rank:
        for name, (error, share, got) in rank.items():
            assert error < 1e-5, (name, error)
            assert share < 0.8, (name, share)
            assert all(torch.equal(got[key], by_rank[0][name][2][key]) for key in got), f"{name}: ranks differ"


def test_layers_alone_and_other_dtypes(run_on):
    def here(mesh):
        model, alone = built("t5"), built("t5")
        make(weight_changes(model, mesh.by_weights()))
        with torch.no_grad():
            wanted, got = (each.encoder(**TEXT).last_hidden_state for each in (alone, model))
            half = [each.to(torch.bfloat16)(**TEXT).last_hidden_state.float() for each in (alone, model)]
        return zoo.relative_error(got, wanted), zoo.relative_error(half[1], half[0]), half[1]

    ranks = run_on(here, cfg=3)
    for error, half, encoded in ranks:
        assert error < 1e-5
        assert half < 2e-2
        assert torch.equal(encoded, ranks[0][2])


def test_ranks_with_different_prompts_are_told(run_on):
    def here(mesh):
        model = built("clip")
        make(weight_changes(model, mesh.by_weights()))
        try:
            model(IDS + mesh.replica.rank)
        except MismatchError as error:
            return str(error)

    for said in run_on(here, cfg=2):
        assert "input_ids" in said


def test_what_changes_the_vocabulary_is_refused(run_on):
    def here(mesh):
        model = built("clip")
        make(weight_changes(model, mesh.by_weights()))
        with pytest.raises(UnsupportedError, match="resize it before the split"):
            model.resize_token_embeddings(140)

    run_on(here, cfg=2)
