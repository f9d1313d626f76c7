"""Packages that only some of multicard needs, and what to install where one is missing."""

from __future__ import annotations

import importlib.util

from multicard.errors import ConfigError

EXTRAS = {
    "transformers": "transformers",
    "diffusers": "diffusers",
    "accelerate": "diffusers",
    "PIL": "diffusers",
    "peft": "lora",
}
"""The extra of ours that installs each."""


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def need(package: str, purpose: str) -> None:
    """Refuse what can't be done without ``package``; ``purpose`` begins the message.

    Raises:
        ConfigError: it isn't installed.
    """
    if not has(package):
        raise ConfigError(f"{purpose} needs {package}, which isn't installed: {command(package)}")


def command(package: str) -> str:
    return f"pip install 'multicard[{EXTRAS[package]}]'"
