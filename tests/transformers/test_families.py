"""Tensor and sequence parallel of every architecture of the zoo against one process."""

import pytest
import zoo

import multicard as mc

TP = (2, 3, 4)
SEQUENCES = ({"ring": 2}, {"ulysses": 3}, {"ring": 2, "tp": 2})


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


@pytest.mark.parametrize("name", sorted(zoo.NO_SEQUENCE))
def test_a_sequence_that_cant_be_split_is_refused_by_name(measured, name):
    for refusal in measured(ring=2)[name]:
        assert isinstance(refusal, str)
        assert "ring=2" in refusal
        assert "use tp=2" in refusal


def test_a_family_without_a_plan_is_refused_before_anything_is_split(run_on):
    def check(mesh):
        import transformers as hf

        model = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
        with pytest.raises(mc.errors.UnsupportedError, match=r"MambaForCausalLM.*no tensor-parallel plan"):
            mc.parallelize(model, mesh)
        return type(model.backbone.layers[0].mixer.in_proj).__name__

    assert run_on(check, tp=2) == ["Linear", "Linear"]


def test_the_page_is_up_to_date():
    from table import PAGE, table

    assert PAGE.read_text() == table(), "run `python tests/transformers/table.py`"
