"""``multicard run``: a script on every rank; the same under torchrun, in srun's environment and on two hosts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import tokenizers

import faults
import multicard as mc
import tiny_decoders
from multicard import place

PROGRAM = [sys.executable, "-m", "multicard"]

SCRIPT = """
import atexit, os, signal, sys, time
import torch, torch.distributed as dist
import multicard as mc
from multicard import collectives

mesh = mc.init_mesh(mc.ParallelConfig(tp=int(sys.argv[1])) if sys.argv[1:] else None)
total = collectives.all_reduce(torch.tensor([float(mesh.rank)]), mesh.world).item()
print("sum", total, "of", mesh.config, "by", dist.get_backend(), flush=True)
what = sys.argv[2:3]
atexit.register(print, "exit handler")
if what == ["raise"] and mesh.rank == 1:
    raise LookupError("not in the index")
if what == ["exit"] and mesh.rank == 1:
    sys.exit(7)
if what == ["kill"] and mesh.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what == ["wait"] and mesh.rank == 0:
    time.sleep(60)
if what == ["steps"]:
    for _ in range(2000):
        collectives.all_reduce(torch.ones(4), mesh.world)
        time.sleep(0.01)
collectives.all_reduce(torch.ones(1), mesh.world)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def run(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*PROGRAM, "run", *args], capture_output=True, text=True, timeout=120, env={**os.environ, **env}
    )


@pytest.mark.seam
def test_a_script_runs_on_every_rank_and_logs_are_kept_apart(script, tmp_path):
    done = run("--tp", "2", "--log-dir", str(tmp_path), script)
    assert (done.returncode, done.stderr) == (0, "")
    said = "sum 1.0 of tp=2 by cpu:shm\nexit handler\n"
    assert done.stdout == "".join(f"[0] {line}\n" for line in said.splitlines())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"rank0.log": said, "rank1.log": said}


def test_console_and_check_options(script):
    done = run("--tp", "2", "--console", "all", "--backend", "gloo", "--check", script)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines())[2:] == ["[1] exit handler", "[1] sum 1.0 of tp=2 by cpu:checked_gloo"]


@pytest.mark.parametrize(
    ("what", "last"),
    [
        ("raise", "multicard: rank 1 raised LookupError: not in the index"),
        ("exit", "multicard: rank 1 raised SystemExit: 7"),
        ("kill", "multicard: rank 1 was killed by SIGKILL (signal 9) in script.py"),
    ],
)
def test_a_failed_script_is_exit_code_1_with_its_traceback_and_one_line(script, what, last):
    done = run("--tp", "2", script, "2", what)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(last)
    if what == "raise":
        assert 'raise LookupError("not in the index")' in done.stderr


def test_a_hang_prints_every_ranks_stack(script):
    done = run("--tp", "2", "--timeout", "4", script, "2", "wait")
    assert done.returncode == 1
    assert "rank 0 did not arrive at all_reduce number 2" in done.stderr.splitlines()[-1]
    assert "raised on rank 1" in done.stderr
    assert "rank 0's Python stacks" in done.stderr
    assert "time.sleep(60)" in done.stderr


@pytest.mark.seam
@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--tp", "2", "absent.py"], "no such file: absent.py"),
        (["--tp", "0", __file__], "tp=0: a degree is a whole number of ranks"),
        (["--tq", "2", __file__], "No such option"),
        (["--tp", "3", "--nnodes", "2", "--master-addr", "10.0.0.1", __file__], "3 ranks (tp=3) don't divide over 2"),
        (["--tp", "2", "--nnodes", "2", __file__], "several hosts need --master-addr"),
        (["--tp", "2", "--nnodes", "2", "--node-rank", "2", __file__], "host number 2 of 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, line):
    done = run(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("multicard: ")
    assert line in done.stderr


def test_ctrl_c_is_one_short_message(script):
    parent = subprocess.Popen([*PROGRAM, "run", "--tp", "2", script, "2", "wait"], stdout=-1, stderr=-1, text=True)
    parent.stdout.readline()
    pids = [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
    parent.send_signal(signal.SIGINT)
    _, stderr = parent.communicate(timeout=30)
    assert (parent.returncode, stderr) == (130, "multicard: interrupted\n")
    assert len(pids) == 3  # the fork server and its two ranks
    assert faults.gone(pids)


# ---- other launchers


JOB = """
import json, sys, torch, multicard as mc
from multicard import collectives

config = mc.ParallelConfig(tp=2)

def work(mesh, extra=0):
    total = collectives.all_reduce(torch.ones(2), mesh.tp)
    return {"rank": mesh.rank, "sum": total, "pair": (1, [None, "x"]), "extra": extra}

values = mc.launch(work, config)
with mc.Ranks(config) as ranks:
    kept = ranks.keep(lambda mesh: mesh.rank * 10)
    values += ranks.run(work, extra=kept)
    items = list(ranks.stream(lambda mesh, own: iter([own, 2]), kept))
    assert ranks.alive and ranks.pids == []
    try:
        ranks.run(lambda mesh: object())
    except mc.errors.UnsupportedError as error:
        refused = str(error)
try:
    mc.launch(work, mc.ParallelConfig(tp=3))
except mc.errors.ConfigError as error:
    wrong = str(error)
assert [v["rank"] for v in values] == [0, 1, 0, 1] and [v["extra"] for v in values] == [0, 0, 0, 10]
assert all(v["sum"].tolist() == [2, 2] and v["pair"] == (1, [None, "x"]) for v in values)
assert items[0] == 10 * mc.init_mesh(config).rank
assert "type object" in refused and "needs 3 ranks and this job has 2" in wrong
sys.stdout.write("good\\n")  # one write: the ranks share a pipe
"""


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_launch_uses_the_job_that_torchrun_started(tmp_path):
    path = tmp_path / "job.py"
    path.write_text(JOB)
    done = subprocess.run([*TORCHRUN, str(path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "good\n" * 2), done.stderr


def test_commands_use_it_too_and_one_rank_speaks(tmp_path):
    folder, _ = tiny_decoders.write(tmp_path, "llama-6-over-2")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 7}, unk_token="a")).save(str(folder / "tokenizer.json"))
    command = [
        "-m",
        "multicard",
        "generate",
        "--model",
        str(folder),
        "--tp",
        "2",
        "a",
        "--max-new-tokens",
        "3",
        "--json",
    ]
    done = subprocess.run([*TORCHRUN, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["mesh"]["tp"], answer["prompt_tokens"], len(answer["token_ids"])) == (2, 1, 3)


def test_sruns_environment_is_a_job(script):
    port = str(20000 + os.getpid() % 10000)
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    tasks = [
        subprocess.Popen(
            [sys.executable, script, "2"],
            env={**os.environ, **slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "MASTER_PORT": port},
            stdout=-1,
            text=True,
        )
        for i in range(2)
    ]
    assert [task.communicate(timeout=60)[0].splitlines()[0] for task in tasks] == ["sum 1.0 of tp=2 by cpu:shm"] * 2


def test_places_are_read_from_the_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_", "RANK", "WORLD_SIZE"))]:
        monkeypatch.delenv(name)
    assert place.place() is None
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "node[07-08]",
        "SLURM_JOB_ID": "123456",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    here = place.place()
    assert (here.rank, here.world_size, here.local_rank, here.local_world_size) == (5, 8, 1, 4)
    assert (here.address, here.port, here.one_host, here.hosts_store) == ("node07", 23456, False, True)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a shell in an allocation is no job
    assert place.place() is None


# ---- two hosts: two network namespaces with a link between them


@pytest.fixture
def hosts():
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (apt-get install iproute2) for two network namespaces")
    one, other = f"mc{os.getpid()}a", f"mc{os.getpid()}b"
    commands = [
        f"netns add {one}",
        f"netns add {other}",
        f"link add {one} netns {one} type veth peer name {other} netns {other}",
        f"-n {one} addr add 10.231.7.1/24 dev {one}",
        f"-n {other} addr add 10.231.7.2/24 dev {other}",
        *(f"-n {name} link set {link} up" for name in (one, other) for link in (name, "lo")),
    ]
    try:
        for command in commands:
            made = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"ip {command}: {made.stderr.strip()} (network namespaces need root)")
        yield one, other
    finally:
        for name in (one, other):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_host(names, index, *args, timeout="20", mesh="--tp 4"):
    run = f"run --nnodes 2 --node-rank {index} --master-addr 10.231.7.1 --master-port 29555 --timeout {timeout} {mesh}"
    command = ["ip", "netns", "exec", names[index], *PROGRAM, *run.split(), "--console", "all", *args]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True)


GENERATE = """
import multicard as mc

with mc.LLM({folder!r}, tp=2, ring=2) as llm:
    print("tokens", [answer.token_ids for answer in llm.generate([[3, 1, 4, 1, 5, 9], [2, 7]], max_new_tokens=6)])
"""


def test_two_hosts_generate_what_one_process_does(hosts, tmp_path):
    folder, _ = tiny_decoders.write(tmp_path, "llama-6-over-2")
    script = tmp_path / "generate.py"
    script.write_text(GENERATE.format(folder=str(folder)))
    both = [start_host(hosts, i, str(script), mesh="--tp 2 --ring 2") for i in range(2)]
    with mc.LLM(folder) as llm:
        answers = llm.generate([[3, 1, 4, 1, 5, 9], [2, 7]], max_new_tokens=6)
    outputs = [host.communicate(timeout=90) for host in both]
    assert [host.returncode for host in both] == [0, 0], outputs
    told = sorted(line for stdout, _ in outputs for line in stdout.splitlines() if "tokens" in line)
    assert told == [f"[{rank}] tokens {[answer.token_ids for answer in answers]}" for rank in range(4)]


def test_a_rank_killed_on_another_host_is_named_on_both(hosts, script):
    both = [start_host(hosts, i, script, "4", "kill") for i in range(2)]
    outputs = [host.communicate(timeout=90) for host in both]
    assert [host.returncode for host in both] == [1, 1], outputs
    assert all("rank 1 was killed by SIGKILL" in stderr.splitlines()[-1] for _, stderr in outputs), outputs


@pytest.mark.parametrize("killed", [0, 1])
def test_a_host_whose_parent_is_killed_is_named_on_the_other(hosts, script, killed):
    both = [start_host(hosts, i, script, "4", "steps") for i in range(2)]
    for host in both:
        host.stdout.readline()  # under way
    both[killed].kill()
    other = both[1 - killed]
    _, stderr = other.communicate(timeout=60)
    both[killed].communicate(timeout=60)
    assert other.returncode == 1
    assert f"host {killed} (ranks {2 * killed} to {2 * killed + 1})" in stderr.splitlines()[-1], stderr


def test_a_cut_link_ends_both_hosts(hosts, script):
    both = [start_host(hosts, i, script, "4", "steps", timeout="3") for i in range(2)]
    for host in both:
        host.stdout.readline()  # under way
    listening = [
        subprocess.run(["ip", "netns", "exec", name, "ss", "-ltnH"], capture_output=True, text=True).stdout
        for name in hosts
    ]
    addresses = {line.split()[3].rpartition(":")[0] for lines in listening for line in lines.splitlines()}
    assert addresses <= {"10.231.7.1", "10.231.7.2"}
    subprocess.run(["ip", "-n", hosts[0], "link", "set", hosts[0], "down"], check=True)
    outputs = [host.communicate(timeout=60) for host in both]
    assert [host.returncode for host in both] == [1, 1], outputs
    assert all(stderr.splitlines()[-1].startswith("multicard: ") for _, stderr in outputs)
    time.sleep(0.1)
    left = [subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout for name in hosts]
    assert left == ["", ""]
