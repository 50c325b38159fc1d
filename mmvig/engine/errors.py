"""Errors of mmengine, the model libraries and torch, in a line that names the part of the config."""

import dis
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import nn

from mmvig.engine.options import RUNNER_KEYS
from mmvig.engine.preflight import SetupError, local_rank, one_line_errors

VARIABLE = 'MMVIG_TRACEBACK'
_OURS = re.compile(r'mmvig\.(backbones|ops|datasets|compat)\b')
_BUILDERS = {'build_from_cfg', 'build_optimizer_from_cfg', 'build_scheduler_from_cfg'}
_LONGEST = 400


@contextmanager
def said_in_one_line(cfg: Config) -> Iterator[None]:
    """Say what fails while a config is built or run in one line on stderr; its traceback goes into the log.

    The exit status is 2 before the run's first step, and 1 after. An error within mmvig that nothing
    raised on purpose is a bug of ours and keeps its traceback, as everything does with MMVIG_TRACEBACK=1.
    """
    with one_line_errors():
        try:
            yield
        except SetupError:
            raise
        except Exception as error:
            places = list(_places(error))
            if os.environ.get(VARIABLE) or _is_bug_of_ours(error, places):
                raise
            line = f'{_where(places, cfg)}{reason(error)}; {_log_traceback()}'
            if not _is_running(places):
                raise SetupError(line) from error
            print(f'error: {_rank()}{line}', file=sys.stderr)
            sys.exit(1)


def reason(error: Exception) -> str:
    """An error's type and message in one line of at most 400 characters."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    kind = type(error).__name__
    if 'Original Traceback (most recent call last)' in message:  # of a data worker, as torch hands it on
        message = message.rstrip().splitlines()[-1]
        kind = 'in a data worker'
    if not message:  # of an assert without one
        message = traceback.extract_tb(error.__traceback__)[-1].line or ''
    message = message.partition(' Please check whether the value of')[0]  # mmengine's advice for authors
    return f'{kind}: {textwrap.shorten(message, _LONGEST, placeholder=" ...")}'.rstrip(': ')


def _places(error: Exception) -> Iterator[TracebackType]:
    place = error.__traceback__
    while place is not None:
        yield place
        place = place.tb_next


def _is_bug_of_ours(error: Exception, places: list[TracebackType]) -> bool:
    """Whether an error happened within mmvig's models, operators or data sets, and no line raised it."""
    if isinstance(error, (OSError, torch.cuda.OutOfMemoryError)):
        return False
    last = places[-1]
    raised = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap['RAISE_VARARGS']
    names = [str(place.tb_frame.f_globals.get('__name__')) for place in places]
    return not raised and any(map(_OURS.match, names))


def _is_running(places: list[TracebackType]) -> bool:
    """Whether the first step has begun: all before is building from the config."""
    return any(
        place.tb_frame.f_code.co_name.startswith('run')
        and place.tb_frame.f_globals.get('__name__') == 'mmengine.runner.loops'
        for place in places
    )


def _where(places: list[TracebackType], cfg: Config) -> str:
    """The part of the config that was being built, or the module of the model that was running."""
    frames = [place.tb_frame for place in places]
    for frame in reversed(frames):
        node = frame.f_locals.get('cfg')
        if frame.f_code.co_name in _BUILDERS and isinstance(node, dict):
            key = _key_of(node, cfg)
            return f'{key} ({node.get("type")}): ' if key else f'{node.get("type")}: '
    modules = [frame.f_locals.get('self') for frame in frames]
    modules = [module for module in modules if isinstance(module, nn.Module)]
    if not modules:
        built = [frame.f_code.co_name.removeprefix('build_') for frame in frames if _is_runner_build(frame)]
        return f'{built[-1]}: ' if built else ''
    names = {module: name for name, module in modules[0].named_modules(prefix='model')}
    known = [module for module in modules if module in names]
    return f'{names[known[-1]]} ({type(known[-1]).__name__}): '


def _is_runner_build(frame: FrameType) -> bool:
    return isinstance(frame.f_locals.get('self'), Runner) and frame.f_code.co_name.startswith('build_')


def _key_of(node: dict, cfg: Config) -> str | None:
    """The key in the config of what is most like a dict that was built, of the same type."""
    alike = [(key, each) for key, each in _dicts(cfg) if each.get('type') == node.get('type')]
    common = [sum(node.get(name) == value for name, value in each.items()) for _, each in alike]
    return alike[common.index(max(common))][0] if alike else None


def _dicts(node, key: str = '') -> Iterator[tuple[str, dict]]:
    """Every dict below those keys of a config that the runner reads, and its own key."""
    if key and isinstance(node, dict):
        yield key, node
    items = node.items() if isinstance(node, (dict, Config)) else enumerate(node)
    for name, value in items:
        if isinstance(value, (dict, list, tuple)) and (key or name in RUNNER_KEYS):
            yield from _dicts(value, f'{key}.{name}' if key else name)


def _log_traceback() -> str:
    """Write the traceback of the error that is being handled into the run's log file; say where it is."""
    logger = MMLogger.get_current_instance()
    files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    for handler in files:
        record = logger.makeRecord(logger.name, logging.ERROR, '', 0, 'The run failed.', (), sys.exc_info())
        handler.handle(record)
    if files:
        return f'its traceback is in {files[0].baseFilename}'
    return f'{VARIABLE}=1 shows the traceback'


def _rank() -> str:
    return f'process {local_rank()}: ' if torch.distributed.is_initialized() else ''
