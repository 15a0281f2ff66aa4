"""No body makes a 500; `python -m tests.support.http_fuzz` is the long form."""

from __future__ import annotations

import pytest

from tests.support.http_fuzz import bodies, fuzz

NUM_BODIES = 1000


@pytest.mark.timeout(300)
async def test_no_body_makes_a_500():
    statuses = await fuzz(7, NUM_BODIES)
    print(statuses)
    assert statuses.total() == NUM_BODIES
    assert statuses[200] > NUM_BODIES / 50, "nothing good is left in them"
    assert statuses[400] > NUM_BODIES / 4, "nothing bad is in them"


def test_equal_seeds_give_equal_bodies():
    assert bodies(1, 50) == bodies(1, 50)
    assert bodies(1, 50) != bodies(2, 50)
