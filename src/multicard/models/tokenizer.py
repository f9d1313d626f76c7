"""Text to token ids and back, and chat templates, as a Hugging Face checkpoint folder has them."""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import tokenizers
from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from multicard.errors import CheckpointError, ConfigError
from multicard.weights.folder import read_json

Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """A checkpoint's ``tokenizer.json`` with its chat template, if it has one.

    Chat templates are downloaded code, so they run in jinja2's sandbox.

    Raises:
        CheckpointError: files that can't be read.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower type
            raise CheckpointError(f"{path} can't be read: {error}") from None
        self._config = read_json(folder, "tokenizer_config.json", optional=True)
        self._template = _template(folder, self._config)

    @classmethod
    def from_folder(cls, folder: pathlib.Path) -> Tokenizer | None:
        """The folder's tokenizer, or None if it has none."""
        return cls(folder) if (folder / "tokenizer.json").is_file() else None

    def encode(self, prompt: str | Messages, raw: bool = False) -> list[int]:
        """Token ids of a prompt, through the chat template if there is one and the prompt isn't ``raw``.

        Raises:
            ConfigError: messages without a template, or messages that the template refuses.
        """
        if isinstance(prompt, str) and (raw or self._template is None):
            return self._tokenizer.encode(prompt).ids
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return self._tokenizer.encode(self._render(messages), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as its ids arrive, in whole characters; joined, the same as from :meth:`decode`."""
        stream, seen, written = DecodeStream(skip_special_tokens=True), [], ""
        for token in ids:
            seen.append(token)
            if piece := stream.step(self._tokenizer, token):
                written += piece
                yield piece
        rest = self.decode(seen)[len(written) :]  # bytes of an incomplete character
        if rest:
            yield rest

    def _render(self, messages: Messages) -> str:
        if self._template is None:
            raise ConfigError("the checkpoint has no chat template for chat messages: give the prompt as text")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: _token(self._config[name]) for name in names if self._config.get(name) is not None}
        try:
            template = environment.from_string(self._template)
            return template.render(messages=messages, add_generation_prompt=True, **tokens)
        except TemplateError as error:
            raise ConfigError(
                f"the checkpoint's chat template refuses this prompt: {error}; raw=True uses no template"
            ) from None


class _GenerationTag(Extension):
    """``{% generation %}`` marks an assistant's text for training; here only the content is kept."""

    tags = {"generation"}  # noqa: RUF012  jinja2's interface

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        return next((entry["template"] for entry in found if entry["name"] == "default"), None)
    return found


def _token(spelled: str | Mapping[str, Any]) -> str:
    return spelled if isinstance(spelled, str) else spelled["content"]


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
