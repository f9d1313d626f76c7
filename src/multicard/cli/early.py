"""Early work of a command that starts ranks, before its own imports, which take seconds."""

from __future__ import annotations

import os

from multicard import place
from multicard.config import ParallelConfig
from multicard.errors import ConfigError


def prepare(*modules: str, **degrees: int) -> None:
    """Import the ranks' ``modules`` while this process imports its own. Invalid degrees are refused later."""
    from multicard.ranks import environment, starter
    from multicard.ranks.settings import Settings

    if place.in_job():
        return
    try:
        settings = Settings(ParallelConfig(**degrees))
        starter.server(environment.shared(settings), modules)
    except ConfigError:
        return


def text(argument: str) -> str:
    """The argument's bytes as UTF-8, whatever the locale is.

    Raises:
        ConfigError: they aren't.
    """
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt isn't UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from None
    except UnicodeEncodeError:  # called from Python, with text that no command line holds
        return argument
