"""Official checkpoints to our names and back, and published checkpoints, by the tools' command lines."""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from golden import (
    GOLDEN,
    MINI,
    array,
    official_plain_shapes,
    official_plain_state_dict,
    official_shapes,
    official_state_dict,
)
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint

from mmvig import checkpoints
from mmvig.backbones import ViG, ViGH
from mmvig.engine.files import write_whole

TOOLS = Path(__file__).resolve().parents[1] / 'tools'
CONVERT, PUBLISH = 'model_converters/official_to_mmvig.py', 'publish_model.py'


@pytest.fixture
def tool(run_main, monkeypatch, tmp_path):
    """Run a tool within this process: (exit status, lines of output, lines of errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    monkeypatch.setattr(sys, 'path', list(sys.path))

    def run(script, *arguments):
        spec = importlib.util.spec_from_file_location(Path(script).stem, TOOLS / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return run_main(module, *arguments)

    return run


def converted(tool, content, *options):
    torch.save(content, 'in.pth')
    assert tool(CONVERT, 'in.pth', 'sub/out.pth', *options) == (0, ['sub/out.pth'], [])
    assert [path.name for path in Path('sub').iterdir()] == ['out.pth']
    return torch.load('sub/out.pth', weights_only=True)


def values(shapes):
    """A state dict in which every value is another one."""
    state, count = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        state[name] = torch.arange(count, count + size, dtype=torch.int32).view(shape)
        count += size
    return state


def shapes_of(arch, monkeypatch, plain=False, classifier=True):
    """Official names and shapes of an arch, at a small width."""
    monkeypatch.setitem(golden.PLAIN_WIDTHS if plain else golden.WIDTHS, arch, 64 if plain else 32)
    return official_plain_shapes(arch) if plain else official_shapes(arch, classifier)


@pytest.mark.parametrize(
    ('arch', 'options'),
    [
        ('tiny', {}),
        ('tiny', dict(classifier=False)),
        ('small', {}),
        ('base', dict(classifier=False)),
        ('tiny', dict(plain=True)),
    ],
)
def test_there_and_back(tool, monkeypatch, arch, options):
    official = values(shapes_of(arch, monkeypatch, **options))
    ours = converted(tool, {'model': official})['state_dict']
    assert not set(ours) & set(official) - {'pos_embed'}
    back = converted(tool, {'state_dict': ours, 'meta': {}}, '--to', 'official')['model']
    assert list(back) == list(official)
    for key, value in official.items():
        assert back[key].dtype == value.dtype and torch.equal(back[key], value), key
    twice = converted(tool, {'model': back})['state_dict']
    assert list(twice) == list(ours)


def test_values_and_shapes_are_bit_equal(tool):
    weights = official_state_dict('mini', classifier=True)
    official = {key: value.bfloat16() for key, value in weights.items()}
    ours = converted(tool, {f'module.{key}': value for key, value in official.items()})
    back = converted(tool, ours, '--to', 'official')['model']
    assert back.keys() == official.keys()
    for key, value in official.items():
        assert back[key].dtype == torch.bfloat16 and torch.equal(back[key], value), key


@pytest.mark.parametrize(
    ('backbone', 'width', 'weights', 'images', 'logits'),
    [
        (
            lambda: ViGH('tiny', out_indices=(3,)),
            768,
            lambda: official_state_dict('tiny', classifier=True),
            ('inputvig_h_t/cls', (2, 3, 64, 64)),
            'vig_h_t/cls/logits',
        ),
        (
            lambda: ViG('tiny'),
            192,
            lambda: official_plain_state_dict('tiny'),
            ('inputvig_t/2x3x224x224', (2, 3, 224, 224)),
            'vig_t/2x3x224x224/eval/logits',
        ),
    ],
    ids=['vig_h_t', 'vig_t'],
)
def test_classifiers_give_the_official_logits(tool, backbone, width, weights, images, logits):
    converted(tool, {'model': weights()})
    cfg = dict(
        type='ImageClassifier',
        backbone=backbone(),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=1000, in_channels=width),
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg).eval()
    load_checkpoint(model, 'sub/out.pth', strict=True)
    with torch.no_grad():
        found = model(array(*images))
    torch.testing.assert_close(found, torch.from_numpy(np.load(GOLDEN)[logits]), atol=5e-4, rtol=0)


def test_backbones_load_strictly(tool):
    official = official_state_dict('mini')
    ours = converted(tool, official)['state_dict']
    assert list(ours) == [checkpoints.our_name(name) for name in official]
    loaded, expected = ViGH(MINI), ViGH(MINI)
    loaded.load_state_dict(ours)
    expected.load_state_dict(official)
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def small_official(**changes):
    state = {key: torch.zeros(1) for key in official_shapes('tiny', classifier=True)}
    state.update(changes)
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ('content', 'options', 'message'),
    [
        ({'layers.0.blocks.0.attn.qkv.weight': torch.zeros(1)}, [], "'layers.0.blocks.0.attn.qkv.weight'"),
        (small_official(**{'neck.weight': torch.zeros(1), 'x': torch.zeros(1)}), [], '1 more such'),
        (small_official(**{'patch_embed.0.weight': None, 'patch_embed.0.bias': None}), [], 'patch_embed.0'),
        (small_official(), ['--to', 'official'], 'is no mmvig ViG or ViG-H checkpoint'),
        ({'stem.down1.conv.weight': torch.zeros(1)}, [], 'is no official ViG or ViG-H checkpoint'),
        (small_official(**{'outnorm0.weight': torch.zeros(1)}), [], "unknown 'outnorm0.weight'"),
        ([1, 2], [], 'must hold a state dict'),
        ({}, [], 'must hold a state dict, got an empty one'),
        ({1: torch.zeros(1)}, [], 'must hold tensors by name, got 1 for a name'),
        (small_official(**{'patch_embed.0.weight': 1.0}), [], "float for 'patch_embed.0.weight'"),
        (
            small_official(**{'patch_embed.0.bias': torch.tensor([torch.nan])}),
            [],
            'NaN or infinite values in',
        ),
        (small_official(), [], 'shapes of no ViG or ViG-H'),
        ({'model': object()}, [], 'cannot be read as a checkpoint of tensors'),
    ],
)
def test_files_of_another_kind_are_refused_with_one_line(tool, content, options, message):
    torch.save(content, 'in.pth')
    status, said, (line,) = tool(CONVERT, 'in.pth', 'out.pth', *options)
    assert (status, said) == (2, [])
    assert line.startswith('error: in.pth ') and message in line
    assert not Path('out.pth').exists()


@pytest.mark.parametrize('script', [CONVERT, PUBLISH])
def test_missing_and_broken_files(tool, script):
    status, _, (line,) = tool(script, 'no.pth', 'out.pth')
    assert status == 2 and 'no.pth' in line
    Path('broken.pth').write_bytes(b'not a checkpoint')
    status, _, (line,) = tool(script, 'broken.pth', 'out.pth')
    assert status == 2 and 'broken.pth cannot be read as a checkpoint of tensors' in line


def test_what_cannot_be_written_leaves_nothing(tool, monkeypatch):
    torch.save(official_state_dict('mini'), 'in.pth')
    Path('file').touch()
    status, _, (line,) = tool(CONVERT, 'in.pth', 'file/out.pth')
    assert status == 2 and 'file/out.pth cannot be written' in line

    def no_space(*_):
        raise OSError('No space left on device')

    Path('out.pth').write_text('old')
    monkeypatch.setattr('os.fsync', no_space)
    status, _, (line,) = tool(CONVERT, 'in.pth', 'out.pth')
    assert status == 2 and 'No space left' in line
    assert sorted(path.name for path in Path().iterdir()) == ['file', 'in.pth', 'out.pth']
    assert Path('out.pth').read_text() == 'old'


def training_checkpoint():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        'meta': {
            'epoch': 12,
            'cfg': 'model = dict()',
            'config': 'import os',
            'seed': np.int64(3),
            'dataset_meta': {'classes': ('a', 'b'), 'palette': np.array([[1]])},
        },
        'state_dict': model.state_dict(),
        'message_hub': {'log_scalars': {'loss': HistoryBuffer([1.0, 2.0], [1, 1])}},
        'optimizer': optimizer.state_dict(),
        'param_schedulers': [{'last_step': 12, '_global_step': 3}],
    }


def test_published_checkpoints_hold_weights_and_meta(tool):
    content = training_checkpoint()
    torch.save(content, 'epoch_12.pth')
    status, (path,), errors = tool(PUBLISH, 'epoch_12.pth', 'released/model.pth')
    assert (status, errors) == (0, [])
    assert [str(file) for file in Path('released').iterdir()] == [path]
    data = Path(path).read_bytes()
    assert path == f'released/model-{hashlib.sha256(data).hexdigest()[:8]}.pth'
    published = torch.load(path, weights_only=True)
    assert published.keys() == {'meta', 'state_dict'}
    # No program text that an inferencer would run, and nothing that PyTorch alone could not read.
    assert published['meta'] == {
        'epoch': 12,
        'seed': 3,
        'dataset_meta': {'classes': ('a', 'b'), 'palette': [[1]]},
    }
    for key, value in content['state_dict'].items():
        assert torch.equal(published['state_dict'][key], value)

    # The same weights have the same hash, whatever the file is called, and others another.
    again = tool(PUBLISH, path, 'other')[1][0]
    assert again == f'other-{path[-12:]}'
    content['state_dict']['bias'] += 1
    torch.save(content, 'epoch_12.pth')
    assert tool(PUBLISH, 'epoch_12.pth', 'other')[1][0] != again


def test_only_training_checkpoints_are_published(tool):
    torch.save({'weight': torch.zeros(1)}, 'in.pth')
    status, _, (line,) = tool(PUBLISH, 'in.pth', 'out.pth')
    assert status == 2 and 'must hold meta and state_dict' in line
    assert [path.name for path in Path().iterdir()] == ['in.pth']


def narrow_backbone(**changes):
    weights = ViGH(dict(embed_dims=32, depths=[1, 2], num_heads=[1, 2]), out_indices=(0, 1)).state_dict()
    return {f'backbone.{key}': value for key, value in {**weights, **changes}.items()}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'norm1.bias': 1.0}, "float for 'backbone.norm1.bias'"),
        ({'norm1.bias': torch.full((64,), torch.inf)}, "NaN or infinite values in 'backbone.norm1.bias'"),
        ({'norm1.bias': torch.zeros(63)}, 'norm1.bias is [63], expected [64]'),
        ({'stages.1.blocks.1.mlp.fc1.weight': torch.zeros(2, 64)}, 'fc1.weight is [2, 64], expected'),
        ({'stem.down1.conv.weight': torch.zeros(16)}, 'shapes of no ViG or ViG-H'),
        ({'patch_embed.0.bias': torch.zeros(16)}, 'one parameter under two names'),
    ],
)
def test_weights_that_are_not_whole_are_not_published(tool, changes, message):
    torch.save({'meta': {}, 'state_dict': narrow_backbone()}, 'in.pth')
    assert tool(PUBLISH, 'in.pth', 'out.pth')[0] == 0
    torch.save({'meta': {}, 'state_dict': narrow_backbone(**changes)}, 'in.pth')
    status, _, (line,) = tool(PUBLISH, 'in.pth', 'other.pth')
    assert status == 2 and message in line
    assert not list(Path().glob('other*'))


@pytest.mark.parametrize('script', [CONVERT, PUBLISH])
def test_outputs_that_would_replace_something(tool, script):
    """A folder for OUT once gave a file beside it, and the same file replaced the input."""
    torch.save(official_state_dict('mini') if script == CONVERT else training_checkpoint(), 'in.pth')
    before = Path('in.pth').read_bytes()
    Path('folder').mkdir()
    for out in ('folder', 'folder/', 'new/'):
        status, _, (line,) = tool(script, 'in.pth', out)
        assert status == 2 and f'{out} is a folder' in line
    if script == CONVERT:
        Path('link.pth').symlink_to('in.pth')
        for out in ('in.pth', './in.pth', 'link.pth'):
            status, _, (line,) = tool(script, 'in.pth', out)
            assert status == 2 and 'is the input itself' in line
        Path('link.pth').unlink()
    assert Path('in.pth').read_bytes() == before
    assert sorted(path.name for path in Path().rglob('*')) == ['folder', 'in.pth']


def test_a_link_planted_at_the_temporary_name_is_not_followed(tmp_path):
    (tmp_path / 'mine').write_text('precious')
    (tmp_path / f'.out.pth.{os.getpid()}').symlink_to(tmp_path / 'mine')
    write_whole(tmp_path / 'out.pth', b'data')
    assert (tmp_path / 'mine').read_text() == 'precious'
    assert (tmp_path / 'out.pth').read_bytes() == b'data' and not (tmp_path / 'out.pth').is_symlink()
