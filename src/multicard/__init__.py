"""Transformer inference on several cards at once.

The public names are those of ``__init__.pyi``; each is imported when it is first used, so ``import multicard`` costs
nothing and does nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
