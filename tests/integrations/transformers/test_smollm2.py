"""SmolLM2 through transformers: greedy tokens equal to one process's, though its 9 heads over 3 divide by little."""

import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[3]
CHECKPOINT = ROOT / ".cache" / "smollm2"
MESHES = ({"tp": 2}, {"tp": 3}, {"tp": 5}, {"ring": 2, "tp": 2}, {"ulysses": 3})

pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no checkpoint: make .cache/smollm2 first")


def prompt(length):
    """So many tokens of English and Python."""
    from transformers import AutoTokenizer

    files = [ROOT / "LICENSE", *sorted((ROOT / "src" / "multicard").glob("*.py"))]
    text = "\n".join(path.read_text() for path in files)
    return AutoTokenizer.from_pretrained(CHECKPOINT)(text, return_tensors="pt").input_ids[:, :length]


def generate(model, ids, new_tokens):
    out = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def on_ranks(mesh, checkpoint, ids, new_tokens):
    import multicard as mc

    model = mc.from_pretrained(checkpoint, mesh, dtype=torch.float32)
    return generate(model, ids, new_tokens)


def one_process(ids, new_tokens):
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return generate(AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32), ids, new_tokens)


def compare(run_on, meshes, length, new_tokens):
    ids = prompt(length)
    assert ids.shape[1] == length
    expected = one_process(ids, new_tokens)
    for degrees in meshes:
        for rank, tokens in enumerate(run_on(on_ranks, str(CHECKPOINT), ids, new_tokens, **degrees)):
            assert tokens == expected, f"rank {rank} of {degrees}"


def test_greedy_tokens_are_those_of_one_process(run_on):
    compare(run_on, ({"tp": 2}, {"tp": 3}, {"ring": 2}), 100, 8)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_greedy_tokens_after_a_long_prompt(run_on):
    compare(run_on, MESHES, 4000, 64)
