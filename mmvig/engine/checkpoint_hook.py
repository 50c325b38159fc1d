"""mmengine's CheckpointHook, made so that no kill takes a checkpoint, a best file or a validation."""

import signal
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.dist import all_reduce, barrier, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as _CheckpointHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from mmvig.engine.files import write_whole
from mmvig.engine.processes import kill_workers

_WHOLE = 'mmvig.whole'
_POINTER = 'last_checkpoint'  # mmengine's name for the file that names the latest checkpoint
_VALIDATED = 'iter_validated'  # not 'val...': mmengine logs those


@register_backend(_WHOLE)
class _WholeFiles(LocalBackend):
    """Local files that are there whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write_whole(filepath, obj)


class _RemovesLater:
    """A file backend that notes what it is to remove."""

    def __init__(self, backend: Any, noted: set[str]) -> None:
        self._backend = backend
        self.remove = self.rmtree = noted.add

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class CheckpointHook(_CheckpointHook):
    """mmengine's hook with the same arguments, for :class:`mmvig.engine.runner.Runner`.

    - Local files are written beside, synced and renamed: first the checkpoint, then ``last_checkpoint``.
      What they replace is removed after that.
    - A resumed run first does the validation that was due at its checkpoint, unless the checkpoint says
      that it was done: the run before ended in it.
    - After SIGTERM a run ends with its iteration, at a checkpoint where its loop can resume from one.
    """

    def before_train(self, runner: Runner) -> None:
        """mmengine's; then the validation that is still due."""
        if not (self.backend_args or self.file_client_args or '://' in str(self.out_dir)):
            self.backend_args = {'backend': _WHOLE}
        super().before_train(runner)
        self._saved_step: int | None = None
        self._replaced: set[str] = set()
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(self.keep_ckpt_ids)  # one more than mmengine's limit, for a while
        self._move_best_files(runner)
        self._point_to_resumed(runner)
        if _validation_is_due(runner):
            step = runner.epoch if self.by_epoch else runner.iter
            self.last_ckpt = self._here(self.filename_tmpl.format(step))  # what a better score saves again
            runner.logger.info('This checkpoint was saved before its validation, which comes first now.')
            runner.val_loop.run()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """mmengine's; then the end of a run that got SIGTERM."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        by_iter = isinstance(runner.train_loop, IterBasedTrainLoop)
        if not by_iter and self.end_of_epoch(runner.train_dataloader, batch_idx):
            return  # after_train_epoch can save
        if _is_to_stop(runner):
            if by_iter and not self.by_epoch and self._saved_step != runner.iter + 1:
                self._save_checkpoint(runner)
            _stop(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """mmengine's; then the end of a run that got SIGTERM in the last iteration."""
        super().after_train_epoch(runner)
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and _is_to_stop(runner):
            if self.by_epoch and self._saved_step != runner.epoch + 1:
                self._save_checkpoint(runner)
            _stop(runner)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """End a run that got SIGTERM, if its checkpoint lets a resumed one do this validation."""
        stop = getattr(runner, 'stop_signal', None)
        if stop is None or not stop.received or get_world_size() > 1:
            return
        if isinstance(runner.train_loop, EpochBasedTrainLoop) or self._saved_step == runner.iter:
            _stop(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """mmengine's, with a note of the validation in what it saves."""
        runner.message_hub.update_info(_VALIDATED, runner.iter)
        super().after_val_epoch(runner, metrics)

    def _here(self, path: str | Path) -> str:
        """The path of a file of this name in the folder of the checkpoints."""
        return self.file_backend.join_path(self.out_dir, Path(path).name)

    def _point_to_resumed(self, runner: Runner) -> None:
        """Let ``last_checkpoint`` name what the run resumes from; a kill or a move may leave another."""
        resumed = Path(runner._load_from).absolute() if runner._resume and runner._load_from else None
        if resumed is not None and is_main_process() and resumed == Path(self._here(resumed)).absolute():
            write_whole(Path(runner.work_dir, _POINTER), str(resumed).encode())

    def _move_best_files(self, runner: Runner) -> None:
        """Take the best files of the run before to be here: its folder may have been moved or copied."""
        if self.save_best is None:
            return
        single = len(self.key_indicators) == 1
        for key, path in ({'': self.best_ckpt_path} if single else self.best_ckpt_path_dict).items():
            if path is not None:
                path = self._here(path)
                runner.message_hub.update_info('best_ckpt' if single else f'best_ckpt_{key}', path)
                if single:
                    self.best_ckpt_path = path
                else:
                    self.best_ckpt_path_dict[key] = path

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """mmengine's, but the oldest checkpoint is removed last.

        The new checkpoint still lists it, so a run resumed after a kill in between removes it.
        """
        self._remove_replaced()
        keep = self.max_keep_ckpts
        if keep > 0 and step not in self.keep_ckpt_ids:
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self._here(filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            filename,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._saved_step = step
        if is_main_process():
            write_whole(Path(runner.work_dir, _POINTER), self.last_ckpt.encode())
        while keep > 0 and len(self.keep_ckpt_ids) > keep:
            self._replaced.add(self._here(self.filename_tmpl.format(self.keep_ckpt_ids.popleft())))
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self._remove_replaced()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """mmengine's, but a best file is removed after the one that replaces it is written."""
        backend = self.file_backend
        self.file_backend = _RemovesLater(backend, self._replaced)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        self._remove_replaced()

    def _remove_replaced(self) -> None:
        """Remove what has been replaced, less a best file that was written again under its name."""
        backend = getattr(self.file_backend, '_backend', self.file_backend)
        best = {getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()}
        for path in self._replaced - best if is_main_process() else ():
            if backend.isfile(path):
                backend.remove(path)
            elif backend.isdir(path):  # as deepspeed saves
                backend.rmtree(path)
        self._replaced.clear()


def _validation_is_due(runner: Runner) -> bool:
    """Whether a run was resumed at a validation that its checkpoint does not know of."""
    loop = runner.train_loop
    if isinstance(loop, EpochBasedTrainLoop):
        done, end = loop.epoch, loop.max_epochs
    elif isinstance(loop, IterBasedTrainLoop):
        done, end = loop.iter, loop.max_iters
    else:
        return False
    if runner.val_loop is None or done < max(loop.val_begin, 1):
        return False
    loop._decide_current_val_interval()
    validated = runner.message_hub.runtime_info.get(_VALIDATED) == loop.iter
    return not validated and (done % loop.val_interval == 0 or done == end)


def _is_to_stop(runner: Runner) -> bool:
    """Whether any process of the run got SIGTERM."""
    received = torch.tensor(int(runner.stop_signal.received))
    all_reduce(received, 'max')
    return bool(received)


def _stop(runner: Runner) -> NoReturn:
    """End the run after SIGTERM with the status that a shell gives it."""
    # torchrun sends SIGTERM to all processes once one has ended, and the first may be saving.
    runner.stop_signal.ignore()
    barrier()
    pointer = Path(runner.work_dir, _POINTER)
    if pointer.is_file():
        how = f'--resume continues from {Path(pointer.read_text()).name}'
    else:
        how = 'it had saved no checkpoint yet'
    runner.logger.warning(f'SIGTERM ended this run at iteration {runner.iter + 1}: {how}.')
    kill_workers()
    raise SystemExit(128 + signal.SIGTERM)
