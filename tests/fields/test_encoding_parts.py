"""Parts of encoded values: whoever makes them, however often it was killed, the cache is the same to the byte."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread

import numpy as np
import polars as pl
import pytest
from field_frames import FIELDS, FrameCatalogue
from part_makers import CONFIG, ROOT, Slow, catalogue, factories, start
from rich.console import Console

from nqf import files
from nqf.cli import guard
from nqf.config import load_config
from nqf.fields import parts as module
from nqf.fields.build import assist, build
from nqf.fields.cache import encode_column, open_cache
from nqf.fields.encoder import CacheError
from nqf.fields.parts import opened
from nqf.stages import fields as stage
from nqf.stages import graph
from nqf.stages.graph import open_for_training, run_stage
from nqf.stages.run import Run
from nqf.train import main


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of the cache that one process makes."""
    folder = tmp_path_factory.mktemp("whole")
    build(catalogue(), folder, CONFIG, factories=factories())
    return contents(folder)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the encoder is given for it, part after part: first those of the titles."""
    folder = tmp_path_factory.mktemp("calls")
    build(catalogue(), folder / "cache", CONFIG, factories=factories(folder / "log"))
    return encoded(folder / "log")


def titles(calls: list[str]) -> list[str]:
    return [call for call in calls if "brand" not in call]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def encoded(log: Path) -> list[str]:
    """What each call of the encoder was given."""
    return log.read_text().splitlines() if log.exists() else []


def parts_of(cache: Path) -> list[Path]:
    return sorted((cache / "parts").rglob("part-*.npz"))


def killed_build(cache: Path, log: Path, parts: int) -> None:
    """A build that SIGKILL ends when it has made some parts."""
    process = start("build", cache, log, 0.1)
    while len(parts_of(cache)) < parts:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -9 and not (cache / "manifest.json").exists()


def test_values_are_those_of_an_encoder_that_is_given_chunk_after_chunk(tmp_path: Path) -> None:
    cache = build(catalogue(), tmp_path, CONFIG, factories=factories())
    column, expected, known = catalogue().frame["title"], [], set()
    for begin in range(0, len(column), CONFIG.chunk_rows):
        new = [title for title in column[begin : begin + CONFIG.chunk_rows].drop_nulls() if title not in known]
        if new:
            vectors, ok = encode_column(Slow(), pl.Series(new))
            expected.append(vectors[ok])
            known |= set(new)
    np.testing.assert_array_equal(cache.table("title").values, np.concatenate(expected))
    assert not (tmp_path / "parts").exists() and not list(tmp_path.glob("building-*"))


@pytest.mark.parametrize("processes", [2, 7])
def test_any_number_of_processes_make_the_same_cache(processes: int, tmp_path: Path, whole: dict[str, bytes]) -> None:
    cache, logs = tmp_path / "cache", [tmp_path / f"{number}.log" for number in range(processes)]
    # They all start before there is anything to do.
    others = [start("assist", cache, log, 0.02) for log in logs[1:]]
    first = start("build", cache, logs[0], 0.02)
    for process in (first, *others):
        assert process.wait(60) == 0, process.communicate()
    assert contents(cache) == whole
    calls = [call for log in logs for call in encoded(log)]
    assert len(calls) == len(set(calls)), "each part was made once"


def test_a_killed_build_resumes_from_its_parts(tmp_path: Path, whole: dict[str, bytes], calls: list[str]) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    killed_build(cache, log, 3)
    before, done = encoded(log), len(parts_of(cache))
    # Another moment, among the parts of the other table.
    killed_build(cache, log, 12)
    made = encoded(log)[len(before) :]
    # A call that the kill cut off is made again, and none that had ended.
    assert not set(made) & set(before[:done]) and set(before[done:]) <= set(made)
    written, done = len(encoded(log)), len(parts_of(cache))
    build(catalogue(), cache, CONFIG, factories=factories(log))
    assert contents(cache) == whole
    # What could not be read is tried again, by itself.
    last = [call for call in encoded(log)[written:] if not all("bad" in value for value in json.loads(call))]
    assert last == calls[done:] and len(encoded(log)[written:]) > len(last)


def test_a_killed_assistant_costs_its_part_alone(tmp_path: Path, whole: dict[str, bytes]) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    first = start("build", cache, log, 0.2)
    helper = start("assist", cache, tmp_path / "helper.log", 60)
    while not encoded(tmp_path / "helper.log"):
        assert first.poll() is None and helper.poll() is None, "the helper was given nothing"
        time.sleep(0.005)
    (held,) = encoded(tmp_path / "helper.log")
    while len(encoded(log)) < 5:
        time.sleep(0.005)
    assert held not in encoded(log)
    helper.kill()
    helper.communicate()
    assert first.wait(60) == 0, first.communicate()
    assert contents(cache) == whole and held in encoded(log)


def test_parts_of_others_are_waited_for(tmp_path: Path, whole: dict[str, bytes], calls: list[str]) -> None:
    cache = tmp_path / "cache"
    killed_build(cache, tmp_path / "log", 1)
    (folder,) = opened(cache)
    # Somebody is at a part and is ended, which gives the claim back, when all others are there.
    with files.claimed(folder / "part-00006.npz") as mine:
        assert mine
        process = start("build", cache, tmp_path / "log", 0)
        while len(parts_of(cache)) < len(titles(calls)) - 1:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        time.sleep(0.3)
        assert process.poll() is None and not (cache / "manifest.json").exists() and len(opened(cache)) == 1
    assert process.wait(60) == 0, process.communicate()
    assert contents(cache) == whole


def test_what_is_no_part_is_refused_and_kept(tmp_path: Path, whole: dict[str, bytes]) -> None:
    cache = tmp_path / "cache"
    killed_build(cache, tmp_path / "log", 2)
    (folder,) = opened(cache)
    before = contents(cache)
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(CacheError, match=r"none of its parts, such as 'thesis.txt'; move it away"):
        build(catalogue(), cache, CONFIG, factories=factories())
    assert (folder / "thesis.txt").read_text() == "years" and before.items() <= contents(cache).items()
    (folder / "thesis.txt").unlink()
    # Under the name of a part: what somebody else wrote, what was cut off, and arrays of another shape.
    part = folder / "part-00001.npz"
    genuine = part.read_bytes()
    np.savez(tmp_path / "other.npz", vectors=np.zeros((2, 3), np.float16), ok=np.ones(2, bool))
    for content in (
        b"years",
        genuine[:-30],
        genuine[:90] + b"\0\0" + genuine[92:],
        (tmp_path / "other.npz").read_bytes(),
    ):
        part.write_bytes(content)
        with pytest.raises(CacheError, match=r"part-00001.npz: not a part of encoded values"):
            build(catalogue(), cache, CONFIG, factories=factories())
        assert part.read_bytes() == content
    part.write_bytes(genuine)
    # What lies elsewhere in the cache is nobody's business, nor gone with the parts.
    (cache / "parts" / "notes.txt").write_text("mine")
    build(catalogue(), cache, CONFIG, factories=factories())
    assert contents(cache) == whole | {"parts/notes.txt": b"mine"}


def test_parts_that_somebody_deletes_are_missed(tmp_path: Path) -> None:
    def deleted(name: str, done: int, total: int) -> None:
        if name == "title" and (folders := opened(tmp_path)):
            shutil.rmtree(folders[0])

    with pytest.raises(CacheError, match="deleted while it was in use; run the same again"):
        build(catalogue(), tmp_path, CONFIG, factories=factories(), progress=deleted)
    assert not (tmp_path / "manifest.json").exists()


def test_what_came_while_the_cache_was_made_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = module.remove_parts

    def late(directory: Path) -> None:
        (opened(directory)[0] / "thesis.txt").write_text("years")
        remove(directory)

    monkeypatch.setattr("nqf.fields.build.remove_parts", late)
    build(catalogue(), tmp_path, CONFIG, factories=factories())
    (kept,) = (tmp_path / "parts").rglob("*.*")
    assert kept.name == "thesis.txt" and kept.read_text() == "years"


def test_what_could_not_be_read_is_tried_again_after_a_kill(tmp_path: Path, whole: dict[str, bytes]) -> None:
    lost = factories(lost=("4 shirt",))

    def ended(name: str, done: int, total: int) -> None:
        if done > 40 and name == "title":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(catalogue(), tmp_path, CONFIG, factories=lost, progress=ended)
    assert len(parts_of(tmp_path)) == 3
    cache = build(catalogue(), tmp_path, CONFIG, factories=factories())
    assert np.sum(cache.table("title").rows < 0) == catalogue().frame["title"].is_null().sum() + 4
    assert cache.warnings == open_cache(tmp_path).warnings and contents(tmp_path).keys() != whole.keys()


def test_an_assistant_writes_where_it_was_asked_alone(tmp_path: Path, calls: list[str]) -> None:
    # Nobody builds.
    assert list(assist(catalogue(), tmp_path / "none", CONFIG, factories=factories())) == []
    assert not (tmp_path / "none").exists()
    cache = tmp_path / "cache"
    killed_build(cache, tmp_path / "log", 2)
    before = contents(cache)
    others: tuple[tuple[FrameCatalogue, object, dict[str, Callable]], ...] = (
        (catalogue(), CONFIG, factories(revision="2")),
        (catalogue(), dataclasses.replace(CONFIG, chunk_rows=8), factories()),
        (catalogue(140), CONFIG, factories()),
        (catalogue(), CONFIG, {}),
        (FrameCatalogue(catalogue().frame, FIELDS[1:2], None), CONFIG, factories()),
    )
    for items, config, made in others:
        assert list(assist(items, cache, config, factories=made)) == []
        assert contents(cache) == before
    lines = list(assist(catalogue(), cache, CONFIG, factories=factories()))
    assert len(lines) + sum("part-" in name for name in before) >= len(titles(calls)) == len(parts_of(cache))


def test_an_assistant_whose_tables_are_replaced_stops(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    killed_build(cache, tmp_path / "log", 1)
    items, before = catalogue(), contents(cache)

    class Replaced(FrameCatalogue):
        reads = 0

        def chunks(self, columns, rows):
            self.reads += "title" in columns and len(columns) == 1
            if self.reads > 1:
                self.frame = items.frame.with_columns(pl.col("title") + "s")
            return super().chunks(columns, rows)

    assert list(assist(Replaced(items.frame, FIELDS[:2]), cache, CONFIG, factories=factories())) == []
    assert contents(cache) == before


def test_new_items_are_parts_too(tmp_path: Path) -> None:
    build(catalogue(80), tmp_path, CONFIG, factories=factories())
    seen = tmp_path.with_name("log")
    grown = build(catalogue(), tmp_path, CONFIG, factories=factories(seen))
    assert not any('"9 shirt"' in call for call in encoded(seen)) and any("90 shirt" in call for call in encoded(seen))
    assert len(grown.table("title").values) == len(
        build(catalogue(), tmp_path / "new", CONFIG, factories=factories()).table("title").values
    )


# The stage and the command


def fields_run(folder: Path, out: io.StringIO) -> Run:
    config = load_config(ROOT / "tests" / "tiny.yaml")
    config = dataclasses.replace(config, fields=dataclasses.replace(config.fields, chunk_rows=32))
    return open_for_training(config, folder, Console(file=out, width=200))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(stage, "encoder_factories", lambda config: factories())


@pytest.mark.ci
def test_the_stage_with_assistants_is_the_stage_without(
    slow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = io.StringIO(), io.StringIO()
    run_stage(fields_run(tmp_path / "alone", out), "fields")
    helped, encode = Event(), Slow.encode

    def patient(self: Slow, values: list[str]) -> tuple[np.ndarray, np.ndarray]:
        # Who makes the stage is at its first part until the assistant is at another.
        if current_thread() is main_thread():
            assert helped.wait(120)
        else:
            helped.set()
        return encode(self, values)

    monkeypatch.setattr(Slow, "encode", patient)
    helper = Thread(target=stage.assist_fields, args=(fields_run(tmp_path / "run", told),))
    helper.start()
    while "nothing to encode" not in told.getvalue():
        time.sleep(0.005)
    run_stage(fields_run(tmp_path / "run", out), "fields")
    helper.join(60)
    assert not helper.is_alive()
    assert contents(tmp_path / "run" / "fields").keys() == contents(tmp_path / "alone" / "fields").keys()
    assert all(
        content == contents(tmp_path / "alone" / "fields")[name]
        for name, content in contents(tmp_path / "run" / "fields").items()
        if name not in ("stage.json", "started.json")
    )
    lines = told.getvalue().splitlines()
    assert lines[0].startswith("nothing to encode in") and any("wrote" in line for line in lines)
    assert lines[-1].endswith(f"has finished; {sum('wrote' in line for line in lines)} parts of it were made here")


def test_an_assistant_passes_over_tables_of_an_earlier_start(slow: None, tmp_path: Path) -> None:
    run = fields_run(tmp_path, io.StringIO())
    run_stage(run, "fields")
    # As after a kill, when the command has begun again and has not read the tables yet.
    (tmp_path / "fields" / "stage.json").unlink()
    time.sleep(0.02)
    files.write_json(tmp_path / "fields" / "started.json", {})
    assert not stage._tables_read(tmp_path)
    files.write_text(tmp_path / "data" / "report.json", (tmp_path / "data" / "report.json").read_text())
    assert stage._tables_read(tmp_path)


def test_the_other_processes_of_a_run_assist(monkeypatch: pytest.MonkeyPatch, slow: None, tmp_path: Path) -> None:
    out = io.StringIO()
    run = fields_run(tmp_path, out)
    run_stage(run, "fields")
    before = contents(tmp_path)
    monkeypatch.setattr(graph, "is_primary", lambda: False)
    assert graph._make(run, graph.stage_of("fields")) == {}
    assert out.getvalue().endswith("has finished; 0 parts of it were made here\n") and contents(tmp_path) == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--config", str(ROOT / "tests" / "tiny.yaml"), "--run", str(tmp_path / "run"), "--assist"]
    guard(main, command)
    assert "no pretrained encoder is configured" in capsys.readouterr().out and not (tmp_path / "run").exists()
    for wrong in (["--stage", "item"], ["--restart"], ["--plan"]):
        with pytest.raises(SystemExit):
            guard(main, [*command, *wrong])
        assert "assist: encodes values for the fields stage and does nothing else" in capsys.readouterr().err
