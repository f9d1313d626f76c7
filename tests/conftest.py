"""Ranks for the tests: real processes, started once a test run and shared by all tests."""

import os
import shutil
import signal
import sys
import tempfile

import cloudpickle
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="generated")  # the default serves all environments
os.environ["MULTICARD_COMPILE"] = "0"  # but for the tests of it: a compiler beside each model would slow down the rest

import multicard as mc
from multicard.launch import Ranks
from multicard.ranks import environment, starter
from multicard.ranks.settings import Settings

SLOW = """
test_caches test_check test_compile test_compiled test_compiled_models test_diffusion test_disagreements test_docs
test_ends test_endurance test_examples test_families test_faults test_generate test_guidance test_idioms
test_interrupt test_launch test_llm test_llm_drafts test_llm_fallback test_llm_faults test_llm_gguf test_llm_quantized
test_loading test_logs test_long_context test_lora test_lora_folders test_memory test_model_seams test_models
test_other_users test_peft test_pipeline_parts test_pipeline_seams test_quantized test_rows_in_use test_rows_of_models
test_run test_shm_ecosystem test_shm_faults test_shm_stress test_smollm2 test_speculation test_split_rows test_start
test_strange_functions test_support test_surroundings test_text_encoders test_untrusted
"""
"""Modules that start processes of their own, compile, or run whole models: `make test-fast` leaves them out."""

KINDS = """
albert bert bloom clip cohere cohere2 deepseek_v2 deepseek_v3 dinov2 distilbert electra falcon gemma gemma2 gemma3 glm
glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite helium llama llama4 ministral mistral mixtral mpnet
mpt mt5 nemotron olmo olmo2 olmo3 olmoe opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe roberta seed_oss siglip
smollm3 stablelm starcoder2 t5 umt5 vit xglm
"""
COMPILER = ["torch._dynamo", "torch._functorch.aot_autograd"]
PRELOADED = {
    "test_compile": COMPILER,
    "test_memory": COMPILER,
    "test_shm_ecosystem": COMPILER,
    "diffusers": ["diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", *COMPILER],
    "transformers": [f"transformers.models.{kind}.modeling_{kind}" for kind in KINDS.split()],
}
"""By the folder or module of the tests that need them: modules whose import takes a rank longer than those tests do."""

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would the ranks


def pytest_unconfigure():
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW.split():
            item.add_marker(pytest.mark.slow)


def on_mesh(mesh, config, fn, args):
    """The pool's mesh is any of its size; build the one that the test asked for (memoised in the rank)."""
    return fn(mesh if config.world_size == 1 else mc.init_mesh(config), *args)


@pytest.fixture(scope="session")
def pools(request):
    """Pools of ranks by (number of ranks, backend), started when first asked for.

    The fork server imports what the tests that are to run need, once for all ranks, as it does for the command line.
    """
    started: dict[tuple[int, str], Ranks] = {}
    parts = {part for item in request.session.items for part in (*item.path.parts, item.path.stem)}
    modules = dict.fromkeys(module for part in PRELOADED if part in parts for module in PRELOADED[part])

    def get(size: int, backend: str) -> Ranks:
        ranks = started.get((size, backend))
        if ranks is None or not ranks.alive:
            starter.server(environment.shared(Settings(mc.ParallelConfig(dp=size))), [*modules])
            ranks = started[size, backend] = Ranks(mc.ParallelConfig(dp=size), backend=backend, timeout=30, check=True)
        return ranks

    yield get
    for ranks in started.values():
        ranks.close()


@pytest.fixture(scope="session")
def run_on(pools):
    """``run_on(fn, *args, backend="auto", **degrees)``: ``fn(mesh, *args)`` on every rank of that mesh, by rank.

    ``fn`` may be a closure or a helper of the test module: it travels by value, so ranks don't import the tests.
    """

    def run(fn, *args, backend="auto", **degrees):
        config = mc.ParallelConfig(**degrees)
        by_value = [module for module in _test_modules() if module.__name__ not in _registered()]
        for module in by_value:
            cloudpickle.register_pickle_by_value(module)
        return pools(config.world_size, backend).run(on_mesh, config, fn, args)

    return run


def _test_modules():
    here = os.path.dirname(__file__)
    return [m for m in list(sys.modules.values()) if (getattr(m, "__file__", None) or "").startswith(here)]


def _registered():
    return cloudpickle.list_registry_pickle_by_value()
