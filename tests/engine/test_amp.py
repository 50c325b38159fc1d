"""Which precision --amp takes, what its steps do, and resuming a run of the other one."""

import logging

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmvig.engine import amp, loading
from mmvig.engine.amp import use_amp
from mmvig.engine.preflight import SetupError

ADAMW = {'type': 'AdamW', 'lr': 0.1, 'weight_decay': 0.05, 'fused': True}
BF16 = {'type': 'AmpOptimWrapper', 'dtype': 'bfloat16', 'loss_scale': {'enabled': False}}
FP16 = {'type': 'AmpOptimWrapper', 'dtype': 'float16', 'loss_scale': 'dynamic'}
CPU = {'type': 'mmvig.engine.amp.CpuAmpOptimWrapper'}


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with a GPU, or without one."""

    def pretend(device='cuda', bf16=True):
        monkeypatch.setattr(amp, 'get_device', lambda: device)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: bf16)

    return pretend


def chosen(wanted='auto', model=None, scope='mmseg', **wrapper):
    cfg = {'optim_wrapper': {'type': 'OptimWrapper', **wrapper}, 'model': model, 'default_scope': scope}
    cfg = Config(cfg)
    use_amp(cfg, wanted)
    return cfg.optim_wrapper.to_dict()


def detector(rpn='mmvig.RPNHead', extractor='mmvig.SingleRoIExtractor', **layer):
    extractor = {'type': extractor, 'roi_layer': {'type': 'RoIAlign', 'use_torchvision': True, **layer}}
    model = {'rpn_head': {'type': rpn}, 'roi_head': {'type': 'Head', 'mask_roi_extractor': extractor}}
    return {'scope': 'mmdet', 'model': model}


def cascade(extractor, roi_layer='RoIAlign'):
    """Lists of heads and of extractors, as mmdet's cascades have them."""
    layer = {'roi_layer': {'type': roi_layer, 'use_torchvision': True}} if roi_layer else {}
    stages = [{'type': 'mmvig.SingleRoIExtractor', 'roi_layer': {'use_torchvision': True}}]
    heads = [{'bbox_roi_extractor': [*stages, {'type': extractor, **layer}], 'mask_roi_extractor': None}]
    return {'scope': 'mmdet', 'model': {'rpn_head': [{'type': 'mmvig.RPNHead'}], 'roi_head': heads}}


@pytest.mark.parametrize(
    ('here', 'arguments', 'expected', 'why'),
    [
        ({}, {}, BF16, 'bfloat16, this GPU computes in it'),
        ({'bf16': False}, {}, FP16, 'float16, this GPU does not'),
        ({}, detector(), BF16, 'bfloat16, this GPU computes in it'),
        ({}, detector('RPNHead'), FP16, 'float16, RPNHead would round boxes to 8 bits in bfloat16'),
        ({}, detector(extractor='SingleRoIExtractor'), FP16, 'float16, SingleRoIExtractor would round'),
        ({}, detector(use_torchvision=False), FP16, 'float16, RoIAlign without use_torchvision=True'),
        ({}, {'scope': 'mmdet', 'model': {'bbox_head': {'type': 'FCOSHead'}}}, FP16, 'float16, FCOSHead'),
        ({}, {'scope': 'mmdet', 'model': {'type': 'SoftTeacher'}}, FP16, 'float16, SoftTeacher would'),
        ({}, {'scope': 'mmdet', 'model': {'bbox_head': [{'type': 'Co'}]}}, FP16, 'float16, Co would'),
        ({}, cascade('mmvig.SingleRoIExtractor'), BF16, 'bfloat16, this GPU computes in it'),
        ({}, cascade('GenericRoIExtractor'), FP16, 'float16, GenericRoIExtractor would round'),
        ({}, cascade('mmvig.SingleRoIExtractor', roi_layer=None), FP16, 'float16, RoIAlign without'),
        ({}, {**detector('RPNHead'), 'wanted': 'bf16'}, BF16, 'bfloat16, as asked for'),
        ({}, {'wanted': 'fp16'}, FP16, 'float16, as asked for'),
        ({}, FP16, FP16, 'float16, as the config has it'),
        ({}, {'type': 'AmpOptimWrapper', 'loss_scale': 512.0}, None, 'float16, as the config has it'),
        ({}, {**FP16, 'wanted': 'bf16'}, BF16, 'bfloat16, as asked for'),
        ({}, {**BF16, 'wanted': 'fp16'}, FP16, 'float16, as asked for'),
        ({'device': 'cpu'}, {}, CPU, 'bfloat16, there is no GPU'),
        ({'device': 'cpu'}, {'wanted': 'bf16'}, CPU, 'bfloat16, as asked for'),
        ({'device': 'cpu'}, FP16, CPU, 'bfloat16, there is no GPU'),
    ],
)
def test_the_choice_and_its_line(machine, caplog, here, arguments, expected, why):
    machine(**here)
    with caplog.at_level(logging.INFO, 'mmvig'):
        assert chosen(**arguments) == (expected or arguments)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f'--amp: {why}')


def test_what_cannot_be(machine):
    machine('cpu')
    with pytest.raises(SetupError, match='--amp fp16 needs a GPU'):
        chosen('fp16')
    with pytest.raises(SetupError, match='ApexOptimWrapper'):
        chosen(type='ApexOptimWrapper')


def wrapped(model, wrapper, **more):
    cfg = {
        **wrapper,
        'optimizer': ADAMW,
        'paramwise_cfg': {'flat_decay_mult': 0.0},
        'constructor': 'mmvig.OptimWrapperConstructor',
        **more,
    }
    return build_optim_wrapper(model, cfg)


def resumed(model, wrapper, state):
    """An optimiser wrapper that goes on from another's state, as the Runner reads it."""
    content = {'state_dict': model.state_dict(), 'optimizer': state, 'meta': {'epoch': 0, 'iter': 1}}
    content = loading.to_resume_from({**content, 'message_hub': {}}, 'it.pth')
    optim_wrapper = wrapped(model, wrapper)
    optim_wrapper.load_state_dict(content['optimizer'])
    return optim_wrapper


@pytest.mark.parametrize('scaler', [{}, {'scale': 1024.0}])
def test_a_cpu_goes_on_from_either(scaler):
    model = nn.Linear(2, 2)
    first = wrapped(model, CPU)
    first.update_params(model(torch.ones(1, 2)).sum())
    optim_wrapper = resumed(model, CPU, {**first.state_dict(), 'loss_scaler': scaler})
    assert len(optim_wrapper.optimizer.state) == 2


@pytest.mark.gpu
@pytest.mark.parametrize('first', [BF16, FP16], ids=['from bf16', 'from fp16'])
@pytest.mark.parametrize('then', [BF16, FP16], ids=['to bf16', 'to fp16'])
def test_either_goes_on_from_either(first, then):
    model = nn.Linear(2, 2).cuda()
    before = wrapped(model, first)
    before.update_params(model(torch.ones(1, 2, device='cuda')).sum())
    after = resumed(model, then, before.state_dict())
    after.update_params(model(torch.ones(1, 2, device='cuda')).sum())
    assert [state['step'].item() for state in after.optimizer.state.values()] == [2, 2]
    assert after.loss_scaler.is_enabled() == (then is FP16)


@pytest.mark.gpu
@pytest.mark.parametrize('wrapper', [BF16, FP16], ids=['bf16', 'fp16'])
@pytest.mark.parametrize('clip_grad', [None, {'max_norm': 0.01}], ids=['', 'clipped'])
def test_a_step_is_float32s_and_infinite_gradients_are_left_out(wrapper, clip_grad):
    model = nn.Linear(4, 4).cuda()
    expected = nn.Linear(4, 4).cuda()
    expected.load_state_dict(model.state_dict())
    own = wrapped(model, wrapper, clip_grad=clip_grad and dict(clip_grad))
    plain = wrapped(expected, {'type': 'OptimWrapper'}, clip_grad=clip_grad and dict(clip_grad))
    x = torch.randn(3, 4, device='cuda', generator=torch.Generator('cuda').manual_seed(0))
    for _ in range(3):
        own.update_params(model(x).square().sum())
        plain.update_params(expected(x).square().sum())
    torch.testing.assert_close(model.weight, expected.weight, rtol=1e-4, atol=1e-5)
    if wrapper is FP16:
        before, scale = model.weight.clone(), own.loss_scaler.get_scale()
        own.update_params(model(x).sum() * torch.inf)
        assert torch.equal(model.weight, before) and own.loss_scaler.get_scale() == scale / 2


@pytest.mark.gpu
def test_no_step_in_bfloat16_waits_for_the_gpu():
    model = nn.Linear(4, 4).cuda()
    optim_wrapper = wrapped(model, BF16)
    x = torch.ones(3, 4, device='cuda')
    optim_wrapper.update_params(model(x).sum())
    torch.cuda.set_sync_debug_mode('error')
    try:
        with optim_wrapper.optim_context(model):
            loss = model(x).sum()
        optim_wrapper.update_params(loss)
    finally:
        torch.cuda.set_sync_debug_mode('default')
