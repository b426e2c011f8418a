"""Checkpoints that were damaged are refused or come back bit for bit; those that do not fit are refused with names."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.training import checkpoint
from nqf.training.checkpoint import Checkpointer, CheckpointError, checksums, restore_params


def tree(seed: int = 0) -> dict[str, Any]:
    key = jax.random.key(seed)
    return {
        "params": {
            "dense": {"kernel": jax.random.normal(key, (64, 8)), "bias": jnp.zeros(8, jnp.bfloat16)},
            "table": jnp.arange(300, dtype=jnp.int32).reshape(100, 3),
        },
        "flags": jnp.array([True, False, True]),
        "step": jnp.asarray(7, jnp.int32),
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(7, tree(), best_step=7)
    return folder


def bits(state: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def restore(folder: Path) -> Any:
    with Checkpointer(folder) as checkpointer:
        latest = checkpointer.latest()
        assert latest == 7
        return checkpointer.restore(latest, tree(1))


def test_state_comes_back_bit_for_bit(checkpoints: Path) -> None:
    assert bits(restore(checkpoints)) == bits(tree())
    params = restore_params(checkpoints, 7, jax.eval_shape(tree)["params"])
    assert bits(params) == bits(tree()["params"])


def test_checksums_see_every_single_bit_and_every_exchange() -> None:
    # As seen by a bystander: numpy, element by element.
    words = np.array([3, 0, 2**31, 2**32 - 1], np.uint32)
    weights = (np.arange(4, dtype=np.uint64) * 2_654_435_762 + 1) % 2**32
    expected = int((words.astype(np.uint64) * weights % 2**32).sum() % 2**32)
    assert int(checksums({"x": jnp.asarray(words)})[0]) == expected
    table = np.zeros((4, 5), np.float32)
    sums = {0: int(checksums({"x": table})[0])}
    for place in range(table.size):
        for bit in range(32):
            changed = table.copy().view(np.uint32)
            changed.flat[place] ^= np.uint32(1 << bit)
            sums[place * 32 + bit + 1] = int(checksums({"x": changed.view(np.float32)})[0])
    assert all(sums[key] != sums[0] for key in sums if key)
    one = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    other = one.copy()
    other[[3, 40]] = one[[40, 3]]
    assert int(checksums({"x": one})[0]) != int(checksums({"x": other})[0])


@given(st.integers(0, 50), st.sampled_from(["float32", "bfloat16", "int32", "uint8", "bool"]), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_checksums_are_those_that_devices_add_up(size: int, dtype: str, seed: int) -> None:
    x = jnp.asarray(np.random.default_rng(seed).integers(-100, 100, size), dtype)
    with pytest.MonkeyPatch.context() as patch:
        # As an array of a hundred million elements is read, part by part.
        patch.setattr(checkpoint, "CHUNK", 7)
        assert checksums({"x": x}).tolist() == checkpoint._sums_on_devices([x]).tolist()


def damage(folder: Path, rng: random.Random) -> str:
    """Damages one file of a checkpoint; says how."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
    content = bytearray(path.read_bytes())
    kind = rng.choice(["bit", "cut", "zeros", "gone", "empty"])
    if kind == "bit":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "zeros":
        at = rng.randrange(len(content))
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if kind == "empty" else content)
    return f"{kind} {path.relative_to(folder)}"


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoint_is_refused_or_harmless(
    checkpoints: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    rng = random.Random(0)
    refused, harmless = [], []
    for number in range(120):
        folder = tmp_path / str(number)
        shutil.copytree(checkpoints, folder)
        what = damage(folder / "7", rng)
        try:
            state = restore(folder)
        except CheckpointError as error:
            assert str(folder / "7") in str(error) and "\n" not in str(error), error
            refused.append(what)
        else:
            assert bits(state) == bits(tree()), what
            harmless.append(what)
        shutil.rmtree(folder)
    # Some of the files are read by nobody; those that are, are noticed.
    assert len(refused) >= 30, (refused, harmless)
    record(
        "a file of a checkpoint with a flipped bit, cut off, zeroed in part, empty or gone",
        tried=120,
        survived=120,
        seen=f"{len(refused)} refused with the reason and what to do; {len(harmless)} came back bit for bit, as the "
        "damage was in what nothing is read from",
    )


def test_what_older_versions_did_not_have_is_zero_where_that_is_said(checkpoints: Path) -> None:
    wanted = jax.eval_shape(tree)["params"] | {"new": {"kernel": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    read = restore_params(checkpoints, 7, wanted, zero=["new/kernel", "dense/kernel", "nowhere"])
    np.testing.assert_array_equal(read.pop("new")["kernel"], np.zeros(3))
    # What the checkpoint has is read.
    assert bits(read) == bits(tree()["params"])
    with pytest.raises(CheckpointError, match="new/kernel: stored nothing"):
        restore_params(checkpoints, 7, wanted, zero=["new/bias"])


def test_checkpoint_of_another_model_is_refused_with_its_leaves(checkpoints: Path) -> None:
    wanted = tree()
    wanted["params"]["table"] = jnp.zeros((100, 4), jnp.int32)
    wanted["params"]["new"] = jnp.zeros(3)
    with Checkpointer(checkpoints) as checkpointer, pytest.raises(CheckpointError) as raised:
        checkpointer.restore(7, wanted)
    assert "params/new: stored nothing, expected (3,)" in str(raised.value)
    assert "params/table: stored (100, 3), expected (100, 4)" in str(raised.value)
    with pytest.raises(CheckpointError, match="no checkpoint of step 8; run the stage again"):
        restore_params(checkpoints, 8, tree()["params"])


def test_half_written_step_does_not_count(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints, tmp_path / "copy")
    shutil.copytree(checkpoints / "7", tmp_path / "copy" / "9.orbax-checkpoint-tmp")
    with Checkpointer(tmp_path / "copy") as checkpointer:
        assert checkpointer.latest() == 7
        checkpointer.save(9, tree(), best_step=7)
    with Checkpointer(tmp_path / "copy") as checkpointer:
        assert checkpointer.latest() == 9


def test_restoring_says_nothing(checkpoints: Path, capfd: pytest.CaptureFixture[str]) -> None:
    restore(checkpoints)
    restore_params(checkpoints, 7, tree()["params"])
    assert capfd.readouterr() == ("", "")
