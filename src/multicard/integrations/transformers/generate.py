"""``generate()`` on several ranks: all choose the same tokens; settings that can't be exact are refused beforehand.

Logits are gathered, so all ranks have the same bits, and the same generator state: they can't choose differently.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from multicard.errors import UnsupportedError
from multicard.mesh import ParallelMesh
from multicard.replica import Replica

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FIXED = {
    "set_attn_implementation": "modules were split for their current implementation: choose one before the split",
    "resize_token_embeddings": "the vocabulary is split: resize it before the split",
    "save_pretrained": "no rank has whole weights: save the model before the split",
}
"""Methods that a split model doesn't support, and why."""


def guard(model: PreTrainedModel, mesh: ParallelMesh) -> None:
    """Make ``model.generate`` give the same on all of ``mesh``: transformers' own method, with checks before it."""
    if mesh.tp.size * mesh.sequence.size == 1:
        return
    name, replica = type(model).__name__, Replica(mesh)
    for method, why in FIXED.items():
        object.__setattr__(model, method, functools.partial(_refuse, f"{name}.{method}", why))
    if not model.can_generate():
        return
    generate: Callable[..., Any] = model.generate  # type: ignore[assignment]

    @functools.wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = {**inspect.signature(generate).bind_partial(*args).arguments, **kwargs}
        check(model, mesh, given)
        replica.compare(f"{name}.generate", {"generation_config": model.generation_config, **given})
        replica.same_noise()
        tokens = generate(*args, **kwargs)
        replica.compare(f"the end of {name}.generate", {"tokens": getattr(tokens, "sequences", tokens)})
        return tokens

    # A static cache made in advance would have all key/value heads; one made by the first step has this rank's.
    ours = {
        "generate": checked,
        "generate_batch": functools.partial(
            _refuse, "continuous batching (cache_implementation='paged')", "its cache has every head: use generate"
        ),
        "_get_static_cache_init_shape": lambda: None,
    }
    for method, answer in ours.items():
        object.__setattr__(model, method, answer)


def check(model: PreTrainedModel, mesh: ParallelMesh, kwargs: dict[str, Any]) -> None:
    """Refuse generation settings on which ranks can't agree, or that don't work with a split sequence.

    Raises:
        UnsupportedError: names the setting.
    """
    config = kwargs.get("generation_config") or model.generation_config

    def setting(name: str) -> Any:
        return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

    timed = [type(each).__name__ for each in kwargs.get("stopping_criteria") or ()]
    if setting("max_time") or "MaxTimeCriteria" in timed:
        raise UnsupportedError(f"max_time={setting('max_time')}: ranks' clocks differ; bound max_new_tokens instead")
    if mesh.sequence.size == 1:
        return
    where = f"with the sequence split over {mesh.sequence.size} ranks"
    if setting("cache_implementation") not in (None, "dynamic", "dynamic_full"):
        raise UnsupportedError(f"cache_implementation={setting('cache_implementation')!r} {where}: use 'dynamic'")
    if setting("use_cache") is False:
        raise UnsupportedError(f"use_cache=False {where}: a split sequence needs the cache; leave it on")
    if (setting("num_beams") or 1) > 1:
        raise UnsupportedError(f"num_beams={setting('num_beams')} {where}: use greedy or sampling, or tp alone")
    if any(setting(name) for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")):
        raise UnsupportedError(f"assisted generation {where}: use greedy or sampling, or tp alone")


def _refuse(what: str, why: str, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedError(f"{what} after mc.parallelize: {why}")
