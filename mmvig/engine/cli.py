"""What the programs in ``tools/`` share: arguments, reading the config, starting mmengine."""

import logging
import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner
from torch import nn

from mmvig import checkpoints, reading
from mmvig.engine import loading
from mmvig.engine.errors import reason
from mmvig.engine.options import CfgOptions, merge_options
from mmvig.engine.preflight import SetupError, local_rank

logger = logging.getLogger(__name__)

CONFIG_SUFFIXES = ('.py', '.json', '.yaml', '.yml')
# What each launcher tells its processes, of which mmengine reads all.
_LAUNCHERS = {
    'none': (),
    'pytorch': ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}


def add_shared_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that training and testing have in common."""
    parser.add_argument('--work-dir', help='folder for logs and results; default: ./work_dirs/CONFIG_NAME')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        default={},
        metavar='KEY=VALUE',
        help='override config settings: a.b=1 list.0=x c="[1, (2, 3)]" d="dict(type=SGD, lr=0.1)" '
        """e="'text, with commas'"; data_root=DIR moves every path under the config's data_root""",
    )
    add_trust_argument(parser)
    parser.add_argument('--launcher', choices=list(_LAUNCHERS), default='none')
    # Both spellings: torch.distributed.launch passed the first before PyTorch 2, the second since.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def add_trust_argument(parser: ArgumentParser) -> None:
    """Add the flag that lets checkpoint files run code; :func:`trust_checkpoints` heeds it."""
    parser.add_argument(
        reading.TRUST_FLAG,
        action='store_true',
        help='read checkpoint files even where they may run code as they are read, such as old ones of '
        'makers you trust; default: tensors and plain values alone',
    )


def trust_checkpoints(args: Namespace) -> None:
    """Heed what :func:`add_trust_argument` added; before the config is read."""
    if args.trust_checkpoint:
        logger.warning('%s: checkpoint files may run code in this process.', reading.TRUST_FLAG)
        reading.trust()


# What a config's reading or a flag has the last word on.
_NOT_BY_OPTION = {
    'custom_imports': 'a config imports them while it is read, so name them in a file',
    'launcher': 'give --launcher',
}


def load_config(args: Namespace) -> Config:
    """Read ``args.config`` and apply the shared arguments to it.

    Raises:
        SetupError: The config cannot be read, --cfg-options do not fit it, or --launcher is none that
            started this process.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    missing = [name for name in _LAUNCHERS[args.launcher] if name not in os.environ]
    if missing:
        raise SetupError(
            f'--launcher {args.launcher} is for processes that it has started, with {missing[0]} in their '
            'environment: start them with tools/dist_train.sh, dist_test.sh or their slurm_ forms'
        )
    log_own_messages()
    trust_checkpoints(args)
    cfg = read_config_file(args.config)
    for key in args.cfg_options:
        if first := _NOT_BY_OPTION.get(key.partition('.')[0]):
            raise SetupError(f'--cfg-options {key} would change nothing: {first}')
    merge_options(cfg, args.cfg_options)
    check_complete(cfg)
    cfg.launcher = args.launcher
    # The command line wins over the config, which wins over the config's name.
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    return cfg


def use_expandable_segments() -> None:
    """Let PyTorch's memory grow in place where sizes change, unless the environment says how it is to grow.

    Before anything is on a GPU: PyTorch reads the variable then.
    """
    if not {'PYTORCH_CUDA_ALLOC_CONF', 'PYTORCH_ALLOC_CONF'} & set(os.environ):
        os.environ['PYTORCH_CUDA_ALLOC_CONF'] = 'expandable_segments:True'


def check_complete(cfg: Config) -> None:
    """Check that a config has all that a runner is built from.

    Raises:
        SetupError: A key is missing, or the length of the training is no number.
    """
    if not isinstance(cfg.get('model'), dict):
        raise SetupError(f'{cfg.filename} has no model to run: expected model = dict(type=..., ...)')
    train = ('train_dataloader', 'train_cfg', 'optim_wrapper')
    for keys in (
        train,
        *((f'{split}_dataloader', f'{split}_cfg', f'{split}_evaluator') for split in ('val', 'test')),
    ):
        missing = [key for key in keys if cfg.get(key) is None]
        if 0 < len(missing) < len(keys):
            present = ' and '.join(key for key in keys if key not in missing)
            raise SetupError(
                f'{cfg.filename} has {present}, but no {" and no ".join(missing)}: give all or none'
            )
    if not isinstance(cfg.get('resume', False), bool):
        raise SetupError(f'resume must be True or False, got {cfg.resume!r}; --resume takes a checkpoint')
    for key in ('max_epochs', 'max_iters', 'val_interval'):
        value = (cfg.get('train_cfg') or {}).get(key, 1)
        if not isinstance(value, int) or value < 1:
            raise SetupError(f'train_cfg.{key} must be a whole number from 1 on, got {value!r}')


def read_config_file(path: str) -> Config:
    """Read a config file. From here on mmengine reads files safely: :func:`mmvig.engine.loading.guard`.

    Raises:
        SetupError: It, or one of its bases, is missing, is no config file or has an error.
    """
    loading.guard()
    if not Path(path).is_file():
        raise SetupError(
            f'config is missing: expected at {Path(path).absolute()}; '
            "the project's own are in its folder configs/"
        )
    if Path(path).suffix not in CONFIG_SUFFIXES:
        raise SetupError(f'{path} is no config file: it must end in .py, .json, .yaml or .yml')
    try:
        return Config.fromfile(path)
    except FileNotFoundError as error:
        raise SetupError(f'config {path} builds on a file that is missing: {error}') from error
    except Exception as error:  # a config is a program, which can fail in any way
        lines = [
            line
            for file, line, *_ in traceback.extract_tb(error.__traceback__)
            if file == str(Path(path).absolute())
        ]
        where = f', line {lines[-1]}' if lines else ''
        raise SetupError(f'config {path} cannot be read{where}: {reason(error)}') from error


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


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model as mmengine's Runner does, in the registry's current scope.

    A ``data_preprocessor`` at the config's top, as mmpretrain's configs have it, is the model's where that
    names none.
    """
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(cfg.model)


def load_strictly(model: nn.Module, checkpoint: str, prefix: str | None = '') -> nn.Module:
    """Load a checkpoint file that must fit the model exactly; no code in it is run (``weights_only=True``).

    Official files go into our backbones and, as classification models, into mmpretrain's ImageClassifier.

    Args:
        model: any model, also within DDP or test-time augmentation.
        checkpoint: a path, a URL, or another address that mmengine knows.
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
        raise loading.unfit(checkpoint, error) from error
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
