"""`python -m nqf.train`: runs one stage, or all that are missing or stale, then evaluates."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from nqf import cli
from nqf.cli import configuration, guard, keep_freed_memory, program, terminal
from nqf.config import Config, ConfigError, CountOrNone, DataConfig, Weight, from_tree, load_config, section, to_tree
from nqf.data.schema import nearest
from nqf.files import is_address, masked


@section
class TrainArguments(Config):
    """Trains a run, stage by stage; what is finished and unchanged is not run again.

    Attributes:
      config: YAML file or name of a shipped configuration; without it, the configuration that the run folder holds.
      stage: What to run: one stage, or `all` that are missing or stale, followed by the evaluation.
      run: Run folder or its address.
      assist: Train nothing; encode values for another `nqf train` of this run.
      restart: Start again the stages that were cut off, instead of resuming from their checkpoints.
      plan: Print each training stage's parameters, memory and largest batch; train nothing.
      device: Devices of the plan, here or not; by default those of training.
      memory_gib: Memory per device that the plan's largest batch may use; 0 for what the device offers.
      profile: Steps of each training stage to trace, for xprof.
      debug: Show the traceback of an error.
    """

    config: Path | None = None
    stage: Literal["fields", "counts", "item", "tokens", "user", "joint", "score", "sasrec", "all"] = "all"
    run: str | Path | None = None
    assist: bool = False
    restart: bool = False
    plan: bool = False
    device: Literal["", "v5e-8", "v6e-8", "v5p-8", "l4", "rtx4090", "h200", "8xh200"] = ""
    memory_gib: Weight = 0.0
    profile: CountOrNone = 0
    debug: bool = False


def parse(arguments: list[str]) -> TrainArguments:
    """Parses the command line over the YAML file that it names.

    Raises:
      ConfigError: No configuration is named, or it cannot be used.
    """
    path = _value_of(arguments, "--config")
    run = _value_of(arguments, "--run")
    config = load_config(configuration(path)) if path else Config()
    if path is None and run is not None:
        from nqf.stages.remote import local_run

        with local_run(run) as (folder, _):
            if (folder / "config.yaml").is_file():
                path = str(folder / "config.yaml")
                config = load_config(folder / "config.yaml")
    # A shallow copy: the nested dataclasses stay what they are.
    default = TrainArguments(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    if {"-h", "--help"} & set(arguments):
        _help(default, _value_of(arguments, "--help") or _value_of(arguments, "-h") or "")
    options = cli.parse(TrainArguments, arguments, prog=program("train"), default=default)
    if path is None:
        raise ConfigError(
            "no configuration: give --config configs/X.yaml or the name of a shipped one, "
            "or --run with an existing run folder"
        )
    return options


def _help(default: TrainArguments, topic: str) -> None:
    """Prints the help of one section of the configuration, or of the options outside of all sections, and exits.

    Raises:
      ConfigError: There is no such section.
    """
    import tyro

    # Without the credentials of addresses.
    default = dataclasses.replace(default, data=from_tree(DataConfig, to_tree(default.data)))
    sections = {
        field.name: (type(getattr(default, field.name)).__doc__ or "").split("\n")[0]
        for field in dataclasses.fields(default)
        if dataclasses.is_dataclass(getattr(default, field.name))
    }
    if topic.startswith("-"):
        topic = ""
    if topic and topic not in (*sections, "all"):
        raise ConfigError(f"--help: no section '{topic}'{nearest(topic, (*sections, 'all'))}")
    if topic:
        description = f"Options of {program('train')}: {sections.get(topic, 'all of them')}"
    else:
        description = (TrainArguments.__doc__ or "").split("\n")[
            0
        ] + " Every key of the configuration is an option, too:\n"
        description += "\n".join(f"--help {name:<12}{about}" for name, about in sections.items())
        description += f"\n--help {'all':<12}Everything."

    def shown(name: str) -> bool:
        return topic == "all" or (name == topic if topic else name not in sections)

    hidden = [
        (field.name, Annotated[type(getattr(default, field.name)), tyro.conf.Suppress], getattr(default, field.name))
        for field in dataclasses.fields(default)
        if not shown(field.name)
    ]
    part = dataclasses.make_dataclass("Help", hidden, bases=(TrainArguments,), kw_only=True, frozen=True)
    values = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    cli.parse(part, ["--help"], prog=program("train"), default=part(**values), description=description)


def _value_of(arguments: list[str], option: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1]
        if argument == option and index + 1 < len(arguments):
            return arguments[index + 1]
    return None


def _assist(options: TrainArguments, config: Config) -> None:
    """Encodes for another process, whose lock on the run folder is left alone.

    Raises:
      ConfigError: Something else than the fields stage is asked for.
    """
    from nqf.stages.fields import assist_fields
    from nqf.stages.run import Run

    if options.stage not in ("fields", "all") or options.plan or options.restart or options.device:
        raise ConfigError("encodes values for the fields stage and does nothing else", key="assist")
    logging.basicConfig(format="%(message)s", force=True)
    assist_fields(Run(folder=Path(options.run or Path("runs") / config.name), config=config, console=terminal()))


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(arguments)
    keep_freed_memory()
    # jax and the stages take seconds to import, which --help and a wrong option should not.
    import jax

    from nqf.evaluation.results import print_results
    from nqf.stages.assess import assess
    from nqf.stages.graph import lock_run, open_for_training, run_stages, wanted
    from nqf.stages.remote import local_run
    from nqf.tools.card import write_card
    from nqf.training.mesh import barrier, is_primary, join_processes

    config = Config(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Config)})
    if config.training.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.training.compilation_cache)
    if (options.assist or config.training.distributed) and is_address(str(options.run)):
        raise ConfigError(
            "processes of one run share its folder, which no address can be: mount it and give that path by --run",
            key="assist" if options.assist else "training.distributed",
        )
    if options.assist:
        _assist(options, config)
        return
    if config.training.distributed:
        join_processes()
    if options.device and not options.plan:
        raise ConfigError("is for --plan alone; training takes the devices that are here", key="device")
    # A plan for other devices says itself which jax begins with.
    speaks = bool(options.device) or is_primary()
    console = terminal(quiet=not speaks)
    # The attention kernel and its reason, and images that were unavailable, are told by loggers.
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("nqf").setLevel(logging.INFO if speaks else logging.ERROR)
    where, stages = options.run or Path("runs") / config.name, wanted(config)
    stages = stages if options.stage == "all" else (options.stage,)
    if options.plan:
        from nqf.stages.plan import print_plans
        from nqf.stages.run import Run

        memory = int(options.memory_gib * 2**30)
        with local_run(where) as (folder, _):
            print_plans(Run(folder=folder, config=config, console=console), stages, memory, console, options.device)
        return
    with local_run(where, writes=True) as (folder, saved), lock_run(folder):
        run = open_for_training(config, folder, console, stages=stages, restart=options.restart)
        run = dataclasses.replace(run, profile=options.profile, saved=saved)
        run_stages(run, stages, restart=options.restart)
        if options.stage == "all" and is_primary():
            console.print("the test: each user's next item among all items, beside all baselines", markup=False)
            results = assess(run, split="test")
            write_card(run, results)
            print_results(results, console)
            path = shlex.quote(name := masked(str(where)))
            console.print(f"the run is in {name}, and its README.md tells of it", markup=False)
            console.print(f"next: {program('report')} {path}, or {program('serve')} {path}", markup=False)
        barrier("evaluated")


if __name__ == "__main__":
    guard(main, sys.argv[1:])
