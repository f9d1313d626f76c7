"""The examples as users run them: a script with two added lines under ``multicard run``, and the grid of digits."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pixels(path):
    return np.asarray(Image.open(path), dtype=float)


def test_two_lines_make_a_script_parallel(tmp_path):
    run("examples/two_lines.py", tmp_path / "one.png")
    run("-m", "multicard", "run", "--cfg", "2", "examples/two_lines.py", tmp_path / "two.png")
    one, two = pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png")
    assert one.std() > 50  # a picture, not a grey field
    assert np.abs(one - two).max() <= 1  # of 255: rounding to whole grey levels


def test_the_grid_of_digits(tmp_path):
    pytest.importorskip("multicard.diffusion")
    out = run("examples/digits/sample.py", "--rows", "1", "--steps", "4", "--output", tmp_path / "digits.png")
    assert "10 digits on cfg=2" in out
    assert pixels(tmp_path / "digits.png").shape == (64, 640)
