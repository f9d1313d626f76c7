"""Long prompts and sharded caches: chunks on top of a cache, turns, windows, rope that depends on length, memory."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import multicard as mc
import zoo
from multicard.axis import Axis
from multicard.integrations.transformers.cache import PAGE, Chunk, ShardedCache


@settings(deadline=None, max_examples=60)
@given(ranks=st.integers(1, 5), lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_every_position_is_held_once_and_in_rising_order(ranks, lengths):
    cache = ShardedCache(Axis("sequence", 0, 1))
    cache.axis = axis = dataclasses.replace(cache.axis, size=ranks)
    for length in lengths:
        cache.chunk = Chunk.of(cache.length, length, axis)
        cache.end()
    held = [[position for span in spans for position in span] for spans in cache.spans()]
    assert cache.length == sum(lengths)
    assert sorted(itertools.chain.from_iterable(held)) == list(range(sum(lengths)))
    assert all(positions == sorted(positions) for positions in held)


def turns(model, ids, lengths):
    """Logits of a conversation: chunks of several lengths on one cache."""
    cache, found, start = None, [], 0
    for length in lengths:
        with torch.no_grad():
            out = model(ids[:, start : start + length], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + length
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    "degrees",
    [
        pytest.param({"ring": 2}, marks=pytest.mark.seam),
        {"ulysses": 2},
        {"ring": 2, "ulysses": 2},
        {"ring": 2, "tp": 2},
    ],
    ids=str,
)
def test_turns_on_one_cache(run_on, degrees):
    lengths = (11, 1, 1, 40, 3, PAGE + 2, 1, 9)
    ids = torch.randint(3, 131, (2, sum(lengths)), generator=torch.Generator().manual_seed(3))
    names = ("llama", "gemma3", "mistral", "gpt2")
    expected = {name: turns(zoo.build(name), ids, [sum(lengths)]) for name in names}

    def on_ranks(mesh):
        return {name: turns(mc.parallelize(zoo.build(name), mesh), ids, lengths) for name in names}

    for rank in run_on(on_ranks, **degrees):
        for name, logits in rank.items():
            assert zoo.relative_error(logits, expected[name]) <= 1e-5, name


@pytest.mark.seam
@pytest.mark.parametrize("kind", ["longrope", "dynamic", "yarn"])
def test_rope_that_reads_the_largest_position(run_on, kind):
    def build():
        import transformers as hf

        rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
        if kind == "longrope":
            rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0]}
            return zoo.scramble(hf.Phi3ForCausalLM(hf.Phi3Config(**zoo.LLAMA, rope_parameters=rope)))
        return zoo.scramble(hf.LlamaForCausalLM(hf.LlamaConfig(**zoo.LLAMA, rope_parameters=rope)))

    ids = torch.randint(3, 131, (1, 40), generator=torch.Generator().manual_seed(3))
    expected = turns(build(), ids, [40])
    for logits in run_on(lambda mesh: turns(mc.parallelize(build(), mesh), ids, [40]), ring=2):
        assert zoo.relative_error(logits, expected) <= 1e-5


def test_a_cache_takes_its_share_of_the_memory(run_on):
    def check(mesh):
        model = mc.parallelize(zoo.build("llama"), mesh)
        ids = torch.randint(3, 131, (1, 8000), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            sizes = [cache.nbytes]
            for token in range(3, 11):
                model(torch.tensor([[token]]), past_key_values=cache)
        return [*sizes, cache.nbytes, cache.get_seq_length()]

    whole = 2 * 2 * 3 * 8000 * 8 * 4  # keys and values, layers, heads, positions, head_dim, bytes
    for first, later, length in run_on(check, ring=2, ulysses=2):
        assert first == pytest.approx(whole / 4, rel=0.01)
        assert later == pytest.approx(whole / 4, rel=0.05)
        assert length == 8008


@pytest.mark.seam
def test_heads_other_than_the_language_model(run_on):
    def build(kind):
        import transformers as hf

        sizes = {**zoo.LLAMA, "num_labels": 3}
        return zoo.scramble(getattr(hf, kind)(hf.LlamaConfig(**sizes)))

    @torch.no_grad()
    def outputs(model):
        ids = torch.randint(3, 131, (2, 11), generator=torch.Generator().manual_seed(3))
        out = model(ids)
        return out.last_hidden_state if "last_hidden_state" in out else out.logits

    kinds = ("LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification")
    expected = [outputs(build(kind)) for kind in kinds]
    for rank in run_on(lambda mesh: [outputs(mc.parallelize(build(kind), mesh)) for kind in kinds], ring=2):
        for kind, found, reference in zip(kinds, rank, expected, strict=True):
            assert zoo.relative_error(found, reference) <= 1e-5, kind


@pytest.mark.seam
def test_a_model_that_looks_ahead_is_refused(run_on):
    def check(mesh):
        import transformers as hf

        config = hf.Gemma3TextConfig(**zoo.LLAMA, query_pre_attn_scalar=8, use_bidirectional_attention=True)
        with pytest.raises(mc.errors.UnsupportedError, match="it isn't a causal decoder") as refusal:
            mc.parallelize(hf.Gemma3TextModel(config), mesh)
        return str(refusal.value)

    assert all("Gemma3TextModel with ring=2" in message for message in run_on(check, ring=2))


def test_what_would_be_computed_wrongly_is_refused(run_on):
    def check(mesh):
        import transformers as hf

        model = mc.parallelize(zoo.build("llama"), mesh)
        ids = torch.ones(1, 8, dtype=torch.long)
        past = hf.DynamicCache()
        past.update(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8), 0)
        asked = (
            {"attention_mask": torch.ones(1, 1, 8, 8)},
            {"output_hidden_states": True},
            {"past_key_values": past},
            {"past_key_values": hf.StaticCache(model.config, 16)},
            {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), "use_cache": False},
        )
        found = []
        for kwargs in asked:
            with pytest.raises(mc.errors.UnsupportedError) as refusal:
                model(ids, **kwargs)
            found.append(str(refusal.value))
        return found

    for messages in run_on(check, ring=2):
        for message, wanted in zip(
            messages,
            ("attention_mask of shape", "output_hidden_states", "DynamicCache of 2", "StaticCache", "packed"),
            strict=True,
        ):
            assert wanted in message
