"""Schema files: what is accepted, and what the errors say."""

from pathlib import Path

import pytest

from nqf.data.errors import DataError
from nqf.data.schema import MODALITIES, Field, Schema, load_schema, schema_from_tree, schema_to_tree


def test_short_and_long_forms() -> None:
    schema = schema_from_tree(
        {
            "title": "name",
            "fields": {
                "name": "text",
                "tags": {"modality": "category", "column": "labels", "multi_valued": True, "separator": ","},
                "place": {"modality": "geo", "columns": ["lat", "lon"], "weight": 2},
                "price": {"modality": "number", "log": True, "after_the_fact": True},
            },
        }
    )
    assert schema == Schema(
        title="name",
        fields=(
            Field(name="name", modality="text", columns=("name",)),
            Field(name="tags", modality="category", columns=("labels",), multi_valued=True, separator=","),
            Field(name="place", modality="geo", columns=("lat", "lon"), weight=2.0),
            Field(name="price", modality="number", columns=("price",), log=True, after_the_fact=True),
        ),
    )
    assert schema_from_tree(schema_to_tree(schema)) == schema


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_modality_goes_through_yaml(modality: str, tmp_path: Path) -> None:
    columns = "[a, b]" if modality == "geo" else "[a]"
    path = tmp_path / "schema.yaml"
    path.write_text(f"fields:\n  x: {{modality: {modality}, columns: {columns}}}\n")
    assert load_schema(path).fields[0].modality == modality


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "expected a key 'fields'"),
        ({"fields": {}}, "expected a key 'fields'"),
        ({"feilds": {"a": "text"}, "fields": {"a": "text"}}, "unknown key 'feilds'; did you mean 'fields'"),
        ({"fields": {"a": "txt"}}, "a: unknown modality 'txt'; did you mean 'text'"),
        ({"fields": {"a": {"column": "b"}}}, "a: unknown modality None"),
        ({"fields": {"a": {"modality": "text", "wieght": 2}}}, "a: unknown option 'wieght'; did you mean 'weight'"),
        ({"fields": {"a": {"modality": "text", "weight": "much"}}}, "weight: expected a number"),
        ({"fields": {"a": {"modality": "text", "weight": -1}}}, "weight: expected a number from 0"),
        ({"fields": {"a": {"modality": "geo"}}}, r"columns: \[latitude, longitude\]"),
        ({"fields": {"a": {"modality": "text", "columns": ["x", "y"]}}}, "needs one column"),
        ({"fields": {"a": {"modality": "text", "column": "x", "columns": ["y"]}}}, "either column or columns"),
        ({"fields": {"a": {"modality": "text", "log": True}}}, "log belongs to number fields"),
        ({"fields": {"a": {"modality": "category", "separator": ""}}}, "separator must not be empty"),
        ({"fields": {"item_id": "text"}}, "must not be called 'item_id'"),
        ({"fields": {"_a": "text"}}, "start with an underscore"),
        ({"fields": {"name": "text"}, "title": "nmae"}, "'nmae' is not a text field; did you mean 'name'"),
        ({"fields": {"title": "text"}}, "must be named by the key 'title'"),
    ],
)
def test_mistakes_are_named(tree: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        schema_from_tree(tree)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.yaml: no such schema file"):
        load_schema(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("fields: [")
    with pytest.raises(DataError, match=r"broken\.yaml: not readable as YAML"):
        load_schema(tmp_path / "broken.yaml")
