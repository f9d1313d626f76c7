"""launch and Ranks: values, closures, kept objects, streams; wherever they are called from."""

import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch

import multicard as mc
from multicard import collectives
from multicard.ranks import environment, wire

TWO = mc.ParallelConfig(tp=2)


@pytest.fixture(scope="module")
def ranks():
    with mc.Ranks(TWO, timeout=20) as ranks:
        yield ranks


def gather_ranks(mesh, base):
    return collectives.all_gather(torch.tensor([base + mesh.rank]), mesh.tp).tolist()


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-"],
        input=textwrap.dedent(code),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )


# ---- what goes in and out


@pytest.mark.seam
def test_values_come_back_by_rank(run_on):
    assert run_on(gather_ranks, 10, tp=2) == [[10, 11]] * 2
    assert run_on(gather_ranks, 10, tp=2, backend="gloo") == [[10, 11]] * 2


def test_one_pool_carries_every_mesh_of_its_size(run_on):
    def place(mesh):
        return mesh.ring.rank, mesh.tp.rank, mesh.sequence.size, mesh.config.world_size

    assert run_on(place, ring=2) == [(0, 0, 2, 2), (1, 0, 2, 2)]
    assert run_on(place, tp=2) == [(0, 0, 1, 2), (0, 1, 1, 2)]
    assert run_on(place) == [(0, 0, 1, 1)]


@pytest.mark.seam
def test_tensors_arrive_bit_by_bit(ranks):
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    sent = {
        "strided": base.T[1::2],
        "bfloat16": base.bfloat16(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(True),
        "complex": torch.complex(base, -base).conj(),
        "parameter": torch.nn.Parameter(base.float(), requires_grad=False),
        "numpy": np.arange(6)[::2],
        "large": torch.arange(3_000_000),
    }
    for back in ranks.run(lambda mesh, values: values, sent):
        assert list(back) == list(sent)
        for name, value in sent.items():
            assert type(back[name]) is type(value)
            np.testing.assert_array_equal(_numpy(back[name]), _numpy(value))
        back["strided"] += 1  # what arrives can be written to


def _numpy(value):
    if isinstance(value, np.ndarray):
        return value
    return value.float().numpy() if value.dtype == torch.bfloat16 else value.resolve_conj().numpy()


@pytest.mark.seam
def test_messages_hold_tensors_beside_the_pickle():
    large = torch.zeros(1 << 20)
    message = wire.pack("value", 3, {"x": large, "view": large[5:6]})
    assert len(message.parts[0]) < 2000
    reader, (end, start) = wire.Reader(), os.pipe()
    writer = threading.Thread(target=wire.write, args=(start, message))
    writer.start()
    messages = []
    while not messages:
        messages += reader.read(end)
    writer.join()
    assert messages[0].load()["x"].shape == large.shape
    os.close(start)
    with pytest.raises(EOFError):
        list(reader.read(end))
    os.close(end)


@pytest.mark.seam
def test_an_unpicklable_value_is_an_error_and_the_ranks_live_on(ranks):
    with pytest.raises(TypeError, match="cannot pickle"):
        ranks.run(lambda mesh: threading.Lock())
    assert ranks.run(lambda mesh: mesh.rank) == [0, 1]


# ---- errors of the function


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(first)
        self.lock = threading.Lock()


def test_an_exception_keeps_its_type_and_names_its_rank(ranks):
    def refuse(mesh):
        raise mc.errors.ConfigError(f"rank {mesh.rank} says no")

    with pytest.raises(mc.errors.ConfigError, match="says no") as caught:
        ranks.run(refuse)
    cause = caught.value.__cause__
    assert isinstance(cause, mc.errors.RankError)
    assert str(cause.rank) in str(caught.value)
    place = rf'File "{re.escape(__file__)}", line \d+, in refuse\n +raise mc.errors.ConfigError\('
    assert re.search(place, caught.value.__notes__[0])  # with its source line
    assert ranks.alive
    assert ranks.run(gather_ranks, 0) == [[0, 1]] * 2


@pytest.mark.seam
def test_an_exception_that_cannot_be_pickled_keeps_its_text(ranks):
    def fail(mesh):
        raise Unpicklable("what happened", 2)

    with pytest.raises(mc.errors.RankError, match="raised Unpicklable: what happened"):
        ranks.run(fail)
    assert ranks.run(lambda mesh: mesh.rank) == [0, 1]


class Coded(ValueError):
    def __init__(self, *, code):
        super().__init__(f"code {code}")
        self.code = code


class Speechless(Exception):
    def __str__(self):
        raise LookupError("no words")


class Holding(Exception):
    def __init__(self, tensor):
        super().__init__(tensor)
        self.tensor = tensor


@pytest.mark.seam
def test_exceptions_of_every_make_keep_their_type(ranks):
    def fail(mesh, make):
        raise make()

    with pytest.raises(Coded, match="code 3") as coded:
        ranks.run(fail, lambda: Coded(code=3))
    assert coded.value.code == 3
    with pytest.raises(Speechless):
        ranks.run(fail, Speechless)
    with pytest.raises(Holding) as holding:
        ranks.run(fail, lambda: Holding(torch.arange(3)))
    assert holding.value.tensor.tolist() == [0, 1, 2]
    with pytest.raises(mc.errors.RankError, match=r"rank \d raised SystemExit: 0"):
        ranks.run(fail, lambda: SystemExit(0))
    assert ranks.run(lambda mesh: mesh.rank) == [0, 1]


# ---- kept values and streams


def count_up(mesh, start, n):
    for i in range(n):
        yield i + start["at"] if mesh.rank == 0 else None


@pytest.mark.seam
def test_kept_values_stay_on_their_ranks(ranks):
    kept = ranks.keep(lambda mesh: {"rank": mesh.rank, "lock": threading.Lock()})
    assert ranks.run(lambda mesh, own: own["rank"], kept) == [0, 1]
    assert ranks.run(lambda mesh, *, own: own["rank"], own=kept) == [0, 1]
    key = kept.key
    del kept
    gone = mc.Kept(key)
    with pytest.raises(KeyError):
        ranks.run(lambda mesh, own: own, gone)


def test_what_a_generator_returns_is_kept_and_its_progress_is_shown(ranks):
    def load(mesh, parts):
        for part in range(parts):
            yield (part + 1) / parts
        return {"rank": mesh.rank, "parts": parts}

    shown = []
    kept = ranks.keep(load, 4, progress=shown.append)
    assert shown == [0.25, 0.5, 0.75, 1.0]
    assert ranks.run(lambda mesh, own: own, kept) == [{"rank": rank, "parts": 4} for rank in range(2)]
    silent = ranks.keep(load, 2)
    assert ranks.run(lambda mesh, own: own["parts"], silent) == [2, 2]


def test_a_generator_that_raises_keeps_nothing(ranks):
    def load(mesh):
        yield 0.5
        raise mc.errors.CheckpointError("no such tensor")

    with pytest.raises(mc.errors.CheckpointError, match="no such tensor"):
        ranks.keep(load)
    assert ranks.run(lambda mesh: mesh.rank) == [0, 1]


def test_ranks_that_cannot_make_again_what_they_kept_are_ended(tmp_path):
    refuse = tmp_path / "refuse"

    def load(mesh):
        if refuse.exists():
            raise mc.errors.CheckpointError("no such tensor")
        return mesh.rank

    with mc.Ranks(mc.ParallelConfig(tp=2)) as ranks:
        kept = ranks.keep(load)
        refuse.touch()
        with pytest.raises(mc.errors.CheckpointError, match="no such tensor"):
            ranks.restart()
        assert not ranks.alive
        refuse.unlink()
        ranks.restart()
        assert ranks.run(lambda mesh, own: own, kept) == [0, 1]


def test_options_that_do_not_exist_are_refused_by_name():
    with pytest.raises(mc.errors.ConfigError, match=r"unknown option 'time_out'.*did you mean 'timeout'\?"):
        mc.Ranks(mc.ParallelConfig(tp=2), time_out=3)


def test_streams_give_rank_0s_items_and_interleave(ranks):
    start = ranks.keep(lambda mesh: {"at": 10})
    one, other = ranks.stream(count_up, start, 4), ranks.stream(count_up, start, 3)
    assert [next(one), next(other), next(one)] == [10, 10, 11]
    assert ranks.run(gather_ranks, 5) == [[5, 6]] * 2
    assert list(other) == [11, 12]
    assert list(one) == [12, 13]


def test_leaving_a_stream_closes_every_ranks_generator(ranks):
    closed = ranks.keep(lambda mesh: [])

    def forever(mesh, closed):
        try:
            while True:
                yield collectives.all_reduce(torch.ones(1), mesh.tp).item()
        finally:
            closed.append(mesh.rank)

    for item in ranks.stream(forever, closed):
        assert item == 2.0
        break
    assert ranks.run(lambda mesh, closed: closed, closed) == [[0], [1]]


def test_a_stream_that_raises_leaves_the_ranks_usable(ranks):
    def fail_later(mesh):
        yield 1
        raise mc.errors.ConfigError("too long")

    stream = ranks.stream(fail_later)
    with pytest.raises(mc.errors.ConfigError, match="too long"):
        list(stream)
    assert ranks.run(gather_ranks, 1) == [[1, 2]] * 2


# ---- where it is called from


def test_threads_take_turns(ranks):
    results = {}

    def call(i):
        results[i] = ranks.run(gather_ranks, 10 * i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [[10 * i, 10 * i + 1]] * 2 for i in range(4)}


def test_a_forked_process_is_refused_and_harms_nothing(ranks):
    def use():
        try:
            ranks.run(lambda mesh: mesh.rank)
        except mc.errors.UnsupportedError:
            ranks.close()
            os._exit(42)

    child = multiprocessing.get_context("fork").Process(target=use)
    child.start()
    child.join(60)
    assert child.exitcode == 42
    assert ranks.run(gather_ranks, 3) == [[3, 4]] * 2


@pytest.mark.seam
def test_an_unguarded_script_can_launch_from_a_thread_that_ends():
    done = run_python(
        """
        import threading, time, multicard as mc
        made = []
        thread = threading.Thread(target=lambda: made.append(mc.Ranks(mc.ParallelConfig(tp=2), backend="gloo")))
        thread.start(); thread.join(); time.sleep(0.3)
        print(made[0].run(lambda mesh: mesh.rank))
        """  # never closed: ends with the interpreter
    )
    assert done.stdout == "[0, 1]\n", done.stderr


@pytest.mark.seam
def test_functions_may_live_in_a_module_beside_the_script(tmp_path):
    (tmp_path / "beside.py").write_text("def place(mesh):\n    return mesh.tp.rank\n")
    (tmp_path / "main.py").write_text(
        "import beside, multicard as mc\nprint(mc.launch(beside.place, mc.ParallelConfig(tp=2)))\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=120, cwd=tmp_path.parent
    )
    assert done.stdout == "[0, 1]\n", done.stderr


# ---- what ranks find


def test_ranks_get_their_share_of_cores_unless_told(monkeypatch):
    monkeypatch.setattr(environment, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [environment.threads(n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert environment.threads(2, asked=3) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environment.threads(2) == 5


def test_threads_and_environment_reach_the_ranks():
    with mc.Ranks(mc.ParallelConfig(), threads_per_rank=2, env={"SAID": "so"}) as one:
        assert one.run(lambda mesh: (torch.get_num_threads(), os.environ["SAID"], "PYTHONPATH" in os.environ)) == [
            (2, "so", "PYTHONPATH" in os.environ)
        ]
    with pytest.raises(mc.errors.RankError, match="closed"):
        one.run(lambda mesh: None)


def test_start_failures_are_the_callers_errors():
    with pytest.raises(mc.errors.ConfigError, match="nonsense"):
        mc.Ranks(TWO, backend="nonsense")
    with pytest.raises(mc.errors.ConfigError, match="console='both'"):
        mc.Ranks(TWO, console="both")
