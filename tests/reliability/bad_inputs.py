"""Bad inputs to every tool and public function: what they say.

    python tests/reliability/bad_inputs.py --out bad_inputs.json               # everything, some 20 minutes
    python tests/reliability/bad_inputs.py --only functions test.py --jobs 1   # a part

A tool passes when it ends with status 1 or 2 and its last line on stderr is an error of one line, without a
traceback. For functions see `bad_calls.py`. The table of (input, message) is written as JSON; what does not
pass is printed, and the exit status is 1 then.
"""

import argparse
import collections
import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bad_calls
import bad_files
from programs import run_tool

SECONDS = 120  # for one run; most take one or two
NUMBERS = ['abc', '', 'nan', '1.5', '-1', '0']
WORDS = 160  # of a message that are kept


def options(name: str, values: list, *others: str) -> Iterator[list[str]]:
    """A tool's arguments with each value of an option."""
    for value in values:
        yield [*others, name, *map(str, value if isinstance(value, list) else [value])]


def of_config(w: bad_files.Files) -> list[str]:
    """--cfg-options that are none, or make a config that cannot be built or run."""
    model, data, run = 'model.backbone', 'train_dataloader.dataset', 'train_cfg'
    texts = """
        a=1|train_cfg|=3|modle.type=A|model.type.name=A|train_pipeline.99.type=A|model.neck.in_channels.9=1
        model=None|model=3|model=[1]|model.type=Foo|model.type=None|model.type=3|model.type=torch.nn.ReLU
        {m}.type=Foo|{m}.type=mmvig.Foo|{m}.type=mmdet.Foo|{m}.type=foo.Foo|{m}.type=None|{m}=None|{m}=3
        {m}.foo=1|{m}.arch=huge|{m}.arch=None|{m}.arch.num_heads=[1,2,4,x]|{m}.arch.depths=[1,1]
        {m}.arch.embed_dims=33|{m}.arch.foo=1|{m}.out_indices=9|{m}.out_indices=x|{m}.in_channels=0
        {m}.in_channels=4|{m}.drop_path_rate=2|{m}.drop_path_rate=nan|{m}.frozen_stages=9|{m}.with_cp=maybe
        {m}.backend=cuda|{m}.cuda_graphs=-3|{m}.init_cfg=dict(type=Foo)|{m}.init_cfg=3|{m}.init_cfg=dict(a=1)
        {m}.init_cfg=dict(type=Pretrained)|{m}.init_cfg=dict(type=Pretrained,checkpoint=/no.pth)
        {m}.init_cfg=dict(type=Pretrained,checkpoint={f}/foreign.pth)|load_from={f}/foreign.pth
        {m}.init_cfg=dict(type=Pretrained,checkpoint={f}/empty.pth)|load_from={f}/empty.pth|load_from=/no.pth
        {m}.init_cfg=dict(type=Pretrained,checkpoint=http://127.0.0.1:9/a.pth)|load_from=http://127.0.0.1:9/a.pth
        {m}.init_cfg=dict(type=Pretrained,checkpoint={f}/good.pth,prefix=neck)|load_from={f}|load_from=3
        model.neck.type=Foo|model.neck.in_channels=[1,2,3,4]|model.neck.in_channels=[1,2]|model.neck.out_channels=x
        model.neck.num_outs=1|model.neck.foo=1|model.rpn_head.type=Foo|model.rpn_head.in_channels=7
        model.roi_head.bbox_head.num_classes=2|model.roi_head.bbox_head.num_classes=x|model.roi_head=None
        model.data_preprocessor.type=Foo|model.data_preprocessor.std=[0,0]
        model.train_cfg.rpn.assigner.type=Foo|model.train_cfg.rpn=None|model.test_cfg.rcnn.nms.type=foo
        train_dataloader=None|train_dataloader=3|train_dataloader.batch_size=0
        train_dataloader.batch_size=x|train_dataloader.num_workers=-1|train_dataloader.sampler.type=Foo
        train_dataloader.collate_fn.type=foo|train_dataloader.foo=1
        {d}.type=Foo|{d}.type=mmvig.Foo|{d}.foo=1|{d}.pipeline=[]|{d}.pipeline=None|{d}.pipeline.0.type=Foo
        {d}.pipeline.0.foo=1|{d}.pipeline.0=3|{d}.pipeline=[1]|{d}.pipeline.1.type=Resize|{d}.pipeline.2.scale=x
        {d}.type=CocoDataset|{d}.ann_file={f}/empty.json|{d}.ann_file=no.json|{d}.data_prefix.img=no
        {d}.metainfo.classes=[a,b]|{d}.metainfo=dict(classes=(cat,dog))|data_root=/proc/no|data_root=|data_root=a,b
        {c}.ann_file={f}/empty.json|{c}.ann_file={f}/list.json|{c}.ann_file={f}/garbage.json
        {c}.ann_file={f}/no_categories.json|{c}.ann_file={f}/other_classes.json|{c}.ann_file={f}/no_images.json
        {c}.ann_file={f}/missing_pictures.json|{c}.ann_file={f}/broken_boxes.json|{c}.ann_file=/no.json
        optim_wrapper=None|optim_wrapper.type=Foo|optim_wrapper.optimizer.type=Foo
        optim_wrapper.optimizer=None|optim_wrapper.optimizer.lr=x|optim_wrapper.optimizer.lr=-1
        optim_wrapper.optimizer.foo=1|optim_wrapper.clip_grad=3|optim_wrapper.constructor=Foo
        {l}.decay_rate=2|{l}.foo=1|optim_wrapper.accumulative_counts=0
        {r}=None|{r}.type=Foo|{r}.max_iters=0|{r}.max_iters=-1|{r}.max_iters=x|{r}.val_interval=0|{r}.foo=1
        param_scheduler=3|param_scheduler.0.type=Foo|param_scheduler.0.begin=x|param_scheduler.0.foo=1
        val_evaluator=None|val_evaluator.type=Foo|val_evaluator.metric=foo|val_evaluator.ann_file=/no.json
        val_evaluator.ann_file={f}/garbage.json|val_dataloader=None|val_dataloader.dataset.type=Foo|val_cfg=None
        default_hooks.logger.type=Foo|default_hooks.checkpoint.foo=1|default_hooks.checkpoint.interval=x
        default_hooks.foo=dict(type=Foo)|custom_hooks=[dict(type=Foo)]|custom_hooks=3|visualizer.type=Foo
        visualizer.vis_backends=[dict(type=Foo)]|log_processor.type=Foo|log_level=LOUD|env_cfg=None|env_cfg=3
        default_scope=foo|default_scope=3|randomness.seed=x|randomness.foo=1|launcher=foo|runner_type=Foo|resume=x
        custom_imports=3|auto_scale_lr=3|compile=3
        """
    coco = f'{data}.type=CocoDataset {data}'
    wrapper = 'optim_wrapper.constructor=mmvig.LayerDecayOptimWrapperConstructor'
    layers = f'{wrapper} optim_wrapper.paramwise_cfg'
    names = {'{m}': model, '{d}': data, '{r}': run, '{f}': str(w.folder), '{c}': coco, '{l}': layers}
    for name, value in names.items():
        texts = texts.replace(name, value)
    texts = [text.strip() for line in texts.strip().splitlines() for text in line.split('|')]
    return [text.split(' ', 1) for text in texts] + [
        ['a=[1'],
        ['a={1'],
        ['a=dict(1)'],
        ["a=['x"],
        ['a=1)', '(,'],
    ]


def arguments(w: bad_files.Files) -> Iterator[tuple[str, list]]:
    """Every tool with bad arguments."""
    config, good, image = w.detector, w.good, w.image
    for script, rest in {
        'train.py': [],
        'test.py': [good],
        'demo.py': [good, image],
        'export_onnx.py': ['--out', 'a.onnx'],
        'analysis/get_flops.py': [],
        'analysis/gate_maps.py': [good, image, '--out', 'a.png'],
        'analysis/effective_receptive_field.py': ['--out', 'a.png'],
        'benchmark/detector.py': ['--device', 'cpu', '--repeats', '2', '--peers', 'none'],
    }.items():
        yield from ((script, [bad, *rest]) for bad in w.configs)
        yield script, [config, *rest, '--foo']
    for script, before, after in (
        ('test.py', [config], []),
        ('demo.py', [config], [image]),
        ('publish_model.py', [], ['out.pth']),
        ('model_converters/official_to_mmvig.py', [], ['out.pth']),
        ('export_onnx.py', [config], ['--out', 'a.onnx', '--shape', '64', '64']),
        ('analysis/gate_maps.py', [config], [image, '--out', 'a.png']),
        ('analysis/effective_receptive_field.py', [config], ['--out', 'a.png', '--shape', '64', '64']),
    ):
        yield from ((script, [*before, bad, *after]) for bad in w.checkpoints)
    for bad in w.checkpoints:
        yield 'train.py', [config, '--resume', bad]
    for values in of_config(w):
        yield 'train.py', [config, '--cfg-options', *values]
    for changed in (
        'model.type=Foo',
        'model.backbone.foo=1',
        'test_dataloader=None',
        'test_evaluator=None',
    ):
        yield 'test.py', [config, good, '--cfg-options', changed]
    for key in (
        'type=Foo',
        'dataset.type=Foo',
        'dataset.pipeline.0.type=Foo',
        'dataset.foo=1',
        'batch_size=0',
    ):
        yield 'test.py', [config, good, '--cfg-options', f'test_dataloader.{key}']
    for key in (
        'metric=foo',
        'type=Foo',
        'ann_file=/no.json',
        f'ann_file={w.folder}/garbage.json',
        'foo=1',
    ):
        yield 'test.py', [config, good, '--cfg-options', f'test_evaluator.{key}']
    for script, rest in (('train.py', []), ('test.py', [good])):
        for values in options('--work-dir', [*w.unwritable, w.file]):
            yield script, [config, *rest, *values]
        for values in options('--launcher', ['foo', 'pytorch', 'slurm', 'mpi', '']):
            yield script, [config, *rest, *values]
    for values in options('--out', [*w.unwritable, w.folder, 'a.txt', '']):
        yield 'test.py', [config, good, *values]
        yield 'test.py', [w.segmentor, good, *values]
    for values in options('--wait-time', ['abc', 'nan', '-1', 'inf', '']):
        yield 'test.py', [config, good, *values]
    yield from (('test.py', [config, good, *more]) for more in (['--show'], ['--tta', '--out', 'a']))
    for values in options('--show-dir', [*w.unwritable, w.file]):
        yield 'test.py', [config, good, *values]
    yield from (
        ('train.py', [*more])
        for more in ([], [config, 'more'], [w.bare, '--auto-scale-lr'], [w.bare, '--amp'])
    )
    for bad in w.images:
        yield 'demo.py', [config, good, bad]
        yield 'analysis/gate_maps.py', [config, good, bad, '--out', 'a.png']
        yield 'analysis/effective_receptive_field.py', [config, '--images', bad, '--out', 'a.png']
    devices = ['gpu', 'cuda', 'cuda:9', 'cpu:7', '', 'meta', '3']
    outputs = [*w.unwritable, w.folder]
    for values in [
        *options('--device', devices),
        *options('--score-thr', ['abc', 'nan', '-1', '2', 'inf']),
    ]:
        yield 'demo.py', [config, good, image, *values]
    for values in [*options('--out-dir', [*w.unwritable, w.file]), *options('--palette', ['foo', ''])]:
        yield 'demo.py', [config, good, image, *values]
    yield 'demo.py', [w.segmentor, good, image, '--score-thr', '0.5']
    for out in outputs:
        yield 'publish_model.py', [good, out]
        yield 'model_converters/official_to_mmvig.py', [good, out]
    for values in options('--to', ['foo', '']):
        yield 'model_converters/official_to_mmvig.py', [good, 'out.pth', *values]
    shapes = [[a, b] for a, b in (('0', '64'), ('-1', '64'), ('abc', '64'), ('64', '1.5'), ('', '64'))]
    sizes = [*options('--shape', [*shapes, ['64'], ['64', '64', '64'], ['nan', 'nan']])]
    for values in [*options('--opset', [*NUMBERS, '3', '17', '999']), *sizes]:
        yield 'export_onnx.py', [config, '--backbone', '--out', 'a.onnx', *values]
    for values in options('--out', [*outputs, 'a.txt', '', 'a']):
        yield 'export_onnx.py', [config, *values]
        yield 'analysis/gate_maps.py', [config, good, image, *values]
        yield 'analysis/effective_receptive_field.py', [config, *values]
    for values in sizes:
        yield 'analysis/get_flops.py', [config, *values]
        yield 'analysis/gate_maps.py', [config, 'none', image, '--out', 'a.png', *values]
        yield 'analysis/effective_receptive_field.py', [config, '--out', 'a.png', *values]
    for values in [
        *options('--blocks', ['9.9', 'x', '-1', '', '0', '0.0.0', '1.5.']),
        *options('--heads', ['99', 'x', '-1', '1.5']),
        *options('--channels', ['999', 'x', '-1']),
        *options('--device', devices),
    ]:
        yield 'analysis/gate_maps.py', [config, 'none', image, '--out', 'a.png', *values]
    for values in [
        *options('--stage', ['9', '-9', 'x', '1.5']),
        *options('--noise', [*NUMBERS]),
        *options('--device', devices),
    ]:
        yield 'analysis/effective_receptive_field.py', [config, '--out', 'a.png', *values]
    for run in [w.folder, '/no', w.file, good, '']:
        yield 'analysis/plot_curves.py', [run]
    for values in [*options('--out', [*outputs, 'a.txt', '']), *options('--keys', ['foo', ''])]:
        yield 'analysis/plot_curves.py', [w.run, *values]
    for bad in w.scalars:
        yield 'analysis/plot_curves.py', [bad]
    yield from (('quickstart.py', ['--config', bad]) for bad in [*w.configs, w.segmentor])
    yield from (
        ('quickstart.py', values)
        for values in options('--work-dir', [*w.unwritable, w.file], '--config', str(config))
    )
    cpu = ['--device', 'cpu']
    for values in [
        *options('--models', ['foo', '']),
        *options('--shapes', ['64', '64x64', '64x64 b0', '60x64 b1', '0x0 b1', '-64x64 b1', '']),
        *options('--dtypes', ['fp8', '']),
        *options('--steps', ['foo']),
        *options('--backend', ['foo', '']),
        *options('--peers-from', ['foo']),
        *options('--compile', ['foo']),
        *options('--seconds', ['abc', 'nan', '0', '-1', 'inf', '']),
        *options('--out', [*w.unwritable, w.file]),
        *options('--device', ['foo', 'cuda']),
        ['--graph'],
        ['--eager'],
        ['--sweep', '--shapes', '64x64 b1'],
    ]:
        yield 'benchmark/backbone.py', [*cpu, '--quick', *values]
    for values in [
        *options('--repeats', [*NUMBERS, '1']),
        *options('--warm-up', NUMBERS),
        *options('--batch', NUMBERS),
        *options('--shape', [*shapes, ['64']]),
        *options('--precision', ['fp16', 'fp8']),
        *options('--peers', ['foo']),
        *options('--out', [*w.unwritable, w.file]),
        *options('--device', ['foo', 'cuda']),
    ]:
        yield 'benchmark/detector.py', [*cpu, config, *values]
    for script, given in (('benchmark/bigla.py', '1,1,64,16,16'), ('benchmark/fused.py', '1,2,2,32')):
        for values in [
            *options(
                '--shapes', ['1', '1,x,2,3,4,5', '0,1,64,16,16', '-1,2,2,32', '', 'foo', '1.5,2,2,32']
            ),
            *options('--dtype', ['fp8', '']),
            *options('--out', [*w.unwritable, w.file], '--shapes', given),
            *options('--device', ['foo', 'cuda']),
        ]:
            yield script, [*cpu, *values]
    for values in [*options('--backends', ['foo']), *options('--peers', ['foo']), ['--graph']]:
        yield 'benchmark/bigla.py', [*cpu, *values]
    yield from (('benchmark/fused.py', [*cpu, *values]) for values in options('--operators', ['foo', '']))


def run(script: str, words: list, scratch: Path) -> tuple[str, str]:
    """Run a tool in an empty folder: 'ok' or what is wrong, and its message."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    result = run_tool(script, *words, cwd=folder, timeout=SECONDS)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    message = lines[-1][:500] if lines else ''
    if result.returncode == 0:
        return 'accepted', message
    if result.returncode == -9:
        return 'too slow', message
    if 'Traceback' in result.stderr + result.stdout:
        return 'traceback', message
    if result.returncode not in (1, 2):
        return f'status {result.returncode}', message
    return ('ok' if 'error: ' in message else 'no message'), message


def table(only: list[str], jobs: int, step: int) -> Iterator[dict]:
    """Rows of all runs."""
    if not only or 'functions' in only:
        for call in bad_calls.calls():
            passed, message = bad_calls.outcome(call)
            value = call.value
            if isinstance(value, torch.Tensor):
                value = f'{value.dtype} {list(value.shape)} {value.device}'
            given = f'{call.argument}={str(value)[:WORDS]}'
            outcome = 'ok' if passed else message.partition(':')[0]
            yield {'subject': call.subject, 'input': given, 'outcome': outcome, 'message': message[:500]}
    scratch = Path(tempfile.mkdtemp(prefix='bad_inputs'))
    files = bad_files.prepare(scratch / 'files')
    cases = [(s, words) for s, words in arguments(files) if not only or s in only or Path(s).name in only]
    with ThreadPoolExecutor(jobs) as pool:
        cases = cases[::step]
        for (script, words), (outcome, message) in zip(
            cases, pool.map(lambda case: run(*case, scratch), cases), strict=True
        ):
            given = ' '.join(str(word) for word in words).replace(str(files.folder), 'FILES')
            yield {'subject': script, 'input': given, 'outcome': outcome, 'message': message}


def main() -> None:
    """Run all, write the table, print what does not pass."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--only', nargs='+', default=[], help="'functions', names of tools; default: all")
    parser.add_argument('--step', type=int, default=1, help='each n-th run of a tool; default: 1')
    parser.add_argument('--jobs', type=int, default=1, help='tools at a time; default: 1')
    parser.add_argument('--out', type=Path, help='JSON file of the table')
    args = parser.parse_args()
    rows = []
    for row in table(args.only, args.jobs, args.step):
        rows.append(row)
        if row['outcome'] != 'ok':
            print(
                f'{row["outcome"]} | {row["subject"]} {row["input"]} | {row["message"][-300:]}', flush=True
            )
    counts = collections.Counter((row['subject'], row['outcome']) for row in rows)
    for (subject, outcome), count in sorted(counts.items()):
        print(f'{subject:45}{outcome:15}{count:5}')
    bad = sum(row['outcome'] != 'ok' for row in rows)
    print(f'{len(rows)} runs, {bad} not refused in one line')
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + '\n')
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()
