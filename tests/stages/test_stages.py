"""The stage graph with stages that cost nothing: what is reused, stale, refused, discarded, and what a crash leaves."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nqf.config import Config, load_config
from nqf.files import write_json
from nqf.stages import artifacts
from nqf.stages import graph as stages
from nqf.stages.artifacts import parts_of, started
from nqf.stages.graph import NAMES, open_for_training, require, run_stage, stage_of
from nqf.stages.records import StageError, read_artifact
from nqf.stages.run import Run

# The baseline is no step of the road.
STAGES = tuple(name for name in NAMES if name != "sasrec")


def status(config: Config, name: str, folder: Path) -> str:
    return artifacts.status(config, stage_of(name), folder)


class Crash(Exception):
    """What stands in for a killed process."""


@dataclasses.dataclass
class Graph:
    """A run whose stages note that they ran.

    Attributes:
      folder: The run folder.
      ran: Stages, in the order in which they ran.
      crash: Stage that crashes after it has written a checkpoint.
    """

    folder: Path
    ran: list[str] = dataclasses.field(default_factory=list)
    crash: str = ""
    output: io.StringIO = dataclasses.field(default_factory=io.StringIO)

    def stage(self, name: str) -> Callable[[Run], dict[str, Any]]:
        def run(run: Run) -> dict[str, Any]:
            self.ran.append(name)
            step = run.folder / name / ("tokens.npy" if name == "tokens" else "checkpoints") / "3"
            found = step.is_dir()
            step.mkdir(parents=True, exist_ok=True)
            if name == self.crash:
                raise Crash
            return {"best_step": 3, "continued": found}

        return run

    def train(self, config: Config, *wanted: str, restart: bool = False) -> list[str]:
        """Runs stages, by default all; those that ran."""
        self.ran.clear()
        console = Console(file=self.output, width=1_000)
        names = wanted or STAGES
        run = open_for_training(config, self.folder, console, stages=names, restart=restart)
        for name in names:
            run_stage(run, name, restart=restart)
        return list(self.ran)


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Graph:
    graph = Graph(folder=tmp_path / "run")
    monkeypatch.setattr(stages, "_make", lambda run, stage: graph.stage(stage.name)(run))
    return graph


def changed(config: Config, key: str, value: Any) -> Config:
    """The configuration with another value at a dotted key."""
    head, _, rest = key.partition(".")
    inner = value if not rest else changed(getattr(config, head), rest, value)
    return dataclasses.replace(config, **{head: inner})


CONFIG = Config()


def test_everything_is_run_once(graph: Graph) -> None:
    assert graph.train(CONFIG) == list(STAGES)
    assert graph.train(CONFIG) == []
    assert graph.train(CONFIG, "user") == []
    # What changes no result makes nothing stale.
    assert graph.train(changed(CONFIG, "training.workers", 3)) == []
    assert graph.train(changed(CONFIG, "training.save_every_seconds", 1.0)) == []


@pytest.mark.parametrize(
    ("key", "value", "again"),
    [
        ("fields.text_width", 7, STAGES),
        ("item.margin", 0.7, STAGES[2:]),
        ("user.optim.epochs", 3, ("user", "joint", "score")),
        ("candidates.width", 8, ("user", "joint", "score")),
        ("joint.optim.epochs", 3, ("joint", "score")),
        ("evaluation.batch_size", 8, ()),
    ],
)
def test_what_follows_from_a_change_is_stale(graph: Graph, key: str, value: Any, again: tuple[str, ...]) -> None:
    graph.train(CONFIG)
    assert graph.train(changed(CONFIG, key, value)) == list(again)


def test_key_that_is_newer_than_the_run_had_its_default(graph: Graph) -> None:
    whole = artifacts.to_tree

    def older(value: Any) -> Any:
        """What the configuration was before it had `item.margin` and the dropout of Q-Formers."""
        if isinstance(value, dict):
            return {key: older(inner) for key, inner in value.items() if key not in ("margin", "dropout")}
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "to_tree", lambda value: older(whole(value)))
        graph.train(CONFIG, "fields", "counts", "item", "tokens")
        graph.crash = "user"
        with pytest.raises(Crash):
            graph.train(CONFIG, "user")
    graph.crash = ""
    record = json.loads((graph.folder / "item" / "stage.json").read_text())["parts"]["item"]
    assert "margin" not in record and "dropout" not in record["qformer"] and record["fusion"] == "add"
    # Neither stale nor begun under other settings; another value than the default is both.
    for key, value, stage in (("item.margin", 0.7, "item"), ("item.qformer.dropout", 0.2, "item")):
        assert f"{key} was" in status(changed(CONFIG, key, value), stage, graph.folder)
    with pytest.raises(StageError, match=r"user.qformer.dropout was 0.1 and is 0.3"):
        graph.train(changed(CONFIG, "user.qformer.dropout", 0.3), "user")
    assert graph.train(CONFIG) == ["user", "joint", "score"]
    assert read_artifact(graph.folder, "user").result["continued"]


def test_stale_is_named_and_not_rebuilt_unasked(graph: Graph) -> None:
    graph.train(CONFIG)
    other = changed(CONFIG, "item.margin", 0.7)
    with pytest.raises(
        StageError, match=r"stage 'user' needs stage 'item', but it is stale \(item.margin was 0.5 and is 0.7\)"
    ):
        graph.train(other, "user")
    assert graph.ran == []
    with pytest.raises(StageError, match=r"stage 'tokens' cannot be used: it is stale .input item changed"):
        run_stage(Run(folder=graph.folder, config=other, console=Console(quiet=True)), "item")
        require(Run(folder=graph.folder, config=other, console=Console(quiet=True)), "user")


def test_moved_tables_and_models_are_the_same_ones(graph: Graph, tmp_path: Path) -> None:
    before = tmp_path / "before"
    (before / "model").mkdir(parents=True)
    (before / "model" / "config.json").write_text("{}")
    (before / "items.csv").write_text("item_id\na\n")

    def config(folder: Path, table: str = "items.csv") -> Config:
        given = changed(CONFIG, "data.items", str(folder / table))
        return changed(given, "joint.backbone.path", str(folder / "model"))

    graph.train(config(before))
    after = before.rename(tmp_path / "after")
    assert graph.train(config(after)) == []
    # Another name may be another format, and other bytes are another table.
    (after / "items.csv").rename(after / "items.tsv")
    assert "data.items was" in status(config(after, "items.tsv"), "fields", graph.folder)
    (after / "items.csv").write_text("item_id\nb\n")
    assert "data files changed" in status(config(after), "fields", graph.folder)
    (after / "model" / "config.json").write_text("{ }")
    assert "weights of joint.backbone.path changed" in status(config(after), "joint", graph.folder)


def test_changed_source_files_and_model_folders_are_noticed(graph: Graph, tmp_path: Path) -> None:
    table, model = tmp_path / "items.csv", tmp_path / "model"
    model.mkdir()
    table.write_text("item_id\n1\n")
    (model / "config.json").write_text("{}")
    config = changed(changed(CONFIG, "data.items", str(table)), "joint.backbone.path", str(model))
    assert graph.train(config) == list(STAGES)
    (model / "config.json").write_text('{"a": 1}')
    assert status(config, "joint", graph.folder) == "weights of joint.backbone.path changed"
    assert graph.train(config) == ["joint", "score"]
    table.write_text("item_id\n2\n")
    assert status(config, "fields", graph.folder) == "data files changed"


@pytest.mark.parametrize("stage", STAGES)
def test_crash_leaves_nothing_that_looks_finished(graph: Graph, stage: str, record: Callable[..., None]) -> None:
    graph.crash = stage
    with pytest.raises(Crash):
        graph.train(CONFIG)
    assert read_artifact(graph.folder, stage) is None
    assert status(CONFIG, stage, graph.folder) == "it has not been run"
    graph.crash = ""
    assert graph.train(CONFIG) == list(STAGES[STAGES.index(stage) :])
    # What trains resumes from its checkpoint; the others begin again.
    went_on = read_artifact(graph.folder, stage).result["continued"]
    assert went_on == (stage not in ("tokens",))
    record(
        f"an error in the middle of stage `{stage}`",
        tried=1,
        survived=1,
        seen="the error; the stage does not look finished, and the same command continues with it",
    )


def test_tables_that_cannot_be_read_leave_the_finished_stage(graph: Graph, tmp_path: Path) -> None:
    graph.train(CONFIG)
    (graph.folder / "data").mkdir()
    (graph.folder / "data" / "items.parquet").write_text("made")
    record = graph.folder / "fields" / "stage.json"
    tree = json.loads(record.read_text())
    tree = {key: value for key, value in tree.items() if key != "sha256"}
    tree["files"] = {"data/items.parquet": artifacts.files.sha256(graph.folder / "data" / "items.parquet")}
    write_json(record, tree)
    graph.crash = "fields"
    with pytest.raises(Crash):
        graph.train(changed(CONFIG, "data.items", str(tmp_path / "gone.csv")))
    graph.crash = ""
    assert graph.train(CONFIG) == []
    # What was replaced before it failed is no more what the record says.
    (graph.folder / "data" / "items.parquet").write_text("something else")
    graph.crash = "fields"
    with pytest.raises(Crash):
        graph.train(changed(CONFIG, "data.items", str(tmp_path / "gone.csv")))
    assert not record.exists()


def test_crash_while_rebuilding_a_finished_stage(graph: Graph) -> None:
    graph.train(CONFIG)
    other = changed(CONFIG, "user.optim.epochs", 3)
    graph.crash = "user"
    with pytest.raises(Crash):
        graph.train(other)
    graph.crash = ""
    assert status(CONFIG, "user", graph.folder) == status(other, "user", graph.folder) == "it has not been run"
    assert graph.train(other) == ["user", "joint", "score"]


def test_cut_off_under_other_settings_is_refused_with_the_difference(graph: Graph, record: Callable[..., None]) -> None:
    graph.crash = "user"
    with pytest.raises(Crash):
        graph.train(CONFIG)
    graph.crash = ""
    other = changed(CONFIG, "user.optim.batch_size", 16)
    for again in ((), ("user",)):
        with pytest.raises(
            StageError, match=r"cut off under other settings.*user.optim.batch_size was 128 and is 16.*--restart"
        ):
            graph.train(other, *again)
        # Refused before anything was touched.
        assert graph.ran == []
        assert load_config(graph.folder / "config.yaml") == CONFIG
        assert (graph.folder / "user" / "checkpoints" / "3").is_dir()
    # A run that was put together without `open_for_training` is refused, too.
    with pytest.raises(StageError, match="cut off under other settings"):
        run_stage(Run(folder=graph.folder, config=other, console=Console(quiet=True)), "user")
    assert graph.train(other, "user", restart=True) == ["user"]
    assert not read_artifact(graph.folder, "user").result["continued"]
    assert "user  discarding an earlier start: --restart" in graph.output.getvalue()
    record(
        "resuming a stage under changed settings",
        tried=3,
        survived=3,
        seen="refused with the key, what it was and what it is, before anything is touched; `--restart` begins again",
    )


def test_another_order_of_the_data_is_refused(graph: Graph, record: Callable[..., None]) -> None:
    graph.crash = "item"
    with pytest.raises(Crash):
        graph.train(CONFIG)
    path = graph.folder / "item" / "started.json"
    stored = json.loads(path.read_text())
    assert stored == started(parts_of(CONFIG, stage_of("item"), graph.folder)) | {"versions": artifacts.versions()}
    write_json(path, stored | {"data order": "grain 0.1.0"})
    with pytest.raises(StageError, match=r"data order was 'grain 0.1.0' and is 'grain"):
        graph.train(CONFIG)
    record(
        "resuming a stage under another version of the library that orders the data",
        tried=1,
        survived=1,
        seen="refused with both versions",
    )


def test_start_whose_inputs_are_gone_is_discarded_and_named(graph: Graph) -> None:
    graph.crash = "user"
    with pytest.raises(Crash):
        graph.train(CONFIG)
    graph.crash = ""
    assert graph.train(changed(CONFIG, "item.margin", 0.7)) == ["item", "tokens", "user", "joint", "score"]
    assert not read_artifact(graph.folder, "user").result["continued"]
    assert "user  discarding an earlier start: input tokens changed" in graph.output.getvalue()


def test_relative_data_paths_start_at_the_working_directory(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    graph.train(changed(CONFIG, "data.items", "items.csv"), "fields")
    assert load_config(graph.folder / "config.yaml").data.items == str(tmp_path / "items.csv")


RECORD_DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "list": lambda text: "[]",
    "null result": lambda text: json.dumps(json.loads(text) | {"result": None}),
    "other result": lambda text: text.replace('"best_step": 3', '"best_step": 4'),
    "other settings": lambda text: text.replace('"margin": 0.5', '"margin": 0.6'),
    "deep": lambda text: "[" * 100_000 + "]" * 100_000,
    "no text": lambda text: "\udcff\udcfe",
}


@pytest.mark.parametrize("damage", RECORD_DAMAGES)
def test_damaged_record_is_refused(graph: Graph, damage: str, record: Callable[..., None]) -> None:
    graph.train(CONFIG)
    path = graph.folder / "item" / "stage.json"
    path.write_text(RECORD_DAMAGES[damage](path.read_text()), encoding="utf-8", errors="surrogateescape")
    what = "(not readable|expected an object|not the record|altered)"
    with pytest.raises(StageError, match=rf"item/stage.json: {what}.*run stage 'item' again"):
        graph.train(CONFIG)
    assert graph.ran == []
    path.unlink()
    # Inputs with the same fingerprint make the later stages fresh again.
    assert graph.train(CONFIG) == ["item"]
    record(
        "a stage's record that was damaged or altered",
        tried=1,
        survived=1,
        seen="refused with the file and the command that fixes it; only that stage is run again",
    )


@pytest.mark.parametrize("damage", sorted(RECORD_DAMAGES.keys() - {"null result", "other result"}))
def test_damaged_record_of_a_start_lets_the_stage_begin_again(graph: Graph, damage: str) -> None:
    graph.crash = "item"
    with pytest.raises(Crash):
        graph.train(CONFIG)
    graph.crash = ""
    path = graph.folder / "item" / "started.json"
    path.write_text(RECORD_DAMAGES[damage](path.read_text()), encoding="utf-8", errors="surrogateescape")
    if damage == "other settings":
        with pytest.raises(StageError, match=r"item.margin was 0.6 and is 0.5"):
            graph.train(CONFIG)
        return
    assert graph.train(CONFIG) == list(STAGES[2:])
    assert not read_artifact(graph.folder, "item").result["continued"]
