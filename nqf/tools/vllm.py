"""What recommends beside a language model that others serve: item tables, small modules and a builder of prompts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from nqf.data.interactions import MISSING_TIME
from nqf.files import write_json, write_text
from nqf.interop.huggingface import GOLDEN
from nqf.models.qwen3 import Qwen3
from nqf.ops.pooling import last_token_pool, mean_pool
from nqf.pipelines.batches import RATING_BUCKETS
from nqf.pipelines.histories import gather_history, newest
from nqf.serving.recommender import Recommender
from nqf.stages.ranker import Ranker, make_ranker
from nqf.stages.run import Run
from nqf.tools import prompt_builder

# Parts of the rank model that the builder runs.
_PARTS = (
    "user_qformer", "item_projection", "user_projection", "item_norm", "user_norm", "interactions", "head",
)  # fmt: skip
_TOP = 10
# What vLLM makes room for (`MaxLoRARanks` of 0.32).
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_README = """\
A recommender to be served by vLLM, written by `python -m nqf.export --format vllm`. {model}

`prompts.py` makes the prompts and scores the items; it needs numpy and safetensors, not nqf. `golden.json` holds
histories with their best items, `golden.safetensors` their prompts, the language model's states and the user vectors.

```python
import json

import torch
from vllm import LLM{imports}

from prompts import Recommender

llm = LLM(
    model={path!r},
    runner="pooling",
    convert="embed",
    enable_prompt_embeds=True,
    pooler_config={{"pooling_type": "{pooling}", "use_activation": False}},
    dtype="float32",
{options})
recommender = Recommender(".")
asked = [user["history"] for user in json.load(open("golden.json"))]
histories = [recommender.history(**history) for history in asked]
prompts = [{{"prompt_embeds": torch.from_numpy(recommender.prompt(history))}} for history in histories]
outputs = llm.embed(prompts{request})
for history, output in zip(histories, outputs):
    print(recommender.recommend(history, output.outputs.embedding, k=10))
```
"""


def write_recommender(run: Run, recommender: Recommender, folder: Path, *, language: str, base: str) -> None:
    """Writes what `nqf.tools.prompt_builder` reads, golden files and a README into an existing folder.

    Args:
      run: The run.
      recommender: Its recommender, changed items included.
      folder: The folder; `language` in it holds the adapter or the whole model, with golden prompts.
      language: `adapter` or `model`.
      base: Name or folder of the base of an adapter.
    """
    ranker, variables, module = _in_float32(run, recommender)
    params, tables = variables["params"], ranker.tables
    rows = np.arange(len(tables.has_text), dtype=np.int32)
    items, item_params = recommender.trained.load_item_qformer()
    trees = {name: params[name] for name in _PARTS if name in params} | {"item_qformer": item_params}
    weights = traverse_util.flatten_dict(trees, sep="/")
    arrays = {name: np.ascontiguousarray(np.asarray(leaf, np.float32)) for name, leaf in weights.items()}
    save_file(arrays, folder / "weights.safetensors")

    learned = jax.jit(lambda variables, *of: module.apply(variables, *of, method="learned"))
    chunks = [rows[start : start + ranker.item_chunk] for start in range(0, len(rows), ranker.item_chunk)]
    prompt = recommender.trained.parts.prompt
    assert prompt is not None
    words, embedding = np.unique([*prompt.instruction, prompt.end, *np.unique(tables.titles)]), params["qwen3"]
    words = words[words >= 0]
    stored = {
        "item_vectors": ranker.item_vectors(variables),
        "tokens": np.asarray(tables.tokens),
        "learned": np.concatenate([np.asarray(learned(variables, tables.take(at), at)) for at in chunks]),
        "text": np.asarray(tables.text, np.float32),
        "titles": np.where(tables.titles >= 0, np.searchsorted(words, np.maximum(tables.titles, 0)), -1),
        "words": np.asarray(embedding["embed_tokens"]["embedding"][words], np.float32),
        "available": recommender.available,
    }
    for name, table in stored.items():
        np.save(folder / f"{name}.npy", table)
    write_json(folder / "item_ids.json", recommender.item_ids)
    if recommender.memory is not None:
        pairs = recommender.pairs
        kept = {name: np.asarray(getattr(pairs, name)) for name in ("indptr", "indices", "data")}
        save_file(kept, folder / "cooccurrence.safetensors")
    about = _about(run, ranker, module, items)
    about |= {
        "instruction": np.searchsorted(words, prompt.instruction).tolist(),
        "end": int(np.searchsorted(words, prompt.end)),
        # Of the newest items, the newest first.
        "cooccurrence_weights": recommender.score.counting.weights.tolist(),
    }
    write_json(folder / "recommender.json", about)
    write_text(folder / "prompts.py", Path(prompt_builder.__file__).read_text(encoding="utf-8"))
    _write_golden(run, recommender, ranker, variables, folder, folder / language)
    _serve_as_is(folder / language)
    adapter = language == "adapter"
    served = min((rank for rank in _RANKS if rank >= module.reader.qwen3.lora_rank), default=_RANKS[-1])
    readme = _README.format(
        model=f"`adapter` is a LoRA adapter of `{base}`." if adapter else "`model` is the language model.",
        path=base if adapter else "model",
        pooling=module.reader.prompt.pooling.upper(),
        imports="\nfrom vllm.lora.request import LoRARequest" if adapter else "",
        options=f'    tokenizer="adapter",\n    enable_lora=True,\n    max_lora_rank={served},\n' if adapter else "",
        request=', lora_request=LoRARequest("nqf", 1, "adapter")' if adapter else "",
    )
    write_text(folder / "README.md", readme)


def _in_float32(run: Run, recommender: Recommender) -> tuple[Ranker, Any, Any]:
    """The ranker with everything computed in float32, which others can be held to, its variables and its module."""
    trained = recommender.trained
    old, parts = trained.ranker, trained.parts
    reader = parts.module.reader
    qwen3 = dataclasses.replace(reader.qwen3, dtype=jnp.float32, attention="xla")
    module = parts.module.clone(dtype=jnp.float32, reader=dataclasses.replace(reader, qwen3=qwen3))
    ranker = make_ranker(
        module,
        old.tables,
        prompt=parts.prompt,
        max_history=old.max_history,
        batch_size=old.batch_size,
        item_chunk=old.item_chunk,
    )
    return ranker, trained.variables, module


def _about(run: Run, ranker: Ranker, module: Any, items: Any) -> dict[str, Any]:
    ratings = run.dataset.interactions.ratings[run.dataset.split.train]
    ratings = ratings[np.isfinite(ratings)]
    reviews = run.features.reviews
    user = module.user
    return {
        "format": "nqf-vllm",
        "version": 1,
        "pooling": module.reader.prompt.pooling,
        "max_history": ranker.max_history,
        "history_items": module.reader.prompt.history_items,
        "user_tokens": module.reader.prompt.user_tokens,
        "interactions": module.reader.prompt.interactions,
        "times": user.times,
        "reads_ratings": user.ratings,
        "reads_reviews": user.reviews,
        "review_width": 0 if reviews is None else int(reviews.values.shape[1]),
        "ratings": [float(ratings.min()), float(ratings.max())] if len(ratings) else None,
        "rating_buckets": RATING_BUCKETS,
        "scale": 1 / module.tower_config.temperature,
        "text_weight": module.text_weight,
        "user_qformer": dataclasses.asdict(user.qformer),
        "item_qformer": {
            "fields": [[name, kind] for name, kind, _ in items.fields],
            "fusion": items.fusion,
            "qformer": dataclasses.asdict(items.config),
        },
    }


def _write_golden(
    run: Run, recommender: Recommender, ranker: Ranker, variables: Any, folder: Path, language: Path
) -> None:
    """Histories of the language model's golden prompts, its states and what is recommended for them."""
    golden = load_file(language / GOLDEN)
    inputs = {name: golden[name] for name in ("inputs_embeds", "attention_mask")}
    reader = recommender.trained.parts.module.reader
    model = Qwen3(dataclasses.replace(reader.qwen3, dtype=jnp.float32, attention="xla"))
    qwen3 = {name: tree["qwen3"] for name, tree in variables.items() if "qwen3" in tree}
    hidden = jax.jit(lambda variables, inputs: model.apply(variables, **inputs))(qwen3, inputs)
    pool = last_token_pool if reader.prompt.pooling == "last" else mean_pool
    states = np.asarray(pool(hidden, jnp.asarray(inputs["attention_mask"])), np.float32)

    interactions, users = run.dataset.interactions, range(len(states))
    spans = [np.arange(interactions.offsets[user], interactions.offsets[user + 1]) for user in users]
    history = gather_history(run.features, np.stack([newest(span, ranker.max_history) for span in spans]))
    vectors = ranker.encode(variables, history)
    items, lines = ranker.item_vectors(variables), []
    scores = vectors @ items.T
    if (memory := recommender.memory) is not None:
        latest = np.stack([newest(interactions.items[span], memory.how.newest)[::-1] for span in spans])
        pairs = dataclasses.replace(memory, pairs=recommender.pairs).scores(latest)
        scores += pairs.toarray()
    scores /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for user, span in zip(users, spans, strict=True):
        left = np.where(recommender.available, scores[user], -np.inf)
        left[interactions.items[span]] = -np.inf
        best = [row for row in np.argsort(-left, kind="stable")[:_TOP] if np.isfinite(left[row])]
        times, ratings, reviews = interactions.times[span].tolist(), interactions.ratings[span], run.features.reviews
        asked = {
            "items": [recommender.item_ids[row] for row in interactions.items[span]],
            "times": [None if at == MISSING_TIME else at for at in times],
            "ratings": [float(rating) if np.isfinite(rating) else None for rating in ratings],
        }
        if reviews is not None:
            read = (reviews.values[at].tolist() if at >= 0 else None for at in reviews.rows[span])
            asked["reviews"] = list(read)
        found = [[recommender.item_ids[row], float(left[row])] for row in best]
        lines.append({"user": interactions.user_ids[user], "history": asked, "best": found})
    write_text(folder / "golden.json", json.dumps(lines))
    arrays = inputs | {"states": states, "vectors": vectors}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / GOLDEN)


def _serve_as_is(folder: Path) -> None:
    """vLLM reads injected prompts only where its own special token is one (checked with 0.32)."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("split_special_tokens", None)
    write_json(path, settings)
