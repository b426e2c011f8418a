"""Hostile input: damaged, odd and malicious files end in a clear error or a counted skip.

Nothing that is read is executed, and what was there before stays as it was. Checkpoints: tests/training/
test_checkpoint.py; the cache file by file: tests/fields/test_cache.py.
"""

import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from hostile import EVENTS, ITEMS, JUNK, KINDS, damaged, write_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from nqf.config import ConfigError, DataConfig, FieldsConfig, load_config
from nqf.data.errors import DataError
from nqf.data.load import Dataset, open_dataset, prepare
from nqf.data.schema import load_schema
from nqf.fields.build import build
from nqf.fields.cache import manifest_hash, open_cache
from nqf.fields.encoder import CacheError
from nqf.stages.graph import require
from nqf.stages.records import StageError
from nqf.stages.run import open_run
from nqf.stages.score import counts_of, score_of
from nqf.training.writer import Writer

# What a person reads in a terminal; enormous values must not be quoted whole.
LONGEST_MESSAGE = 2_000
OWN = (ConfigError, DataError, CacheError, StageError)


def hashes(*folders: Path) -> dict[str, str]:
    """SHA-256 of all files below some folders."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def refused(kind: type[Exception] | tuple[type[Exception], ...], *names: Any, intact: Path) -> Iterator[None]:
    """Expects an error of the project's own that names one of the files, and `intact` as it was before."""
    before = hashes(intact)
    with pytest.raises(kind) as raised:
        yield
    check_message(raised.value, *names)
    assert hashes(intact) == before


def check_message(error: Exception, *names: Any) -> None:
    message = str(error)
    assert any(str(name) in message for name in names), message
    assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message[:300]}"


def check_dataset(dataset: Dataset) -> None:
    """What was accepted is sound: ids unique, numbers finite, interactions inside the catalogue, skips counted."""
    ids = dataset.catalogue.item_ids
    assert len(set(ids)) == len(ids) == dataset.report["items"]["count"] and all(ids)
    frame = pl.read_parquet(dataset.catalogue.path)
    for field in dataset.catalogue.schema.fields:
        if field.modality == "number":
            assert frame[field.name].is_finite().all()
        assert frame[field.name].null_count() == dataset.report["items"]["missing"][field.name]
    report, items = dataset.report["interactions"], dataset.interactions.items
    left_out = report["unknown_items"] + report["short_user_interactions"]
    assert report["read"] - left_out == report["count"] == len(items)
    assert 0 <= items.min() and items.max() < len(ids)


def prepares(config: DataConfig, data: Path, path: Path, what: str) -> bool:
    """Whether an attacked table was read, rightly; else it was refused by name and the data of before is untouched."""
    before = hashes(data)
    try:
        dataset = prepare(config, data)
    except DataError as error:
        check_message(error, path)
        assert hashes(data) == before, what
        return False
    check_dataset(dataset)
    return True


# Damages per kind of table.
DAMAGES = 16


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_tables(kind: str, tmp_path: Path, record: Callable[..., None]) -> None:
    config = write_tables(tmp_path, kind)
    data = tmp_path / "run" / "data"
    check_dataset(prepare(config, data))
    outcomes = Counter()
    for number in range(DAMAGES):
        rng = random.Random(f"{kind} {number}")
        path = Path(rng.choice([config.items, config.interactions]))
        whole = path.read_bytes()
        # Of packed files, the bytes as they lie there or those inside.
        inside = path.suffix == ".gz" and rng.random() < 0.7
        what, content = damaged(rng, gzip.decompress(whole) if inside else whole)
        path.write_bytes(gzip.compress(content) if inside else content)
        outcomes["read" if prepares(config, data, path, what) else "refused"] += 1
        path.write_bytes(whole)
    assert outcomes["refused"] >= DAMAGES // 4, outcomes
    record(
        f"a `{kind}` table with flipped bits, cut off, zeroed in part, spliced, of mixed encodings, with enormous or "
        "deeply nested values",
        tried=DAMAGES,
        survived=sum(outcomes.values()),
        seen=f"{outcomes['refused']} refused with file and reason, the data of before untouched; {outcomes['read']} "
        "read, what could not be read or placed counted in the report",
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith(".gz")])
def test_permuted_rows_change_no_sequence(kind: str, tmp_path: Path) -> None:
    def sequences(dataset: Dataset) -> dict[str, list[str]]:
        interactions, ids = dataset.interactions, dataset.catalogue.item_ids
        spans = zip(interactions.offsets[:-1], interactions.offsets[1:], strict=True)
        return {
            user: [ids[item] for item in interactions.items[start:stop]]
            for user, (start, stop) in zip(interactions.user_ids, spans, strict=True)
        }

    first = sequences(prepare(write_tables(tmp_path, kind), tmp_path / "data"))
    rng = random.Random(0)
    items = rng.sample(ITEMS, len(ITEMS))
    # Sample files have no times; there, the order of a user's rows is what there is.
    events = EVENTS if kind == "unirec" else rng.sample(EVENTS, len(EVENTS))
    second = prepare(write_tables(tmp_path, kind, items, events), tmp_path / "data")
    assert second.catalogue.item_ids == [row["item_id"] for row in items]
    assert sequences(second) == first


ODD_TEXTS = st.sampled_from(
    ["", " ", "nan", "inf", "-inf", "1e999", "9" * 400, "0x10", "1_000", "null", "../../x", "/etc/passwd", "\x00",
     "\x1b[2J", "\u202eabc", "a\u2028b", "\ufeff1", "'; DROP TABLE items; --", "{{7*7}}", "=1+1", "<script>",
     "__import__('os')", "!!python/object/apply:os.system [true]", "A" * 20_000, "1,2", "[1, 2", "\ud7ff",
     "٣", "2020-13-45", "99999-01-01"]
)  # fmt: skip
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**30), 10**30) | st.floats() | ODD_TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "item_id", ""]), inner, max_size=2)
    ),
    max_leaves=6,
)
COLUMNS = ("item_id", "title", "tags", "price", "released", "lat", "lon", "picture", "v")
EXAMPLES = 40


@pytest.mark.parametrize("kind", ["jsonl", "csv", "amazon", "unirec"])
def test_odd_values(kind: str, tmp_path: Path, record: Callable[..., None]) -> None:
    data = tmp_path / "run" / "data"
    outcomes = Counter()

    # Without the shrinking of a failure, which takes minutes here; the seed is the test's.
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        st.lists(st.tuples(st.integers(0, 11), st.sampled_from(COLUMNS), ODD), min_size=1, max_size=6),
        st.lists(st.tuples(st.integers(0, 38), st.sampled_from(["user_id", "item_id", "timestamp"]), ODD), max_size=3),
    )
    def check(item_changes: list[tuple], event_changes: list[tuple]) -> None:
        items, events = [dict(row) for row in ITEMS], [dict(row) for row in EVENTS]
        for rows, changes in ((items, item_changes), (events, event_changes)):
            for at, column, value in changes:
                if kind == "csv" and not isinstance(value, str):
                    value = json.dumps(value)
                rows[at % len(rows)][column] = value
        if kind == "unirec":
            # An object's keys are strings.
            items = [{**row, "item_id": str(row["item_id"])} for row in items]
            events = [{key: str(value) for key, value in row.items()} for row in events]
        config = write_tables(tmp_path, kind, items, events)
        before = hashes(data)
        try:
            dataset = prepare(config, data)
        except DataError as error:
            check_message(error, config.items, config.interactions)
            assert hashes(data) == before
            outcomes["refused"] += 1
        else:
            check_dataset(dataset)
            outcomes["read"] += 1

    check()
    tried = sum(outcomes.values())
    assert tried >= EXAMPLES and outcomes["read"] >= EXAMPLES // 4, outcomes
    record(
        f"odd values in a `{kind}` table: of other types, enormous, nested, control characters, code",
        tried=tried,
        survived=tried,
        seen=f"{outcomes['refused']} tables refused with file and reason; {outcomes['read']} read, unreadable values "
        "counted as missing",
    )


def bomb(head: bytes, piece: bytes, mebibytes: int) -> bytes:
    """A small .gz that unpacks to many mebibytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = piece * (2**20 // len(piece))
    return b"".join([packer.compress(head), *(packer.compress(block) for _ in range(mebibytes)), packer.flush()])


HOSTILE_TABLES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip bomb, one column": ("csv.gz", lambda _: bomb(b"item_id,title\n", b"A", 150)),
    "gzip bomb, a line without end": ("jsonl.gz", lambda _: bomb(b'{"item_id": "', b"A", 150)),
    "gzip bomb, lines without end": ("jsonl.gz", lambda _: bomb(b"", b"{}" + b" " * 8_189 + b"\n", 150)),
    "gzip bomb, blank lines": ("amazon.gz", lambda _: bomb(b"", b" " * 8_191 + b"\n", 150)),
    "gzip bomb, RecBole": ("recbole.gz", lambda _: bomb(b"item_id:token\ttitle:token\n", b"A\tB\n", 150)),
    "gzip in gzip": ("csv.gz", lambda content: gzip.compress(content)),
    "plain file named .gz": ("jsonl.gz", lambda content: gzip.decompress(content)),
    "packed file without .gz": ("csv", lambda content: gzip.compress(content)),
    "deep list": ("jsonl", lambda content: content + b'{"item_id": "x", "title": ' + b"[" * 10**5 + b"\n"),
    "deep object": ("unirec", lambda _: b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
    "deep object in Amazon": ("amazon", lambda _: b'{"parent_asin": "x", "details": ' + b'{"a":' * 10**5 + b"\n"),
    "number of 10^5 digits": ("jsonl", lambda content: content + b'{"item_id": ' + b"9" * 10**5 + b"}\n"),
    "id of 10^6 characters, twice": ("jsonl", lambda c: c + 2 * (b'{"item_id": "' + b"x" * 10**6 + b'"}\n')),
    "header of 10^5 columns": ("csv", lambda _: b",".join(b"c%d" % n for n in range(10**5)) + b"\n"),
    "column name of 10^6 characters, twice": ("csv", lambda _: b",".join([b"x" * 10**6] * 2) + b"\n"),
    "unclosed quote": ("csv", lambda content: content.replace(b"Thing", b'"Thing', 1) + b"x\n" * 10),
    "UTF-16": ("csv", lambda content: content.decode().encode("utf-16")),
    "UTF-32 lines": ("jsonl", lambda content: content.decode().encode("utf-32")),
    "Latin-1 after UTF-8": ("tsv", lambda content: content + "x\tÄÖÜ\n".encode("latin-1")),
    "lone surrogates": ("jsonl", lambda content: content + b'{"item_id": "\\ud800", "title": "\\udfff"}\n'),
    "lone surrogates in a dictionary": ("unirec", lambda content: content.replace(b"Thing", b"\\ud800", 1)),
    "lists for ids": ("unirec", lambda _: b'[["i1"]]'),
    "rows of other shapes": ("recbole", lambda content: content + b"a\tb\n" + b"\t" * 50 + b"\n"),
    "details that are a list": ("amazon", lambda c: c + b'{"parent_asin": "x", "details": [1], "images": {"a": 1}}\n'),
    "Parquet of nested types": ("parquet", lambda _: parquet({"item_id": [[1]], "title": [{"a": 1}]})),
    "Parquet of binary ids": ("parquet", lambda _: parquet({name: [b"\xff\x00"] for name in COLUMNS})),
    "Parquet of objects": ("parquet", lambda _: parquet({name: [{"a": [{"b": 1}]}] for name in COLUMNS})),
}  # fmt: skip


def parquet(columns: dict[str, list]) -> bytes:
    import io

    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


def test_hostile_tables(tmp_path: Path, record: Callable[..., None]) -> None:
    seen = Counter()
    for number, (name, (kind, attack)) in enumerate(HOSTILE_TABLES.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        config, data = write_tables(folder, kind), folder / "run" / "data"
        prepare(config, data)
        path = Path(config.items)
        path.write_bytes(attack(path.read_bytes()))
        if prepares(config, data, path, name):
            assert "bomb" not in name
            seen["read"] += 1
        else:
            # Of a bomb, nothing stays on the disk.
            assert sorted(entry.name for entry in (folder / "run").iterdir()) == ["data"], name
            seen["refused"] += 1
    assert seen["refused"] >= 20
    record(
        "a table made to harm: gzip bombs, endless lines, headers and ids, 10^5 levels of nesting, other encodings, "
        "other types",
        tried=len(HOSTILE_TABLES),
        survived=sum(seen.values()),
        seen=f"{seen['refused']} refused with file and reason, before memory or disk are full; {seen['read']} read "
        "with the values that fit",
    )


def marker_payload(marker: Path) -> Any:
    """An object that makes a file when it is unpickled."""

    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(marker),)

    return Payload()


def aliases(levels: int) -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    lines = ["a0: &a0 {k0: 1, k1: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


def hostile_yaml(marker: Path) -> dict[str, str | bytes]:
    inline = "[x, x]"
    for level in range(9):
        inline = f"&b{level} [{inline}, {', '.join([f'*b{level - 1}'] * 8)}]" if level else f"&b0 {inline}"
    return {
        "apply": f"seed: !!python/object/apply:os.mkdir [{marker}]",
        "apply at the top": f"!!python/object/apply:os.mkdir [{marker}]",
        "new": f"fields: !!python/object/new:os.mkdir [{marker}]",
        "name": "fields: !!python/name:os.system",
        "module": "fields: !!python/module:antigravity",
        "tuple": "fields: !!python/tuple [1]",
        "own tag": "fields: !evil {a: 1}",
        "aliases": aliases(10),
        "aliases in a value": f"seed: {inline}\nfields: {inline.replace('b', 'c')}",
        "merges": merges(10),
        "itself": "fields: &f {f: *f, modality: *f}",
        "itself in a list": "fields: &f [*f]",
        "deep": "fields: " + "[" * 20_000 + "]" * 20_000,
        "deep by indent": "\n".join(" " * n + "a:" for n in range(1_200)),
        "enormous": "a: 1\n" + "# x\n" * 2_000_000,
        "long key": "k" * 50_000 + ": 1",
        "long value": "fields: " + "v" * 50_000,
        "digits": "seed: " + "9" * 10_000 + "\nfields: 1",
        "float": "item: {margin: " + "9" * 400 + "}\nfields: 1",
        "nul": 'data: {items: "a\\0b"}\nfields: 1',
        "raw nul": b"name: a\x00b",
        "UTF-16": "name: a".encode("utf-16"),
        "not UTF-8": b"name: \xff\xfe\xfa",
        "list at the top": "- 1\n- 2",
        "two documents": "name: a\n---\nname: b",
        "unhashable key": "? [1, 2]\n: 3",
        "date": "name: 2020-01-01\nfields: 2020-01-01",
        "binary": "name: !!binary R0lGODlhDAAMAIQAAP\nfields: 1",
        "set": "fields: !!set {a, b}",
        "unclosed": "name: [",
        "tab": "fields:\n\ta: 1",
    }


def test_hostile_yaml(tmp_path: Path, record: Callable[..., None]) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "other.yaml").write_text("name: other")
    attacks = hostile_yaml(marker)
    for name, content in attacks.items():
        path = tmp_path / "hostile.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        for load, kind in ((load_config, ConfigError), (load_schema, DataError)):
            with refused(kind, path, intact=tmp_path):
                load(path)
                pytest.fail(f"{load.__name__} reads {name}")
    assert not marker.exists()
    # The attack works where it is let: else the test would prove nothing.
    yaml.unsafe_load(attacks["apply"])
    assert marker.is_dir()
    record(
        "a configuration or schema with Python tags, aliases and merges that multiply, deep, enormous or of other "
        "encodings",
        tried=2 * len(attacks),
        survived=2 * len(attacks),
        seen="an error with the file and the key; nothing is executed",
    )


KEYS = st.sampled_from(
    ["fields", "title", "modality", "columns", "separator", "weight", "data", "item", "optim", "without", "seed", "x"]
)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=st.recursive(ODD, lambda inner: st.dictionaries(KEYS, inner, max_size=4), max_leaves=12))
def test_any_yaml_is_a_configuration_or_an_error(tree: Any, tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    for load, kind in ((load_config, ConfigError), (load_schema, DataError)):
        try:
            load(path)
        except kind as error:
            check_message(error, path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataConfig]:
    """Prepared data and a field cache of the small tables: `data` and `fields` below a folder."""
    folder = tmp_path_factory.mktemp("built")
    config = write_tables(folder, "jsonl")
    for row in range(3):
        Image.new("RGB", (8, 8), (80 * row, 0, 0)).save(folder / f"p{row}.png")
    dataset = prepare(config, folder / "data")
    build(dataset.catalogue, folder / "fields", SMALL)
    return folder, config


SMALL = FieldsConfig(text_width=4, image_width=2, category_width=4, text_features=50, number_frequencies=1)


def test_damaged_field_cache(built: tuple[Path, DataConfig], tmp_path: Path, record: Callable[..., None]) -> None:
    ids = open_dataset(built[0] / "data").catalogue.item_ids
    tried = 0
    for number in range(40):
        rng = random.Random(number)
        cache = tmp_path / "fields"
        shutil.copytree(built[0] / "fields", cache)
        files = sorted(path for path in cache.rglob("*") if path.is_file())
        path = rng.choice(files)
        if number % 8 == 7:
            # Whole files, at the wrong places.
            other = rng.choice([file for file in files if file.read_bytes() != path.read_bytes()])
            content = other.read_bytes()
        else:
            content = damaged(rng, path.read_bytes())[1]
        if content != path.read_bytes():
            path.write_bytes(content)
            tried += 1
            with refused(CacheError, cache, intact=cache):
                open_cache(cache, item_ids=ids, verify=True)
        shutil.rmtree(cache)
    assert tried >= 30
    record(
        "a file of the field cache that was damaged, spliced or exchanged",
        tried=tried,
        survived=tried,
        seen="refused with the file and the reason; the fields stage makes the cache again",
    )


def leaves(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all inner and outer nodes of a JSON tree."""
    if path:
        yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from leaves(value, (*path, key))


def test_forged_manifest(built: tuple[Path, DataConfig], tmp_path: Path, record: Callable[..., None]) -> None:
    """A manifest whose own checksum is right and whose content is not: what opens holds the values that were built."""
    honest = open_cache(built[0] / "fields")
    cache = tmp_path / "fields"
    shutil.copytree(built[0] / "fields", cache)
    secret = tmp_path / "secret.npy"
    np.save(secret, np.zeros(12, np.int32))
    path = cache / "manifest.json"
    whole = json.loads(path.read_text())
    places = [place for place in leaves(whole) if place != ("sha256",)]
    values = [None, -1, 10**12, "x", [], {}, "../secret.npy", str(secret)]
    rng = random.Random(0)
    outcomes = Counter()
    for place in [*rng.sample(places, 90), *(place for place in places if place[-1] in ("file", "folder"))]:
        forged = json.loads(json.dumps(whole))
        node = forged
        for key in place[:-1]:
            node = node[key]
        value = rng.choice(values) if place[-1] not in ("file", "folder") else rng.choice(values[-2:])
        if rng.random() < 0.2 and isinstance(node, dict):
            del node[place[-1]]
        else:
            node[place[-1]] = value
        path.write_text(json.dumps(forged | {"sha256": manifest_hash(forged)}))
        try:
            opened = open_cache(cache, verify=True)
            found = {name: opened.gather(name, np.arange(12)) for name in opened.names}
            for name in opened.names:
                opened.encoder(name)
        except OWN as error:
            check_message(error, cache)
            outcomes["refused"] += 1
        else:
            outcomes["harmless"] += 1
            assert place[-1] != "file", place
            for name in found.keys() & set(honest.names):
                for one, other in zip(found[name], honest.gather(name, np.arange(12)), strict=True):
                    np.testing.assert_array_equal(one, other)
    assert outcomes["refused"] >= 60, outcomes
    record(
        "a field cache with a forged manifest of right checksum: other types, other files, paths outside",
        tried=sum(outcomes.values()),
        survived=sum(outcomes.values()),
        seen=f"{outcomes['refused']} refused with the folder and the reason; {outcomes['harmless']} opened "
        "with the values that were built",
    )


def opened(folder: Path) -> None:
    """Opens everything of a run that its models read, but not its checkpoints."""
    run = open_run(folder, Console(quiet=True))
    require(run, "joint")
    counts_of(run)
    score_of(run)
    assert len(run.dataset.catalogue) == run.cache.items
    tables = run.tables(folder / "tokens")
    assert len(tables.tokens) == len(tables.text) == run.cache.items
    open_cache(folder / "fields", verify=True)


# What every command reads of a run.
READ = ("config.yaml", "*/stage.json", "data/*.*", "tokens/*.np?", "joint/tokenizer/*", "fields/manifest.json")


def test_damaged_run_folder(tiny_run: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("tensorboard", "eval", "sasrec"))
    opened(run)
    files = sorted({path for pattern in READ for path in run.glob(pattern) if path.is_file()})
    assert len(files) >= 15
    outcomes = Counter()
    for number in range(64):
        rng = random.Random(number)
        path = files[number % len(files)]
        whole = path.read_bytes()
        kind, content = damaged(rng, whole)
        if rng.random() < 0.1:
            kind = "gone"
        path.write_bytes(content)
        if kind == "gone":
            path.unlink()
        before = hashes(run)
        try:
            opened(run)
        except OWN as error:
            check_message(error, run)
            outcomes["refused"] += 1
        else:
            # A configuration may be spelled differently, or differ in what no stage depends on.
            assert content == whole or path.name == "config.yaml", (path, kind)
            outcomes["harmless"] += 1
        assert hashes(run) == before
        path.write_bytes(whole)
    opened(run)
    assert outcomes["refused"] >= 50, outcomes
    record(
        "a file of a run folder (configuration, records, data, tokens, tokenizer) that was damaged or is gone",
        tried=sum(outcomes.values()),
        survived=sum(outcomes.values()),
        seen=f"{outcomes['refused']} refused with the file, the reason and the command that fixes it; "
        f"{outcomes['harmless']} changed nothing that is read",
    )


def sign(run: Path, stage: str) -> None:
    """Makes the record of a stage say that its files are as they are now, as one who forges them would."""
    from nqf.stages.artifacts import _digests
    from nqf.stages.graph import stage_of
    from nqf.stages.records import fingerprint

    path = run / stage / "stage.json"
    tree = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    tree["files"] = _digests(run, stage_of(stage), tree["result"])
    path.write_text(json.dumps(tree | {"sha256": fingerprint(tree)}))


def test_pickles_in_arrays_are_not_loaded(tiny_run: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    marker = tmp_path / "executed"
    payload = np.array([marker_payload(marker)] * 240, dtype=object)
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("tensorboard", "eval", "sasrec"))
    state = next(run.glob("fields/encoders/*/state.npz"))
    targets = {
        run / "tokens" / "tokens.npy": "tokens",
        run / "tokens" / "vectors.npy": "tokens",
        run / "tokens" / "whitening.npz": "tokens",
        run / "data" / "split.npz": "fields",
        state: None,
    }
    for path, stage in targets.items():
        whole = path.read_bytes()
        if path.suffix == ".npy":
            np.save(path, payload, allow_pickle=True)
        else:
            with np.load(path) as arrays:
                names = arrays.files
            np.savez(path, **dict.fromkeys(names, payload))
        if stage:
            record_of = run / stage / "stage.json"
            honest = record_of.read_bytes()
            # Once found by its checksum, and once with a record that was forged to fit.
            with refused(OWN, path, intact=run):
                opened(run)
            sign(run, stage)
        with refused(OWN, path, path.parent, intact=run):
            opened(run)
            if path == state:
                cache = open_cache(run / "fields")
                for name in cache.names:
                    cache.encoder(name)
        if stage:
            record_of.write_bytes(honest)
        path.write_bytes(whole)
    opened(run)
    assert not marker.exists()
    np.save(tmp_path / "pickle.npy", payload[:1], allow_pickle=True)
    np.load(tmp_path / "pickle.npy", allow_pickle=True)
    assert marker.is_dir(), "the payload would not have run anyway"
    record(
        "a pickled object in a .npy or .npz file of a run, its record untouched or forged to fit",
        tried=2 * len(targets) - 1,
        survived=2 * len(targets) - 1,
        seen="an error with the file; nothing is executed",
    )


TRICKS = ["../../x", "/etc/passwd", "..", ".", "a/b\\c", "con", "-rf", "~root", "$(touch x)", "`id`", "%2e%2e%2f",
          "a\x00b", "\x1b[2J\x1b[31m", "\u202egnp.exe", "<img src=x onerror=alert(1)>", "x" * 5_000]  # fmt: skip


def test_path_tricks_in_ids_names_and_pictures(tmp_path: Path, record: Callable[..., None]) -> None:
    folder = tmp_path / "deep" / "inside" / "source"
    folder.mkdir(parents=True)
    (tmp_path / "precious").write_text("content")
    Image.new("RGB", (8, 8), "red").save(folder / "good.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "round.png").symlink_to(folder / "round.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()
    (folder / "code.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n%%EOF\n")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:40])
    # A header of 10^10 pixels, of which a decoder would make 30 GB.
    header = b"IHDR" + (10**5).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    good = (folder / "good.png").read_bytes()
    (folder / "large.png").write_bytes(good[:12] + header + zlib.crc32(header).to_bytes(4, "big") + good[33:])
    pictures = ["good.png", "pipe.png", "round.png", "zero.png", "folder.png", "code.png", "empty.png", "cut.png",
                "large.png", "/dev/random", "../../../precious", "file:///etc/passwd", "a\x00b",
                "x" * 5_000]  # fmt: skip
    names = ["../../evil", "/absolute", "a\x00b", "n" * 3_000, ".", "con"]
    schema = {"title": "title", "fields": {"title": "text", "picture": "image"} | dict.fromkeys(names, "category")}
    items = [
        {"item_id": TRICKS[row], "title": TRICKS[row], "picture": pictures[row % len(pictures)]}
        | {name: TRICKS[-row] for name in names}
        for row in range(len(TRICKS))
    ]
    events = [
        {"user_id": trick, "item_id": TRICKS[(row + turn) % len(TRICKS)], "timestamp": turn}
        for row, trick in enumerate(TRICKS)
        for turn in range(5)
    ]
    config = write_tables(folder, "jsonl", items, events)
    Path(config.schema).write_text(yaml.safe_dump(schema))
    regular = [path for path in tmp_path.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
    before = {path: path.read_bytes() for path in regular}
    run = folder.parent / "run"
    dataset = prepare(config, run / "data")
    check_dataset(dataset)
    assert dataset.catalogue.item_ids == TRICKS
    cache = build(dataset.catalogue, run / "fields", SMALL)
    # All but the good picture are counted and missing.
    good_rows = [row for row in range(len(TRICKS)) if pictures[row % len(pictures)] == "good.png"]
    assert np.flatnonzero(np.asarray(cache.table("picture").rows) >= 0).tolist() == good_rows
    missing = len(TRICKS) - len(good_rows)
    assert any(f"{missing} image values could not be read" in warning for warning in cache.warnings), cache.warnings
    assert {path: path.read_bytes() for path in before} == before
    outside = [path for path in tmp_path.rglob("*") if path not in before and run not in path.parents and path != run]
    assert all(not stat.S_ISREG(path.lstat().st_mode) for path in outside), outside
    assert open_cache(run / "fields", item_ids=TRICKS, verify=True).names == cache.names
    count = len(TRICKS) + len(pictures) + len(names) - 1
    record(
        "path tricks: ids, field names and pictures that are paths outside, pipes, devices, links in a circle, code, "
        "or 10^10 pixels",
        tried=count,
        survived=count,
        seen="ids are plain text and no path; pictures that cannot be read are counted and missing",
    )


def test_hostile_metrics(tmp_path: Path, record: Callable[..., None]) -> None:
    good = ['{"stage": "item", "step": 3, "loss": 1.0}', '{"stage": "user", "step": 9, "loss": 2.0}']
    junk = [piece.decode("latin-1") for piece in JUNK]
    hostile = [
        *junk,
        '{"stage": "user"',
        '{"stage": "user", "step": "x"}',
        "[]",
        "null",
        '{"stage": "user", "step": 10}',
    ]
    hostile += ["[" * 10**5, '{"step": ' + "9" * 10**5 + ', "stage": "user"}']
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([good[0], *hostile, good[1]]), encoding="latin-1")
    with Writer(tmp_path, "user", resumed_step=9) as writer:
        writer.write(10, {"loss": 0.5})
    lines = path.read_text().splitlines()
    assert lines[:2] == good and len(lines) == 3
    assert json.loads(lines[2]).items() >= {"stage": "user", "step": 10, "loss": 0.5}.items()
    # Through a link, nothing is written.
    (tmp_path / "linked").mkdir()
    (tmp_path / "precious").write_text("content")
    (tmp_path / "linked" / "metrics.jsonl").symlink_to(tmp_path / "precious")
    with Writer(tmp_path / "linked", "user", resumed_step=0) as writer:
        writer.write(1, {"loss": 0.5})
    assert (tmp_path / "precious").read_text() == "content"
    assert json.loads((tmp_path / "linked" / "metrics.jsonl").read_text())["step"] == 1
    record(
        "a metrics file with lines that no stage wrote, or a link in its place",
        tried=len(hostile) + 1,
        survived=len(hostile) + 1,
        seen="nothing: such lines are dropped when a stage continues, and a link is replaced, not followed",
    )
