"""Wrong, foreign, cut off and malicious checkpoint files through every path that reads one.

    python tests/reliability/checkpoints.py [--only WORD ...] [--table FILE]

Each of the files below goes to each of the paths in a process of its own. A run is wrong when it accepts a
file that it must refuse, refuses one that it must accept, ends in a traceback or runs the code in a file,
which would leave a mark. Prints a line for each wrong run and the counts; the exit status is 1 if any is.
"""

import argparse
import os
import pickle
import re
import runpy
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yapf.yapflib.yapf_api
from mmengine.config import Config
from programs import SETTINGS, TOOLS
from torch import nn

from mmvig import checkpoints
from mmvig.backbones import ViG, ViGH
from mmvig.datasets.shapes import ensure_shapes

ROOT = Path(__file__).resolve().parents[2]
ARCH = dict(embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
CONFIG = """
_base_ = [{base!r}]
data_root = {data!r}
data = dict(dataset=dict(data_root=data_root))
data.update(batch_size=1, num_workers=0, persistent_workers=False)
train_dataloader = data
val_dataloader = data
test_dataloader = data
train_cfg = dict(max_iters=1, val_interval=1000)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
arch = dict(_delete_=True, embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
channels = [32, 64, 128, 256]
model = dict(backbone=dict(arch=arch), neck=dict(in_channels=channels))
val_evaluator = dict(ann_file=data_root + '/annotations/instances_val.json')
test_evaluator = val_evaluator
"""


class Code:
    """What runs a program when it is unpickled."""

    def __init__(self, mark: Path, how: str = 'system'):
        self.mark, self.how = mark, how

    def __reduce__(self) -> tuple:
        """As ``pickle`` asks for it."""
        if self.how == 'eval':
            return eval, (f'open({str(self.mark)!r}, "w")',)
        return os.system, (f'touch {self.mark}',)


class Reach:
    """What asks for a method that is not its business."""

    def __reduce__(self) -> tuple:
        """As ``pickle`` asks for it."""
        return getattr, (nn.Module, '__init__')


# The paths: what is run with a file, in an empty folder. `{}` in an argument is the file.
TRAIN = ('train.py', 'small.py', '--work-dir', 'run')


def run_tool(script: str, *arguments: str, cwd: Path) -> CompletedProcess:
    """Run a program in tools/ in a fork of this process, which has imported what takes long."""
    words = [str(TOOLS / script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ('stdout', 'stderr')]
        child = os.fork()
        if not child:
            try:
                for number, path in enumerate(outputs, start=1):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
                os.chdir(cwd)
                os.environ.update(SETTINGS)
                sys.argv = words
                sys.path.insert(0, str(Path(words[0]).parent))
                runpy.run_path(words[0], run_name='__main__')
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:  # as the interpreter does
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return CompletedProcess(words, status, *(path.read_text(errors='replace') for path in outputs))


def preload() -> None:
    """Import what the tools do, and leave configs unformatted in logs: that would be 70 % of a run."""
    import mmvig.compat  # noqa: F401, I001  before mmdet
    import matplotlib.pyplot  # noqa: F401
    import mmdet.apis  # noqa: F401
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    yapf.yapflib.yapf_api.FormatCode = lambda text, **_: (text, False)
    Config.fromfile(ROOT / 'configs/detection/maskrcnn_vigh_t_shapes_cpu.py')


def through(*words: str) -> Callable[[Path, Path], CompletedProcess]:
    """A path that is a command."""

    def run(file: Path, folder: Path) -> CompletedProcess:
        return run_tool(*(word.replace('{}', str(file)) for word in words), cwd=folder)

    return run


def resume_auto(file: Path, folder: Path) -> CompletedProcess:
    """Resume from a work dir whose one checkpoint the file is."""
    (folder / 'run').mkdir()
    copy = shutil.copytree if file.is_dir() else shutil.copyfile
    copy(file, folder / 'run/iter_1.pth')
    (folder / 'run/last_checkpoint').write_text(str(folder / 'run/iter_1.pth'))
    return run_tool(*TRAIN, '--resume', cwd=folder)


INIT = "=dict(type='Pretrained', checkpoint='{}'"
PATHS = {
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
TRAINING = {'resume FILE', 'resume auto'}
BACKBONE = {'init_cfg of the backbone', 'export', 'gate maps', 'receptive field'}
WHOLE = {'init_cfg of the model', 'load_from', 'test', 'demo'}
NECK = {'init_cfg of the neck'}
ALL = {*PATHS} - {'convert'}  # it takes official names alone


def official(arch: dict = ARCH) -> dict:
    """The state dict of an official ViG-H classifier of an arch, with values of its own."""
    ours = ViGH(arch, out_indices=(3,)).state_dict()
    theirs = {
        ours: official
        for official, ours in checkpoints.OFFICIAL_TO_OURS.items()
        if '.proj.' not in official
    }
    number = re.compile(r'(?<=stages\.)\d+|(?<=blocks\.)\d+')
    state_dict = {}
    for name, value in ours.items():
        module, _, leaf = name.rpartition('.')
        parts = iter(number.findall(module))
        pattern = theirs.get(number.sub('#', module), 'classifier.norm')
        state_dict[re.sub('#', lambda _, parts=parts: next(parts), pattern) + f'.{leaf}'] = value
    width = len(state_dict['classifier.norm.weight'])
    return {
        **state_dict,
        'classifier.head.weight': torch.zeros(5, width),
        'classifier.head.bias': torch.zeros(5),
    }


def write_files(folder: Path, good: Path, mark: Path) -> dict[str, tuple[Path, set[str]]]:
    """Write every kind of file: its name, the file, and the paths that must accept it (others refuse)."""
    files = {}
    content = torch.load(good, weights_only=False)
    weights = content['state_dict']
    data = good.read_bytes()

    def add(name: str, what: object, accepted: set[str] = frozenset(), legacy: bool = False) -> None:
        path = folder / f'{re.sub("[^a-z0-9]+", "_", name.lower())}.pth'
        if isinstance(what, bytes):
            path.write_bytes(what)
        else:
            torch.save(what, path, _use_new_zipfile_serialization=not legacy)
        files[name] = path, accepted

    def with_weights(**changes: object) -> dict:
        return {**content, 'state_dict': {**weights, **changes}}

    first = 'backbone.stem.down1.conv.weight'
    names = iter(weights)
    add('good', content, ALL)
    add('good, legacy format', content, ALL - TRAINING, legacy=True)
    add(
        'good, in DDP',
        {**content, 'state_dict': {f'module.{k}': v for k, v in weights.items()}},
        ALL - TRAINING,
    )
    add('code in state_dict', {**content, 'state_dict': Code(mark)})
    add('code in state_dict, legacy', {**content, 'state_dict': Code(mark)}, legacy=True)
    add('code alone, pickle', pickle.dumps(Code(mark), protocol=2))
    add('code alone, pickle 4', pickle.dumps(Code(mark), protocol=4))
    add('code in meta', {**content, 'meta': {**content['meta'], 'x': Code(mark)}})
    add('code in message_hub', {**content, 'message_hub': Code(mark)})
    add('code in optimizer', {**content, 'optimizer': Code(mark)})
    add('eval in a key', {**content, 'extra': Code(mark, 'eval')})
    add('methods of others', {**content, 'extra': Reach()})
    program = f'import os\nos.system("touch {mark}")\nmodel = dict()\n'
    add('code in meta.config', {**content, 'meta': {**content['meta'], 'config': program}}, ALL)
    add('code in meta.cfg', {**content, 'meta': {**content['meta'], 'cfg': program}}, ALL)
    add('module, not weights', nn.Linear(1, 1))
    for part in (0, 1, 30, 0.1, 0.5, 0.9, -30, -1):
        end = int(len(data) * part) if isinstance(part, float) else part if part >= 0 else len(data) + part
        add(f'cut after {end} of {len(data)}', data[:end])
    legacy = (folder / 'good_legacy_format.pth').read_bytes()
    add('cut, legacy', legacy[: len(legacy) // 2])
    add('HTML', b'<!DOCTYPE html><html><body>404 Not Found</body></html>')
    add('text', b'hello\n' * 100)
    with zipfile.ZipFile(folder / 'zip.pth', 'w') as file:
        file.writestr('weights/a.txt', 'hello')
    files['zip of other things'] = folder / 'zip.pth', set()
    (folder / 'folder.pth').mkdir()
    files['folder'] = folder / 'folder.pth', set()
    files['missing'] = folder / 'missing.pth', set()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), folder / 'jit.pth')
    files['TorchScript'] = folder / 'jit.pth', set()
    add('list', [1, 2])
    add('tensor', torch.ones(2))
    add('empty dict', {})
    add('empty state_dict', {**content, 'state_dict': {}})
    add('int keys', {**content, 'state_dict': {**weights, 7: torch.ones(1)}})
    add('int keys alone', {0: torch.ones(1)})
    add('float values', with_weights(**{first: 1.0}))
    add('arrays for tensors', with_weights(**{first: weights[first].numpy()}))
    add('NaN', with_weights(**{first: weights[first] * float('nan')}))
    add('one inf', with_weights(**{'backbone.norm3.bias': weights['backbone.norm3.bias'] + float('inf')}))
    add('NaN in bfloat16', with_weights(**{first: (weights[first] * float('nan')).bfloat16()}))
    wider = {**ARCH, 'embed_dims': 48, 'num_heads': [1, 2, 4, 8]}
    deeper = {**ARCH, 'depths': [1, 1, 2, 1]}
    for what, arch in (('wider', wider), ('deeper', deeper)):
        other = {f'backbone.{k}': v for k, v in ViGH(arch).state_dict().items()}
        rest = {k: v for k, v in weights.items() if not k.startswith('backbone.')}
        add(f'another arch, {what}', {**content, 'state_dict': {**other, **rest}}, NECK | {'publish'})
    bare = {k.removeprefix('backbone.'): v for k, v in weights.items() if k.startswith('backbone.')}
    start = {'load_from', 'init_cfg of the model', *BACKBONE}
    add('bare backbone', bare, start)
    add('official classifier', {'model': official()}, {*start, 'convert'})
    add('official classifier, wider', {'model': official(wider)}, {'convert'})
    add('official classifier, a float', {'model': {**official(), 'patch_embed.0.bias': 1.0}})
    wrong = {**official(), 'layers.1.blocks.0.op.g_proj.weight': torch.zeros(3, 3)}
    add('official classifier, a wrong shape', {'model': wrong})
    add(
        'official classifier, NaN',
        {'model': {**official(), 'classifier.norm.bias': torch.full((256,), torch.nan)}},
    )
    ours = {'meta': {}, 'state_dict': {f'backbone.{k}': v for k, v in bare.items()}}
    ours['state_dict'] |= {'head.fc.weight': torch.zeros(5, 256), 'head.fc.bias': torch.zeros(5)}
    add("mmpretrain's classifier", ours, {*start, 'publish'})
    plain = {
        f'backbone.{k}': v for k, v in ViG(dict(embed_dims=32, depth=2, num_heads=2)).state_dict().items()
    }
    add('another family', {'meta': {}, 'state_dict': plain}, {'publish'})
    both = {'backbone.patch_embed.0.weight': weights[first] + 1}
    add('both names of a parameter', with_weights(**both), NECK)
    add('a wrong shape in the backbone', with_weights(**{first: weights[first].transpose(0, 1)}), NECK)
    neck = next(name for name in names if name.startswith('neck.'))
    add('a wrong shape in the neck', with_weights(**{neck: weights[neck][:, :1]}), BACKBONE | {'publish'})
    classes = {k: torch.zeros(81, *v.shape[1:]) for k, v in weights.items() if '.fc_cls.' in k}
    add('other classes', with_weights(**classes), {*start, *NECK, 'publish'})
    renamed = {k.replace('roi_head.', 'bbox_head.'): v for k, v in weights.items()}
    add('a foreign detector', {'meta': {}, 'state_dict': renamed}, BACKBONE | NECK | {'publish'})
    resnet = {f'layer{i}.0.conv1.weight': torch.zeros(2, 2, 1, 1) for i in range(1, 5)}
    add('a ResNet', resnet)
    add(
        'a ResNet in a detector',
        {'meta': {}, 'state_dict': {f'backbone.{k}': v for k, v in resnet.items()}},
        {'publish'},
    )
    half = {k: v for k, v in weights.items() if not k.startswith('rpn_head.')}
    add('a part is missing', {**content, 'state_dict': half}, BACKBONE | NECK | {'publish'})
    add('published', {key: content[key] for key in ('meta', 'state_dict')}, ALL - TRAINING)
    return files


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
    """Make the data, the config and a good training checkpoint: the folder that runs start in, the file."""
    start = folder / 'start'
    start.mkdir()
    ensure_shapes(folder / 'shapes', num_train=2, num_val=1)
    base = ROOT / 'configs/detection/maskrcnn_vigh_t_shapes_cpu.py'
    (start / 'small.py').write_text(CONFIG.format(base=str(base), data=str(folder / 'shapes')))
    image = next((folder / 'shapes').rglob('*.jpg'), None) or next((folder / 'shapes').rglob('*.png'))
    shutil.copyfile(image, start / 'image.jpg')
    result = run_tool(*TRAIN[:2], '--work-dir', str(folder / 'good'), cwd=start)
    assert result.returncode == 0, result.stderr[-3000:]
    return start, folder / 'good/iter_1.pth'


def main() -> None:
    """Run all files through all paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--only', nargs='+', default=[], help='files or paths with one of these words')
    parser.add_argument('--table', type=Path, help='file for a line a run: file, path, status, message')
    args = parser.parse_args()
    preload()
    counts, lines = Counter(), []
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        mark = root / 'mark'
        start, good = prepare(root)
        (root / 'files').mkdir()
        for name, (file, accepting) in write_files(root / 'files', good, mark).items():
            for path, run in PATHS.items():
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
