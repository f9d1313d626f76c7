"""Transformer inference on several cards at once.

``__init__.pyi`` lists the public names. Each is imported when it is first used, so ``import multicard`` is fast and has
no side effects.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
