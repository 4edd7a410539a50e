"""How long a test waits for what must end, answer or begin by itself.

It only turns a hang into a failure. A test machine may be several times slower than its neighbour, or lend its processors to others, and
whether something is quick enough is for `tests/bench`: so this is far more than anything takes, and the same for all.
"""

from __future__ import annotations

HANG_SECONDS = 1200.0
