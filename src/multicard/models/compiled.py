"""A compiled decode step: stages of machine code, with reads of the cache and all-reduces between them."""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from multicard import collectives
from multicard.errors import ConfigError, MulticardError
from multicard.models import artifacts, stages
from multicard.models.decoder import Cache, ParallelTransformer
from multicard.models.kv_cache import KVCache

LOG = logging.getLogger(__name__)
LOOK = 0.25  # seconds between two looks for what another process compiles
IDLE = 19  # the compiler's niceness while ranks answer: it takes the time that they leave
SEVERAL = 8  # tokens of a step that is compiled for more than one
LINES = 20  # of what a failed compiler has said
EXCEPTION = re.compile(r"[\w.]+(Error|Exception): ")


def why_not(device: torch.device) -> str | None:
    """Why no step can be compiled for ``device`` here; None if it can."""
    if device.type != "cpu":
        return f"compiled decode steps are for CPUs so far, not for {device.type}"
    if shutil.which(cxx()) is None:
        return f"there is no C++ compiler ({cxx()}): install g++, or set CXX"
    try:
        artifacts.cache_folder()
    except ConfigError as error:
        return str(error)
    return None


def cxx() -> str:
    """The C++ compiler that torch uses."""
    return os.environ.get("CXX", "g++")


class CompiledStep:
    """The model's step for a few tokens, with the interface of the model itself.

    Args:
        model: its parameters are used where they are.
        rows: tokens for which the stages were compiled; a step of fewer computes that many all the same.
        runners: for each stage what runs its compiled code, ``(weights, state, cos, sin)`` in a flat list.
    """

    def __init__(
        self, model: ParallelTransformer, rows: int, runners: dict[str, Callable[[list[Tensor]], list[Tensor]]]
    ) -> None:
        self._model, self._rows = model, rows
        self._stages = [(runners[s.name], stages.weights_of(s), s.exchange) for s in stages.stages_of(model, rows)]

    def __call__(self, ids: Tensor, cache: Cache) -> Tensor:
        """``(batch, tokens)`` ids, at most ``rows`` of them, to ``(batch, tokens, this rank's vocabulary)``."""
        model, shape, layer = self._model, ids.shape, 0
        ids, positions = cache.advance(ids)
        cos, sin = (self._padded(t.expand(*shape, *t.shape[2:])) for t in model.rope(positions, cache.length))
        found = [self._padded(model.embed_tokens(ids))]
        x = torch.zeros_like(found[0])
        for run, weights, exchange in self._stages:
            x, *found = run([*weights, x, *found, cos, sin])
            if exchange == "keep":
                assert isinstance(cache, KVCache)
                q, k, v = found
                found = [q, *cache.keep(layer, k, v)]
                layer += 1
            elif exchange == "attend":
                found = [self._padded(cache.attend(layer, *(_only(t, shape) for t in found)).flatten(2))]
                layer += 1
            elif exchange == "sum":
                found = [self._padded(collectives.all_reduce(_only(found[0], shape), model.mesh.tp))]
        return _only(found[0], shape)

    def _padded(self, x: Tensor) -> Tensor:
        """``(batch, tokens, ...)`` as ``(1, rows, ...)``, with zeros in the rows that aren't used.

        Contiguous, which compiled code takes for granted.
        """
        if x.shape[:2] == (1, self._rows):
            return x.contiguous()
        whole = x.new_zeros(1, self._rows, *x.shape[2:])
        _only(whole, x.shape[:2]).copy_(x)
        return whole


def _only(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The rows in use of ``(1, rows, ...)``, as ``(batch, tokens, ...)``."""
    return x if x.shape[:2] == shape else x[:, : math.prod(shape)].view(*shape, *x.shape[2:])


class Compilation:
    """A model's compiled step, as soon as there is one: from the disk, or from a process of little priority.

    Args:
        model: whose.
        checkpoint: its folder or GGUF file.
        wait: compile now, rather than beside the first answers.
        drafts: steps of several tokens will be asked for: with ``wait``, compile these now too.
        rows: tokens in a step, 1 or SEVERAL.

    Raises:
        MulticardError: with ``wait``, the compiler failed.
    """

    def __init__(
        self, model: ParallelTransformer, checkpoint: str, wait: bool, drafts: bool = False, rows: int = 1
    ) -> None:
        self._model, self._checkpoint, self._rows = model, checkpoint, rows
        self._folder = artifacts.folder_of(model, rows)
        self._names = [stage.name for stage in stages.different(model, rows)]
        self._nice = 0 if wait else IDLE
        self._process: subprocess.Popen[str] | None = None
        self._step: CompiledStep | None = None
        self._failure: str | None = None
        self._looked = -LOOK
        while wait and self.step() is None:
            if self._failure is not None:
                raise MulticardError(f"decoding can't be compiled, which compile=False leaves out: {self._failure}")
            time.sleep(LOOK)
        self._several = Compilation(model, checkpoint, wait, rows=SEVERAL) if wait and drafts else None

    def of(self, tokens: int) -> Compilation | None:
        """That of a step of so many tokens; None if there are too many to be worth it."""
        if tokens <= self._rows:
            return self
        if self._several is None and tokens <= SEVERAL:
            self._several = Compilation(self._model, self._checkpoint, wait=False, rows=SEVERAL)
        return self._several if tokens <= SEVERAL else None

    def step(self) -> CompiledStep | None:
        """The compiled step; None while it is being compiled, here or by another rank with the same shapes."""
        if self._step is None and self._failure is None and time.monotonic() >= self._looked + LOOK:
            self._looked = time.monotonic()
            if not artifacts.missing(self._folder, self._names):
                paths = {name: artifacts.path_of(self._folder, name) for name in self._names}
                self._step = CompiledStep(
                    self._model, self._rows, {name: _runner(path) for name, path in paths.items()}
                )
            elif self._process is None:
                self._process = self._start()
            elif self._process.poll() is not None:
                self._failure = self._said() or f"the compiler ended with code {self._process.returncode}"
                LOG.warning("decoding stays uncompiled: %s", self._failure)
        return self._step

    def _start(self) -> subprocess.Popen[str] | None:
        """A process that compiles what is missing; None if another rank has started one."""
        lock = artifacts.lock(self._folder)
        if lock is None:
            return None
        tp = self._model.mesh.tp
        asked = {
            "target": str(self._folder),
            "checkpoint": self._checkpoint,
            "rank": tp.rank,
            "size": tp.size,
            "sequence": self._model.mesh.sequence.size,
            "rows": self._rows,
            "quantize": self._model.config.quantize,
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }
        threads = str(torch.get_num_threads())  # the code has their number built in
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  read when the process has ended
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "multicard.models.compiler"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": threads},
                pass_fds=[lock],  # it holds the lock until it ends
                start_new_session=True,
            )
        finally:
            os.close(lock)
        os.setpriority(os.PRIO_PROCESS, process.pid, self._nice)
        assert process.stdin is not None
        process.stdin.write(json.dumps(asked) + "\n")  # and stays open: the process ends with this one
        process.stdin.flush()
        return process

    def _said(self) -> str:
        """What the compiler's process has said: its exception, without the traceback before it."""
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        starts = [number for number, line in enumerate(lines) if EXCEPTION.match(line)]
        return "\n".join(lines[starts[-1] if starts else -1 :][:LINES])


def _runner(path: pathlib.Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """What runs a compiled stage: arguments to results, in a flat list. It checks no shapes."""
    # torch's own loader (aoti_load_package) first imports the whole compiler, and takes 100 µs more for each call
    run: Callable[[list[Tensor]], list[Tensor]] = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1).run
    return run
