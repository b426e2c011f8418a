"""Runs the benchmarks one after the other, then writes docs/performance.md: `python benchmarks [OPTIONS] [NAME …]`.

Options are handed on to each (see `python benchmarks/ranking.py --help`). One that fails or takes too long is named at
the end and does not stop the others. On an accelerator those that only concern the host are left out.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from common import has_accelerator

HERE = Path(__file__).parent
EVERYWHERE = ("joint_step", "item_step", "text_encoding", "ranking", "growth", "gains", "startup")
ON_THE_HOST = ("search", "loader", "planned_peak", "fields_memory", "events_memory", "qwen3_load", "pretrained_joint")
# The longest stretch of time that a machine with an accelerator may be lent for.
SECONDS_ON_AN_ACCELERATOR = 570.0


def main() -> None:
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    chosen = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    accelerator = has_accelerator() and "--device=cpu" not in options
    names = chosen or (EVERYWHERE if accelerator else EVERYWHERE + ON_THE_HOST)
    failed, started = [], time.perf_counter()
    for name in names:
        left = SECONDS_ON_AN_ACCELERATOR - (time.perf_counter() - started) if accelerator else None
        if left is not None and left < 20:
            failed.append(f"{name} (no time left)")
            continue
        try:
            done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options], timeout=left)
        except subprocess.TimeoutExpired:
            failed.append(f"{name} (out of time)")
            continue
        if done.returncode:
            failed.append(f"{name} (exit status {done.returncode})")
    if "--quick" not in options:
        subprocess.run([sys.executable, str(HERE / "render.py")], check=True)
    if failed:
        raise SystemExit("failed: " + ", ".join(failed))


if __name__ == "__main__":
    main()
