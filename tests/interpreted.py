"""A compiled decode step without a compiler."""

from multicard.models import compiler, stages
from multicard.models.compiled import CompiledStep


class Interpreted:
    """Stages run as they are compiled, but by Python: in place of :class:`Compilation`."""

    def __init__(self, model, folder):
        tp, sequence = model.mesh.tp, model.mesh.sequence.size
        outline = compiler.outline(folder, tp.rank, tp.size, sequence, model.dtype)
        compiler.multiply_one_row(outline)
        runners = {stage.name: self.runner(stages.Applied(stage)) for stage in stages.different(outline)}
        self._step, self.calls = CompiledStep(model, runners), 0

    @staticmethod
    def runner(applied):
        def run(arguments):
            weights = len(stages.weights_of(applied.stage))
            return applied(arguments[:weights], tuple(arguments[weights:-2]), *arguments[-2:])

        return run

    def step(self):
        self.calls += 1
        return self._step
