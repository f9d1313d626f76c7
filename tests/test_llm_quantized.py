"""LLM from folders with a quantization_config: the logits of transformers on the numbers that they stand for."""

import json

import pytest
import torch

import multicard as mc
import tiny_quantized as tiny
from interpreted import Interpreted
from multicard.errors import CheckpointError, UnsupportedError
from multicard.models import generate as decoding
from multicard.models.generate import Request
from multicard.models.load import check_folder, load_decoder
from multicard.quantized.weight import blocks_of

PROMPTS = [[3, 100, 7, 55, 20, 1, 9, 188, 42], [17], [5, 5, 120]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By scheme: the folder, and the logits for the first prompt."""
    folder, found = tmp_path_factory.mktemp("packed"), {}
    for name in tiny.SCHEMES:
        model = tiny.write(folder / name, name)
        with torch.no_grad():
            found[name] = folder / name, model(torch.tensor(PROMPTS[:1])).logits[0]
    return found


def all_logits(mesh, checkpoints):
    """By scheme: the logits, the report, and how many matrices are in blocks."""
    found = {}
    for name, (path, _) in checkpoints.items():
        *_, (model, report) = load_decoder(mesh, path, torch.float32)
        held = sum(blocks_of(each) is not None for each in model.parameters())
        found[name] = decoding.logits(model, PROMPTS[0]), report, held
    return found


@pytest.mark.seam
@pytest.mark.parametrize("degrees", [{"tp": 1}, {"tp": 2}, {"tp": 3}, {"tp": 4}, {"ring": 2}], ids=str)
def test_logits_are_those_of_transformers(run_on, checkpoints, degrees):
    for found in run_on(all_logits, checkpoints, **degrees):
        for name, (logits, report, held) in found.items():
            expected = checkpoints[name][1]
            torch.testing.assert_close(
                logits,
                expected,
                rtol=0,
                atol=1e-5 * expected.abs().max().item(),
                msg=lambda text, of=name: f"{of}: {text}",
            )
            assert held in (9, 8, 7, 6), name  # of 8 in layers and the head; those with a part of plain numbers aren't
            assert (report.dequantized_bytes == 0) == (held >= 8), name
