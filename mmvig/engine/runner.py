"""mmengine's Runner, with checkpoints that are read safely and written whole."""

import logging
from collections.abc import Callable
from typing import NoReturn

from mmengine.hooks import CheckpointHook as _CheckpointHook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner as _Runner

from mmvig import reading
from mmvig.engine import loading
from mmvig.engine.checkpoint_hook import CheckpointHook
from mmvig.engine.optim import renew_base_values
from mmvig.engine.processes import StopSignal, tie_workers
from mmvig.registry import RUNNERS

_CHECKPOINT_HOOKS = (
    _CheckpointHook,
    *('CheckpointHook', 'mmengine.CheckpointHook', 'mmengine.hooks.CheckpointHook'),
)


@RUNNERS.register_module()
class Runner(_Runner):
    """The Runner of the programs in ``tools/``. Arguments are mmengine's."""

    _resuming = False

    def load_checkpoint(self, filename: str, map_location: str | Callable = 'cpu') -> dict:
        """Load weights, strictly: see :func:`mmvig.engine.loading.to_start_from`.

        Args:
            filename: a path, a URL, or another address that mmengine knows.
            map_location: of ``torch.load``. Default: 'cpu'.

        Returns:
            What the file holds, without ``meta.config``.

        Raises:
            SetupError: The file is missing, cannot be read, or does not fit the model.
        """
        model = self.model.module if is_model_wrapper(self.model) else self.model
        try:
            content = reading.without_code(reading.load(filename, map_location))
            if self._resuming:
                content = loading.to_resume_from(content, filename)
            else:
                content = {**content, 'state_dict': loading.to_start_from(model, content, filename)}
            self.call_hook('after_load_checkpoint', checkpoint=content)
            model.load_state_dict(content['state_dict'])
        except (OSError, RuntimeError) as error:
            raise loading.unfit(filename, error) from error
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return content

    def resume(self, filename: str, *args, **kwargs) -> None:
        """mmengine's, of a checkpoint that a run has saved.

        Raises:
            SetupError: The file is missing, cannot be read, is of another model or no checkpoint of a run.
        """
        self._resuming = True
        try:
            super().resume(filename, *args, **kwargs)
        finally:
            self._resuming = False
        renew_base_values(self.param_schedulers or [])

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """mmengine's; a log file that cannot be written ends the run, as its other files do."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _raise_again
        return logger

    def register_hook(self, hook, priority=None) -> None:
        """mmengine's, with our CheckpointHook for its own."""
        if isinstance(hook, dict) and hook.get('type') in _CHECKPOINT_HOOKS:
            hook = {**hook, 'type': CheckpointHook}
        super().register_hook(hook, priority)

    @staticmethod
    def build_dataloader(dataloader, seed=None, diff_rank_seed=False):
        """mmengine's, with workers that end with this process."""
        return tie_workers(_Runner.build_dataloader(dataloader, seed, diff_rank_seed))

    def train(self):
        """mmengine's; SIGTERM ends it where it can be resumed."""
        with StopSignal() as self.stop_signal:
            return super().train()


def _raise_again(record: logging.LogRecord) -> NoReturn:
    """Raise the error of a handler, for which logging would print a traceback and go on."""
    raise
