"""The layout of checkpoints as docs/training.md has it, read by Orbax alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from nqf.stages.item import load_items
from nqf.stages.joint import load_joint
from nqf.stages.run import open_run
from nqf.stages.user import load_users

pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[2] / "docs" / "training.md"
# Follows the program of the page, whose names it uses.
REST = """
import sys
import numpy as np
leaves, about = {}, {}
for stage in ("item", "user", "joint"):
    folder = folder.parent / stage
    step = json.loads((folder / "stage.json").read_text())["result"]["best_step"]
    path = folder.resolve() / "checkpoints" / str(step)
    stored = ocp.metadata(path, "state").metadata
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), stored)
    state = ocp.load_checkpointables(path, {"state": wanted})["state"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"]):
        leaves[f"{stage}/{jax.tree_util.keystr(path, simple=True, separator='/')}"] = np.asarray(leaf)
    about[stage] = {"names": sorted(state), "sums": len(state["checksum"]), "leaves": len(jax.tree.leaves(state)),
                    "step": int(state["step"]) == step}
assert kernel.shape == leaves["joint/params/item_projection/kernel"].shape
assert not [name for name in sys.modules if name.split(".")[0] == "nqf"]
np.savez(sys.argv[1], **leaves)
print(json.dumps(about))
"""


def test_orbax_alone_reads_the_checkpoints(tiny_run: Path, tmp_path: Path) -> None:
    section = re.search(r"## Checkpoints without nqf\n(.*?)\n## ", DOCS.read_text(), re.DOTALL)[1]
    program = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    program = program.replace("runs/quickstart/joint", str(tiny_run / "joint")) + REST
    command = [sys.executable, "-c", program, str(tmp_path / "leaves.npz")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3_000:]

    state, modules = re.findall(r"(?<=\n\n)\| .*?\n(?=\n)", section, re.DOTALL)
    documented = {name for line in state.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    about = json.loads(done.stdout.splitlines()[-1])
    for stage in about.values():
        assert set(stage["names"]) == documented and stage["step"]
        # A sum for every leaf but that of the sums themselves.
        assert stage["sums"] == stage["leaves"] - 1

    found, run = dict(np.load(tmp_path / "leaves.npz")), open_run(tiny_run)
    assert {leaf.dtype for leaf in found.values()} == {np.dtype(np.float32)}
    rows = {line.split("|")[1].strip(): set(re.findall(r"`(\w+)`", line)) for line in modules.splitlines()[2:]}
    expected = {"item": load_items(run)[1]}
    for stage, load in (("user", load_users), ("joint", load_joint)):
        tree = load(run).variables["params"]
        expected[stage] = {"params": tree} if stage == "joint" else tree
        assert set(tree) == rows[stage]
    flat = traverse_util.flatten_dict(expected, sep="/")
    assert set(flat) == set(found)
    for name, leaf in flat.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
