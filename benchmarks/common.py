"""What the benchmarks share: command line, pinning, timers by turns, limits of the machine, and result files.

Each benchmark is a script with `main()`. It starts with `begin(...)` before anything imports jax, and ends with
`Bench.finish(...)`, which writes `benchmarks/results/<name>.json`; `render.py` makes docs/performance.md of these.
Times are medians of runs by turns, so that what else the machine does meets all sides alike.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(ROOT))

CORES = 2
PACKAGES = ("jax", "flax", "grain", "numpy", "torch", "transformers", "peft", "faiss-cpu", "polars")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark that has begun.

    Attributes:
      name: Name of the script.
      question: The first line of its docstring.
      options: Parsed command line: `device` (cpu or gpu), `quick`, `repeats`, `seed` and the script's own.
      started: `time.perf_counter` at the start.
      load: Load average of the machine then.
    """

    name: str
    question: str
    options: argparse.Namespace
    started: float
    load: float

    @property
    def gpu(self) -> bool:
        """Whether it runs on an accelerator."""
        return self.options.device == "gpu"

    def say(self, text: str) -> None:
        """Progress on the terminal, at once."""
        print(f"[{self.name} {time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def finish(
        self,
        tables: Sequence[dict[str, Any]],
        *,
        targets: Sequence[dict[str, Any]] = (),
        limits: dict[str, float] | None = None,
        notes: Sequence[str] = (),
        details: dict[str, Any] | None = None,
    ) -> None:
        """Writes the result.

        Args:
          tables: `title`, `columns` and `rows`; what the page shows.
          targets: From `target(...)`.
          limits: The machine's limits as measured in this run, by name with unit.
          notes: Sentences below the tables.
          details: Anything else: raw seconds, shapes.
        """
        result = {
            "name": self.name,
            "question": self.question,
            "device": self.options.device,
            "quick": self.options.quick,
            "command": shlex.join(["python", f"benchmarks/{self.name}.py", *_said(sys.argv[1:])]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(self.options.device),
            "load_before": self.load,
            "load": os.getloadavg()[0],
            "versions": versions(),
            "commit": commit(),
            "seed": self.options.seed,
            "repeats": self.options.repeats,
            "seconds": time.perf_counter() - self.started,
            "limits": limits or {},
            "tables": list(tables),
            "targets": list(targets),
            "notes": list(notes),
            "details": details or {},
        }
        folder = Path(self.options.results) if self.options.results else RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (f"{self.name}.json" if not self.gpu else f"{self.name}-gpu.json")
        path.write_text(_rows_on_a_line(json.dumps(_rounded(result), indent=1)) + "\n", encoding="utf-8")
        for table in tables:
            self.say(table["title"])
            for row in [table["columns"], *table["rows"]]:
                print("    " + "  ".join(str(_rounded(cell)) for cell in row), flush=True)
        for entry in targets:
            self.say(f"{entry['what']}: {_rounded(entry['found'])}, target {entry['sign']} {entry['target']}")
        self.say(f"wrote {path.name}")


def _said(arguments: Sequence[str]) -> list[str]:
    """Arguments for others to repeat: absolute paths are the machine's, and where files go is theirs to say."""
    places = [at for at, argument in enumerate(arguments) if argument in ("--results", "--work")]
    left = [argument for at, argument in enumerate(arguments) if at not in places and at - 1 not in places]
    return [Path(argument).name if argument[:1] == "/" else argument for argument in left]


def target(what: str, found: float, sign: str, wanted: float, bound: str) -> dict[str, Any]:
    """A target: what is measured, the figure, `≥` or `≤`, the wanted figure, and what bounds it where it is missed."""
    return {"what": what, "found": found, "sign": sign, "target": wanted, "bound": bound}


def begin(
    file: str,
    doc: str,
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    *,
    keep_memory: bool = True,
) -> Bench:
    """Parses the command line and pins the process; to be called before jax or torch is imported.

    Args:
      file: The script's `__file__`.
      doc: Its docstring.
      arguments: Adds options of its own.
      keep_memory: Whether freed memory stays with the process, as in nqf's entry points.
    """
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--repeats", type=int, default=0, help="timed runs of each side; 0 for the default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", help="folder of the result file; benchmarks/results by default")
    if arguments:
        arguments(parser)
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.quick else 5)
    if options.device == "auto":
        options.device = "gpu" if has_accelerator() else "cpu"
    pin(options.device, keep_memory)
    load = os.getloadavg()[0]
    return Bench(name=Path(file).stem, question=doc.splitlines()[0], options=options, started=started, load=load)


def has_accelerator() -> bool:
    """Whether jax's package for an accelerator is installed; jax itself may not be imported before pinning."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return False
    return any(importlib.util.find_spec(name) for name in ("jax_cuda13_plugin", "jax_cuda12_plugin", "libtpu"))


def pin(device: str, keep_memory: bool) -> None:
    """Two cores and as many threads for every library; memory and compiled programs as the entry points keep them."""
    from nqf.cli import keep_compiled_programs, keep_freed_memory

    keep_compiled_programs()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
        # Threads of OpenMP that wait for work must not take the cores of the other side.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(CORES)
        if keep_memory:
            keep_freed_memory()
    else:
        # torch is on the same card in the same process.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def torch_module(bench: Bench) -> Any:
    """torch, with as many threads as everything else, seeded."""
    import torch

    torch.set_num_threads(8 if bench.gpu else CORES)
    torch.manual_seed(bench.options.seed)
    return torch


# Timers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one side.

    Attributes:
      first: Seconds of the untimed first run, compilation included.
      seconds: Seconds of the timed runs.
    """

    first: float
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median of the timed runs."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Largest over smallest time."""
        return max(self.seconds) / min(self.seconds)


def alternate(sides: dict[str, Callable[[], object]], repeats: int, *, least: float = 0.0) -> dict[str, Timing]:
    """Times functions by turns; each has to wait for its own result.

    Args:
      sides: Name to function.
      repeats: Timed runs of each.
      least: Seconds that a run lasts at least: short functions are called several times in a run.
    """
    first, calls, seconds = {}, {}, {name: [] for name in sides}
    for name, run in sides.items():
        start = time.perf_counter()
        run()
        first[name] = time.perf_counter() - start
        start = time.perf_counter()
        run()
        calls[name] = max(1, math.ceil(least / (time.perf_counter() - start)))
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {name: Timing(first=first[name], seconds=seconds[name]) for name in sides}


def ratio(slow: Timing, fast: Timing) -> float:
    """Median over the turns of one side's time over the other's: what disturbs a turn disturbs both."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


# Limits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """Square matrices to multiply, as a side of `alternate`: what the machine can do at that moment."""

    run: Callable[[], object]
    flops: float


def product(dtype: str = "float32", size: int = 0) -> Product:
    """jax's product of two square matrices, with the result in float32 for 16-bit types."""
    import jax
    import jax.numpy as jnp

    size = size or (1_024 if jax.default_backend() == "cpu" else 8_192)
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return Product(run=lambda: multiply(x, x).block_until_ready(), flops=2.0 * size**3)


def copy_rate(mebibytes: int = 256) -> float:
    """Bytes per second read and written by a copy of an array on the device: the best within a second."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((mebibytes << 18,), jnp.float32)
    # An addition, because a copy alone is compiled away.
    copy = jax.jit(lambda x: x + 1.0)
    return 2 * x.nbytes / _best(lambda: copy(x).block_until_ready(), 1.0)


def file_rate(mebibytes: int = 256) -> float:
    """Bytes per second read from a file in the page cache: the best within a second."""
    buffer = bytearray(1 << 20)
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(mebibytes):
            file.write(os.urandom(1 << 20))
        file.flush()

        def read() -> None:
            with open(file.name, "rb", buffering=0) as source:
                while source.readinto(buffer):
                    pass

        return (mebibytes << 20) / _best(read, 1.0)


def _best(run: Callable[[], object], seconds: float) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def product_flops(function: Callable, *arguments: Any) -> float:
    """Operations of all matrix products of a jax function, those in the bodies of loops as often as they run."""
    import jax

    from nqf.training import compiled

    return compiled.product_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


# Memory


def status_bytes(key: str) -> int:
    """A field of /proc/self/status in bytes: VmHWM (peak), VmRSS, RssAnon or RssFile. Linux only."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Gives a function for the peak bytes since the start of the block: of the device, or on a CPU of this process.

    On an accelerator the peak is the allocator's since the process began, so that it only tells the largest block.
    """
    import jax

    device = jax.local_devices()[0]
    if (device.memory_stats() or {}).get("peak_bytes_in_use"):
        yield lambda: int(device.memory_stats()["peak_bytes_in_use"])
        return
    Path("/proc/self/clear_refs").write_text("5")  # Sets the high-water mark back.
    before = status_bytes("VmRSS")
    yield lambda: status_bytes("VmHWM") - before


# Traces


def trace_table(title: str, run: Callable[[], object], top: int = 8) -> dict[str, Any]:
    """Traces one call: a table of the operations that take longest."""
    import jax

    totals: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines:
                    for event in line.events:
                        name = dict(event.stats).get("hlo_op")
                        if name:
                            entry = totals.setdefault(re.sub(r"[.\d]+$", "", str(name)), [0, 0.0])
                            entry[0] += 1
                            entry[1] += event.duration_ns / 1e6
    whole = sum(value for _, value in totals.values()) or 1.0
    order = sorted(totals.items(), key=lambda item: -item[1][1])[:top]
    rows = [[name, int(calls), milliseconds, milliseconds / whole] for name, (calls, milliseconds) in order]
    return {"title": title, "columns": ["operation", "calls", "ms", "share"], "rows": rows}


# Descriptions


def table_options(folder: Path) -> list[str]:
    """Options of `nqf train` for a folder in which a benchmark wrote items.csv, interactions.csv and schema.yaml."""
    names = {"items": "items.csv", "interactions": "interactions.csv", "schema": "schema.yaml"}
    given = [part for key, name in names.items() for part in (f"--data.{key}", str(folder / name))]
    return ["--data.format", "table", *given]


def machine(device: str) -> str:
    """What the figures were measured on."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if device == "cpu":
        return f"{cpu}, {cores} cores"
    import jax

    return f"{jax.devices()[0].device_kind}, host {cpu}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """The checkout's commit, with + if nqf's files differ from it; empty outside of git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "nqf"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else ""


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def _rows_on_a_line(text: str) -> str:
    # Lists of scalars stand on one line each.
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: "[" + re.sub(r",\n\s+", ", ", found[1]) + "]", text)
