"""A checkpoint is data: damaged and hostile folders load, or are refused by one of our errors that names the file."""

import collections
import json
import pathlib
import subprocess
import sys

import pytest

import fuzz_folders
import tiny_decoders
from multicard.errors import CheckpointError, UnsupportedError
from multicard.integrations.diffusers.folder import PipelineFolder
from multicard.integrations.transformers import load
from multicard.models.template import ChatTemplate

pytestmark = pytest.mark.seam


SOAK = [pytest.mark.soak, pytest.mark.timeout(1000)]


@pytest.mark.parametrize(("count", "seed"), [(80, 0), *(pytest.param(500, seed, marks=SOAK) for seed in (1, 2, 3))])
def test_folders_damaged_at_random(tmp_path, count, seed):
    """In a process of its own, whose audit hook sees what is imported, fetched and started."""
    done = subprocess.run(
        [sys.executable, fuzz_folders.__file__, str(tmp_path), str(count), str(seed)],
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seen"] == []
    wrong = [each for each in found["outcomes"] if each["outcome"] not in ("fine", "named")]
    assert not wrong, wrong
    kinds = collections.Counter(each["outcome"] for each in found["outcomes"])
    assert min(kinds["fine"], kinds["named"]) > count / 10, kinds  # it tries both


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_decoders.write(tmp_path_factory.mktemp("untrusted"), "llama-7-heads")[0]


def with_config(folder, tmp_path, **changes):
    path = tmp_path / "changed"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **changes}))
    return path


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_a_config_cannot_ask_for_code_of_the_hub(folder, tmp_path, key):
    path = with_config(folder, tmp_path, **{key: fuzz_folders.KERNEL})
    with pytest.raises(UnsupportedError, match=rf"config.json: {key}='kernels-community/evil' is code from the hub"):
        load.build(path, None, None)


def test_only_the_caller_chooses_among_transformers_own_implementations(folder, tmp_path):
    path = with_config(folder, tmp_path, _attn_implementation="eager")
    assert load.build(path, None, None).config._attn_implementation == "sdpa"
    assert load.build(path, None, None, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("library", ["antigravity", "os", fuzz_folders.EVIL])
def test_an_index_cannot_import_modules(tmp_path, library):
    index = {"_class_name": "DiTPipeline", "transformer": [library, "Model"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UnsupportedError, match=f"{library}.*importing it runs its code"):
        PipelineFolder(tmp_path).check(fuzz_folders.ParallelConfig(cfg=2))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 5 s"),
        ("{{ 'x' * 99999999999 }}", "more than 1024 MiB of memory"),
        ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than 16777216 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_a_chat_template_has_limits(text, why):
    with pytest.raises(CheckpointError, match=f"here.jinja: the chat template fails on a plain prompt: .*{why}"):
        ChatTemplate(text, {}, pathlib.Path("here.jinja"))


def test_a_template_goes_on_after_it_was_ended():
    endless = "{% if messages[0].content == 'go' %}{{ 'x' * 99999999999 }}{% endif %}{{ messages[0].content }}"
    template = ChatTemplate(endless, {}, pathlib.Path("here.jinja"))
    with pytest.raises(ValueError, match=r"here.jinja\) fails on this prompt: more than 1024 MiB"):
        template.render([{"role": "user", "content": "go"}])
    assert template.render([{"role": "user", "content": "é"}]) == "é"
