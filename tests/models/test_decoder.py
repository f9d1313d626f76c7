"""The decoder against transformers on the same checkpoint, at every degree."""

import pytest
import torch

import tiny_decoders as tiny
from multicard import collectives, partition
from multicard.models.generate import Request, generate, logits
from multicard.models.load import load_decoder

NEW = 8


def load(mesh, folder, dtype=None):
    *_, last = load_decoder(mesh, folder, dtype)
    return last


def answers(model, prompts, **options):
    steps = list(generate(model, Request(prompts, NEW, **options)))
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


def on_rank(mesh, folders, prompts):
    """For every checkpoint: logits of its longest prompt, greedy answers one by one and as a batch."""
    found = {}
    for name, folder in folders.items():
        model, _ = load(mesh, folder)
        singles = [answers(model, [prompt])[0] for prompt in prompts[name]]
        found[name] = (logits(model, prompts[name][0]), singles, answers(model, prompts[name]))
    return found


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Folders of all checkpoints, and what transformers says: float64 logits and float32 greedy tokens."""
    folder = tmp_path_factory.mktemp("checkpoints")
    folders, prompts, expected = {}, {}, {}
    for name in tiny.CHECKPOINTS:
        folders[name], model = tiny.write(folder, name)
        prompts[name] = tiny.prompts(name)
        with torch.no_grad():
            tokens = [
                model.generate(
                    torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=NEW, do_sample=False
                )[0, len(ids) :].tolist()
                for ids in prompts[name]
            ]
            expected[name] = (model.double()(torch.tensor([prompts[name][0]])).logits[0], tokens)
    return folders, prompts, expected


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_equal_to_transformers_at_every_degree(run_on, oracle, tp):
    folders, prompts, expected = oracle
    by_rank = run_on(on_rank, folders, prompts, tp=tp)
    for name in folders:
        whole, tokens = expected[name]
        for ours, singles, batched in (found[name] for found in by_rank):
            torch.testing.assert_close(ours.double(), whole, rtol=0, atol=1e-5 * whole.abs().max().item(), msg=name)
            assert singles == tokens, name
            assert batched == tokens, name


def test_each_rank_reads_only_its_slices(run_on, oracle):
    def read(mesh):
        return [load(mesh, folder)[1] for folder in oracle[0].values()]

    for folder, reports in zip(oracle[0].values(), zip(*run_on(read, tp=4), strict=True), strict=True):
        file = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for report in reports:
            assert report.bytes_read == report.shard_bytes < 0.45 * file
        # All of the file is read; what several ranks read is norms, biases and the key/value heads that they share.
        assert 0.99 * file - 20_000 < sum(report.bytes_read for report in reports) < 1.3 * file


@pytest.mark.parametrize(
    "degrees", [{"ring": 2}, {"ring": 3}, {"ulysses": 2}, {"ring": 2, "ulysses": 2}, {"ring": 2, "tp": 2}], ids=str
)
def test_equal_with_the_cache_spread_over_a_sequence_axis(run_on, oracle, degrees):
    """Prompts of 23, 1 and 9 tokens: split zigzag, shorter than the ranks, and padded; then decoded in turn."""
    folders, prompts, expected = oracle
    some = {name: folders[name] for name in ("llama-6-over-2", "mistral-5-over-1", "qwen3-9-over-3")}
    for found in run_on(on_rank, some, prompts, **degrees):
        for name in some:
            whole, tokens = expected[name]
            logits, singles, batched = found[name]
            torch.testing.assert_close(logits.double(), whole, rtol=0, atol=1e-5 * whole.abs().max().item(), msg=name)
            assert singles == tokens, name
            assert batched == tokens, name


def kept_by(mesh, folder, length):
    """Bytes of keys and values that this rank keeps for a prompt of so many tokens, and tokens that it computed."""
    model, _ = load(mesh, folder)
    with torch.inference_mode():
        cache = model.new_cache(length)
        computed = []
        model.layers[0].register_forward_hook(lambda layer, args, out: computed.append(out.shape[1]))
        model(torch.zeros(1, length, dtype=torch.int64), cache)
    return cache.keys.nbytes + cache.values.nbytes, computed[0]


def test_a_sequence_axis_splits_the_cache_and_the_work(run_on, oracle):
    heads, layers, dim, length = 2, 2, 16, 406  # what a whole cache holds: see tiny_decoders
    folder = oracle[0]["llama-6-over-2"]
    whole = 2 * layers * heads * length * dim * 4
    kept = run_on(kept_by, folder, length, ring=2, ulysses=2)
    assert all(nbytes < 1.05 * whole / 4 for nbytes, _ in kept)
    assert sum(computed for _, computed in kept) == length
    assert max(computed for _, computed in kept) < 0.26 * length


def bfloat16_logits(mesh, folder, prompt):
    model, _ = load(mesh, folder, torch.bfloat16)
    return logits(model, prompt)


def test_bfloat16_is_as_near_the_oracle_as_one_card_is(run_on, oracle):
    """Weights and activations of 8 bits are a few percent off by themselves: splitting them adds no more than 1%."""
    folders, prompts, expected = oracle
    name = "qwen3-9-over-3"
    whole = expected[name][0]

    def off(**degrees):
        by_rank = run_on(bfloat16_logits, folders[name], prompts[name][0], **degrees)
        return max((found.double() - whole).abs().max() / whole.abs().max() for found in by_rank)

    one = off(tp=1)
    assert one < 5e-2
    assert off(tp=3) < one + 1e-2
    assert off(ring=2) < one + 1e-2


def batch_beside_other_axis(mesh, folder, prompts):
    """TP inside a bigger world: each data-parallel copy answers by itself."""
    model, _ = load(mesh, folder)
    mine = answers(model, [prompts[mesh.dp.rank]])[0]
    return mesh.dp.rank, mine, mesh.tp.size, mesh.world.size


def test_tensor_parallel_beside_another_axis(run_on, oracle):
    folders, prompts, expected = oracle
    name = "qwen2-6-over-2"
    for rank, tokens, tp, world in run_on(batch_beside_other_axis, folders[name], prompts[name], tp=2, dp=2):
        assert (tp, world) == (2, 4)
        assert tokens == expected[name][1][rank]


def prefill_in_chunks(mesh, folder, prompt):
    model, _ = load(mesh, folder)
    with torch.inference_mode():
        cache = model.new_cache(len(prompt))
        parts = [
            model(torch.tensor([chunk]), cache, last_only=False) for chunk in (prompt[:7], prompt[7:8], prompt[8:])
        ]
        local = torch.cat(parts, dim=1)[0]
    return collectives.all_gather(local, mesh.tp, dim=-1, sizes=partition.split_sizes(1003, mesh.tp.size))


@pytest.mark.parametrize("degrees", [{"tp": 1}, {"tp": 2}, {"ring": 2}], ids=str)
def test_a_prompt_may_come_in_chunks(run_on, oracle, degrees):
    folders, prompts, expected = oracle
    name = "llama-6-over-2"
    whole = expected[name][0]
    for found in run_on(prefill_in_chunks, folders[name], prompts[name][0], **degrees):
        torch.testing.assert_close(found.double(), whole, rtol=0, atol=1e-5 * whole.abs().max().item())
