"""Tensor and sequence parallel of every architecture of the zoo against one process."""

import pytest
import torch

import multicard as mc
import zoo
from multicard.integrations.transformers.sequence import FAMILIES

TP = (pytest.param(2, marks=pytest.mark.seam), 3, 4)
SEQUENCES = (pytest.param({"ring": 2}, marks=pytest.mark.seam), {"ulysses": 3}, {"ring": 2, "tp": 2})


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("name", [*zoo.DECODERS, *zoo.ENCODERS])
def test_tensor_parallel_is_exact(measured, name, tp):
    for error, same, share in measured(tp=tp)[name]:
        assert error <= 1e-5
        assert same
        assert share < (1 if name in zoo.WHOLE_ATTENTION else 1.6 / tp + 0.2), "it wasn't split"


@pytest.mark.parametrize("degrees", SEQUENCES, ids=str)
@pytest.mark.parametrize("name", [name for name in zoo.DECODERS if name not in zoo.NO_SEQUENCE])
def test_a_split_sequence_is_exact(measured, name, degrees):
    for error, same, _ in measured(**degrees)[name]:
        assert error <= 1e-5
        assert same


def test_every_other_family_whose_sequence_may_be_split(run_on):
    """Those of the adapter's list that aren't in the zoo, by sizes that most decoders understand."""
    in_the_zoo = {config().model_type for config in zoo.DECODERS.values()}
    kinds = [kind for kind in FAMILIES if kind not in in_the_zoo]
    alone = {kind: zoo.build(kind) for kind in kinds}
    oracles = {kind: (zoo.forward(model, kind), zoo.tokens(model, kind)) for kind, model in alone.items()}
    for rank in run_on(zoo.measure, oracles, ring=2):
        for kind, (error, same, _) in rank.items():
            assert error <= 1e-5, kind
            assert same, kind


@pytest.mark.parametrize("name", sorted(zoo.NO_SEQUENCE))
def test_a_sequence_that_cant_be_split_is_refused_by_name(measured, name):
    for refusal in measured(ring=2)[name]:
        assert isinstance(refusal, str)
        assert "ring=2" in refusal
        assert "use tp=2" in refusal


@pytest.mark.seam
def test_a_family_without_a_plan_is_refused_before_anything_is_split(run_on):
    def check(mesh):
        import transformers as hf

        model = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
        with pytest.raises(mc.errors.UnsupportedError, match=r"MambaForCausalLM.*no tensor-parallel plan"):
            mc.parallelize(model, mesh)
        return type(model.backbone.layers[0].mixer.in_proj).__name__

    assert run_on(check, tp=2) == ["Linear", "Linear"]


@pytest.mark.seam
def test_a_model_of_several_parts(run_on):
    """Each part attends by its own implementation, and a vision tower is split as well."""

    def build():
        import transformers as hf

        vision = hf.CLIPVisionConfig(image_size=16, patch_size=4, **zoo.ENCODER)
        text = hf.LlamaConfig(**zoo.LLAMA)
        config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=130, vision_feature_layer=-1)
        parts = {"": "eager", "text_config": "sdpa", "vision_config": "eager"}
        return zoo.scramble(hf.LlavaForConditionalGeneration._from_config(config, attn_implementation=parts))

    @torch.no_grad()
    def logits(model):
        ids = torch.cat([torch.full((1, 16), 130), torch.arange(3, 20)[None]], 1)
        return model(input_ids=ids, pixel_values=zoo.inputs("vit")["pixel_values"][:1]).logits

    expected = logits(build())
    for found in run_on(lambda mesh: logits(mc.parallelize(build(), mesh)), tp=2):
        assert zoo.relative_error(found, expected) <= 1e-5


def test_two_towers(run_on):
    def build():
        import transformers as hf

        text = hf.CLIPTextConfig(vocab_size=131, max_position_embeddings=64, eos_token_id=2, **zoo.ENCODER)
        vision = hf.CLIPVisionConfig(image_size=16, patch_size=4, **zoo.ENCODER)
        return zoo.scramble(hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=30)))

    @torch.no_grad()
    def logits(model):
        return model(**zoo.inputs("clip_text"), **zoo.inputs("vit")).logits_per_image

    expected = logits(build())
    for found in run_on(lambda mesh: logits(mc.parallelize(build(), mesh)), tp=3):
        assert zoo.relative_error(found, expected) <= 1e-5


@pytest.mark.seam
def test_what_a_split_model_cant_do_any_more_is_refused(run_on):
    def check(mesh):
        model, found = mc.parallelize(zoo.build("llama"), mesh), []
        for call in (
            lambda: model.set_attn_implementation("eager"),
            lambda: model.resize_token_embeddings(140),
            lambda: model.save_pretrained("anywhere"),
        ):
            with pytest.raises(mc.errors.UnsupportedError, match="before the split") as refusal:
                call()
            found.append(str(refusal.value))
        return found

    for messages in run_on(check, tp=2):
        assert ["set_attn" in messages[0], "resize" in messages[1], "save" in messages[2]] == [True] * 3


def test_the_page_is_up_to_date():
    from transformers_table import PAGE, table

    assert PAGE.read_text() == table(), "run `python tests/transformers_table.py`"
