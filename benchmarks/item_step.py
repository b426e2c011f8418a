"""Item stage: training steps of the Item Q-Former beside `transformers`' BLIP-2 Q-Former in PyTorch.

    python benchmarks/item_step.py [--device gpu] [--quick] [--batch N] [--layers N] [--reference CHECKOUT]

(1) The same work: structure and losses of the public UniRec (width 1024, 16 heads, 32 queries, 14 fields of width 1024,
cross-attention in every second block; reconstruction of the anchors, triplet margin against a positive and a negative
forwarded without gradient, AdamW), here as `UniRecItemQFormer`, there as `Blip2QFormerModel`. (2) The stage as each
system runs it: UniRec with a Python loop that draws each negative from a fresh list of a 112,590-item catalogue, nqf
with its own module (values on the device, in-batch negatives with a gradient, 2 query tokens). With a checkout of
UniRec its own module stands in for transformers' in (2). An item is one of a step's pairs.
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import Any

from common import (
    Bench,
    alternate,
    begin,
    copy_rate,
    peak_memory,
    product,
    product_flops,
    ratio,
    target,
    torch_module,
    trace_table,
)

CATALOGUE = 112_590


def shape(bench: Bench) -> dict[str, int]:
    """Sizes: the reference's, and smaller ones to see that it runs."""
    if bench.options.quick:
        return dict(width=32, layers=2, heads=2, mlp_width=64, queries=4, fields=3, batch=4)
    sizes = dict(width=1024, layers=12, heads=16, mlp_width=4096, queries=32, fields=14)
    return sizes | dict(layers=bench.options.layers or 12, batch=bench.options.batch or (512 if bench.gpu else 16))


def qformer_config(sizes: dict[str, int], queries: int) -> Any:
    """nqf's configuration of these sizes."""
    from nqf.config import QFormerConfig

    sizes = {name: sizes[name] for name in ("width", "layers", "heads", "mlp_width")}
    return QFormerConfig(**sizes, queries=queries, cross_every=2, dropout=0.2)


def stepper(loss: Any, params: Any, frozen: Any, batch: Any, optimizer: Any) -> tuple[Any, float]:
    """A function that makes a step on the next `batch()`, and the step's operations in products."""
    import jax

    from nqf.training.loop import make_state, make_train_step

    step = make_train_step(loss, optimizer, seed=0, skip=0)
    state = make_state(params, optimizer)
    flops = product_flops(step, state, frozen, batch())

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch())
        jax.block_until_ready(metrics)

    return run, flops


def nqf_same(bench: Bench, sizes: dict[str, int], dtype: str) -> tuple[Any, float]:
    """A step of the reference's algorithm in jax, and its operations."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from nqf.interop.unirec import UniRecItemQFormer
    from nqf.ops.losses import triplet_margin

    batch, width = sizes["batch"], sizes["width"]
    config = qformer_config(sizes, sizes["queries"])
    module = UniRecItemQFormer(config=config, encoder_width=width, fields=sizes["fields"])
    rng = np.random.default_rng(bench.options.seed)
    fields = rng.standard_normal((3, batch, sizes["fields"], width), np.float32)
    present = rng.random((3, batch, sizes["fields"])) < 0.8
    params = jax.jit(module.init)(jax.random.key(0), fields[0][:1], present[0][:1])["params"]

    def loss(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict]:
        fields, present = data
        low = jax.tree.map(lambda x: x.astype(dtype), params) if dtype != "float32" else params
        anchor_key, other_key = jax.random.split(key)

        def encode(which: slice, key: jax.Array) -> Any:
            x = fields[which].reshape(-1, *fields.shape[2:]).astype(dtype)
            mask = present[which].reshape(-1, present.shape[-1])
            return module.apply({"params": low}, x, mask, deterministic=False, rngs={"dropout": key})

        anchors, others = encode(slice(0, 1), anchor_key), encode(slice(1, 3), other_key)
        error = jnp.mean(jnp.square(anchors.reconstructed_fields.astype(jnp.float32) - fields[0]), axis=-1)
        reconstruction = jnp.sum(error * present[0]) / jnp.maximum(jnp.sum(present[0]), 1)
        positive, negative = jnp.split(jax.lax.stop_gradient(others.item_representation), 2)
        contrastive = triplet_margin(anchors.item_representation, positive, negative, margin=0.5)
        return reconstruction + 0.25 * contrastive, {}

    data = jax.device_put((fields, present))
    return stepper(loss, params, None, lambda: data, optax.adamw(1e-4))


def nqf_own(bench: Bench, sizes: dict[str, int], dtype: str) -> tuple[Any, float]:
    """nqf's item step at the same width and depth: its own module, losses, tables on the device, 2 query tokens."""
    import jax
    import numpy as np

    from nqf.config import ItemConfig, OptimConfig
    from nqf.models.item_qformer import ItemQFormer
    from nqf.pipelines.pairs import PairSource, pair_batch
    from nqf.stages.item import make_item_loss
    from nqf.training.optimizer import make_optimizer

    width, batch, items = sizes["width"], sizes["batch"], 4_096
    names = [f"field_{index}" for index in range(sizes["fields"])]
    config = ItemConfig(qformer=qformer_config(sizes, 2))
    module = ItemQFormer(
        fields=tuple((name, "text", width) for name in names), config=config.qformer, dtype=np.dtype(dtype)
    )
    rng = np.random.default_rng(bench.options.seed)
    rows = np.arange(items, dtype=np.int32)
    tables = {name: (rng.standard_normal((items, width), np.float32).astype(np.float16), rows) for name in names}
    keys = np.unique(rng.integers(0, 1_024 * items, 16_384))
    source = PairSource(
        users=keys // items,
        anchors=(keys % items).astype(np.int32),
        positives=rng.integers(0, items, len(keys)).astype(np.int32),
        trainable=rows,
        owned=keys,
        items=items,
    )
    empty = {name: np.zeros((1, width), np.float32) for name in names}, dict.fromkeys(names, np.zeros(1, bool))
    params = jax.jit(module.init)(jax.random.key(0), *empty)["params"]
    ones = dict.fromkeys(names, 1.0)
    loss = make_item_loss(module, config, ones, ones)
    draw = lambda: pair_batch(source, rng.integers(0, len(keys), batch), rng)  # noqa: E731
    return stepper(loss, params, jax.device_put(tables), draw, make_optimizer(OptimConfig(), 1_000))


def torch_item(torch: Any, sizes: dict[str, int]) -> Any:
    """The reference's module on transformers' Q-Former."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    width = sizes["width"]
    config = Blip2QFormerConfig(
        hidden_size=width,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["mlp_width"],
        encoder_hidden_size=width,
        cross_attention_frequency=2,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
    )

    class Item(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = torch.nn.Parameter(torch.randn(1, sizes["queries"], width))
            self.qformer = Blip2QFormerModel(config)
            self.representation = torch.nn.Linear(width, width)
            self.reconstruction = torch.nn.Linear(width, width)
            self.projection = torch.nn.Linear(sizes["queries"], sizes["fields"])

        def forward(self, fields: Any, present: Any) -> dict[str, Any]:
            queries = self.queries.expand(len(fields), -1, -1)
            outputs = self.qformer(
                query_embeds=queries, encoder_hidden_states=fields, encoder_attention_mask=present
            ).last_hidden_state
            made = self.projection(self.reconstruction(outputs).mT).mT
            return {"item_representation": self.representation(outputs.mean(1)), "reconstructed_fields": made}

    return Item()


def reference_item(checkout: str, sizes: dict[str, int]) -> Any:
    """The reference's own module, imported from its checkout."""
    import transformers.modeling_utils as moved
    import transformers.pytorch_utils as helpers

    # Its Q-Former was written for transformers 4: what version 5 has elsewhere or no longer is put in place.
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(moved, name):
            setattr(moved, name, getattr(helpers, name, None))
    base = moved.PreTrainedModel
    base.all_tied_weights_keys = {}
    for name, stand_in in (
        ("get_head_mask", lambda self, mask, layers, *_: [None] * layers),
        ("invert_attention_mask", lambda self, mask: (1.0 - mask[:, None, None, :].float()) * -1e9),
    ):
        if not hasattr(base, name):
            setattr(base, name, stand_in)
    sys.path.insert(0, checkout)
    from models.qformer_model import QFormerForItemRepresentation

    return QFormerForItemRepresentation(
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["mlp_width"],
        num_query_tokens=sizes["queries"],
        field_embedding_dim=sizes["width"],
        num_fields=sizes["fields"],
        dropout=0.2,
    )


def torch_step(bench: Bench, torch: Any, model: Any, sizes: dict[str, int], low: bool) -> Any:
    """A function that makes the same step in PyTorch."""
    device = "cuda" if bench.gpu else "cpu"
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    margin = torch.nn.TripletMarginLoss(margin=0.5)
    fields = torch.randn(3, sizes["batch"], sizes["fields"], sizes["width"], device=device)
    present = (torch.rand(3, sizes["batch"], sizes["fields"], device=device) < 0.8).long()

    def run(data: Any = None) -> None:
        x = fields if data is None else data
        with torch.autocast(device, torch.bfloat16, enabled=low):
            anchor = model(x[0], present[0])
            with torch.no_grad():
                others = [model(x[at], present[at])["item_representation"].float() for at in (1, 2)]
        error = (anchor["reconstructed_fields"].float() - x[0]).square().mean(-1)
        loss = (error * present[0]).sum() / present[0].sum().clamp(min=1)
        loss = loss + 0.25 * margin(anchor["item_representation"].float(), *others)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return run


def as_written(bench: Bench, torch: Any, step: Any, sizes: dict[str, int]) -> Any:
    """The reference's loop around the step: samples gathered one by one, each negative from a new list of all keys."""
    cached = 256
    # Row numbers stand for the cache of a full catalogue, whose values the draws would not fit into this test.
    embeddings = {row: torch.randn(sizes["fields"], sizes["width"]) for row in range(cached)}
    catalogue = dict.fromkeys(range(CATALOGUE), 0)
    rng = random.Random(bench.options.seed)

    def run() -> None:
        lists: list[list[Any]] = [[], [], []]
        for _ in range(sizes["batch"]):
            for part in lists[:2]:
                part.append(embeddings[rng.randrange(cached)])
            lists[2].append(embeddings[rng.choice(list(catalogue.keys())) % cached])
        step(torch.stack([torch.stack(part) for part in lists]).to("cuda" if bench.gpu else "cpu"))

    return run


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--batch", type=int, default=0)
        parser.add_argument("--layers", type=int, default=0)
        parser.add_argument("--reference", help="checkout of github.com/ulab-uiuc/UniRec")

    bench = begin(__file__, __doc__, arguments)
    sizes, repeats = shape(bench), bench.options.repeats if bench.gpu or bench.options.quick else 3
    dtype = "bfloat16" if bench.gpu else "float32"
    limit, torch = product(dtype), torch_module(bench)
    with peak_memory() as peak:
        same, flops = nqf_same(bench, sizes, dtype)
        same()
        memory = peak()
    # Its step is so much smaller that, at the same batch, it would be the optimizer's; nqf's default batch is 512.
    wider = 1 if bench.options.quick else 4
    own, own_flops = nqf_own(bench, sizes | {"batch": wider * sizes["batch"]}, dtype)
    model = reference_item(bench.options.reference, sizes) if bench.options.reference else torch_item(torch, sizes)
    # The reference has no mixed precision.
    written = as_written(bench, torch, torch_step(bench, torch, model, sizes, low=False), sizes)
    peer = torch_step(bench, torch, torch_item(torch, sizes), sizes, low=dtype == "bfloat16")
    sides = {"matmul": limit.run, "same": same, "torch": peer, "written": written, "own": own}
    timings = alternate(sides, repeats)
    rate = limit.flops / timings["matmul"].median
    whose = "its own module" if bench.options.reference else "transformers' module"
    labels = {
        "same": ("nqf, the reference's structure", dtype, flops),
        "torch": ("PyTorch, transformers' Blip2QFormerModel", dtype, flops),
        "written": (f"the reference as written, {whose}", "float32", flops),
        "own": ("nqf's own item stage, 2 query tokens", dtype, own_flops),
    }
    rows = []
    for name, (label, kind, count) in labels.items():
        timing = timings[name]
        done = count / timing.median
        share = done / rate if kind == dtype else ""
        batch = sizes["batch"] * (wider if name == "own" else 1)
        rows.append([label, kind, batch, timing.median * 1e3, timing.spread, batch / timing.median, done / 1e9, share])
    bench.finish(
        [
            {
                "title": "Training step of the item stage",
                "columns": ["what", "type", "pairs", "ms", "max/min", "pairs/s", "GFLOP/s", "of the matmul rate"],
                "rows": rows,
            },
            trace_table("Operations of nqf's own step that take longest", own),
        ],
        targets=[
            target(
                "nqf's own item stage over the reference as written, pairs/s",
                ratio(timings["written"], timings["own"]) * wider,
                "≥",
                10.0,
                "the reference's step is 32 query tokens wide where nqf's is 2; the 14 fields are the same for both",
            ),
            target(
                "nqf over PyTorch, the same work",
                ratio(timings["torch"], timings["same"]),
                "≥",
                1.0,
                "the same matrix products, which take nearly all of the time on both sides",
            ),
            target(
                "share of the matmul rate, same work",
                flops / timings["same"].median / rate,
                "≥",
                0.5 if bench.gpu else 0.6,
                "attention over 14 states, normalization, dropout, and an optimizer that touches every parameter",
            ),
        ],
        limits={f"matrix product {dtype}, FLOP/s": rate, "memory copy, bytes/s": copy_rate()},
        notes=[
            f"{sizes['layers']} layers of width {sizes['width']}; "
            f"{flops / 1e9:,.0f} GFLOP of matrix products per step of the same work, {own_flops / 1e9:,.0f} of nqf's.",
        ],
        details={"sizes": sizes, "peak_bytes_same_work": memory},
    )


if __name__ == "__main__":
    main()
