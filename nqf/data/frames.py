"""Tables in memory of other libraries as frames of polars."""

from __future__ import annotations

from typing import Any

import polars as pl

from nqf.data.errors import DataError


def frame_of(table: Any) -> pl.DataFrame:
    """A table of polars, pandas or Arrow as one of polars.

    Raises:
      DataError: Something else, or a column whose values have no common type.
    """
    if isinstance(table, pl.LazyFrame):
        return table.collect()
    if isinstance(table, pl.DataFrame):
        return table
    try:
        if type(table).__module__.split(".")[0] == "pandas":
            # Without pyarrow, polars reads no texts of pandas; the index is no column.
            if not table.columns.is_unique:
                raise DataError("the table has two columns of one name")
            return pl.DataFrame([_series(str(name), table[name]) for name in table.columns])
        if hasattr(table, "__arrow_c_stream__"):
            return pl.DataFrame(table)
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise DataError(f"the table cannot be read: {error}") from error
    raise DataError(
        f"a {type(table).__name__} is no table; give a DataFrame of polars or pandas, an Arrow table or a path"
    )


def _series(name: str, values: Any) -> pl.Series:
    kind = getattr(values.dtype, "kind", "O")
    if kind in "iufbM" and type(values.dtype).__module__.startswith("numpy"):
        return pl.Series(name, values.to_numpy(), nan_to_null=True)
    plain = values.astype(object)
    return pl.Series(name, plain.where(values.notna(), None).tolist(), strict=False)
