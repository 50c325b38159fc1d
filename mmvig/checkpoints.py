"""Official checkpoints and ours: names, reading files, strict matching.

A backbone takes several kinds of state dict, told apart by their names. ViG-H: the official classification
model (``patch_embed.*, layers.*, classifier.*``), the official backbone (``outnorm{i}`` for the classifier)
and our own (``stem.*, stages.*, norm{i}``). ViG: the official classification model (``patch_embed.proj.*,
blocks.*.attn.*, norm, head``) and our own (``stem.*, blocks.*.mixer.*, norm{i}``); both have ``pos_embed``.
"""

import re
from collections.abc import Mapping

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmvig import reading

MIXER = {
    'in_proj.0': 'dwconv',
    'qkv_proj': 'qkv',
    'gk_proj.0': 'decay_down',
    'gk_proj.1': 'decay_up',
    'g_proj': 'mix_gate',
    'g_norm': 'norm_long',
    'l_norm': 'norm_short',
    'o_proj': 'out',
}
OFFICIAL_TO_OURS = {
    # ViG-H
    'patch_embed.0': 'stem.down1.conv',
    'patch_embed.2': 'stem.down1.norm',
    'patch_embed.5': 'stem.down2.conv',
    'patch_embed.7': 'stem.down2.norm',
    'layers.#.blocks.#.norm': 'stages.#.blocks.#.norm1',
    **{f'layers.#.blocks.#.op.{key}': f'stages.#.blocks.#.mixer.{name}' for key, name in MIXER.items()},
    'layers.#.blocks.#.norm2': 'stages.#.blocks.#.norm2',
    'layers.#.blocks.#.mlp.fc1': 'stages.#.blocks.#.mlp.fc1',
    'layers.#.blocks.#.mlp.fc2': 'stages.#.blocks.#.mlp.fc2',
    'layers.#.downsample.1': 'stages.#.downsample.conv',
    'layers.#.downsample.3': 'stages.#.downsample.norm',
    'outnorm#': 'norm#',
    # ViG
    'patch_embed.proj.0': 'stem.down1.conv',
    'patch_embed.proj.1': 'stem.down1.norm',
    'patch_embed.proj.3': 'stem.down2.conv',
    'patch_embed.proj.4': 'stem.down2.norm',
    'blocks.#.attn_norm': 'blocks.#.norm1',
    **{f'blocks.#.attn.{key}': f'blocks.#.mixer.{name}' for key, name in MIXER.items()},
    'blocks.#.mlp_norm': 'blocks.#.norm2',
    'blocks.#.mlp.gate_proj': 'blocks.#.mlp.fc1',
    'blocks.#.mlp.down_proj': 'blocks.#.mlp.fc2',
}
# What all official models have and ours do not.
OFFICIAL_STEM = 'patch_embed.'
# The numbers of stages, blocks and norms in an official name.
NUMBERS = re.compile(r'(?<=^layers\.)\d+|(?<=^blocks\.)\d+|(?<=\.blocks\.)\d+|(?<=^outnorm)\d+')
# Where a checkpoint file may hold its state dict, in this order.
CONTAINERS = ('state_dict', 'model', 'model_ema')


def our_name(official: str) -> str:
    """Our name of an official parameter; a name that is not official comes back unchanged."""
    module, _, leaf = official.rpartition('.')
    numbers = iter(NUMBERS.findall(module))
    pattern = NUMBERS.sub('#', module)
    if pattern not in OFFICIAL_TO_OURS:
        return official
    ours = re.sub('#', lambda _: next(numbers), OFFICIAL_TO_OURS[pattern])
    return f'{ours}.{leaf}'


def by_our_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with our names for official ones.

    Raises:
        RuntimeError: it has a parameter under both of its names.
    """
    names: dict[str, str] = {}
    for key in state_dict:
        first = names.setdefault(our_name(key), key)
        if first != key:
            raise RuntimeError(f'the checkpoint has one parameter under two names, {first!r} and {key!r}')
    return {name: state_dict[key] for name, key in names.items()}


def read(checkpoint: str, prefix: str | None = None, map_location: str = 'cpu') -> dict:
    """Read a checkpoint file without running code from it (``weights_only=True``).

    Args:
        checkpoint: a path, an http(s) URL, or another address (see :func:`mmvig.reading.load`).
        prefix: keep only the keys with this prefix, without it, such as 'backbone' or 'backbone.'; '' keeps
            all. Default: None, the backbone's part if it has one.
        map_location: device of the tensors. Default: 'cpu'.

    Returns:
        The state dict, unwrapped (see :func:`unwrap`).

    Raises:
        TypeError: prefix is no string.
        FileNotFoundError: the file does not exist.
        RuntimeError: the file is no checkpoint of finite tensors, or no key has the prefix.
    """
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f'prefix must be a str or None, got {prefix!r}')
    content = reading.load(checkpoint, map_location)
    state_dict = state_dict_of(content, checkpoint)
    if prefix is None:
        return unwrap(state_dict)
    if prefix and not prefix.endswith('.'):
        prefix += '.'  # as mmengine has it
    state_dict = {
        key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)
    }
    if not state_dict:
        raise RuntimeError(f'{checkpoint} has no key with the prefix {prefix!r}')
    return state_dict


def state_dict_of(content: object, name: str) -> dict:
    """The state dict in what a checkpoint file holds, checked to be one.

    Args:
        content: what was read.
        name: of the file, for errors.

    Raises:
        RuntimeError: it is none, is empty, or holds anything else than finite tensors under names.
    """
    if not isinstance(content, Mapping):
        raise RuntimeError(f'{name} must hold a state dict, got {type(content).__name__}')
    odd = [key for key in content if not isinstance(key, str)]
    state_dict = content if odd else _contained(content)
    if not state_dict:
        raise RuntimeError(f'{name} must hold a state dict, got an empty one')
    check_state_dict(state_dict, name)
    return state_dict


def check_state_dict(state_dict: Mapping, name: str) -> None:
    """Check that a state dict holds finite tensors under names.

    Raises:
        RuntimeError: it does not; the first such key is named.
    """
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise RuntimeError(f'{name} must hold tensors by name, got {key!r} for a name')
        if key.endswith('_extra_state'):
            continue  # torch's name for what a module saves beside tensors
        if not isinstance(value, Tensor):
            raise RuntimeError(f'{name} must hold tensors, got {type(value).__name__} for {key!r}')
        if not is_finite(value):
            raise RuntimeError(
                f'{name} has NaN or infinite values in {key!r}: its training diverged; take an earlier one'
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor's values are finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())


def unwrap(content: Mapping) -> Mapping:
    """The backbone's state dict in what a checkpoint file holds.

    Looks inside ``state_dict``, ``model`` or ``model_ema``, strips ``module.`` (DDP) and, if the keys are
    those of a whole detector, segmentor or classifier, takes its ``backbone.`` part.
    """
    state_dict = _contained(content)
    if any(not isinstance(key, str) for key in state_dict):
        raise RuntimeError(f'a state dict must hold tensors by name, got the keys {list(state_dict)[:3]}')
    backbone = {
        key.removeprefix('backbone.'): value
        for key, value in state_dict.items()
        if key.startswith('backbone.')
    }
    return backbone or state_dict


def _contained(content: Mapping) -> Mapping:
    for name in CONTAINERS:
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if content and all(isinstance(key, str) and key.startswith('module.') for key in content):
        content = {key.removeprefix('module.'): value for key, value in content.items()}
    return content


def adapt(backbone: nn.Module, state_dict: dict, prefix: str, strict: bool = True) -> None:
    """Turn a backbone's part of a state dict into exactly its own keys, in place.

    Official names become ours. The classifier is dropped. The classification model's last norm becomes
    the last unit's: always in ViG, whose own it is, and in ViG-H where the last stage is the only output.
    Output norms that either side lacks are dropped or keep their present values (not ViG's own), and
    stages and blocks that ``out_indices`` left unbuilt are dropped.

    Args:
        backbone: a :class:`mmvig.backbones.base.Backbone`.
        state_dict: the state dict being loaded, possibly of a larger model.
        prefix: the backbone's prefix in it.
        strict: whether anything else that does not match is an error. Default: True.

    Raises:
        RuntimeError: missing, unexpected or mis-shaped keys, all of them listed.
    """
    incoming = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    if not incoming:
        return  # nothing of a backbone in it: the caller reports that as for any module
    incoming = by_our_names({key[len(prefix) :]: value for key, value in incoming.items()})
    own = backbone.state_dict()
    last = backbone.num_units - 1
    for leaf in ('weight', 'bias'):
        norm = incoming.pop(f'{backbone.official_norm}.{leaf}', None)
        incoming.pop(f'{backbone.official_head}.{leaf}', None)
        if norm is not None and (backbone.owns_final_norm or backbone.out_indices == (last,)):
            incoming[f'norm{last}.{leaf}'] = norm

    dropped = [key for key in incoming if key not in own and _is_unbuilt(backbone, key)]
    for key in dropped:
        del incoming[key]
    optional = [i for i in backbone.out_indices if i != last or not backbone.owns_final_norm]
    kept = {f'norm{i}': [key for key in own if key.startswith(f'norm{i}.')] for i in optional}
    kept = {name: keys for name, keys in kept.items() if not {*keys} & {*incoming}}
    for keys in kept.values():
        incoming.update({key: own[key] for key in keys})
    if strict:
        _check(backbone, own, incoming)
    if kept:
        print_log(f'{", ".join(kept)}: not in the checkpoint, initial values kept', logger='current')
    state_dict.update({prefix + key: value for key, value in incoming.items()})


def adapt_classifier(backbone: nn.Module, state_dict: dict, prefix: str) -> None:
    """Give an official classification model the names of mmpretrain's ImageClassifier, in place.

    Its classifier becomes ``head.fc``, a LinearClsHead; the rest goes to ``backbone``, whose own loading
    (:func:`adapt`) matches it strictly. A state dict of another kind is left as it is.

    Args:
        backbone: the classifier's :class:`mmvig.backbones.base.Backbone`.
        state_dict: the state dict being loaded, possibly still wrapped as a checkpoint file holds it.
        prefix: the classifier's prefix in it.
    """
    official = _contained({key.removeprefix(prefix): value for key, value in state_dict.items()})
    if not any(key.startswith(OFFICIAL_STEM) for key in official):
        return
    head = f'{backbone.official_head}.'
    state_dict.clear()
    for key, value in official.items():
        ours = f'head.fc.{key.removeprefix(head)}' if key.startswith(head) else f'backbone.{key}'
        state_dict[prefix + ours] = value


def _is_unbuilt(backbone: nn.Module, key: str) -> bool:
    """Whether a backbone of the same arch with all outputs has this key's norm, unit or downsample."""
    match = re.match(rf'(norm|{backbone.units}\.)(\d+)\.(downsample\.)?', key)
    if not match or int(match[2]) >= backbone.num_units:
        return False
    unit, last = int(match[2]), max(backbone.out_indices)
    if match[1] == 'norm':
        return unit not in backbone.out_indices
    return unit > last or (unit == last and match[3] is not None)


def _check(backbone: nn.Module, own: Mapping[str, Tensor], incoming: Mapping[str, Tensor]) -> None:
    problems = [f'missing: {key}' for key in own if key not in incoming]
    problems += [f'unexpected: {key}' for key in incoming if key not in own]
    problems += [
        f'shape of {key}: {list(incoming[key].shape)}, expected {list(own[key].shape)}'
        for key in own
        # A quantised layer's packed weights are no tensors, and PyTorch unpacks them itself.
        if isinstance(incoming.get(key), Tensor)
        and isinstance(own[key], Tensor)
        and incoming[key].shape != own[key].shape
    ]
    if problems:
        name = type(backbone).__name__
        raise RuntimeError(
            f'the checkpoint does not fit this {name} (depths {list(backbone.depths)}, width '
            f'{backbone.num_features[0]}); is it of another arch?\n  ' + '\n  '.join(problems)
        )
