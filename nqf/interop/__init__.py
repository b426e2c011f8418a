"""Other people's formats: Hugging Face folders, PEFT adapters and the reference system's files."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("huggingface", "peft", "unirec", "tokenizer", "bert", "clip", "encoders"):
        return importlib.import_module(f"nqf.interop.{name}")
    raise AttributeError(f"module 'nqf.interop' has no attribute {name!r}")
