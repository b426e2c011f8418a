"""Tokens of many items in parts: whoever makes them, however often it was killed, they are those of one process."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nqf.evaluation import shares as module
from nqf.evaluation.shares import Shares
from nqf.stages import tokens
from nqf.stages.graph import run_stage
from nqf.stages.item import load_items
from nqf.stages.records import fingerprint, read_artifact
from nqf.stages.run import Run, open_run

ROOT = Path(__file__).parents[2]
SIZE, CHUNK = 48, 16
MADE = ("tokens.npy", "vectors.npy", "whitening.npz")
# The stage with small parts, in a process that ends itself after some of them.
SMALL = f"""
import os, signal, sys, time
from pathlib import Path
from nqf import files
from nqf.evaluation import shares
from nqf.stages import tokens
shares.CASES, tokens.ENCODE_CHUNK, left = {SIZE}, {CHUNK}, int(sys.argv[2])
"""
CUT = f"""
{SMALL}
whole = files.whole
def counted(path, *mode):
    global left
    left -= Path(path).name.startswith("items-")
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(path, *mode)
files.whole = counted
from nqf.train import main
main(["--run", sys.argv[1], "--stage", "tokens"])
"""


# The same in a process that says which parts it made, and leaves the other one time for some.
TOLD = f"""
{SMALL}
whole = files.whole
def told(path, *mode):
    if Path(path).name.startswith("items-"):
        print(Path(path).name)
        time.sleep(1)
    return whole(path, *mode)
files.whole = told
from nqf.train import main
main(["--run", sys.argv[1], "--stage", "tokens", "--training.distributed"])
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CASES", SIZE)
    monkeypatch.setattr(tokens, "ENCODE_CHUNK", CHUNK)


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Run:
    """A run whose tokens have yet to be made; 240 items are five parts."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("eval", "tensorboard", ".lock*"))
    shutil.rmtree(folder / "tokens")
    return open_run(folder, Console(file=io.StringIO()))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in MADE}


@pytest.fixture
def expected(run: Run, tmp_path: Path) -> dict[str, bytes]:
    """What one process makes that keeps no parts."""
    tokens.write_tokens(run, *load_items(run), tmp_path / "expected")
    return bytes_of(tmp_path / "expected")


def test_the_stage_leaves_what_one_process_makes_and_no_parts(run: Run, expected: dict[str, bytes]) -> None:
    assert run_stage(run, "tokens")
    made = bytes_of(run.folder / "tokens")
    assert set(made) == set(MADE) and {name: made[name] for name in expected} == expected
    names = {path.name for path in (run.folder / "tokens").iterdir()}
    assert names == {*MADE, "stage.json", "started.json"}
    assert read_artifact(run.folder, "tokens").result["items"] == 240


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_any_number_of_makers_make_the_same(workers: int, run: Run, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Each makes what the others leave, in an order of its own."""
    shares, encode = Shares(folder=tmp_path / "parts"), tokens.make_encode(*load_items(run), run.cache)
    for worker in range(workers):
        for number in range(worker, 5, workers):
            made = encode(slice(SIZE * number, SIZE * (number + 1)))
            shares.folder.mkdir(exist_ok=True)
            with open(shares.folder / f"items-{number:05d}.npz", "wb") as file:
                np.savez(file, **made)
    tokens.write_tokens(run, *load_items(run), tmp_path / "made", shares)
    assert bytes_of(tmp_path / "made") == expected


@pytest.mark.ci
def test_a_killed_stage_goes_on_with_its_parts(run: Run, expected: dict[str, bytes]) -> None:
    for whole in (0, 2, 1):
        done = subprocess.run([sys.executable, "-c", CUT, str(run.folder), str(whole)], cwd=ROOT, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(path.name for path in run.folder.glob("tokens/parts-*/items-*.npz"))
    assert left == [f"items-{number:05d}.npz" for number in range(3)]
    times = {path: os.stat(path).st_mtime_ns for path in run.folder.glob("tokens/parts-*/items-*.npz")}
    encoded = []
    encode = tokens.gather_fields

    def watched(cache: object, rows: np.ndarray) -> object:
        encoded.append(int(rows[0]))
        assert all(os.stat(path).st_mtime_ns == time for path, time in times.items())
        return encode(cache, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "gather_fields", watched)
        assert run_stage(run, "tokens")
    # The last two parts alone, three chunks of each.
    assert encoded == list(range(3 * SIZE, 240, CHUNK))
    made = bytes_of(run.folder / "tokens")
    assert {name: made[name] for name in expected} == expected


@pytest.mark.ci
def test_the_processes_of_a_run_share_the_parts(run: Run, expected: dict[str, bytes]) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    together = [
        subprocess.Popen(
            [sys.executable, "-c", TOLD, str(run.folder), "0"],
            cwd=ROOT,
            env={**os.environ, **joined, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=1_200)[0] for process in together]
    finally:
        for process in together:
            process.kill()
    assert [process.returncode for process in together] == [0, 0], "\n".join(said)
    made = [re.findall(r"items-\d+\.npz", text) for text in said]
    assert sorted(made[0] + made[1]) == [f"items-{number:05d}.npz" for number in range(5)]
    assert min(map(len, made)) >= 1, "one of them made all"
    left = bytes_of(run.folder / "tokens")
    assert {name: left[name] for name in expected} == expected
    assert {path.name for path in (run.folder / "tokens").iterdir()} == {*MADE, "stage.json", "started.json"}


def test_a_file_that_is_no_part_is_kept_and_parts_of_other_models_are_none(run: Run) -> None:
    folder = run.folder / "tokens" / f"parts-{tokens._made_of(run)}"
    folder.mkdir(parents=True)
    (folder / "items-00001.npz").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"items-00001.npz: not a part of this work .*; move it away"):
        tokens.write_tokens(run, *load_items(run), run.folder / "tokens", Shares(folder=folder))
    assert (folder / "items-00001.npz").read_bytes() == b"mine"
    # Another Item Q-Former, another name.
    record, before = run.folder / "item" / "stage.json", tokens._made_of(run)
    tree = {key: value for key, value in json.loads(record.read_text()).items() if key != "sha256"}
    tree["files"] = dict.fromkeys(tree["files"], "other")
    record.write_text(json.dumps(tree | {"sha256": fingerprint(tree)}))
    assert tokens._made_of(run) != before
