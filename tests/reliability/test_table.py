"""docs/reliability.md is what the records say."""

import json
from pathlib import Path

from table import page


def test_totals_stand_at_the_head(tmp_path: Path) -> None:
    rows = [
        {"fault": "a bit", "tried": 3, "survived": 3, "seen": "2 refused with the file; 1 read"},
        {"fault": "a kill", "tried": 4, "survived": 3, "seen": "nothing"},
        {"fault": "a bomb", "tried": 1_000, "survived": 1_000, "seen": "refused"},
    ]
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows if name == "one" else rows[:1]))
    head, table = page(tmp_path).split("| fault |")
    assert "**1,010 faults of 3 kinds tried: 1,009 survived, 1 did not. Of those survived, 1,004 were refused" in head
    assert "| a bit | 6 | 6 | 2 refused with the file; 1 read |" in table
