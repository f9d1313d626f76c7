"""``multicard generate`` where something around it is broken: it works, or says in one line what is wrong."""

import shutil
import subprocess
import sys

import pytest

import fuzz_folders
import tiny_decoders

GENERATE = f'"{sys.executable}" -m multicard generate --tp 2 --max-new-tokens 2 --model'
ASCII = "LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, _ = tiny_decoders.write(tmp_path_factory.mktemp("surroundings"), "llama-6-over-2")
    fuzz_folders.add_tokenizer(path)
    return path


def run(command, **options):
    return subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, **options)


@pytest.fixture(scope="module")
def expected(folder):
    done = run(f"{GENERATE} {folder} 'w1 w2'")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        pytest.param("{generate} 'w1 w2' >&-", "standard output is closed", id="closed output"),
        pytest.param(
            "{generate} $'caf\\xe9'", "the prompt isn't UTF-8: byte 3 is 0xe9", id="a prompt that isn't UTF-8"
        ),
        pytest.param(f"{ASCII} {{generate}} $'caf\\xe9'", "the prompt isn't UTF-8", id="the same in an ASCII locale"),
        pytest.param(
            "unshare --fork --pid {generate} w1", "it belongs to another pid namespace", id="another namespace's /proc"
        ),
        pytest.param(
            "unshare --mount bash -c 'mount -t tmpfs none /proc && {generate} w1'", "/proc can't be read", id="no /proc"
        ),
    ],
)
def test_one_line_says_what_is_wrong(folder, command, said):
    if "unshare" in command and run("unshare --mount true").returncode:
        pytest.skip("needs root for namespaces")
    done = run(command.replace("{generate}", f"{GENERATE} {folder}"))
    *_, last = done.stderr.decode().splitlines()
    assert last.startswith("multicard: ")
    assert said in last
    assert done.returncode == 2
    assert done.stdout == b""


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(f"{ASCII} {{generate}} 'w1 w2'", id="an ASCII locale"),
        pytest.param("mkdir gone && cd gone && rmdir ../gone && {generate} 'w1 w2'", id="a folder that was deleted"),
        pytest.param("PYTHONPATH=nomemfd {generate} 'w1 w2'", id="no memfd_create"),
        pytest.param(
            "unshare --mount bash -c \"mount -t tmpfs -o ro none /mnt && TMPDIR=/mnt {generate} 'w1 w2'\"",
            id="a read-only folder for temporary files",
        ),
    ],
)
def test_it_works_all_the_same(folder, expected, tmp_path, command):
    if "unshare" in command and run("unshare --mount true").returncode:
        pytest.skip("needs root for namespaces")
    (tmp_path / "nomemfd").mkdir()
    (tmp_path / "nomemfd" / "sitecustomize.py").write_text("import os\ndel os.memfd_create\n")
    generate = f"{GENERATE} {folder}".replace('"', "" if "bash -c" in command else '"')
    done = run(command.replace("{generate}", generate), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("x" * 200_000_000, "a prompt of 200000000 characters: 16777216 at most"),
        ("w1 " * 100_000, "tokens, and the model's context"),
        ("w\ud800", "the prompt isn't Unicode: character 1 is the lone surrogate"),
    ],
)
def test_prompts_are_refused_before_weights_are_loaded(folder, capsys, monkeypatch, prompt, said):
    from multicard import cli, session

    monkeypatch.setattr(session, "Ranks", None)  # which would start them
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "--model", str(folder), "--tp", "2", "--raw", prompt])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


WITHOUT = """
import sys
for name in {names}:
    sys.modules[name] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name in {names} else found(name, *args)
import multicard as mc
try:
    {door}
except mc.errors.MulticardError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("door", "extra"),
    [
        ("mc.from_pretrained({folder!r}, mc.single())", "transformers"),
        ("mc.LLM({folder!r}, tp=2)", "transformers"),
        ("mc.DiffusionPipeline({folder!r}, cfg=2)", "diffusers"),
    ],
)
def test_every_door_names_the_extra_that_is_missing(folder, tmp_path, door, extra):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "phi"'))
    code = WITHOUT.format(names=(extra,), door=door.format(folder=str(other)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert f"pip install 'multicard[{extra}]'" in done.stdout, done.stderr
