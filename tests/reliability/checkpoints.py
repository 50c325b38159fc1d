"""Wrong, foreign, cut off and malicious checkpoint files through every path that reads one.

    python tests/reliability/checkpoints.py [--programs] [--only WORD ...] [--table FILE]

Each of the files in checkpoint_files.py goes to each of the paths in a process of its own: to the part of
a program that reads it, or with --programs to whole programs. A run is wrong when it accepts a file that it
must refuse, refuses one that it must accept, ends in a traceback or runs the code in a file, which would
leave a mark. Prints a line for each wrong run and the counts; the exit status is 1 if any is.
"""

import argparse
import importlib.util
import os
import runpy
import shutil
import sys
import tempfile
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mmvig.compat  # noqa: F401, I001  before mmdet
import mmdet.apis  # noqa: F401  once for all runs
import yapf.yapflib.yapf_api
from programs import SETTINGS, TOOLS
from reliability.checkpoint_files import write_files
from small_configs import write_small

from mmvig.engine import cli, work_dir
from mmvig.engine.errors import said_in_one_line

READY = Namespace()  # what :func:`prepare` builds

# The paths: what is run with a file, in an empty folder. `{}` in an argument is the file.
TRAIN = ('train.py', 'small.py', '--work-dir', 'run')


def forked(work: Callable[[], object], cwd: Path) -> CompletedProcess:
    """Do something in a fork of this process, which has imported and built what takes long."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ('stdout', 'stderr')]
        child = os.fork()
        if not child:
            try:
                for number, path in enumerate(outputs, start=1):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
                os.chdir(cwd)
                work()
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:  # as the interpreter does
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return CompletedProcess([], status, *(path.read_text(errors='replace') for path in outputs))


def run_tool(script: str, *arguments: str, cwd: Path) -> CompletedProcess:
    """Run a program in tools/."""

    def program() -> None:
        sys.argv = [str(TOOLS / script), *map(str, arguments)]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name='__main__')

    return forked(program, cwd)


def within(work: Callable[[Path, Path], object]) -> Callable[[Path, Path], CompletedProcess]:
    """A path that is a part of a program: from reading the file until its weights are in the model."""

    def run(file: Path, folder: Path) -> CompletedProcess:
        def part() -> None:
            with said_in_one_line(READY.cfg):
                work(file, folder)

        return forked(part, folder)

    return run


def through(*words: str) -> Callable[[Path, Path], CompletedProcess]:
    """A path that is a command."""

    def run(file: Path, folder: Path) -> CompletedProcess:
        return run_tool(*(word.replace('{}', str(file)) for word in words), cwd=folder)

    return run


def put_into_work_dir(file: Path, folder: Path) -> None:
    """Make the file the one checkpoint of the work dir `run`."""
    (folder / 'run').mkdir()
    copy = shutil.copytree if file.is_dir() else shutil.copyfile
    if file.exists():
        copy(file, folder / 'run/iter_1.pth')
    (folder / 'run/last_checkpoint').write_text(str(folder / 'run/iter_1.pth'))


def resume_auto(file: Path, folder: Path) -> CompletedProcess:
    """Resume from such a work dir."""
    put_into_work_dir(file, folder)
    return run_tool(*TRAIN, '--resume', cwd=folder)


INIT = "=dict(type='Pretrained', checkpoint='{}'"
PROGRAMS = {
    'init_cfg of the backbone': through(*TRAIN, '--cfg-options', f'model.backbone.init_cfg{INIT})'),
    'init_cfg of the neck': through(*TRAIN, '--cfg-options', f"model.neck.init_cfg{INIT}, prefix='neck')"),
    'init_cfg of the model': through(*TRAIN, '--cfg-options', f'model.init_cfg{INIT})'),
    'load_from': through(*TRAIN, '--cfg-options', 'load_from={}'),
    'resume FILE': through(*TRAIN, '--resume', '{}'),
    'resume auto': resume_auto,
    'test': through('test.py', 'small.py', '{}', '--work-dir', 'run'),
    'demo': through('demo.py', 'small.py', '{}', 'image.jpg', '--out-dir', 'out'),
    'export': through(
        'export_onnx.py', 'small.py', '{}', '--backbone', '--out', 'out.pt2', '--shape', '64', '64'
    ),
    'gate maps': through('analysis/gate_maps.py', 'small.py', '{}', 'image.jpg', '--out', 'out.png'),
    'receptive field': through(
        *('analysis/effective_receptive_field.py', 'small.py', '{}', '--noise', '1'),
        *('--out', 'out.png', '--shape', '64', '64'),
    ),
    'publish': through('publish_model.py', '{}', 'published.pth'),
    'convert': through('model_converters/official_to_mmvig.py', '{}', 'converted.pth'),
}


def initialised(part: str) -> Callable[[Path, Path], None]:
    """The path of a part's init_cfg, 'model' for the whole."""

    def work(file: Path, _: Path) -> None:
        model = READY.runner.model
        prefix = dict(prefix='neck') if part == 'neck' else {}
        module = model if part == 'model' else getattr(model, part)
        module.init_cfg = dict(type='Pretrained', checkpoint=str(file), **prefix)
        READY.runner._init_model_weights()

    return work


def begin(file: Path, _: Path, resume: bool = False) -> None:
    """What `Runner.train` does before its first step, with load_from or resume."""
    if resume:
        work_dir.check_whole(str(file))
    READY.runner._load_from, READY.runner._resume = str(file), resume
    READY.runner.load_or_resume()


def begin_automatically(file: Path, folder: Path) -> None:
    """The same from a work dir whose one checkpoint the file is."""
    put_into_work_dir(file, folder)
    READY.cfg.work_dir = str(folder / 'run')
    READY.train.use_resume(READY.cfg, 'auto')
    begin(READY.cfg.load_from, folder, resume=READY.cfg.resume)


# The same as parts of the programs, of which a run takes a twentieth of the time.
PARTS = {
    **{f'init_cfg of the {part}': within(initialised(part)) for part in ('backbone', 'neck', 'model')},
    'load_from': within(begin),
    'resume FILE': within(partial(begin, resume=True)),
    'resume auto': within(begin_automatically),
    'test': within(lambda file, _: cli.load_strictly(READY.runner.model, str(file))),
    'demo': within(
        lambda file, _: READY.demo.build_model(READY.cfg, Namespace(checkpoint=str(file), device='cpu'))
    ),
    'export': within(lambda file, _: READY.export.build(READY.cfg, str(file), backbone=True)),
    'gate maps': within(lambda file, _: READY.inputs.load_backbone(READY.cfg, str(file))),
    'receptive field': within(lambda file, _: READY.inputs.load_backbone(READY.cfg, str(file))),
    'publish': PROGRAMS['publish'],
    'convert': PROGRAMS['convert'],
}


def judge(result: CompletedProcess, accepted: bool, mark: Path) -> str | None:
    """What is wrong with a run; None where nothing is."""
    if mark.exists():
        mark.unlink()
        return 'code ran'
    if 'Traceback' in result.stderr or result.returncode < 0:
        return 'traceback'
    if accepted:
        return None if result.returncode == 0 else 'refused'
    if result.returncode == 0:
        return 'accepted'
    errors = [line for line in result.stderr.splitlines() if line.startswith(('error: ', 'usage: '))]
    return None if len(errors) == 1 else 'no message of one line'


def prepare(folder: Path) -> tuple[Path, Path]:
    """Make the data, the config, a good training checkpoint and what PARTS need.

    Returns:
        The folder that runs start in, and the checkpoint.
    """
    start = folder / 'start'
    start.mkdir()
    detector, _ = write_small(folder, train=2, val=1, iterations=1, batch_size=1, val_interval=1000)
    detector.rename(start / 'small.py')
    image = next(path for path in (folder / 'shapes').rglob('*') if path.suffix in ('.jpg', '.png'))
    shutil.copyfile(image, start / 'image.jpg')
    result = run_tool(*TRAIN[:2], '--work-dir', str(folder / 'good'), cwd=start)
    assert result.returncode == 0, result.stderr[-3000:]
    sys.path.append(str(TOOLS / 'analysis'))
    for name in ('train', 'demo', 'export_onnx', 'analysis/inputs'):
        spec = importlib.util.spec_from_file_location(Path(name).stem, TOOLS / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        setattr(READY, Path(name).stem.removesuffix('_onnx'), module)
    sys.argv = ['train.py', str(start / 'small.py'), '--work-dir', str(folder / 'work')]
    READY.cfg = cli.load_config(READY.train.parse_args())
    READY.runner = cli.build_runner(READY.cfg)
    READY.runner._train_loop = READY.runner.build_train_loop(READY.runner._train_loop)
    return start, folder / 'good/iter_1.pth'


def main() -> None:
    """Run all files through all paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--only', nargs='+', default=[], help='files or paths with one of these words')
    parser.add_argument(
        '--programs', action='store_true', help='run whole programs, not the part that reads'
    )
    parser.add_argument('--table', type=Path, help='file for a line a run: file, path, status, message')
    args = parser.parse_args()
    os.environ.update(SETTINGS)
    # Configs are left as they are in logs: yapf's formatting would be 70 % of a run.
    yapf.yapflib.yapf_api.FormatCode = lambda text, **_: (text, False)
    paths = PROGRAMS if args.programs else PARTS
    counts, lines = Counter(), []
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        mark = root / 'mark'
        start, good = prepare(root)
        (root / 'files').mkdir()
        for name, (file, accepting) in write_files(root / 'files', good, mark).items():
            for path, run in paths.items():
                if args.only and not any(word in f'{name} {path}' for word in args.only):
                    continue
                folder = root / 'run'
                shutil.copytree(start, folder)
                result = run(file, folder)
                wrong = judge(result, path in accepting, mark)
                shutil.rmtree(folder)
                counts['runs'] += 1
                counts[wrong or ('accepted rightly' if result.returncode == 0 else 'refused rightly')] += 1
                said = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
                message = (
                    said[-1].replace(str(root), '') if said else result.stderr[-300:].replace('\n', ' | ')
                )
                lines.append(
                    f'{name} | {path} | {result.returncode} | {"" if result.returncode == 0 else message}'
                )
                if wrong:
                    print(f'{wrong}: {lines[-1]}', flush=True)
            if args.table:
                args.table.write_text('\n'.join(lines) + '\n')
    print(', '.join(f'{count} {what}' for what, count in counts.items()))
    wrong = ('code ran', 'traceback', 'accepted', 'refused', 'no message of one line')
    sys.exit(any(counts[what] for what in wrong))


if __name__ == '__main__':
    main()
