"""Some hundred histories of a queue, each with faults of its own.

QUEUE_RUNS sets how many are played (60 otherwise); QUEUE_SEED plays just that one.
"""

from __future__ import annotations

import os

import pytest

from tests.data.history import play

_PARTS = 4


@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(_PARTS))
def test_no_history_loses_or_doubles_an_item(part: int) -> None:
    if "QUEUE_SEED" in os.environ:
        play(int(os.environ["QUEUE_SEED"]))
        return
    runs = int(os.environ.get("QUEUE_RUNS", "60"))
    records = [play(seed) for seed in range(part, runs, _PARTS)]
    delivered = sum(len(record.plain) + len(record.settled) for record in records)
    assert delivered > 5 * len(records)  # the histories get somewhere at all
