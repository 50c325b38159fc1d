"""Export a backbone, a classifier or a segmentor as ONNX or by torch.export, a detector as ONNX.

    python tools/export_onnx.py configs/classification/vigh_t_in1k.py vig_h_t.pth --out vigh_t.onnx
    python tools/export_onnx.py configs/segmentation/upernet_vigh_t.py iter.pth --out upernet.onnx
    python tools/export_onnx.py configs/detection/maskrcnn_vigh_t.py it.pth --out maskrcnn.onnx
    python tools/export_onnx.py configs/detection/maskrcnn_vigh_t.py it.pth --backbone --out it.pt2

The input `images` is float32 [batch, channels, height, width], RGB, normalised as the config says.
Batch, height and width are free, from 33 pixels on. Outputs: `logits` [batch, classes] of a classifier,
`logits` [batch, classes, height, width] of a segmentor, in ONNX also `labels` [batch, height, width], its
label map; `map0`, `map1`, ... of a backbone, at its strides.

A detector takes one image, not padded, and gives its N detections, the best first: `boxes` [N, 4],
`labels` [N], `scores` [N], and bool `masks` [N, height, width] where it has masks. They are in pixels of
`images`, or of a picture of another size: the optional input `size`, int64 [2], its height and width. Sides
must be longer than the largest stride.

Before anything is written, the exported model runs at three sizes, of which it was traced at one, and must
give what the model gives in PyTorch. A detector does so on pictures: those of --pictures, or else generated
ones.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from mmvig.backbones.base import Backbone
from mmvig.backbones.layers import randomise, use_any_device
from mmvig.engine import cli
from mmvig.engine.errors import said_in_one_line
from mmvig.engine.files import write_whole
from mmvig.engine.images import MAX_SIDE, check_shape, input_channels
from mmvig.engine.preflight import SetupError, check_checkpoint, check_writable, one_line_errors
from mmvig.ops.bigla import bigla, unpack

ONNX_PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
OPSETS = range(18, 24)
TOLERANCE = 1e-3  # of the largest output, or of 1
MIN_SIDE = 33  # two tokens a side at stride 32, as tracing takes a size of 1 for a constant
MAX_ROWS, MAX_TOKENS = 2**20, 2**25  # batch * heads; 2**25: more than 16384 x 16384 pixels have at stride 4
SHAPES = {'mmseg': (512, 512), 'mmdet': (480, 640)}
DEFAULT_SHAPE = (224, 224)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file; default: random weights')
    parser.add_argument('--out', required=True, help='file to write: .onnx, or .pt2 for torch.export')
    parser.add_argument('--backbone', action='store_true', help="the config's backbone alone")
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='image size to trace; default: 512 512 for segmentors, 480 640 for detectors, else 224 224',
    )
    parser.add_argument(
        '--opset',
        type=int,
        default=OPSETS[0],
        help=f'of ONNX, {OPSETS[0]} to {OPSETS[-1]}; default: %(default)s',
    )
    parser.add_argument(
        '--pictures',
        nargs='+',
        metavar='FILE',
        help='image files to check a detector on; default: generated',
    )
    return parser.parse_args()


def build(cfg: Config, checkpoint: str | None, backbone: bool, onnx: bool) -> nn.Module:
    """The model to be exported, in evaluation mode on the CPU: images to a tensor or a tuple of them.

    Raises:
        SetupError: The config is of another kind, or the checkpoint does not fit.
    """
    import mmvig.compat  # noqa: F401  before what imports mmcv.ops

    if 'model' not in cfg:
        raise SetupError(f'{cfg.filename} has no model to export')
    if cfg.get('default_scope'):
        init_default_scope(cfg.default_scope)
    if backbone and 'backbone' not in cfg.model:
        raise SetupError(f'--backbone: the model of {cfg.filename} has none')
    model = revert_sync_batchnorm(MODELS.build(cfg.model.backbone) if backbone else cli.build_model(cfg))
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if not (isinstance(model, Backbone) or kinds & {'ImageClassifier', 'EncoderDecoder', 'BaseDetector'}):
        raise SetupError(
            f'{cfg.filename} is a {type(model).__name__}: exported are backbones of mmvig, detectors, '
            'ImageClassifier and EncoderDecoder; the backbone of any model is with --backbone'
        )
    if 'BaseDetector' in kinds and not onnx:
        raise SetupError(
            f'{cfg.filename} is a detector, which is exported as .onnx; its --backbone is as .pt2 too'
        )
    use_any_device(model)
    if checkpoint:
        cli.load_strictly(model, checkpoint)
    else:
        MMLogger.get_instance('mmvig.export').setLevel(logging.WARNING)  # a line a parameter otherwise
        model.init_weights()
        for backbone in model.modules():
            if isinstance(backbone, Backbone):
                randomise(backbone)
    model.eval().requires_grad_(False)
    if 'BaseDetector' in kinds:
        from mmvig.deploy.detectors import Detector

        return Detector(model)
    if 'EncoderDecoder' in kinds:
        from mmvig.deploy.segmentors import Segmentor

        return Segmentor(model, labels=onnx)
    return model


def takes_size(model: nn.Module) -> bool:
    """Whether a model is a detector, which takes a size besides one image."""
    return 'size' in inspect.signature(model.forward).parameters


def least_side(model: nn.Module) -> int:
    """The least height and width of a model's images."""
    return max(MIN_SIDE, getattr(model, 'least_side', MIN_SIDE))


class _Core(nn.Module):
    """BiGLA of single heads, by the chunked backend, which is made of exportable operators alone."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor) -> Tensor:
        """q, k, gates [N, R, K], v [N, R, V] -> [N, R, V]; R stands for batch * heads."""
        heads = (x.unsqueeze(0) for x in (q, k, v, g_fwd, g_bwd))
        return bigla(*heads, backend='chunked').squeeze(0)


def _core_name(widths: tuple[int, int]) -> str:
    return 'BiGLA_{}x{}'.format(*widths)


class _CoreCalls:
    """Stands for ``bigla_packed`` while a model is traced: a call becomes a node, ``mmvig::BiGLA_<K>x<V>``.

    Tracing the operator in every block would take minutes and make the file large.
    """

    def __init__(self):
        self.widths: set[tuple[int, int]] = set()

    def __call__(self, qkv: Tensor, gates: Tensor, num_heads: int, backend: str) -> Tensor:
        # [B, N, H, K or V] -> [N, B * H, K or V]
        rows = [x.transpose(0, 1).flatten(1, 2) for x in unpack(qkv, gates, num_heads)]
        widths = rows[0].shape[-1], rows[2].shape[-1]
        self.widths.add(widths)
        name = f'mmvig::{_core_name(widths)}'
        o = torch.onnx.ops.symbolic(name, rows, dtype=qkv.dtype, shape=rows[2].shape, version=1)
        return o.unflatten(1, (-1, num_heads)).transpose(0, 1).flatten(2)


def _adaptive_average(pool: nn.AdaptiveAvgPool2d, x: Tensor) -> Tensor:
    """nn.AdaptiveAvgPool2d as two weighted sums; its own trace holds for one image size only."""
    sizes = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * 2

    def averages(length: int, number: int) -> Tensor:
        """[number, length]: row i averages from i * length / number to (i + 1) * length / number."""
        i, place = (torch.arange(n, device=x.device) for n in (number, length))
        i = i[:, None]
        inside = (place >= i * length // number) & (place < ((i + 1) * length + number - 1) // number)
        return inside / inside.sum(1, keepdim=True)

    rows, columns = (averages(length, number) for length, number in zip(x.shape[2:], sizes, strict=True))
    x = (x[..., None, :] * columns).sum(-1)  # [B, C, H, number of columns]
    return (x[..., None, :, :] * rows[..., None]).sum(-2)


@contextlib.contextmanager
def _traceable() -> Iterator[None]:
    """Give layers a ``forward`` whose trace holds for all image sizes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.AdaptiveAvgPool2d, 'forward', _adaptive_average))
        if layers := sys.modules.get('mmseg.models.utils.wrappers'):
            theirs = layers.Upsample.forward

            def upsample(layer: nn.Module, x: Tensor) -> Tensor:
                factor = layer.scale_factor
                if layer.size or not isinstance(factor, float) or not factor.is_integer():
                    return theirs(layer, x)
                size = [side * int(factor) for side in x.shape[2:]]  # mmseg rounds a float
                return F.interpolate(x, size, mode=layer.mode, align_corners=layer.align_corners)

            stack.enter_context(mock.patch.object(layers.Upsample, 'forward', upsample))
        yield


def trace(
    model: nn.Module,
    shape: tuple[int, int],
    batch: int = 2,
    device: str = 'cpu',
    limits: tuple[int, int] = (65536, MAX_SIDE),
) -> torch.export.ExportedProgram:
    """torch.export of a model of images, with batch (but for a detector's), height and width free.

    Args:
        model: the model.
        shape: height and width of the images to trace with.
        batch: how many of them, at least 2: one would be taken for a constant.
        device: where the model is.
        limits: the largest batch and side that the program is for.
    """
    least = least_side(model)
    dims = {
        0: torch.export.Dim('batch', min=1, max=limits[0]),
        2: torch.export.Dim('height', min=least, max=limits[1]),
        3: torch.export.Dim('width', min=least, max=limits[1]),
    }
    inputs, dynamic = (torch.rand(batch, input_channels(model), *shape, device=device),), (dims,)
    if takes_size(model):
        del dims[0]
        inputs, dynamic = (inputs[0][:1], torch.zeros(2, dtype=torch.int64)), (dims, None)
    with torch.no_grad(), _traceable(), warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # of deprecations within torchvision
        return torch.export.export(model, inputs, dynamic_shapes=dynamic)


def to_onnx(model: nn.Module, shape: tuple[int, int], opset: int) -> bytes:
    """A model as ONNX, of standard operators alone."""
    import onnx_ir
    from onnx_ir.passes.common import InlinePass

    calls = _CoreCalls()
    with mock.patch('mmvig.backbones.mixer.bigla_packed', calls):
        program = trace(model, shape)
    inputs = ['images', 'size'] if takes_size(model) else ['images']
    exported = _convert(program, opset, input_names=inputs, output_names=_output_names(model, shape))
    if takes_size(model):  # an input with an initialiser is optional
        size = exported.graph.inputs[1]
        size.const_value = onnx_ir.tensor([0, 0], name='size')
        exported.graph.register_initializer(size)
    for widths in calls.widths:
        function = onnx_ir.from_proto(_core_function(widths, opset))
        exported.functions[function.identifier()] = function
    InlinePass()(exported)
    exported.opset_imports.pop('mmvig', None)
    return onnx_ir.to_proto(exported).SerializeToString()


def _output_names(model: nn.Module, shape: tuple[int, int]) -> list[str]:
    if hasattr(model, 'output_names'):
        return model.output_names
    with torch.no_grad():
        outputs = model(torch.zeros(1, input_channels(model), *shape))
    return [f'map{i}' for i in range(len(outputs))] if isinstance(outputs, tuple) else ['logits']


@functools.cache
def _core_function(widths: tuple[int, int], opset: int):
    """BiGLA as an ONNX function, of heads whose keys and values have these widths."""
    import onnx_ir

    dims = {
        0: torch.export.Dim('tokens', min=2, max=MAX_TOKENS),
        1: torch.export.Dim('rows', min=2, max=MAX_ROWS),
    }
    key, value = widths
    inputs = tuple(torch.rand(300, 3, width) for width in (key, key, value, key, key))
    with torch.no_grad():
        program = torch.export.export(_Core(), inputs, dynamic_shapes=(dims,) * 5)
    graph = _convert(program, opset).graph
    for initializer in list(graph.initializers.values()):  # which a function cannot have
        constant = onnx_ir.node('Constant', [], {'value': initializer.const_value})
        initializer.replace_all_uses_with(constant.outputs[0])
        graph.insert_before(graph[0], constant)
    graph.initializers.clear()
    # onnxruntime gives values one buffer whose sizes have one name, and each call has sizes of its own.
    for node in graph:
        for value in node.outputs:
            value.shape = None
    return onnx_ir.to_proto(onnx_ir.Function('mmvig', _core_name(widths), graph=graph, attributes=[]))


def _convert(program: torch.export.ExportedProgram, opset: int, **names):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of deprecations within the exporter
        result = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, **names)
    return result.model


def to_program(model: nn.Module, shape: tuple[int, int]) -> bytes:
    """A model as a torch.export program, as torch.export.load reads it."""
    buffer = io.BytesIO()
    torch.export.save(trace(model, shape), buffer)
    return buffer.getvalue()


def run_onnx(data: bytes) -> Callable[..., list[Tensor]]:
    """A function that runs an ONNX model in onnxruntime, on the CPU, from its inputs by name."""
    from mmvig.deploy import open_session

    session = open_session(data)

    def run(images: Tensor, **more: Tensor) -> list[Tensor]:
        inputs = {'images': images, **more}
        found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        return [torch.from_numpy(x) for x in found]

    return run


def run_program(data: bytes) -> Callable[[Tensor], list[Tensor]]:
    """A function that runs a torch.export program."""
    module = torch.export.load(io.BytesIO(data)).module()
    return lambda images: listed(module(images))


def listed(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """A model's outputs as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _sizes(shape: tuple[int, int], least: int, most: int | None = None) -> list[tuple[int, int]]:
    """Three sizes to check at, the traced one first; sides are from the least to the most."""
    height, width = shape
    smaller = max(height // 2 + 1, least), max(width // 3 + 2, least)
    wider = max(width * 5 // 4, least + 14)
    return [shape, (max(height * 2 // 3, least + 2), wider if most is None else min(wider, most)), smaller]


def samples(model: nn.Module, shape: tuple[int, int], most: int | None = None) -> list[Tensor]:
    """Images of three sizes to check an export with, the traced one first; sides up to ``most``."""
    generator, channels = torch.Generator().manual_seed(0), input_channels(model)
    sizes = zip((2, 1, 3), _sizes(shape, least_side(model), most), strict=True)
    return [torch.randn(batch, channels, *size, generator=generator) for batch, size in sizes]


def check(model: nn.Module, run: Callable, images: list[Tensor], tolerance: float = TOLERANCE) -> None:
    """Compare what was exported with the model, and print by how much they differ for each of the images.

    Raises:
        SetupError: They differ by more than ``tolerance`` of the largest output, or of 1 where that is
            larger; or label maps in more than that part of their pixels.
    """
    for each in images:
        with torch.no_grad():
            expected = listed(model(each))
            found = run(each)
        size = list(each.shape[2:])
        if [x.shape for x in found] != [x.shape for x in expected]:
            raise SetupError(f'at {size} the exported model gives {[tuple(x.shape) for x in found]}')
        error = torch.tensor([*map(_error, found, expected)]).max().item()  # NaN where one is
        print(f'{len(each)} x {size[0]} x {size[1]}: differs from PyTorch by {error:.1e}')
        if not error <= tolerance:
            raise SetupError(
                f'at {size} the exported model differs from PyTorch by {error:.1e}, more than '
                f'{tolerance}: nothing was written'
            )


def _error(found: Tensor, expected: Tensor) -> float:
    """By how much an output differs, of its largest value or 1; a label map, in how many of its pixels."""
    if not expected.is_floating_point():
        return (found != expected).float().mean().item()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def check_arguments(args: argparse.Namespace) -> None:
    """Check what does not need the model.

    Raises:
        SetupError: An option is out of its range, a package or a file is missing.
    """
    out = Path(args.out)
    if out.suffix not in ('.onnx', '.pt2'):
        raise SetupError(f'--out {out}: it must end in .onnx or .pt2')
    check_writable('--out', out)
    if not out.parent.is_dir():
        raise SetupError(f'--out {out}: there is no folder {out.parent.absolute()}')
    check_shape(args.shape, MIN_SIDE)
    if out.suffix == '.onnx':
        missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise SetupError(f'ONNX needs {", ".join(missing)}: pip install {" ".join(missing)}')
        if not hasattr(torch.onnx, 'ops'):
            raise SetupError(f'ONNX needs torch 2.8 or newer, this is {torch.__version__}')
        # Beyond the highest the exporter says nothing and stays at the lowest.
        if args.opset not in OPSETS:
            raise SetupError(f'--opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {args.opset}')
    elif args.opset != OPSETS[0]:
        raise SetupError(f'--opset is for .onnx files, and --out is {out}')
    if args.checkpoint is not None:
        check_checkpoint(args.checkpoint, args.config)


def main() -> None:
    """Export, check, write."""
    with one_line_errors():
        args = parse_args()
        check_arguments(args)
        cfg = cli.read_config_file(args.config)
        shape = tuple(args.shape or SHAPES.get(cfg.get('default_scope'), DEFAULT_SHAPE))
        for name in ('torch.onnx', 'onnxscript'):
            logging.getLogger(name).setLevel(logging.ERROR)
        with said_in_one_line(cfg):
            onnx = args.out.endswith('.onnx')
            model = build(cfg, args.checkpoint, args.backbone, onnx)
            if not args.checkpoint:
                print('Without a checkpoint, the weights are random.')
            check_shape(shape, least_side(model))
            if takes_size(model):
                from mmvig.deploy.check import check_detector, read_pictures

                pictures = read_pictures(cfg, args.pictures)
                data = to_onnx(model, shape, args.opset)
                sizes = _sizes(shape, least_side(model))
                check_detector(model.model, run_onnx(data), sizes, pictures)
            elif args.pictures:
                raise SetupError(f'--pictures are for detectors, and {args.config} is none')
            elif onnx:
                data = to_onnx(model, shape, args.opset)
                check(model, run_onnx(data), samples(model, shape))
            else:
                data = to_program(model, shape)
                check(model, run_program(data), samples(model, shape))
        write_whole(args.out, data)
    print(args.out)


if __name__ == '__main__':
    main()
