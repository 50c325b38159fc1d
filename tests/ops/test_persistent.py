"""Where memory is made that outlives a call: test_cuda_graphs.py shows that Inductor's pool has none."""

import contextlib
import threading

import pytest
import torch

from mmvig.ops.persistent import persistent, persistent_cache

CPU, GPU = torch.device('cpu'), torch.device('cuda', 1)


@pytest.fixture
def seen(monkeypatch):
    """What is done with the GPU, which need not exist."""
    seen = []

    class Stream:
        def synchronize(self):
            seen.append((threading.get_ident(), 'synchronize'))

    @contextlib.contextmanager
    def use(device):
        seen.append((threading.get_ident(), device))
        yield
        seen.append((threading.get_ident(), 'left'))

    monkeypatch.setattr(torch.cuda, 'device', use)
    monkeypatch.setattr(torch.cuda, 'current_stream', Stream)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    return seen


def test_a_thread_of_its_own_makes_it_on_a_gpu(seen):
    def make():
        seen.append((threading.get_ident(), 'make'))
        return torch.ones(2)

    with torch.inference_mode():
        made = persistent(make, GPU)
    assert made.tolist() == [1, 1] and not made.is_inference()
    threads, steps = zip(*seen, strict=True)
    assert steps == (GPU, 'make', 'synchronize', 'left')
    assert len(set(threads)) == 1 and threading.get_ident() not in threads
    assert threads[0] not in [thread.ident for thread in threading.enumerate()]


def test_errors_arrive(seen):
    def make():
        raise torch.cuda.OutOfMemoryError('no memory')

    with pytest.raises(torch.cuda.OutOfMemoryError, match='no memory'):
        persistent(make, GPU)


def test_the_caller_makes_it_on_a_cpu():
    with torch.inference_mode():
        made, ident = persistent(lambda: (torch.ones(1), threading.get_ident()), CPU)
    assert ident == threading.get_ident() and not made.is_inference()


def test_kept_by_all_arguments_but_not_from_a_capture(seen, monkeypatch):
    calls = []

    @persistent_cache
    def make(device, size):
        calls.append((device, size, threading.get_ident()))
        return torch.ones(size)

    assert make(CPU, 2) is make(CPU, 2)
    assert make(GPU, 2) is make(GPU, 2) is not make(CPU, 2)
    assert make(GPU, 3) is not make(GPU, 2)
    assert [call[:2] for call in calls] == [(CPU, 2), (GPU, 2), (GPU, 3)]
    kept = make(GPU, 2)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    assert make(GPU, 2) is kept
    of_graph = make(GPU, 4)
    assert calls[-1] == (GPU, 4, threading.get_ident())
    assert make(GPU, 4) is not of_graph
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    later = make(GPU, 4)
    assert later is not of_graph and make(GPU, 4) is later


def test_the_first_to_be_ready_is_kept():
    """Where two threads make it at once: it may be in use."""
    made, seen = [], []

    @persistent_cache
    def make(device):
        mine = torch.ones(1)
        made.append(mine)
        if len(made) == 1:
            seen.append(make(device))  # as another thread meanwhile
        return mine

    assert make(CPU) is make(CPU) is seen[0] is made[1]
