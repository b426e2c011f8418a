"""`python -m nqf.train`: runs one stage, or all that are missing or stale, then evaluates."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from nqf.cli import guard
from nqf.config import Config, ConfigError, load_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArguments(Config):
    """Trains a run, stage by stage. Every key of the configuration is an option.

    Attributes:
      config: YAML file; without it, the configuration that the run folder holds.
      stage: What to run: one stage, or `all` that are missing or stale, followed by the evaluation.
      run: Run folder; `runs/<name>` by default.
      debug: Show the traceback of an error.
    """

    config: Path | None = None
    stage: Literal["fields", "item", "tokens", "user", "joint", "all"] = "all"
    run: Path | None = None
    debug: bool = False


def parse(arguments: list[str]) -> TrainArguments:
    """Parses the command line over the YAML file that it names.

    Raises:
      ConfigError: No configuration is named, or it cannot be used.
    """
    import tyro

    path = _value_of(arguments, "--config")
    run = _value_of(arguments, "--run")
    if path is None and run is not None and (Path(run) / "config.yaml").is_file():
        path = str(Path(run) / "config.yaml")
    if path is None and not {"-h", "--help"} & set(arguments):
        raise ConfigError("no configuration: give --config configs/X.yaml, or --run with an existing run folder")
    config = load_config(path) if path else Config()
    # A shallow copy: the nested dataclasses stay what they are.
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return tyro.cli(TrainArguments, args=arguments, default=TrainArguments(**values), prog="python -m nqf.train")


def _value_of(arguments: list[str], option: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1]
        if argument == option and index + 1 < len(arguments):
            return arguments[index + 1]
    return None


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(arguments)
    # jax and the stages take seconds to import, which --help and a wrong option should not.
    import jax
    from rich.console import Console

    from nqf.evaluation.results import print_results
    from nqf.training.assess import assess
    from nqf.training.stages import open_for_training, run_all, run_stage

    config = Config(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Config)})
    if config.training.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.training.compilation_cache)
    console = Console()
    run = open_for_training(config, options.run or Path("runs") / config.name, console)
    if options.stage != "all":
        run_stage(run, options.stage)
        return
    run_all(run)
    print_results(assess(run, split="test"), console)


if __name__ == "__main__":
    guard(main, sys.argv[1:])
