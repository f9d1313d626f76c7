"""Text to token ids and back, and chat templates, as a checkpoint folder or a GGUF file has them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from multicard.errors import CheckpointError, ConfigError, MulticardError
from multicard.models.config import naming
from multicard.models.gguf.tokenizer import build, special_tokens
from multicard.models.gguf.vocabulary import read_vocabulary
from multicard.models.template import ChatTemplate, Messages
from multicard.values import check_text
from multicard.weights import is_gguf
from multicard.weights.folder import read_json, read_text
from multicard.weights.gguf.header import read_header

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
SAMPLE = "Hello, world 123! é"


class Tokenizer:
    """A checkpoint's tokenizer with its chat template, if it has one.

    Args:
        tokenizer: text to ids and back.
        template: None: prompts are taken as they are.
        where: the file it is from, for messages.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, template: ChatTemplate | None, where: pathlib.Path) -> None:
        self._tokenizer, self._template, self._where = tokenizer, template, where

    @classmethod
    def of(cls, path: pathlib.Path) -> Tokenizer | None:
        """That of a checkpoint's folder (its ``tokenizer.json``) or of a GGUF file; None if there is none.

        Raises:
            CheckpointError: files that can't be read or used; the message names the file.
            UnsupportedError: a GGUF file's tokenizer of a kind that isn't implemented.
        """
        if is_gguf(path):
            return cls._of_gguf(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            return None
        made: tokenizers.Tokenizer = _guarded(_unusable(file), tokenizers.Tokenizer.from_file, str(file))
        made.no_padding()  # to a length that the file names
        made.no_truncation()
        _guarded(_unusable(file), made.encode, SAMPLE)
        return cls(made, _template(path), file)

    @classmethod
    def _of_gguf(cls, path: pathlib.Path) -> Tokenizer | None:
        metadata = read_header(path).metadata
        with naming(str(path)):
            vocabulary = read_vocabulary(metadata)
            if vocabulary is None:
                return None
            text = metadata.get("tokenizer.chat_template")
            if not isinstance(text, str | None):
                raise TypeError(f"tokenizer.chat_template is a {type(text).__name__}")
            made = _guarded(_unusable(path), build, vocabulary)
            _guarded(_unusable(path), made.encode, SAMPLE)
        return cls(made, None if text is None else ChatTemplate(text, special_tokens(vocabulary), path), path)

    def encode(self, prompt: str | Messages, raw: bool = False) -> list[int]:
        """Token ids of a prompt, through the chat template if there is one and the prompt isn't ``raw``.

        Raises:
            ConfigError: messages without a template, a template that refuses them, or text that isn't Unicode.
        """
        if isinstance(prompt, str):
            check_text(prompt)
            if raw or self._template is None:
                return self._ids(prompt)
        if self._template is None:
            raise ConfigError("chat messages, and the checkpoint has no chat template: give the prompt as text")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return self._ids(self._template.render(messages), add_special_tokens=False)

    def _ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        check_text(text)

        def fails(error: str) -> ConfigError:
            return ConfigError(f"the checkpoint's {self._where.name} fails on this prompt: {error}")

        return _guarded(fails, self._tokenizer.encode, text, add_special_tokens=add_special_tokens).ids

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


def _unusable(path: pathlib.Path) -> Callable[[str], CheckpointError]:
    return lambda error: CheckpointError(f"{path} can't be used: {error}")


def _guarded(fails: Callable[[str], Exception], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``call`` returns. What it raises, a Rust library's panics too (no ``Exception``), becomes ``fails``'s, but
    for our own errors."""
    try:
        return call(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MulticardError):
        raise
    except BaseException as error:
        raise fails(f"{type(error).__name__}: {error}" if type(error) is not Exception else str(error)) from None


def _template(folder: pathlib.Path) -> ChatTemplate | None:
    """The folder's chat template: a file of its own, or else in the tokenizer's config, there by name perhaps."""
    config = read_json(folder, "tokenizer_config.json", optional=True)
    where, path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        tokens = {name: _token(name, config[name]) for name in SPECIAL if config.get(name) is not None}
        found = config.get("chat_template")
        if isinstance(found, list):
            found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
        if not isinstance(found, str | None):
            raise TypeError(f"chat_template is a {type(found).__name__}")
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where} is damaged ({type(error).__name__}: {error})") from None
    if path.is_file():
        where, found = path, read_text(path)
    return None if found is None else ChatTemplate(found, tokens, where)


def _token(name: str, spelled: str | Mapping[str, Any]) -> str:
    text = spelled["content"] if isinstance(spelled, Mapping) else spelled
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}")
    return text
