"""Both towers as StableHLO: loaded by jax alone, they make the vectors of the recommender."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nqf import Recommender, export

pytestmark = pytest.mark.slow
ALONE = """
import sys
import jax, jax.export
import numpy as np

folder = sys.argv[1]
assert "nqf" not in sys.modules
arrays = np.load(f"{folder}/asked.npz")

def tower(name):
    return jax.export.deserialize(bytearray(open(f"{folder}/{name}.bin", "rb").read())).call

history = [arrays[name] for name in ("items", "calendar", "age", "ratings")]
users = np.asarray(tower("user-64")(*history))
one = np.asarray(tower("user-1")(*(part[3:4] for part in history)))
items = np.asarray(tower("item-64")(np.arange(64, dtype=np.int32)))
np.savez(f"{folder}/found.npz", users=users, one=one, items=items)
"""


def test_towers_without_nqf(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "towers"
    export.main([str(tiny_run), "--format", "stablehlo", "--output", str(folder)])
    rec, about = Recommender.load(tiny_run), json.loads((folder / "towers.json").read_text())
    assert json.loads((folder / "ids.json").read_text()) == rec.item_ids
    slots = about["slots"]
    histories = [rec.item_ids[start : start + 1 + start % 7] for start in range(64)]
    items = np.full((64, slots), -1, np.int32)
    for row, history in enumerate(histories):
        items[row, -len(history) :] = [rec.item_ids.index(item) for item in history]
    unknown = np.full((64, slots), -1, np.int32)
    np.savez(folder / "asked.npz", items=items, calendar=np.full((64, slots, 3), -1, np.int32), age=unknown,
             ratings=unknown)  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(folder)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = np.load(folder / "found.npz")
    expected = rec.encode_users(histories)
    np.testing.assert_allclose(found["users"], expected, atol=1e-5)
    np.testing.assert_allclose(found["one"], expected[3:4], atol=1e-5)
    np.testing.assert_allclose(found["items"], rec.item_vectors[:64], atol=1e-5)
