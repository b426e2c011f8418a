"""A catalogue and users with planted preferences, deterministic by seed: the quick start's data.

Every item has a topic, a style and a tier, and shows them in its fields. Every user keeps to one style and one tier
and moves from topic to topic by a fixed rule: the topic of the last item decides where to, and the department of
the item before it decides which of four ways. So the next item takes the order of the last two items (sequence)
and what the items are (content): the topics that follow each other share no nouns, popularity is nearly flat, and
a pair of items recurs too seldom for counts to tell much.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import yaml
from PIL import Image

from nqf.config import SyntheticConfig
from nqf.data.lexicon import DEPARTMENTS, REVIEWS, STYLES, TIERS

TOPICS = tuple((department, topic) for department, topics in DEPARTMENTS.items() for topic in topics)
DEPARTMENT_OF = np.array([list(DEPARTMENTS).index(department) for department, _ in TOPICS])
TOPIC_KEPT, STYLE_KEPT, TIER_KEPT = 0.92, 0.92, 0.92
"""How often an interaction follows the rule (else it stays with the last topic), keeps the user's style and keeps the
user's tier (else any is drawn)."""
_SIDE = 24
_DAY = 86_400
_EPOCH_2023 = 1_672_531_200
_SCHEMA = {
    "title": "title",
    "fields": {
        "title": "text",
        "description": "text",
        "brand": "category",
        "categories": {"modality": "category", "multi_valued": True},
        "price": {"modality": "number", "log": True},
        "released": "time",
        "image": "image",
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """What lies behind the tables.

    Attributes:
      topics: int64 [items], index into `TOPICS`.
      styles: int64 [items].
      tiers: int64 [items].
      popularity: float64 [items], relative weight among items of equal topic, style and tier.
      unseen: bool [items], items that occur only as validation or test target.
      rule: int64 [departments, topics], the topic after a topic, by the department of the item before.
      user_styles: int64 [users].
      user_tiers: int64 [users].
      histories: Items of every user, in order; the last two are the validation and the test target.
    """

    topics: np.ndarray
    styles: np.ndarray
    tiers: np.ndarray
    popularity: np.ndarray
    unseen: np.ndarray
    rule: np.ndarray
    user_styles: np.ndarray
    user_tiers: np.ndarray
    histories: list[list[int]]


def generate(config: SyntheticConfig, seed: int, directory: Path) -> None:
    """Writes items.parquet, interactions.parquet, schema.yaml and, if asked for, images/*.png.

    Args:
      config: Sizes and shares.
      seed: The same seed gives the same bytes.
      directory: An existing folder.
    """
    world = draw_world(config, seed)
    # Streams of their own, so that the tables' wording does not depend on how many events were drawn.
    items = _item_table(world, config, np.random.default_rng([seed, 1]))
    if config.images:
        names = _draw_images(world, items["image"], np.random.default_rng([seed, 2]), directory)
        items = items.with_columns(image=names)
    else:
        items = items.drop("image")
    items.write_parquet(directory / "items.parquet")
    _event_table(world, np.random.default_rng([seed, 3])).write_parquet(directory / "interactions.parquet")
    fields = {name: options for name, options in _SCHEMA["fields"].items() if name in items.columns}
    tree = {**_SCHEMA, "fields": fields}
    (directory / "schema.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def draw_world(config: SyntheticConfig, seed: int) -> World:
    """Draws items, users and histories."""
    rng = np.random.default_rng([seed, 0])
    # Every combination equally often, so that none is empty while there are enough items.
    cells = rng.permutation(np.arange(config.items) % (len(TOPICS) * len(STYLES) * len(TIERS)))
    topics, rest = np.divmod(cells, len(STYLES) * len(TIERS))
    styles, tiers = np.divmod(rest, len(TIERS))
    unseen = np.zeros(config.items, bool)
    unseen[rng.permutation(config.items)[: round(config.items * config.unseen_share)]] = True
    world = World(
        topics=topics,
        styles=styles,
        tiers=tiers,
        popularity=rng.lognormal(0, 0.4, config.items),
        unseen=unseen,
        rule=_draw_rule(rng),
        user_styles=rng.integers(len(STYLES), size=config.users),
        user_tiers=rng.integers(len(TIERS), size=config.users),
        histories=[],
    )
    members = [np.flatnonzero(cells == cell) for cell in range(len(TOPICS) * len(STYLES) * len(TIERS))]
    lengths = rng.integers(config.min_events, config.max_events + 1, size=config.users)
    world.histories.extend(_draw_history(world, members, user, int(length), rng) for user, length in enumerate(lengths))
    return world


def next_topic(world: World, history: list[int]) -> int | None:
    """The topic that the rule names after a history; None for an empty one."""
    if not history:
        return None
    before = world.topics[history[-2:][0]]
    return int(world.rule[DEPARTMENT_OF[before], world.topics[history[-1]]])


def _draw_rule(rng: np.random.Generator) -> np.ndarray:
    """The rule, int64 [departments, topics], of 1000 random ones under which the last topic alone says least."""
    size = len(TOPICS)
    rules = [np.stack([_derangement(rng, size) for _ in DEPARTMENTS]) for _ in range(1000)]

    def share_guessed(rule: np.ndarray) -> float:
        """How often the next topic is the most frequent one after the last topic, over twenty steps."""
        # Entry [before, last] moves to [last, rule's topic], or to [last, last] if it stays with the topic.
        following = np.arange(size) * size + rule[DEPARTMENT_OF]
        pairs = np.full((size, size), 1 / size**2)
        counts = np.zeros((size, size))
        for _ in range(20):
            moved = np.bincount(following.ravel(), weights=TOPIC_KEPT * pairs.ravel(), minlength=size**2)
            pairs = moved.reshape(size, size) + np.diag((1 - TOPIC_KEPT) * pairs.sum(axis=0))
            counts += pairs
        return counts.max(axis=1).sum() / counts.sum()

    return min(rules, key=share_guessed)


def _derangement(rng: np.random.Generator, size: int) -> np.ndarray:
    while True:
        order = rng.permutation(size)
        if (order != np.arange(size)).all():
            return order


def _draw_history(
    world: World, members: list[np.ndarray], user: int, length: int, rng: np.random.Generator
) -> list[int]:
    history: list[int] = []
    # Without replacement: an item is chosen once.
    free = np.ones(len(world.topics), bool)
    free[world.unseen] = False
    for event in range(length):
        if event == length - 2:
            free[world.unseen] = True
        topic = next_topic(world, history)
        if topic is None:
            topic = rng.integers(len(TOPICS))
        elif rng.random() >= TOPIC_KEPT:
            topic = world.topics[history[-1]]
        style = world.user_styles[user] if rng.random() < STYLE_KEPT else rng.integers(len(STYLES))
        tier = world.user_tiers[user] if rng.random() < TIER_KEPT else rng.integers(len(TIERS))
        cell = (topic * len(STYLES) + style) * len(TIERS) + tier
        candidates = members[cell][free[members[cell]]]
        if not len(candidates):
            candidates = np.flatnonzero(free)
        weights = world.popularity[candidates]
        item = int(rng.choice(candidates, p=weights / weights.sum()))
        free[item] = False
        history.append(item)
    return history


def _item_table(world: World, config: SyntheticConfig, rng: np.random.Generator) -> pl.DataFrame:
    styles = list(STYLES.values())
    rows = []
    for topic, style, tier in zip(world.topics, world.styles, world.tiers, strict=True):
        department, name = TOPICS[topic]
        nouns, purpose = DEPARTMENTS[department][name]
        adjectives, brands, look, _ = styles[style]
        noun, adjective, brand = rng.choice(nouns), rng.choice(adjectives), rng.choice(brands)
        sentence, factor = TIERS[tier]
        # A base price per topic, so that the price tells the tier only together with the topic.
        price = (6 + 2.5 * (topic * 7 % len(TOPICS))) * factor * rng.lognormal(0, 0.15)
        rows.append(
            {
                "title": f"{adjective} {noun} No. {rng.integers(1, 100)}",
                "description": f"{noun} for {purpose}, with {look}. {sentence}.",
                "brand": str(brand),
                "categories": f"{department}|{name}",
                "price": round(float(price), 2),
                "released": _EPOCH_2023 - int(rng.integers(1, 2_000)) * _DAY,
                "image": True,
            }
        )
    table = pl.DataFrame(rows)
    there = {
        name: pl.when(pl.Series(rng.random(len(table)) >= config.missing_share)).then(pl.col(name))
        for name in table.columns
        if name != "title"
    }
    item_ids = pl.Series("item_id", [f"item-{row:05d}" for row in range(len(table))])
    return table.with_columns(**there).insert_column(0, item_ids)


def _draw_images(world: World, there: pl.Series, rng: np.random.Generator, directory: Path) -> pl.Series:
    """One thumbnail per item: the style is its color, the tier the number of bars, the department their place."""
    (directory / "images").mkdir()
    colors = [color for *_, color in STYLES.values()]
    names = []
    for row, present in enumerate(there):
        noise = rng.normal(0, 10, (_SIDE, _SIDE, 3))
        if not present:
            names.append(None)
            continue
        pixels = np.asarray(colors[world.styles[row]]) + rng.normal(0, 12, 3) + noise
        top = 2 + 5 * DEPARTMENT_OF[world.topics[row]]
        for bar in range(world.tiers[row] + 1):
            pixels[top : top + 4, 3 + 7 * bar : 7 + 7 * bar] += 90
        names.append(f"images/{row:05d}.png")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(directory / names[-1])
    return pl.Series("image", names, dtype=pl.String)


def _event_table(world: World, rng: np.random.Generator) -> pl.DataFrame:
    rows = []
    for user, history in enumerate(world.histories):
        time = _EPOCH_2023 + int(rng.integers(200 * _DAY))
        for item in history:
            time += int(rng.exponential(4 * _DAY)) + 60
            # A wrong style or tier costs a star.
            same_style = world.styles[item] == world.user_styles[user]
            same_tier = world.tiers[item] == world.user_tiers[user]
            rating = 2 + int(same_style) + int(same_tier) + int(rng.random() < 0.7)
            review = str(rng.choice(REVIEWS[rating])) if rng.random() < 0.3 else None
            rows.append((f"user-{user:05d}", f"item-{item:05d}", time, float(rating), review))
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "rating": pl.Float32}
    return pl.DataFrame(rows, orient="row", schema={**schema, "review": pl.String})
