"""mmengine's RuntimeInfoHook, which reads losses when they are there."""

import functools

import torch
from mmengine.hooks import LoggerHook
from mmengine.hooks import RuntimeInfoHook as _RuntimeInfoHook
from mmengine.runner import Runner
from torch import Tensor

from mmvig.registry import HOOKS


@HOOKS.register_module()
class RuntimeInfoHook(_RuntimeInfoHook):
    """Writes each iteration's losses to the message hub one iteration later, or before somebody reads them.

    By mmengine's, which reads them at once, the host waits in each iteration until the GPU has done it all,
    and then the GPU waits for the host. Here they are copied to the host while both go on. What is left is
    written before the logger writes, with a checkpoint, and at the end of an epoch and of the training.
    """

    def __init__(self):
        self._names: list[str] = []
        self._values: Tensor | None = None  # on the host, once the event has been reached
        self._event: torch.cuda.Event | None = None

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Write what the last iteration gave, and note what this one did."""
        self._write(runner)
        outputs = outputs or {}
        later = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
        if any(value.numel() != 1 for value in later.values()):
            later = {}  # mmengine says what is wrong
        now = {name: value for name, value in outputs.items() if name not in later}
        super().after_train_iter(runner, batch_idx, data_batch, now)
        if later:
            self._note(later)
        intervals = [hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)]
        if any(
            self.every_n_inner_iters(batch_idx, interval) for interval in intervals
        ) or self.end_of_epoch(runner.train_dataloader, batch_idx):
            self._write(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write what is left, into the checkpoint too."""
        if self._values is not None:
            self._write(runner)
            checkpoint['message_hub'] = runner.message_hub.state_dict()

    def after_train_epoch(self, runner: Runner) -> None:
        """Write what is left."""
        self._write(runner)

    def after_train(self, runner: Runner) -> None:
        """Write what is left."""
        self._write(runner)
        super().after_train(runner)

    def _note(self, losses: dict[str, Tensor]) -> None:
        self._names = list(losses)
        values = [value.detach().reshape(()) for value in losses.values()]
        dtype = functools.reduce(torch.promote_types, [value.dtype for value in values])
        # Some may be on the host, or on another GPU.
        device = next((value.device for value in values if value.device.type != 'cpu'), values[0].device)
        values = torch.stack([value.to(device, dtype, non_blocking=True) for value in values])
        self._values = torch.empty(len(losses), dtype=values.dtype, pin_memory=values.is_cuda)
        self._values.copy_(values, non_blocking=True)
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def _write(self, runner: Runner) -> None:
        if self._values is None:
            return
        if self._event is not None:
            self._event.synchronize()
        for name, value in zip(self._names, self._values.tolist(), strict=True):
            runner.message_hub.update_scalar(f'train/{name}', value)
        self._values = self._event = None
