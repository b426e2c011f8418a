"""Folders of Parquet parts as Ray Data writes them, and what nqf has to make of each.

`ray_parts.tar.gz` holds what `write` wrote with Ray 2.60 and pyarrow 26; `python ray_folders.py FOLDER` makes it again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from nqf.data.catalogue import canonical, plain_ids, resolve
from nqf.data.readers import open_table
from nqf.data.schema import schema_from_tree

ROWS = 6
TIMES = [1_700_000_000 + k for k in range(ROWS)]
# Folder: fields, and the values of the first and of the last row.
READ: dict[str, tuple[dict[str, str], list[Any], list[Any]]] = {
    "plain": ({"title": "text", "n": "number"}, ["title 0", 0.0], ["title 5", 5.0]),
    "stacked": ({"vector": "vector"}, [[0.0, 1.0, 2.0]], [[5.0, 6.0, 7.0]]),
    "native": ({"vector": "vector"}, [[0.0, 1.0, 2.0]], [[5.0, 6.0, 7.0]]),
    "ragged": ({"tags": "category"}, [["0.0", "1.0"]], [["0.0", "1.0", "2.0"]]),
    "texts": ({"tags": "category"}, [["é0", "bc"]], [["é5", "bc"]]),
    "lists": ({"tags": "category"}, [None], [["t0"]]),
    "pandas": (
        {"brand": "category", "day": "time", "gap": "number", "vector": "vector"},
        [["x"], 1_704_067_200, None, [0.0, 2.0]],
        [["z"], 1_704_067_200, 5.0, [5.0, 2.0]],
    ),
    "times": ({"s": "time", "ns": "time", "zoned": "time"}, [TIMES[0]] * 3, [TIMES[5]] * 3),
    "arrow": (
        {"map": "category", "price": "number", "large": "text", "nothing": "text", "pair": "vector"},
        [["WiFi: free"], 12.5, "a", None, [1.0, 2.0]],
        [["WiFi: free"], 12.5, "a", None, [1.0, 2.0]],
    ),
    "filtered": ({"title": "text"}, ["title 0"], ["title 1"]),
    # The first block has no price, the second whole numbers.
    "gaps": ({"price": "number", "late": "category"}, [None, None], [5.0, ["a"]]),
    "id_types": ({"title": "text"}, ["a"], ["c"]),
}
REFUSED = {
    "matrix": ("vector", r"column 'vector' holds arrays of 2 axes \(2 x 3\), .* write it with array\.reshape"),
    "objects": ("tags", r"column 'tags' has the type 'ray\.data\.arrow_pickled_object', .* write it as numbers, texts"),
    "time_types": ("t", r"column 't' holds numbers in \S+ and times in \S+; write it with one type in all parts"),
    "partitioned": ("n", "has folders in it, such as year=2020; .* write the table without partitions"),
}


def read(folder: Path, fields: dict[str, str], scratch: Path) -> tuple[list[tuple], list[str]]:
    """Canonical rows, ids first, and notes."""
    table = open_table(folder)
    schema = schema_from_tree({"title": "title" if "title" in fields else None, "fields": fields})
    columns = {"item_id": None} | {column: field for field in schema.fields for column in field.columns}
    frame, notes = plain_ids(table.read(columns, scratch), ("item_id",), (), str(folder))
    schema, more, _ = resolve(frame, schema, str(folder))
    rows = canonical(frame, schema, Path("/")).select("item_id", *fields).collect().rows()
    return rows, [*table.notes, *notes, *more]


def write(folder: Path) -> None:
    """Writes all folders with Ray, which is initialized."""
    import pandas as pd
    import pyarrow as pa
    import ray.data

    def items(rows: int = ROWS, blocks: int = 2) -> Any:
        made = [{"item_id": f"i{k}", "title": f"title {k}", "n": k} for k in range(rows)]
        return ray.data.from_items(made, override_num_blocks=blocks)

    def numpy(name: str, make: Any) -> Any:
        return items().map_batches(lambda batch: {**batch, name: make(batch["n"])}, batch_format="numpy")

    def pandas(**columns: Any) -> Any:
        def add(frame: pd.DataFrame) -> pd.DataFrame:
            return frame.assign(**{name: make(list(frame["n"])) for name, make in columns.items()})

        return items().map_batches(add, batch_format="pandas")

    def filled(values: list[Any]) -> np.ndarray:
        array = np.empty(len(values), object)
        array[:] = values
        return array

    def arrow(table: pa.Table) -> pa.Table:
        import decimal

        for name, value, dtype in (
            ("map", [("WiFi", "free")], pa.map_(pa.string(), pa.string())),
            ("price", decimal.Decimal("12.50"), pa.decimal128(10, 2)),
            ("large", "a", pa.large_string()),
            ("nothing", None, pa.null()),
            ("pair", [1.0, 2.0], pa.list_(pa.float32(), 2)),
        ):
            table = table.append_column(name, pa.array([value] * len(table), dtype))
        return table

    def native(table: pa.Table) -> pa.Table:
        stacked = np.stack([np.arange(3, dtype=np.float32) + k for k in table["n"].to_pylist()])
        return table.append_column("vector", pa.FixedShapeTensorArray.from_numpy_ndarray(stacked))

    def seconds(n: np.ndarray, unit: str) -> np.ndarray:
        return np.array([TIMES[k] for k in n], "datetime64[s]").astype(f"datetime64[{unit}]")

    def one(**row: Any) -> Any:
        return ray.data.from_items([row], override_num_blocks=1)

    zoned = items().map_batches(
        lambda table: (
            table.append_column("s", pa.array(seconds(table["n"].to_numpy(), "s")))
            .append_column("ns", pa.array(seconds(table["n"].to_numpy(), "ns")))
            .append_column(
                "zoned", pa.array(seconds(table["n"].to_numpy(), "us")).cast(pa.timestamp("us", "Asia/Tokyo"))
            )
        ),
        batch_format="pyarrow",
    )
    tables = {
        "plain": items(),
        "stacked": numpy("vector", lambda n: np.stack([np.arange(3, dtype=np.float32) + k for k in n])),
        "native": items().map_batches(native, batch_format="pyarrow"),
        "matrix": numpy("vector", lambda n: np.stack([np.arange(6.0).reshape(2, 3) + k for k in n])),
        # A block of arrays of one length is a tensor, one of several lengths is a ragged one.
        "ragged": numpy("tags", lambda n: filled([np.arange(2.0 + (k == 5)) for k in n])),
        "texts": numpy("tags", lambda n: np.array([[f"é{k}", "bc"] for k in n])),
        "lists": numpy("tags", lambda n: filled([[f"t{j}" for j in range(k % 2)] for k in n])),
        "objects": numpy("tags", lambda n: filled([{"a", int(k)} for k in n])),
        "pandas": pandas(
            brand=lambda n: pd.Categorical([("x" if k < 3 else "z") for k in n]),
            day=lambda n: pd.Timestamp("2024-01-01"),
            gap=lambda n: [k if k % 2 else None for k in n],
            vector=lambda n: [np.array([1.0 * k, 2.0]) for k in n],
        ),
        "times": zoned,
        "arrow": items().map_batches(arrow, batch_format="pyarrow"),
        "filtered": items(blocks=3).filter(lambda row: row["n"] < 2),
        "gaps": pandas(
            price=lambda n: [None if n[0] == 0 else k for k in n], late=lambda n: [None if n[0] == 0 else "a"] * len(n)
        ),
        "id_types": one(item_id=1, title="a").union(one(item_id="007", title="c")),
        "time_types": one(item_id="1", t=TIMES[0]).union(one(item_id="2", t=pd.Timestamp("2024-01-01"))),
    }
    for name, table in tables.items():
        table.write_parquet(str(folder / name))
    odd = items().map(lambda row: {**row, "year": 2020 + row["n"] % 2})
    odd.write_parquet(str(folder / "partitioned"), partition_cols=["year"])
    for _ in range(2):
        items(2, 1).write_parquet(str(folder / "twice"))
    one(item_id="1", title="a").union(one(item_id="2")).write_parquet(str(folder / "lacking"))


def main() -> None:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    write(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
