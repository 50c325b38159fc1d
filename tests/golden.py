"""Weights and inputs behind tests/data/golden_vig.npz, the outputs of the method's released code.

Every weight is a function of its official name and shape alone, every input of its tag.
"""

import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / 'data' / 'golden_vig.npz'
# The tiny models' names and depths with a ninth of their weights, for what holds at any width.
MINI = {'embed_dims': 32, 'depths': [2, 2, 5, 2], 'num_heads': [1, 2, 4, 8]}
PLAIN_MINI = {'embed_dims': 64, 'depth': 12, 'num_heads': 1, 'conv_act': True, 'out_act': True}
WIDTHS = {'mini': 32, 'tiny': 96, 'small': 96, 'base': 128}
PLAIN_WIDTHS = {'mini': 64, 'tiny': 192, 'small': 384, 'base': 768}
DEPTHS = {'mini': (2, 2, 5, 2), 'tiny': (2, 2, 5, 2), 'small': (2, 2, 17, 2), 'base': (2, 2, 17, 2)}


def _standard_normal(tag, shape):
    return np.random.default_rng(zlib.crc32(tag.encode())).standard_normal(shape)


def array(tag, shape):
    """Standard-normal tensor of a tag."""
    return torch.from_numpy(_standard_normal(tag, shape).astype('float32'))


def weight(name, shape):
    """Value of the official parameter ``name``."""
    x = _standard_normal(name, shape)
    if name == 'pos_embed':
        x = 0.02 * x
    elif len(shape) >= 2:
        x = x / np.sqrt(np.prod(shape[1:]))
    else:
        x = 0.1 * x if name.endswith('bias') else 1 + 0.1 * x
    return torch.from_numpy(x.astype('float32'))


def official_shapes(arch, classifier):
    """Names and shapes of an official state dict, written down from the released code's module tree."""
    width = WIDTHS[arch]
    shapes = {}

    def add(name, *shape, bias=True):
        shapes[f'{name}.weight'] = shape
        if bias:
            shapes[f'{name}.bias'] = shape[:1]

    add('patch_embed.0', width // 2, 3, 3, 3)
    add('patch_embed.2', width // 2)
    add('patch_embed.5', width, width // 2, 3, 3)
    add('patch_embed.7', width)
    for i, depth in enumerate(DEPTHS[arch]):
        c = width * 2**i
        hidden = 32 * -(-int(8 * c / 3) // 32)
        for j in range(depth):
            block = f'layers.{i}.blocks.{j}'
            add(f'{block}.norm', c)
            add(f'{block}.op.in_proj.0', c, 1, 3, 3, bias=False)
            add(f'{block}.op.qkv_proj', 2 * c, c, bias=False)
            add(f'{block}.op.gk_proj.0', 16, c, bias=False)
            add(f'{block}.op.gk_proj.1', c, 16)
            add(f'{block}.op.o_proj', c, c, bias=False)
            add(f'{block}.op.g_norm', 32, bias=False)
            add(f'{block}.op.l_norm', 32, bias=False)
            add(f'{block}.op.g_proj', c, c)
            add(f'{block}.norm2', c)
            add(f'{block}.mlp.fc1', 2 * hidden, c, bias=False)
            add(f'{block}.mlp.fc2', c, hidden, bias=False)
        if i < 3:
            add(f'layers.{i}.downsample.1', 2 * c, c, 3, 3)
            add(f'layers.{i}.downsample.3', 2 * c)
        if not classifier:
            add(f'outnorm{i}', c)
    if classifier:
        add('classifier.norm', 8 * width)
        add('classifier.head', 1000, 8 * width)
    return shapes


def official_plain_shapes(arch):
    """The same of plain ViG, which was released as a classification model only."""
    width = PLAIN_WIDTHS[arch]
    hidden = 256 * -(-int(8 * width / 3) // 256)
    shapes = {'pos_embed': (1, 196, width)}

    def add(name, *shape, bias=True):
        shapes[f'{name}.weight'] = shape
        if bias:
            shapes[f'{name}.bias'] = shape[:1]

    add('patch_embed.proj.0', width // 2, 3, 9, 9)
    add('patch_embed.proj.1', width // 2)
    add('patch_embed.proj.3', width, width // 2, 3, 3)
    add('patch_embed.proj.4', width)
    for j in range(12):
        add(f'blocks.{j}.attn_norm', width, bias=False)
        add(f'blocks.{j}.attn.in_proj.0', width, 1, 3, 3, bias=False)
        add(f'blocks.{j}.attn.qkv_proj', 2 * width, width, bias=False)
        add(f'blocks.{j}.attn.gk_proj.0', 16, width, bias=False)
        add(f'blocks.{j}.attn.gk_proj.1', width, 16)
        add(f'blocks.{j}.attn.o_proj', width, width, bias=False)
        add(f'blocks.{j}.attn.g_norm', 64, bias=False)
        add(f'blocks.{j}.attn.l_norm', 64, bias=False)
        add(f'blocks.{j}.attn.g_proj', width, width)
        add(f'blocks.{j}.mlp_norm', width, bias=False)
        add(f'blocks.{j}.mlp.gate_proj', 2 * hidden, width, bias=False)
        add(f'blocks.{j}.mlp.down_proj', width, hidden, bias=False)
    add('norm', width, bias=False)
    add('head', 1000, width)
    return shapes


def official_state_dict(arch, classifier=False):
    """An official checkpoint's state dict with the golden weights."""
    return {name: weight(name, shape) for name, shape in official_shapes(arch, classifier).items()}


def official_plain_state_dict(arch):
    """Plain ViG's, likewise."""
    return {name: weight(name, shape) for name, shape in official_plain_shapes(arch).items()}


def from_file(backbone, tmp_path, content, prefix=None, **options):
    """A backbone, from its class and arch, whose init_cfg loads ``content`` from a file."""
    path = tmp_path / 'weights.pth'
    torch.save(content, path)
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(path)}
    if prefix:
        init_cfg['prefix'] = prefix
    model = backbone(init_cfg=init_cfg, **options)
    model.init_weights()
    return model


def assert_equal(model, expected):
    """The model's own parameters and buffers have the expected bits."""
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
