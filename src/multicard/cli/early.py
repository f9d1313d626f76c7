"""Early work of a command that starts ranks, before its own imports, which take seconds."""

from __future__ import annotations

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
