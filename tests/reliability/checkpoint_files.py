"""The files that `checkpoints.py` tries: sound, wrong, foreign, cut off and malicious ones."""

import os
import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import nn

from mmvig import checkpoints
from mmvig.backbones import ViG, ViGH

ARCH = dict(embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
# Paths, by what they need of a file. The converter takes official names alone.
BACKBONE = {'init_cfg of the backbone', 'export', 'gate maps', 'receptive field'}
NECK = {'init_cfg of the neck'}
WHOLE = {'init_cfg of the model', 'load_from', 'test', 'demo'}
TRAINING = {'resume FILE', 'resume auto'}
ALL = {*BACKBONE, *NECK, *WHOLE, *TRAINING, 'publish'}


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
