"""Compile a backbone, a classifier or a segmentor into a package for GPUs, by AOTInductor.

    python tools/export_aoti.py configs/classification/vigh_t_in1k.py vig_h_t.pth --out vigh_t.pt2
    python tools/export_aoti.py configs/segmentation/upernet_vigh_t.py iter.pth --out upernet.pt2
    python tools/export_aoti.py configs/detection/maskrcnn_vigh_t.py it.pth --backbone --out backbone.pt2

A package runs where PyTorch of the same version is, without mmvig and OpenMMLab:

    model = torch._inductor.aoti_load_package('vigh_t.pt2')
    logits = model(images)

Our Triton kernels are in it, compiled for the GPU that the tool runs on. Input and outputs are as of
tools/export_onnx.py, on the GPU: `images` float32 [batch, channels, height, width], of up to 511 images
and sides from 33 to 4096. It computes in what --dtype says, as PyTorch's autocast does; outputs come in
the dtype that the model gives them in. How kernels are launched is planned for the
size of --shape and --batch, and holds for the others.

The C++ compiler must link the C++ library dynamically; CXX names another than g++. Before a package is
written, it runs in a process of its own at three sizes, of which it was traced at one, and must give what
the model gives in PyTorch.
"""

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault('TRITON_DISABLE_LINE_INFO', '1')  # no paths of this machine in the package

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent))

import export_onnx

from mmvig.engine import cli
from mmvig.engine.errors import said_in_one_line
from mmvig.engine.files import write_whole
from mmvig.engine.images import check_shape
from mmvig.engine.preflight import SetupError, check_checkpoint, check_writable, one_line_errors

DEVICE = 'cuda'
# Batch and side: with more, numbers of rows may not fit into 32 bits, as kernels have them.
LIMITS = 511, 4096
CONFIGS = {
    'force_layout_optimization': True,  # convolutions channels last, as our maps are, without copies
    'aot_inductor.use_runtime_constant_folding': True,  # weights are cast when the package is loaded
}
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}
# By how much a package may differ from PyTorch, of the largest output or of 1.
TOLERANCES = {'bf16': 5e-2, 'fp16': 1e-2, 'fp32': 1e-3}
LIBRARY = """
#include <locale>
extern "C" bool is_digit(char x) { return std::isdigit(x, std::locale()); }
"""
# Run as if what a package must not need were not installed.
RUN = """
import sys
sys.modules.update(dict.fromkeys(['mmvig', 'mmengine']))
import torch
run = torch._inductor.aoti_load_package('model.pt2')
torch.save([run(images) for images in torch.load('images.pt')], 'outputs.pt')
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file; default: random weights')
    parser.add_argument('--out', required=True, help='file to write, .pt2')
    parser.add_argument('--backbone', action='store_true', help="the config's backbone alone")
    parser.add_argument('--dtype', choices=DTYPES, default='bf16', help='default: %(default)s')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='image size to plan for; default: 512 512 with mmseg, 480 640 with mmdet, else 224 224',
    )
    parser.add_argument('--batch', type=int, default=2, help='batch to plan for; default: %(default)s')
    return parser.parse_args()


class Autocast(nn.Module):
    """A model that computes in a dtype, as PyTorch's autocast has it."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.least_side = export_onnx.least_side(model)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the model gives."""
        if self.dtype == torch.float32:
            return self.model(images)
        with torch.autocast('cuda', self.dtype):
            return self.model(images)


def trace(model: nn.Module, shape: tuple[int, int], batch: int) -> torch.export.ExportedProgram:
    """torch.export of a model, with our Triton kernels in its graph.

    Raises:
        SetupError: An operator of mmvig is left in it.
    """
    from mmvig.deploy.launches import visible

    with visible():
        program = export_onnx.trace(model, shape, batch, DEVICE, LIMITS)
    left = {str(node.target) for graph in graphs_of(program) for node in graph.nodes}
    if left := sorted(name for name in left if name.startswith('mmvig.')):
        raise SetupError(f'{", ".join(left)} would need mmvig: a block of the model is not as it was built')
    return program


def graphs_of(program: torch.export.ExportedProgram) -> list[torch.fx.Graph]:
    """A program's graph, and those within it, as of what runs under autocast."""
    return [x.graph for x in program.graph_module.modules() if isinstance(x, torch.fx.GraphModule)]


def package(program: torch.export.ExportedProgram) -> bytes:
    """A program compiled by AOTInductor."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, 'model.pt2'))
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=CONFIGS)
        return Path(path).read_bytes()


def run_alone(data: bytes, images: list[Tensor]) -> list[list[Tensor]]:
    """What a package gives for each of the images in a process of its own.

    Raises:
        SetupError: It cannot be loaded there, or does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'model.pt2').write_bytes(data)
        torch.save(images, Path(folder, 'images.pt'))
        done = _run([sys.executable, '-c', RUN], folder)
        if done.returncode:
            raise SetupError(f'the package does not run ({_why(done)}): nothing was written')
        return [*map(export_onnx.listed, torch.load(Path(folder, 'outputs.pt')))]


def check_compiler() -> None:
    """Check the C++ compiler that Inductor will use.

    With a C++ library of its own in it, beside PyTorch's, a package would crash where it is loaded.

    Raises:
        SetupError: There is none, it does not compile, or it links the C++ library statically.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise SetupError(f'a package needs a C++ compiler: install g++, or set CXX ({error})') from error
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'library.cpp').write_text(LIBRARY)
        command = *shlex.split(compiler), '-shared', '-fPIC', 'library.cpp', '-o', 'library.so'
        done = _run(command, folder)
        if done.returncode:
            raise SetupError(f'the C++ compiler {compiler} does not compile ({_why(done)}): set CXX')
        library = Path(folder, 'library.so').read_bytes()
    if not any(name in library for name in (b'libstdc++.so', b'libc++.so')):  # which it would load
        raise SetupError(
            f'the C++ compiler {compiler} links the C++ library statically, and a package would crash: set '
            'CXX to one that links it dynamically, such as /usr/bin/g++'
        )


def _run(command: Sequence[str], folder: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _why(done: subprocess.CompletedProcess) -> str:
    """Why a process failed: the signal that ended it, or the last line that it wrote."""
    if done.returncode < 0:
        return signal.strsignal(-done.returncode)
    lines = done.stderr.split('\n')
    return textwrap.shorten(next(filter(None, reversed(lines)), f'status {done.returncode}'), 300)


def check_arguments(args: argparse.Namespace) -> None:
    """Check what does not need the model.

    Raises:
        SetupError: An option is out of its range, a file is missing, or there is no GPU, Triton or C++
            compiler that a package can be made with.
    """
    out = Path(args.out)
    if out.suffix != '.pt2':
        raise SetupError(f'--out {out}: it must end in .pt2')
    check_writable('--out', out)
    if not out.parent.is_dir():
        raise SetupError(f'--out {out}: there is no folder {out.parent.absolute()}')
    check_shape(args.shape, export_onnx.MIN_SIDE)
    if args.shape and max(args.shape) > LIMITS[1]:
        raise SetupError(f'--shape: sides must be at most {LIMITS[1]}, got {args.shape}')
    if not 2 <= args.batch <= LIMITS[0]:
        raise SetupError(f'--batch must be from 2 to {LIMITS[0]}, got {args.batch}')
    if args.checkpoint is not None:
        check_checkpoint(args.checkpoint, args.config)
    if not hasattr(torch.library, 'wrap_triton'):
        raise SetupError(f'a package needs torch 2.6 or newer, this is {torch.__version__}')
    if not torch.cuda.is_available():
        raise SetupError('a package is compiled on the GPU that it is for, and PyTorch finds none here')
    try:
        from mmvig.ops.launch import unavailable
    except ImportError as error:
        raise SetupError(f'a package needs Triton, which cannot be imported ({error})') from error
    device = torch.device(DEVICE, torch.cuda.current_device())
    if reason := unavailable(device, DTYPES[args.dtype]):
        raise SetupError(f"Triton's kernels cannot be compiled here: {reason}")
    check_compiler()


def main() -> None:
    """Compile, check, write."""
    with one_line_errors():
        args = parse_args()
        check_arguments(args)
        cfg = cli.read_config_file(args.config)
        shape = tuple(
            args.shape or export_onnx.SHAPES.get(cfg.get('default_scope'), export_onnx.DEFAULT_SHAPE)
        )
        logging.getLogger('torch._inductor').setLevel(logging.ERROR)
        with said_in_one_line(cfg):
            model = export_onnx.build(cfg, args.checkpoint, args.backbone, onnx=False).to(DEVICE)
            if not args.checkpoint:
                print('Without a checkpoint, the weights are random.')
            model = Autocast(model, DTYPES[args.dtype])
            check_shape(shape, model.least_side)
            data = package(trace(model, shape, args.batch))
            images = [x.to(DEVICE) for x in export_onnx.samples(model, shape, LIMITS[1])]
            found = iter(run_alone(data, images))
            export_onnx.check(model, lambda _: next(found), images, TOLERANCES[args.dtype])
        write_whole(args.out, data)
    print(args.out)


if __name__ == '__main__':
    main()
