"""Shared strings change what a document takes in memory, and nothing else."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from otj_operator.plan.sharing import share_strings

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(documents)
def test_the_document_stays_equal(document: Any) -> None:
    assert share_strings(document) == document


def test_two_documents_that_say_the_same_hold_the_same_strings() -> None:
    one, other = (share_strings(json.loads('{"reason": "PodsRunning on a node"}')) for _ in range(2))
    assert one["reason"] is other["reason"]
    assert next(iter(one)) is next(iter(other))
