"""What the programs in ``tools/`` share: arguments, reading the config, starting mmengine."""

import difflib
import inspect
import logging
import os
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from mmvig import checkpoints
from mmvig.engine.preflight import SetupError, local_rank

logger = logging.getLogger(__name__)

# Top-level config keys that mmengine's runners read beside Runner's own arguments.
_RUNNER_KEYS = {
    *inspect.signature(Runner.__init__).parameters,
    *('activation_checkpointing', 'compile', 'efficient_conv_bn_eval', 'find_unused_parameters'),
    *('model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn', 'tta_model', 'tta_pipeline'),
}


class _CfgOptions(DictAction):
    """mmengine's DictAction with an error of one line for what is no KEY=VALUE."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError) as error:
            raise SetupError(f'--cfg-options takes KEY=VALUE, got {values}: {error}') from error


def add_shared_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that training and testing have in common."""
    parser.add_argument('--work-dir', help='folder for logs and results; default: ./work_dirs/CONFIG_NAME')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_CfgOptions,
        default={},
        metavar='KEY=VALUE',
        help='override config settings: a.b=1 c="[1,2]" d="[(1,2),(3,4)]" (no spaces inside); '
        "data_root=DIR moves every path under the config's data_root",
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # Both spellings: torch.distributed.launch passed the first before PyTorch 2, the second since.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: Namespace) -> Config:
    """Read ``args.config`` and apply the shared arguments to it.

    Raises:
        SetupError: The config cannot be found, or --cfg-options do not fit it.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    log_own_messages()
    cfg = read_config_file(args.config)
    merge_options(cfg, args.cfg_options)
    cfg.launcher = args.launcher
    # The command line wins over the config, which wins over the config's name.
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    return cfg


def read_config_file(path: str) -> Config:
    """Read a config file.

    Raises:
        SetupError: It, or one of its bases, is missing, or it is no config file.
    """
    if not Path(path).is_file():
        raise SetupError(
            f'config is missing: expected at {Path(path).absolute()}; '
            "the project's own are in its folder configs/"
        )
    if Path(path).suffix not in ('.py', '.json', '.yaml', '.yml'):
        raise SetupError(f'{path} is no config file: it must end in .py, .json, .yaml or .yml')
    try:
        return Config.fromfile(path)
    except FileNotFoundError as error:
        raise SetupError(f'config {path} builds on a file that is missing: {error}') from error


def merge_options(cfg: Config, options: dict) -> None:
    """Merge --cfg-options into a config.

    ``data_root`` moves all paths under the config's ``data_root``: mmengine would set the variable
    alone, which nothing reads once the config has been evaluated.

    Raises:
        SetupError: A key's first part is unknown, or a key does not fit the config's structure.
    """
    known = _RUNNER_KEYS | set(cfg)
    for key in options:
        first = key.partition('.')[0]
        if first not in known:
            close = difflib.get_close_matches(first, known, n=1)
            hint = f'; did you mean {close[0]!r}?' if close else ''
            raise SetupError(f'--cfg-options {key}: {cfg.filename} has no {first!r}{hint}')
        if first not in _RUNNER_KEYS and key != 'data_root':
            logger.warning(
                '--cfg-options %s: %r is a variable of the config file, read when the file was '
                'evaluated; set what was made from it instead.',
                key,
                first,
            )
    if 'data_root' in options:
        old, new = cfg.data_root.rstrip('/'), str(options['data_root']).rstrip('/')
        for key, value in cfg.items():
            cfg[key] = _moved(value, old, new)
    for key, value in options.items():
        try:
            cfg.merge_from_dict({key: value})
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            reason = str(error).strip('"').splitlines()[0][:200]
            raise SetupError(f'--cfg-options {key} does not fit {cfg.filename}: {reason}') from error


def _moved(value, old: str, new: str):
    """A copy of a config value with every path under ``old`` put under ``new``."""
    if isinstance(value, dict):
        return {key: _moved(each, old, new) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(each, old, new) for each in value)
    if isinstance(value, str) and (value == old or value.startswith(f'{old}/')):
        return new + value[len(old) :]
    return value


def build_runner(cfg: Config) -> Runner:
    """Build the runner, with mmcv made usable first and gloo between processes without a GPU.

    Args:
        cfg: the config; its ``runner_type`` names another class than ours, as 'FlexibleRunner'.
    """
    import mmvig.compat  # noqa: F401  not above: what it says is to be seen, and after any error

    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        _prepare_for_gloo(cfg)
    cfg.setdefault('runner_type', 'mmvig.Runner')
    return RUNNERS.build(cfg)


def load_strictly(model: nn.Module, checkpoint: str, prefix: str | None = '') -> nn.Module:
    """Load a checkpoint file that must fit the model exactly; no code in it is run (``weights_only=True``).

    Official files go into our backbones and, as classification models, into mmpretrain's ImageClassifier.

    Args:
        model: any model, also within DDP or test-time augmentation.
        checkpoint: a path, or an http(s) URL.
        prefix: of the keys to load, see :func:`mmvig.checkpoints.read`; None where the model is any
            backbone, be the checkpoint its own or a whole model's. Default: '', all keys.

    Returns:
        The model without what it was within.

    Raises:
        SetupError: It is missing, cannot be read, or has missing, unexpected or mis-shaped keys.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    try:
        model.load_state_dict(checkpoints.read(checkpoint, prefix))
    except (OSError, RuntimeError) as error:
        reason = '; '.join(line.strip() for line in str(error).splitlines())
        reason = textwrap.shorten(reason, 400, placeholder=' ...')
        raise SetupError(f'checkpoint {checkpoint} cannot be loaded: {reason}') from error
    return model


def log_own_messages() -> None:
    """Print mmvig's log messages from INFO on, once a node."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter('%(name)s - %(levelname)s - %(message)s'))
    own = logging.getLogger('mmvig')
    own.addHandler(handler)
    own.setLevel(logging.INFO if local_rank() == 0 else logging.ERROR)


def _prepare_for_gloo(cfg: Config) -> None:
    """Set up what mmengine's own initialisation does only for processes with a GPU each."""
    torch.distributed.init_process_group('gloo')
    if _without_sync_bn(cfg.model):
        logger.info('SyncBN needs GPUs: each process normalises its own part of the batch instead.')
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = {**wrapper, **cfg.get('model_wrapper_cfg', {}), 'device_ids': None}


def _without_sync_bn(node) -> bool:
    """Turn every SyncBN of a model's config into BN; return whether there was one."""
    found = False
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list, tuple)):
            found |= _without_sync_bn(value)
        elif key == 'type' and value == 'SyncBN':
            node[key], found = 'BN', True
    return found
