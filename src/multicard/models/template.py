"""A checkpoint's chat template, and the process that renders it."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from typing import Any

from multicard.errors import CheckpointError, ConfigError
from multicard.models import render

Messages = Sequence[Mapping[str, Any]]
PATIENCE = 60.0  # seconds for an answer: the process's own limit is of processor time, and the machine may be busy


class ChatTemplate:
    """A template, tried once when it is read, so that what is wrong with it is known before weights are loaded.

    Args:
        text: in jinja2.
        tokens: special tokens that it may name: ``bos_token`` and so on.
        where: the file it is from, for messages.

    Raises:
        CheckpointError: it isn't jinja2, or fails on a plain prompt; one that merely refuses it is let be.
    """

    def __init__(self, text: str, tokens: Mapping[str, str], where: pathlib.Path) -> None:
        self.where, self._text, self._tokens = where, text, dict(tokens)
        self._renderer = _Renderer()
        answer = self._ask([{"role": "user", "content": "Hello"}])
        if "error" in answer:
            raise CheckpointError(f"{where}: the chat template fails on a plain prompt: {answer['error']}")

    def render(self, messages: Messages) -> str:
        """The text of a conversation, up to where the answer begins.

        Raises:
            ConfigError: the template refuses these messages, fails on them, or takes too much.
        """
        try:
            answer = self._ask(messages)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"chat messages are made of text, numbers, lists and dicts: {error}") from None
        if "text" in answer:
            return answer["text"]
        if "refused" in answer:
            raise ConfigError(
                f"the checkpoint's chat template refuses this prompt: {answer['refused']}; raw=True goes on from it"
            )
        raise ConfigError(
            f"the checkpoint's chat template ({self.where}) fails on this prompt: {answer['error']}; raw=True goes on "
            "from it"
        )

    def _ask(self, messages: Messages) -> dict[str, str]:
        context = {"messages": list(messages), "add_generation_prompt": True, **self._tokens}
        return self._renderer.ask(json.dumps({"template": self._text, "context": context}))


class _Renderer:
    """A child process, started when it is first needed and again after it was ended; callers take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: str) -> dict[str, str]:
        with self._lock:
            process = self._process if self._owner == os.getpid() else None  # a forked caller starts its own
            if process is None or process.poll() is not None:
                process = self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            line, why = b"", f"it takes more than {PATIENCE:g} s"
            try:
                process.stdin.write(request.encode() + b"\n")
                process.stdin.flush()
                if connection.wait([process.stdout.fileno()], PATIENCE):
                    line = process.stdout.readline()
            except BrokenPipeError:
                pass
            if line.endswith(b"\n"):
                return json.loads(line)
            if connection.wait([process.stdout.fileno()], 0):
                process.wait()
                why = _end(process.returncode)
            process.kill()
            process.wait()
            return {"error": why}

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", render.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"},
                start_new_session=True,  # Ctrl-C is the caller's
            )
        except OSError as error:
            raise ConfigError(f"the process that renders chat templates can't be started: {error.strerror}") from None
        self._process, self._owner = process, os.getpid()
        weakref.finalize(self, _stop, process, self._owner)
        return process


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _end(code: int) -> str:
    if code == -signal.SIGXCPU:
        return f"it takes more than {render.SECONDS} s of processor time"
    return f"the process that renders it ended with code {code}"
