"""Which column is the user, the item, the time, the rating and the review: as configured, or by common names."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from nqf.config import ColumnsConfig
from nqf.data.errors import DataError
from nqf.data.schema import nearest, some

CANONICAL = {"user": "user_id", "item": "item_id", "time": "timestamp", "rating": "rating", "review": "review"}
"""What nqf calls the columns of the interactions."""
# In the order of preference, as letters and digits only. From MovieLens, Amazon 2014 to 2023, Yelp, Goodreads, Steam,
# Book-Crossing, RetailRocket, H&M, Yoochoose, Otto, MIND, RecBole's data sets and the usual exports of shops.
_ITEM = (
    "itemid item iid productid product sku articleid article parentasin asin movieid bookid isbn businessid trackid "
    "songid gameid appid newsid videoid artistid animeid recipeid listingid contentid goodsid stockcode itemsku "
    "productcode productsku variantsku gmapid venueid poiid eventid merchantid storeid aid"
)
_COMMON = {
    "user": "userid user uid username customerid customer clientid visitorid memberid reviewerid accountid buyerid "
    "profileid personid playerid readerid customernumber customeremail email sessionid session",
    "item": _ITEM,
    "id": f"{_ITEM} id",
    "time": "timestamp time ts unixreviewtime unixtime unixtimestamp timestampms datetime eventtime eventtimestamp "
    "createdat created orderedat orderdate orderedon purchasedat purchasedate purchasetime tdat invoicedate date "
    "reviewtime reviewdate ratedat ratingtime clicktime viewedat playedat watchedat addedat dateadded updatedat "
    "dateupdated readat submitted day",
    "rating": "rating ratings stars star score overall bookrating userrating reviewrating reviewscore starrating grade",
    "review": "review reviewtext text comment comments reviewbody body reviewcontent",
}
_TIME = re.compile(r"(^|_)(time|timestamp|date|datetime)(_|$)|_(at|on)$", re.I)


def identify(
    path: Path, names: Sequence[str], roles: Collection[str], config: ColumnsConfig
) -> tuple[dict[str, str], list[str]]:
    """Finds the columns of some roles.

    Args:
      path: Named in errors and notes.
      names: Columns of the table.
      roles: Of `ColumnsConfig`: `id` for an item table, the others for interactions.
      config: Names that are given.

    Returns:
      Column by role, without the roles that have none, and what was guessed, in words.

    Raises:
      DataError: A given column is not there, or there is none for the user or item.
    """
    found: dict[str, str] = {}
    notes: list[str] = []
    for role in roles:
        given = getattr(config, role)
        if given is None and role == "id" and config.item in names:
            given = config.item
        if given is not None:
            if given not in names:
                raise DataError(f"{path}: no column '{some([given])}' ({_named(role)}){nearest(given, names)}")
            found[role] = given
            continue
        canonical = CANONICAL.get(role, CANONICAL["item"])
        candidates = [canonical] if canonical in names else _candidates(role, names, taken=found.values())
        if candidates:
            found[role] = candidates[0]
        if candidates and candidates[0] != canonical:
            others = f", not {some(candidates[1:])}" if candidates[1:] else ""
            what = "the id of an item" if role == "id" else f"the {role}"
            notes.append(
                f"{path}: {what} is taken from the column '{some(candidates[:1])}'{others}; {_named(role)} sets it"
            )
    for role in ("user", "item", "id"):
        if role in roles and role not in found:
            canonical = CANONICAL.get(role, CANONICAL["item"])
            raise DataError(
                f"{path}: no column '{canonical}' and none of a common name for it; it has {some(names)}; name the one "
                f"that is meant by {_named(role)}{_headless(names)}"
            )
    return found, notes


def identify_interactions(path: Path, names: Sequence[str], config: ColumnsConfig) -> tuple[dict[str, str], list[str]]:
    """`identify` for interactions; the notes also name the columns that are not used, and say what no times mean.

    Raises:
      DataError: As `identify`.
    """
    found, notes = identify(path, names, tuple(CANONICAL), config)
    if unused := [name for name in names if name not in found.values()]:
        notes.append(f"{path}: columns that are not used: {some(unused)}")
    if "time" not in found:
        notes.append(
            f"{path}: no column of times was found, so the order of the file is taken for the order of events; where "
            "it is another, nothing that is measured here holds; data.columns.time or nqf.fit's time names it"
        )
    return found, notes


def _named(role: str) -> str:
    return f"data.columns.{role} or nqf.fit's {'item_id' if role == 'id' else role}"


def _candidates(role: str, names: Sequence[str], taken: Collection[str]) -> list[str]:
    common = _COMMON[role].split()
    letters = {name: re.sub(r"[^0-9a-z]", "", name.lower()) for name in names if name not in taken}
    ranked = sorted((common.index(word), name) for name, word in letters.items() if word in common)
    candidates = [name for _, name in ranked]
    if role == "time":
        candidates += [name for name in letters if name not in candidates and _TIME.search(name)]
    return candidates


def _headless(names: Sequence[str]) -> str:
    """A hint where the names look like values."""
    if any(re.fullmatch(r"-?[\d.]+(e\d+)?|::.*|.*::.*", name) for name in names):
        return "; the first line looks like a row, and it has to hold the names of the columns"
    return ""
