"""Time BiGLA's backends and peers against the memory floor, after checking that they compute the same.

    python tools/benchmark/bigla.py                          # all shapes, bf16, on the GPU
    python tools/benchmark/bigla.py --shapes 'det 1' --dtype fp16 --peers
    python tools/benchmark/bigla.py --graph --peers sdpa     # without the time that launching takes
    python tools/benchmark/bigla.py --peers twice            # what merging the two directions gains
    python tools/benchmark/bigla.py --growth                 # time a token from 4,096 to 1,048,576 tokens

The floor is the time to read every input and write every output once, at the bandwidth of a large copy.
Times are medians; the L2 cache is flushed before each run on a GPU, not before replays of a CUDA graph.
'one direction twice' is our own kernels of one direction (one_direction.py) in bf16 or fp16, run once a
direction, for the second on flipped copies. Writes bigla.json and bigla.png.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import DTYPES, copy_bandwidth, kernel_time, machine_name, parse_shape, release
from torch import Tensor

from mmvig.engine.preflight import SetupError, check_writable, one_line_errors
from mmvig.ops import bigla
from mmvig.ops.bigla import BACKENDS

# Batch, heads, tokens, K, V: ViG-H at 224 x 224 and at 800 x 1216, and plain ViG-T at 1024 x 1024.
SHAPES = {
    '224 1': (128, 3, 3136, 16, 32),
    '224 2': (128, 6, 784, 16, 32),
    '224 3': (128, 12, 196, 16, 32),
    '224 4': (128, 24, 49, 16, 32),
    'det 1': (2, 3, 60800, 16, 32),
    'det 2': (2, 6, 15200, 16, 32),
    'det 3': (2, 12, 3800, 16, 32),
    'det 4': (2, 24, 950, 16, 32),
    'ViG-T 1024': (32, 3, 4096, 32, 64),
}
GROWTH = {f'N {2**i}': (2, 3, 2**i, 16, 32) for i in range(12, 21, 2)}
GATES = {'normal': (1, 0), 'strong': (3, -4)}  # deviation and mean of their logits
PEERS = ('fla', 'sdpa', 'twice')
# Error of the outputs relative to the largest value, allowed before a time is reported.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}
# The longest sequences that are practical, and over which softmax attention is worth timing.
LIMITS = {'reference': 256, 'softmax attention': 70_000}


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, gates: str = 'normal'
) -> list[Tensor]:
    """q, k, v, g_fwd, g_bwd as views of two fused projections, as ViG-H has them."""
    batch, heads, tokens, key, value = shape
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(batch, tokens, heads * (2 * key + value), generator=generator, device=device)
    scale, shift = GATES[gates]
    logits = torch.randn(batch, tokens, 2 * heads * key, generator=generator, device=device)
    logits = logits * scale + shift
    width = heads * key
    parts = (*qkv.to(dtype).split([width, width, heads * value], -1), *logits.to(dtype).chunk(2, -1))
    return [x.unflatten(-1, (heads, -1)) for x in parts]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor) -> Tensor:
    """The same heads, tokens and value width; queries and keys as wide as values, as the kernels want."""
    heads_first = (x.transpose(1, 2) for x in (v, v, v))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def fla_twice(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor) -> Tensor:
    """flash-linear-attention's one-directional kernel, once a direction, the second on flipped copies."""
    from fla.ops.gla import chunk_gla

    decays = [F.logsigmoid(g.float()) / 16 for g in (g_fwd, g_bwd)]
    scale = q.shape[-1] ** -0.5
    forward = chunk_gla(q, k, v, decays[0], scale=scale)[0]
    flipped = [x.flip(1) for x in (q, k, v, decays[1])]
    return (forward + chunk_gla(*flipped, scale=scale)[0].flip(1)) / 2


def candidates(backends: list[str], peers: list[str], dtype: str, device: str) -> dict[str, Callable]:
    """What to time, by name; peers that are not installed or cannot run are left out, with a line."""
    functions = {}
    for name in backends:
        functions[name] = lambda *x, name=name: bigla(*x, backend=name)
    if 'fla' in peers:
        if importlib.util.find_spec('fla') is None:
            print('fla-core is not installed: left out')
        else:
            functions['fla twice'] = fla_twice
    if 'twice' in peers:
        if device == 'cpu' or dtype == 'fp32':
            print('one direction twice runs on GPUs, in bf16 and fp16: left out')
        else:
            from one_direction import twice  # which imports Triton

            functions['one direction twice'] = twice
    if 'sdpa' in peers:
        functions['softmax attention'] = softmax_attention
    return functions


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Bytes allocated at most during a call beyond what was before."""
    if device != 'cuda':
        return None
    function()
    release(device)  # what is collected during the call would count as less memory of it
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def benchmark(function: Callable, inputs: list[Tensor], floors: tuple[float, float], graph: bool) -> dict:
    """Seconds, factors over the floors and peak memory: a forward pass, and a forward and backward pass."""
    device = inputs[0].device.type
    leaves = [x.detach().requires_grad_() for x in inputs]
    do = torch.randn_like(inputs[2])

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def training():
        return torch.autograd.grad(function(*leaves), leaves, do, allow_unused=True)

    row = {}
    for step, floor in zip((forward, training), floors, strict=True):
        key = step.__name__
        row[key] = kernel_time(step, device, graph)
        row[f'{key}_factor'] = row[key] / floor
        row[f'{key}_memory'] = peak_memory(step, device)
    return row


def run(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    functions: dict,
    bandwidth: float,
    graph: bool,
    gates: str,
) -> dict:
    """All candidates at one shape."""
    batch, heads, tokens, key, value = shape
    inputs = make_inputs(shape, dtype, device, gates)
    with torch.no_grad():
        # A slice of the batch in float64 is the truth: images do not mix, and memory is limited.
        expected = bigla(*(x[:1].double() for x in inputs), backend='chunked')
    items = batch * heads * tokens * inputs[0].element_size()
    traffic = items * (4 * key + 2 * value), items * (8 * key + 3 * value)
    floors = traffic[0] / bandwidth, sum(traffic) / bandwidth
    result = {'shape': shape, 'floor': floors, 'bytes': traffic, 'rows': []}
    for name, function in functions.items():
        if tokens > LIMITS.get(name, sys.maxsize):
            continue
        row = {'name': name}
        if name != 'softmax attention':  # which computes something else
            with torch.no_grad():
                error = (function(*(x[:1] for x in inputs)).double() - expected).abs().max()
            row['error'] = (error / expected.abs().max()).item()
            row['wrong'] = not row['error'] <= TOLERANCE[dtype]
        if not row.get('wrong'):
            row |= benchmark(function, inputs, floors, graph)
        result['rows'].append(row)
    return result


def show(name: str, result: dict) -> None:
    """Print one shape's rows."""
    shape, floors = result['shape'], result['floor']
    print(f'\n{name}: B {shape[0]} H {shape[1]} N {shape[2]} K/V {shape[3]}/{shape[4]}, ', end='')
    print(f'floor {floors[0] * 1e3:.3f} / {floors[1] * 1e3:.3f} ms')
    for row in result['rows']:
        if row.get('wrong'):
            print(f'  {row["name"]:19} wrong: error {row["error"]:.1e} of the largest value')
            continue
        memory = (
            ''
            if row['forward_memory'] is None
            else ' {:8.1f} {:8.1f} MB'.format(row['forward_memory'] / 1e6, row['training_memory'] / 1e6)
        )
        print(
            f'  {row["name"]:19} forward {row["forward"] * 1e3:9.3f} ms ({row["forward_factor"]:7.1f} x), '
            f'forward + backward {row["training"] * 1e3:9.3f} ms ({row["training_factor"]:7.1f} x), '
            f'{result["bytes"][0] / row["forward"] / 1e12:5.2f} TB/s{memory}',
            flush=True,
        )


def plot(results: dict, path: Path) -> None:
    """Time against the tokens of a sequence, log-log, with the floor; a line for each family of shapes."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    lines: dict[tuple[str, str], list] = {}
    for shape_name, result in results.items():
        family, tokens = shape_name.split()[0], result['shape'][2]
        rows = [{'name': 'floor', 'forward': result['floor'][0], 'training': result['floor'][1]}]
        for row in rows + [row for row in result['rows'] if 'training' in row]:
            lines.setdefault((row['name'], family), []).append((tokens, row['forward'], row['training']))
    names = ['floor', *dict.fromkeys(name for name, _ in lines if name != 'floor')]
    families = list(dict.fromkeys(family for _, family in lines))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.5), sharex=True, sharey=True, layout='constrained')
    for (name, family), points in lines.items():
        tokens, *times = zip(*sorted(points), strict=True)
        color = 'black' if name == 'floor' else f'C{names.index(name) - 1}'
        style = {'marker': 'os^vD'[families.index(family) % 5], 'ls': '--' if name == 'floor' else '-'}
        for axis, seconds in zip(axes, times, strict=True):
            axis.loglog(tokens, [x * 1e3 for x in seconds], color=color, label=f'{name}, {family}', **style)
    for axis, title in zip(axes, ('forward', 'forward + backward'), strict=True):
        axis.set_title(title)
        axis.set_xlabel('tokens of a sequence')
        axis.grid(True, which='both', alpha=0.2)
    axes[0].set_ylabel('ms')
    axes[1].legend(fontsize='small', loc='center left', bbox_to_anchor=(1, 0.5))  # beside the lines
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--shapes', nargs='*', help=f'some of {list(SHAPES)}, or B,H,N,K,V; default: all')
    parser.add_argument(
        '--growth', action='store_true', help='sequence lengths from 4,096 to 1,048,576 instead'
    )
    parser.add_argument(
        '--gates', choices=GATES, default='normal', help='logits x, or 3 x - 4, x standard normal'
    )
    parser.add_argument('--graph', action='store_true', help='replay each call as a CUDA graph')
    parser.add_argument('--dtype', choices=DTYPES, default='bf16')
    parser.add_argument('--backends', nargs='*', default=['triton', 'chunked'], choices=BACKENDS)
    parser.add_argument(
        '--peers',
        nargs='*',
        default=list(PEERS),
        choices=PEERS,
        help='fla (fla-core), sdpa (softmax attention), twice (our own kernels once a direction)',
    )
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of bigla.json, bigla.png'
    )
    return parser.parse_args()


def choose_shapes(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """What to time, by name.

    Raises:
        SetupError: An option is out of its range, there is no GPU, or the folder cannot be written to.
    """
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SetupError(
            'no CUDA device: run this on a machine with one, or give --device cpu and small --shapes'
        )
    if args.graph and args.device != 'cuda':
        raise SetupError('--graph needs a CUDA device')
    check_writable('--out', args.out, folder=True)
    if args.growth:
        return GROWTH
    return {name: parse_shape(name, SHAPES, 'B,H,N,K,V') for name in args.shapes or SHAPES}


def main() -> None:
    """Check, time, print, write."""
    args = parse_args()
    with one_line_errors():
        shapes = choose_shapes(args)
    bandwidth = copy_bandwidth(args.device)
    machine = machine_name(args.device)
    print(f'{machine}, torch {torch.__version__}, {args.dtype}, copy bandwidth {bandwidth / 1e12:.2f} TB/s')
    functions = candidates(args.backends, args.peers, args.dtype, args.device)
    report = {'machine': machine, 'torch': torch.__version__, 'dtype': args.dtype, 'bandwidth': bandwidth}
    report |= {'graph': args.graph, 'gates': args.gates, 'results': {}}
    results = report['results']
    args.out.mkdir(parents=True, exist_ok=True)
    for name, shape in shapes.items():
        results[name] = run(
            shape, DTYPES[args.dtype], args.device, functions, bandwidth, args.graph, args.gates
        )
        show(name, results[name])
        # After each shape, so that a run that is cut off has not been for nothing.
        (args.out / 'bigla.json').write_text(json.dumps(report, indent=1) + '\n')
        plot(results, args.out / 'bigla.png')
    print(f'\n{args.out / "bigla.json"}\n{args.out / "bigla.png"}')
    if any(row.get('wrong') for result in results.values() for row in result['rows']):
        sys.exit('some results are wrong: their times are not reported')


if __name__ == '__main__':
    main()
