"""Full-catalogue ranking, counting and top-k, beside faiss's flat index, from 10 thousand to 1 million items.

    python benchmarks/ranking.py [--device gpu] [--quick]

Vectors are as wide as nqf's (64 learned and 128 frozen components), float32. Counting gives the exact rank of each
user's target under ties with seen items left out, which is what an evaluation needs; top-k gives lists. faiss has
top-k only, on the same cores. The share of the matmul rate counts the inner products alone.
"""

from __future__ import annotations

from typing import Any

from common import CORES, Bench, alternate, begin, peak_memory, product, ratio, target

WIDTH, K, SEEN = 192, 50, 20


def faiss_side(users: Any, items: Any) -> Any:
    """A search in faiss's flat index; None where faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(CORES)
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    return lambda: index.search(users, K)


def products_alone(users: Any, items: Any) -> Any:
    """The inner products of a counting in the same pieces, with nothing done to them."""
    import jax
    import numpy as np

    from nqf.evaluation import ranking

    batch, width = ranking._tile(len(users), len(items), ranking.BATCH, None)
    multiply = jax.jit(ranking._scores)
    shape = (-(-len(items) // width) * width, items.shape[1])
    chunks = np.resize(items, shape).reshape(-1, width, items.shape[1])
    people = np.resize(users, (-(-len(users) // batch) * batch, users.shape[1])).reshape(-1, batch, users.shape[1])

    def run() -> None:
        for chunk in chunks:
            chunk_CxD = jax.device_put(chunk)
            jax.block_until_ready([multiply(users_BxD, chunk_CxD) for users_BxD in people])

    return run


def measure(bench: Bench, count: int, users: int) -> tuple[list[list[Any]], dict[str, Any], float]:
    """Rows of the table, timings and the matmul rate for one catalogue."""
    import numpy as np

    from nqf.evaluation.ranking import rank_vectors, top_k

    rng = np.random.default_rng(bench.options.seed)
    items = rng.standard_normal((count, WIDTH), np.float32)
    people = rng.standard_normal((users, WIDTH), np.float32)
    targets, seen = rng.integers(0, count, users), list(rng.integers(0, count, (users, SEEN)))
    found: dict[str, Any] = {}

    def top() -> None:
        found["nqf"] = top_k(people, items, K)[1]

    limit = product()
    sides = {
        "matmul": limit.run,
        "products": products_alone(people, items),
        "count": lambda: rank_vectors(people, items, targets, seen),
        "top-k": top,
    }
    other = faiss_side(people, items)
    if other:
        sides["faiss"] = lambda: found.__setitem__("faiss", other()[1])
    timings = alternate(sides, bench.options.repeats, least=0 if bench.options.quick else 0.2)
    if other:
        # Both are exact; sums in another order may swap neighbors.
        same = np.mean([len(set(a) & set(b)) / K for a, b in zip(found["nqf"], found["faiss"], strict=True)])
        assert same > 0.999, same
    with peak_memory() as peak:
        sides["count"]()
        memory = peak()
    rate, work = limit.flops / timings["matmul"].median, 2.0 * users * count * WIDTH
    rows = []
    labels = {
        "count": "nqf, exact ranks",
        "products": "their products alone, in the same pieces",
        "top-k": f"nqf, top {K}",
        "faiss": f"faiss flat, top {K}",
    }
    for name, label in labels.items():
        if name in timings:
            timing = timings[name]
            share = work / timing.median / rate
            rows.append([label, count, timing.median * 1e3, timing.spread, users / timing.median, share])
    return [*rows], timings | {"memory": memory}, rate


def main() -> None:
    bench = begin(__file__, __doc__)
    sizes = (300, 1_000) if bench.options.quick else (10_000, 100_000, 1_000_000)
    users = 16 if bench.options.quick else 4_096 if bench.gpu else 512
    rows, targets, limits, notes = [], [], {}, []
    for count in sizes:
        found, timings, rate = measure(bench, count, users)
        rows += found
        limits[f"matrix product float32 beside {count:,} items, FLOP/s"] = rate
        notes.append(f"Counting {count:,} items took {timings['memory'] / 2**20:,.0f} MiB beside the vectors.")
        targets.append(
            target(
                f"exact ranks among {count:,} items, share of the matmul rate",
                found[0][-1],
                "≥",
                0.8,
                "the products in these pieces, whose own share is in the table, and which XLA's two threads do at "
                "a varying rate; checks of the vectors and the comparison of every score come on top",
            )
        )
        if "faiss" in timings:
            targets.append(
                target(
                    f"top-k over faiss among {count:,} items",
                    ratio(timings["faiss"], timings["top-k"]),
                    "≥",
                    1.0,
                    "XLA's top-k on a CPU sorts where faiss keeps a heap",
                )
            )
    bench.finish(
        [
            {
                "title": f"Ranking for {users:,} users",
                "columns": ["what", "items", "ms", "max/min", "users/s", "of the matmul rate"],
                "rows": rows,
            }
        ],
        targets=targets,
        limits=limits,
        notes=notes,
    )


if __name__ == "__main__":
    main()
