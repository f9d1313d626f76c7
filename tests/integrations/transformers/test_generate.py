"""generate() over ranks: every way of choosing tokens is as on one process, or refused by name before a forward."""

import pytest
import torch
import transformers as hf

import multicard as mc
import zoo

WAYS = {
    "static": {"do_sample": False, "cache_implementation": "static"},
    "static in chunks": {"do_sample": False, "cache_implementation": "static", "prefill_chunk_size": 5},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
}


def answers(model, name, ranks_seed=0):
    given, found = zoo.inputs(name), {}
    for way, kwargs in WAYS.items():
        torch.manual_seed(7 + ranks_seed)
        found[way] = model.generate(**given, max_new_tokens=6, **kwargs)
    one = {key: value[1:] for key, value in given.items()}
    found["lookup"] = model.generate(**one, max_new_tokens=6, prompt_lookup_num_tokens=3, do_sample=False)
    draft = zoo.build(name)  # whole on every rank: the model's own weights, so that guesses are taken
    found["draft"] = model.generate(**one, max_new_tokens=6, assistant_model=draft, do_sample=False)
    return found


@pytest.mark.parametrize("degrees", [pytest.param({"tp": 2}, marks=pytest.mark.seam), {"tp": 3}], ids=str)
def test_every_way_of_choosing_is_that_of_one_process(run_on, degrees):
    names = ("llama", "gemma3", "gpt2")
    expected = {name: answers(zoo.build(name), name) for name in names}

    def on_ranks(mesh):
        # every rank starts from another state of its generator
        return {
            name: answers(mc.parallelize(zoo.build(name), mesh), name, 0 if mesh.rank == 0 else 91) for name in names
        }

    for rank in run_on(on_ranks, **degrees):
        for name, ways in rank.items():
            for way, tokens in ways.items():
                assert torch.equal(tokens, expected[name][way]), (name, way)


@pytest.mark.seam
def test_sampling_with_a_split_sequence(run_on):
    given = zoo.inputs("llama")
    alone = zoo.build("llama")
    torch.manual_seed(7)
    expected = alone.generate(**given, max_new_tokens=40, do_sample=True, top_k=20)

    def on_ranks(mesh):
        model = mc.parallelize(zoo.build("llama"), mesh)
        torch.manual_seed(7 + mesh.rank)
        return model.generate(**given, max_new_tokens=40, do_sample=True, top_k=20)

    for tokens in run_on(on_ranks, ring=3):
        assert torch.equal(tokens, expected)


@pytest.mark.seam
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders(run_on, kind):
    def build():
        import transformers as hf

        torch.manual_seed(0)
        if kind == "t5":
            config = hf.T5Config(
                vocab_size=131, d_model=60, d_kv=12, num_heads=5, d_ff=85, num_layers=2, decoder_start_token_id=0,
                eos_token_id=None,
            )  # fmt: skip
            return zoo.scramble(hf.T5ForConditionalGeneration(config))
        config = hf.BartConfig(
            vocab_size=131, d_model=60, encoder_layers=2, decoder_layers=2, encoder_attention_heads=5,
            decoder_attention_heads=5, encoder_ffn_dim=85, decoder_ffn_dim=85, max_position_embeddings=64,
            eos_token_id=None, forced_eos_token_id=None,
        )  # fmt: skip
        return zoo.scramble(hf.BartForConditionalGeneration(config))

    given = zoo.inputs("bert")

    def generate(model):
        return [model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=beams) for beams in (1, 2)]

    expected = generate(build())
    for rank in run_on(lambda mesh: generate(mc.parallelize(build(), mesh)), tp=2):
        assert all(map(torch.equal, rank, expected))


def test_what_ranks_cant_agree_on_or_a_split_sequence_cant_do_is_refused(run_on):
    refused = {
        "max_time": ({"max_time": 1.0}, {"tp": 2}),
        "clocks differ": ({"stopping_criteria": [hf.MaxTimeCriteria(1.0)]}, {"tp": 2}),
        "paged": ({"cache_implementation": "paged"}, {"tp": 2}),
        "cache_implementation='static'": ({"cache_implementation": "static"}, {"ring": 2}),
        "use_cache=False": ({"use_cache": False}, {"ring": 2}),
        "num_beams=2": ({"num_beams": 2}, {"ring": 2}),
        "assisted": ({"prompt_lookup_num_tokens": 2}, {"ring": 2}),
        "assisted generation": ({"assistant_early_exit": 1}, {"ring": 2}),
    }

    def check(mesh, asked):
        model = mc.parallelize(zoo.build("llama"), mesh)
        model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
        found = []
        for kwargs in asked:
            with pytest.raises(mc.errors.UnsupportedError) as refusal:
                model.generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=2, **kwargs)
            found.append(str(refusal.value))
        return found

    for degrees in ({"tp": 2}, {"ring": 2}):
        wanted = [name for name, (_, where) in refused.items() if where == degrees]
        asked = [refused[name][0] for name in wanted]
        for messages in run_on(check, asked, **degrees):
            for name, message in zip(wanted, messages, strict=True):
                assert name in message
