"""Drafted tokens: the answers of plain decoding, whatever drafts and however much of it is accepted."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny_decoders as tiny
from interpreted import Interpreted
from multicard.errors import MulticardError
from multicard.models.answer import Answer
from multicard.models.drafts import LONGEST, SHORTEST, Drafting, DraftModel, lookup
from multicard.models.generate import Request, answer, generate
from multicard.models.load import load_decoder
from multicard.models.sampling import Sampling
from multicard.models.speculation import speculate
from multicard.models.step import Stepper

NAME, OTHER, CONTEXT = "qwen3-9-over-3", "llama-7-heads", 256
SAMPLINGS = [
    Sampling(),
    Sampling(0.9, seed=5),
    Sampling(0.8, top_k=20, seed=-3),
    Sampling(0.7, top_p=0.9),
    Sampling(0.8, 30, 0.95),
]
DEGREES = [{}, {"tp": 2}, {"tp": 3}, {"ring": 2}, {"ulysses": 2}, {"dp": 2}, {"tp": 2, "ring": 2}]
REPEATING = [11, 12, 13, 14, 15] * 5
PROMPTS = [[7, 1, 4], REPEATING, [5], [9, 8, 7, 6, 5, 4, 3]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, another one, and that with a shorter context."""
    folder = tmp_path_factory.mktemp("speculation")
    model, other = (tiny.write(folder, name)[0] for name in (NAME, OTHER))
    short, _ = tiny.write(folder / "short", OTHER)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    return {"model": str(model), "other": str(other), "short": str(short)}


def load(mesh, folder):
    *_, (model, _) = load_decoder(mesh, folder)
    return model


def tokens_of(model, new, drafting=None):
    """The answer to a prompt, and the shapes of the forwards after the prompt's."""
    shapes = []
    hook = model.register_forward_pre_hook(lambda module, given: shapes.append(tuple(given[0].shape)))
    tokens = [step[0] for step in generate(model, Request([[3, 1, 4]], new), drafting=drafting)]
    hook.remove()
    return tokens, shapes[1:]


def ways_to_draft(mesh, folders):
    """None, prompt lookup, another model, and the model itself."""
    return [None, Drafting(4), Drafting(4, load(mesh, folders["other"])), Drafting(3, load(mesh, folders["model"]))]


def with_and_without(mesh, folders):
    """Every way's outcomes, of single prompts and a batch, by every sampling."""
    model, ways = load(mesh, folders["model"]), ways_to_draft(mesh, folders)
    singles = zip(SAMPLINGS, itertools.cycle([REPEATING, PROMPTS[0]]), strict=False)
    requests = [Request([prompt], 16, sampling) for sampling, prompt in singles]
    for sampling in SAMPLINGS[:2]:
        free = [outcome.tokens for outcome in answer(model, mesh, Request(PROMPTS, 16, sampling))[0]]
        stop = {next(token for token in tokens[2:] if token not in free[3]) for tokens in free[:3]}
        requests.append(Request(PROMPTS, 16, sampling, frozenset(stop)))
    return [[answer(model, mesh, request, drafting=way)[0] for request in requests] for way in ways]


@pytest.fixture(scope="module")
def oracle(run_on, folders):
    """The tokens of one rank without drafts."""
    return [[outcome.tokens for outcome in outcomes] for outcomes in run_on(with_and_without, folders)[0][0]]


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_tokens_are_those_of_one_rank_without_drafts(run_on, folders, oracle, degrees):
    by_rank = run_on(with_and_without, folders, **degrees)
    assert by_rank.count(by_rank[0]) == len(by_rank)
    totals = []
    for requests in by_rank[0]:
        assert [[outcome.tokens for outcome in outcomes] for outcomes in requests] == oracle
        every = [outcome for outcomes in requests for outcome in outcomes]
        totals.append((sum(o.drafted for o in every), sum(o.accepted for o in every)))
        for outcomes in requests[-2:]:
            assert max(len(outcome.tokens) for outcome in outcomes[:3]) < 14 < len(outcomes[3].tokens) == 16
    assert all(outcomes[3].drafted == outcomes[3].accepted > 0 for outcomes in by_rank[0][3][-2:])
    plain, looked_up, by_other, by_itself = totals
    assert plain == (0, 0)
    assert looked_up[0] > looked_up[1] > 0
    assert by_other[0] > 60
    assert by_itself[0] == by_itself[1] > 60


def by_itself(mesh, folder):
    model, twin = load(mesh, folder), load(mesh, folder)
    return [tokens_of(model, new, Drafting(4, twin)) for new in range(1, 13)]


@pytest.mark.parametrize("degrees", [{}, {"ring": 2}], ids=str)
def test_a_step_has_the_drafts_that_there_is_room_for(run_on, folders, degrees):
    for found in run_on(by_itself, folders["model"], **degrees):
        longest = found[-1][0]
        for new, (tokens, shapes) in enumerate(found, start=1):
            assert tokens == longest[:new]
            whole, rest = divmod(new - 1, 5)  # after the first token: four drafts and one more
            assert shapes == [(1, 5)] * whole + [(1, rest)] * (rest > 0)


def stopping_at_each(mesh, folder):
    model, twin = load(mesh, folder), load(mesh, folder)
    free, _ = tokens_of(model, 14)
    found = []
    for stop in free:
        request = Request([[3, 1, 4]], 14, stop=frozenset({stop}))
        plain, drafted = (answer(model, mesh, request, drafting=way)[0][0] for way in (None, Drafting(4, twin)))
        found.append((free[: free.index(stop) + 1], plain.tokens, drafted))
    return found


def test_a_stop_inside_accepted_drafts_ends_the_answer(run_on, folders):
    for expected, plain, drafted in run_on(stopping_at_each, folders["model"], tp=2)[0]:
        assert plain == drafted.tokens == expected
        steps = math.ceil((len(expected) - 1) / 5)
        own = (len(expected) - 1) // 5  # the fifth token of a step isn't drafted
        assert (drafted.drafted, drafted.accepted) == (min(4 * steps, 12 - steps + 1), len(expected) - 1 - own)


def near_the_context(mesh, folders):
    model, other, short = (load(mesh, folders[name]) for name in ("model", "other", "short"))
    found = []
    for prompt in ([1] * 250, [1] * 255, [1] * 256, [1, 2] * 3, [1] * 19, [1] * 20, [1] * 21):
        request = Request([prompt], 30, Sampling(0.9, seed=1))
        ways = (None, Drafting(6), Drafting(6, other), Drafting(6, short), Drafting(6, load(mesh, folders["model"])))
        found.append([answer(model, mesh, request, drafting=way)[0][0] for way in ways])
    return found


@pytest.mark.parametrize("degrees", [{}, {"ulysses": 2}], ids=str)
def test_no_context_is_overrun(run_on, folders, degrees):
    """The model's own is 256; of one that drafts 20, past which it drafts nothing."""
    found = run_on(near_the_context, folders, **degrees)[0]
    for length, (plain, *ways) in zip((250, 255, 256, 6, 19, 20, 21), found, strict=True):
        assert len(plain.tokens) == min(30, CONTEXT - length + 1)
        assert [way.tokens for way in ways] == [plain.tokens] * 4
        assert (ways[2].drafted > 0) == (length < 20)
    assert 0 < found[3][3].drafted < found[3][2].drafted


def compiled_by_hand(mesh, folder):
    """Plain and drafted tokens where the model's and the draft model's steps are stages; how often they were asked."""
    models = []
    for _ in range(2):
        *_, (model, _) = load_decoder(mesh, folder, reorder=False)
        models.append((model, Interpreted(model, folder)))
    (model, step), (twin, twin_step) = models
    request = Request([[3, 1, 4]], 12)
    plain = [s[0] for s in generate(model, request)]
    drafted = [s[0] for s in generate(model, request, step, Drafting(4, twin, twin_step))]
    return plain, drafted, step.calls, twin_step.calls


@pytest.mark.parametrize("degrees", [{}, {"tp": 2}, {"ring": 2}], ids=str)
def test_a_draft_models_step_is_compiled(run_on, folders, degrees):
    for plain, drafted, calls, twin_calls in run_on(compiled_by_hand, folders["model"], **degrees):
        assert drafted == plain
        assert (calls, twin_calls) == (1, 3 + 3)  # the last token has no room for drafts; a step's first may be two


def rolled_back(mesh, folder):
    """Logits, and a sequence axis' slots, of a cache that forgot something and of one that never had it."""
    model, found = load(mesh, folder), []
    for prompt, junk, kept, more in (
        (9, 3, 0, [1]),
        (9, 5, 2, [2, 1]),
        (9, 4, 2, [2, 1]),
        (9, 1, 1, [1, 4]),
        (1, 4, 1, [3]),
        (1, 7, 0, [1, 1, 1, 5]),
    ):
        start, extra = list(range(100, 100 + prompt)), list(range(50, 50 + junk))
        caches = [model.new_cache(40) for _ in range(2)]
        with torch.inference_mode():
            model(torch.tensor([start]), caches[0])
            model(torch.tensor([extra]), caches[0])
            caches[0].crop(prompt + kept)
            model(torch.tensor([start]), caches[1])
            if kept:
                model(torch.tensor([extra[:kept]]), caches[1])
            outs = [[], []]
            for count in more:
                for out, cache in zip(outs, caches, strict=True):
                    out.append(model(torch.tensor([[7] * count]), cache, last_only=False))
        held = [getattr(cache, "slots", torch.arange(40))[: cache._new.stop].tolist() for cache in caches]
        off = max((a - b).abs().max().item() for a, b in zip(*outs, strict=True))
        found.append((caches[0].length == caches[1].length, held[0] == held[1], off))
    return found


@pytest.mark.parametrize("degrees", [{}, {"tp": 2}, {"ring": 2}, {"ulysses": 3}, {"tp": 2, "ring": 2}], ids=str)
def test_a_cache_forgets(run_on, folders, degrees):
    for found in run_on(rolled_back, folders["model"], **degrees):
        for same_length, same_slots, off in found:
            assert same_length
            assert same_slots
            assert off < 1e-4


def drafted_again(mesh, folder):
    """Drafts after so many of four were accepted: by a draft model that has drafted before, and by a fresh one."""
    found = []
    for sampling, accepted in itertools.product(SAMPLINGS[:2], range(5)):
        stepper = Stepper(load(mesh, folder), None, sampling)
        one = Answer(0, [3, 1, 4, 1, 5], 20)
        with torch.inference_mode():
            drafter = DraftModel(4, stepper, 25)
            for token in [*drafter.draft(one).tolist()[:accepted], 7]:
                one.add(token)
            found.append([each.draft(one).tolist() for each in (drafter, DraftModel(4, stepper, 25))])
    return found


@pytest.mark.parametrize("degrees", [{}, {"ring": 2}], ids=str)
def test_a_draft_model_forgets_what_was_not_accepted(run_on, folders, degrees):
    for found in run_on(drafted_again, folders["model"], **degrees):
        assert all(again == fresh for again, fresh in found)
        assert len({tuple(fresh) for _, fresh in found}) > 5


class Told:
    """Drafts what it is told."""

    def __init__(self, tokens):
        self.tokens = tokens

    def draft(self, answer):
        return torch.tensor(self.tokens[: answer.room - 1], dtype=torch.int64)


def with_broken_numbers(mesh, folder):
    """Tokens where logits after a wrong draft aren't numbers; then what is said about other such logits."""
    model = load(mesh, folder)
    plain, _ = tokens_of(model, 4)

    def rest(drafts, broken):
        cache = model.new_cache(10)
        one = Answer(0, [3, 1, 4], 4)
        with torch.inference_mode():
            model(torch.tensor([[3, 1, 4]]), cache)
        one.add(plain[0])

        def damage(module, given, out):
            out[:, broken] = math.nan

        hook = model.lm_head.register_forward_hook(damage)
        try:
            return list(speculate(Stepper(model, None, Sampling()), cache, one, Told(drafts)))
        except MulticardError as error:
            return str(error)
        finally:
            hook.remove()

    wrong = (plain[1] + 1) % 1000
    return plain, rest([wrong, 5], slice(1, None)), rest([plain[1]], slice(1, None)), rest([-1], slice(1, None))


def test_only_numbers_that_matter_must_be_finite(run_on, folders):
    plain, fine, broken, draft = run_on(with_broken_numbers, folders["model"])[0]
    assert fine == plain[1:]
    assert "the model's logits aren't finite" in broken
    assert "the draft model's logits aren't finite" in draft


# ---- looking up


def by_eye(tokens, most):
    for length in range(LONGEST, SHORTEST - 1, -1):
        for at in range(len(tokens) - length - 1, -1, -1):
            if tokens[at : at + length] == tokens[-length:]:
                text = list(tokens)
                for place in range(at + length, at + length + most):
                    text.append(text[place])
                return text[len(tokens) :]
    return []


awkward = st.sampled_from([0, 1, 2, 255, 256, 257, 65536, 65537, 1 << 24])  # bytes of one begin inside another


@settings(deadline=None)
@given(st.lists(awkward, max_size=40), st.integers(0, 9))
@example([0] * 9, 3)
@example([256, 1, 0, 256, 1], 2)
@example([1, 2, 3, 9, 1, 2, 4, 1, 2], 4)
@example([5, 1, 2, 3, 4, 9, 0, 1, 2, 3, 7, 1, 2, 3], 1)
def test_lookup_is_the_last_longest_match(tokens, most):
    assert lookup(tokens, most) == by_eye(tokens, most)


def test_lookup():
    assert lookup([1, 2, 3, 4, 5, 1, 2], 2) == [3, 4]
    assert lookup([1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert lookup([1, 2, 9, 1, 2, 8, 1, 2], 1) == [8]
    assert lookup([7, 1, 2, 9, 3, 1, 2, 8, 7, 1, 2], 1) == [9]  # three tokens, rather than two more recently
    assert lookup([1, 2, 3], 4) == lookup([], 4) == lookup([1, 1, 1], 0) == []
