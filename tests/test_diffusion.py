"""DiffusionPipeline and ``multicard image`` on real ranks, against diffusers in this process."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import multicard as mc
import pipelines
from multicard.cli import main
from multicard.errors import CheckpointError, ConfigError, RankError, UnsupportedError
from multicard.integrations.diffusers.folder import PipelineFolder, variants
from multicard.integrations.diffusers.output import pack, unpack
from multicard.integrations.diffusers.replicas import Batch
from multicard.integrations.diffusers.request import check_request
from snapshots import snapshot

DIGITS = pathlib.Path(__file__).parents[1] / "examples" / "digits" / "pipeline"
REQUEST = {"class_labels": [3, 7, 1], "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
SEED = 5


@pytest.fixture(scope="module")
def expected():
    pipe = diffusers.DiffusionPipeline.from_pretrained(DIGITS)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**REQUEST, generator=torch.Generator().manual_seed(SEED)).images


@pytest.fixture(scope="module")
def digits():
    with mc.DiffusionPipeline(DIGITS, cfg=2, timeout=30) as pipe:
        yield pipe


NO_COUNTS = (0, -3, True, 2.5, "x")
GREY = 1.01 / 255  # a level: what is 1e-6 apart may be rounded to neighbours


def near(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance
    assert expected.std() > 0.1  # a picture, not a grey field


def test_a_snapshot_of_links(expected, tmp_path):
    with mc.DiffusionPipeline(snapshot(DIGITS, tmp_path), timeout=30) as pipe:
        near(pipe(**REQUEST, seed=SEED).images, expected)


@pytest.mark.seam
def test_pictures_are_those_of_one_process(digits, expected):
    near(digits(**REQUEST, seed=SEED).images, expected)
    assert np.abs(digits(**REQUEST, seed=6).images - expected).max() > 0.1
    drawn = digits([3, 7, 1], 3.0, num_inference_steps=4, seed=SEED).images  # by place too; pictures by default
    assert [picture.size for picture in drawn] == [(32, 32)] * 3
    near(np.stack([np.asarray(picture)[..., None] / 255 for picture in drawn]), expected, GREY)


def test_pictures_as_tensors(digits, expected):  # diffusers before 0.41 has none of this pipeline
    as_tensor = digits(**{**REQUEST, "output_type": "pt"}, seed=SEED).images
    near(as_tensor.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.seam
def test_refused_requests_leave_the_ranks_as_they_are(digits, expected):
    pids = digits.pids
    for wrong, said in (
        ({"num_inferense_steps": 3}, "did you mean 'num_inference_steps'"),
        ({"prompt": "a cat"}, "it takes class_labels, guidance_scale"),
        ({"generator": None}, "seed="),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        *(({"num_inference_steps": n}, f"num_inference_steps={n!r}: a whole number of 1 or more") for n in NO_COUNTS),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: a finite number"),
        ({"guidance_scale": "3"}, "guidance_scale='3': a finite number"),
    ):
        with pytest.raises(ConfigError, match=said):
            digits(**{**REQUEST, **wrong})
    with pytest.raises(ConfigError, match="given twice"):
        digits([1], class_labels=[1])
    with pytest.raises(ConfigError, match="5 arguments"):
        digits([1], 3.0, 4, "np", 5)
    assert digits.pids == pids
    with pytest.raises(IndexError):  # the model's own, of a class that it doesn't have
        digits(**{**REQUEST, "class_labels": [2000]})
    near(digits(**REQUEST, seed=SEED).images, expected)


def test_ranks_that_died_are_started_again(digits, expected):
    os.kill(digits.pids[1], signal.SIGKILL)
    with pytest.raises(RankError):
        digits(**REQUEST, seed=SEED)
    near(digits(**REQUEST, seed=SEED).images, expected)


def test_copies_share_prompts_and_draw_the_same_noise(expected):
    with mc.DiffusionPipeline(DIGITS, dp=2, timeout=30) as pipe:
        near(pipe(**REQUEST, seed=SEED).images, expected)
        one = pipe(**{**REQUEST, "class_labels": [3]}, seed=SEED).images  # a batch's first picture has the same noise
        near(one, expected[:1])
    with pytest.raises(ConfigError, match="closed"):
        pipe(**REQUEST)


# Callbacks, on a pipeline that has them


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    pipe, arguments = pipelines.build("sd3")
    folder = tmp_path_factory.mktemp("sd3")
    pipe.save_pretrained(folder)
    return folder, pipe, arguments


def test_callbacks_run_on_every_rank_and_fail_alone(sd3):
    folder, plain, arguments = sd3

    def halve(pipe, step, timestep, tensors):
        assert step < 3
        return {"latents": tensors["latents"] / 2}

    def raises(pipe, step, timestep, tensors):
        raise FloatingPointError("the callback has had enough")

    kwargs = {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["latents"]}
    generator = torch.Generator().manual_seed(SEED)
    changed = plain(**arguments, **kwargs, generator=generator).images
    with mc.DiffusionPipeline(folder, cfg=2, tp=2, timeout=30) as pipe:
        torch.testing.assert_close(pipe(**arguments, **kwargs, seed=SEED).images, changed, rtol=0, atol=1e-4)
        with pytest.raises(FloatingPointError, match="had enough"):
            pipe(**arguments, callback_on_step_end=raises)
        again = pipe(**arguments, seed=SEED).images
    torch.testing.assert_close(again, pipelines.sample(plain, arguments, SEED), rtol=0, atol=1e-4)


# What a request may say, and how it is shared out, without ranks


def test_requests_that_cannot_be_meant():
    check_request({"height": 64, "width": np.int64(32), "num_frames": None, "guidance_scale": 0, "eta": -0.5})
    check_request({"guidance_scale": [1.0, 2.0], "strength": torch.tensor(0.5), "prompt": "", "skip_layers": 0})
    for name in ("height", "width", "num_frames", "num_images_per_prompt", "num_videos_per_prompt"):
        for value in NO_COUNTS:
            with pytest.raises(ConfigError, match=f"^{name}={value!r}: a whole number of 1 or more"):
                check_request({"prompt": "a cat", name: value})
    for value in (math.nan, -math.inf, True, "x"):
        with pytest.raises(ConfigError, match=f"^strength={value!r}: a finite number"):
            check_request({"strength": value})


def test_what_is_shared_out_and_what_is_not():
    embeds = torch.arange(5.0)[:, None]
    asked = {
        "prompt_embeds": embeds, "latents": torch.arange(10.0)[:, None], "negative_prompt": "no",
        "num_images_per_prompt": 2, "sigmas": [1, 2, 3, 4, 5], "guidance_scale": 2.0,
    }  # fmt: skip
    batch = Batch(asked, 3)
    parts = [batch.arguments(copy) for copy in range(3)]
    assert torch.equal(torch.cat([part["prompt_embeds"] for part in parts]), embeds)
    assert [len(part["latents"]) for part in parts] == [4, 4, 2]
    assert all(part["sigmas"] == asked["sigmas"] and part["negative_prompt"] == "no" for part in parts)
    assert Batch({"prompt": ["a", "b"]}, 3).arguments(2) is None
    assert Batch({"prompt": "a", "skip_layers": [1]}, 2).arguments(0) == {"prompt": "a", "skip_layers": [1]}
    with pytest.raises(UnsupportedError, match="skip_layers"):
        Batch({"prompt": ["a", "b"], "skip_layers": [1, 2]}, 2).arguments(0)


def test_noise_is_the_whole_batchs():
    batch = Batch({"prompt": ["a", "b", "c"], "num_images_per_prompt": 2}, 2)
    seeded = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    whole = torch.randn((6, 4, 3), generator=seeded())
    parts = []
    for copy, rows in ((0, 4), (1, 2)):
        with batch.noise(copy):
            parts.append(torch.randn((rows, 4, 3), generator=seeded()))
    assert torch.equal(torch.cat(parts), whole)
    refused = (
        lambda: torch.randn(8, 4, 3),  # two branches' worth, as DiT with a noisy scheduler draws
        lambda: torch.randn(4, 4),
        lambda: torch.randint(9, (4, 2, 2)),
        lambda: torch.zeros(4, 2, 2).normal_(),
    )
    for draw in refused:
        with batch.noise(0), pytest.raises(UnsupportedError, match="dp=1"):
            draw()


@pytest.mark.seam
def test_outputs_survive_the_way_home():
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    fields = {"images": [picture], "scores": np.arange(3.0), "flags": [True, None], "latents": torch.ones(2)}
    found = unpack(pack(fields))
    assert np.array_equal(np.asarray(found["images"][0]), np.asarray(picture))
    assert np.array_equal(found["scores"], fields["scores"])
    assert found["flags"] == [True, None]
    assert found["latents"] is fields["latents"]


# Bad input, before anything is started


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def become(*variants):
    """Give every component's weights that variant's names."""

    def rename(folder):
        for file in sorted(folder.glob("*/*.safetensors")):
            for variant in variants:
                shutil.copy(file, file.with_suffix(f".{variant}.safetensors"))
            file.unlink()

    return rename


def shards(folder):
    file = folder / WEIGHTS
    file.rename(file.with_name("diffusion_pytorch_model.fp16-00001-of-00001.safetensors"))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
BAD = {
    "missing folder": (remove, {}, CheckpointError, "no such folder"),
    "no index": (lambda f: remove(f / "model_index.json"), {}, CheckpointError, "isn't a diffusers pipeline"),
    "index not JSON": (lambda f: (f / "model_index.json").write_text("{"), {}, CheckpointError, "is not JSON"),
    "unknown class": (
        lambda f: edit(f / "model_index.json", _class_name="DiTPipelin"), {}, CheckpointError, "did you mean 'DiTPipe",
    ),
    "missing component": (lambda f: remove(f / "vae"), {}, CheckpointError, "vae: no such folder"),
    "missing weights": (lambda f: remove(f / WEIGHTS), {}, CheckpointError, "no safetensors weights"),
    "truncated weights": (lambda f: cut(f / WEIGHTS), {}, CheckpointError, "is truncated"),
    "pickled weights": (
        lambda f: (f / WEIGHTS).rename((f / WEIGHTS).with_suffix(".bin")), {}, UnsupportedError, "pickled weights",
    ),
    "a variant alone": (become("fp16"), {}, CheckpointError, r"variant fp16, no plain ones: .*\(--variant fp16\)"),
    "several variants": (become("fp16", "ema"), {}, CheckpointError, r"variant ema, fp16, no plain .* variant='ema'"),
    "another variant": (become("fp16"), {"variant": "bf16"}, CheckpointError, r"fp16, none of variant bf16: .*'fp16'"),
    "a variant of one component": (shards, {}, CheckpointError, r"transformer has weights of variant fp16, no"),
    "no such variant": (lambda f: None, {"variant": "fp16"}, CheckpointError, "variant 'fp16'; variants there: none"),
    "code of its own": (
        lambda f: edit(f / "model_index.json", _class_name=["mine", "Mine"]), {}, UnsupportedError, "trust_remote_code",
    ),
    "a degree": (lambda f: None, {"cfg": 0}, ConfigError, "cfg=0"),
    "a dtype": (lambda f: None, {"dtype": "int3"}, ConfigError, "dtype='int3'"),
    "more ranks than heads": (lambda f: None, {"tp": 5}, UnsupportedError, "4 heads"),
    "a model without a plan": (
        lambda f: edit(f / "model_index.json", transformer=["diffusers", "PriorTransformer"]),
        {"ulysses": 2}, UnsupportedError, "PriorTransformer has no sequence-parallel plan",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_before_ranks_start(tmp_path, monkeypatch, fault):
    damage, degrees, error, said = BAD[fault]
    folder = tmp_path / "pipeline"
    shutil.copytree(DIGITS, folder)
    damage(folder)
    monkeypatch.setattr("multicard.session.Ranks", None)
    with pytest.raises(error, match=said):
        mc.DiffusionPipeline(folder, **degrees)


def test_variants_that_diffusers_loads(tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(DIGITS, folder)
    PipelineFolder(folder).check(mc.ParallelConfig())
    shards(folder)  # one component of the variant; the other is taken plain, as diffusers does
    PipelineFolder(folder, variant="fp16").check(mc.ParallelConfig())
    assert sorted(variants(folder / "transformer")) == ["fp16"]
    assert sorted(variants(folder / "vae")) == [""]


def test_without_diffusers(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        mc.DiffusionPipeline(DIGITS)


# The command line


def image(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        main(["image", "--model", str(DIGITS), *map(str, args)])
    return ended.value.code, capsys.readouterr()


@pytest.mark.seam
def test_image_writes_files_and_says_so_as_json(capsys, tmp_path, expected):
    labels = [part for label in REQUEST["class_labels"] for part in ("--class-label", label)]
    target = tmp_path / "new" / "digit.png"
    asked = ("--cfg", 2, *labels, "--steps", 4, "--guidance-scale", 3, "--seed", SEED, "--output", target, "--json")
    code, said = image(capsys, *asked)
    assert code == 0
    found = json.loads(said.out)
    assert found["files"] == [str(target.with_stem(f"digit-{i}")) for i in range(3)]
    assert found["mesh"]["cfg"] == 2
    assert found["timings"]["generate"] > 0
    assert found["components"]["transformer"]["whole"] == "tp=1 leaves its weights whole"
    assert [held > 1e6 for held in found["components"]["transformer"]["held"]] == [True, True]
    drawn = np.stack([np.asarray(Image.open(file))[..., None] / 255 for file in found["files"]])
    near(drawn, expected, GREY)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--output", "a.txt"), "--output a.txt"),
        (("--set", "3"), "NAME=VALUE"),
        (("--cfg", 0), "cfg=0"),
        (("--steps", 0), "num_inference_steps=0: a whole number of 1 or more"),
        (("--steps", -3), "num_inference_steps=-3: a whole number of 1 or more"),
        (("--height", 0), "height=0: a whole number of 1 or more"),
        (("--guidance-scale", "nan"), "guidance_scale=nan: a finite number"),
        (("--set", "num_images_per_prompt=0"), "num_images_per_prompt=0: a whole number of 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, args, said):
    monkeypatch.setattr("multicard.session.Ranks", None)  # nothing is loaded
    code, printed = image(capsys, *args)
    assert code == 2
    assert printed.out == ""
    assert said in printed.err
    assert len(printed.err.strip().splitlines()) == 1


JOB = """
import sys, numpy as np, multicard as mc
with mc.DiffusionPipeline(sys.argv[1], dp=2) as pipe:
    for labels in ([3, 7, 1], [3]):
        found = pipe(labels, 3.0, num_inference_steps=4, seed=5, output_type="np").images
        pictures = pipe(labels, 3.0, num_inference_steps=4, seed=5).images
        assert np.abs(np.asarray(pictures[-1])[..., None] / 255 - found[-1]).max() < 0.01
        np.save(f"{sys.argv[2]}/{len(labels)}-{mc.init_mesh().rank}.npy", found)
"""


def test_inside_a_job_every_rank_gets_the_pictures(tmp_path, expected):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    command = [sys.executable, "-m", "multicard", "run", "--dp", "2", str(script), str(DIGITS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        near(np.load(tmp_path / f"3-{rank}.npy"), expected)
        near(np.load(tmp_path / f"1-{rank}.npy"), expected[:1])
