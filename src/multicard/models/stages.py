"""A decode step of a few tokens as stages: what a rank computes between two exchanges, or reads of the cache.

A stage has no collective, no cache and no shape that changes from token to token, so it can be compiled once, and the
same code serves all layers: weights are arguments. Its operations are the decoder's own modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from multicard.attention.one_query import one_query
from multicard.attention.segments import by_segment
from multicard.models.decoder import ParallelTransformer, ParallelTransformerLayer
from multicard.quantized.weight import blocks_of

State = tuple[Tensor, ...]
"""``(x, y)``: the residual stream and what is to be added to it. Around attention ``(x, q, k, v)``, from which an
exchange makes ``(x, q, keys, values)`` or ``(x, attended)``; at the end ``(x, logits)``."""

LONGEST = 1 << 20
"""Tokens of a context that a compiled stage can attend to."""
LENGTH = 100  # of the example; compiled for any


class Project(nn.Module):
    """Norm and projection to queries, keys and values, rotated. ``bias`` belongs to the sum ``y``."""

    def __init__(self, layer: ParallelTransformerLayer, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.norm, self.attention, self.bias = layer.input_layernorm, layer.self_attn, bias

    def forward(self, state: State, cos: Tensor, sin: Tensor) -> State:
        x = _add(state, self.bias)
        return x, *self.attention.project(self.norm(x), cos, sin)


class Attend(nn.Module):
    """Attention of this rank's heads to keys and values so far, ``(1, length, key/value heads, head_dim)``."""

    def __init__(self, layer: ParallelTransformerLayer) -> None:
        super().__init__()
        self.segments = layer.self_attn.heads.segments

    def forward(self, state: State, cos: Tensor, sin: Tensor) -> State:
        x, q, keys, values = state
        return x, by_segment(one_query, self.segments, q, keys, values).flatten(2)


class Output(nn.Module):
    """The attention's output projection: this rank's part of the sum ``y``."""

    def __init__(self, layer: ParallelTransformerLayer) -> None:
        super().__init__()
        self.projection = layer.self_attn.o_proj

    def forward(self, state: State, cos: Tensor, sin: Tensor) -> State:
        x, attended = state
        return x, self.projection.partial(attended)


class FeedForward(nn.Module):
    """Norm and MLP: this rank's part of the sum. ``bias`` belongs to the attention's output."""

    def __init__(self, layer: ParallelTransformerLayer) -> None:
        super().__init__()
        self.norm, self.mlp, self.bias = layer.post_attention_layernorm, layer.mlp, layer.self_attn.o_proj.bias

    def forward(self, state: State, cos: Tensor, sin: Tensor) -> State:
        x = _add(state, self.bias)
        return x, self.mlp.down_proj.partial(self.mlp.widen(self.norm(x)))


class Head(nn.Module):
    """Norm and logits of this rank's part of the vocabulary."""

    def __init__(self, model: ParallelTransformer, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.norm, self.head, self.bias = model.norm, model.lm_head, bias

    def forward(self, state: State, cos: Tensor, sin: Tensor) -> State:
        x = _add(state, self.bias)
        return x, self.head(self.norm(x))


class Stage(nn.Module):
    """Operations without an exchange in between.

    Attributes:
        exchange: what follows: "keep" (``k, v`` are written into the cache, all keys and values come out of it),
            "attend" (the cache does that and the attention, over ranks), "sum" (an all-reduce of ``y``), or None.
        name: its operations; stages of the same name differ in nothing but their weights.
    """

    def __init__(self, operations: list[nn.Module], exchange: str | None) -> None:
        super().__init__()
        self.operations, self.exchange = nn.ModuleList(operations), exchange
        names = [type(operation).__name__.lower() for operation in operations]
        kinds = [weight.kinds for parameter in self.parameters() if (weight := blocks_of(parameter)) is not None]
        self.name = "-".join([*names, str(len(list(self.parameters()))), *kinds])  # the first layer may have fewer

    def forward(self, state: State, cos: Tensor, sin: Tensor) -> State:
        for operation in self.operations:
            state = operation(state, cos, sin)
        return state


class Applied(nn.Module):
    """A stage with its weights as arguments, ``(weights, state, cos, sin)``, for the compiler."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = (stage,)  # in a tuple its parameters aren't this module's

    @property
    def stage(self) -> Stage:
        return self._stage[0]

    def forward(self, weights: list[Tensor], state: State, cos: Tensor, sin: Tensor) -> State:
        named = dict(zip(dict(self.stage.named_parameters()), weights, strict=True))
        result: State = torch.func.functional_call(self.stage, named, (state, cos, sin))
        return result


def stages_of(model: ParallelTransformer, rows: int) -> list[Stage]:
    """The stages of a step in order; without tensor parallel everything between two accesses to the cache is one.

    Args:
        rows: tokens in a step; several may be of one sequence or of several, which only the cache knows.
    """
    stages: list[Stage] = []
    pending: list[nn.Module] = []
    for operation, exchange in _operations(model, rows):
        pending.append(operation)
        if exchange is not None and (exchange != "sum" or model.mesh.tp.size > 1):
            stages.append(Stage(pending, exchange))
            pending = []
    return [*stages, Stage(pending, None)]


def different(model: ParallelTransformer, rows: int) -> list[Stage]:
    """One stage of each name."""
    return list({stage.name: stage for stage in stages_of(model, rows)}.values())


def weights_of(stage: Stage) -> list[Tensor]:
    return [parameter.detach() for parameter in stage.parameters()]


def example(stage: Stage, model: ParallelTransformer, rows: int) -> tuple[list[Tensor], State, Tensor, Tensor]:
    """Arguments of :class:`Applied` with the shapes and dtypes of a step, whose memory is never touched."""
    config, heads = model.config, model.heads

    def empty(*shape: int) -> Tensor:
        return torch.empty(1, *shape, dtype=model.dtype)

    state: State = (empty(rows, config.hidden), empty(rows, config.hidden))
    if isinstance(stage.operations[0], Attend):
        q, k = (1, len(heads.query), config.head_dim), (LENGTH, len(heads.kv), config.head_dim)
        state = (state[0], empty(*q), empty(*k), empty(*k))
    elif isinstance(stage.operations[0], Output):
        state = (state[0], empty(rows, len(heads.query) * config.head_dim))
    turn = (rows, 1, config.head_dim)
    weights = [torch.empty(p.shape, dtype=p.dtype) for p in stage.parameters()]
    return weights, state, empty(*turn), empty(*turn)


def varying(stage: Stage) -> list[dict[int, Any]]:
    """The dimensions of the state that change from token to token."""
    if not isinstance(stage.operations[0], Attend):
        return [{}, {}]
    length = {1: torch.export.Dim("length", min=2, max=LONGEST)}
    return [{}, {}, length, length]


def _operations(model: ParallelTransformer, rows: int) -> Iterator[tuple[nn.Module, str | None]]:
    """The operations of a step in order, each with the exchange after it."""
    bias, layers = None, cast(Iterable[ParallelTransformerLayer], model.layers)
    for layer in layers:
        if model.mesh.sequence.size > 1 or rows > 1:
            yield Project(layer, bias), "attend"
        else:
            yield Project(layer, bias), "keep"
            yield Attend(layer), None
        yield Output(layer), "sum"
        yield FeedForward(layer), "sum"
        bias = layer.mlp.down_proj.bias
    yield Head(model, bias), None


def _add(state: State, bias: nn.Parameter | None) -> Tensor:
    x, y = state
    return x + (y if bias is None else y + bias)
