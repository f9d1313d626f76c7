"""One step of decoding: what computes it, and the choice of the next tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from multicard import collectives
from multicard.models.compiled import Compilation, CompiledStep
from multicard.models.decoder import Cache, ParallelTransformer
from multicard.models.sampling import Sampling, choose


class Stepper:
    """Runs tokens through a model and chooses what follows them, the same on every rank.

    Args:
        model: our decoder, or another with its interface.
        compilation: of its steps; None: there is none.
        sampling: how tokens are chosen.
    """

    def __init__(self, model: ParallelTransformer, compilation: Compilation | None, sampling: Sampling) -> None:
        self.model, self._compilation, self._sampling = model, compilation, sampling

    def run(self, ids: Tensor, cache: Cache, last_only: bool = True) -> Tensor:
        """Logits, as from the model. ``cache`` holds tokens already: compiling waits for an answer's first token."""
        compiled = self._compiled(ids, cache, last_only)
        logits: Tensor = self.model(ids, cache, last_only) if compiled is None else compiled(ids, cache)
        return logits

    def _compiled(self, ids: Tensor, cache: Cache, last_only: bool) -> CompiledStep | None:
        tokens = ids.numel()
        if self._compilation is None or (last_only and ids.shape[1] > 1) or (tokens == 1 and cache.padded):
            return None
        compilation = self._compilation.of(tokens)
        return None if compilation is None else compilation.step()

    def choose(self, logits: Tensor, noise: Sequence[tuple[int, int]]) -> Tensor:
        """See :func:`multicard.models.sampling.choose`. One broadcast on the sequence axis beside its collectives."""
        mesh = self.model.mesh
        new = choose(logits, mesh.tp, self.model.lm_head.vocabulary, self._sampling, noise)
        return collectives.broadcast(new, mesh.sequence)  # each has chosen the same; the broadcast guarantees it
