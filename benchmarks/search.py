"""The best items of one user and of 64 among 100 thousand and a million: all compared, or by an index.

    python benchmarks/search.py [--items 100000 1000000] [--quick]

The exact search is the one that serves: vectors stay on the device, and one program scores and sorts them. The index is
that of `Recommender.load(run, index="approximate")`, built and tuned here as it is there. Item vectors are made up as
wide as nqf's and of their form, 64 learned components and 128 of frozen text, each of unit norm, a tenth of the items
without a text. Items of a topic stand near each other, and a user is the mean of a history of three topics, which is
left out of the list. Vectors without any structure stand beside them: hardly a list can be passed over in their search,
and the index finds that out. CPU time is that of all threads.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from common import Bench, begin, copy_rate, product, target
from serving import by_turns

LEARNED, TEXT, LATENT, K = 64, 128, 24, 10
USERS = (1, 64)


def made_up(count: int, users: int, seed: int) -> tuple[Any, Any, list[Any]]:
    """Item vectors float32 [count, 192], user vectors float32 [users, 192], unit rows, and the users' item rows."""
    import numpy as np

    from nqf.fields.encoder import unit_rows

    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    # Topics of 200 items stand in groups, as kinds of articles do in departments.
    topics = max(4, count // 200)
    centers = normal(int(topics**0.5), LATENT)[rng.integers(0, int(topics**0.5), topics)] + 0.7 * normal(topics, LATENT)
    topic, parts = np.sort(rng.integers(0, topics, count)), []
    for width in (LEARNED, TEXT):
        mapped = (centers[topic] + 0.6 * normal(count, LATENT)) @ normal(LATENT, width)
        parts.append(unit_rows(mapped + 0.5 * mapped.std() * normal(count, width)))
    parts[1][rng.random(count) < 0.1] = 0
    items, starts = np.concatenate(parts, axis=1), np.searchsorted(topic, np.arange(topics + 1))
    histories, people = [], np.zeros((users, LEARNED + TEXT), np.float32)
    for user in range(users):
        liked = rng.choice(topic[rng.integers(0, count, 3)], rng.integers(3, 20))
        histories.append(rng.integers(starts[liked], starts[liked + 1]))
        mean = 0.7 ** np.arange(len(liked))[::-1] @ items[histories[-1]]
        learned = mean[:LEARNED] / np.linalg.norm(mean[:LEARNED]) + 0.3 * normal(LEARNED) / LEARNED**0.5
        people[user, :LEARNED] = learned / np.linalg.norm(learned)
        people[user, LEARNED:] = 0.6 * mean[LEARNED:] / max(np.linalg.norm(mean[LEARNED:]), 1e-9)
    return items, unit_rows(people), histories


def without_structure(count: int, users: int, seed: int) -> tuple[Any, Any, list[Any]]:
    """The same, every component drawn by itself."""
    import numpy as np

    from nqf.fields.encoder import unit_rows

    rng = np.random.default_rng(seed)
    items, people = (rng.standard_normal((rows, LEARNED + TEXT), np.float32) for rows in (count, users))
    return unit_rows(items), unit_rows(people), list(rng.integers(0, count, (users, 10)))


def stock_of(vectors: Any) -> Any:
    """What a recommender serves, of items of which nothing but the vectors is known."""
    import numpy as np

    from nqf.pipelines.batches import ItemTables
    from nqf.serving.stock import Stock

    nothing = np.zeros((len(vectors), 0), np.float32)
    tables = ItemTables(
        tokens=nothing[:, None],
        vectors=nothing,
        fields=nothing,
        neighbors=nothing,
        text=nothing,
        has_text=np.zeros(len(vectors), bool),
        trained=np.ones(len(vectors), bool),
        titles=nothing.astype(np.int32),
    )
    return Stock.of([str(row) for row in range(len(vectors))], [""] * len(vectors), tables, vectors)


def measure(bench: Bench, count: int, what: str) -> dict[str, Any]:
    """Times of both searches, by number of users, and what is known of the index."""
    from nqf.serving.index import SAMPLE, recall

    make = made_up if what == "topics" else without_structure
    items, people, seen = make(count, 2 * SAMPLE, bench.options.seed)
    bench.say(f"{count:,} items, {what}")
    exact = stock_of(items)
    # Users that neither chose how many lists are read nor told the recall.
    index = exact.indexed(people[:SAMPLE], seen[:SAMPLE])
    people, seen, allowed = people[SAMPLE:], seen[SAMPLE:], exact.available
    bench.say(str(index.index))
    found: dict[str, Any] = {"items": count, "what": what, "index": index.index.facts(), "users": {}}
    best = [stock.best(people, K, allowed, seen)[0] for stock in (index, exact)]
    found["recall"] = recall(*best)
    for users in USERS:

        def asking(stock: Any, users: int = users) -> Any:
            # One batch after the other: the same again would find its lists in the caches.
            spans = itertools.cycle(slice(start, start + users) for start in range(0, len(people), users))
            return lambda: stock.best(people[span := next(spans)], K, allowed, seen[span])

        repeats = max(3, bench.options.repeats * (8 if users == 1 else 2))
        found["users"][users] = by_turns({"exact": asking(exact), "index": asking(index)}, repeats)
    return found


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000], help="sizes, ascending")

    bench = begin(__file__, __doc__, arguments)
    sizes = (2_000, 20_000) if bench.options.quick else tuple(bench.options.items)
    made = [measure(bench, count, what) for what, count in
            [*(("topics", count) for count in sizes), ("without structure", sizes[0])]]  # fmt: skip
    times, indexes, targets = [], [], []
    for found in made:
        facts, what, count = found["index"], found["what"], found["items"]
        indexes.append([what, count, facts["seconds"], facts["bytes"] / 2**20, facts["lists"],
                        *(facts["lists_read"].get(depth, "") for depth in ("10", "100")),
                        facts["recall@10"], found["recall"]])  # fmt: skip
        for users, sides in found["users"].items():
            faster = {key: sides["exact"][key] / sides["index"][key] for key in ("median", "cpu")}
            for name, label in (("exact", "exact"), ("index", "by the index")):
                side = sides[name]
                times.append([label, what, count, users, 1e3 * side["median"], 1e3 * side["p99"], 1e3 * side["cpu"],
                              faster["median"] if name == "index" else 1.0])  # fmt: skip
            if what == "topics" and count == sizes[-1]:
                bound = "what a call of numpy and faiss costs beside the search" if users == 1 else "one core per user"
                targets.append(target(f"search by the index over the exact one, {users} among {count:,} items",
                                      faster["median"], "≥", 10.0, bound))  # fmt: skip
        if what == "topics":
            targets.append(target(f"recall@{K} of the index among {count:,} items", found["recall"], "≥", 0.95,
                                  "the lists that are read"))  # fmt: skip
    one = next(found for found in made if found["items"] == sizes[-1])["users"][1]["exact"]["cpu"]
    targets.append(target(f"CPU seconds of the exact search, one user among {sizes[-1]:,} items", one, "≤", 0.1,
                          "reading the vectors once"))  # fmt: skip
    limit = product()
    limits = {
        "matrix product float32, FLOP/s": limit.flops / by_turns({"matmul": limit.run}, 5)["matmul"]["median"],
        "memory copy, B/s": copy_rate(),
    }
    bench.finish(
        [
            {
                "title": f"A call for the best {K} items",
                "columns": ["search", "vectors", "items", "users", "ms", "p99, ms", "CPU, ms", "times the exact speed"],
                "rows": times,
            },
            {
                "title": "The index",
                "columns": ["vectors", "items", "built in, s", "MiB", "lists", "read for 10", "read for 100",
                            f"recall@{K}, told at load", f"recall@{K}, other users"],
                "rows": indexes,
            },
        ],
        targets=targets,
        limits=limits,
        details={"searches": made},
    )  # fmt: skip


if __name__ == "__main__":
    main()
