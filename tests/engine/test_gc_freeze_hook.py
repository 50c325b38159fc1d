"""GCFreezeHook: what is there after the first iteration is frozen until the run ends."""

import gc
import weakref

import pytest

from mmvig.engine.gc_freeze_hook import GCFreezeHook


class Garbage:
    def __init__(self):
        self.me = self


@pytest.mark.parametrize('mode', ['train', 'val', 'test'])
def test_what_is_there_is_frozen_until_the_run_ends(mode):
    hook = GCFreezeHook()
    gc.freeze()  # as by a run that has failed
    hook.before_run(None)
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        old = weakref.ref(Garbage())
        getattr(hook, f'after_{mode}_iter')(None, 0)
        assert old() is None and gc.get_freeze_count() > 10_000
        later = gc.get_freeze_count()
        kept = [[] for _ in range(100)]
        new = weakref.ref(Garbage())
        getattr(hook, f'after_{mode}_iter')(None, 1)
        assert gc.get_freeze_count() <= later and new() is not None and kept
        gc.collect()
        assert new() is None
    finally:
        gc.enable()
        hook.after_run(None)
    assert gc.get_freeze_count() == 0
