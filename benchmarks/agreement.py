"""How far nqf's numbers are from those of the libraries and modules that it reads and writes for, as its tests see it.

    python benchmarks/agreement.py [--tokenizer FOLDER] [--vllm PYTHON]

Runs the tests of agreement, notes the largest difference that each of them compared, and writes docs/agreement.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import machine

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "agreement.md"
HEAD = """\
# Figures of agreement

Written by `python benchmarks/agreement.py` from the tests named in each row; do not edit. Small models with random
weights (no published ones), float32 on a CPU. *Largest difference* is over all numbers that the tests compare, *of
numbers up to* the largest of these, *allowed* what the tests refuse beyond. What differs in the losses is that nqf
keeps the candidate embeddings in float16.

| what | against | largest difference | of numbers up to | allowed | tests |
|---|---|---:|---:|---:|---|
"""
# What, against what, and the tests: their files, and what their names hold.
ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("Qwen3, hidden states and logits", "transformers", "tests/interop/test_huggingface.py", "whole_model_and_logits"),
    (
        "Qwen3-Embedding, folders of all sizes by name",
        "transformers",
        "tests/interop/test_published_sizes.py",
        "by_name",
    ),
    ("Q-Former", "transformers' Blip2QFormerModel", "tests/models/test_qformer.py", "equals_blip2"),
    ("BERT", "transformers", "tests/models/test_bert.py", "equals_transformers"),
    ("CLIP's vision tower", "transformers", "tests/models/test_clip.py", "transformers_from or the_tower"),
    ("CLIP's pictures", "transformers", "tests/models/test_clip.py", "preprocessing_equals or palette"),
    ("adapters that peft wrote", "peft", "tests/interop/test_peft.py", "adapter_of_peft or gradients_of_every"),
    ("our adapters", "peft", "tests/interop/test_peft.py", "loads_our_adapter or merge_equals"),
    (
        "exported embedding models",
        "sentence-transformers",
        "tests/interop/test_exported_sentences.py",
        "golden_vectors",
    ),
    (
        "sentence folders, with every pooling",
        "sentence-transformers",
        "tests/interop/test_sentence_folders.py",
        "every_pooling",
    ),
    ("Item and User Q-Former", "the reference's modules", "tests/interop/test_unirec.py", "equals_the_reference"),
    ("losses of the three stages", "the reference's formulas", "tests/stages/test_unirec_recipe.py", "loss_is"),
    ("MRR of 100 candidates", "the reference's formula", "tests/stages/test_unirec_recipe.py", "legacy"),
    (
        "states of served prompts, without and with an adapter, 1 - cosine",
        "vLLM",
        "tests/test_export_vllm.py tests/stages/test_pretrained_joint.py",
        "_in_vllm",
    ),
)
PACKAGES = ("jax", "torch", "transformers", "peft", "sentence-transformers")


def chooses(row: tuple[str, str, str, str], file: str, name: str) -> bool:
    """Whether a row is about a test."""
    return file in row[2].split() and any(part in name for part in row[3].split(" or "))


@dataclasses.dataclass
class Recorder:
    """A plugin of pytest that runs the tests of the rows and notes what `numpy.testing.assert_allclose` compares.

    Attributes:
      worst: File and test's name to (difference, size of the numbers, allowed difference), one for each comparison.
    """

    worst: dict[tuple[str, str], list[tuple[float, float, float]]] = dataclasses.field(default_factory=dict)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves the tests out that no row is about."""
        there = [(item, str(item.path.relative_to(ROOT))) for item in items]
        items[:] = [item for item, file in there if any(chooses(row, file, item.name) for row in ROWS)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        """Watches one test."""
        check, place = np.testing.assert_allclose, (str(item.path.relative_to(ROOT)), item.name)

        def watched(actual: Any, desired: Any, rtol: float = 1e-7, atol: float = 0, **options: Any) -> None:
            check(actual, desired, rtol=rtol, atol=atol, **options)
            found, wanted = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
            size = float(np.abs(wanted).max(initial=0))
            self.worst.setdefault(place, []).append(
                (float(np.abs(found - wanted).max(initial=0)), size, atol + rtol * size)
            )

        np.testing.assert_allclose = watched
        try:
            return (yield)
        finally:
            np.testing.assert_allclose = check


def main() -> None:
    """Runs and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="", help="folder of the published Qwen3 tokenizer")
    parser.add_argument("--vllm", default="", help="a Python with vLLM, whose row is left out without")
    options = parser.parse_args()
    for name, value in (("NQF_QWEN3_TOKENIZER", options.tokenizer), ("NQF_VLLM_PYTHON", options.vllm)):
        if value:
            os.environ[name] = value
    os.chdir(ROOT)
    # One session, so that what several tests share is made once.
    recorder = Recorder()
    files = dict.fromkeys(file for row in ROWS for file in row[2].split())
    status = pytest.main(["-q", "-n0", "--no-header", *files], plugins=[recorder])
    assert status == 0, "see above"
    lines = []
    for row in ROWS:
        what, against, files, chosen = row
        mine = {place: found for place, found in recorder.worst.items() if chooses(row, *place)}
        if not mine:
            assert against == "vLLM" and not options.vllm, f"{files}: {chosen}: nothing was compared"
            continue
        worst, size, allowed = max(each for found in mine.values() for each in found)
        tests = f"{len(mine)} of {' and '.join(f'`{file}`' for file in files.split())} (`{chosen}`)"
        shown = f"{worst:.1e}" if worst else "0"
        lines.append(f"| {what} | {against} | {shown} | {size:.3g} | {allowed:.0e} | {tests} |")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    if options.vllm:
        ask = "from importlib.metadata import distributions as all; print(*(d.version for d in all() if "
        ask += "d.name.startswith('vllm')))"
        found = subprocess.run([options.vllm, "-c", ask], capture_output=True, text=True, check=True)
        versions += f", vLLM {found.stdout.strip()} in a Python of its own"
    genuine = "the published Qwen3 tokenizer" if options.tokenizer else "a small BPE for a tokenizer"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    end = f"{versions}; {genuine}; seeds as in the tests; {machine('cpu')}, {date}."
    PAGE.write_text(HEAD + "\n".join([*lines, "", end]) + "\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
