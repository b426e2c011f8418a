"""The guide for users of UniRec, walked: its commands, one by one, on files made as the reference's scripts make them.

    python benchmarks/unirec_walk.py [--tokenizer FOLDER]

The commands are those of docs/coming-from-unirec.md as they stand there. What differs from a real run: a few dozen
invented items and users, random weights of two layers in the place of the published ones, and small Q-Formers. The
times go into the guide.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "coming-from-unirec.md"
SMALL = (
    "--item.qformer.width 32 --item.qformer.layers 2 --item.qformer.heads 2 --item.qformer.mlp-width 64 "
    "--item.optim.epochs 20 --user.qformer.width 32 --user.qformer.layers 2 --user.qformer.heads 2 "
    "--user.qformer.mlp-width 64 --user.qformer.queries 4 --user.optim.epochs 5 --joint.optim.epochs 5"
)
START, END = "<!-- walk: written by benchmarks/unirec_walk.py -->\n", "<!-- end of walk -->"


def main() -> None:
    """Walks and writes the times into the guide."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="", help="folder of the published Qwen3 tokenizer")
    options = parser.parse_args()
    os.environ["NQF_QWEN3_TOKENIZER"] = options.tokenizer
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import published
    import unirec_files

    guide = GUIDE.read_text(encoding="utf-8")
    block = re.search(r"^```bash walk\n(.*?)^```$", guide, re.S | re.M)
    assert block is not None
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        unirec_files.write(folder, items=60, users=40, candidates=20)
        # A folder wins over a hub name of the same spelling.
        published.qwen3_folder(folder / "Qwen" / "Qwen3-Embedding-0.6B", bool(options.tokenizer), hidden_size=64)
        published.clip_folder(folder / "openai" / "clip-vit-large-patch14")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        for command in block[1].replace("\\\n", " ").splitlines():
            if not command.strip() or command.startswith("#"):
                continue
            small = f" {SMALL}" if "nqf.train" in command else ""
            begun = time.perf_counter()
            line = [sys.executable, *shlex.split(command.removeprefix("python") + small)]
            done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
            seconds = time.perf_counter() - begun
            print(f"{seconds:7.1f} s  {command}\n{done.stdout}{done.stderr if done.returncode else ''}", flush=True)
            assert done.returncode == 0, command
            rows.append(f"| `{' '.join(command.split())[:100]}` | {seconds:,.0f} s |")
    genuine = " and the published tokenizer" if options.tokenizer else ""
    made = (
        "Walked with 60 invented items and 40 users, made by the logic of the reference's scripts, with random weights "
        f"of\ntwo layers{genuine} and Q-Formers of width 32. Two cores, at a load of {os.getloadavg()[2]:.0f}:\n\n"
    )
    table = "| command | time |\n|---|---:|\n" + "\n".join(rows) + "\n"
    head, rest = guide.split(START)
    GUIDE.write_text(head + START + made + table + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
