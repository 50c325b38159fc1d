"""Time the fused operators of a ViG-H block against plain PyTorch and the memory floor, after a check.

    python tools/benchmark/fused.py                              # all operators and shapes, bf16
    python tools/benchmark/fused.py --operators dwconv --shapes '224 1' --dtype fp16

The floor is the time to read every input and write every output once, at the bandwidth of a large copy;
in the backward pass, to read the outputs' gradients and what was kept, and to write the inputs' gradients.
Dtypes are those of mixed precision: the residual stream and weights in float32, the rest in --dtype. Times
are medians of replays of CUDA graphs. Writes fused.json.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import DTYPES, copy_bandwidth, kernel_time, machine, parse_shape, relative_error, save
from torch import Tensor

from mmvig.engine.preflight import SetupError, check_writable, one_line_errors
from mmvig.ops.conv_norm import conv_norm
from mmvig.ops.dwconv import dwconv3x3
from mmvig.ops.gated_mix import gated_mix
from mmvig.ops.launch import INTERPRETED
from mmvig.ops.norm import add_norm, norm
from mmvig.ops.swiglu import swiglu

# Maps [B, H, W, C]: ViG-H at 224 x 224 and at 800 x 1216, and the stem's first maps.
SHAPES = {
    '224 stem': (128, 112, 112, 48),
    '224 1': (128, 56, 56, 96),
    '224 2': (128, 28, 28, 192),
    '224 3': (128, 14, 14, 384),
    '224 4': (128, 7, 7, 768),
    'det 1': (2, 200, 304, 96),
    'det 2': (2, 100, 152, 192),
    'det 3': (2, 50, 76, 384),
    'det 4': (2, 25, 38, 768),
}
HEAD_DIM = 32
# Error relative to the largest value, allowed before a time is reported.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


def image_norm(shape: tuple[int, ...], low: torch.dtype) -> tuple[Callable, list[Tensor]]:
    """The stem's convolution of an image, its norm and GELU; the image gets no gradient."""
    batch, height, width, channels = shape
    image = random((batch, 3, 2 * height, 2 * width), low).permute(0, 2, 3, 1)

    def run(x: Tensor, kernel: Tensor, *vectors: Tensor, backend: str) -> Tensor:
        kernel = kernel.to(low) if backend == 'torch' else kernel
        return conv_norm(x, kernel, *vectors, stride=2, act='gelu', backend=backend)

    return run, [image, random((channels, 3, 3, 3)), *[random((channels,)) for _ in range(3)]]


def stem_norm(shape: tuple[int, ...], low: torch.dtype) -> tuple[Callable, list[Tensor]]:
    """The stem's norm and GELU."""
    channels = shape[3:]

    def run(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return norm(x, weight, bias, act='gelu', backend=backend)

    return run, [random(shape, low), random(channels), random(channels)]


def output_norm(shape: tuple[int, ...], low: torch.dtype) -> tuple[Callable, list[Tensor]]:
    """The last residual connection of a stage and its output norm."""

    def run(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return add_norm(x, branch, None, weight, bias, channels_first=True, backend=backend)

    return run, [random(shape), random(shape, low), random(shape[3:]), random(shape[3:])]


def block_norm(shape: tuple[int, ...], low: torch.dtype) -> tuple[Callable, list[Tensor]]:
    """A residual connection with stochastic depth and the norm after it."""
    scale = torch.rand(shape[0])

    def run(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return add_norm(x, branch, scale, weight, bias, dtype=low, backend=backend)

    return run, [random(shape), random(shape, low), random(shape[3:]), random(shape[3:])]


def conv(shape: tuple[int, ...], low: torch.dtype) -> tuple[Callable, list[Tensor]]:
    """The depthwise convolution; PyTorch's under autocast takes the weight in half precision."""

    def run(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        return dwconv3x3(x, weight.to(low) if backend == 'torch' else weight, backend=backend)

    return run, [random(shape, low), random((shape[3], 1, 3, 3))]


def mix(shape: tuple[int, ...], low: torch.dtype) -> tuple[Callable, list[Tensor]]:
    """The mixer's last steps, the projection with them: the floor has no arithmetic."""

    def run(*tensors: Tensor, backend: str) -> Tensor:
        return gated_mix(*tensors, backend=backend)

    inputs = [random(shape, low) for _ in range(3)]
    return run, [*inputs, random((HEAD_DIM,)), random((HEAD_DIM,)), random((shape[3], shape[3]), low)]


def activation(shape: tuple[int, ...], low: torch.dtype) -> tuple[Callable, list[Tensor]]:
    """SwiGLU's activation and second projection at ViG-H's hidden width: the floor has no arithmetic."""
    hidden = 32 * -(-int(8 * shape[3] / 3) // 32)
    return swiglu, [random((*shape[:3], 2 * hidden), low), random((shape[3], hidden), low)]


OPERATORS = {
    'conv_norm': image_norm,
    'norm gelu': stem_norm,
    'add_norm': block_norm,
    'add_norm first': output_norm,
    'dwconv': conv,
    'gated_mix': mix,
    'swiglu': activation,
}
OF_STEM = 'conv_norm', 'norm gelu'


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, dtype=dtype)


def steps(
    function: Callable, inputs: list[Tensor], backend: str, of_image: bool
) -> tuple[Callable, Callable, int, int]:
    """A forward, and a forward and backward step, and the bytes that each part must move.

    ``of_image``: the first input is an image, without a gradient.
    """
    leaves = [x.detach().requires_grad_(i > 0 or not of_image) for i, x in enumerate(inputs)]
    learning = leaves[1:] if of_image else leaves
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> None:  # nothing is kept: a tensor here may refer to its own graph
        kept[x.data_ptr()] = x.nbytes

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = tuple_of(function(*leaves, backend=backend))
    given = [torch.randn_like(x) for x in outputs]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple_of(function(*inputs, backend=backend))

    def training() -> tuple[Tensor, ...]:
        outputs = tuple_of(function(*leaves, backend=backend))
        grads = torch.autograd.grad(outputs, learning, given)
        return *(x.detach() for x in outputs), *grads  # a graph that is kept cannot be captured again

    size = sum(x.nbytes for x in (*inputs, *outputs))
    return forward, training, size, size + sum(x.nbytes for x in (*given, *learning)) + sum(kept.values())


def tuple_of(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run(name: str, shape: tuple[int, ...], dtype: torch.dtype, bandwidth: float) -> dict:
    """An operator at a shape: errors, seconds of both backends, floors."""
    torch.manual_seed(0)
    function, inputs = OPERATORS[name](shape, dtype)
    device = inputs[0].device.type
    row = {'operator': name, 'shape': shape}
    results = {}
    for backend in ('triton', 'torch'):
        torch.manual_seed(1)  # the same gradients at the outputs
        forward, training, *sizes = steps(function, inputs, backend, name == 'conv_norm')
        results[backend] = training()
        if backend == 'triton':
            row |= {'floor': sizes[0] / bandwidth, 'training_floor': sizes[1] / bandwidth}
        row[backend] = kernel_time(forward, device, graph=True)
        row[f'{backend}_training'] = kernel_time(training, device, graph=True)
    row['error'] = max(relative_error(*pair) for pair in zip(*results.values(), strict=True))
    row['wrong'] = not row['error'] <= TOLERANCE[dtype]
    return row


def show(row: dict) -> None:
    """Print a row."""
    if row['wrong']:
        print(f'{row["operator"]:15} wrong: error {row["error"]:.1e} of the largest value', flush=True)
        return
    print(f'{row["operator"]:15} {"x".join(map(str, row["shape"])):16} ', end='')
    for key, floor in (('', 'floor'), ('_training', 'training_floor')):
        ours, plain, least = row[f'triton{key}'], row[f'torch{key}'], row[floor]
        print(
            f'{ours * 1e6:8.1f} us ({ours / least:4.2f} x floor, {plain / ours:5.2f} x PyTorch)', end='  '
        )
    print(flush=True)


def choose_shapes(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """What to time, by name.

    Raises:
        SetupError: A shape is none, there is no device to run on, or the folder cannot be written to.
    """
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SetupError('no CUDA device: run this on a machine with one')
    if args.device == 'cpu' and not INTERPRETED:
        raise SetupError("--device cpu runs in Triton's interpreter: set TRITON_INTERPRET=1")
    check_writable('--out', args.out, folder=True)
    shapes = {name: parse_shape(name, SHAPES, 'B,H,W,C') for name in args.shapes or SHAPES}
    if any(shape[3] % HEAD_DIM and name != '224 stem' for name, shape in shapes.items()):
        raise SetupError(f'--shapes: C must be a multiple of {HEAD_DIM}, the width of a head')
    return shapes


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--operators', nargs='+', choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument('--shapes', nargs='+', help=f'some of {list(SHAPES)}, or B,H,W,C; default: all')
    parser.add_argument('--dtype', choices=DTYPES, default='bf16')
    parser.add_argument(
        '--device', choices=['cuda', 'cpu'], default='cuda', help="'cpu' needs Triton's interpreter"
    )
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of fused.json'
    )
    args = parser.parse_args()
    with one_line_errors():
        shapes = choose_shapes(args)
    torch.set_default_device(args.device)
    bandwidth = copy_bandwidth(args.device)
    report = {**machine(args.device), 'dtype': args.dtype, 'bandwidth': bandwidth, 'rows': []}
    print(f'{report["machine"]}, torch {report["torch"]}, {args.dtype}, {bandwidth / 1e12:.2f} TB/s')
    print('forward, then forward + backward')
    for name in args.operators:
        if name == 'conv_norm' and args.dtype == 'fp32':
            print('conv_norm       is for half precision')
            continue
        for at, shape in shapes.items():
            if at not in SHAPES or (name in OF_STEM) == (at == '224 stem'):
                report['rows'].append(run(name, shape, DTYPES[args.dtype], bandwidth))
                show(report['rows'][-1])
                save(report, args.out / 'fused.json')
    if any(row['wrong'] for row in report['rows']):
        sys.exit('some results are wrong: their times are not reported')


if __name__ == '__main__':
    main()
