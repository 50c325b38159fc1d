"""Weights into models, strictly: what a run starts from, and ``init_cfg`` of any part of a model."""

import logging
import re
import textwrap
from collections import OrderedDict
from collections.abc import Mapping

import torch
import yaml
from mmengine.fileio import register_handler
from mmengine.fileio.handlers import YamlHandler
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from mmvig import checkpoints, reading
from mmvig.backbones import ViG, ViGH
from mmvig.backbones.base import Backbone
from mmvig.engine.preflight import SetupError

logger = logging.getLogger(__name__)


def guard() -> None:
    """Make what mmengine reads in this process safe and strict: for programs, not for imports.

    Checkpoints: see :func:`mmvig.reading.guard_mmengine`. An ``init_cfg`` of any module is checked. YAML is
    read without its tags for Python objects.
    """
    reading.guard_mmengine()
    WEIGHT_INITIALIZERS.register_module(name='Pretrained', module=Pretrained, force=True)
    register_handler(['yaml', 'yml'])(_PlainYaml)


class Pretrained(PretrainedInit):
    """mmengine's initialisation from a checkpoint, with an error for what does not fit the module.

    Missing and unexpected keys are said, as mmengine does: the file may be of a larger model.

    Raises:
        RuntimeError: The file has a parameter of another shape, none of the module's, or is no checkpoint.
    """

    def __call__(self, module: nn.Module) -> None:
        """Give a module, or a whole model, its weights."""
        if self.prefix is None and isinstance(getattr(module, 'backbone', None), Backbone):
            content = reading.load(self.checkpoint, self.map_location)
            module.load_state_dict(to_start_from(module, content, self.checkpoint))
            return
        state_dict = checkpoints.read(self.checkpoint, self.prefix or '', self.map_location)
        own = module.state_dict()
        if hasattr(module, 'backbone'):
            state_dict = _without_other_classes(own, state_dict, self.checkpoint)
        _check_part(type(module).__name__, own, state_dict, self.checkpoint)
        load_state_dict(module, state_dict, strict=False, logger='current')


class _PlainYaml(YamlHandler):
    """YAML without code: its tags for Python objects are errors, that for tuples apart."""

    def load_from_fileobj(self, file, **kwargs):
        return super().load_from_fileobj(file, Loader=_PlainLoader, **kwargs)


class _PlainLoader(yaml.SafeLoader):
    pass


_PlainLoader.add_constructor(
    'tag:yaml.org,2002:python/tuple', lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)


def unfit(checkpoint: str, error: Exception) -> SetupError:
    """The error, in one line, for a checkpoint that cannot be read or does not fit."""
    reason = '; '.join(line.strip() for line in str(error).splitlines() if line.strip())
    reason = textwrap.shorten(reason, 400, placeholder=' ...')
    return SetupError(f'checkpoint {checkpoint} cannot be loaded: {reason}')


def to_resume_from(content: object, name: str) -> dict:
    """What a checkpoint file of a run holds, checked to be enough to go on with that run.

    Raises:
        RuntimeError: It is not, or its weights are not finite.
    """
    weights = checkpoints.state_dict_of(content, name)
    meta = content.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    missing = [f'meta.{key}' for key in ('epoch', 'iter') if not isinstance(meta.get(key), int)]
    missing += [key for key in ('message_hub', 'optimizer') if not isinstance(content.get(key), Mapping)]
    if missing or weights is not content.get('state_dict'):
        raise RuntimeError(
            f'{name} is no checkpoint of a run to resume: no {", ".join(missing) or "state_dict"}; '
            'to start from its weights, use --cfg-options load_from=FILE without --resume'
        )
    if isinstance(content.get('ema_state_dict'), Mapping):
        checkpoints.check_state_dict(content['ema_state_dict'], name)
    if content['optimizer'].get('loss_scaler') == {}:  # of bfloat16, which has none: float16's starts anew
        optimizer = {key: value for key, value in content['optimizer'].items() if key != 'loss_scaler'}
        content = {**content, 'optimizer': optimizer}
    return content


def to_start_from(model: nn.Module, content: object, name: str) -> dict:
    """The state dict, for all of a model, that a run starts from when ``load_from`` names a checkpoint.

    The checkpoint must be of the same model, as for ``tools/test.py``, with two exceptions, both logged:

    - A classification model or a bare backbone, official or ours, gives the model's backbone its
      weights. The rest keeps its initial values.
    - Where layers outside backbone and neck have another number of outputs, as they have for other
      classes, and nothing else differs, these layers keep their initial values.

    Args:
        model: a detector, segmentor, classifier or any other model.
        content: what the checkpoint file holds.
        name: of the file.

    Returns:
        A state dict that ``model.load_state_dict`` takes strictly where the checkpoint fits.

    Raises:
        RuntimeError: The content is no checkpoint.
    """
    state_dict = checkpoints.state_dict_of(content, name)
    own = model.state_dict()
    if isinstance(getattr(model, 'backbone', None), Backbone):
        state_dict = dict(state_dict)
        checkpoints.adapt_classifier(model.backbone, state_dict, '')  # official names
        if not any(key.startswith('backbone.') for key in state_dict):
            state_dict = {f'backbone.{key}': value for key, value in state_dict.items()}
        dropped = [key for key in state_dict if not key.startswith('backbone.')]
        # mmpretrain's classifiers have weights in `backbone` and `head` alone.
        has_head = any(key.startswith('head.') for key in own)
        if not dropped or (not has_head and all(key.startswith('head.') for key in dropped)):
            return _backbone_alone(own, state_dict, dropped, name)
    return _without_other_classes(own, state_dict, name)


def _backbone_alone(own: Mapping, state_dict: Mapping, dropped: list[str], name: str) -> dict:
    """The backbone's weights, and the model's own for the rest."""
    weights = {key: value for key, value in state_dict.items() if key not in dropped}
    rest = {key: value for key, value in own.items() if not key.startswith('backbone.')}
    logger.info(
        '%s: the backbone takes %d tensors, %s is left out; %s keep their initial values.',
        name,
        len(weights),
        ', '.join(dropped) or 'nothing',
        ', '.join(sorted({key.partition('.')[0] for key in rest})) or 'no others',
    )
    return {**weights, **rest}


def _without_other_classes(own: Mapping, state_dict: Mapping, name: str) -> Mapping:
    """A state dict in which layers with another number of outputs have the model's own values."""
    differ = [key for key in own if key in state_dict and own[key].shape != state_dict[key].shape]
    other = [
        key
        for key in differ
        if own[key].shape[1:] == state_dict[key].shape[1:] and not key.startswith(('backbone.', 'neck.'))
    ]
    if not other or other != differ:
        return state_dict
    outputs = [f'{key} ({len(state_dict[key])} outputs, here {len(own[key])})' for key in other]
    logger.warning('%s: other classes: %s keep their initial values.', name, ', '.join(outputs))
    fitting = OrderedDict({**state_dict, **{key: own[key] for key in other}})
    fitting._metadata = getattr(state_dict, '_metadata', {})
    return fitting


def _check_part(kind: str, own: Mapping, state_dict: Mapping, name: str) -> None:
    """Check that a file has something of a part of a model, and nothing of another shape."""
    shared = [key for key in own if key in state_dict]
    if not shared:
        raise RuntimeError(
            f'{name} has nothing of this {kind}: it begins with {next(iter(state_dict))!r}, the {kind} '
            f'with {next(iter(own), None)!r}; name a part of the file with prefix='
        )
    for key in shared:
        if own[key].shape != state_dict[key].shape:
            raise RuntimeError(
                f'{name} does not fit this {kind}: {key} is {list(state_dict[key].shape)}, expected '
                f'{list(own[key].shape)}'
            )


def check_shapes(state_dict: Mapping[str, Tensor], name: str) -> None:
    """Check that the weights of a backbone of ours, alone or in a model, are those of one architecture.

    Raises:
        RuntimeError: They are not. Other weights are not looked at.
    """
    prefix = 'backbone.' if any(key.startswith('backbone.stem.') for key in state_dict) else ''
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    own = checkpoints.by_our_names(own)
    if not {'stem.down1.conv.weight', 'stem.down2.conv.weight'} <= {*own}:
        return
    try:
        backbone = _backbone_of(own)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise RuntimeError(f'{name} has the shapes of no ViG or ViG-H: {error}') from error
    expected = {key: value for key, value in backbone.state_dict().items() if key != 'pos_embed'}
    if 'head.fc.weight' in state_dict:  # mmpretrain's classifier
        classes = len(state_dict['head.fc.weight'])
        shapes = {'head.fc.weight': (classes, backbone.num_features[-1]), 'head.fc.bias': (classes,)}
        expected |= {key: torch.empty(shape, device='meta') for key, shape in shapes.items()}
        own |= {key: state_dict[key] for key in shapes if key in state_dict}
    _check_part(type(backbone).__name__, expected, own, name)


def _backbone_of(state_dict: Mapping[str, Tensor]) -> Backbone:
    """A backbone without memory, of the architecture that names and a few shapes say."""
    channels = len(state_dict['stem.down2.conv.weight'])
    in_channels = state_dict['stem.down1.conv.weight'].shape[1]
    depths: dict[int, int] = {}
    num_heads: dict[int, int] = {}
    for key, value in state_dict.items():
        if match := re.match(r'(?:stages\.(\d+)\.)?blocks\.(\d+)\.', key):
            stage = int(match[1] or 0)
            depths[stage] = max(depths.get(stage, 0), int(match[2]) + 1)
            if key.endswith('norm_long.weight'):
                num_heads.setdefault(stage, channels * 2**stage // len(value))
    stages = range(max(depths, default=0) + 1)
    arch = dict(depths=[depths.get(i, 1) for i in stages], num_heads=[num_heads.get(i, 1) for i in stages])
    with torch.device('meta'):
        if 'pos_embed' in state_dict:
            arch = dict(depth=arch['depths'][0], num_heads=arch['num_heads'][0])
            return ViG(dict(embed_dims=channels, **arch), in_channels)
        return ViGH(dict(embed_dims=channels, **arch), in_channels, tuple(stages))
