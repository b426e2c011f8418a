"""What the site needs beyond the pages: README.md as its first page, and no links to what is not part of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]


def on_files(files: Any, config: Any) -> Any:
    """Adds the first page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Keeps the words of links to files beside docs/, and the marks of blocks for tests out of the pages."""
    markdown = re.sub(r"^```(\w+) test(?: status=\d+)?$", r"```\1", markdown, flags=re.MULTILINE)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?:\.\./[^)]*|CONTRIBUTING\.md|[A-Z]+)\)", r"\1", markdown)
