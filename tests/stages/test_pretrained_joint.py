"""The joint stage on a pretrained backbone, from training to the adapter in peft and the model in transformers."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import transformers  # noqa: E402
from published import save_random  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from test_export_vllm import IN_VLLM, check, serve  # noqa: E402

from nqf import export, train  # noqa: E402
from nqf.interop.huggingface import golden_difference, load_qwen3  # noqa: E402
from nqf.interop.peft import load_adapter  # noqa: E402
from nqf.interop.tensors import folder_digest  # noqa: E402
from nqf.interop.tokenizer import load_tokenizer, train_byte_bpe  # noqa: E402
from nqf.models.qwen3 import Qwen3  # noqa: E402
from nqf.serving.recommender import Recommender  # noqa: E402
from nqf.stages import joint as joint_stage  # noqa: E402
from nqf.stages.run import open_run  # noqa: E402
from nqf.training import loop  # noqa: E402
from nqf.training.checkpoint import restore_params  # noqa: E402
from nqf.training.program import Program  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.ci]
OPTIONS = {
    "joint.backbone.lora-rank": 4,
    "joint.prompt.title-tokens": 2,
    "joint.optim.epochs": 8,
    "joint.optim.learning-rate": 3e-3,
    "joint.optim.adapter-learning-rate": 1e-2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub's: random weights in bfloat16 and a tokenizer with fewer tokens than the embedding's rows."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=340,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Not narrower than vLLM's kernels.
        head_dim=32,
        tie_word_embeddings=True,
    )
    save_random(config, folder)
    train_byte_bpe(["a lamp for the deep sea", "the old garden chair"] * 3, 300).save(folder)
    return folder


def train_on(
    base: Path, tiny_run: Path, run: Path, stages: Sequence[str] = ("joint", "score"), **options: Any
) -> dict[str, list[bytes]]:
    """Runs the joint stage on a copy of a finished run; returns the base's bits before and after training."""
    shutil.copytree(tiny_run, run)
    bits = {}
    fit = loop.fit

    def watched(program: Program, *arguments: Any, **options: Any) -> Any:
        qwen3 = program.frozen()["params"]["qwen3"]
        bits["before"] = [np.asarray(x).tobytes() for x in jax.tree.leaves(qwen3)]
        result = fit(program, *arguments, **options)
        bits["after"] = [np.asarray(x).tobytes() for x in jax.tree.leaves(qwen3)]
        return result

    options = OPTIONS | {"joint.backbone.path": base} | options
    arguments = [part for name, value in options.items() for part in (f"--{name}", *str(value).split())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "fit", watched)
        for stage in stages:
            train.main(["--run", str(run), "--stage", stage, *arguments])
    return bits


@pytest.fixture(scope="module")
def trained(base: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """The run folder, the base's bits before and after, and the digest of its files before."""
    digest = folder_digest(base)
    run = tmp_path_factory.mktemp("pretrained") / "run"
    return run, train_on(base, tiny_run, run), digest


def exported(run: Path, format: str, folder: Path) -> Path:
    export.main([str(run), "--format", format, "--output", str(folder)])
    return folder


def run_readme(folder: Path) -> float:
    """Runs the program in a folder's README; returns the difference that it prints."""
    program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(program, {})
    return float(printed.getvalue())


def test_adapters_learn_and_the_base_does_not(trained: tuple[Path, dict, str], base: Path) -> None:
    run, bits, digest = trained
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["stage"] == "joint" and "loss" in line]
    assert len(losses) == 8 and max(losses[-2:]) < min(losses[:2]) - 0.1
    # Bit for bit, in memory and on disk.
    assert bits["before"] == bits["after"] and len(bits["before"]) == 13
    assert folder_digest(base) == digest
    assert bits["before"] == [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(load_qwen3(base)[1])]
    # Nothing of the base is in the checkpoint; all of the adapters is, and B has left zero everywhere.
    opened = open_run(run)
    joint = joint_stage.joint_parts(opened)
    shapes = jax.eval_shape(lambda: joint_stage.init_joint(opened, joint))
    assert "qwen3" not in shapes["params"] and set(shapes["lora"]) == {"qwen3"}
    step = json.loads((run / "joint" / "stage.json").read_text())["result"]["best_step"]
    lora = restore_params(run / "joint" / "checkpoints", step, shapes)["lora"]["qwen3"]
    layers = lora["layers"]
    assert {name for block in layers.values() for name in block} == set(opened.config.joint.backbone.lora_targets)
    assert all(np.abs(tree["lora_b"]).max() > 1e-4 for block in layers.values() for tree in block.values())


@pytest.fixture(scope="module")
def adapter(trained: tuple[Path, dict, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(trained[0], "peft", tmp_path_factory.mktemp("export") / "adapter")


def test_peft_makes_the_user_vectors(
    adapter: Path, trained: tuple[Path, dict, str], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained[0]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == 4
    assert run_readme(adapter) < 1e-4
    assert load_tokenizer(adapter).encode(["lamp"], add_eos=True) == load_tokenizer(base).encode(["lamp"], add_eos=True)
    # By hand, up to the user vectors that rank.
    golden = {name: torch.tensor(array) for name, array in load_file(adapter / "golden.safetensors").items()}
    model = peft.AutoPeftModelForFeatureExtraction.from_pretrained(adapter, dtype=torch.float32).eval()
    assert len(set(golden["attention_mask"].sum(1).tolist())) > 1, "all prompts are of one length"

    def pooled(model: Any) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(inputs_embeds=golden["inputs_embeds"], attention_mask=golden["attention_mask"])
        last = golden["attention_mask"].sum(1) - 1
        return hidden.last_hidden_state[torch.arange(len(last)), last]

    states = pooled(model).numpy()

    def states_of_peft(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, Qwen3) and context.method_name == "__call__":
            # At every token, so wherever the state is picked.
            return jnp.zeros_like(kwargs["inputs_embeds"]).at[: len(states)].set(states[:, None])
        return call(*args, **kwargs)

    # One length of history for all, so that the first rows of the first batch are the users of the golden prompts.
    monkeypatch.setattr("nqf.serving.recommender.slot_buckets", lambda most: (most,))
    recommender = Recommender.load(run)
    with nn.intercept_methods(states_of_peft):
        found = recommender.encode_all_users()[1]
    monkeypatch.undo()
    ids, expected = Recommender.load(run).encode_all_users()
    assert ids == open_run(run).dataset.interactions.user_ids
    np.testing.assert_allclose(found[: len(states)], expected[: len(states)], atol=1e-4)
    assert np.abs(found[len(states) :] - expected[len(states) :]).max() > 1e-2  # States of nobody make other vectors.
    # And it is the adapter that makes them.
    with model.disable_adapter():
        vectors = torch.nn.functional.normalize(pooled(model), dim=1)
    assert (vectors - golden["vectors"]).abs().max() > 1e-2


def test_exports_read_back(adapter: Path, trained: tuple[Path, dict, str], base: Path, tmp_path: Path) -> None:
    model, params = load_qwen3(base)
    config, lora = load_adapter(adapter, model.config)
    assert golden_difference(adapter, Qwen3(config), {"params": params, "lora": lora}) < 1e-5
    merged = exported(trained[0], "huggingface", tmp_path / "merged")
    assert run_readme(merged) < 1e-4
    # The same prompts, and vectors that differ by the rounding of the merge alone.
    ours, theirs = (load_file(folder / "golden.safetensors") for folder in (merged, adapter))
    np.testing.assert_array_equal(ours["inputs_embeds"], theirs["inputs_embeds"])
    np.testing.assert_allclose(ours["vectors"], theirs["vectors"], atol=1e-4)
    again, params = load_qwen3(merged)
    assert golden_difference(merged, again, {"params": params}, name="golden_texts.safetensors") < 1e-5
    # transformers, as sentence-transformers runs it by the folder's modules.
    from safetensors import safe_open

    with safe_open(merged / "golden_texts.safetensors", framework="pt") as file:
        texts, expected = json.loads(file.metadata()["texts"]), file.get_tensor("vectors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    model = transformers.AutoModel.from_pretrained(merged, dtype=torch.float32).eval()
    pooling = json.loads((merged / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_lasttoken"] and len(texts) == 4
    for text, vector in zip(texts, expected, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        assert (torch.nn.functional.normalize(hidden, dim=0) - vector).abs().max() < 1e-4


def test_vllm_folder_recommends_without_nqf(trained: tuple[Path, dict, str], base: Path, tmp_path: Path) -> None:
    folder = exported(trained[0], "vllm", tmp_path / "vllm")
    check(trained[0], folder, str(base))
    # peft and vLLM read the same adapter.
    assert (folder / "adapter" / "adapter_config.json").is_file() and not (folder / "model").exists()


@IN_VLLM
def test_adapter_in_vllm(trained: tuple[Path, dict, str], tmp_path: Path) -> None:
    serve(exported(trained[0], "vllm", tmp_path / "vllm"))


# Each option alone; beside it everything is as in `trained`, for two epochs.
ALONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "remat": {"joint.backbone.remat": ""},
    "mean pooling": {"joint.prompt.pooling": "mean"},
    "interactions": {"joint.prompt.interactions": ""},
    "micro-batches": {"joint.micro-batch": 8},
    "tied candidates": {"joint.candidates": "qwen3", "joint.loss.negatives": "in-batch"},
    "mined negatives": {"joint.mining.count": 3, "joint.loss.negatives": "sampled", "joint.loss.samples": 64},
    "bfloat16": {"training.dtype": "bfloat16"},
}

READ_OTHERWISE = ("mean pooling", "interactions", "tied candidates", "bfloat16")
"""Those that also change how a trained model reads: the others are seen in the losses alone."""


def curve_of(base: Path, tiny_run: Path, run: Path, option: str) -> list[float]:
    """The losses of two epochs."""
    stages = ("joint", "score") if option in READ_OTHERWISE else ("joint",)
    bits = train_on(base, tiny_run, run, stages, **ALONE[option], **{"joint.optim.epochs": 2})
    assert bits["before"] == bits["after"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == "joint" and "loss" in line][-2:]


@pytest.fixture(scope="module")
def plain(base: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return curve_of(base, tiny_run, tmp_path_factory.mktemp("plain") / "run", "plain")


@pytest.mark.parametrize("option", list(ALONE)[1:])
def test_each_option_alone(option: str, base: Path, tiny_run: Path, tmp_path: Path, plain: list[float]) -> None:
    curve = curve_of(base, tiny_run, tmp_path / "run", option)
    assert np.isfinite(curve).all() and plain[1] < plain[0]
    if option == "remat":
        # The same numbers, computed twice.
        np.testing.assert_allclose(curve, plain, rtol=1e-3)
    elif option == "bfloat16":
        np.testing.assert_allclose(curve, plain, rtol=0.02)
    else:
        assert np.abs(np.subtract(curve, plain)).max() > 1e-4
    if option in READ_OTHERWISE:
        run = open_run(tmp_path / "run")
        frame = Recommender.load(run.folder).recommend(user=run.dataset.interactions.user_ids[0], k=3)
        assert len(frame) == 3 and frame["score"].is_finite().all()


def test_item_qformer_learns_on_beside_a_pretrained_backbone(base: Path, tiny_run: Path, tmp_path: Path) -> None:
    options = {
        "joint.train-item-qformer": "",
        "joint.backbone.lora-targets": "q_proj v_proj",
        "joint.loss.negatives": "sampled",
        "joint.loss.samples": 64,
        "joint.optim.epochs": 1,
    }
    bits = train_on(base, tiny_run, tmp_path / "run", **options)
    assert bits["before"] == bits["after"]
    run = open_run(tmp_path / "run")
    start, (_, learned) = joint_stage.load_items(run)[1], joint_stage.load_joint(run).load_item_qformer()
    moved = jax.tree.map(lambda old, new: float(np.abs(old - new).max()), start, learned)
    assert max(jax.tree.leaves(moved)) > 1e-4
    # What ranks are the tokens of the Item Q-Former that learned on.
    new, old = (np.load(run.folder / part / "tokens.npy").astype(np.float32) for part in ("joint/tokens", "tokens"))
    assert np.abs(new - old).max() > 1e-3
    frame = Recommender.load(run.folder).recommend(user=run.dataset.interactions.user_ids[0], k=3)
    assert len(frame) == 3
