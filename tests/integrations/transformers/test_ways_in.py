"""The same model through each way in: `parallelize`, `from_pretrained` and `LLM`, on every kind of split.

The long matrix that a new version of transformers has to pass; in another environment:
`.venv-lowest/bin/python -m pytest -m soak tests/integrations/transformers/test_ways_in.py`.
"""

import pytest
import torch

import multicard as mc
import zoo
from multicard.integrations.transformers import from_pretrained

pytestmark = pytest.mark.soak

FAMILIES = ("llama", "qwen3", "gemma3", "deepseek_v3", "glm4_moe")
SPLITS = ({"ring": 2}, {"ulysses": 2}, {"tp": 2})


def plain():
    return {"input_ids": zoo.inputs("llama")["input_ids"].clamp_min(3)}


def answers(model, given):
    """Logits where there is no padding, and the tokens that follow."""
    with torch.no_grad():
        logits = model(**given).logits
        tokens = model.generate(**given, max_new_tokens=8, do_sample=False)[:, logits.shape[1] :]
    return logits[given["attention_mask"].bool()] if "attention_mask" in given else logits, tokens


def inputs():
    return plain(), zoo.inputs("llama")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A family's name, its folder, and what one process answers to plain and padded prompts."""
    folder = tmp_path_factory.mktemp(request.param)
    model = zoo.build(request.param)
    model.save_pretrained(folder)
    return request.param, folder, [answers(model, given) for given in inputs()]


@pytest.mark.parametrize("degrees", SPLITS, ids=str)
@pytest.mark.parametrize("way", ["parallelize", "from_pretrained"])
def test_a_split_model(run_on, family, degrees, way):
    name, folder, expected = family

    def here(mesh):
        model = mc.parallelize(zoo.build(name), mesh) if way == "parallelize" else from_pretrained(folder, mesh)
        return [answers(model, given) for given in inputs()]

    for rank in run_on(here, **degrees):
        for (logits, tokens), (logits_alone, tokens_alone) in zip(rank, expected, strict=True):
            assert zoo.relative_error(logits, logits_alone) <= 1e-5
            assert torch.equal(tokens, tokens_alone)


@pytest.mark.parametrize("degrees", SPLITS, ids=str)
def test_llm(family, degrees):
    _, folder, ((logits_alone, tokens_alone), _) = family
    prompts = plain()["input_ids"].tolist()
    with mc.LLM(folder, **degrees, progress=False) as llm:
        found = [answer.token_ids for answer in llm.generate([*prompts, prompts[0][:5]], max_new_tokens=8)]
        logits = llm.logits(prompts[0])
    alone = zoo.build(family[0]).generate(torch.tensor([prompts[0][:5]]), max_new_tokens=8, do_sample=False)
    assert found == [*tokens_alone.tolist(), alone[0, 5:].tolist()]
    assert zoo.relative_error(logits, logits_alone[0]) <= 1e-5
