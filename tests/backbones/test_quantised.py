"""PyTorch's dynamic int8 quantisation of linear layers, as docs/usage.md has it."""

import copy
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn
from torch.ao.nn.quantized import dynamic

from mmvig.backbones import ViG, ViGH
from mmvig.engine import cli
from mmvig.engine.preflight import SetupError

pytestmark = pytest.mark.filterwarnings(
    'ignore:torch.ao.quantization is deprecated', 'ignore:torch.quantize'
)
ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / 'docs/usage.md').read_text().partition('## int8 on a CPU')[2]
TIMING, ACCURACY = re.findall('```python\n(.*?)```', SECTION, re.DOTALL)[:2]
ARCH = dict(embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
CLASSIFIER = f"""
_base_ = [{str(ROOT / 'configs/classification/vigh_t_tin.py')!r}]
arch = dict(_delete_=True, **{ARCH})
model = dict(backbone=dict(arch=arch), head=dict(in_channels=256))
test_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
"""


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def with_rounded_weights(model):
    """The float model with the weights that int8 has: what is left is the rounding of activations."""
    rounded = copy.deepcopy(model)
    layers = dict(quantised(model).named_modules())
    for name, layer in rounded.named_modules():
        if type(layer) is nn.Linear:
            layer.weight.data = layers[name].weight().dequantize()
    return rounded


def small(kind=ViGH, **options):
    torch.manual_seed(0)
    return kind(**{'arch': ARCH, **options}).eval()


@pytest.mark.parametrize('kind', [ViGH, ViG])
def test_every_linear_layer_is_called_in_int8(kind):
    model = small() if kind is ViGH else small(ViG, arch=dict(embed_dims=64, depth=2, num_heads=2))
    int8 = quantised(model)
    layers = {name for name, layer in int8.named_modules() if isinstance(layer, dynamic.Linear)}
    assert layers == {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found, expected, exact = int8(image), with_rounded_weights(model)(image), model(image)
    for y, rounded, full in zip(found, expected, exact, strict=True):
        assert (y - rounded).norm() < 0.03 * full.norm()
        assert not torch.equal(y, full)
    called = set()
    for name in layers:
        int8.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        int8(image)
    assert called == layers


def test_saving_and_loading(tmp_path):
    int8, other = quantised(small()), quantised(small())
    for parameter in int8.parameters():
        nn.init.normal_(parameter)
    for layer in int8.modules():
        if isinstance(layer, dynamic.Linear):
            layer.set_weight_bias(layer.weight(), torch.ones(layer.out_features))
    torch.save(int8.state_dict(), tmp_path / 'int8.pth')
    other.load_state_dict(torch.load(tmp_path / 'int8.pth', weights_only=True))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(map(torch.equal, int8(image), other(image)))
    with pytest.raises(SetupError, match=r'int8.pth .*must hold tensors, got'):
        cli.load_strictly(small(), str(tmp_path / 'int8.pth'))
    with pytest.raises(RuntimeError, match='does not fit this ViGH'):
        other.load_state_dict(small().state_dict())


def test_other_dtypes_are_refused():
    int8, image = quantised(small()), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16), pytest.raises(TypeError, match='take float32'):
            int8(image)
        with pytest.raises(TypeError, match=r'quantised layers take float32, got torch\.bfloat16'):
            int8.bfloat16()(image.bfloat16())


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = TIMING.replace('224', '64').replace("'tiny'", str(ARCH)).replace('=20', '=0.01')
    exec(code, {})
    assert [line.endswith(' ms') for line in capsys.readouterr().out.splitlines()[-2:]] == [True, True]

    rng = np.random.default_rng(0)
    for i in range(4):
        folder = Path(f'data/tin40/val/n{i % 2}')
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f'{i}.jpg'), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    Path('cfg.py').write_text(CLASSIFIER)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = cli.build_model(Config.fromfile('cfg.py'))
    torch.save(model.state_dict(), 'it.pth')
    names = {}
    code = ACCURACY.replace('configs/classification/vigh_t_tin.py', 'cfg.py')
    exec(code.replace('work_dirs/vigh_t_tin/epoch_16.pth', 'it.pth'), names)
    assert isinstance(names['runner'].model.head.fc, dynamic.Linear)
    assert 'accuracy/top1' in capsys.readouterr().out
