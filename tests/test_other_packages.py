"""The blocks of docs/swap_in.md for packages that are not in our environments, where they are installed."""

import importlib
import re
from pathlib import Path

import mmvig.compat  # noqa: F401  before what imports mmcv.ops

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor

from mmvig.backbones import ViGH

PAGE = (Path(__file__).resolve().parents[1] / 'docs/swap_in.md').read_text()
SECTION = PAGE.partition('## Other packages\n')[2].partition('\n## ')[0]
BLOCKS = {
    re.search(r"__import__\('(\w+)'\)", block)[1]: block
    for block in re.findall(r'^```python\n(.*?)^```', SECTION, re.MULTILINE | re.DOTALL)
}
PACKAGES = ('mmrotate', 'mmpose', 'mmyolo', 'mmdet3d', 'mmaction')
SHALLOW = {'embed_dims': 96, 'depths': [1, 1, 1, 1], 'num_heads': [3, 6, 12, 24]}


def test_the_page_has_a_block_for_each():
    assert set(BLOCKS) == set(PACKAGES)


def tensors_in(outputs):
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [tensor for each in outputs for tensor in tensors_in(each)]
    return []


@pytest.mark.parametrize('package', PACKAGES)
def test_the_head_reads_all_maps_of_the_backbone(package, tmp_path):
    try:
        importlib.import_module(f'{package}.models')
    except (ImportError, AssertionError) as error:  # it asserts that it knows the version of mmcv
        pytest.skip(f'{package} cannot be imported: {error}')
    (tmp_path / 'pasted.py').write_text(BLOCKS[package])
    cfg = Config.fromfile(tmp_path / 'pasted.py')
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.arch = SHALLOW
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    model.train()
    assert isinstance(model.backbone, ViGH)

    images = torch.rand(2, 3, 64, 96)
    inputs = {
        'mmdet3d': {'imgs': images},
        'mmaction': images[:, None].repeat(1, 3, 1, 1, 1),  # three frames
    }.get(package, images)
    options = {'stage': 'head'} if package == 'mmaction' else {}
    outputs = tensors_in(model(inputs, data_samples=None, mode='tensor', **options))
    assert outputs and all(each.isfinite().all() for each in outputs)
    sum(each.square().sum() for each in outputs if each.requires_grad).backward()
    without = [key for key, value in model.backbone.named_parameters() if value.grad is None]
    assert without == [], 'unused parameters stop distributed training'
