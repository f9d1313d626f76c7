"""Whether a denoiser's batch may be split: some of its rows are computed separately and compared with the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from multicard.guidance.batch import BatchPlan, take_output
from multicard.guidance.trees import same_shapes, tensors_of

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""How far a split batch may be from the whole, relative to the largest value: kernels round by batch size."""

Run = Callable[[Mapping[str, Any]], Any]


def passes(
    run: Run, kwargs: Mapping[str, Any], output: Any, *, plan: BatchPlan, share: range, rows: int, device: torch.device
) -> bool:
    """Whether a call with only ``share`` of the ``rows`` gives the same as the whole ``output`` for these rows.

    Random generator states are restored after the trial.
    """
    if not 0 < len(share) < rows:
        return True
    noise = random_state(device)
    try:
        part = tensors_of(run(plan.take(kwargs, share, rows)))
        wanted = tensors_of(take_output(output, share, rows))
    except Exception:  # the whole batch ran, so the split caused the error
        return False
    finally:
        _set_random_state(device, noise)
    return same_shapes(part, wanted) and all(map(_close, part, wanted))


def _close(part: Tensor, whole: Tensor) -> bool:
    if not part.is_floating_point():
        return torch.equal(part, whole)
    scale = whole.abs().amax().clamp(min=1e-12) if whole.numel() else 1.0
    return bool(((part - whole).abs() <= CLOSE.get(part.dtype, 1e-4) * scale).all())


def random_state(device: torch.device) -> Tensor:
    """The state of the default generator of ``device``."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
