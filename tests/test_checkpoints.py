"""Official and own checkpoints: names, wrappers, strictness, reading without running code."""

import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
from golden import MINI, assert_equal, from_file, official_shapes, official_state_dict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint

from mmvig import checkpoints
from mmvig.backbones import ViGH

mini = partial(ViGH, MINI)
DEEPER = {**MINI, 'depths': [2, 2, 6, 2]}
WIDER = {**MINI, 'embed_dims': 64}


@pytest.fixture(scope='module')
def official():
    return official_state_dict('mini')


@pytest.fixture(scope='module')
def loaded(official):
    model = mini()
    model.load_state_dict(official)
    return model.state_dict()


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
@pytest.mark.parametrize('classifier', [False, True])
def test_every_official_name_is_known(arch, classifier):
    with torch.device('meta'):
        model = ViGH(arch)
    ours = {checkpoints.our_name(name) for name in official_shapes(arch, classifier)}
    own = set(model.state_dict())
    if classifier:
        assert {name for name in ours if not name.startswith('classifier.')} == {
            name for name in own if not name.startswith('norm')
        }
    else:
        assert ours == own


@pytest.mark.parametrize(
    'wrap',
    [
        lambda weights: weights,
        lambda weights: {'model': weights},
        lambda weights: {'state_dict': weights, 'meta': {'epoch': 3}},
        lambda weights: {'model_ema': {f'module.{k}': v for k, v in weights.items()}},
        lambda weights: {f'module.{k}': v for k, v in weights.items()},
    ],
)
@pytest.mark.parametrize('names', ['official', 'own'])
def test_wrapped_files_and_dicts(tmp_path, official, loaded, wrap, names):
    content = wrap(official if names == 'official' else dict(loaded))
    assert_equal(from_file(mini, tmp_path, content), loaded)
    model = mini()
    model.load_state_dict(content)
    assert_equal(model, loaded)


def test_official_classifier_keeps_initial_output_norms(tmp_path, loaded):
    model = from_file(mini, tmp_path, {'model': official_state_dict('mini', classifier=True)})
    for name, value in model.state_dict().items():
        if name.startswith('norm'):
            assert (value == float(name.endswith('weight'))).all()
        else:
            assert torch.equal(value, loaded[name])


@pytest.mark.parametrize('out_indices', [(1, 3), (2,), (0, 1)])
def test_other_outputs_take_what_they_need(tmp_path, official, loaded, out_indices):
    assert_equal(from_file(mini, tmp_path, official, out_indices=out_indices), loaded)


def test_more_outputs_than_the_file_has(tmp_path, loaded):
    narrow = mini(out_indices=(3,))
    narrow.load_state_dict(loaded)
    model = from_file(mini, tmp_path, narrow.state_dict())
    assert torch.equal(model.norm3.weight, loaded['norm3.weight'])
    assert (model.norm0.weight == 1).all()


class Detector(BaseModel):
    """What a detector is to a checkpoint: a backbone and something else."""

    def __init__(self, arch=MINI):
        super().__init__()
        self.backbone = ViGH(arch)
        self.head = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.head(x)


def test_our_training_checkpoint(tmp_path, loaded):
    """A detector's file as mmengine saves it, with a message hub of numpy buffers."""
    detector = Detector()
    detector.backbone.load_state_dict(loaded)
    content = {
        'meta': {'epoch': 1, 'seed': np.int64(3)},
        'state_dict': detector.state_dict(),
        'message_hub': {'loss': HistoryBuffer([1.0, 2.0], [1, 1])},
    }
    assert_equal(from_file(mini, tmp_path, content), loaded)
    assert_equal(from_file(mini, tmp_path, content, prefix='backbone.'), loaded)


@pytest.mark.parametrize('package', [b'numpy.core', b'numpy._core'])
def test_training_checkpoint_of_either_numpy(tmp_path, package):
    """NumPy 1 and 2 give the functions that rebuild an array different names."""
    path = tmp_path / 'iter_1.pth'
    hub = {'loss': HistoryBuffer([1.0, 2.0], [1, 1]), 'iter': np.int64(3)}
    content = {'state_dict': {'weight': torch.ones(2)}, 'message_hub': hub}
    torch.save(content, path, _use_new_zipfile_serialization=False)  # names as plain text
    file, names = re.subn(rb'cnumpy\._?core\.', b'c' + package + b'.', path.read_bytes())
    assert names == 2
    path.write_bytes(file)
    assert checkpoints.read(str(path)).keys() == {'weight'}


def test_official_names_inside_a_detector(official, loaded, tmp_path):
    content = {f'backbone.{name}': value for name, value in official.items()}
    content.update({'head.weight': torch.zeros(2, 2), 'head.bias': torch.zeros(2)})
    detector = Detector()
    detector.load_state_dict(content)
    assert_equal(detector.backbone, loaded)
    torch.save({'state_dict': content}, tmp_path / 'detector.pth')
    detector = Detector()
    load_checkpoint(detector, str(tmp_path / 'detector.pth'), strict=True)
    assert_equal(detector.backbone, loaded)


def test_mismatches_are_listed(tmp_path, official):
    broken = dict(official)
    del broken['layers.2.blocks.3.op.g_norm.weight']
    del broken['outnorm1.bias']
    broken['layers.0.blocks.0.extra.weight'] = torch.zeros(3)
    broken['patch_embed.0.weight'] = torch.zeros(16, 4, 3, 3)
    expected = [
        'missing: stages.2.blocks.3.mixer.norm_long.weight',
        'missing: norm1.bias',
        'unexpected: layers.0.blocks.0.extra.weight',
        'shape of stem.down1.conv.weight: [16, 4, 3, 3], expected [16, 3, 3, 3]',
    ]
    for load in (mini().load_state_dict, lambda content: from_file(mini, tmp_path, content)):
        with pytest.raises(RuntimeError) as error:
            load(broken)
        for line in expected:
            assert line in str(error.value)


def test_another_arch_is_refused_on_every_way(tmp_path, official):
    with pytest.raises(RuntimeError, match='does not fit this ViGH'):
        ViGH(DEEPER).load_state_dict(official)
    with pytest.raises(RuntimeError, match='does not fit this ViGH'):
        ViGH(WIDER).load_state_dict(official)
    torch.save({'state_dict': Detector(DEEPER).state_dict()}, tmp_path / 'detector.pth')
    with pytest.raises(RuntimeError, match=r'backbone\.stages\.2\.blocks\.5'):
        load_checkpoint(Detector(), str(tmp_path / 'detector.pth'), strict=True)


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_not_strict_is_not_strict(official, prefix):
    """The backbone by itself and in a detector: what does not fit is reported, the rest loaded."""
    partial = {name: value for name, value in official.items() if name.startswith('patch_embed')}
    partial['layers.0.blocks.0.extra.weight'] = torch.zeros(1)
    model = mini() if not prefix else Detector()
    partial = {prefix + name: value for name, value in partial.items()}
    result = model.load_state_dict(partial, strict=False)
    assert f'{prefix}stages.0.blocks.0.norm1.weight' in result.missing_keys
    assert result.unexpected_keys == [f'{prefix}layers.0.blocks.0.extra.weight']
    stem = getattr(model, 'backbone', model).stem
    assert torch.equal(stem.down1.conv.weight, official['patch_embed.0.weight'])
    with pytest.raises(RuntimeError, match=r'stages\.0\.blocks\.0\.norm1\.weight'):
        model.load_state_dict(partial)
    with pytest.raises(RuntimeError, match='size mismatch'):
        model.load_state_dict({f'{prefix}patch_embed.0.bias': torch.zeros(5)}, strict=False)


def test_loading_leaves_the_callers_dict_alone(official):
    names = list(official)
    mini().load_state_dict(official)
    assert list(official) == names


def test_files_that_are_no_checkpoints(tmp_path, official):
    path = str(tmp_path / 'weights.pth')
    with pytest.raises(FileNotFoundError, match=r'weights\.pth does not exist'):
        checkpoints.read(path)
    torch.save([1, 2], path)
    with pytest.raises(RuntimeError, match='must hold a state dict, got list'):
        checkpoints.read(path)
    torch.save({'state_dict': official}, path)
    with pytest.raises(RuntimeError, match=r"no key with the prefix 'neck\."):
        checkpoints.read(path, prefix='neck.')


class Malicious:
    def __reduce__(self):
        return print, ('code from a checkpoint ran',)


def test_files_do_not_run_code(tmp_path, capsys):
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': Malicious()}, path)
    with pytest.raises(RuntimeError, match='cannot be read as a checkpoint of tensors'):
        checkpoints.read(str(path))
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(RuntimeError, match='cannot be read as a checkpoint of tensors'):
        checkpoints.read(str(path))
    assert 'code from a checkpoint ran' not in capsys.readouterr().out


class Curious:
    def __reduce__(self):
        return getattr, (torch.Tensor, 'backward')


def test_files_reach_no_attributes(tmp_path):
    torch.save({'state_dict': Curious()}, tmp_path / 'weights.pth')
    with pytest.raises(RuntimeError, match='cannot be read as a checkpoint of tensors'):
        checkpoints.read(str(tmp_path / 'weights.pth'))
