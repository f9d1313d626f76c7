"""Every seam into transformers, broken on purpose: an error that says so, never other tokens."""

import functools
import inspect

import pytest
import torch

import multicard as mc
import zoo
from multicard.errors import MismatchError, UnsupportedError
from multicard.integrations.transformers.cache import CACHE_NAMES

pytestmark = pytest.mark.seam


def take_off(model, kind, which):
    """Hooks of one kind off the modules whose class's name ends so."""
    for module in model.modules():
        if type(module).__name__.endswith(which):
            getattr(module, kind).clear()


def wrap(module, change):
    """``module.forward`` with ``change(kwargs)`` before it; its signature stays."""
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        change(kwargs)
        return forward(*args, **kwargs)

    module.forward = wrapped


def lose_the_cache(model):
    """As when a release renames the argument and ignores the old name."""
    wrap(model.get_decoder(), lambda kwargs: [kwargs.pop(name, None) for name in CACHE_NAMES])


def replace_the_cache(model):
    import transformers as hf

    def other(kwargs):
        for name in CACHE_NAMES:
            if name in kwargs:
                kwargs[name] = hf.DynamicCache()

    for layer in model.get_decoder().layers:
        wrap(layer.self_attn, other)


def ignore_the_attention_function(model):
    for layer in model.get_decoder().layers:
        layer.self_attn.config = type(model.config).from_dict({**model.config.to_dict()})
        layer.self_attn.config._attn_implementation = "sdpa"


def ignore_it_in_one_layer(model):
    layer = model.get_decoder().layers[1]
    layer.self_attn.config = type(model.config).from_dict({**model.config.to_dict()})
    layer.self_attn.config._attn_implementation = "sdpa"


def fuse_the_mlp(model):
    for layer in model.get_decoder().layers:
        mlp = layer.mlp
        mlp.forward = functools.partial(fused_mlp, mlp)


def fused_mlp(mlp, x):
    return times_weight(mlp.down_proj, mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def fuse_the_head(model):
    model.lm_head.forward = functools.partial(times_weight, model.lm_head)


def times_weight(layer, x):
    return layer.multiply(x, layer.weight, layer.bias)


def look_up_directly(model):
    table = model.get_input_embeddings()
    model.get_decoder().embed_tokens = torch.nn.Embedding(table.num_embeddings, table.embedding_dim)


RING, TP = {"ring": 2}, {"tp": 2}
SABOTAGE = {
    "the decoder's pre-hook off": (RING, "llama", lambda m: take_off(m, "_forward_pre_hooks", "Model"), "been removed"),
    "the decoder's hook off": (RING, "llama", lambda m: take_off(m, "_forward_hooks", "Model"), "been removed"),
    "rotary hooks off": (RING, "llama", lambda m: take_off(m, "_forward_hooks", "RotaryEmbedding"), "been removed"),
    "the cache's argument renamed": (RING, "llama", lose_the_cache, "0 of 2 attention modules wrote the 12 new"),
    "the cache replaced": (RING, "llama", replace_the_cache, "0 of 2 attention modules wrote the 12 new"),
    "the attention function ignored": (RING, "llama", ignore_the_attention_function, "0 of 2 attention modules called"),
    "ignored in one layer": (RING, "qwen3", ignore_it_in_one_layer, "1 of 2 attention modules called"),
    "experts' sums off": (TP, "mixtral", lambda m: take_off(m, "_forward_hooks", "Experts"), "been removed"),
    "scaled embeddings off": (TP, "gemma", lambda m: take_off(m, "_forward_hooks", "Embedding"), "been removed"),
    "a fused feed-forward": (TP, "llama", fuse_the_mlp, "LlamaMLP.* ran without its row-parallel layer"),
    "a fused head": (TP, "llama", fuse_the_head, "66 logits came out for a vocabulary of 131|65 logits"),
    "an embedding looked up directly": (TP, "llama", look_up_directly, "without the vocabulary-parallel embedding"),
}


def sabotaged(mesh, name, spoil):
    model = mc.parallelize(zoo.build(name), mesh)
    spoil(model)
    found = []
    given = zoo.inputs(name)
    plain = {"input_ids": given["input_ids"]}
    for call in (lambda: model(**plain, use_cache=True), lambda: model.generate(**given, max_new_tokens=3)):
        try:
            with torch.no_grad():
                call()
        except UnsupportedError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


@pytest.mark.parametrize("case", SABOTAGE)
def test_a_model_whose_seam_was_bypassed(run_on, case):
    degrees, name, spoil, words = SABOTAGE[case]
    for told in run_on(sabotaged, name, spoil, **degrees):
        for message in told:
            with pytest.raises(UnsupportedError, match=words):
                raise UnsupportedError(message)
            assert "Installed is transformers" in message


def test_a_decoder_whose_cache_goes_by_an_unknown_name_is_refused_before_a_forward(run_on):
    def refusal(mesh):
        model = zoo.build("llama")
        decoder = model.get_decoder()
        parameters = [p for p in inspect.signature(decoder.forward).parameters.values() if p.name not in CACHE_NAMES]
        wrap(decoder, lambda kwargs: None)
        decoder.forward.__signature__ = inspect.Signature(parameters)
        with pytest.raises(UnsupportedError, match="takes none of cache, past_key_values"):
            mc.parallelize(model, mesh)
        return True

    assert all(run_on(refusal, ring=2))


def cut(given, where):
    given.update({key: x[where] for key, x in given.items() if isinstance(x, torch.Tensor)})


GIVEN = {
    "another token": lambda given: given["input_ids"].add_(1),
    "a token less": lambda given: cut(given, (slice(None), slice(1, None))),
    "another mask": lambda given: given["attention_mask"].fill_(1),
    "one prompt less": lambda given: cut(given, slice(1)),
    "more tokens": lambda given: given.update(max_new_tokens=5),
    "a temperature": lambda given: given.update(do_sample=True, temperature=0.7),
    "a criterion of its own": lambda given: given.update(stopping_criteria=[stop_at_once]),
    "ids that a processor of its own prefers": lambda given: given.update(logits_processor=[prefer_seven]),
}


MODELS = {
    "another dtype": lambda model: model.to(torch.bfloat16),
    "other weights": lambda model: model.lm_head.weight.data.mul_(1.001),
    "another setting": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
}


def stop_at_once(ids, scores, **kwargs):
    return torch.full((ids.shape[0],), True)


def prefer_seven(ids, scores):
    return scores + 1e9 * (torch.arange(scores.shape[-1]) == 7)


def disagreeing(mesh, case, odd):
    model = zoo.build("llama")
    given = {**zoo.inputs("llama"), "max_new_tokens": 4, "do_sample": False}
    if mesh.rank == odd:
        (MODELS.get(case) or GIVEN[case])(model if case in MODELS else given)
    try:
        return mc.parallelize(model, mesh).generate(**given)
    except MismatchError as error:
        return str(error)


DEGREES = [{"tp": 2}, {"ring": 2}, {"ulysses": 3}, {"ring": 2, "tp": 2}]


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_ranks_that_generate_from_different_inputs_are_told(run_on, degrees):
    for odd, case in enumerate([*GIVEN, *MODELS]):
        for rank in run_on(disagreeing, case, odd % mc.ParallelConfig(**degrees).world_size, **degrees):
            assert isinstance(rank, str), case


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_a_forward_from_different_inputs_is_told(run_on, degrees):
    def error(mesh):
        model = mc.parallelize(zoo.build("llama"), mesh)
        ids = zoo.inputs("llama")["input_ids"]
        for module in (model, model.get_decoder()):
            with pytest.raises(MismatchError, match="input_ids is int64"), torch.no_grad():
                module(ids + (mesh.rank == mesh.world.size - 1))
        return True

    assert all(run_on(error, **degrees))
