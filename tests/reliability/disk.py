"""Training runs whose disk fills up or cannot be written to, then resumed: is anything lost?

    python tests/reliability/disk.py --sizes 12 --aimed 16 --read-only 2

The runs are those of kills.py, with their work dir on a small tmpfs of its own. `--sizes` makes the disk
too small for the whole run, `--aimed` fills it within a checkpoint, a best file, the pointer or the log,
and `--read-only` makes it read-only before a run is resumed. Each run must end with one line on stderr
and a status that is not 0, and leave its earlier checkpoints whole and no part of a file. With room made,
`--resume auto` must then lose nothing, as kills.py says. Exits with 1 on any failure, and with 2 where no
disk can be mounted: that takes root, or `unshare --map-root-user --mount` before the command.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kills
from kills import Failed

PAGE = os.sysconf('SC_PAGE_SIZE')
LARGE = 2**26
FILES = (*kills.KINDS, 'log')


def mount(disk: Path, options: str) -> None:
    """Mount a tmpfs in a folder, or change the one there.

    Raises:
        SystemExit: It cannot be mounted.
    """
    words = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(disk)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f'{" ".join(words)}: {done.stderr.strip()}', file=sys.stderr)
        sys.exit(2)


@contextmanager
def mounted(disk: Path, size: int) -> Iterator[Path]:
    """A disk of some bytes, at least a page, in a new folder."""
    disk.mkdir()
    mount(disk, f'size={size}')
    try:
        yield disk
    finally:
        subprocess.run(['umount', '--lazy', str(disk)], check=True)


def used(disk: Path) -> int:
    """The bytes that the files on a disk take."""
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@dataclass
class Fill:
    """Where a run finds its disk full: at its ``number``th writing of a kind of file, but for some room."""

    disk: Path
    kind: str
    number: int
    room: int  # bytes

    def take(self) -> None:
        """Let this process take the room from its disk."""
        write, emit, seen = Path.open, logging.FileHandler.emit, 0

        def is_it(kind: str) -> bool:
            nonlocal seen
            seen += kind == self.kind
            return kind == self.kind and seen == self.number

        def filling_open(path: Path, mode: str = 'r', *arguments, **options):
            if mode == 'xb' and is_it(kills._kind(path.name)):
                mount(self.disk, f'remount,size={used(self.disk) + self.room}')
            return write(path, mode, *arguments, **options)

        def filling_emit(handler: logging.FileHandler, record: logging.LogRecord) -> None:
            if '(train)' in record.getMessage() and is_it('log'):
                mount(self.disk, f'remount,size={used(self.disk) + self.room}')
                record.msg += '.' * 2 * PAGE  # more than what is left of the file's last page
            emit(handler, record)

        Path.open, logging.FileHandler.emit = filling_open, filling_emit


def in_short(ended: kills.Ended) -> str:
    """What a run wrote to stderr, without the warnings of the libraries."""
    return re.sub(r'^.*Warning: .*\n(?:  .*\n)?', '', ended.errors, flags=re.MULTILINE).strip()


def check_stopped(run: Path, ended: kills.Ended) -> int:
    """Check what a run said and left; return the iteration of its last whole checkpoint."""
    if ended.status not in (1, 2):
        raise Failed(f'status {ended.status}')
    said = in_short(ended)
    if not said.startswith('error: ') or '\n' in said:
        raise Failed(f'said {said!r}')
    if parts := [path.name for path in run.glob('.*') if path.name != '.lock']:
        raise Failed(f'left {parts}')
    return kills.check_left(run, ended)


def contents(run: Path) -> dict[str, bytes]:
    """The files of a run."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob('*') if path.is_file()}


class Disks(kills.Harness):
    """The harness of kills.py, with disks that fail."""

    def resumed(self, run: Path, config: Path, reference: Path, left: int) -> None:
        """Make room and let a run end."""
        mount(run.parent, f'remount,rw,size={LARGE}')
        kills.check_resumed(run, kills.train(config, run, '--resume', 'auto'), left, reference)

    def too_small(self, number: int) -> str:
        """Train on a disk that is too small for what the whole run leaves."""
        config, reference = self.config(number, keep=1)
        needed = sum(len(content) // PAGE + 1 for content in contents(reference).values())
        pages = number // 2 + 1 if number < 6 else self.numbers.randrange(needed)  # the smallest, then any
        with mounted(self.folder / f'disk_{number}', max(pages, 1) * PAGE) as disk:
            run = disk / 'run'
            ended = kills.train(config, run)
            left = check_stopped(run, ended)
            self.resumed(run, config, reference, left)
        return f'{config.stem}, {pages} of {needed} pages, continued from {left}: {in_short(ended)}'

    def full_in_writing(self, number: int) -> str:
        """Fill the disk within the writing of each kind of file by turns."""
        config, reference = self.config(number // len(FILES), keep=1)
        kind = FILES[number % len(FILES)]
        size = next(reference.glob('best*' if kind == 'best' else '[ei]*_*.pth')).stat().st_size
        room = 0 if kind in ('pointer', 'log') else int(self.numbers.random() * size) // PAGE * PAGE
        with mounted(self.folder / f'full_{number}', LARGE) as disk:
            run = disk / 'run'
            fill = Fill(disk, kind, self.numbers.randint(1, 4 if kind != 'best' else 1), room)
            ended = kills.train(config, run, aim=fill)
            left = check_stopped(run, ended)
            self.resumed(run, config, reference, left)
        how = f'{kind} {fill.number} with room for {room} bytes'
        return f'{config.stem}, {how}, continued from {left}: {in_short(ended)}'

    def read_only(self, number: int) -> str:
        """Resume a run that a full disk ended on a disk that has become read-only, then on a sound one."""
        config, reference = self.config(number, keep=1)
        with mounted(self.folder / f'read_only_{number}', LARGE) as disk:
            run = disk / 'run'
            left = check_stopped(run, kills.train(config, run, aim=Fill(disk, 'checkpoint', 2, 0)))
            before = contents(run)
            mount(disk, 'remount,ro')
            ended = kills.train(config, run, '--resume', 'auto')
            if check_stopped(run, ended) != left or contents(run) != before:
                raise Failed('something changed')
            self.resumed(run, config, reference, left)
        return f'{config.stem}, continued from {left}: {in_short(ended)}'


def main() -> None:
    """Run as many as the command line asks for; print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--sizes', type=int, default=12, help='runs on a disk that is too small')
    parser.add_argument('--aimed', type=int, default=16, help='runs whose disk is full within a write')
    parser.add_argument('--read-only', type=int, default=2, help='runs whose disk becomes read-only')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with mounted(Path(folder, 'trial'), PAGE):  # before anything takes long
            pass
        harness = Disks(Path(folder), list(kills.CONFIGS), args.seed)
        harness.many('full_in_writing', args.aimed)
        harness.many('too_small', args.sizes)
        harness.many('read_only', args.read_only)
    harness.report()


if __name__ == '__main__':
    main()
