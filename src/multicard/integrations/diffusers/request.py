# ruff: noqa: SIM905  lists of names are easier to read and to compare as words
"""Values that a pipeline would accept and turn into nonsense: refused by name before anything runs."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from multicard.errors import ConfigError
from multicard.values import check_text, is_whole

COUNTS = frozenset(
    "num_inference_steps height width num_frames "
    "num_images_per_prompt num_videos_per_prompt num_waveforms_per_prompt".split()
)
"""Whole numbers of 1 or more."""

SCALES = frozenset(
    "guidance_scale guidance_scale_2 true_cfg_scale image_guidance_scale guidance_rescale strength eta".split()
)
"""Finite numbers; other types (such as a list with one for each prompt) are left to the pipeline."""


def check_request(arguments: Mapping[str, Any]) -> None:
    """Refuse counts, scales and texts that no pipeline could use; None is the pipeline's default.

    Raises:
        ConfigError: names the argument, its value and the limit.
    """
    for name, value in arguments.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str):
                check_text(each)
        if name in COUNTS and value is not None and not is_whole(value, least=1):
            raise ConfigError(f"{name}={value!r}: a whole number of 1 or more, or None for the pipeline's default")
        if name in SCALES and not _may_be_scale(value):
            raise ConfigError(f"{name}={value!r}: a finite number, or None for the pipeline's default")


def _may_be_scale(value: Any) -> bool:
    return not isinstance(value, bool | str) and (not isinstance(value, numbers.Real) or math.isfinite(value))
