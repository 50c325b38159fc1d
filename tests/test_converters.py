"""Official checkpoints to our names and back, and published checkpoints, by the tools' command lines."""

import hashlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import (
    GOLDEN,
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

TOOLS = Path(__file__).resolve().parents[1] / 'tools'
CONVERT, PUBLISH = 'model_converters/official_to_mmvig.py', 'publish_model.py'


@pytest.fixture
def tool(monkeypatch, capsys, tmp_path):
    """Run a tool within this process: (exit status, lines of output, lines of errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    monkeypatch.setattr(sys, 'path', list(sys.path))

    def run(script, *arguments):
        spec = importlib.util.spec_from_file_location(Path(script).stem, TOOLS / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, 'argv', [script, *arguments])
        status = 0
        try:
            module.main()
        except SystemExit as exit_:
            status = exit_.code
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

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
        state[name] = torch.arange(count, count + size, dtype=torch.float64).view(shape)
        count += size
    return state


SHAPES = {
    'vig_h_t': official_shapes('tiny', classifier=True),
    'vig_h_t backbone': official_shapes('tiny', classifier=False),
    'vig_h_s': official_shapes('small', classifier=True),
    'vig_h_b backbone': official_shapes('base', classifier=False),
    'vig_t': official_plain_shapes('tiny'),
}


@pytest.mark.parametrize('name', SHAPES)
def test_there_and_back(tool, name):
    small = {key: shape[:1] for key, shape in SHAPES[name].items()}  # names and order matter, not sizes
    official = values(small)
    ours = converted(tool, {'model': official})['state_dict']
    assert not set(ours) & set(official) - {'pos_embed'}
    back = converted(tool, {'state_dict': ours, 'meta': {}}, '--to', 'official')['model']
    assert list(back) == list(official)
    for key, value in official.items():
        assert back[key].dtype == value.dtype and torch.equal(back[key], value), key
    twice = converted(tool, {'model': back})['state_dict']
    assert list(twice) == list(ours)


def test_values_and_shapes_are_bit_equal(tool):
    weights = official_state_dict('tiny', classifier=True)
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
    official = official_state_dict('tiny')
    ours = converted(tool, official)['state_dict']
    assert list(ours) == [checkpoints.our_name(name) for name in official]
    loaded, expected = ViGH('tiny'), ViGH('tiny')
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
        ({}, [], 'in.pth'),
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
    torch.save(small_official(), 'in.pth')
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
        'meta': {'epoch': 12, 'cfg': 'model = dict()', 'dataset_meta': {'classes': ('a', 'b')}},
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
    assert published['meta'] == content['meta']
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
