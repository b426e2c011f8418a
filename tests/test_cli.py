"""What people see in the terminal: help, errors, tables and progress."""

import dataclasses
import importlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pydantic
import pytest
from rich.console import Console

from nqf import cli
from nqf.config import Config
from nqf.evaluation.table import print_table
from nqf.training.writer import Terminal

ENTRY_POINTS = sorted(
    path.stem
    for path in Path(cli.__file__).parent.glob("*.py")
    if "guard(main, sys.argv" in path.read_text(encoding="utf-8")
)
ROOT = Path(__file__).parents[1]


def help_of(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as done:
        importlib.import_module(f"nqf.{name}").main([*arguments, "--help"])
    assert done.value.code == 0
    return capsys.readouterr().out


def failure(main: object, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as done:
        cli.guard(main, arguments)
    return done.value.code, capsys.readouterr().err


@pytest.mark.parametrize("command", [*ENTRY_POINTS, "data fetch", "data inspect"])
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *subcommand = command.split()
    text = help_of(f"{name}.__main__" if subcommand else name, subcommand, capsys)
    assert f"python -m nqf.{command}" in text
    # Boxes are cut into options; each has a sentence and its default, or is marked as required.
    body = re.sub(r"[│╭╮╰╯─]", " ", text)
    options = re.split(r"\n\s+(?=--\w)", body.split("show this help message and exit")[1])[1:]
    assert options
    for option in options:
        words = " ".join(option.split())
        assert re.search(r"[a-z]{3,}.*\((default:|required|repeatable)", words), words
        assert len(words.split("(")[0].split()) > 4, f"says too little: {words}"


def test_help_of_training_is_short_and_has_sections(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("nqf.train").main
    short = help_of("train", [], capsys)
    assert len(short.splitlines()) < 45 and "--joint.optim" not in short and "--help joint" in short
    with pytest.raises(SystemExit):
        main(["--help", "joint"])
    section = capsys.readouterr().out
    assert "--joint.optim.learning-rate FLOAT" in section and "Peak learning rate. (default: 0.003)" in section
    assert "--item." not in section and "--stage" not in section
    with pytest.raises(SystemExit):
        main(["--config", str(ROOT / "tests" / "tiny.yaml"), "--help", "all"])
    whole = capsys.readouterr().out
    assert "Number of items. (default: 240)" in whole, "the defaults are not those of the file"
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in whole
    code, error = failure(main, ["--help", "joit"], capsys)
    assert code == 1 and "no section 'joit'; did you mean 'joint'?" in error


def test_an_unknown_option_is_reported_before_a_missing_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = failure(importlib.import_module("nqf.train").main, ["--cofig", "x.yaml"], capsys)
    assert code == 2 and "--cofig" in error and "--config" in error.split("Perhaps you meant")[1]
    code, error = failure(importlib.import_module("nqf.train").main, ["--stage", "item"], capsys)
    assert code == 1 and "give --config configs/X.yaml" in error


def test_errors_are_one_paragraph_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: list[str]) -> None:
        raise KeyError("the file has no column 'x';\n   columns: a, b")

    code, error = failure(main, [], capsys)
    assert code == 1
    assert error == "error: the file has no column 'x'; columns: a, b\n(--debug shows the traceback)\n"
    with pytest.raises(KeyError):
        cli.guard(main, ["--debug"])


def test_errors_of_values_are_one_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    def section(arguments: list[str]) -> None:
        dataclasses.replace(Config().item.optim, epochs=-1)

    def others(arguments: list[str]) -> None:
        pydantic.TypeAdapter(int).validate_python("x")

    code, error = failure(section, [], capsys)
    assert code == 1 and error.count("\n") == 2
    assert error.startswith("error: OptimConfig: epochs: expected a whole number from 0 to 2,147,483,647, found -1; ")
    code, error = failure(others, [], capsys)
    assert code == 1 and error.count("\n") == 2 and error.startswith("error: 1 validation error for int")


def test_options_are_explained_as_attributes_are() -> None:
    texts = cli.documented(importlib.import_module("nqf.train").TrainArguments)
    assert texts["name"].startswith("Name of the run") and texts["restart"].endswith("their checkpoints.")
    # A section of the configuration has no entry of its own.
    assert texts["joint"] == "Joint stage: Qwen3 reads item and user tokens; its pooled vector ranks the catalogue."
    assert cli.documented(type(Config().data))["format"].endswith("(the reference system's JSON files).")


def test_a_bug_keeps_its_traceback_and_ctrl_c_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    def bug(arguments: list[str]) -> None:
        raise TypeError("a bug")

    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(TypeError):
        cli.guard(bug, [])
    assert failure(interrupted, [], capsys) == (130, "interrupted\n")


@pytest.mark.parametrize("name", [name for name in ENTRY_POINTS if name in ("evaluate", "recommend", "report")])
def test_a_folder_without_a_run_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["--user", "u"] if name == "recommend" else []
    code, error = failure(importlib.import_module(f"nqf.{name}").main, [str(tmp_path / "none"), *extra], capsys)
    assert code == 1 and error.startswith(f"error: {tmp_path / 'none'}: no run here") and error.count("\n") == 2


CHOICES = [
    (("model", "hr\n(all)", "note"), [["joint", ".1234 [.1, .2]", "long explanation"]]),
    (("model", "hr\n(all)"), [["joint", ".1234 [.1, .2]"]]),
    (("model", "hr\n(all)"), [["joint", ".1234"]]),
]


@pytest.mark.parametrize(("width", "chosen"), [(80, 0), (30, 1), (20, 2), (4, 2)])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_table_drops_detail_instead_of_cutting_cells(width: int, chosen: int, is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)
    assert print_table(console, CHOICES, title="what") == chosen
    text = console.file.getvalue()
    assert "…" not in text
    assert is_terminal == ("─" in text)
    assert all(len(line) <= width for line in text.splitlines())
    if width > 4:
        for cell in CHOICES[chosen][1][0]:
            assert cell in text


def test_lines_of_a_log_are_plain_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    cli.terminal().print("[bold]warning[/bold]  " + "word " * 60)
    assert sys.stdout.getvalue() == "warning  " + "word " * 60 + "\n"


def test_progress_shows_speed_time_and_loss_on_a_terminal_only() -> None:
    shown = {}
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), width=120, force_terminal=is_terminal, color_system=None)
        with Terminal("joint", 100, console) as terminal:
            for step in (10, 20):
                terminal.step(step, loss=1.25, items_per_second=1234.5)
            terminal.line("epoch 1")
        shown[is_terminal] = console.file.getvalue()
    assert shown[False] == "joint  epoch 1\n"
    for text in ("joint", "20/100", "loss 1.2500", "1,234 items/s", "epoch 1"):
        assert text in shown[True]
    assert re.search(r"\d:\d\d:\d\d", shown[True]), "no remaining time"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_compiling_is_said_while_it_lasts(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=is_terminal, color_system=None)
    with Terminal("joint", 100, console) as terminal:
        for _ in range(2):
            jax.jit(lambda x: x + 1.0)(np.float32(1))
            if is_terminal:
                terminal._progress.refresh()
        terminal.step(1, loss=1.0, items_per_second=1.0)
    jax.jit(lambda x: x + 2.0)(np.float32(1))
    text = console.file.getvalue()
    if is_terminal:
        # Shown by the bar, which the last refresh has without it.
        assert text.rstrip().splitlines()[-1].count("compiling") == 0
        monkeypatch.setattr(terminal, "_compiled", False)
        terminal._event("/jax/core/compile/jaxpr_to_mlir_module_duration", 0.1)
        assert terminal._progress.tasks[0].fields["note"] == "compiling…"
        terminal._event("/jax/core/compile/backend_compile_duration", 0.1)
        assert terminal._progress.tasks[0].fields["note"] == "loss 1.0000  1 items/s"
    else:
        assert text == "joint  compiling…\n"


def test_raw_lines_of_libraries_do_not_reach_the_terminal() -> None:
    script = """
import os, sys
from nqf.cli import guard
def main(arguments):
    import absl.logging, jax, orbax.checkpoint
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    absl.logging.warning("raw"), absl.logging.error("raw")
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"
guard(main, sys.argv[1:])
"""
    for option in ([], ["--debug"]):
        environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
        environment |= {"TF_CPP_MIN_LOG_LEVEL": "3"} if option else {}
        command = [sys.executable, "-c", script, *option]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert ("raw" in done.stderr) == bool(option), done.stderr


def test_compiled_programs_are_kept_in_the_users_cache_folder_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    cli.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "1")
    cli.keep_compiled_programs()
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent == tmp_path / "nqf"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_a_page_fault_for_each_page():
    script = """
import resource, threading, numpy as np
from nqf.cli import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
def work():
    for _ in range(4):
        before = faults()
        np.ones(30_000_000)
        counts.append(faults() - before)
for target in (work, threading.Thread(target=work)):
    target() if callable(target) else (target.start(), target.join())
# 240 MB are 58,594 pages of 4 KiB.
assert counts[0] > 100 and max(counts[1:4] + counts[5:]) < 100, counts
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_control_characters_and_markup_of_data_are_text(capsys: pytest.CaptureFixture) -> None:
    from nqf.evaluation.table import print_table

    hostile = ":smile:[/red]\x1b[2J\x9b31m\x07[bold]"
    console = cli.terminal()
    console.print(f"warning  {hostile}", markup=False)
    print_table(console, [([hostile], [[hostile]])], title=hostile, caption=hostile)
    out = capsys.readouterr().out
    assert out.count(r":smile:[/red]\x1b[2J\x9b31m\x07[bold]") == 5
    assert not set(out) & set("\x1b\x9b\x07")


def refuse(error: BaseException) -> Callable[[list[str]], None]:
    def main(_: list[str]) -> None:
        raise error

    return main


def test_no_error_of_a_file_is_a_traceback_and_none_grows_with_it(capsys: pytest.CaptureFixture) -> None:
    import csv

    import polars as pl

    errors = [
        pl.exceptions.ComputeError("x" * 10**6),
        pl.exceptions.SchemaError("bad"),
        pl.exceptions.ColumnNotFoundError("bad"),
        csv.Error("field larger than field limit"),
        FileExistsError("\x1b[2J" * 50_000),
        KeyError("k" * 10**6),
        MemoryError(),
    ]
    for error in errors:
        with pytest.raises(SystemExit) as status:
            cli.guard(refuse(error), [])
        assert status.value.code == 1
        text = capsys.readouterr().err
        assert text.startswith("error: ") and not text.startswith("error: \n")
        assert "Traceback" not in text
        assert "\x1b" not in text
        assert len(text) < 2_200
    with pytest.raises(ZeroDivisionError):
        cli.guard(refuse(ZeroDivisionError()), [])
