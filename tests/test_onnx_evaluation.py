"""`tools/test_onnx.py` on files that answer with what the data set's one picture shows."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from pycocotools import mask as coco_mask
from small_configs import write_small

TOOL = Path(__file__).resolve().parents[1] / 'tools/test_onnx.py'


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes')
    return folder / 'shapes', *write_small(folder, train=1, val=1, iterations=1)


@pytest.fixture
def module(monkeypatch):
    spec = importlib.util.spec_from_file_location('test_onnx', TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(module, monkeypatch, capsys):
    """Run the tool: its measures, or the error."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['test_onnx.py', *map(str, arguments)])
        try:
            module.main()
        except SystemExit:
            return capsys.readouterr().err.splitlines()[-1]
        return ast.literal_eval(capsys.readouterr().out.splitlines()[-1])

    return run


def write_answers(path, inputs, **answers):
    """An ONNX file that gives the same arrays for any images."""
    kinds = {'images': (onnx.TensorProto.FLOAT, [1, 3, 'h', 'w']), 'size': (onnx.TensorProto.INT64, [2])}
    nodes = [
        helper.make_node('Constant', [], [name], value=numpy_helper.from_array(x))
        for name, x in answers.items()
    ]
    outputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in answers.items()
    ]
    taken = [helper.make_tensor_value_info(name, *kinds[name]) for name in inputs]
    graph = helper.make_graph(nodes, 'answers', taken, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10), path)


def test_detector(tool, configs, tmp_path):
    root, detector, _ = configs
    found = json.loads((root / 'annotations/instances_val.json').read_text())['annotations']
    corners = np.array(
        [[x, y, x + w, y + h] for x, y, w, h in (each['bbox'] for each in found)], np.float32
    )
    segments = [each['segmentation'] for each in found]
    masks = [coco_mask.decode(coco_mask.frPyObjects(each, *each['size'])) for each in segments]
    answers = dict(
        boxes=corners,
        labels=np.array([each['category_id'] - 1 for each in found]),
        scores=np.linspace(0.9, 0.5, len(found), dtype=np.float32),
        masks=np.stack(masks).astype(bool),
    )
    write_answers(tmp_path / 'd.onnx', ['images', 'size'], **answers)
    measures = tool(detector, tmp_path / 'd.onnx')
    assert measures['coco/bbox_mAP'] == measures['coco/segm_mAP'] == 1.0


@pytest.mark.parametrize('scale', [1, 2])
def test_segmentor(tool, configs, tmp_path, scale):
    """Logits of another size than the picture's are resized, as mmseg does."""
    root, _, segmentor = configs
    labels = cv2.imread(str(root / 'masks/val/000000.png'), cv2.IMREAD_UNCHANGED)
    labels = labels.repeat(scale, 0).repeat(scale, 1)[None]
    logits = (labels[:, None] == np.arange(7)[:, None, None]).astype(np.float32)
    write_answers(tmp_path / 's.onnx', ['images'], logits=logits, labels=labels.astype(np.int64))
    assert tool(segmentor, tmp_path / 's.onnx')['mIoU'] >= (100.0 if scale == 1 else 97.0)


@pytest.mark.parametrize('head, least', [({}, 0.3), ({'threshold': 0.7}, 0.7)])
def test_a_segmentor_of_one_channel(module, tmp_path, head, least):
    """Its resized logits are compared with mmseg's threshold or the config's; an argmax would be all 0."""
    logits = np.linspace(-2, 2, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    write_answers(tmp_path / 's.onnx', ['images'], logits=logits, labels=np.zeros((1, 8, 8), np.int64))
    sample = SimpleNamespace(ori_shape=(16, 12))
    module.Model(str(tmp_path / 's.onnx'), head)(torch.zeros(1, 3, 8, 8), sample)
    found = sample.pred_sem_seg.data
    assert (
        found.shape == (1, 16, 12)
        and abs(found.float().mean() - (2 - np.log(least / (1 - least))) / 4) < 0.1
    )


def test_wrong_files_are_named(tool, configs, tmp_path):
    _, detector, _ = configs
    assert 'no.onnx' in tool(detector, tmp_path / 'no.onnx')
    (tmp_path / 'broken.onnx').write_bytes(b'no model')
    assert 'broken.onnx cannot be run' in tool(detector, tmp_path / 'broken.onnx')
    write_answers(tmp_path / 'b.onnx', ['images'], map0=np.zeros((1, 3, 4, 4), np.float32))
    assert 'b.onnx gives map0: it is no detector' in tool(detector, tmp_path / 'b.onnx')
