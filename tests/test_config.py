"""Configuration: YAML, overrides, errors."""

import dataclasses
from pathlib import Path

import pytest

from nqf.config import Config, ConfigError, OptimConfig, QFormerConfig, from_tree, load_config, save_config, to_tree
from nqf.train import parse


def test_round_trip(tmp_path: Path) -> None:
    config = Config(name="x", seed=3)
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert from_tree(Config, to_tree(config)) == config


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("joint: {optim: {learning_rat: 0.1}}")
    with pytest.raises(ConfigError, match=r"joint: optim: unknown key 'learning_rat'; did you mean 'learning_rate'"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: yes", "seed: expected int, found True"),
        ("item: {fusion: sum}", "'sum' is none of 'add', 'concat', 'none'"),
        ("item: {margin: high}", "margin: expected a number, found 'high'"),
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
    path.write_text("data: {format: table, items: ../items.csv}")
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


def test_every_shipped_config_loads() -> None:
    files = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert files
    for file in files:
        assert load_config(file).name == file.stem
