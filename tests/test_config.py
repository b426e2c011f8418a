"""Configuration: YAML, overrides, ranges, combinations, errors."""

import dataclasses
import importlib
import json
import math
import pickle
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Interval

from nqf import cli
from nqf.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimConfig,
    QFormerConfig,
    from_tree,
    hints_of,
    load_config,
    range_of,
    save_config,
    to_tree,
)
from nqf.data.errors import DataError
from nqf.data.schema import Field
from nqf.stages.records import StageError
from nqf.train import main as train
from nqf.train import parse

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = sorted(
    path.stem for path in (ROOT / "nqf").glob("*.py") if "guard(main, sys.argv" in path.read_text(encoding="utf-8")
)


def numbers(cls: type, path: str = "") -> Iterator[tuple[str, type, str, Any]]:
    """Dotted key, class, name and type of every key of a section and below that takes numbers."""
    for name, hint in hints_of(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, f"{path}{name}.")
        elif parts_of(hint) & {int, float}:
            yield f"{path}{name}", cls, name, hint


def parts_of(hint: Any) -> set[Any]:
    """The types that a type is made of."""
    inner = [part for part in typing.get_args(hint) if isinstance(part, (type, types.UnionType, types.GenericAlias)) or
             typing.get_args(part)]  # fmt: skip
    return {hint}.union(*map(parts_of, inner)) if isinstance(hint, typing.Hashable) else set()


def interval_of(hint: Any) -> Interval:
    found = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Interval)]
    return (found or [interval_of(part) for part in typing.get_args(hint)[:1]])[0]


def outside(hint: Any) -> list[float | int]:
    """Numbers on both sides of a range, the nearest ones first, and what is no number."""
    interval, whole = interval_of(hint), float not in parts_of(hint)
    low = interval.gt if interval.gt is not None else interval.ge
    high = interval.lt if interval.lt is not None else interval.le
    if whole:
        return [low - 1, high + 1, -(10**30), 10**30]
    below = low if interval.gt is not None else math.nextafter(low, -math.inf)
    above = high if interval.lt is not None else math.nextafter(high, math.inf)
    return [below, above, -1e300, 1e300, math.nan, math.inf, -math.inf]


NUMBERS = list(numbers(Config))


def tree_of(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def test_round_trip(tmp_path: Path) -> None:
    config = Config(name="x", seed=3)
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert from_tree(Config, to_tree(config)) == config


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("joint: {optim: {learning_rat: 0.1}}")
    with pytest.raises(ConfigError, match=r"joint\.optim: unknown key 'learning_rat'; did you mean 'learning_rate'"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: yes", "seed: expected a whole number from 0 to 2,147,483,647, found True"),
        ("item: {fusion: sum}", "item.fusion: expected one of 'add', 'concat', 'none', found 'sum'"),
        ("item: {margin: high}", "item.margin: expected a number from 0 to 1,000,000, found 'high'"),
        ("item: 3", "item: expected keys and values"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_bad_values(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_exponent_without_dot_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("joint: {optim: {learning_rate: 1e-4}}")
    assert load_config(path).joint.optim.learning_rate == 1e-4


def test_paths_start_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "c.yaml"
    path.parent.mkdir()
    path.write_text("data: {format: table, items: ../items.csv, interactions: a.csv, schema: s.yaml}")
    assert load_config(path).data.items == str((tmp_path / "items.csv").resolve())


def test_a_section_keeps_its_own_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("item: {qformer: {queries: 3}, optim: {epochs: 1}}")
    item, default = load_config(path).item, Config().item
    # Not those of the type, which other sections share.
    assert default.qformer != QFormerConfig() and default.optim != OptimConfig()
    assert item.qformer == dataclasses.replace(default.qformer, queries=3)
    assert item.optim == dataclasses.replace(default.optim, epochs=1)


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("joint: {optim: {learning_rate: 1e-4, epochs: 3}}")
    options = parse(["--config", str(path), "--stage", "item", "--joint.optim.learning-rate", "5e-4"])
    assert options.joint.optim == dataclasses.replace(Config().joint.optim, learning_rate=5e-4, epochs=3)
    assert options.stage == "item"


def test_unknown_option_suggests_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1")
    with pytest.raises(SystemExit):
        parse(["--config", str(path), "--joint.optim.learning-rat", "1"])
    assert "learning-rate" in capsys.readouterr().err


def test_every_shipped_config_is_what_it_was() -> None:
    # resolved_configs.json was written by the code before ranges; keys that are new since then are not in it.
    stored = json.loads((ROOT / "tests" / "resolved_configs.json").read_text())
    default = stored.pop("default")
    shipped = sorted((ROOT / "configs").glob("*.yaml"))
    files = [file for file in shipped if file.stem in stored]
    assert [file.stem for file in files] == sorted(stored)
    assert [load_config(file).name for file in shipped] == [file.stem for file in shipped]

    flat = dict(flattened(to_tree(Config())))
    for key, value in flattened(default):
        assert flat[key] == value and type(flat[key]) is type(value), key
    for file in files:
        tree = to_tree(load_config(file))
        for key in ("items", "interactions", "schema"):
            tree["data"][key] = tree["data"][key] and Path(tree["data"][key]).name
        assert tree["name"] == file.stem
        flat = dict(flattened(tree))
        assert {key: flat[key] for key, value in flattened(default) if flat[key] != value} == stored[file.stem]


def flattened(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


@pytest.mark.parametrize(("key", "cls", "name", "hint"), NUMBERS, ids=[key for key, *_ in NUMBERS])
def test_every_number_has_a_range_and_nothing_outside_is_taken(key: str, cls: type, name: str, hint: Any) -> None:
    assert range_of(hint), f"{key} declares no range: give it one of nqf.config's, or an Interval"
    is_list = tuple in {typing.get_origin(part) for part in parts_of(hint)}
    for value in [*outside(hint), True, "much"]:
        value = [value] if is_list else value
        with pytest.raises(ConfigError) as error:
            from_tree(Config, tree_of(key, value), where="some.yaml")
        assert str(error.value).startswith(f"some.yaml: {key}: expected ") and range_of(hint) in str(error.value)
        with pytest.raises(ConfigError) as error:
            cls(**{name: tuple(value) if is_list else value})
        assert f"{cls.__name__}: {name}: expected " in str(error.value) and range_of(hint) in str(error.value)
    default = from_tree(Config, {})
    for part in key.split("."):
        default = getattr(default, part)
    made = cls(**{name: default})
    assert getattr(made, name) == default and type(getattr(made, name)) is type(default)
    with pytest.raises(ConfigError, match=range_of(hint)):
        dataclasses.replace(made, **{name: (-1,) if is_list else -1})


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_numeric_option_has_a_range(name: str) -> None:
    module = importlib.import_module(f"nqf.{name}")
    found = [value for key, value in vars(module).items() if key == f"{name.capitalize()}Arguments"]
    assert len(found) == 1
    for key, _, _, hint in numbers(found[0]):
        assert range_of(hint), f"--{key} declares no range"


@pytest.mark.parametrize("hint", [hint for _, _, _, hint in numbers(Field)])
def test_numbers_of_a_schema_have_ranges(hint: Any) -> None:
    assert range_of(hint)


COMBINATIONS = [
    ("item: {qformer: {heads: 3}}", "item.qformer.heads: 3 heads cannot share a width of 64 evenly"),
    ("user: {qformer: {width: 66}}", "user.qformer.heads: 4 heads cannot share a width of 66"),
    ("joint: {backbone: {kv_heads: 3}}", "joint.backbone.kv_heads: 3 key-value heads cannot serve 4 heads"),
    ("joint: {backbone: {head_dim: 15}}", "joint.backbone.head_dim: 15 is odd"),
    ("baselines: {sasrec_options: {heads: 5}}", "baselines.sasrec_options.heads: 5 heads cannot share a width of 64"),
    ("joint: {prompt: {history_items: 51}}", "joint.prompt.history_items: 51 items .* user.max_history, 50"),
    ("user: {max_history: 19}", "joint.prompt.history_items: 20 items .* user.max_history, 19"),
    ("data: {format: table, interactions: a, schema: b}", "data.items: format 'table' needs this path"),
    ("data: {format: recbole, items: a, interactions: b}", "data.schema: format 'recbole' needs this path"),
    ("data: {valid_share: 0.6, test_share: 0.4}", "data.valid_share: 0.6 and test_share, 0.4, leave nothing"),
    ("data: {synthetic: {min_events: 21}}", "data.synthetic.min_events: 21 is above max_events, 20"),
    ("data: {synthetic: {items: 39}}", "data.synthetic.items: 39 are too few .* at least 40"),
    ("item: {optim: {learning_rate: 0.5, weight_decay: 2}}", "item.optim.weight_decay: 2 times learning_rate, 0.5"),
    ("baselines: {sasrec_options: {learning_rate: 0.5, weight_decay: 2}}", "sasrec_options.weight_decay: 2 times"),
    ("item: {reconstruction_weight: 0, contrastive: none}", "item.reconstruction_weight: 0 with no contrastive loss"),
    ("item: {reconstruction_weight: 0, contrastive_weight: 0}", "item.reconstruction_weight: 0 with no contrastive"),
    ("item: {optim: {batch_size: 1}}", "item.optim.batch_size: a batch of 1 has no negatives"),
    ("user: {ranking_weight: 0, regression_weight: 0}", "user.ranking_weight: 0 .* leaves nothing to learn"),
    (
        "user: {loss: {negatives: in-batch, positions: last}, optim: {batch_size: 1}}",
        "user.optim.batch_size: a batch of 1 with one position has no negatives",
    ),
    (
        "joint: {loss: {negatives: in-batch, positions: last}, optim: {batch_size: 1}}",
        "joint.optim.batch_size: a batch of 1 with one position has no negatives",
    ),
    ("candidates: {sources: [item, item]}", "candidates.sources: item, item: one is named twice"),
    ("candidates: {sources: []}", "candidates.sources: expected a list of at least one, each one of 'item'"),
    ("candidates: {temperature: 0.005}", "candidates.temperature: 0.005 is below 0.01"),
    ("joint: {candidates: qwen3}", "joint.candidates: qwen3 reads .* loss.negatives cannot be 'full'; set it to"),
    ("joint: {train_item_qformer: true}", "joint.train_item_qformer: it re-encodes .* loss.negatives cannot be 'full'"),
    ("joint: {mining: {count: 2}}", "joint.mining.count: mining adds .* loss.negatives cannot be 'full'"),
    ("training: {tables: host}", "user.loss.negatives: 'full' scores the whole catalogue"),
    ("{training: {tables: host}, user: {loss: {negatives: sampled}}}", "joint.loss.negatives: 'full' scores"),
    (
        "joint: {backbone: {lora_targets: [qproj]}}",
        "joint.backbone.lora_targets: expected a list, each one of 'q_proj'",
    ),
]


@pytest.mark.parametrize(("text", "message"), COMBINATIONS)
def test_combinations_that_cannot_work_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert re.match(f"{path}: (.*\\.)?{message}", str(error.value)), error.value


@pytest.mark.parametrize(
    "text",
    [
        # What is not trained needs no loss, and what is not mined no ranking.
        "item: {reconstruction_weight: 0, contrastive: none, optim: {epochs: 0}}",
        "user: {ranking_weight: 0}",
        "item: {contrastive: none, optim: {batch_size: 1}}",
        "candidates: {temperature: 0.005, learn_temperature: false}",
        "joint: {candidates: qwen3, loss: {negatives: in-batch}}",
        "joint: {mining: {count: 2}, loss: {negatives: in-batch, positions: last}, optim: {batch_size: 1}}",
        "{training: {tables: host}, user: {loss: {negatives: sampled}}, joint: {loss: {negatives: in-batch}}}",
        "user: {max_history: 20}",
    ],
)
def test_combinations_that_work_are_taken(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    load_config(path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--item.qformer.heads", "3", "item.qformer.heads: 3 heads cannot share a width of 16 evenly"),
        (
            "--joint.optim.learning-rate",
            "-1",
            r"joint.optim.learning_rate \(--joint.optim.learning-rate\): expected a number above 0, up to 10, found",
        ),
        ("--item.optim.epochs", "-3", "item.optim.epochs: expected a whole number from 0 to 2,147,483,647, found -3"),
        ("--item.qformer.dropout", "2", "item.qformer.dropout: expected a number from 0, below 1, found 2.0"),
        ("--user.max-history", "5", "joint.prompt.history_items .* 8 items cannot stand in the prompt"),
        ("--memory-gib", "nan", r"memory_gib \(--memory-gib\): expected a number from 0 to 1,000,000, found nan"),
        ("--profile", "-1", "profile: expected a whole number from 0"),
        ("--evaluation.ks", "0", "evaluation.ks: expected a list of at least one, each a whole number from 1"),
    ],
)
def test_options_out_of_range_are_one_paragraph_before_anything_is_written(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as done:
        cli.guard(train, ["--config", str(ROOT / "tests" / "tiny.yaml"), "--run", str(run), option, value])
    error = capsys.readouterr().err
    assert done.value.code == 1 and error.count("\n") == 2 and not run.exists()
    assert re.match(f"error: command line: {message}", error), error


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaluate", ["RUN", "--k", "0"], "k: expected a list, each a whole number from 1"),
        ("evaluate", ["RUN", "--new-item-weight", "-1"], "new_item_weight .*: expected a number from 0 to 1,000,000"),
        ("evaluate", ["RUN", "--cooccurrence-weight", "inf"], "cooccurrence_weight .*: expected a number from 0"),
        ("ablate", ["STUDY", "--parallel", "0"], "parallel: expected a whole number from 1"),
        ("ablate", ["STUDY", "--seeds", "-1"], "seeds: expected a list of at least one, each a whole number from 0"),
        ("recommend", ["RUN", "--user", "a", "--k", "0"], "k: expected a whole number from 1"),
    ],
)
def test_overrides_of_other_commands_are_checked_first(
    name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        cli.guard(importlib.import_module(f"nqf.{name}").main, arguments)
    error = capsys.readouterr().err
    assert done.value.code == 1 and re.match(f"error: command line: {message}", error), error


def test_sections_are_values(tmp_path: Path) -> None:
    config = Config()
    assert hash(config) == hash(Config()) and pickle.loads(pickle.dumps(config)) == config
    # Nothing below is made again.
    assert dataclasses.replace(config, seed=1).joint is config.joint
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    # Whole numbers are numbers, as YAML writes them.
    assert type(OptimConfig(learning_rate=1).learning_rate) is float
    with pytest.raises(ConfigError, match="MeshConfig: unknown key 'fdsp'; did you mean 'fsdp'"):
        MeshConfig(fdsp=1)
    with pytest.raises(ConfigError, match="Config: item: expected keys and values, found 3"):
        dataclasses.replace(config, item=3)


def test_a_huge_value_is_shown_in_part(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: [" + "x, " * 100_000 + "]")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize("address", ["gs://b/r", "s3://b/r", "memory://r", "hdfs://host:1/r", "file:///r"])
def test_no_folder_is_made_of_an_address(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NQF_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    train, recommend, ablate = (importlib.import_module(f"nqf.{name}") for name in ("train", "recommend", "ablate"))
    with pytest.raises(ConfigError, match=r"runs.*is an address.*mount it"):
        ablate.main(["study", "--runs", address])
    with pytest.raises(ConfigError, match=r"parts.*is an address"):
        recommend.main(["run", "--parts", address])
    # A run may be there (tests/stages/test_remote.py), and these are not.
    with pytest.raises((DataError, StageError), match=rf"^{address}: "):
        recommend.main([address, "--user", "u"])
    with pytest.raises((DataError, ConfigError), match=rf"^{address}: |no configuration"):
        train.main(["--run", address])
    # Tables may be there, and their addresses stay as they are.
    assert train.parse(["--config", "quickstart", "--data.items", address]).data.items == address
    (tmp_path / "x.yaml").write_text(f"data: {{interactions: '{address}'}}")
    assert load_config(tmp_path / "x.yaml").data.interactions == address
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_credentials_of_a_refused_address_are_not_shown() -> None:
    recommend = importlib.import_module("nqf.recommend")
    with pytest.raises(ConfigError, match=r"'https://\*\*\*@h/r\?\*\*\*' is an address") as error:
        recommend.main(["run", "--all", "https://me:hush@h/r?signature=hush"])
    assert "hush" not in str(error.value)
    with pytest.raises(ConfigError, match=r"'s3://\*\*\*@h/x' belongs to UniRec") as error:
        DataConfig(inter="s3://me:hush@h/x")
    assert "hush" not in str(error.value)
