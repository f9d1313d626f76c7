"""On a card a step waits for it once: to read the tokens, drafted ones too."""

import itertools

import fake_cards
import multicard as mc
import tiny_decoders as tiny
from multicard import mesh as meshes
from multicard.layers.embedding import VocabParallelEmbedding
from multicard.models.config import DecoderConfig
from multicard.models.decoder import ParallelTransformer
from multicard.models.drafts import Drafting
from multicard.models.generate import Request, generate
from multicard.models.sampling import Sampling

SAMPLINGS = [Sampling(), Sampling(0.8), Sampling(0.8, top_k=5), Sampling(0.8, top_p=0.9), Sampling(0.8, 5, 0.9)]
PROMPTS = [[[1, 2, 3]], [[1, 2, 3], [4]]]
STEPS = 5


def reads_of_steps(mesh, folder):
    """For every sampling and batch, what each step reads."""
    config, found = DecoderConfig.from_folder(folder), []
    for sampling, prompts in itertools.product(SAMPLINGS, PROMPTS):
        with fake_cards.card() as (device, reads):
            model = ParallelTransformer(config, meshes.single(device))
            counts = [0, *(reads.count for _ in generate(model, Request(prompts, STEPS, sampling)))]
        found.append([after - before for before, after in itertools.pairwise(counts)])
    return found


def reads_of_drafted_steps(mesh, folder):
    """For every sampling and way of drafting, what each token waited for. All are 1 here, so drafts are right."""
    config, found = DecoderConfig.from_folder(folder), []
    for sampling, by_model in itertools.product(SAMPLINGS, (True, False)):
        with fake_cards.card() as (device, reads):
            model = ParallelTransformer(config, meshes.single(device))
            drafting = Drafting(3, model if by_model else None)
            steps = generate(model, Request([[1, 1, 1]], 10, sampling), drafting=drafting)
            counts = [0, *(reads.count for _ in steps)]
        found.append([after - before for before, after in itertools.pairwise(counts)])
    return found


def reads_of_an_embedding(mesh):
    import torch

    with fake_cards.card() as (device, reads):
        table = VocabParallelEmbedding(10, 4, meshes.single(device).tp, device=device)
        table(torch.ones(1, 3, dtype=torch.int64, device=device))
    return reads.count


def test_a_step_reads_its_tokens_and_nothing_else(tmp_path):
    folder, _ = tiny.write(tmp_path, "qwen3-9-over-3")
    (found,) = mc.launch(reads_of_steps, mc.ParallelConfig(), args=(str(folder),))
    wanted = [[len(prompts)] * STEPS for _, prompts in itertools.product(SAMPLINGS, PROMPTS)]
    assert found == wanted


def test_a_drafted_step_reads_its_drafts_and_what_was_chosen(tmp_path):
    folder, _ = tiny.write(tmp_path, "qwen3-9-over-3")
    (found,) = mc.launch(reads_of_drafted_steps, mc.ParallelConfig(), args=(str(folder),))
    assert found == [[1, 7, 0, 0, 0, 7, 0, 0, 0, 1]] * 2 * len(SAMPLINGS)


def test_a_read_is_noticed():
    assert mc.launch(reads_of_an_embedding, mc.ParallelConfig()) == [2]
