"""peft's adapters on split models, against one process: put on before the split and after it, and whatever is done to
them then."""

import functools
import re

import peft
import pytest
import torch
import transformers

import loras
import multicard as mc
import zoo
from multicard.errors import MismatchError, UnsupportedError
from multicard.integrations.adapters import is_adapter

pytestmark = pytest.mark.seam
transformers.utils.logging.disable_progress_bar()

TARGETS = {
    "llama": (*loras.LLAMA, "lm_head", "embed_tokens"),  # fewer key/value heads than query heads
    "gpt2": ("c_attn", "c_proj", "c_fc"),  # fused, with transposed weights
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "bert": ("query", "key", "value", "dense"),
    "falcon-40b": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
}
SPLITS = ({"tp": 2}, {"tp": 3}, {"tp": 4}, {"ring": 2}, {"ulysses": 2}, {"tp": 2, "ring": 2})


@functools.cache
def expected(name):
    """One process's output in float64. It isn't that without adapters."""
    model = zoo.build(name).double()
    plain = zoo.forward(model, name)
    output = zoo.forward(loras.adapted(model, TARGETS[name]), name)
    assert zoo.relative_error(plain, output) > 0.05
    return output


@pytest.mark.parametrize("degrees", SPLITS, ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_before_the_split(run_on, name, degrees):
    if name in zoo.NO_SEQUENCE and degrees.keys() - {"tp"}:
        pytest.skip("its sequence isn't split")

    def here(mesh):
        model = mc.parallelize(loras.adapted(zoo.build(name), TARGETS[name]), mesh)
        return type(model), zoo.forward(model, name)

    for kind, output in run_on(here, **degrees):
        assert issubclass(kind, peft.PeftModel)
        assert zoo.relative_error(output, expected(name)) <= 1e-5


@pytest.mark.parametrize("degrees", SPLITS, ids=str)
@pytest.mark.parametrize("way", ["load_adapter", "PeftModel", "inject_adapter_in_model"])
def test_after_the_split(run_on, tmp_path, degrees, way):
    folder = loras.save(tmp_path, zoo.build("llama"))

    def here(mesh):
        model = mc.parallelize(zoo.build("llama"), mesh)
        if way == "load_adapter":
            model.load_adapter(folder)
        elif way == "PeftModel":
            model = peft.PeftModel.from_pretrained(model, folder)
        else:
            peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(folder), model)
            loras.fill(model.eval())
        return zoo.forward(model, "llama"), zoo.tokens(model, "llama")

    alone = loras.adapted(zoo.build("llama"))
    logits, tokens = zoo.forward(alone.double(), "llama"), zoo.tokens(alone.float(), "llama")
    for output, chosen in run_on(here, **degrees):
        assert zoo.relative_error(output, logits) <= 1e-5
        assert torch.equal(chosen, tokens)


def everything(model):
    """Outputs after each of the things that are done to adapters."""
    yield "one", model
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_bias=True, **OTHER))
    loras.fill(model.eval())
    model.set_adapter("other")
    yield "other", model
    model.base_model.set_adapter(["default", "other"])
    yield "both", model
    model.merge_adapter(safe_merge=True)
    yield "merged", model
    model.unmerge_adapter()
    yield "unmerged", model
    with model.disable_adapter():
        yield "disabled", model
    model.delete_adapter("default")
    model.set_adapter("other")
    yield "deleted", model
    yield "merged and unloaded", model.merge_and_unload()


OTHER = {**loras.SETTINGS, "r": 2, "use_rslora": True}


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 3}], ids=str)
def test_whatever_is_done_to_them(run_on, degrees, name):
    targets = loras.LLAMA if name == "llama-tied" else TARGETS[name]

    def outputs(model):
        done = everything(model) if name == "llama-tied" else merging(model)
        return {step: zoo.forward(now, name) for step, now in done}

    def here(mesh):
        model = zoo.build(name)
        return outputs(loras.adapted(mc.parallelize(model, mesh), targets)), outputs(
            mc.parallelize(loras.adapted(zoo.build(name), targets), mesh)
        )

    alone = outputs(loras.adapted(zoo.build(name).double(), targets))
    assert zoo.relative_error(alone["one"], zoo.forward(zoo.build(name), name)) > 0.05
    for rank in run_on(here, **degrees):
        for way in rank:
            assert {step: zoo.relative_error(y, alone[step]) for step, y in way.items()} == pytest.approx(
                dict.fromkeys(alone, 0), abs=1e-5
            )


def merging(model):
    yield "one", model
    model.merge_adapter()
    yield "merged", model
    yield "unloaded", model.unload()


def test_half_types(run_on):
    """An adapter of float32 beside weights of bfloat16, as peft makes it."""

    def here(mesh):
        return zoo.forward(loras.adapted(mc.parallelize(zoo.build("llama").bfloat16(), mesh)), "llama")

    reference = zoo.forward(loras.adapted(zoo.build("llama").bfloat16().double()), "llama")
    alone = zoo.relative_error(zoo.forward(loras.adapted(zoo.build("llama").bfloat16()), "llama"), reference)
    for output in run_on(here, tp=3):
        assert zoo.relative_error(output, reference) <= max(1e-2, 1.5 * alone)


def test_experts_of_an_older_adapter(run_on):
    """Its modules are parameters of the experts in today's transformers."""
    config = peft.LoraConfig(target_modules=["q_proj", "w2"], r=2)

    def here(mesh):
        found = []
        for before in (True, False):
            model = zoo.build("mixtral")
            try:
                if before:
                    mc.parallelize(peft.get_peft_model(model, config), mesh)
                else:
                    peft.get_peft_model(mc.parallelize(model, mesh), config)
            except UnsupportedError as error:
                found.append((str(error), any(map(is_adapter, model.modules()))))
        return found

    for (before, _), (after, changed) in run_on(here, tp=2):
        assert "experts has an adapter of peft's lora.layer.ParamWrapper" in before
        assert "target_parameters=" in after
        assert not changed


REFUSED = {
    "DoRA": ({"use_dora": True}, "variant Dora"),
    "dora, afterwards": ({"use_dora": True}, "use_dora=True"),
    "biases": ({"bias": "all"}, "bias='all'"),
    "saved modules": ({"modules_to_save": ["norm"]}, "modules_to_save="),
    "all linear layers": ({"target_modules": "all-linear"}, "all-linear"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "embed_tokens, a VocabParallelEmbedding"),
    "head": ({"target_modules": ["lm_head"]}, "lm_head, a ColumnParallelLinear"),
    "initial values from weights": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "parameters": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_anything_is_changed(run_on, case):
    settings, said = REFUSED[case]

    def here(mesh):
        model, config = zoo.build("llama"), peft.LoraConfig(**{"target_modules": ["q_proj"], **settings})
        if case == "DoRA":
            model = peft.get_peft_model(model, config)
        else:
            mc.parallelize(model, mesh)
        before = [(name, type(module)) for name, module in model.named_modules()]
        try:
            mc.parallelize(model, mesh) if case == "DoRA" else peft.inject_adapter_in_model(config, model)
        except UnsupportedError as error:
            return str(error), before == [(name, type(module)) for name, module in model.named_modules()]

    for message, unchanged in run_on(here, tp=2):
        assert said in message
        assert "adapter 'default'" in message
        assert unchanged


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "ia3.layer.Linear"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "loha.layer.Linear"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_kinds_of_adapters_are_refused(run_on, config, said):
    def here(mesh):
        found = []
        for way in (lambda model: mc.parallelize(peft.get_peft_model(model, config), mesh), after):
            try:
                way(zoo.build("llama"))
            except UnsupportedError as error:
                found.append(str(error))
        return found

    def after(model):
        import multicard as mc

        if not config.is_prompt_learning:
            return peft.get_peft_model(mc.parallelize(model, mc.init_mesh(mc.ParallelConfig(tp=2))), config)
        raise UnsupportedError(config.peft_type.value)

    for before, later in run_on(here, tp=2):
        assert said in before
        assert config.peft_type.value in later


def test_other_kinds_on_layers_that_stay_whole(run_on):
    """Nothing that is split has the adapter."""
    config = peft.LNTuningConfig(target_modules=["input_layernorm"])

    def here(mesh):
        model = peft.get_peft_model(zoo.build("llama"), config)
        zoo.scramble(model)
        expected = zoo.forward(model, "llama")
        return zoo.relative_error(zoo.forward(mc.parallelize(model, mesh), "llama"), expected)

    assert max(run_on(here, tp=3)) <= 1e-5


def test_other_kinds_with_a_split_sequence(run_on):
    """No weight is split."""
    config = peft.LoHaConfig(target_modules=["q_proj", "down_proj"], r=3, init_weights=False)

    def here(mesh):
        torch.manual_seed(0)
        model = peft.get_peft_model(zoo.build("llama"), config).eval()
        expected = zoo.forward(model, "llama")
        return zoo.relative_error(zoo.forward(mc.parallelize(model, mesh), "llama"), expected)

    assert max(run_on(here, ring=2)) <= 1e-5


def test_ranks_with_different_adapters(run_on):
    """Their weights are compared once, which are active and how strong at every call."""

    def attempt(model, change):
        change()
        try:
            zoo.forward(model, "llama")
        except MismatchError as error:
            return re.search("adapters('s|s')? ?\\w*", str(error)).group()

    def here(mesh):
        model = loras.adapted(mc.parallelize(zoo.build("llama"), mesh), seed=3 + mesh.rank)
        layers = [module for module in model.modules() if is_adapter(module)]
        weights = attempt(model, lambda: None)
        loras.fill(model)
        same = attempt(model, lambda: None)
        scale = attempt(model, lambda: layers[5].set_scale("default", 1.0 + mesh.rank))
        layers[5].set_scale("default", 1.0)
        disabled = attempt(model, lambda: mesh.rank or model.base_model.disable_adapter_layers())
        return weights, same, scale, disabled

    for weights, same, scale, disabled in run_on(here, tp=2):
        assert weights
        assert same is None
        assert scale
        assert disabled


def test_training_is_refused(run_on):
    def here(mesh):
        model = loras.adapted(mc.parallelize(zoo.build("llama"), mesh)).train()
        try:
            zoo.forward(model, "llama")
        except UnsupportedError as error:
            return str(error)

    assert all("eval()" in said for said in run_on(here, tp=2))
