"""`python -m nqf.export`: a trained run in other people's formats."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from nqf.cli import guard, parse, program
from nqf.config import section
from nqf.files import masked

if TYPE_CHECKING:
    from nqf.serving.recommender import Recommender
    from nqf.stages.rank import RankParts
    from nqf.stages.run import Run

# Users and titles in the golden files.
_GOLDEN_ROWS = 4
_README = """\
{about} Written by `python -m nqf.export`.

`golden.safetensors` holds prompts of some users as the model reads them, item and user tokens injected, and the unit
vectors that it makes of them. Run in this folder, this prints a difference below 1e-4:

```python
import torch
from safetensors.torch import load_file
{load}

golden = load_file("golden.safetensors")
mask = golden["attention_mask"]
with torch.no_grad():
    hidden = model.eval()(inputs_embeds=golden["inputs_embeds"], attention_mask=mask).last_hidden_state
vectors = torch.nn.functional.normalize({pool}, dim=-1)
print((vectors - golden["vectors"]).abs().max().item())
```
"""
_INDEX = """\
Vectors of a trained run and what its score counts beside them. Written by `python -m nqf.export --format index`.

Run in this folder, this prints what `nqf recommend` does for the first user. `vectors.npy` may stand in any index of
inner products (faiss, usearch): take its best k + n items, n being the number of columns that `newest[user] @ pairs`
holds, add the sparse row to these scores and to those columns', and sort.

```python
import json
import numpy as np
import scipy.sparse

items, users = (json.load(open(name)) for name in ("ids.json", "user_ids.json"))
newest, pairs, seen = (scipy.sparse.load_npz(f"{name}.npz") for name in ("newest", "pairs", "seen"))
user = 0
scores = np.load("users.npy")[user] @ np.load("vectors.npy").T + (newest[[user]] @ pairs).toarray()[0]
scores[seen[[user]].indices] = -np.inf
print(users[user], [items[row] for row in np.argsort(-scores, kind="stable")[:10]])
```
{dense}"""
_DENSE = """
An index that holds dense vectors alone has `dense_vectors.npy` in their place: `np.load("dense_users.npy")[user] @
np.load("dense_vectors.npy").T` is nearly that score. The pairs are in their last {width} columns, factorized:
`newest @ np.load("dense_history.npy")` are those columns of the users, so that a new event changes a user's vector
without the model. What it loses is the difference of the rows `joint` and `joint_vectors` of the run's evaluation.
"""
_PEFT = """from peft import AutoPeftModelForFeatureExtraction

model = AutoPeftModelForFeatureExtraction.from_pretrained(".", dtype=torch.float32)"""
_MERGED = """from transformers import AutoModel

model = AutoModel.from_pretrained(".", dtype=torch.float32)"""
_POOL = {
    "last": "hidden[torch.arange(len(mask)), mask.sum(1) - 1]",
    "mean": "(hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
}


@section
class ExportArguments:
    """Writes a trained run in other people's formats.

    Attributes:
      run: Run folder, or its address (`gs://`, `s3://`, ...).
      format: `peft`: the adapter of a pretrained backbone. `huggingface`: the whole backbone, adapters merged in
        float32, for transformers and sentence-transformers. `index`: vectors and ids, for a nearest-neighbor index by
        inner product, and what co-occurrence adds as sparse matrices. `parquet`: item vectors and the users' vectors
        as tables, without what co-occurrence adds. `vllm`: all that recommends without nqf: the adapter or the
        backbone, item tables, Q-Formers, projections and head, a builder of prompts in numpy, and golden files.
        `stablehlo`: both towers as programs that jax.export reads without nqf (`nqf.serving.stablehlo`).
      output: Folder to make.
      debug: Show the traceback of an error.
    """

    run: Annotated[str | Path, tyro.conf.Positional]
    format: Literal["peft", "huggingface", "index", "parquet", "vllm", "stablehlo"]
    output: Path
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
      ValueError: The output exists, or the run has nothing to write in that format.
      StageError: The run or its joint stage is missing or stale.
    """
    options = parse(ExportArguments, arguments, prog=program("export"))
    from nqf.stages.remote import local_run

    output = options.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists already; name a new folder")
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        with local_run(options.run) as (folder, _):
            if options.format in ("peft", "huggingface"):
                export_backbone(folder, options.format, unfinished)
            elif options.format == "vllm":
                export_vllm(folder, unfinished)
            elif options.format == "stablehlo":
                export_towers(folder, unfinished)
            else:
                export_vectors(folder, options.format, unfinished, name=masked(str(options.run)))
        unfinished.replace(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"wrote {', '.join(sorted(path.name for path in output.iterdir()))} to {output}")


def export_towers(run_folder: Path, folder: Path) -> None:
    """Writes both towers as StableHLO: see `nqf.serving.stablehlo`."""
    try:
        import flatbuffers  # noqa: F401  # What jax.export writes with, which jax does not bring along.
    except ModuleNotFoundError:
        raise RuntimeError("flatbuffers is not installed; pip install 'nqf[stablehlo]'") from None
    from nqf.serving.recommender import Recommender
    from nqf.serving.stablehlo import write_towers

    write_towers(Recommender.load(run_folder), folder)


def export_backbone(run_folder: Path, format: Literal["peft", "huggingface"], folder: Path) -> None:
    """Writes the trained Qwen3, with its tokenizer and golden files, into an existing folder.

    `golden.safetensors` holds prompts of some users as the Qwen3 reads them, item and user tokens injected, and the
    unit vectors that it makes of them; `golden_texts.safetensors` (merged models) the same of some titles.
    """
    import jax.numpy as jnp

    from nqf.interop.huggingface import export_merged
    from nqf.interop.peft import export_adapter
    from nqf.models.qwen3 import Qwen3
    from nqf.stages.graph import require
    from nqf.stages.joint import load_joint
    from nqf.stages.run import open_run

    run = open_run(run_folder)
    config = run.config.joint
    if format == "peft" and not config.backbone.path:
        raise ValueError(
            f"{run.folder}: its backbone was trained whole (joint.backbone.path is empty), so there is no adapter; "
            "use --format huggingface"
        )
    require(run, "joint")
    trained = load_joint(run, before=run.dataset.split.test)
    joint, variables, tokenizer = trained.parts, trained.variables, trained.parts.tokenizer
    assert tokenizer is not None, "the joint stage has a tokenizer"
    # Golden vectors are those of float32, which every other implementation can be held to.
    model = Qwen3(dataclasses.replace(joint.module.reader.qwen3, dtype=jnp.float32, attention="xla"))
    qwen3 = {name: tree["qwen3"] for name, tree in variables.items() if "qwen3" in tree}
    prompts, pooling = injected_prompts(run, joint, variables), config.prompt.pooling
    if format == "peft":
        base = config.backbone.path
        # A relative folder would be looked for beside whoever loads the adapter.
        base = str(Path(base).resolve()) if Path(base).is_dir() else base
        export_adapter(folder, model, qwen3, tokenizer, golden=prompts, base=base, pooling=pooling)
        about, load = f"LoRA adapter of `{config.backbone.path}`, trained to rank.", _PEFT
    else:
        chunk = next(run.dataset.catalogue.chunks(["title"], 1_024))
        texts = [title for title in chunk["title"] if title][:_GOLDEN_ROWS]
        export_merged(folder, model, qwen3, tokenizer, golden=prompts, texts=texts, pooling=pooling)
        about, load = "Qwen3 trained to rank, for transformers and sentence-transformers.", _MERGED
    readme = _README.format(about=about, load=load, pool=_POOL[pooling])
    (folder / "README.md").write_text(readme, encoding="utf-8")


def export_vllm(run_folder: Path, folder: Path) -> None:
    """Writes the backbone, or its adapter, and all that recommends beside it, into an existing folder.

    See `nqf.tools.prompt_builder`, which is put there as `prompts.py`.
    """
    from nqf.serving.recommender import Recommender
    from nqf.stages.run import open_run
    from nqf.tools.vllm import write_recommender

    run, recommender = open_run(run_folder), Recommender.load(run_folder)
    base = run.config.joint.backbone.path
    language = "adapter" if base else "model"
    (folder / language).mkdir()
    export_backbone(run_folder, "peft" if base else "huggingface", folder / language)
    base = str(Path(base).resolve()) if base and Path(base).is_dir() else base
    write_recommender(run, recommender, folder, language=language, base=base)


def injected_prompts(run: Run, joint: RankParts, variables: Any) -> dict[str, np.ndarray]:
    """Prompts of the first users as the Qwen3 reads them, without the padding inside: inputs of `Qwen3.__call__`.

    Returns:
      `inputs_embeds` float32 [users, T, D] and `attention_mask` int32 [users, T], padded on the right. The state of
      the last token (or the mean, by the run's pooling) is what the user vector is made of.
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from nqf.models.qwen3 import Qwen3
    from nqf.pipelines.batches import HistoryBatch
    from nqf.pipelines.histories import gather_history, newest, number_by_rows

    spans = itertools.pairwise(run.dataset.interactions.offsets[: _GOLDEN_ROWS + 1])
    events = np.stack([newest(np.arange(start, stop), run.config.user.max_history) for start, stop in spans])
    none = np.full((len(events), 0), -1, np.int32)
    batch = HistoryBatch(history=gather_history(run.features, events), targets=none, supervised=none.ravel())
    batch = number_by_rows(batch, joint.tables)

    @jax.jit
    def read(variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        inputs: dict[str, jax.Array] = {}

        def keep_inputs(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
            if isinstance(context.module, Qwen3) and context.method_name == "__call__":
                inputs.update(kwargs)
                embeds, read_at = kwargs["inputs_embeds"], kwargs["read_at"]
                return embeds if read_at is None else embeds[:, : read_at.shape[1]]
            if isinstance(context.module, Qwen3) and context.method_name == "read_prefix":
                inputs["instruction"] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(keep_inputs):
            # The users alone: a Qwen3 that reads items, too, would be called for them as well.
            learned = joint.module.apply(variables, batch.tables, batch.rows, method="learned")
            of_users = (batch.tables, learned, batch.history, joint.prompt)
            joint.module.apply(variables, *of_users, positions=2, method="users")
        # What the end token of the newest branch, which stands last, reads is the whole prompt of inference.
        embeds = inputs["inputs_embeds"]
        if "instruction" in inputs:
            instruction = jnp.repeat(inputs["instruction"], len(embeds), axis=0)
            embeds = jnp.concatenate([instruction, embeds], axis=1)
        return embeds.astype(jnp.float32), inputs["mask"][:, 0, -1]

    if run.config.joint.prompt.history_items < 2:
        raise ValueError(f"{run.folder}: prompts of one item (joint.prompt.history_items) are not exported")
    embeds, valid = (np.asarray(array) for array in read(variables, batch))
    lengths = valid.sum(axis=1)
    packed = np.zeros((len(embeds), lengths.max(), embeds.shape[2]), np.float32)
    for row, length in enumerate(lengths):
        packed[row, :length] = embeds[row, valid[row]]
    return {
        "inputs_embeds": packed,
        "attention_mask": (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int32),
    }


def export_vectors(
    run_folder: Path, format: Literal["index", "parquet"], folder: Path, *, name: str | None = None
) -> None:
    """Writes the vectors that rank, of all items that may be recommended, into an existing folder.

    What is written says that they are of `name`, by default the run folder.

    `index`: the whole score, for a vector index and a sparse matrix: `vectors.npy` (float32 [items, width]), `ids.json`
    (the rows' item ids), `users.npy` (float32 [users, width], of each user's whole history, not of unit length),
    `user_ids.json`, `newest.npz` (scipy's sparse format, float32 [users, items], what a user's newest items weigh),
    `pairs.npz` (float32 [items of histories, items], what each of them adds), `seen.npz` (bool [users, items], what is
    left out), `index.json` (what they are) and `README.md` with a reader. Where the run has weights for it
    (`evaluation.factor_weight`), also vectors that rank nearly as well by themselves: `dense_vectors.npy`,
    `dense_users.npy` and `dense_history.npy` (float32 [items of histories, F], for the users' last F columns).
    `parquet`: `items.parquet` (item_id, vector) and `users.parquet` (user_id, vector: of each user's whole history),
      without what counts add to the score.
    """
    import polars as pl

    from nqf.serving.recommender import Recommender

    recommender = Recommender.load(run_folder)
    vectors = recommender.item_vectors[recommender.available]
    ids = [item for item, kept in zip(recommender.item_ids, recommender.available, strict=True) if kept]
    width = vectors.shape[1]
    if format == "index":
        np.save(folder / "vectors.npy", vectors)
        (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
        _export_scores(recommender, folder)
        about = {
            "format": "nqf-index",
            "version": 1,
            "run": name or str(run_folder),
            "items": len(ids),
            "width": width,
            "dtype": "float32",
            "similarity": "inner product with a row of users.npy, and newest.npz times pairs.npz",
        }
        (folder / "index.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return
    users, user_vectors = recommender.encode_all_users()
    for name, keys, table in (("item", ids, vectors), ("user", users, user_vectors)):
        frame = pl.DataFrame(
            {f"{name}_id": keys, "vector": table},
            schema={f"{name}_id": pl.String, "vector": pl.Array(pl.Float32, width)},
        )
        frame.write_parquet(folder / f"{name}s.parquet")


def _export_scores(recommender: Recommender, folder: Path) -> None:
    """Users, and what counts beside the vectors, as sparse matrices."""
    import scipy.sparse

    users, vectors, histories = recommender.user_side()
    np.save(folder / "users.npy", vectors)
    (folder / "user_ids.json").write_text(json.dumps(users), encoding="utf-8")
    kept, counting = np.flatnonzero(recommender.available), recommender.score.counting

    def matrix(rows: list[np.ndarray], values: list[np.ndarray], dtype: type) -> scipy.sparse.csr_matrix:
        ends = np.cumsum([0, *map(len, rows)])
        entries = np.concatenate([np.zeros(0, dtype), *values]), np.concatenate([np.zeros(0, np.int64), *rows]), ends
        return scipy.sparse.csr_matrix(entries, shape=(len(users), len(recommender.available)))

    newest = [history[::-1][: counting.newest] for history in histories]
    past = [np.unique(history) for history in histories]
    if recommender.repeats:
        past = [np.zeros(0, np.int64)] * len(users)
    matrices = {
        "newest": matrix(newest, [counting.weights[: len(history)] for history in newest], np.float32),
        "pairs": recommender.pairs[:, kept],
        "seen": matrix(past, [np.ones(len(history), bool) for history in past], bool)[:, kept],
    }
    for name, entries in matrices.items():
        scipy.sparse.save_npz(folder / f"{name}.npz", entries)
    about = ""
    if dense := recommender.dense_side(vectors, histories):
        queries, items, added = dense
        for name, table in {"users": queries, "vectors": items[kept], "history": added}.items():
            np.save(folder / f"dense_{name}.npy", table)
        about = _DENSE.format(width=added.shape[1])
    about = _INDEX.replace("{dense}", about)
    (folder / "README.md").write_text(about, encoding="utf-8")


if __name__ == "__main__":
    guard(main, sys.argv[1:])
