"""Time packages of tools/export_aoti.py beside their model in PyTorch, eager and as a CUDA graph.

    python tools/export_aoti.py configs/classification/vigh_t_in1k.py --out t.pt2
    python tools/benchmark/aoti.py configs/classification/vigh_t_in1k.py t.pt2 --shapes 8,3,256,320

The config's model gets random weights, the package may have others: times do not depend on them. The three
take turns, call by call, so that they see the same clocks; a call waits for its result. Eager is without
CUDA graphs of the backbone's own; the graph holds the whole model, for one size. Writes aoti.json.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import export_aoti
import export_onnx
from common import Clock, machine, milliseconds, parse_shape, save, spread
from steps import capture

from mmvig.backbones.base import Backbone
from mmvig.cuda_graphs import CudaGraphs
from mmvig.engine import cli
from mmvig.engine.preflight import SetupError, check_file, check_writable, one_line_errors

SHAPES = ['1,3,224,224', '8,3,224,224', '128,3,224,224']
WARM_UP = 10  # calls of each before they count


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('package', help='what tools/export_aoti.py has made of it')
    parser.add_argument('--shapes', nargs='+', default=SHAPES, help='B,C,H,W each; default: %(default)s')
    parser.add_argument('--backbone', action='store_true', help="the config's backbone alone")
    parser.add_argument('--dtype', choices=export_aoti.DTYPES, default='bf16', help="the package's")
    parser.add_argument('--calls', type=int, default=50, help='of each; default: %(default)s')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of aoti.json')
    return parser.parse_args()


def take_turns(steps: dict[str, Callable], calls: int) -> dict[str, dict[str, float]]:
    """Seconds of a call that waits for its result: median, 10th and 90th percentile of each step."""
    clock, times = Clock('cuda'), {name: [] for name in steps}
    for number in range(WARM_UP + calls):
        for name, step in steps.items():
            first = clock.mark()
            step()
            last = clock.mark()
            clock.wait()
            if number >= WARM_UP:
                times[name].append(clock.seconds(first, last))
    return {name: spread(each) for name, each in times.items()}


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    with one_line_errors():
        if not torch.cuda.is_available():
            raise SetupError('no CUDA device: run this on a machine with one')
        if args.calls < 2:
            raise SetupError(f'--calls must be at least 2, got {args.calls}')
        check_file(args.package, 'package', 'make one with tools/export_aoti.py')
        check_writable('--out', args.out, folder=True)
        shapes = [parse_shape(text, {}, 'B,C,H,W') for text in args.shapes]
        cfg = cli.read_config_file(args.config)
        model = export_onnx.build(cfg, None, args.backbone, onnx=False).to('cuda')
    for module in model.modules():
        if isinstance(module, Backbone):
            module.graphs = CudaGraphs(0)
    model = export_aoti.Autocast(model, export_aoti.DTYPES[args.dtype])
    package = torch._inductor.aoti_load_package(args.package)
    report = {**machine('cuda'), 'config': args.config, 'dtype': args.dtype, 'rows': []}
    print(f'{report["machine"]}, torch {report["torch"]}, {args.config}, {args.dtype}, medians in ms')
    print(f'{"":20}' + ''.join(f'{name:>10}' for name in ('eager', 'graph', 'package')))
    with torch.no_grad():
        for shape in shapes:
            images = torch.randn(shape, device='cuda')
            steps = {'eager': lambda x=images: export_onnx.listed(model(x))}
            steps['graph'] = capture(steps['eager'])
            steps['package'] = lambda x=images: package(x)
            row = {'shape': shape, **take_turns(steps, args.calls)}
            report['rows'].append(row)
            times = ''.join(milliseconds(row[name]['median']) for name in steps)
            print(f'{" x ".join(map(str, shape)):20}{times}', flush=True)
            save(report, args.out / 'aoti.json')


if __name__ == '__main__':
    main()
