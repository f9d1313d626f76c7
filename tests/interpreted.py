"""Compiled decode steps without a compiler."""

from multicard.models import compiler, stages
from multicard.models.compiled import SEVERAL, CompiledStep


class Interpreted:
    """Stages run as they are compiled, but by Python: in place of :class:`Compilation`.

    Attributes:
        calls: how many steps were asked for.
    """

    def __init__(self, model, folder, rows=1):
        tp, sequence = model.mesh.tp, model.mesh.sequence.size
        outline = compiler.outline(folder, tp.rank, tp.size, sequence, model.dtype, model.config.quantize)
        compiler.multiply_few_rows(outline)
        runners = {stage.name: self.runner(stages.Applied(stage)) for stage in stages.different(outline, rows)}
        self._step, self.calls = CompiledStep(model, rows, runners), 0
        self._several = Interpreted(model, folder, SEVERAL) if rows == 1 else None

    @staticmethod
    def runner(applied):
        def run(arguments):
            assert all(each.is_contiguous() for each in arguments), "compiled code takes it for granted"
            weights = len(stages.weights_of(applied.stage))
            return applied(arguments[:weights], tuple(arguments[weights:-2]), *arguments[-2:])

        return run

    def of(self, tokens):
        return self if tokens == 1 else self._several if tokens <= SEVERAL else None

    def step(self):
        self.calls += 1
        return self._step

    @property
    def several(self):
        """How many steps of several tokens were asked for."""
        return self._several.calls
