"""What is frozen stays, and later garbage is found."""

import gc
import weakref

import pytest

from engine.process.gc_control import freeze_heap, put_off_collections


class Node:
    def __init__(self):
        self.me = self


@pytest.fixture(autouse=True)
def _thaw():
    yield
    gc.unfreeze()
    gc.enable()


def test_what_is_here_is_not_looked_at_again():
    put_off_collections()
    assert not gc.isenabled()
    kept, garbage = Node(), weakref.ref(Node())
    freeze_heap()
    assert gc.isenabled()
    assert garbage() is None, "garbage of the start is not kept"
    assert gc.get_freeze_count() > 1000
    assert not any(found is kept for found in gc.get_objects())


def test_later_garbage_is_found():
    freeze_heap()
    later = weakref.ref(Node())
    gc.collect()
    assert later() is None
