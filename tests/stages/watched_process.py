"""Run by test_two_processes_pretrained.py: `python watched_process.py REPORT ARGUMENTS_OF_TRAIN`.

Trains, and writes what this process read and held of a pretrained base while it was loaded: a list of parameters with
their name, size in bytes, whether they are split, the parts that were read, and the parts that lie on its devices.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

from nqf import train
from nqf.interop import huggingface
from nqf.stages import joint


def part(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[list[int]]:
    """Start and stop of every axis."""
    return [list(along.indices(size)[:2]) for along, size in zip(index, shape, strict=True)]


def watch(report: Path) -> None:
    """Puts itself before the reading of single parts and before the loading of the whole base."""
    read: dict[str, list[dict[str, Any]]] = {}
    read_part, load_qwen3 = huggingface._read_part, joint.load_qwen3

    def reading(sources: Any, path: tuple[str, ...], shape: tuple[int, ...], index: Any, dtype: Any) -> Any:
        host = read_part(sources, path, shape, index, dtype)
        read.setdefault("/".join(path), []).append({"part": part(index, shape), "bytes": host.nbytes})
        return host

    def loading(*arguments: Any, **options: Any) -> Any:
        model, params = load_qwen3(*arguments, **options)
        rows = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = "/".join(entry.key for entry in path)
            held = [{"part": part(s.index, leaf.shape), "bytes": s.data.nbytes} for s in leaf.addressable_shards]
            split = not leaf.sharding.is_fully_replicated
            rows.append({"name": name, "bytes": leaf.nbytes, "split": split, "read": read.pop(name), "held": held})
        report.write_text(json.dumps({"devices": jax.device_count(), "parameters": rows}), encoding="utf-8")
        return model, params

    huggingface._read_part, joint.load_qwen3 = reading, loading


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
    train.main(sys.argv[2:])
