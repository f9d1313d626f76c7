"""LLM, ``multicard generate`` and ``multicard info``: on real ranks, on a real model where it is there."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import tokenizers
import torch

import multicard as mc
import tiny_decoders as tiny
from multicard.cli import main
from multicard.errors import CheckpointError, ConfigError
from multicard.models.config import DecoderConfig
from multicard.models.generate import Request, generate
from multicard.models.load import load_decoder
from multicard.models.sampling import Sampling
from multicard.models.tokenizer import Tokenizer
from multicard.weights.folder import folder_path
from snapshots import snapshot

SMOLLM2 = pathlib.Path(__file__).parents[1] / ".cache" / "smollm2"
NAME = "qwen2-6-over-2"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)
needs_smollm2 = pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="make .cache/smollm2/config.json")


def add_tokenizer(folder, template=None):
    """Words and bytes of an alphabet: ids 0 to 1002 all stand for something."""
    vocabulary = {f"w{i}": i for i in range(1000)} | {"user:": 1000, "answer": 1001, "é": 1002}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, model = tiny.write(tmp_path_factory.mktemp("llm"), NAME)
    return add_tokenizer(folder), model


@pytest.fixture(scope="module")
def llm(checkpoint):
    with mc.LLM(checkpoint[0], tp=2, timeout=30) as llm:
        yield llm


def test_a_snapshot_of_links_and_a_single_file(checkpoint, llm, tmp_path):
    expected = llm.generate([5, 7, 11], max_new_tokens=5, ignore_eos=True).token_ids
    linked = snapshot(checkpoint[0], tmp_path)
    for path in (linked, linked / "model.safetensors"):
        with mc.LLM(path, timeout=30) as again:
            assert again.path == linked
            assert again.generate([5, 7, 11], max_new_tokens=5, ignore_eos=True).token_ids == expected


def greedy(model, ids, new):
    with torch.no_grad():
        mask = torch.ones(1, len(ids), dtype=torch.long)
        return model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=new, do_sample=False)[
            0, len(ids) :
        ].tolist()


def test_a_prompt_and_a_list_of_unequal_ones(llm, checkpoint):
    prompts = tiny.prompts(NAME)
    expected = [greedy(checkpoint[1], ids, 6) for ids in prompts]
    one = llm.generate(prompts[0], max_new_tokens=6)
    assert one.token_ids == expected[0]
    assert one.text == llm.tokenizer.decode(expected[0])
    assert one.prompt_tokens == len(prompts[0])
    assert one.timings["prefill"] > 0
    many = llm.generate(prompts, max_new_tokens=6)
    assert [answer.token_ids for answer in many] == expected
    assert "".join(llm.stream("w5 w7 w9", max_new_tokens=6)) == llm.generate("w5 w7 w9", max_new_tokens=6).text


@pytest.mark.seam
def test_logits_are_those_of_transformers(llm, checkpoint):
    ids = tiny.prompts(NAME)[0]
    with torch.no_grad():
        expected = checkpoint[1](torch.tensor([ids])).logits[0]
    found = llm.logits(ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_token_that_ends_an_answer_is_part_of_it(checkpoint, llm):
    ids = tiny.prompts(NAME)[2]
    free = llm.generate(ids, max_new_tokens=8).token_ids
    stop = free[3]
    first = free.index(stop)
    config = json.loads((checkpoint[0] / "config.json").read_text())
    try:
        (checkpoint[0] / "config.json").write_text(json.dumps({**config, "eos_token_id": [stop, 99999]}))
        assert DecoderConfig.from_folder(checkpoint[0]).eos == (stop, 99999)
    finally:
        (checkpoint[0] / "config.json").write_text(json.dumps(config))
    llm.config, before = dataclasses.replace(llm.config, eos=(stop,)), llm.config
    try:
        both = llm.generate([ids, tiny.prompts(NAME)[0]], max_new_tokens=8)
        assert both[0].token_ids == free[: first + 1]
        assert both[1].token_ids == greedy(checkpoint[1], tiny.prompts(NAME)[0], 8)  # the other goes on
        assert llm.generate(ids, max_new_tokens=8, ignore_eos=True).token_ids == free
    finally:
        llm.config = before


def test_the_context_ends_an_answer(llm):
    assert (
        len(llm.generate([1] * 250, max_new_tokens=50).token_ids) == 7
    )  # 6 places left, and one more token out of them
    assert len(llm.generate([[1] * 250, [1]], max_new_tokens=9)[1].token_ids) == 9


def test_refused_requests_leave_the_ranks_as_they_are(llm):
    pids = llm.pids
    for wrong, said in (
        ({"prompts": [1] * 257}, "257 tokens, and the model's context 256"),
        ({"prompts": [2000]}, "token id 2000"),
        ({"prompts": "w1", "temperature": -1}, "temperature"),
        ({"prompts": "w1", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": [{"role": "user", "content": "w1"}]}, "no chat template"),
    ):
        with pytest.raises(ConfigError, match=said):
            llm.generate(**wrong)
    with pytest.raises(ConfigError, match="token id 2000"):
        llm.stream([2000])  # at once, not at the first piece
    dropped = llm.stream("w1 w2", max_new_tokens=50)
    next(dropped)
    del dropped
    assert llm.generate("w1", max_new_tokens=2).token_ids
    assert llm.pids == pids


def test_ranks_that_died_are_started_again(checkpoint):
    with mc.LLM(checkpoint[0], tp=2, timeout=20) as llm:
        before = llm.generate("w1 w2", max_new_tokens=4).token_ids
        os.kill(llm.pids[1], signal.SIGKILL)
        with pytest.raises(mc.errors.RankError):
            llm.generate("w1 w2", max_new_tokens=4)
        assert llm.generate("w1 w2", max_new_tokens=4).token_ids == before
    with pytest.raises(ConfigError, match="closed"):
        llm.generate("w1")


KINDS = [{"temperature": 1.5, "seed": 7, **more} for more in ({}, {"top_k": 30}, {"top_p": 0.9})]


def sampled(mesh, folder, prompts):
    *_, (model, _) = load_decoder(mesh, folder)
    answers = []
    for kind in KINDS:
        steps = list(generate(model, Request(prompts, 12, Sampling(**kind))))
        answers.append([[step[row] for step in steps] for row in range(len(prompts))])
    return answers


def test_the_same_seed_gives_the_same_tokens_at_every_degree(run_on, checkpoint, llm):
    prompts = tiny.prompts(NAME)
    found = [[a.token_ids for a in llm.generate(prompts, max_new_tokens=12, **kind)] for kind in KINDS]
    assert len({str(tokens) for tokens in found[0]}) == 3  # prompts have noise of their own
    assert llm.generate(prompts[0], max_new_tokens=12, **{**KINDS[0], "seed": 8}).token_ids != found[0][0]
    for tp in (1, 3):
        assert run_on(sampled, checkpoint[0], prompts, tp=tp) == [found] * tp
    with mc.LLM(checkpoint[0], dp=2, timeout=30) as copies:
        for kind, expected in zip(KINDS, found, strict=True):
            assert [a.token_ids for a in copies.generate(prompts, max_new_tokens=12, **kind)] == expected
        assert copies.generate(prompts[:1], max_new_tokens=12, **KINDS[0])[0].token_ids == found[0][0]
        streamed = "".join(copies.stream("w3", max_new_tokens=4))
    assert streamed == llm.generate("w3", max_new_tokens=4).text


def test_without_a_tokenizer_prompts_are_token_ids(tmp_path):
    folder, model = tiny.write(tmp_path, NAME)
    ids = tiny.prompts(NAME)[2]
    with mc.LLM(folder, timeout=30) as llm:
        answer = llm.generate(ids, max_new_tokens=5)
        assert answer.text is None
        assert answer.token_ids == greedy(model, ids, 5)
        with pytest.raises(ConfigError, match="has no tokenizer"):
            llm.generate("text")
        with pytest.raises(ConfigError, match="has no tokenizer"):
            llm.stream(ids)


@pytest.mark.seam
def test_chat_templates(tmp_path):
    folder = tmp_path / "chat"
    folder.mkdir()
    add_tokenizer(folder, TEMPLATE)
    tokenizer = Tokenizer.of(folder)
    assert tokenizer.encode("w1 w2") == [1000, 0, 2, 1001] or tokenizer.encode("w1 w2")[-1] == 1001
    assert tokenizer.encode("w1 w2", raw=True) == [1, 2]
    assert tokenizer.encode([{"role": "user", "content": " w5"}])[-2:] == [5, 1001]

    def template(text):
        (folder / "chat_template.jinja").write_text(text)
        return Tokenizer.of(folder)

    with pytest.raises(ConfigError, match="only one turn"):
        template("{{ raise_exception('only one turn') }}").encode("w1")
    with pytest.raises(ConfigError, match="unsafe"):  # the sandbox
        template("{% if messages[0].content != 'Hello' %}{{ ''.__class__.__mro__ }}{% endif %}").encode("w1")
    said = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert template(said).encode("w7") == [7]
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "other", "template": "x"}, {"name": "default", "template": "{{ bos_token }} w9"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "bos_token": {"content": "w8"}}))
    assert Tokenizer.of(folder).encode("w1") == [8, 9]


@pytest.mark.seam
def test_pieces_of_text_are_whole_characters():
    if not (SMOLLM2 / "tokenizer.json").exists():
        pytest.skip("needs a byte-level tokenizer")
    tokenizer = Tokenizer.of(SMOLLM2)
    text = "Zoë 😀 naïve — 東京."
    ids = tokenizer.encode(text, raw=True)
    pieces = list(tokenizer.pieces(ids))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    cut = ids[: ids.index(tokenizer.encode("😀", raw=True)[-1])]  # ends inside a character
    assert "".join(tokenizer.pieces(cut)) == tokenizer.decode(cut)


def free_memory_of(mesh, folder, free):
    """Load as if the rank had so much memory free."""
    import multicard.models.load as module

    real, module.free_bytes = module.free_bytes, lambda device, ranks: free
    try:
        *_, _ = load_decoder(mesh, folder)
    except ConfigError as error:
        return str(error)
    finally:
        module.free_bytes = real
    return "loaded"


def test_token_ids_may_be_arrays_and_nothing_else_is_taken_for_a_prompt(checkpoint):
    with mc.LLM(checkpoint[0]) as llm:
        expected = llm.generate([1, 2, 3], max_new_tokens=3).token_ids
        assert llm.generate(torch.tensor([1, 2, 3]), max_new_tokens=3).token_ids == expected
        assert llm.generate(list(torch.tensor([1, 2, 3])), max_new_tokens=3).token_ids == expected
        assert [g.token_ids for g in llm.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3)] == [expected]
        assert llm.logits(torch.tensor([1, 2])).shape[0] == 2
        for wrong in ([True], [1.0], None, 5, b"x", [[1.5]]):
            with pytest.raises(ConfigError, match="is not a prompt"):
                llm.generate(wrong)
        with pytest.raises(ConfigError, match="takes a list of token ids"):
            llm.logits("hi")


@pytest.mark.parametrize(
    "wrong", [{"timeout": 0}, {"timeout": float("nan")}, {"timeout": "3"}, {"threads_per_rank": 0}]
)
def test_settings_that_cannot_be_meant_are_refused(checkpoint, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        mc.LLM(checkpoint[0], **wrong)


def leave_free(mesh, nbytes):
    import multicard.models.memory as module

    module.free_bytes = lambda device, ranks: nbytes


def test_a_cache_that_does_not_fit_is_refused_and_the_next_request_served(checkpoint):
    with mc.LLM(checkpoint[0], tp=2) as llm:
        llm._ranks.run(leave_free, 10_000)
        with pytest.raises(ConfigError, match=r"keys and values of 3 × 41 tokens take .* GiB, and .* GiB free"):
            llm.generate([[1, 2]] * 3, max_new_tokens=40)
        assert llm.generate([1, 2], max_new_tokens=2).token_ids


def test_a_shard_that_does_not_fit_names_the_degree_that_would(run_on, checkpoint):
    folder = checkpoint[0]
    size = sum(p.numel() * 4 for p in checkpoint[1].parameters())
    assert run_on(free_memory_of, folder, size, tp=2) == ["loaded"] * 2
    messages = run_on(free_memory_of, folder, int(size * 0.4), tp=2)
    assert messages[0] == messages[1]
    assert re.search(r"a shard takes .* GiB at tp=2 .* tp=3 would fit; dtype='bfloat16' takes half", messages[0])
    assert "no degree up to tp=6 would fit here" in run_on(free_memory_of, folder, 1000, tp=2)[0]


# The command line


def command(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "multicard", *map(str, args)], capture_output=True, text=True, timeout=120, **options
    )


def rope(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "spiral", "factor": 2.0, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))


def architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


BAD = {
    "missing directory": (lambda f: f.rename(f.parent / "away"), [], "no such checkpoint folder"),
    "no config": (lambda f: (f / "config.json").unlink(), [], "config.json: no such file"),
    "unsupported architecture": (architecture, [], "model_type 'mamba'"),
    "unsupported rope": (rope, [], "rope type 'spiral'"),
    "missing shard": (lambda f: (f / "model.safetensors").unlink(), [], "model.safetensors: no such file"),
    "truncated file": (truncate, [], "is truncated"),
    "tp = 0": (lambda f: None, ["--tp", 0, "w1"], "tp=0"),
    "more ranks than heads": (lambda f: None, ["--tp", 7, "w1"], "6 attention heads"),
    "unknown dtype": (lambda f: None, ["--dtype", "int3", "w1"], "dtype='int3'"),
    "prompt longer than the context": (lambda f: None, ["w1 " * 300], "300 tokens, and the model's context 256"),
}


@pytest.mark.parametrize("fault", BAD)
def one_line(capsys, *args):
    """Run the command in this process; what it says on standard error."""
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1
    return said.err


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, fault):
    damage, args, said = BAD[fault]
    folder, _ = tiny.write(tmp_path, NAME)
    add_tokenizer(folder)
    damage(folder)
    capsys.readouterr()
    assert said in one_line(capsys, "generate", "--model", folder, *(args or ["w1"]))


def test_a_world_that_disagrees_with_the_environment(checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = one_line(capsys, "generate", "--model", checkpoint[0], "--tp", 2, "w1")
    assert "the mesh needs 2 ranks and this job has 3" in said


@pytest.mark.seam
def test_generate_prints_json_and_nothing_else(checkpoint):
    done = command("generate", "--model", checkpoint[0], "--tp", 2, "w1 w2", "--max-new-tokens", 4, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["token_ids"] == greedy(checkpoint[1], [1, 2], 4)
    assert found["prompt_tokens"] == 2
    assert found["mesh"]["tp"] == 2
    assert {"load", "prefill", "decode"} <= set(found["timings"])
    assert done.stderr == ""  # no bar where nobody looks


def test_inside_a_job_its_own_ranks_are_used(checkpoint, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import os, multicard as mc\n"
        f"with mc.LLM({str(checkpoint[0])!r}, tp=2) as llm:\n"
        "    answers = llm.generate([[1, 2], [5]], max_new_tokens=4)\n"
        "    print('answer', os.environ['RANK'], [answer.token_ids for answer in answers])\n"
        "    assert ''.join(llm.stream('w1 w2', max_new_tokens=4)) == answers[0].text\n"
        "    assert len(llm.load_reports) == 2\n"
    )
    done = command("run", "--tp", 2, script)
    assert done.returncode == 0, done.stderr
    expected = [greedy(checkpoint[1], ids, 4) for ids in ([1, 2], [5])]
    assert f"answer 0 {expected}" in done.stdout


@pytest.mark.seam
def test_info():
    found = json.loads(command("info", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert "cores" in found["devices"]["cpu"]
    assert {"gloo", "shm", "nccl"} <= set(found["backends"])
    assert "devices" in command("info").stdout


# The real model


@pytest.fixture(scope="module")
def smollm2():
    """Prompts and transformers' greedy answers."""
    import transformers

    tokenizer = Tokenizer.of(SMOLLM2)
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    texts = ["What is the capital of France?", "Write a line about the sea.", "2, 4, 6, 8,"]
    prompts = [tokenizer.encode(text) for text in texts]
    return prompts, [greedy(model, ids, 12) for ids in prompts]


def smollm2_answers(mesh, folder, prompts):
    *_, (model, report) = load_decoder(mesh, folder)
    steps = list(generate(model, Request(prompts, 12, stop=frozenset({2}))))
    one = list(generate(model, Request(prompts[:1], 12, stop=frozenset({2})))) if mesh.tp.size < 3 else []
    return [[s[row] for s in steps if s[row] is not None] for row in range(len(prompts))], [s[0] for s in one], report


@needs_smollm2
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5])
def test_smollm2_says_what_transformers_says(run_on, smollm2, tp):
    prompts, expected = smollm2
    for batch, one, report in run_on(smollm2_answers, SMOLLM2, prompts, tp=tp):
        assert batch == expected
        assert one == (expected[0] if tp < 3 else [])  # (more ranks than cores are slow)
        assert report.bytes_read == report.shard_bytes
        assert report.peak_bytes <= 1.1 * report.shard_bytes


def test_paths_are_absolute():
    assert folder_path("~").is_absolute()


def test_errors_before_ranks_start(checkpoint):
    with pytest.raises(CheckpointError):
        mc.LLM("/nowhere")


def test_a_cache_spread_over_ranks(checkpoint, llm):
    prompts = tiny.prompts(NAME)
    expected = [answer.token_ids for answer in llm.generate(prompts, max_new_tokens=6)]
    with mc.LLM(checkpoint[0], ring=2, timeout=30) as spread:
        assert [answer.token_ids for answer in spread.generate(prompts, max_new_tokens=6)] == expected
        torch.testing.assert_close(spread.logits(prompts[0]), llm.logits(prompts[0]), rtol=0, atol=1e-4)
