"""Training runs of two processes that get SIGTERM, and two runs in one work dir: is anything lost?

    python tests/reliability/several.py --stopped 12 --second 4

The runs are those of kills.py. `--stopped` starts them by tools/dist_train.sh on two processes, and sends
SIGTERM by turns to the launcher, to either process, to all at once, and to both and then the launcher, as
schedulers do. Both processes must end with status 143, and `--resume auto` must then lose nothing.
`--second` starts another run in a run's work dir: it must end with one line and status 2, and the first
must lose nothing. Exits with 1 on any failure.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kills
from disk import contents, in_short
from kills import Failed
from programs import SETTINGS, TOOLS

TO = ('launcher', 'rank 0', 'rank 1', 'all', 'ranks, then launcher')


def processes_of(launcher: int) -> list[int]:
    """The processes that torchrun started, by rank."""
    ranks = {}
    for pid in kills._children(launcher):
        found = re.search(rb'(?:^|\0)RANK=(\d+)\0', Path(f'/proc/{pid}/environ').read_bytes())
        if found:
            ranks[int(found[1])] = pid
    return [ranks[rank] for rank in sorted(ranks)]


def train_in_two(
    config: Path, run: Path, *options: str, to: str | None = None, after: int = 1
) -> kills.Ended:
    """Train on two processes, and ask some of them to end after so many records of the log."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    words = ['bash', str(TOOLS / 'dist_train.sh'), str(config), '2', '--work-dir', str(run), *options]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ('stdout', 'stderr')]
        with outputs[0].open('w') as out, outputs[1].open('w') as err:
            env = {**os.environ, **SETTINGS, 'PORT': port}
            launcher = subprocess.Popen(words, cwd=config.parent, env=env, stdout=out, stderr=err)
        ranks: list[int] = []
        try:
            while to and launcher.poll() is None and sum(map(len, kills.records(run))) < after:
                time.sleep(0.05)
            if to and launcher.poll() is None:
                ranks = processes_of(launcher.pid)
                everyone = dict(zip(TO[1:3], ([rank] for rank in ranks), strict=True))
                everyone |= {'launcher': [], 'all': ranks, 'ranks, then launcher': ranks}
                for pid in everyone[to]:
                    os.kill(pid, signal.SIGTERM)
                if to == 'ranks, then launcher':
                    time.sleep(0.3)
                if not to.startswith('rank '):
                    launcher.send_signal(signal.SIGTERM)
            status = launcher.wait()
        finally:
            launcher.terminate()  # where this is interrupted
        said, errors = (path.read_text(errors='replace') for path in outputs)
        survivors = [pid for pid in ranks if kills._is_alive(pid)]
        return kills.Ended(status, said, errors, survivors, seconds=0.0)


class Several(kills.Harness):
    """The harness of kills.py, with two processes or two runs."""

    def in_two(self, number: int) -> tuple[Path, Path]:
        """A config and its undisturbed run on two processes, by turns."""
        config = kills.write_config(self.names[number % len(self.names)], self.folder, keep=2)
        # Statistics of BatchNorm are each process's own, and only rank 0's are saved.
        config.write_text(config.read_text().replace("type='BN'", "type='GN', num_groups=4"))
        run = self.folder / f'{config.stem}_in_two'
        if not run.exists():
            ended = train_in_two(config, run)
            if ended.status != 0:
                raise RuntimeError(ended.errors)
        return config, run

    def stopped_in_two(self, number: int) -> str:
        """Ask a run of two processes to end."""
        config, reference = self.in_two(number // len(TO))
        run, to = self.folder / f'stopped_{number}', TO[number % len(TO)]
        (logged,) = kills.records(reference)
        after = self.numbers.randint(1, len(logged) // 2)
        ended = train_in_two(config, run, to=to, after=after)
        if ended.said.count('SIGTERM ended this run') != 1 or ended.status == 0:
            raise Failed(f'status {ended.status}, said {ended.said[-500:]}, {ended.errors[-1500:]}')
        statuses = set(re.findall(r'exitcode *: (-?\d+)', ended.errors))  # torchrun's report
        if to.startswith('rank ') and statuses != {str(128 + signal.SIGTERM)}:
            raise Failed(f'statuses {statuses}')
        left = kills.check_left(run, ended)
        kills.check_resumed(run, train_in_two(config, run, '--resume', 'auto'), left, reference)
        return f'{config.stem}, SIGTERM to {to} after {after} records, continued from {left}'

    def second_run(self, number: int) -> str:
        """Start a run where another is at work."""
        config, reference = self.config(number, keep=1)
        run = self.folder / f'second_{number}'
        with ThreadPoolExecutor() as pool:
            first = pool.submit(kills.train, config, run)
            while not first.done() and not [*run.glob('*/vis_data/scalars.json')]:
                time.sleep(0.05)
            options = ['--resume', 'auto'] if number % 2 else []
            second = pool.submit(kills.train, config, run, *options).result()
            overlapped = not first.done()
        said = in_short(second)
        if not overlapped or second.status != 2 or 'another run is at work' not in said or '\n' in said:
            raise Failed(f'overlapped: {overlapped}, status {second.status}: {said}')
        kills.check_resumed(run, first.result(), 0, reference)
        if [name for name in contents(run) if name.startswith('.') and name != '.lock']:
            raise Failed('left parts')
        return f'{config.stem}: {said}'


def main() -> None:
    """Run as many as the command line asks for; print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--stopped', type=int, default=12, help='runs of two processes that get SIGTERM')
    parser.add_argument('--second', type=int, default=4, help='runs in whose work dir another one starts')
    parser.add_argument('--models', nargs='+', choices=kills.CONFIGS, default=list(kills.CONFIGS))
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        harness = Several(Path(folder), args.models, args.seed)
        harness.many('second_run', args.second)
        harness.many('stopped_in_two', args.stopped)
    harness.report()


if __name__ == '__main__':
    main()
