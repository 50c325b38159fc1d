"""Rename an official ViG or ViG-H checkpoint to this project's names, or back.

A classification model becomes a classifier of mmpretrain (`backbone.*`, `head.fc.*`), to be tested with
our configs; its last norm becomes the norm of the backbone's last output. A backbone becomes a backbone.
The way back gives the same names, shapes and values. Training needs none of this: `init_cfg` takes the
official files.
"""

import argparse
import io
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from mmvig import checkpoints
from mmvig.backbones import ViG, ViGH
from mmvig.engine import loading
from mmvig.engine.files import check_output, write_whole
from mmvig.engine.preflight import SetupError, one_line_errors

OUR_HEAD = 'head.fc'  # mmpretrain's LinearClsHead


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('input', metavar='IN', help='checkpoint file, or its URL')
    parser.add_argument('output', metavar='OUT', help='file to write')
    parser.add_argument(
        '--to', choices=['mmvig', 'official'], default='mmvig', help='names of OUT; default: %(default)s'
    )
    return parser.parse_args()


def name_patterns(names: list[str]) -> dict[str, str]:
    """Official module names and ours, # for a number, of the model that ``names`` of either kind are of."""
    family = ViG if any(name.endswith('pos_embed') for name in names) else ViGH
    # Both families begin with a stem of the same names on our side.
    patterns = {
        official: ours
        for official, ours in checkpoints.OFFICIAL_TO_OURS.items()
        if official.startswith(('blocks.', 'patch_embed.proj.')) == (family is ViG)
    }
    if family is ViG:
        patterns['pos_embed'] = 'pos_embed'
    units = [re.match(r'(?:backbone\.)?(?:layers|stages|blocks)\.(\d+)\.', name) for name in names]
    last_norm = f'norm{max((int(unit[1]) for unit in units if unit), default=0)}'
    if any(name.startswith((f'{family.official_head}.', f'{OUR_HEAD}.')) for name in names):
        patterns.pop('outnorm#', None)
        patterns[family.official_norm] = last_norm
        patterns = {official: f'backbone.{ours}' for official, ours in patterns.items()}
        patterns[family.official_head] = OUR_HEAD
    elif family is ViG:
        patterns[family.official_norm] = last_norm
    return patterns


def rename(state_dict: dict, patterns: dict[str, str], problem: str) -> dict:
    """Rename all of a state dict by patterns of module names.

    Raises:
        SetupError: ``problem``, and which parameter fits no pattern, or which pattern no parameter.
    """
    rules = {
        old: (re.compile(re.escape(old).replace(r'\#', r'(\d+)') + r'(\.weight|\.bias)?'), f'{new}#')
        for old, new in patterns.items()
    }
    renamed, unknown, unused = {}, [], set(rules)
    for name, value in state_dict.items():
        for old, (pattern, new) in rules.items():
            if match := pattern.fullmatch(name):
                parts = iter(match.groups(default=''))
                renamed[re.sub('#', lambda _, parts=parts: next(parts), new)] = value
                unused.discard(old)
                break
        else:
            unknown.append(name)
    if unknown:
        others = f' and {len(unknown) - 1} more such parameters' if len(unknown) > 1 else ''
        raise SetupError(f'{problem}: unknown {unknown[0]!r}{others}')
    if unused:
        raise SetupError(f'{problem}: it lacks {min(unused)!r}')
    return renamed


def convert(path: str, to: str) -> dict:
    """What the output file holds for an input file.

    Raises:
        SetupError: The input is missing, cannot be read, or is no checkpoint of the expected kind.
    """
    try:
        state_dict = checkpoints.read(path, prefix='')  # the whole of it, unwrapped
    except (OSError, RuntimeError) as error:
        raise SetupError(str(error)) from error
    patterns = name_patterns(list(state_dict))
    if to == 'official':
        patterns = {ours: official for official, ours in patterns.items()}
    problem = f'{path} is no {"mmvig" if to == "official" else "official"} ViG or ViG-H checkpoint'
    renamed = rename(state_dict, patterns, problem)
    try:
        loading.check_shapes(state_dict if to == 'official' else renamed, path)
    except RuntimeError as error:
        raise SetupError(str(error)) from error
    return {'model': renamed} if to == 'official' else {'meta': {}, 'state_dict': renamed}


def main() -> None:
    """Convert a file and print where the result is."""
    with one_line_errors():
        args = parse_args()
        check_output(args.output, args.input)
        buffer = io.BytesIO()
        torch.save(convert(args.input, args.to), buffer)
        write_whole(args.output, buffer.getbuffer())
    print(args.output)


if __name__ == '__main__':
    main()
