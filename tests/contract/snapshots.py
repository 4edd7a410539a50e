"""What kubectl prints, held to a committed file. `UPDATE_SNAPSHOTS=1 pytest ...` writes the files anew; read the difference then."""

from __future__ import annotations

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "snapshots"

_CHANGING = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UID"),
    (r"(Resource Version: +)\d+", r"\1N"),
    (r"resourceVersion: \"\d+\"", 'resourceVersion: "N"'),
    (r"\b\d+[smhd]([1-9]\d?[smh])?( \(x\d+ over \d+[smh]\))?(?= |$)", "AGE"),
    (r"/[^ ]*/(LIVE|MERGED)-\d+/", r"\1/"),
)


def stable(text: str) -> str:
    """`text` without what differs from run to run."""
    for pattern, word in _CHANGING:
        text = re.sub(pattern, word, text, flags=re.MULTILINE)
    return re.sub(r"[ \t]+", " ", text).strip() + "\n"


def check(name: str, text: str) -> None:
    """Compare `text` with the snapshot `name`, or write it."""
    path, found = FOLDER / f"{name}.txt", stable(text)
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(found)
    assert found == path.read_text(), f"{path.name} differs; if that is right, run with UPDATE_SNAPSHOTS=1"
