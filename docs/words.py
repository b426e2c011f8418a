"""The word list of the project, kept in every text file: `python docs/words.py [--fix]`.

Spelling is codespell's (`[tool.codespell]` in pyproject.toml). This list is of plain words for the same thing, so that
readers meet one. `--fix` writes those that need no thought. Exit status 1 when anything is left.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = {
    "mend": "fix",
    "mends": "fixes",
    "mended": "fixed",
    "mending": "fixing",
    "anew": "again",
    "go on": "continue",
    "goes on": "continues",
    "going on": "continuing",
    "went on": "continued",
}
# Their grammar differs from that of what they stand for.
BY_HAND = {"(?:can ?not|could not|not to) be had": "unavailable"}
PATTERN = re.compile(rf"\b(?:{'|'.join([*WORDS, *BY_HAND])})\b".replace(" ", r"\s+"), re.IGNORECASE)
SKIPPED = re.compile(r"\.(?:png|svg|jpg|gz)$|^LICENSE$|/results/|^docs/words\.py$|^CONTRIBUTING\.md$")


def fixed(match: re.Match[str]) -> str:
    """The word to use, with the capital and the line break of the one that was found."""
    found = match.group()
    word = WORDS.get(" ".join(found.lower().split()), found)
    word = word.capitalize() if found[0].isupper() else word
    return word + "\n" if "\n" in found and word != found else word


def main(arguments: list[str]) -> int:
    """Reports or fixes; the number of words that are left."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    left = 0
    for name in files:
        if not name or SKIPPED.search(name):
            continue
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if arguments == ["--fix"] and (new := PATTERN.sub(fixed, text)) != text:
            path.write_text(new, encoding="utf-8")
            text = new
        for match in PATTERN.finditer(text):
            found = " ".join(match.group().lower().split())
            line = text.count("\n", 0, match.start()) + 1
            print(f"{name}:{line}: '{found}'; say '{WORDS.get(found) or next(iter(BY_HAND.values()))}'")
            left += 1
    return left


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
