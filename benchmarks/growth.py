"""Cost of a training step as the history grows from 10 to 1,000 items and the catalogue from 10 thousand to 1 million.

    python benchmarks/growth.py [--device gpu] [--quick]

Histories: the user and the joint stage with 20 supervised positions and 20 items in the prompt, whatever the length of
the history that the User Q-Former reads. Catalogues: the user stage with the softmax over every item, and with 4,096
sampled negatives. Memory is what the compiled step holds beside its arguments.
"""

from __future__ import annotations

from typing import Any

from common import Bench, alternate, begin, product, product_flops, target


def one(
    bench: Bench, stage: str, *, items: int, history: int, batch: int, rate: list[float], negatives: str = "sampled"
) -> list:
    """Seconds, spread, operations and bytes of a step."""
    import jax
    import numpy as np
    from world import configuration, make_world, training

    from nqf.stages.plan import step_memory

    world = make_world(items=items, lengths=np.full(batch, history + 1), seed=bench.options.seed)
    config = configuration(
        batch=batch, history=history, negatives=negatives, samples=64 if bench.options.quick else 4_096
    )
    batches = world.data(config, stage).batches
    # The batch of the longest histories; long ones are also cut into windows, whose older ones are shorter.
    longest = max((batches[at] for at in range(len(batches))), key=lambda found: found.history.items.shape[1])
    made, data = training(world, config, stage), jax.device_put(longest)
    assert data.history.items.shape[1] == history
    compiled = made.compiled.lower(made.state, made.frozen, data).compile()
    flops = product_flops(made.compiled, made.state, made.frozen, data)
    limit = product()
    sides = {"matmul": limit.run, "step": lambda: made.step(data)}
    timings = alternate(sides, bench.options.repeats, least=0 if bench.options.quick else 0.3)
    rate.append(limit.flops / timings["matmul"].median)
    seconds = timings["step"].median
    bench.say(f"{stage}, {items:,} items, history of {history}, {negatives}: {seconds * 1e3:.1f} ms")
    return [seconds, timings["step"].spread, flops, step_memory(compiled)["temporaries"], flops / seconds / rate[-1]]


def table(title: str, first: str, rows: list[list[Any]], batch: int) -> dict[str, Any]:
    """A table of `one`'s results after the columns of what was varied."""
    columns = [first, "stage", "ms", "max/min", "examples/s", "GFLOP", "MiB", "of the matmul rate"]
    made = [
        [*where, seconds * 1e3, spread, batch / seconds, flops / 1e9, memory / 2**20, share]
        for *where, seconds, spread, flops, memory, share in rows
    ]
    return {"title": title, "columns": columns, "rows": made}


def main() -> None:
    bench = begin(__file__, __doc__)
    quick, rates = bench.options.quick, []
    histories = (10, 30) if quick else (10, 100, 1_000)
    catalogues = (100, 300) if quick else (10_000, 100_000, 1_000_000)
    batch = 4 if quick else 256 if bench.gpu else 16
    grown = [
        [history, stage, *one(bench, stage, items=catalogues[0], history=history, batch=batch, rate=rates)]
        for stage in ("user", "joint")
        for history in histories
    ]
    spread = [
        [items, f"user, {kind}", *one(bench, "user", items=items, history=20, batch=batch, negatives=kind, rate=rates)]
        for kind in ("full", "sampled")
        for items in catalogues
    ]
    times, longer = {tuple(row[:2]): row[2] for row in [*grown, *spread]}, histories[-1] / histories[0]
    larger = catalogues[-1] / catalogues[0]
    bench.finish(
        [
            table(f"A step of {batch} histories as they grow", "history", grown, batch),
            table(f"A step of {batch} histories of 20 items as the catalogue grows", "items", spread, batch),
        ],
        targets=[
            target(
                f"{stage} stage: time of a step, {longer:,.0f} times the history",
                times[histories[-1], stage] / times[histories[0], stage],
                "≤",
                longer,
                "the bias of every slot on every position, which grows with the history as attention does",
            )
            for stage in ("user", "joint")
        ]
        + [
            target(
                f"softmax over the catalogue: time of a step, {larger:,.0f} times the items",
                times[catalogues[-1], "user, full"] / times[catalogues[0], "user, full"],
                "≤",
                larger,
                "every item is encoded and scored in each step",
            )
        ],
        limits={"matrix product float32, FLOP/s": sorted(rates)[len(rates) // 2]},
        details={"batch": batch},
    )


if __name__ == "__main__":
    main()
