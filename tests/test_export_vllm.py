"""`--format vllm`: the folder alone, without nqf, makes the prompts, the user vectors and the lists of the run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nqf import export, items, train
from nqf.serving.recommender import Recommender

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.ci]

# Runs in a process of its own, in the folder: what it knows of the run is the folder and the histories asked for.
PROGRAM = """
import json, sys
import numpy as np, torch, transformers
from safetensors.numpy import load_file
from prompts import Recommender

def language_model():
    if len(sys.argv) > 2:
        import peft
        base = transformers.AutoModel.from_pretrained(sys.argv[2], dtype=torch.float32)
        return peft.PeftModel.from_pretrained(base, "adapter").eval()
    return transformers.Qwen3Model.from_pretrained("model", dtype=torch.float32).eval()

recommender, model = Recommender("."), language_model()

def ask(user):
    history = recommender.history(**user)
    prompt = recommender.prompt(history)
    with torch.no_grad():
        hidden = model(inputs_embeds=torch.from_numpy(prompt)[None]).last_hidden_state[0].numpy()
    state = hidden[-1] if recommender.config["pooling"] == "last" else hidden.mean(0)
    return history, prompt, state

golden, users = load_file("golden.safetensors"), json.load(open("golden.json"))
worst = {"prompt": 0.0, "state": 0.0, "vector": 0.0, "score": 0.0}
for row, user in enumerate(users):
    history, prompt, state = ask(user["history"])
    length = int(golden["attention_mask"][row].sum())
    assert prompt.shape == (length, golden["inputs_embeds"].shape[2]) and prompt.dtype == np.float32
    best = recommender.recommend(history, golden["states"][row])
    assert [item for item, _ in best] == [item for item, _ in user["best"]], (best, user["best"])
    for name, found, expected in (
        ("prompt", prompt, golden["inputs_embeds"][row, :length]),
        ("state", state, golden["states"][row]),
        ("vector", recommender.user_vector(history, state), golden["vectors"][row]),
        ("score", [score for _, score in best], [score for _, score in user["best"]]),
    ):
        worst[name] = max(worst[name], float(np.abs(np.subtract(found, expected)).max()))
lists = [recommender.recommend(*(ask(user)[i] for i in (0, 2)), k=5) for user in json.load(open(sys.argv[1]))]
assert not {name.split(".")[0] for name in sys.modules} & {"nqf", "jax", "flax"}
print(json.dumps({"worst": worst, "lists": lists}))
"""


def exported(run: Path, folder: Path) -> Path:
    export.main([str(run), "--format", "vllm", "--output", str(folder)])
    return folder


def alone(folder: Path, asked: list[dict[str, Any]], *arguments: str) -> dict[str, Any]:
    """Runs the program in a folder where no nqf can be found."""
    path = folder.with_name("asked.json")
    path.write_text(json.dumps(asked))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", PROGRAM, str(path), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4_000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(run: Path, folder: Path, *arguments: str) -> None:
    recommender = Recommender.load(run)
    interactions = recommender._run.dataset.interactions
    asked, expected = [], []
    for user in range(0, len(interactions.user_ids), 7):
        span = slice(interactions.offsets[user], interactions.offsets[user + 1])
        items = [recommender.item_ids[row] for row in interactions.items[span]]
        times = interactions.times[span].tolist()
        ratings = [float(rating) if np.isfinite(rating) else None for rating in interactions.ratings[span]]
        table = recommender._run.features.reviews
        reviews = [table.values[at].tolist() if at >= 0 else None for at in table.rows[span]]
        asked.append({"items": items, "times": times, "ratings": ratings, "reviews": reviews})
        expected.append(recommender.recommend(user=interactions.user_ids[user], k=5))
        # And as someone that training never saw.
        asked.append({"items": items[-3:]})
        expected.append(recommender.recommend(history=items[-3:], k=5))
    for part in ("times", "ratings", "reviews"):
        assert any(value is not None for user in asked for value in user.get(part, [])), part
    found = alone(folder, asked, *arguments)
    assert max(found["worst"].values()) < 1e-4, found["worst"]
    for list_, frame in zip(found["lists"], expected, strict=True):
        assert [item for item, _ in list_] == frame["item_id"].to_list()
        np.testing.assert_allclose([score for _, score in list_], frame["score"], atol=1e-4)
    assert len({item for list_ in found["lists"] for item, _ in list_}) > 20


@pytest.fixture(scope="module")
def folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_run, tmp_path_factory.mktemp("export") / "vllm")


def test_whole_backbone(tiny_run: Path, folder: Path) -> None:
    check(tiny_run, folder)


def test_cooccurrence_and_removed_items(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    train.main(["--run", str(run), "--stage", "score", "--evaluation.cooccurrence-weight", "3.0"])
    history = Recommender.load(run).item_ids[3:6]
    plain, raised = (Recommender.load(of).recommend(history=history)["score"].to_list() for of in (tiny_run, run))
    assert plain != raised
    (tmp_path / "removed.csv").write_text(f"item_id\n{history[0]}\n")
    items.main(["remove", str(run), str(tmp_path / "removed.csv")])
    folder = exported(run, tmp_path / "vllm")
    assert not np.load(folder / "available.npy")[3]
    check(run, folder)


def test_another_prompt(tiny_run: Path, tmp_path: Path) -> None:
    """Mean pooling, no titles, no user tokens but interactions, and items that the language model reads too."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    options = {
        "joint.prompt.pooling": "mean",
        "joint.prompt.title-tokens": "0",
        "joint.candidates": "qwen3",
        "joint.loss.negatives": "sampled",
        "joint.loss.samples": "32",
        "joint.optim.epochs": "1",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    flags = ["--joint.prompt.no-user-tokens", "--joint.prompt.interactions"]
    for stage in ("joint", "score"):
        train.main(["--run", str(run), "--stage", stage, *arguments, *flags])
    check(run, exported(run, tmp_path / "vllm"))


def test_item_qformer(tiny_run: Path, folder: Path) -> None:
    """Tokens of items by the builder, from their fields, are those that the run has."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("prompts", folder / "prompts.py")
    prompts = importlib.util.module_from_spec(spec)
    sys.modules["prompts"] = prompts
    spec.loader.exec_module(prompts)
    builder, run = prompts.Recommender(folder), Recommender.load(tiny_run)._run
    for row in (0, 17, 239):
        values = {}
        for name in run.cache.names:
            value, present = run.cache.gather(name, np.array([row]))
            if present[0]:
                values[name] = value[0].astype(np.float32)
        tokens, _ = builder.item_tokens(values)
        # The tables are in float16.
        np.testing.assert_allclose(tokens, np.load(folder / "tokens.npy")[row], atol=4e-3)
    with pytest.raises(ValueError, match="unknown item ids"):
        builder.history(["nothing"])
    with pytest.raises(ValueError, match="the history is empty"):
        builder.history([])
    with pytest.raises(ValueError, match="different lengths"):
        builder.history(builder.item_ids[:2], times=[1])


IN_VLLM = pytest.mark.skipif(
    "NQF_VLLM_PYTHON" not in os.environ, reason="needs a Python with vLLM, which pins a torch of its own"
)


@IN_VLLM
def test_whole_backbone_in_vllm(tiny_run: Path, tmp_path: Path) -> None:
    """The program of the README, in vLLM, whose kernels want heads as wide as published ones."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for stage in ("joint", "score"):
        train.main(["--run", str(run), "--stage", stage, "--joint.backbone.head-dim", "32"])
    serve(exported(run, tmp_path / "vllm"))


def serve(folder: Path) -> None:
    """Runs the README's program with vLLM, and compares what it recommends and its states."""
    program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    program = "\n".join(f"    {line}" for line in program.splitlines())
    states = "json.dumps([output.outputs.embedding for output in outputs])"
    lines = ["if __name__ == '__main__':", program, f"    print('STATES', {states})"]
    (folder.parent / "serve.py").write_text("\n".join(lines).replace('float32",', 'float32", max_model_len=512,'))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    environment |= {"PYTHONPATH": str(folder), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [os.environ["NQF_VLLM_PYTHON"], str(folder.parent / "serve.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4_000:]
    found = np.array(json.loads(re.search(r"STATES (.*)", done.stdout)[1]))
    golden = load_file(folder / "golden.safetensors")["states"]
    cosine = np.sum(found * golden, axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(golden, axis=1)
    print("cosine", cosine.tolist(), "largest difference", np.abs(found - golden).max())
    np.testing.assert_allclose(cosine, 1, atol=1e-4)
    for user in json.loads((folder / "golden.json").read_text()):
        items = re.escape(", ".join(f"('{item}'" for item, _ in user["best"][:1]))
        assert re.search(rf"^\[{items}", done.stdout, re.MULTILINE)
