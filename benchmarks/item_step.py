"""Item stage: training steps of the Item Q-Former beside `transformers`' BLIP-2 Q-Former in PyTorch.

    python benchmarks/item_step.py [--device gpu] [--quick] [--batch N] [--layers N]

Two comparisons. (1) The same work: the structure and losses of the public UniRec (width 1024, 16 heads, 32 queries, 14
fields of width 1024, cross-attention in every second block; reconstruction of the anchors, triplet margin against a
positive and a negative forwarded without gradient, AdamW), here as `UniRecItemQFormer`, there as `Blip2QFormerModel`.
(2) The stage as each system runs it: UniRec in float32 with a Python loop that draws each negative from a fresh list of
a 112,590-item catalogue, nqf with its own module (values on the device, in-batch negatives with a gradient, 2 query
tokens). An item is one of a step's pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from typing import Any

from common import Bench, alternate, begin, copy_rate, matmul_rate, peak_memory, torch_module, trace_summary

CATALOGUE = 112_590


def shape(bench: Bench) -> dict[str, int]:
    """Sizes: the reference's, and smaller ones to see that it runs."""
    if bench.options.quick:
        return dict(width=64, layers=2, heads=4, mlp_width=128, queries=4, fields=5, batch=8)
    layers = bench.options.layers or 12
    batch = bench.options.batch or (512 if bench.gpu else 8)
    return dict(width=1024, layers=layers, heads=16, mlp_width=4096, queries=32, fields=14, batch=batch)


def nqf_same(bench: Bench, sizes: dict[str, int], dtype: str) -> tuple[Any, float]:
    """A step of the reference's algorithm in jax, and its operations."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from nqf.config import QFormerConfig
    from nqf.interop.unirec import UniRecItemQFormer
    from nqf.ops.losses import triplet_margin
    from nqf.training.loop import make_state, make_train_step
    from nqf.training.plan import product_flops

    batch, width = sizes["batch"], sizes["width"]
    config = QFormerConfig(
        width=width,
        layers=sizes["layers"],
        heads=sizes["heads"],
        mlp_width=sizes["mlp_width"],
        queries=sizes["queries"],
        cross_every=2,
        dropout=0.2,
    )
    module = UniRecItemQFormer(config=config, encoder_width=width, fields=sizes["fields"])
    rng = np.random.default_rng(bench.options.seed)
    fields = rng.standard_normal((3, batch, sizes["fields"], width), np.float32)
    present = rng.random((3, batch, sizes["fields"])) < 0.8
    params = jax.jit(module.init)(jax.random.key(0), fields[0][:1], present[0][:1])["params"]

    def loss_fn(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict]:
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

    optimizer = optax.adamw(1e-4)
    step = make_train_step(loss_fn, optimizer, seed=0, skip=0)
    state = make_state(params, optimizer)
    data = jax.device_put((fields, present))
    flops = product_flops(jax.make_jaxpr(step)(state, None, data))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, None, data)
        jax.block_until_ready(metrics)

    return run, flops


def torch_same(bench: Bench, sizes: dict[str, int], autocast: bool) -> Any:
    """The same step in PyTorch, on `transformers`' module."""
    torch = torch_module(bench.options.device)
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    device = "cuda" if bench.gpu else "cpu"
    torch.manual_seed(bench.options.seed)
    width, batch = sizes["width"], sizes["batch"]
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

        def forward(self, fields: Any, present: Any) -> tuple[Any, Any]:
            queries = self.queries.expand(len(fields), -1, -1)
            outputs = self.qformer(
                query_embeds=queries, encoder_hidden_states=fields, encoder_attention_mask=present
            ).last_hidden_state
            return self.representation(outputs.mean(1)), self.projection(self.reconstruction(outputs).mT).mT

    model = Item().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=bench.gpu)
    margin = torch.nn.TripletMarginLoss(margin=0.5)
    fields = torch.randn(3, batch, sizes["fields"], width, device=device)
    present = (torch.rand(3, batch, sizes["fields"], device=device) < 0.8).long()

    def run(data: Any = None) -> None:
        x = fields if data is None else data
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            vector, reconstructed = model(x[0], present[0])
            with torch.no_grad():
                positive, negative = model(x[1], present[1])[0], model(x[2], present[2])[0]
        error = (reconstructed.float() - x[0]).square().mean(-1)
        loss = (error * present[0]).sum() / present[0].sum().clamp(min=1)
        loss = loss + 0.25 * margin(vector.float(), positive.float(), negative.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if bench.gpu:
            torch.cuda.synchronize()
        else:
            loss.item()

    return run


def torch_as_written(bench: Bench, sizes: dict[str, int], step: Any) -> Any:
    """The reference's loop around the step: samples gathered one by one, each negative from a new list of all keys."""
    torch = torch_module(bench.options.device)
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


def nqf_own(bench: Bench, sizes: dict[str, int], dtype: str) -> tuple[Any, float]:
    """nqf's item step at the same width and depth: its own module, losses, tables on the device, 2 query tokens."""
    import jax
    import numpy as np

    from nqf.config import ItemConfig, OptimConfig, QFormerConfig
    from nqf.models.item_qformer import ItemQFormer
    from nqf.pipelines.pairs import PairSource, pair_batch
    from nqf.training.item_stage import make_item_loss
    from nqf.training.loop import make_state, make_train_step
    from nqf.training.optimizer import make_optimizer
    from nqf.training.plan import product_flops

    width, batch = sizes["width"], sizes["batch"]
    names = [f"field_{index}" for index in range(sizes["fields"])]
    config = ItemConfig(
        qformer=QFormerConfig(
            width=width,
            layers=sizes["layers"],
            heads=sizes["heads"],
            mlp_width=sizes["mlp_width"],
            queries=2,
            cross_every=2,
            dropout=0.2,
        )
    )
    module = ItemQFormer(
        fields=tuple((name, "text", width) for name in names), config=config.qformer, dtype=np.dtype(dtype)
    )
    items, users = 4_096, 1_024
    rng = np.random.default_rng(bench.options.seed)
    tables = {
        name: (rng.standard_normal((items, width), np.float32).astype(np.float16), np.arange(items, dtype=np.int32))
        for name in names
    }
    keys = np.unique(rng.integers(0, users * items, 16 * users))
    source = PairSource(
        users=keys // items,
        anchors=(keys % items).astype(np.int32),
        positives=rng.integers(0, items, len(keys)).astype(np.int32),
        trainable=np.arange(items, dtype=np.int32),
        owned=keys,
        items=items,
    )
    empty = {name: np.zeros((1, width), np.float32) for name in names}, dict.fromkeys(names, np.zeros(1, bool))
    params = jax.jit(module.init)(jax.random.key(0), *empty)["params"]
    optimizer = make_optimizer(OptimConfig(), 1_000)
    step = make_train_step(make_item_loss(module, config, *2 * [dict.fromkeys(names, 1.0)]), optimizer, seed=0, skip=0)
    state, frozen = make_state(params, optimizer), jax.device_put(tables)
    flops = product_flops(jax.make_jaxpr(step)(state, frozen, pair_batch(source, np.arange(batch), rng)))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, pair_batch(source, rng.integers(0, len(keys), batch), rng))
        jax.block_until_ready(metrics)

    return run, flops


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--batch", type=int, default=0)
        parser.add_argument("--layers", type=int, default=0)

    bench = begin(__file__, __doc__, arguments)
    import jax

    sizes, repeats = shape(bench), bench.options.repeats if bench.gpu or bench.options.quick else 3
    dtypes = ("bfloat16",) if bench.gpu else ("float32",)
    rates = {name: matmul_rate(name) for name in (*dtypes, "float32")}
    limits = {f"matrix products {name}, FLOP/s": rate for name, rate in rates.items()}
    limits["copy, bytes/s"] = copy_rate()
    bench.say(f"sizes {sizes}")
    dtype = dtypes[0]
    with peak_memory() as peak:
        same, flops = nqf_same(bench, sizes, dtype)
        same()
        memory = peak()
    bench.say("nqf compiled")
    peer = torch_same(bench, sizes, autocast=dtype == "bfloat16")
    sides = {"nqf": same, "torch": peer}
    if bench.gpu:
        sides["torch float32"] = torch_same(bench, sizes, autocast=False)
    sides["as written"] = torch_as_written(bench, sizes, sides.get("torch float32", peer))
    timings = alternate(sides, repeats)
    del sides, peer
    bench.say("same work done")
    own, own_flops = nqf_own(bench, dict(sizes), dtype)
    timings |= {"own": dataclasses.replace(alternate({"own": own}, repeats)["own"])}
    traced = trace_summary(own)

    median = {name: timing.median for name, timing in timings.items()}
    batch = sizes["batch"]
    share = flops / median["nqf"] / rates[dtype]

    def row(label: str, name: str, kind: str, count: float | None) -> list[Any]:
        rate = count / median[name] if count else None
        return [
            label,
            kind,
            median[name] * 1e3,
            timings[name].spread,
            batch / median[name],
            rate / 1e12 if rate else "",
            rate / rates[kind] if rate else "",
        ]

    rows = [
        row("nqf, the reference's structure", "nqf", dtype, flops),
        row("PyTorch, transformers' Blip2QFormerModel", "torch", dtype, flops),
    ]
    if "torch float32" in median:
        rows.append(row("PyTorch, the same in float32", "torch float32", "float32", flops))
    rows += [
        row("PyTorch, the reference as written", "as written", "float32", None),
        row("nqf's own item stage, 2 query tokens", "own", dtype, own_flops),
    ]
    bench.finish(
        [
            {
                "title": "Training step of the item stage",
                "columns": ["what", "type", "ms", "max/min", "pairs/s", "TFLOP/s", "of the matmul rate"],
                "rows": rows,
            },
            {
                "title": "Operations of nqf's own step that take longest",
                "columns": ["operation", "calls", "ms", "share"],
                "rows": traced,
            },
        ],
        targets=[
            {
                "what": "nqf's step of the same work over PyTorch's, same type",
                "target": 1.0,
                "found": median["torch"] / median["nqf"],
                "bound": "both sides are bound by the same matrix products",
            },
            {
                "what": "nqf's own item stage over the reference as written, pairs/s",
                "target": 10.0,
                "found": median["as written"] / median["own"],
                "bound": "the reference's step is 32 query tokens wide where nqf's is 2, and its loader is Python",
            },
            {
                "what": "share of the measured matmul rate, same work",
                "target": 0.5 if bench.gpu else 0.6,
                "found": share,
                "bound": "the rest is attention over 14 states, normalization, dropout and the optimizer",
            },
        ],
        limits=limits,
        notes=[f"{batch} pairs per step; {flops / 1e9:,.0f} GFLOP of matrix products per step of the same work."],
        details={
            "sizes": sizes,
            "peak_bytes_same_work": memory,
            "seconds": {name: timing.seconds for name, timing in timings.items()},
            "first_seconds": {name: timing.first for name, timing in timings.items()},
            "device": jax.devices()[0].device_kind,
        },
    )


if __name__ == "__main__":
    main()
