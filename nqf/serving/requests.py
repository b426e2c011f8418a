"""What may be asked of the service, as pydantic models: their limits are the service's, and OpenAPI says them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

ItemId = Annotated[str, Field(min_length=1, max_length=1_000)]
Ids = Annotated[list[ItemId], Field(max_length=10_000)]
Value = Annotated[str, Field(max_length=1_000)] | int | float


class Body(BaseModel):
    """A request: unknown keys are refused, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, str_max_length=20_000)


class Range(Body):
    """Bounds of a number or a time (unix seconds), both inclusive."""

    least: float | None = None
    most: float | None = None


class Filtered(Body):
    """What every list of items takes."""

    k: int = Field(10, ge=1, le=1_000, description="Number of items.")
    exclude: Ids = Field([], description="Item ids that are not recommended.")
    only: Ids | None = Field(None, description="Item ids of which some are recommended.")
    where: dict[str, Value | Annotated[list[Value], Field(max_length=1_000)] | Range] = Field(
        {}, max_length=20, description="Field to a value, values of which one suffices, or bounds."
    )

    def filters(self) -> dict[str, Any]:
        """The arguments of `Recommender.recommend` that are the same for everybody."""
        where = {
            name: (wanted.least, wanted.most) if isinstance(wanted, Range) else wanted
            for name, wanted in self.where.items()
        }
        return {"k": self.k, "exclude": self.exclude, "only": self.only, "where": where}


class Recommend(Filtered):
    """One of the first four; the rest is as `nqf.Recommender.recommend` takes it."""

    history: Ids | None = Field(None, description="Item ids, oldest first.")
    histories: Annotated[list[Ids], Field(max_length=512)] | None = None
    user: ItemId | None = None
    users: Annotated[list[ItemId], Field(max_length=512)] | None = None
    fallback: Literal["popular", "refuse"] | None = Field(None, description="Who gets the popular items.")
    repeats: bool | None = Field(None, description="Whether items of the history may be recommended.")
    times: list[JsonValue] | None = None
    ratings: list[JsonValue] | None = None
    reviews: list[JsonValue] | None = None


class Similar(Filtered):
    """Items like one."""

    item_id: ItemId


class Explain(Body):
    """Why an item stands where it stands after a history."""

    history: Annotated[list[ItemId], Field(min_length=1, max_length=1_000)]
    item_id: ItemId


class Lookup(Body):
    """Contents of items."""

    item_ids: Annotated[list[ItemId], Field(max_length=1_000)]


class Search(Body):
    """Items whose titles hold all words of a text, or whose id begins with it."""

    text: str = Field("", max_length=1_000)
    limit: int = Field(24, ge=1, le=100)
    offset: int = Field(0, ge=0, le=10_000_000)


class Change(Body):
    """Items with item_id and columns of the run's schema."""

    items: Annotated[list[dict[str, JsonValue]], Field(min_length=1, max_length=1_000)]


class Remove(Body):
    """Items that are recommended no longer."""

    item_ids: Annotated[list[ItemId], Field(min_length=1, max_length=1_000)]
