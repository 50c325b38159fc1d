"""Evaluate a detector or a segmentor of `tools/export_onnx.py` with its config's data set and measures.

    python tools/test_onnx.py configs/detection/maskrcnn_vigh_t.py maskrcnn.onnx

The model runs in onnxruntime, on the CPU; `tools/test.py` gives the same measures of the checkpoint.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import mmvig.compat  # noqa: F401  before what imports mmcv.ops

from mmvig.deploy import open_session
from mmvig.engine import cli
from mmvig.engine.errors import said_in_one_line
from mmvig.engine.options import CfgOptions, merge_options
from mmvig.engine.preflight import SetupError, check_testing, one_line_errors


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('model', help='file of tools/export_onnx.py')
    parser.add_argument(
        '--cfg-options', nargs='+', action=CfgOptions, default={}, metavar='KEY=VALUE', help='as of test.py'
    )
    return parser.parse_args()


class Model:
    """A file in onnxruntime: an image as a config's data preprocessor gives it to a data sample.

    Args:
        path: the file.
        head: a segmentor's ``decode_head`` in its config. Default: empty, for a detector.

    Raises:
        SetupError: The file cannot be run, or is no detector's or segmentor's.
    """

    def __init__(self, path: str, head: dict | None = None):
        self.head = head or {}
        try:
            self.session = open_session(path)
        except Exception as error:  # of as many types as there are ways for a file to be wrong
            raise SetupError(f'{path} cannot be run: {error}') from error
        self.names = [output.name for output in self.session.get_outputs()]
        if not {'boxes', 'logits'} & {*self.names} or 'labels' not in self.names:
            raise SetupError(f'{path} gives {", ".join(self.names)}: it is no detector and no segmentor')

    def __call__(self, images: Tensor, sample) -> None:
        """Add what is found in images ``[1, C, H, W]`` to their sample, in its picture's own pixels."""
        inputs, shape = {'images': images.numpy()}, sample.ori_shape
        if 'boxes' in self.names:
            inputs['size'] = torch.tensor(shape).numpy()
        found = dict(zip(self.names, map(torch.from_numpy, self.session.run(None, inputs)), strict=True))
        if 'boxes' in found:
            sample.pred_instances = InstanceData(bboxes=found.pop('boxes'), **found)
            return
        labels = found['labels']
        if labels.shape[1:] != shape:  # as mmseg does
            corners = self.head.get('align_corners', False)
            logits = F.interpolate(found['logits'], shape, mode='bilinear', align_corners=corners)
            if logits.shape[1] > 1:
                labels = logits.argmax(1)
            else:
                labels = (logits[:, 0].sigmoid() > (self.head.get('threshold') or 0.3)).long()
        sample.pred_sem_seg = PixelData(data=labels)


def evaluate(cfg: Config, model: Model) -> dict[str, float]:
    """The measures of a config's test evaluator."""
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    loader = Runner.build_dataloader(cfg.test_dataloader)
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    for batch in tqdm(loader):
        for image, sample in zip(batch['inputs'], batch['data_samples'], strict=True):
            data = preprocessor({'inputs': [image], 'data_samples': [sample]}, False)
            height, width = image.shape[1:]
            model(data['inputs'][..., :height, :width].contiguous(), data['data_samples'][0])
            evaluator.process(data['data_samples'], data)
    return evaluator.evaluate(len(loader.dataset))


def main() -> None:
    """Run the model on the data set, and print its measures."""
    with one_line_errors():
        args = parse_args()
        cfg = cli.read_config_file(args.config)
        merge_options(cfg, args.cfg_options)
        init_default_scope(cfg.get('default_scope', 'mmdet'))
        cfg.load_from = args.model
    with said_in_one_line(cfg):
        check_testing(cfg)
        model = Model(args.model, cfg.model.get('decode_head'))
        print({name: float(value) for name, value in evaluate(cfg, model).items()})


if __name__ == '__main__':
    main()
