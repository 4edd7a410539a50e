"""How many examples hypothesis tries (a few for every change, ten thousand at night), and which tests may run side by side.

Tests of one file share its servers, so they stay in one process; those of the contract stay together as well, because the last of them
reads in the API server's log what all of them did. A test that needs nothing of its neighbours names a group of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("fast", max_examples=60, deadline=None)
settings.register_profile("nightly", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

CONTRACT = Path(__file__).parent / "contract"


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the group that `--dist loadgroup` keeps in one process."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            group = "contract" if CONTRACT in item.path.parents else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))
