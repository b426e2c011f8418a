"""Filters of recommendations by what the items are."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import polars as pl

from nqf.data.catalogue import Catalogue
from nqf.data.schema import nearest
from nqf.serving.stock import Stock

_MODALITIES = ("category", "text", "number", "time")


class Filters:
    """Which items have certain values of their fields."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._path = catalogue.path
        self._modalities = {field.name: field.modality for field in catalogue.schema.fields}
        self._column = functools.cache(lambda name: pl.read_parquet(self._path, columns=[name], glob=False)[name])

    def having(self, stock: Stock, name: str, wanted: Any) -> np.ndarray:
        """Which items have what is wanted of a field, bool [items].

        Args:
          stock: The items.
          name: The field.
          wanted: A value or a list of values, one of which suffices; of numbers and times also a pair (least, most),
            None for no bound.

        Raises:
          ValueError: A field that is unknown or cannot be filtered by, a value of another kind, or one that no item
            has.
        """
        modality = self._modalities.get(name)
        if modality is None:
            raise ValueError(f"where: unknown field '{name}'{nearest(str(name), self._modalities)}")
        if modality not in _MODALITIES:
            raise ValueError(f"where: {name} is a {modality}; filters are for categories, texts, numbers and times")
        values = self._column(name)
        changes = [(row, change.row[name]) for row, change in list(stock.changed.items()) if row < stock.count]
        new = pl.Series([value for _, value in changes], dtype=values.dtype, strict=False)
        words = modality in ("category", "text")
        if isinstance(wanted, tuple) and len(wanted) == 2 and not words:
            low, high = wanted
            bounds = (-math.inf if low is None else low, math.inf if high is None else high)
            masks = [column.is_between(*bounds).fill_null(False) for column in (values, new)]
        else:
            among = [wanted] if isinstance(wanted, (str, int, float)) else list(wanted)
            if strange := [value for value in among if isinstance(value, str) != words]:
                raise ValueError(f"where: {name} is a {modality}, but {strange[0]!r} is a {type(strange[0]).__name__}")
            flat = [column.explode() if modality == "category" else column for column in (values, new)]
            known = set(pl.concat(flat).drop_nulls().unique())
            if unknown := [value for value in among if value not in known]:
                near = nearest(str(unknown[0]), sorted(map(str, known))) if len(known) <= 2_000 else ""
                near = near if len(known) <= 20 or "did you mean" in near else ""
                raise ValueError(f"where: no item has {unknown[0]!r} in {name}{near}")
            masks = [_any_of(column, among) for column in (values, new)]
        found = np.zeros(stock.count, bool)
        found[: len(values)] = masks[0].to_numpy()
        found[[row for row, _ in changes]] = masks[1].to_numpy()
        return found


def _any_of(column: pl.Series, among: list[Any]) -> pl.Series:
    frame = column.to_frame("value")
    value = pl.col("value")
    if isinstance(column.dtype, pl.List):
        test = value.list.eval(pl.element().is_in(among)).list.any()
    else:
        test = value.is_in(among)
    return frame.select(test.fill_null(False))["value"]
