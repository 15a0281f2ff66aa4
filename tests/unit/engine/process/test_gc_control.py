"""Frozen objects are not collected, later garbage is."""

import gc
import weakref

import pytest

from engine.process.gc_control import disable_collections, freeze_heap


class Node:
    def __init__(self):
        self.me = self


@pytest.fixture(autouse=True)
def _thaw():
    yield
    gc.unfreeze()
    gc.enable()


def test_frozen_objects_are_not_visited():
    disable_collections()
    assert not gc.isenabled()
    kept, garbage = Node(), weakref.ref(Node())
    freeze_heap()
    assert gc.isenabled()
    assert garbage() is None, "garbage of the start is not kept"
    assert gc.get_freeze_count() > 1000
    assert not any(found is kept for found in gc.get_objects())


def test_later_garbage_is_collected():
    freeze_heap()
    later = weakref.ref(Node())
    gc.collect()
    assert later() is None
