"""Split models of transformers under torch.compile: generate with a static cache, in one graph; the rest by name."""

import pytest
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import multicard as mc
from multicard.errors import UnsupportedError

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 83,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}
IDS = torch.tensor([[5, 1, 96, 40, 7], [0, 3, 3, 9, 11]])
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def build():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def compiled_by_generate():
    """What makes transformers compile a step by itself; without the private flag it does so on accelerators only."""
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def generated(mesh):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    tokens = mc.parallelize(build(), mesh).generate(IDS, **GREEDY, **compiled_by_generate())
    return tokens, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 3}, {"tp": 4}], ids=str)  # 4: unequal key/value heads
def test_generate_compiles_its_step_into_one_graph(run_on, degrees):
    expected = build().generate(IDS, **GREEDY)
    for tokens, graphs, breaks in run_on(generated, **degrees):
        assert torch.equal(tokens, expected)
        assert (graphs, breaks) == (1, {})


BACKENDS = {
    "aot_eager": {"backend": "aot_eager"},
    "inductor": {"options": {"cpp.vec_isa_ok": False}},  # else it compiles programs to find out
}


def forward_compiled(mesh, ids, backend="aot_eager"):
    torch._dynamo.reset()
    model = mc.parallelize(build(), mesh)
    model.forward = torch.compile(model.forward, fullgraph=True, **BACKENDS[backend])
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize(("backend", "degrees"), [("aot_eager", {"tp": 4}), ("inductor", {"tp": 2})], ids=str)
def test_a_compiled_forward_is_exact(run_on, backend, degrees):
    with torch.inference_mode():
        expected = build().double()(IDS).logits
    for logits in run_on(forward_compiled, IDS, backend, **degrees):
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_ids_outside_the_vocabulary_are_still_an_error(run_on):
    def says(mesh):
        with pytest.raises(RuntimeError, match="a token id is not in the vocabulary: ids are 0 to 96"):
            forward_compiled(mesh, torch.tensor([[3, 97]]))
        return True

    assert all(run_on(says, tp=2))


def split_sequence(mesh, how):
    torch._dynamo.reset()
    model = mc.parallelize(build(), mesh)
    try:
        if how == "model.compile":
            model.compile(backend="aot_eager")
            model(IDS)
        else:
            model.generate(IDS, **GREEDY, **compiled_by_generate())
    except UnsupportedError as error:
        return str(error)


@pytest.mark.parametrize(
    ("how", "said"), [("model.compile", "torch.compile of LlamaModel"), ("generate", "cache_implementation='static'")]
)
@pytest.mark.parametrize("degrees", [{"ring": 2}, {"ulysses": 2}], ids=str)
def test_a_split_sequence_is_refused(run_on, degrees, how, said):
    for error in run_on(split_sequence, how, **degrees):
        assert said in error
