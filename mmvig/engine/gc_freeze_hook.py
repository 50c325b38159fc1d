"""Python's garbage collector, kept from looking at what outlives a run anyway."""

import gc

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmvig.registry import HOOKS


@HOOKS.register_module()
class GCFreezeHook(Hook):
    """After the first iteration, keeps Python's garbage collector from what there is by then.

    That is half a million objects, most of them of imported modules. Now and then the collector looks
    through all objects, which took 0.7 to 1.0 s on a slow core. It still looks through those that come
    later. After the run it looks through all again; after one that has failed, from the next run on.
    """

    _is_frozen = False

    def before_run(self, runner: Runner) -> None:
        """Let the collector look at what a run has left that failed."""
        gc.unfreeze()

    def _after_iter(self, runner: Runner, batch_idx: int, *args, **kwargs) -> None:
        if not self._is_frozen:
            gc.collect()
            gc.freeze()
            self._is_frozen = True

    def after_run(self, runner: Runner) -> None:
        """Let the collector look at all again."""
        if self._is_frozen:
            gc.unfreeze()
            self._is_frozen = False
