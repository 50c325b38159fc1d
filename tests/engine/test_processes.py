"""Data workers and signals, with real processes."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from mmvig.engine.processes import StopSignal, tie_workers

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
    deadline = time.monotonic() + 10
    while any(map(kills._is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_loaders_own_worker_init_fn_is_called():
    loader = tie_workers(DataLoader(Numbers(), num_workers=2, batch_size=1, worker_init_fn=init))
    assert {batch[0, 1].item() for batch in loader} == {40, 41}


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
