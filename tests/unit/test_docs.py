"""What the documentation shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("example", ["grpo.py", "online_dpo.py"])
def test_an_example_is_what_the_page_shows(example: str) -> None:
    page = (REPOSITORY / "docs" / "python-api.md").read_text()
    shown = re.search(rf"`examples/{re.escape(example)}`:\n```python\n(.*?)```", page, flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == (REPOSITORY / "examples" / example).read_text()
