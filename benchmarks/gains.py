"""What each of the usual gains brings, measured before and after by switching it off.

    python benchmarks/gains.py [--device gpu] [--quick]

Every pair does the same work on the same batches: with nqf's way, and with the plain way in its place.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

from common import Bench, Timing, alternate, begin, copy_rate, product, ratio

Pair = tuple[Callable[[], object], Callable[[], object]]


def lengths(bench: Bench, users: int) -> Any:
    """History lengths as logs have them: many short ones, few long ones."""
    import numpy as np

    return np.clip(np.random.default_rng(bench.options.seed).geometric(0.08, users) + 1, 2, 50)


def buckets(bench: Bench) -> Pair:
    """Length buckets, against batches padded to the longest history; an epoch of each."""
    from world import configuration, make_world, training

    from nqf.pipelines import datasets

    users, batch = (64, 8) if bench.options.quick else (4_096, 128)
    world = make_world(items=1_000, lengths=lengths(bench, users), seed=bench.options.seed)
    config = configuration(batch=batch)
    made = training(world, config, "user")
    bucketed = list(world.data(config, "user").iterate(0))
    with mock.patch.object(datasets, "slot_buckets", lambda longest: (longest,)):
        padded = list(world.data(config, "user").iterate(0))

    def epoch(batches: list) -> Callable[[], None]:
        def run() -> None:
            for found in batches[:-1]:
                made.step(found, wait=False)
            made.step(batches[-1])

        return run

    # As many examples on both sides: each drops a rest of its own.
    count = min(len(bucketed), len(padded))
    return epoch(bucketed[:count]), epoch(padded[:count])


def distinct(bench: Bench) -> Pair:
    """Each distinct item of a batch encoded once, against every occurrence; with gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nqf.config import QFormerConfig
    from nqf.models.item_qformer import ItemQFormer

    users, slots, items, fields = (4, 5, 50, 2) if bench.options.quick else (64, 20, 3_000, 6)
    rng = np.random.default_rng(bench.options.seed)
    at = (rng.zipf(1.2, (users, slots)) - 1) % items
    once, back = np.unique(at, return_inverse=True)
    names = [str(index) for index in range(fields)]
    module = ItemQFormer(fields=tuple((name, "text", 64) for name in names), config=QFormerConfig())
    table = {name: rng.standard_normal((items, 64), np.float32) for name in names}
    present = {name: np.ones(items, bool) for name in names}
    params = jax.jit(module.init)(jax.random.key(0), *jax.tree.map(lambda x: x[:1], (table, present)))["params"]

    def tokens(params: Any, rows: Any) -> Any:
        values, there = jax.tree.map(lambda x: jnp.asarray(x)[rows], (table, present))
        return module.apply({"params": params}, values, there).tokens

    every = jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(tokens(params, at.ravel())))))
    fewer = jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(tokens(params, once)[back.ravel()]))))
    return lambda: jax.block_until_ready(fewer(params)), lambda: jax.block_until_ready(every(params))


def tables(bench: Bench) -> Pair:
    """Batches of numbers and tables on the device, against gathered rows in every batch; reading included."""
    from world import configuration, make_world, training

    users, batch, steps = (64, 8, 2) if bench.options.quick else (4_096, 128, 20)
    world = make_world(items=10_000, lengths=[20] * users, seed=bench.options.seed)
    config = configuration(batch=batch, history=20, negatives="sampled", samples=64 if bench.options.quick else 4_096)

    def side(on_device: bool) -> Callable[[], None]:
        made = training(world, config, "user", on_device=on_device)
        data = world.data(config, "user", on_device=on_device)

        def run() -> None:
            stream = data.iterate(0)
            for _ in range(steps):
                metrics = made.step(next(stream), wait=False)
            metrics["loss"].block_until_ready()

        return run

    return side(True), side(False)


def joint_parts(bench: Bench) -> tuple[Any, Any, Any]:
    """A small joint model with adapters, its batch and its world's configuration."""
    import jax
    from world import configuration, make_world, small_backbone, training

    users, width = (2, 32) if bench.options.quick else (8, 256)
    world = make_world(items=200 if bench.options.quick else 10_000, lengths=[21] * users, seed=bench.options.seed)
    config = configuration(batch=users, history=20, negatives="in-batch")
    backbone = small_backbone(hidden_size=width, intermediate_size=3 * width, lora_rank=16)
    made = training(world, config, "joint", backbone=backbone)
    return made, jax.device_put(world.data(config, "joint").batches[0]), backbone


def frozen(bench: Bench) -> Pair:
    """A frozen base without gradients, against gradients of everything, those of the base thrown away."""
    import jax
    import jax.numpy as jnp

    from nqf.models.qwen3 import Qwen3

    backbone = joint_parts(bench)[2]
    model = Qwen3(backbone)
    ids = jnp.zeros((2, 8) if bench.options.quick else (16, 64), jnp.int32)
    made = jax.jit(model.init)(jax.random.key(0), ids[:1])

    def loss(lora: Any, base: Any) -> Any:
        return jnp.mean(jnp.square(model.apply({"params": base, "lora": lora}, ids)))

    few, all_of_them = jax.jit(jax.grad(loss)), jax.jit(jax.grad(loss, argnums=(0, 1)))
    lora, base = made["lora"], made["params"]
    return (
        lambda: jax.block_until_ready(few(lora, base)),
        lambda: jax.block_until_ready(all_of_them(lora, base)),
    )


def instruction(bench: Bench) -> Pair:
    """An instruction of 32 tokens read once for a batch, against 32 tokens in each prompt of 64; with gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from world import small_backbone

    from nqf.models.qwen3 import Qwen3

    rows, width, start, length = (2, 32, 4, 8) if bench.options.quick else (128, 128, 32, 64)
    model = Qwen3(small_backbone(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2))
    embeds = np.random.default_rng(bench.options.seed).standard_normal((rows, length, width), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    mask = np.broadcast_to(np.tril(np.ones((length, length), bool)), (rows, 1, length, length))

    def once(variables: Any) -> Any:
        _, prefix = model.apply(variables, embeds[:1, :start], method=Qwen3.read_prefix)
        at = start + np.arange(length - start)[None]
        after = dict(inputs_embeds=embeds[:, start:], mask=mask[:, :, start:], position_ids=at)
        return jnp.mean(jnp.square(model.apply(variables, prefix=prefix, **after)))

    def each(variables: Any) -> Any:
        return jnp.mean(jnp.square(model.apply(variables, inputs_embeds=embeds, mask=mask)[:, start:]))

    first, second = jax.jit(jax.grad(once)), jax.jit(jax.grad(each))
    return lambda: jax.block_until_ready(first(variables)), lambda: jax.block_until_ready(second(variables))


def pooled(bench: Bench) -> Pair:
    """The last of two layers for the pooled tokens alone, against all layers for all tokens; with gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from world import small_backbone

    from nqf.models.qwen3 import Qwen3

    rows, width, length = (2, 32, 8) if bench.options.quick else (128, 128, 60)
    model = Qwen3(small_backbone(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2))
    embeds = np.random.default_rng(bench.options.seed).standard_normal((rows, length, width), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    # As in a history's prompt: an end token for each pair of item tokens.
    ends = np.arange(2, length, 3)

    def some(variables: Any) -> Any:
        return jnp.mean(jnp.square(model.apply(variables, inputs_embeds=embeds, read_at=jnp.asarray(ends)[None])))

    def every(variables: Any) -> Any:
        return jnp.mean(jnp.square(model.apply(variables, inputs_embeds=embeds)[:, ends]))

    first, second = jax.jit(jax.grad(some)), jax.jit(jax.grad(every))
    return lambda: jax.block_until_ready(first(variables)), lambda: jax.block_until_ready(second(variables))


def few_queries(bench: Bench) -> Pair:
    """Maps of keys and values on the side of two queries, against keys and values of 14 fields; with gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nqf.config import QFormerConfig
    from nqf.models.qformer import Attention, QFormer

    rows, width = (2, 32) if bench.options.quick else (256, 512)
    config = QFormerConfig(width=width, mlp_width=4 * width, heads=8, layers=2)
    rng, module = np.random.default_rng(bench.options.seed), QFormer(config=config)
    queries, fields = (rng.standard_normal((rows, count, width), np.float32) for count in (2, 14))
    params = jax.jit(module.init)(jax.random.key(0), queries[:1], fields[:1])

    def side() -> Callable[[], object]:
        loss = lambda params: jnp.mean(jnp.square(module.apply(params, queries, fields)))  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return lambda: jax.block_until_ready(compiled(params))

    absorbed = side()
    with mock.patch.object(Attention, "_absorbs", lambda self, queries, states: False):
        return absorbed, side()


def masks(bench: Bench) -> Pair:
    """Dropout masks by a hash, against masks of `jax.random.bernoulli`; a small Qwen3 with adapters."""
    import jax
    import jax.numpy as jnp

    from nqf.models import dropout as module
    from nqf.models.qwen3 import Qwen3

    backbone = dataclasses.replace(joint_parts(bench)[2], lora_dropout=0.1)
    ids = jnp.zeros((2, 8) if bench.options.quick else (16, 64), jnp.int32)
    made = jax.jit(Qwen3(backbone).init)(jax.random.key(0), ids[:1])

    def bernoulli(x: Any, rate: float, seed: Any, salt: int) -> Any:
        return jnp.where(jax.random.bernoulli(jax.random.wrap_key_data(seed), 1 - rate, x.shape), x / (1 - rate), 0)

    def side() -> Callable[[], object]:
        def loss(lora: Any, base: Any, key: Any) -> Any:
            variables = {"params": base, "lora": lora}
            hidden = Qwen3(backbone).apply(variables, ids, deterministic=False, rngs={"dropout": key})
            return jnp.mean(jnp.square(hidden))

        compiled = jax.jit(jax.grad(loss)).lower(made["lora"], made["params"], jax.random.key(1)).compile()
        return lambda: jax.block_until_ready(compiled(made["lora"], made["params"], jax.random.key(1)))

    hashed = side()
    with mock.patch.object(module, "dropout", bernoulli):
        return hashed, side()


def adapters(bench: Bench) -> Pair:
    """Adapters' gradients that transpose narrow matrices, against jax's own, which transpose wide ones."""
    import joint_step
    import numpy as np

    from nqf.models import lora

    sizes, plain = joint_step.shape(bench), lambda x, a, b: (x @ a) @ b
    ids = np.zeros((sizes["prompts"], sizes["length"]), np.int32)

    def side() -> Callable[[], object]:
        run = joint_step.nqf_tokens(sizes, "float32", ids)[0]
        run()
        return run

    written = side()
    with mock.patch.object(lora, "low_rank_product", plain):
        return written, side()


def donated(bench: Bench) -> Pair:
    """A state whose buffers the step takes over, against a new state beside the old one."""
    import jax

    made, batch, _ = joint_parts(bench)
    state = jax.tree.map(jax.numpy.copy, made.state)
    copied = jax.jit(made.compiled.__wrapped__)
    return lambda: made.step(batch), lambda: jax.block_until_ready(copied(state, made.frozen, batch))


def late(bench: Bench) -> Pair:
    """Steps dispatched ahead and metrics fetched at the end, against a fetch after every step."""
    import jax
    from world import configuration, make_world, training

    count, batch = (2, 4) if bench.options.quick else (20, 128)
    world = make_world(items=1_000, lengths=[20] * batch, seed=bench.options.seed)
    config = configuration(batch=batch, history=20)
    made, found = training(world, config, "user"), jax.device_put(world.data(config, "user").batches[0])

    def ahead() -> None:
        metrics = [made.step(found, wait=False) for _ in range(count)]
        jax.device_get(metrics)

    def each() -> None:
        for _ in range(count):
            jax.device_get(made.step(found, wait=False))

    return ahead, each


def softmax(bench: Bench) -> Pair:
    """The written-out softmax over the catalogue, against cross-entropy differentiated by jax."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nqf.ops.losses import full_softmax, info_nce

    rows, items, width = (8, 100, 8) if bench.options.quick else (1_024, 20_000, 64)
    rng = np.random.default_rng(bench.options.seed)
    users, learned, text = (rng.standard_normal((n, width), np.float32) for n in (rows, items, items))
    users = np.concatenate([users, users], axis=1)
    targets, weights, allowed = rng.integers(0, items, rows), np.ones(rows, np.float32), np.ones(items, bool)

    def written(users: Any, learned: Any) -> Any:
        return full_softmax(users, learned, text, targets, weights_M=weights, allowed=allowed)

    def plain(users: Any, learned: Any) -> Any:
        scores = users @ jnp.concatenate([learned, text], axis=1).T
        return info_nce(scores, targets, weights_M=weights, allowed_MxC=allowed[None])

    first, second = (jax.jit(jax.grad(loss, argnums=(0, 1))) for loss in (written, plain))
    return (
        lambda: jax.block_until_ready(first(users, learned)),
        lambda: jax.block_until_ready(second(users, learned)),
    )


def products(bench: Bench) -> Pair:
    """The frozen text encoder's products in bfloat16 with sums in float32, against float32."""
    import jax
    import numpy as np

    from nqf.models.bert import Bert, BertConfig
    from nqf.ops.products import bfloat16_dot_general

    width, layers, shape = (32, 1, (2, 8)) if bench.options.quick else (384, 6, (32, 32))
    sizes = dict(vocab_size=1_000, max_position_embeddings=64, type_vocab_size=2, hidden_size=width)
    config = BertConfig(**sizes, num_hidden_layers=layers, num_attention_heads=width // 32, intermediate_size=4 * width)
    ids, mask = np.zeros(shape, np.int32), np.ones(shape, bool)
    low, high = Bert(config, dot_general=bfloat16_dot_general), Bert(config)
    params = jax.jit(high.init)(jax.random.key(0), ids, mask)
    sides = [jax.jit(lambda params, module=module: module.apply(params, ids, mask)) for module in (low, high)]
    return tuple((lambda side=side: jax.block_until_ready(side(params))) for side in sides)


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", nargs="+", help="names of functions of this file")

    bench = begin(__file__, __doc__, arguments)
    rows, limit = [], product()
    rates: list[float] = []
    every = (buckets, distinct, instruction, pooled, few_queries, tables, frozen, adapters, masks, donated, late)
    every += (softmax, products)
    for make in every:
        if bench.options.only and make.__name__ not in bench.options.only:
            continue
        after, before = make(bench)
        sides = {"matmul": limit.run, "after": after, "before": before}
        timings: dict[str, Timing] = alternate(sides, bench.options.repeats, least=0 if bench.options.quick else 0.3)
        rates.append(limit.flops / timings["matmul"].median)
        gain, (with_it, against) = (
            ratio(timings["before"], timings["after"]),
            make.__doc__.rstrip(".").split(", against "),
        )
        rows.append([with_it, against, timings["before"].median * 1e3, timings["after"].median * 1e3, gain,
                     max(timings["before"].spread, timings["after"].spread)])  # fmt: skip
        bench.say(f"{make.__name__}: {gain:.3g} times as fast")
    bench.finish(
        [
            {
                "title": "Gains, each against the plain way",
                "columns": ["with", "against", "before, ms", "after, ms", "times as fast", "max/min"],
                "rows": rows,
            }
        ],
        limits={
            "matrix product float32, FLOP/s": sorted(rates)[len(rates) // 2],
            "memory copy, bytes/s": copy_rate(16 if bench.options.quick else 256),
        },
    )


if __name__ == "__main__":
    main()
