"""Batches: prompts side by side without padding, and nothing computed for an answer that has ended."""

import pytest

import tiny_decoders as tiny
from multicard.models.generate import Request, generate
from multicard.models.load import load_decoder
from multicard.models.sampling import Sampling

NEW = 9
PROMPTS = [[7, 1, 4], [2] * 11, [5], [9, 8, 7, 6, 5, 4, 3]]


def answers(model, prompts, stop=frozenset(), first=0, sampling=None):
    request = Request(prompts, NEW, sampling or Sampling(), frozenset(stop), first)
    steps = list(generate(model, request))
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


def as_batch_and_alone(mesh, folder):
    """Every prompt's answer alone and in a batch, greedy and sampled, and the shapes that the batch's steps had."""
    *_, (model, _) = load_decoder(mesh, folder)
    free = [answers(model, [prompt])[0] for prompt in PROMPTS]
    stops = {free[1][1], free[0][4]}  # so that some end early, at different steps
    shapes = []
    hook = model.register_forward_pre_hook(lambda module, given: shapes.append(tuple(given[0].shape)))
    batch = answers(model, PROMPTS, stops)
    hook.remove()
    alone = [answers(model, [prompt], stops)[0] for prompt in PROMPTS]
    sampling = Sampling(0.9, seed=3)
    drawn = answers(model, PROMPTS, stops, sampling=sampling)
    drawn_alone = [answers(model, [prompt], stops, row, sampling)[0] for row, prompt in enumerate(PROMPTS)]
    return alone, batch, drawn_alone, drawn, shapes


@pytest.mark.parametrize("degrees", [{}, {"tp": 2}, {"tp": 3}, {"ring": 2}, {"ulysses": 2}], ids=str)
@pytest.mark.parametrize("name", ["qwen3-9-over-3", "llama-6-over-2"])
def test_a_batch_answers_as_each_prompt_alone(run_on, tmp_path, name, degrees):
    folder, _ = tiny.write(tmp_path, name)
    for alone, batch, drawn_alone, drawn, shapes in run_on(as_batch_and_alone, str(folder), **degrees):
        assert batch == alone
        assert drawn == drawn_alone
        lengths = [len(answer) for answer in batch]
        assert len(set(lengths)) > 1, "some end earlier than others"
        padded = "ring" in degrees or "ulysses" in degrees
        assert shapes[0] == ((4, 11) if padded else (1, sum(map(len, PROMPTS))))
        assert shapes[1:] == [(sum(length > step for length in lengths), 1) for step in range(1, max(lengths))]
