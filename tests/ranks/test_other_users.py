"""Another user of the host, who can run what he likes, while ranks start, load and decode."""

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

import tiny_decoders

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two other users")

ATTACK = """
import datetime, glob, os, signal, socket, sys, time
import torch.distributed as dist

os.chdir("/")
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
touched, end = set(), time.monotonic() + 60

def ports():
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and int(rest[3]) == int(sys.argv[1]):  # listening, the victim's
                yield int(local.split(":")[1], 16)


def storm(port):
    touched.add(f"port {port}")
    limit = datetime.timedelta(seconds=1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=limit)
    for key in store.list_keys():
        store.set(key, "x" * 1000)
        store.delete_key(key)
    store.set("flood", "x" * (4 << 20))


def noise(port):
    socket.create_connection(("127.0.0.1", port), timeout=1).sendall(os.urandom(999))


others = set(ports())  # that were there before
print("ready", flush=True)
while os.getppid() != 1 and time.monotonic() < end:
    for port in set(ports()) - others:
        for attack in (storm, noise):
            try:
                attack(port)
            except Exception:
                pass
    for path in glob.glob("/proc/[0-9]*"):
        try:
            if os.stat(path).st_uid != int(sys.argv[1]) or "multicard" not in open(f"{path}/cmdline").read():
                continue
        except OSError:
            continue
        for attack in (lambda: os.listdir(f"{path}/fd"), lambda: os.kill(int(path.split("/")[2]), signal.SIGKILL)):
            try:
                attack()
                touched.add(path)
            except OSError:
                pass
    for path in glob.glob("/dev/shm/*") + glob.glob("/tmp/*multicard*"):
        try:
            if os.stat(path).st_uid == int(sys.argv[1]):
                open(path, "r+b").write(b"x")
                touched.add(path)
        except OSError:
            pass
    if os.path.exists(sys.argv[2]):
        break
print(sorted(touched), flush=True)
"""

VICTIM = """
import sys

import torch

import multicard as mc
from multicard import collectives

for _ in range(3):
    with mc.LLM(sys.argv[1], tp=2, timeout=20) as llm:
        print([llm.generate([5, 6, 7], max_new_tokens=24).token_ids for _ in range(3)])
    with mc.Ranks(mc.ParallelConfig(ring=3), timeout=20) as ranks:
        print(ranks.run(lambda mesh: collectives.all_reduce(torch.ones(4) * mesh.rank, mesh.ring).tolist()))
"""


@pytest.fixture(scope="module")
def folder():
    """One that all users can read."""
    with tempfile.TemporaryDirectory() as made:
        path = pathlib.Path(made)
        path.chmod(0o755)
        for file in tiny_decoders.write(path, "llama-7-heads")[0].iterdir():
            file.chmod(0o644)
        yield path


def start(code, *args, **user):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        **user,
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("user", [0, 12345])
def test_they_change_nothing_and_reach_nothing(folder, user):
    owner = {"user": user, "group": user, "extra_groups": []}
    try:
        victim = start(VICTIM, folder / "llama-7-heads", **owner)
    except PermissionError:
        pytest.skip(f"no other user may run {sys.executable}")
    expected, error = victim.communicate(timeout=120)
    assert expected.count("\n") == 6, error
    done = folder / f"done-{user}"
    attacker = start(ATTACK, user, done)  # it gives up root once it has imported torch
    assert attacker.stdout.readline() == "ready\n", attacker.stderr.read()
    output, error = start(VICTIM, folder / "llama-7-heads", **owner).communicate(timeout=120)
    done.touch()
    touched, trouble = attacker.communicate(timeout=60)
    assert output == expected, error
    assert touched == "[]\n", trouble
