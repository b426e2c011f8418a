"""Files as the data scripts of the reference system write them, of invented items and users."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

BRANDS = ("Loreline", "Kindleaf", "Osmara", "Petalight", "Vireo")
THINGS = ("shampoo", "lip balm", "hand cream", "nail file", "hair brush", "face mask", "soap bar", "eye pencil")
SCENTS = ("lavender", "mint", "rose", "cedar", "citrus")
START = 1_588_687_728_923


def raw_tables(folder: Path, items: int, users: int, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Metadata and reviews as Amazon Reviews 2023 has them; pictures are local files."""
    metadata, reviews = [], []
    for number in range(items):
        brand, thing, scent = rng.choice(BRANDS), rng.choice(THINGS), rng.choice(SCENTS)
        picture = folder / "pictures" / f"{thing.replace(' ', '-')}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        if not picture.is_file():
            Image.new("RGB", (8, 8), tuple(rng.randrange(256) for _ in range(3))).save(picture)
        metadata.append(
            {
                "parent_asin": f"B{number:09d}",
                "title": f"{brand} {thing} with {scent} " + "for every day " * rng.randrange(3),
                "description": [f"A {thing} that smells of {scent}."] if rng.random() < 0.7 else [],
                "features": [f"{scent} scent", f"by {brand}"],
                "main_category": "All Beauty",
                "store": brand,
                "price": rng.choice([None, round(rng.uniform(2, 60), 2)]),
                "average_rating": round(rng.uniform(1, 5), 1),
                "rating_number": rng.randrange(1, 5_000),
                "images": [{"variant": "MAIN", "large": str(picture), "hi_res": None}] if rng.random() < 0.8 else [],
                "details": {"Brand": brand, "Color": scent} if rng.random() < 0.5 else {},
            }
        )
    for number in range(users):
        scent = rng.choice(SCENTS)
        liked = [row for row in metadata if scent in row["title"]]
        time = START + rng.randrange(10**10)
        for _ in range(rng.randrange(14, 28)):
            item = rng.choice(liked if rng.random() < 0.7 else metadata)
            time += rng.randrange(3_600_000, 10**9)
            reviews.append(
                {
                    "rating": float(rng.randrange(3, 6) if item in liked else rng.randrange(1, 4)),
                    "title": "Good" if item in liked else "Not for me",
                    "text": f"I {'like' if item in liked else 'do not like'} the {scent} of it.",
                    "user_id": f"AE{number:04d}",
                    "parent_asin": item["parent_asin"],
                    "timestamp": time,
                }
            )
    rng.shuffle(reviews)
    return metadata, reviews


def triplet(row: dict[str, Any]) -> dict[str, Any]:
    """One entry of the dictionary of fourteen fields."""
    main = next((image["large"] for image in row["images"] if image["variant"] == "MAIN"), None)
    plain = {
        name: row[name] for name in ("title", "main_category", "store", "price", "average_rating", "rating_number")
    }
    listed = {name: " ".join(row[name]) for name in ("description", "features")}
    details = {key.lower(): value for key, value in row["details"].items()}
    return plain | listed | details | ({"main_image": main} if main else {})


def old_users(sequences: dict[str, list[str]], count: int, rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Leave-one-out samples: the last item is the test file's, the one before it the training file's."""
    files: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for user, items in sequences.items():
        if len(items) > 12:
            for name, history, target in (("train", items[-22:-2], items[-2]), ("test", items[-21:-1], items[-1])):
                files[name].append(sample(user, history, target, sequences, count, rng))
    return files


def new_users(sequences: dict[str, list[str]], count: int, rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """A sample of each user's first eleven items; a fifth of the users are the test file's."""
    made = [
        sample(user, items[:10], items[10], sequences, count, rng)
        for user, items in sequences.items()
        if len(items) > 10
    ]
    rng.shuffle(made)
    return {"train": made[len(made) // 5 :], "test": made[: len(made) // 5]}


def sample(
    user: str, history: list[str], target: str, sequences: dict[str, list[str]], count: int, rng: random.Random
) -> dict[str, Any]:
    """One sample with `count` candidates."""
    everything = sorted({item for items in sequences.values() for item in items} - {*history, target})
    candidates = [target, *rng.sample(everything, count - 1)]
    rng.shuffle(candidates)
    return {"user_id": user, "history": history, "candidate": candidates, "ground_truth": target}


def write(
    folder: Path,
    *,
    items: int = 150,
    users: int = 40,
    candidates: int = 100,
    seed: int = 0,
    samples: Callable = old_users,
) -> Path:
    """Writes everything but the embeddings, which no script of the reference writes; returns `data_rec`."""
    rng, data = random.Random(seed), folder / "data_rec"
    metadata, reviews = raw_tables(folder, items, users, rng)
    for part in ("dict", "data", "embeddings", "temp"):
        (data / part).mkdir(parents=True, exist_ok=True)
    for name, rows in (("meta_All_Beauty", metadata), ("All_Beauty", reviews)):
        (data / "temp" / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    dictionaries = {
        "item": {
            row["parent_asin"]: {key: value for key, value in row.items() if key != "parent_asin"} for row in metadata
        },
        "item_triplet": {row["parent_asin"]: triplet(row) for row in metadata},
        "review": {
            f"{row['user_id']}|{row['parent_asin']}": {
                key: value for key, value in row.items() if key not in ("user_id", "parent_asin")
            }
            for row in reviews
        },
    }
    for name, tree in dictionaries.items():
        (data / "dict" / f"All_Beauty_{name}_dict.json").write_text(json.dumps(tree))
    with (data / "Amazon_All_Beauty.inter").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["user_id:token", "item_id:token", "rating:float", "timestamp:float"])
        writer.writerows([row["user_id"], row["parent_asin"], row["rating"], row["timestamp"]] for row in reviews)
    sequences: dict[str, list[str]] = {}
    for row in sorted(reviews, key=lambda row: row["timestamp"]):
        sequences.setdefault(row["user_id"], []).append(row["parent_asin"])
    for part, made in samples(sequences, candidates, rng).items():
        (data / "data" / f"Amazon_All_Beauty_20_{part}.json").write_text(json.dumps(made, indent=4))
    return data
