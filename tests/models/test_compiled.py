"""The compiled decode step: the numbers of the model itself at every degree, compiled beside answers or before them."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

import multicard as mc
import tiny_decoders as tiny
from interpreted import Interpreted
from multicard.errors import ConfigError, MulticardError, UnsupportedError
from multicard.models import artifacts, stages
from multicard.models.compiled import LOOK
from multicard.models.generate import Request, generate
from multicard.models.generate import _prefill as prefill
from multicard.models.load import load_decoder

NEW = 6
DEGREES = [{}, {"tp": 2}, {"tp": 3}, {"dp": 2}, {"ring": 2}, {"ulysses": 2}, {"tp": 2, "ring": 2}]


SHAPES = [(1, 1), (1, 3), (1, 8), (2, 1), (3, 2)]
"""Prompts and tokens of a step."""


def both_ways(mesh, folders):
    """For every checkpoint: tokens by the model and by the step, the largest difference of logits, steps made."""
    found = {}
    for name, folder in folders.items():
        *_, (model, _) = load_decoder(mesh, folder, reorder=False)
        prompt = tiny.prompts(name)[0]
        interpreted = Interpreted(model, folder)
        tokens = [[step[0] for step in generate(model, Request([prompt], NEW), way)] for way in (None, interpreted)]
        calls = interpreted.calls
        found[name] = (tokens, calls, max(difference(model, interpreted, *shape) for shape in SHAPES))
    return found


def difference(model, interpreted, batch, tokens):
    """Of the model's logits and the step's, after prompts of unequal lengths; relative to the largest."""
    prompts = [[3, 1, 4, 1, 5][: 2 + row] for row in range(batch)]
    ids = torch.arange(7, 7 + batch * tokens).view(batch, tokens)
    logits = []
    with torch.inference_mode():
        for way in (model, interpreted.of(ids.numel()).step()):
            cache, _ = prefill(model, prompts, tokens + 1)
            logits.append(model(ids, cache, last_only=False) if way is model else way(ids, cache))
    assert logits[0].shape == logits[1].shape
    return (logits[0] - logits[1]).abs().max() / logits[0].abs().max()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    return {name: str(tiny.write(folder, name)[0]) for name in tiny.CHECKPOINTS}


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_the_step_is_the_models(run_on, folders, degrees):
    for found in run_on(both_ways, folders, **degrees):
        for name, ((eager, stepped), calls, largest) in found.items():
            assert eager == stepped, name
            assert calls == NEW - 1, f"{name}: the step was made for all tokens but the first"
            assert largest < 1e-5, name


# ---- really compiled


@pytest.fixture
def cache(tmp_path):
    """Environment variables with which ranks compile into a folder of their own."""
    return {"MULTICARD_COMPILE": "1", "MULTICARD_CACHE": str(tmp_path / "cache")}


def compilers(of):
    """The compiling processes that process ``of`` and its children have started."""
    return [
        each for each in psutil.Process(of).children(recursive=True) if "multicard.models.compiler" in _command(each)
    ]


def _command(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def tokens(llm, prompts, new=40):
    return [answer.token_ids for answer in llm.generate(prompts, max_new_tokens=new, ignore_eos=True)]


def test_answers_are_the_same_before_and_after_it_is_compiled(folders, cache):
    folder = folders["llama-biases"]
    options = {"dp": 2, "env": cache, "threads_per_rank": 1}
    prompts = [tiny.prompts("llama-biases")[0], [5, 6, 7]]  # one for each replica, of which one compiles
    with mc.LLM(folder, compile=False, **options) as llm:
        expected = tokens(llm, prompts)
    with mc.LLM(folder, **options) as llm:
        assert not compilers(os.getpid()), "before the first token"
        assert tokens(llm, prompts, 1) == [new[:1] for new in expected]
        assert not compilers(os.getpid()), "only further tokens need the step"
        assert tokens(llm, prompts) == expected
        assert [process.nice() for process in compilers(os.getpid())] == [19]
        until = time.monotonic() + 600
        while len(list(pathlib.Path(cache["MULTICARD_CACHE"]).glob("*/*.so"))) < 3:
            assert time.monotonic() < until
            assert tokens(llm, prompts) == expected
            time.sleep(1)
        time.sleep(2 * LOOK)
        assert tokens(llm, prompts) == expected
    with mc.LLM(folder, compile=True, **options) as llm:  # from the disk
        assert tokens(llm, prompts) == expected
    left = {path.name.partition("-")[0] for path in pathlib.Path(cache["MULTICARD_CACHE"]).glob("*/*")}
    assert left == {"lock", "project", "attend"}, "nothing else is left"


RANK = """
import multicard as mc
llm = mc.LLM({folder!r}, env={env!r})
llm.generate([1, 2, 3], max_new_tokens=3, ignore_eos=True)
print("answered", flush=True)
input()
"""


def test_the_compiler_ends_with_its_rank(folders, cache):
    script = RANK.format(folder=folders["mistral-5-over-1"], env=cache)
    owner = subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True)
    try:
        assert owner.stdout.readline() == "answered\n"
        before = compilers(owner.pid)
        assert before
        rank = before[0].parent()
        os.kill(rank.pid, signal.SIGKILL)
        psutil.wait_procs(before, timeout=20)
        assert not [process for process in before if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    finally:
        owner.kill()
        owner.communicate()


def test_without_a_compiler_it_stays_uncompiled_and_says_so(folders, cache, capfd):
    folder, env = folders["qwen2-6-over-2"], cache | {"CXX": "/nowhere/g++"}
    with mc.LLM(folder, env=env) as llm:
        tokens = llm.generate([1, 2, 3], max_new_tokens=5, ignore_eos=True).token_ids
    assert "there is no C++ compiler (/nowhere/g++): install g++" in capfd.readouterr().err
    with mc.LLM(folder, env=env, compile=False) as llm:
        assert llm.generate([1, 2, 3], max_new_tokens=5, ignore_eos=True).token_ids == tokens
    with pytest.raises(ConfigError, match=r"compile=True: there is no C\+\+ compiler"):
        mc.LLM(folder, env=env, compile=True)


def test_a_compiler_that_fails(folders, cache):
    folder, env = folders["qwen2-6-over-2"], cache | {"CXX": "/bin/false"}
    with pytest.raises(
        MulticardError, match=r"decoding can't be compiled, which compile=False leaves out: [\w.]+: InvalidCxxCompiler"
    ):
        mc.LLM(folder, env=env, compile=True)
    with mc.LLM(folder, env=env) as llm:
        for _ in range(2):
            assert len(llm.generate([1, 2, 3], max_new_tokens=5, ignore_eos=True).token_ids) == 5


@pytest.mark.parametrize("wrong", ["yes", 2, 1, 0, None])
def test_wrong_values(folders, wrong):
    with pytest.raises(ConfigError, match="compile="):
        mc.LLM(folders["qwen2-6-over-2"], compile=wrong)


def test_only_our_own_decoder_is_compiled(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50, n_positions=16)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="compile=True: transformers runs this model"):
        mc.LLM(tmp_path, compile=True)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_is_refused(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("MULTICARD_CACHE", str(tmp_path / "cache"))
    artifacts.cache_folder().chmod(mode)
    with pytest.raises(ConfigError, match="that only you can write"):
        artifacts.cache_folder()


def test_a_link_in_place_of_the_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTICARD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="belongs to you"):
        artifacts.cache_folder()


def test_a_change_of_what_stages_are_made_of_gives_them_another_folder():
    made_of = re.findall(r"^from multicard\.([\w.]+) import", pathlib.Path(stages.__file__).read_text(), re.MULTILINE)
    files = [module.replace(".", "/") + ".py" for module in made_of]
    assert files
    assert [file for file in files if not file.startswith(artifacts.SOURCES)] == []


@pytest.mark.soak
@pytest.mark.parametrize("degrees", DEGREES[:5], ids=str)
@pytest.mark.parametrize("name", ["smollm2", *tiny.CHECKPOINTS])
def test_compiled_tokens_are_the_eager_ones(folders, cache, name, degrees):
    folder = folders.get(name, pathlib.Path(__file__).parents[2] / ".cache" / "smollm2")
    prompts = [prompt for prompt in tiny.prompts("llama-biases") if len(prompt) > 1]
    answers = []
    for compile in (False, True):
        with mc.LLM(folder, compile=compile, env=cache, **degrees) as llm:
            answers.append([llm.generate(p, max_new_tokens=24, ignore_eos=True).token_ids for p in prompts])
    assert answers[0] == answers[1]
