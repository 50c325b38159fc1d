"""Mixed precision: which, and where mmengine's own optimiser wrapper refuses to run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from torch import nn

from mmvig.engine.preflight import SetupError

logger = logging.getLogger(__name__)

DTYPES = {'bf16': 'bfloat16', 'fp16': 'float16'}


class CpuAmpOptimWrapper(OptimWrapper):
    """An OptimWrapper whose forward passes run under bfloat16 autocast on the CPU.

    mmengine's AmpOptimWrapper demands a GPU. bfloat16 has float32's range, so there is no loss to
    scale. Arguments are OptimWrapper's.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast around the forward pass, within OptimWrapper's own context."""
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield


def use_amp(cfg: Config, wanted: str = 'auto') -> None:
    """Switch a config to mixed precision, and log which and why.

    bfloat16 needs no loss scaler, so no step waits for the GPU to learn whether gradients are finite.

    Args:
        cfg: changed in place, in ``optim_wrapper``.
        wanted: 'bf16', 'fp16', or 'auto': what an AmpOptimWrapper in the config says, else bfloat16 where
            the GPU computes in it, and on a CPU, else float16 with a dynamic loss scale.

    Raises:
        SetupError: The config's wrapper is of another type, or float16 is wanted on a CPU.
    """
    options = cfg.optim_wrapper
    kind = options.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise SetupError(
            f'--amp is for an OptimWrapper, and {cfg.filename} has {kind}: set its precision there'
        )
    on_cpu = get_device() == 'cpu'
    if on_cpu and wanted == 'fp16':
        raise SetupError('--amp fp16 needs a GPU, and there is none: take --amp bf16')
    if wanted == 'auto' and kind == 'AmpOptimWrapper' and not on_cpu:
        logger.info('--amp: %s, as the config has it.', options.get('dtype') or 'float16')
        return
    if wanted != 'auto':
        chosen, why = wanted, 'as asked for'
    elif on_cpu:
        chosen, why = 'bf16', 'there is no GPU'
    elif not torch.cuda.is_bf16_supported(including_emulation=False):
        chosen, why = 'fp16', 'this GPU does not compute in bfloat16'
    elif cfg.get('default_scope') == 'mmdet' and (part := _rounding_part(cfg.model)):
        chosen, why = 'fp16', f'{part} would round boxes to 8 bits in bfloat16'
    else:
        chosen, why = 'bf16', 'this GPU computes in it, and it needs no loss scaler'
    logger.info('--amp: %s, %s.', DTYPES[chosen], why)
    options.pop('dtype', None)
    options.pop('loss_scale', None)
    if on_cpu:
        options.type = f'{__name__}.{CpuAmpOptimWrapper.__name__}'
    else:
        scale = {'enabled': False} if chosen == 'bf16' else 'dynamic'
        options.update(type='AmpOptimWrapper', dtype=DTYPES[chosen], loss_scale=scale)


def _rounding_part(model: dict) -> str | None:
    """The part of a detector that rounds boxes to the maps' dtype, as mmdet's do; None in ours.

    bfloat16 holds whole pixels up to 256 alone; mmcv's own RoIAlign does not take it at all.
    """
    heads = _dicts(model.get('rpn_head'))
    if not heads:
        heads = [*_dicts(model.get('bbox_head')), model]
        return heads[0].get('type', 'its head')
    for head in heads:
        if head.get('type') != 'mmvig.RPNHead':
            return head.get('type')
    for head in _dicts(model.get('roi_head')):
        for name in head:
            for extractor in _dicts(head[name]) if name.endswith('roi_extractor') else ():
                if extractor.get('type') != 'mmvig.SingleRoIExtractor':
                    return extractor.get('type')
                if not extractor.get('roi_layer', {}).get('use_torchvision'):
                    return 'RoIAlign without use_torchvision=True'
    return None


def _dicts(node: object) -> list[dict]:
    """A part of a config that may be one, several (as in a cascade), or None."""
    return [
        each for each in (node if isinstance(node, (list, tuple)) else [node]) if isinstance(each, dict)
    ]
