"""A stage as a value: what it reads, what it comes after, and how it is made, trained and used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nqf.data.splits import Cases
    from nqf.evaluation.shares import Shares
    from nqf.stages.run import Run
    from nqf.training.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run. Exactly one of `make` and `program` is given.

    Attributes:
      name: Its name on the command line, and of its folder in the run.
      after: Stages whose results it reads.
      reads: Dotted keys and sections of the configuration that its result depends on beyond what the stages before it
        read. Its fingerprint follows from them; `tests/stages/test_reads.py` holds that nothing else is read.
      model_folders: Those of them that may name a pretrained model, whose files then count too.
      writes: Patterns, inside its folder, of what it writes; nothing else there is ever replaced or deleted.
      also: Names of further files and folders of the run that it writes.
      checked: Patterns, inside the run folder, of what later commands read of it, BEST for the best step: their digests
        are in its record.
      make: Runs a stage that trains nothing, and returns what its record says.
      program: What a training stage trains. With `abstract`, shapes stand for what earlier stages have yet to make.
      vectors: User vectors float32 [cases, D] from everything before the cases' targets, and item vectors
        float32 [I, D], of a finished stage that ranks, made together with the processes that share the cases.
    """

    name: str
    after: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    checked: tuple[str, ...]
    also: tuple[str, ...] = ()
    model_folders: tuple[str, ...] = ()
    make: Callable[[Run], dict[str, Any]] | None = None
    program: Callable[[Run, bool], Program] | None = None
    vectors: Callable[[Run, Cases, Shares], tuple[np.ndarray, np.ndarray]] | None = None


TRAINED = ("checkpoints", "profile", "non-finite-*.npz")
"""What every training stage writes in its folder."""
