"""Data workers and signals, with real processes."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import reductions
from torch.testing import assert_close
from torch.utils.data import DataLoader

from mmvig.engine.processes import SMALL, StopSignal, tie_workers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'reliability'))
import kills

FORK = multiprocessing.get_context('fork')


def init(worker_id: int) -> None:
    """A worker_init_fn of a user."""
    torch.manual_seed(worker_id + 40)


class Numbers(torch.utils.data.Dataset):
    """What a worker knows of itself."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([os.getpid(), torch.initial_seed()])


def work(pipe) -> None:
    """Be a run with two workers, until something ends it."""
    loader = tie_workers(DataLoader(Numbers(), num_workers=2, batch_size=1, worker_init_fn=init))
    batches = iter(loader)
    pipe.send([next(batches).tolist() for _ in range(2)])
    time.sleep(60)


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux ends them')
@pytest.mark.parametrize('by', [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_run(by):
    here, there = FORK.Pipe()
    process = FORK.Process(target=work, args=(there,))
    process.start()
    workers = [batch[0][0] for batch in here.recv()]
    assert len(set(workers)) == 2
    os.kill(workers[0], signal.SIGTERM)  # as a scheduler does, to all of a job
    time.sleep(0.1)
    assert all(map(kills._is_alive, workers))
    os.kill(process.pid, by)
    process.join()
    deadline = time.monotonic() + 60
    while any(map(kills._is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_loaders_own_worker_init_fn_is_called():
    loader = tie_workers(DataLoader(Numbers(), num_workers=2, batch_size=1, worker_init_fn=init))
    assert {batch[0, 1].item() for batch in loader} == {40, 41}


class Tensors(Numbers):
    """Small and large ones, of several kinds."""

    def __getitem__(self, index):
        many = torch.arange(SMALL)
        mixed = [
            torch.tensor(2.5),
            torch.zeros(0, 4),
            torch.ones(3, 2).T,
            torch.ones(2, dtype=torch.bfloat16),
        ]
        return [
            *mixed,
            many,
            many[:: SMALL // 4],
            torch.tensor([True]),
            torch.empty(2, dtype=torch.complex64),
        ]


def test_workers_send_tensors_as_they_are(monkeypatch):
    batches = iter(tie_workers(DataLoader(Tensors(), num_workers=1, batch_size=None)))
    files, rebuild = [], reductions.rebuild_storage_fd  # patched here alone, not in the worker
    monkeypatch.setattr(reductions, 'rebuild_storage_fd', lambda *args: files.append(1) or rebuild(*args))
    for sent, expected in zip(batches, map(Tensors().__getitem__, range(4)), strict=True):
        for x, y in zip(sent[:-1], expected[:-1], strict=True):
            assert x.dtype == y.dtype
            assert_close(x, y, rtol=0, atol=0)
        sent[0].add_(1)  # the caller's own
    assert len(files) == 4 * 2  # the large one, and the one that NumPy does not have


def ask_three_times(pipe) -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does, where a scheduler did it too
        pipe.send(stop.received)
        stop._since -= 10
        os.kill(os.getpid(), signal.SIGTERM)
        pipe.send('still here')


def test_a_sigterm_that_is_repeated_at_once_is_one_request_and_a_later_one_ends_the_process():
    here, there = FORK.Pipe()
    process = FORK.Process(target=ask_three_times, args=(there,))
    process.start()
    there.close()
    assert here.recv() is True
    with pytest.raises(EOFError):
        here.recv()
    process.join()
    assert process.exitcode == -signal.SIGTERM


def test_the_handler_before_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_killed_in_a_checkpoint_is_resumed_on_its_curve(tmp_path):
    kills.Harness(tmp_path, ['classifier'], seed=3).killed_in_writing(0)
