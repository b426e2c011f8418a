"""nqf: a nested Q-Former recommender in JAX/Flax.

`import nqf` is cheap; each name below loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # What an editor and a type checker see in place of `__getattr__`.
    from nqf import interop
    from nqf.interop.huggingface import load_qwen3
    from nqf.serving.recommender import Recommender
    from nqf.tools.fit import fit
    from nqf.tools.report.cards import cards

__version__ = "0.2.0"

_LAZY = {
    "Recommender": ("nqf.serving.recommender", "Recommender"),
    "cards": ("nqf.tools.report.cards", "cards"),
    "fit": ("nqf.tools.fit", "fit"),
    "load_qwen3": ("nqf.interop.huggingface", "load_qwen3"),
}

__all__ = ["Recommender", "cards", "fit", "interop", "load_qwen3"]


def __getattr__(name: str) -> Any:
    if name == "interop":
        return importlib.import_module("nqf.interop")
    if name not in _LAZY:
        raise AttributeError(f"module 'nqf' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
