"""What the benchmarks share: the machine's name, clocks, medians, peak memory and reports."""

import gc
import importlib
import importlib.util
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from mmvig.engine.preflight import SetupError

DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}
MEGABYTE = 1e6


def machine_name(device: str) -> str:
    """The GPU's or the processor's name."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def machine(device: str, packages: tuple[str, ...] = ()) -> dict:
    """What times depend on: hardware, versions of torch, Triton and ``packages``, and settings of torch."""
    versions = {name: version(name) for name in ('torch', 'triton', *packages)}
    return {
        'machine': machine_name(device),
        'device': device,
        'python': platform.python_version(),
        **versions,
        'cudnn_benchmark': torch.backends.cudnn.benchmark,
        'tf32': torch.backends.cuda.matmul.allow_tf32,
    }


def version(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.import_module(package).__version__


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """Mixed precision in one of :data:`DTYPES`; none for 'fp32'."""
    return nullcontext() if dtype == 'fp32' else torch.autocast(device, dtype=DTYPES[dtype])


class Clock:
    """Marks in a device's time: CUDA events on the current stream, on a CPU the host's clock."""

    def __init__(self, device: str):
        self.cuda = device == 'cuda'

    def mark(self) -> 'torch.cuda.Event | float':
        """The moment at which the device will have done all work given to it so far."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: 'torch.cuda.Event | float', last: 'torch.cuda.Event | float') -> float:
        """Seconds between two marks; on a GPU after :meth:`wait`."""
        return first.elapsed_time(last) / 1e3 if self.cuda else last - first

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()


def spread(times: list[float]) -> dict[str, float]:
    """Median, and the 10th and 90th percentile."""
    tenths = statistics.quantiles(times, n=10, method='inclusive')
    return {'median': statistics.median(times), 'p10': tenths[0], 'p90': tenths[-1]}


def warm_up(step: Callable[[], object], device: str, seconds: float) -> float:
    """Call a step at least twice and for ``seconds``; return the last call's seconds.

    The first call compiles kernels and lets cuDNN choose; a GPU also needs a while to raise its clocks.
    """
    clock = Clock(device)
    start = time.perf_counter()
    calls = 0
    while calls < 2 or time.perf_counter() - start < seconds:
        clock.wait()
        before = time.perf_counter()
        step()
        clock.wait()
        last = time.perf_counter() - before
        calls += 1
    return last


def measure(step: Callable[[], object], device: str, seconds: float) -> dict[str, float]:
    """Time a step after warming it up, spending about ``seconds`` on each of three measurements at most.

    Returns:
        In seconds: ``median``, ``p10``, ``p90`` of calls given to the device one after the other without
        waiting, which is what throughput follows from; ``latency``, the median of calls that wait for their
        result; ``host``, the median time until such a call returns. Where ``host`` is close to ``latency``,
        the host's launches are the limit, not the device. And ``repeats``.
    """
    clock = Clock(device)
    estimate = warm_up(step, device, seconds / 2)
    repeats = min(max(int(seconds / estimate), 3), 200)
    marks = [clock.mark()]
    for _ in range(repeats):
        step()
        marks.append(clock.mark())
    clock.wait()
    times = [clock.seconds(*pair) for pair in itertools.pairwise(marks)]
    latencies, hosts = [], []
    for _ in range(min(repeats, 20) if clock.cuda else 0):
        before = time.perf_counter()
        step()
        hosts.append(time.perf_counter() - before)
        clock.wait()
        latencies.append(time.perf_counter() - before)
    result = spread(times)
    # A CPU's calls return with their result.
    result['latency'] = statistics.median(latencies or times)
    result['host'] = statistics.median(hosts or times)
    return {**result, 'repeats': repeats}


def kernel_time(function: Callable[[], object], device: str, graph: bool = False) -> float:
    """Median seconds of a call: with the L2 cache flushed before each, or of replays of a CUDA graph."""
    if device == 'cuda':
        from triton.testing import do_bench, do_bench_cudagraph

        if graph:
            return do_bench_cudagraph(function, rep=50, return_mode='median') / 1e3
        return do_bench(function, warmup=25, rep=150, return_mode='median') / 1e3
    return Timer('function()', globals={'function': function}).blocked_autorange(min_run_time=0.05).median


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a large copy, the median of three measurements."""
    source = torch.ones(2**30 if device == 'cuda' else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [kernel_time(lambda: target.copy_(source), device) for _ in range(3)]
    return 2 * source.nbytes / statistics.median(times)


def peak_memory(step: Callable[[], object], device: str) -> int | None:
    """Bytes allocated at most during a call, weights and inputs included; None on a CPU."""
    if device != 'cuda':
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def release(device: str) -> None:
    """Give back the memory of what is no longer referred to."""
    gc.collect()
    if device == 'cuda':
        torch.cuda.empty_cache()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value."""
    expected = expected.double()
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def save(report: dict, path: Path) -> None:
    """Write a report; a run that is cut off leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix('.tmp')
    draft.write_text(json.dumps(report, indent=1) + '\n')
    draft.replace(path)


def parse_shape(text: str, named: dict[str, tuple[int, ...]], sizes: str) -> tuple[int, ...]:
    """A named shape, or as many numbers as ``sizes``, such as 'B,H,W,C', names.

    Raises:
        SetupError: It is neither.
    """
    if text in named:
        return named[text]
    words = [word.strip() for word in text.split(',')]
    shape = tuple(int(word) if word.isascii() and word.isdigit() else 0 for word in words)
    if len(shape) != len(sizes.split(',')) or min(shape) < 1:
        raise SetupError(f'--shapes: a shape must be {sizes} or one of {list(named)}, got {text!r}')
    return shape


def milliseconds(seconds: float) -> str:
    """Seconds as text in milliseconds, ten wide."""
    return f'{seconds * 1e3:10.3f}'


def megabytes(size: int) -> str:
    """Bytes as text in megabytes."""
    return f'{size / MEGABYTE:7.0f} MB'
