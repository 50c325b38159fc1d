"""Calls of mmvig's public functions and classes with one bad argument each: what they say.

A call passes when a `raise` of mmvig ends it with a message that names the argument. The system's errors
with a path pass, and torch's with the keys of a state dict.
"""

import dis
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import mmvig
from mmvig import checkpoints
from mmvig.backbones import ViG, ViGH
from mmvig.datasets.shapes import ensure_shapes
from mmvig.ops import add_norm, bigla, bigla_packed, dwconv3x3, gated_mix, norm, swiglu
from mmvig.ops.conv_norm import conv_norm
from mmvig.ops.launch import INTERPRETED

PACKAGE = str(Path(mmvig.__file__).parent)
F = torch.rand
NO_TENSORS = [None, 'x', 3, 1.5, [[1.0]], (), {}, np.ones((2, 3)), object()]
NO_FLOATS = [None, 'x', [1.0], math.nan, math.inf, -math.inf, 1j, torch.ones(2), np.ones(2)]
NO_BOOLS = [None, 'maybe', 1, 0.5, []]
NO_BACKENDS = [None, 'cuda', '', 1, 'TRITON', ['auto'], *([] if INTERPRETED else ['triton'])]
NO_DTYPES = ['float32', torch.int32, torch.bool, 1, torch.complex64, np.float32]


class Call(NamedTuple):
    """A call with one bad argument."""

    subject: str
    argument: str
    value: object
    function: Callable
    words: tuple[str, ...]  # one of which the message must have


def tensors(x: torch.Tensor) -> list:
    """What may not stand for a tensor: other types and dtypes, and other ranks."""
    dtypes = [x.int(), x.bool(), x.to(torch.complex64), x.to(torch.int8)]
    ranks = [x[None], x.new_ones(()), x.new_ones(0), *([x.flatten()] if x.ndim > 1 else [])]
    return [*NO_TENSORS, *dtypes, *ranks]


def of(function: Callable, good: dict, bad: dict[str, list], **also: tuple[str, ...]) -> Iterator[Call]:
    """The calls of a function with good arguments but one; ``also`` are other names of an argument."""
    for argument, values in bad.items():
        for value in values:
            arguments, words = {**good, argument: value}, (argument, *also.get(argument, ()))
            yield Call(function.__name__, argument, value, lambda a=arguments: function(**a), words)


def operators() -> Iterator[Call]:
    """Calls of mmvig.ops."""
    x, w, h = F(2, 4, 5, 6), F(6), F(2, 7, 3, 4)
    scalars = {'eps': [*NO_FLOATS, -1e-5], 'backend': NO_BACKENDS}
    q = dict.fromkeys(('q', 'k', 'v', 'g_fwd', 'g_bwd'), h)
    bad = {name: [*tensors(h), h.double(), h[:, :0], h[:, :3], h[..., :0], h.to('meta')] for name in q}
    bad['v'] = [*bad['v'][:-1], h[..., :0]]
    bad |= {
        'scale': [*NO_FLOATS[1:]],
        'gate_normalizer': [*NO_FLOATS, 0, -1, True],
        'backend': [*NO_BACKENDS, 'torch'],
    }
    yield from of(bigla, q, bad)
    packed = {'qkv': F(2, 7, 36), 'gates': F(2, 7, 24), 'num_heads': 3}
    bad = {
        'qkv': [*tensors(packed['qkv']), F(2, 7, 35), F(2, 0, 36), F(2, 6, 36), F(3, 7, 36), F(2, 7, 24)],
        'gates': [*tensors(packed['gates']), F(2, 7, 25), F(2, 7, 0), F(2, 8, 24), F(2, 7, 24).half()],
        'num_heads': [None, 'x', 0, -1, 2.5, 3.0, True, 5, [3], math.nan, torch.ones(2)],
        'scale': [*NO_FLOATS[1:]],
        'gate_normalizer': [*NO_FLOATS, 0, -1, True],
        'backend': [*NO_BACKENDS, 'torch'],
    }
    parts = {'qkv': ('q must', 'of q,'), 'gates': ('g_fwd', 'q must'), 'num_heads': ('H =',)}
    yield from of(bigla_packed, packed, bad, **parts)
    flags = {'rms': NO_BOOLS, 'channels_first': NO_BOOLS, 'dtype': NO_DTYPES}
    vectors = [*tensors(w), F(5), F(2, 6), w.to('meta')]
    bad = {'x': [*tensors(x), F(2, 4, 5, 7), x.to('meta')], 'weight': vectors, **scalars, **flags}
    optional = {'bias': vectors[1:], 'shift': vectors[1:], 'act': [None, 'relu', 3, [], 'GELU', torch.relu]}
    yield from of(norm, {'x': x, 'weight': w}, {**bad, **optional})
    yield from of(norm, {'x': x, 'weight': w, 'rms': True}, {'bias': [w]})
    branches = {'branch': [*tensors(x), F(2, 4, 5, 7), F(2, 4, 5, 1)], 'bias': vectors[1:]}
    branches['scale'] = [*tensors(F(2))[1:], F(3), F(1), F(2).requires_grad_()]
    yield from of(add_norm, {'x': x, 'branch': x, 'scale': None, 'weight': w}, {**bad, **branches})
    kernel = F(6, 1, 3, 3)
    bad = {
        'x': [*tensors(x), x.double(), F(2, 4, 5, 7), x.to('meta')],
        'weight': [*tensors(kernel), F(6, 1, 5, 5), F(6, 6, 3, 3), F(5, 1, 3, 3), kernel.half()],
        'backend': NO_BACKENDS,
    }
    yield from of(dwconv3x3, {'x': x, 'weight': kernel}, bad)
    rows, heads = F(2, 7, 12), F(4)
    good = dict.fromkeys(('long', 'gate', 'short'), rows)
    good |= {'weight_long': heads, 'weight_short': heads, 'weight_out': F(5, 12)}
    bad = {
        name: [*tensors(rows), rows.double(), F(2, 7, 11), F(2, 7, 0)] for name in ('long', 'gate', 'short')
    }
    widths = [*tensors(heads), F(5), F(12), F(0), F(1, 4)]
    bad |= {'weight_long': widths, 'weight_short': widths}
    bad |= {'weight_out': [*tensors(good['weight_out']), F(5, 11), F(12)], 'act': NO_BOOLS, **scalars}
    yield from of(gated_mix, good, bad)
    bad = {
        'x': [*tensors(rows)[:-4], rows.double(), F(2, 7, 11), F(2, 7, 0)],
        'weight': [*tensors(F(5, 6)), F(5, 7), F(6), F(5, 6).half()],
        'backend': NO_BACKENDS,
    }
    yield from of(swiglu, {'x': rows, 'weight': F(5, 6)}, bad)
    image = F(2, 8, 9, 3)
    good = {'x': image, 'conv_weight': F(6, 3, 3, 3), 'weight': w, 'bias': w, 'conv_bias': w, 'stride': 2}
    bad = {
        'x': [*tensors(image), image.double(), F(2, 8, 9, 4), F(2, 0, 9, 3)],
        'conv_weight': [*tensors(good['conv_weight']), F(6, 4, 3, 3), F(5, 3, 3, 3), F(6, 3, 3, 5)],
        'stride': [None, 'x', 0, -1, 1.5, True, (2, 2), [], math.nan],
        'act': [None, 'relu', 3, []],
        'dtype': NO_DTYPES,
        **dict.fromkeys(('weight', 'bias', 'conv_bias'), vectors[:-1]),
        **scalars,
    }
    yield from of(conv_norm, good, bad)


def backbones() -> Iterator[Call]:
    """Constructors and forward passes of the backbones."""
    arch = {'embed_dims': 32, 'depths': [1, 1], 'num_heads': [1, 2]}
    plain = {'embed_dims': 32, 'depth': 2, 'num_heads': 2}
    ints = [None, 'x', '3', 0, -1, 1.5, True, [3], math.nan, math.inf, 3.0, torch.ones(2)]
    common = {
        'arch': [None, 'huge', '', 3, [], {}, True, {'foo': 1}],
        'in_channels': ints,
        'out_indices': ['x', None, 5, -9, [], [0, 0], [9], ['0'], 1.0, True, [True], [None], {0}, {'a': 1}],
        'drop_path_rate': ['x', math.nan, -0.1, 1, 1.5, math.inf, [0.1], 1j, torch.ones(1)],
        'frozen_stages': ['x', None, True, -2, 9, 0.5, [0], math.nan],
        'with_cp': NO_BOOLS,
        'cuda_graphs': ['x', None, -1, 1.5, True, [], math.nan],
        'backend': [None, 'x', 1, [], 'TRITON'],
        'init_cfg': ['x', 3, {}, {'foo': 1}, [3], {'type': 'Pretrained'}],
    }
    heads = [
        None,
        'x',
        ['1', '2'],
        [1.0, 2],
        [0, 2],
        [-1, 2],
        [True, 2],
        [3, 2],
        [1],
        [1, 2, 4],
        [],
        [None, 2],
        2,
    ]
    archs = {
        'embed_dims': [*ints, 2, 3, 33],
        'depths': [*heads[:7], *heads[8:]],
        'num_heads': heads,
        'foo': [1],
    }
    yield from of(ViGH, {'arch': arch, 'out_indices': (1,)}, common)
    for key, values in archs.items():
        for value in values:
            changed = {**arch, key: value}
            yield Call(
                f'ViGH arch.{key}',
                key,
                value,
                lambda a=changed: ViGH(a, out_indices=0),
                (key, 'arch', 'width'),
            )
    for key in arch:
        changed = {name: value for name, value in arch.items() if name != key}
        yield Call('ViGH arch without', key, None, lambda a=changed: ViGH(a), (key,))
    sizes = {'img_size': [None, 'x', 0, -1, 1.5, True, [224], (224, 224), math.nan]}
    common['out_indices'].remove(None)  # its default
    yield from of(ViG, {'arch': plain, 'out_indices': (1,)}, {**common, **sizes})
    archs = {'embed_dims': [*ints, 2, 33], 'depth': ints, 'num_heads': [*ints, 3, 64], 'foo': [1]}
    for key, values in archs.items():
        for value in values:
            changed = {**plain, key: value}
            yield Call(
                f'ViG arch.{key}', key, value, lambda a=changed: ViG(a), (key, 'arch', 'width', 'num_heads')
            )
    for kind, small in ((ViGH, arch), (ViG, plain)):
        model = kind(small, out_indices=(1,)).eval()
        image = F(1, 3, 32, 32)
        images = [
            *NO_TENSORS,
            image.int(),
            image.bool(),
            (image * 255).to(torch.uint8),
            image.to(torch.complex64),
        ]
        images += [image[0], image[:, :2], F(1, 32, 32, 3), F(1, 3, 0, 32), F(1, 3, 32, 0), image[None]]
        for value in images:
            name = f'{kind.__name__}.forward'
            yield Call(name, 'x', value, lambda v=value, m=model: m(v), ('image', 'x must'))
        states = [None, 'x', 3, [], {}, {'a': 1}, {3: F(2)}, {'a': F(2)}, {'state_dict': None}, F(2)]
        for value in states:
            yield Call(
                f'{kind.__name__}.load_state_dict',
                'state_dict',
                value,
                lambda v=value, m=model: m.load_state_dict(v),
                ('state dict', 'state_dict', 'checkpoint'),
            )


def files() -> Iterator[Call]:
    """Checkpoint files and the shapes set."""
    folder = Path(tempfile.mkdtemp())
    contents = [None, 3, 'x', [], {}, F(2), {'a': 1}, {3: F(2)}, {'state_dict': {}}, {'state_dict': None}]
    contents += [{'a': F(2) * math.nan}, {'a': 1.5}, {'state_dict': {'a': [1]}}, {'model': 3}, object]
    for number, content in enumerate(contents):
        path = str(folder / f'{number}.pth')
        torch.save(content, path)
        yield Call('checkpoints.read', 'content', content, lambda p=path: checkpoints.read(p), (path,))
    for number, data in enumerate([b'', b'<html>', b'PK\x03\x04', b'\x80\x02', bytes(100), b'{"a": 1}']):
        path = folder / f'raw{number}.pth'
        path.write_bytes(data)
        yield Call('checkpoints.read', 'file', data, lambda p=str(path): checkpoints.read(p), (str(path),))
    whole = folder / 'whole.pth'
    torch.save({'backbone.a': F(50)}, whole)
    cut = folder / 'cut.pth'
    cut.write_bytes(whole.read_bytes()[:-200])
    paths = [str(cut), str(folder), str(folder / 'no.pth'), '', 'a\0b', 'x' * 300, None, 3, b'x', [], 1.5]
    paths += ['http://127.0.0.1:9/a.pth', 'https://', 'foo://a', 's3://bucket/a.pth', 'file:///no.pth']
    for path in paths:
        words = (str(path), 'checkpoint')
        yield Call('checkpoints.read', 'checkpoint', path, lambda p=path: checkpoints.read(p), words)
    for prefix in ['neck', 3, [], 'backbone.b', b'backbone']:
        yield Call(
            'checkpoints.read',
            'prefix',
            prefix,
            lambda p=prefix: checkpoints.read(str(whole), p),
            ('prefix',),
        )
    blocked = folder / 'file'
    blocked.touch()
    bad = {
        'num_train': ['x', -1, 1.5, True, math.nan, []],
        'num_val': [-1, 1.5, 'x'],
        'seed': [-1, 'x', 1.5],
    }
    bad['root'] = [blocked, blocked / 'x', None, 3, 'a\0b']
    yield from of(
        ensure_shapes, {'root': folder / 'set', 'num_train': 1, 'num_val': 1}, bad, root=(str(blocked),)
    )


def outcome(call: Call) -> tuple[bool, str]:
    """Whether a call is refused as it should be, and its message."""
    try:
        call.function()
    except Exception as error:
        place = error.__traceback__
        while place.tb_next is not None:
            place = place.tb_next
        code, position = place.tb_frame.f_code, place.tb_lasti
        message = f'{type(error).__name__}: {" ".join(str(error).split())}'
        raised = code.co_code[position] == dis.opmap['RAISE_VARARGS']
        ours = raised and code.co_filename.startswith(PACKAGE)
        ours |= isinstance(error, OSError) and error.filename is not None  # the system's, with the path
        ours |= 'in loading state_dict for ViG' in message  # torch's, with the keys
        if not ours:
            return False, f'not ours: {message}'
        named = any(word.lower() in message.lower() for word in call.words)
        return named, message if named else f'names nothing: {message}'
    return False, 'accepted'


def calls() -> Iterator[Call]:
    """All of them."""
    yield from operators()
    yield from backbones()
    yield from files()
