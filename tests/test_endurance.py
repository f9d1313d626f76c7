"""Load and endurance: every answer right, and nothing grows."""

import gc
import os
import random
import subprocess
import sys
import threading

import psutil
import pytest

import faults
import multicard as mc
import tiny_decoders
from multicard.errors import ConfigError, MulticardError, RankError

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]
THREADS, DEATHS = 8, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_decoders.write(tmp_path_factory.mktemp("endurance"), "llama-7-heads")[0]


def footprint(pids=()):
    """Descriptors, threads and processes of this process, and bytes of it and of the ranks."""
    gc.collect()
    me = psutil.Process()
    memory = [psutil.Process(pid).memory_info().rss for pid in (me.pid, *pids)]
    return me.num_fds(), me.num_threads(), len(me.children(recursive=True)), memory


def ask(llm, seed, count, prompts, expected, told):
    """One thread's requests; a thirtieth of them is refused, and some find that a rank has died."""
    numbers = random.Random(seed)
    for _ in range(count):
        try:
            if numbers.random() < 1 / 30:
                with pytest.raises(ConfigError):
                    llm.generate([5000])
                continue
            which = numbers.randrange(len(prompts))
            assert llm.generate(prompts[which], max_new_tokens=4).token_ids == expected[which]
        except RankError:
            told["deaths"] += 1
        except (MulticardError, AssertionError) as error:
            told["wrong"].append(error)


@pytest.mark.parametrize("requests", [10_000])
def test_ten_thousand_requests_from_eight_threads_with_deaths_and_refusals(folder, requests):
    numbers = random.Random(0)
    prompts = [[numbers.randrange(1003) for _ in range(numbers.randint(1, 12))] for _ in range(20)]
    told = {"deaths": 0, "wrong": []}
    with mc.LLM(folder, tp=2, timeout=20) as llm:
        expected = [llm.generate(prompt, max_new_tokens=4).token_ids for prompt in prompts]
        ask(llm, 0, 200, prompts, expected, told)
        before = footprint(llm.pids)
        for batch in range(DEATHS):
            share = requests // DEATHS // THREADS
            calls = [(llm, THREADS * batch + i, share, prompts, expected, told) for i in range(THREADS)]
            threads = [threading.Thread(target=ask, args=call) for call in calls]
            for thread in threads:
                thread.start()
            if batch < DEATHS - 1:
                os.kill(random.Random(batch).choice(llm.pids), 9)
            for thread in threads:
                thread.join()
        assert not told["wrong"], told["wrong"][:3]
        assert told["deaths"] >= DEATHS - 1
        assert llm.generate(prompts[0], max_new_tokens=4).token_ids == expected[0]
        after = footprint(llm.pids)
    print(f"{requests} requests, {told['deaths']} told of {DEATHS - 1} deaths: {before} -> {after}")
    assert after[:3] == before[:3]
    assert all(now < 1.1 * then + (32 << 20) for now, then in zip(after[3], before[3], strict=True)), (before, after)


def test_a_thousand_restarts():
    with mc.Ranks(mc.ParallelConfig(tp=2)) as ranks:
        ranks.restart()
        before = footprint()
        for _ in range(1000):
            ranks.restart()
            assert ranks.run(lambda mesh: mesh.rank) == [0, 1]
        after = footprint()
    print(f"1000 restarts: {before} -> {after}")
    assert after[:3] == before[:3]
    assert after[3][0] < 1.1 * before[3][0] + (32 << 20)


def test_a_hundred_cold_starts():
    code = "import multicard as mc; print(mc.launch(lambda mesh: mesh.rank, mc.ParallelConfig(tp=2)))"
    for _ in range(100):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout == "[0, 1]\n", done.stderr
    ranks = [each for each in psutil.process_iter(["cmdline"]) if "multicard.ranks" in " ".join(each.info["cmdline"])]
    assert faults.gone([each.pid for each in ranks if each.ppid() == 1])
