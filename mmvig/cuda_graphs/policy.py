"""Which passes of a module become CUDA graphs, and when: an upper bound, and only what comes often."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmvig.cuda_graphs.capture import Graph, State, autocast_dtype, tensors_of
from mmvig.cuda_graphs.memory import Pool
from mmvig.ops.plain import PLAIN_TENSORS, has_saved_tensors_hooks, is_watched, leaves_no_trace
from mmvig.ops.torch_private import is_in_backward_pass

CALLS = 2  # the call with a kind of input that captures: it takes as long as one or two eager ones
MOST_CALLS = 64  # the same after captures in vain
WORTH = 8  # replays for which a capture was worth its time
MOST = 256  # graphs that 'auto' holds; one of ViG-H-S takes 3 MB of the GPU besides, and 9 MB of the host
AGE = 4096  # passes after which earlier ones count half
TRIAL = 64  # passes after which we ask whether graphs replay most of them


class CudaGraphs:
    """The graphs of one module, one for each kind of input; a copied or unpickled one starts with none.

    A kind is shape, dtype, training mode, whether gradients are recorded and inputs get one, autocast's
    dtype, PyTorch's settings of precision, the caller's settings, and device, thread and stream. A kind is
    captured when it comes for the :data:`CALLS`-th time, and replayed from then on. All graphs of a thread
    and stream share one pool of memory, as large as the largest needs, and with those of other modules what
    their backward passes take. If there are as many as there may be, the one that is used least goes, once
    another kind comes twice as often. Where captures turn out to be in vain, kinds must come more often.
    With 'auto', all graphs go while memory is short, and there are none from a capture on that fails, which
    is logged. Any other call runs as without graphs, and so does

    - one before the backward pass of the last replay, unless the outputs of that are gone;
    - one with hooks on submodules or of saved tensors, in anomaly mode, on a CPU, in torch.compile, a
      tracer, torch.func or another capture. In a backward pass nothing is captured.

    Where DropPath's rates have changed, or parameters have moved, been replaced or frozen, a graph is
    dropped, and made anew after as many calls. Changed values are seen. DropPath draws as without graphs.
    Outputs and gradients are the caller's own memory; gradients of all parameters are views of one buffer.
    A second backward pass through the outputs of a replay, or one that does not use all of them, recomputes
    them, and the kind gets no graph again. DDP sends the gradients of all parameters when the module's
    backward pass is launched. FSDP's parameters are never captured.

    Args:
        limit: the most graphs, 0 for none, or 'auto' for as many as pay, :data:`MOST` at most.
        with_cp: whether the module recomputes parts in the backward pass, which no graph can.

    Attributes:
        counts: how often each size of the first input was met: ``counts[size, outcome]`` with outcomes
            'replay', 'capture' (which includes its first replay) and 'eager'.

    Raises:
        ValueError: the limit is neither 'auto' nor an int of at least 0, or is a number of graphs and
            meets ``with_cp``.
    """

    def __init__(self, limit: int | str, with_cp: bool = False):
        if limit != 'auto' and (type(limit) is not int or limit < 0):
            raise ValueError(f"cuda_graphs must be 'auto' or an int of at least 0, got {limit!r}")
        if limit == 'auto' and with_cp:
            limit = 0
        if limit and with_cp:
            raise ValueError(
                'cuda_graphs and with_cp exclude each other: blocks are not recomputed in a graph'
            )
        self.limit = limit
        self.counts: Counter = Counter()
        self._graphs: dict[tuple, Graph] = {}
        self._calls: Counter = Counter()  # by kind
        self._have_run: dict[tuple, tuple] = {}  # by kind: of a pass with its gradients
        self._patience = CALLS
        self._age = 0
        self._refused: set[tuple] = set()

    def __reduce__(self):
        return CudaGraphs, (self.limit,)

    def outcomes(self) -> Counter:
        """How many passes were a 'replay', a 'capture' and 'eager', of those that could have a graph."""
        total: Counter = Counter()
        for (_, outcome), count in self.counts.items():
            total[outcome] += count
        return total

    def run(
        self,
        module: nn.Module,
        call: Callable,
        *inputs,
        settings: tuple = (),
        lean: Callable | None = None,
    ):
        """``call(*inputs)``, replayed where that gives the same.

        Args:
            module: what ``call`` takes its parameters from.
            call: a function of tensors alone, nested in tuples and lists, and of the module; so are its
                outputs.
            inputs: its arguments.
            settings: what else ``call`` depends on, hashable. Default: nothing.
            lean: gives the same as ``call`` in less memory but more time, for eager passes while graphs
                hold their memory: the first :data:`TRIAL` passes, and then as long as most have been
                replayed. It may call submodules twice, so not where that could be seen. Default: ``call``.
        """
        # The first two in this order: torch.compile must meet nothing else.
        if not self.limit or torch.compiler.is_compiling():
            return call(*inputs)
        tensors = list(tensors_of(inputs))
        if not tensors or not all(map(_is_plain, tensors)):
            return call(*inputs)
        kind = *_kind_of(module, tensors), settings
        size = tuple(tensors[0].shape)
        graph, outcome = self._graphs.get(kind), 'replay'
        is_watched = graph is not None and graph.state.is_watched()
        if graph is not None and not is_watched and (graph.is_refused or not graph.state.holds()):
            self._drop(kind)
            graph = None
        self._count(kind)
        if graph is None:
            graph, outcome = self._capture(kind, module, call, inputs, tensors), 'capture'
        if graph is None or is_watched or graph.pool.is_needed():
            self.counts[size, 'eager'] += 1
            may_repeat = lean is not None and self._replays_most() and leaves_no_trace(module)
            outputs = (lean if may_repeat else call)(*inputs)
            self._note_run(kind, module, tensors, outputs)
            return outputs
        self.counts[size, outcome] += 1
        graph.replays += 1
        return graph(module, call, tensors)

    def _replays_most(self) -> bool:
        """Whether there are graphs and, after the first passes, most passes have been replays."""
        return bool(self._graphs) and (self._age <= TRIAL or 2 * self.outcomes()['replay'] > self._age)

    def _note_run(self, kind: tuple, module: nn.Module, tensors: list[Tensor], outputs) -> None:
        """Note the details of an eager pass, once gradients have gone through all of its outputs."""
        if self._calls[kind] != self._patience - 1 or State.of(module) is None:  # the next may be captured
            return
        details = _details_of(module, tensors)
        nodes = {y.grad_fn for y in tensors_of(outputs) if y is not None and y.requires_grad}
        have_run, left = self._have_run, set(range(len(nodes)))
        if not nodes:
            have_run[kind] = details

        # It must hold no node, which holds it: memory of outputs would wait for the garbage collector.
        def note(i: int) -> None:
            left.discard(i)
            if not left:
                have_run[kind] = details

        if None not in nodes:  # a leaf has none
            for i, node in enumerate(nodes):
                node.register_hook(lambda *_, i=i: note(i))

    def _count(self, kind: tuple) -> None:
        self._calls[kind] += 1
        self._age += 1
        if self._age % AGE == 0:
            self._calls = Counter({kind: count // 2 for kind, count in self._calls.items() if count > 1})
            for other in self._have_run.keys() - self._calls.keys():
                del self._have_run[other]

    def _capture(
        self, kind: tuple, module: nn.Module, call: Callable, inputs: tuple, tensors: list[Tensor]
    ) -> 'Graph | None':
        """A new graph, if it is time for one."""
        if self.limit == 'auto' and self._graphs and not _has_room(tensors[0].device, self._pools()):
            for other in list(self._graphs):
                self._drop(other)
            return None
        if self._calls[kind] < self._patience or kind in self._refused:
            return None
        if is_in_backward_pass():  # its thread, which captures need, would wait for other threads' captures
            return None
        where = kind[0]
        pool = next((pool for pool in self._pools() if pool.where == where), None)
        if pool is not None and pool.is_needed():
            return None
        if len(self._graphs) >= (MOST if self.limit == 'auto' else self.limit):
            least = min(self._graphs, key=self._calls.__getitem__)
            if self._calls[kind] < 2 * self._calls[least]:
                return None
            calls = self._calls[least]
            self._drop(least)
            self._calls[least] = calls
            pool = next((pool for pool in self._pools() if pool.where == where), None)
        state = State.of(module)
        if state is None:
            return None
        try:
            pool = pool or Pool(where)
            has_run = self._have_run.get(kind) == _details_of(module, tensors)
            graph = Graph(module, call, inputs, tensors, state, pool, has_run)
        except RuntimeError as error:  # as where memory is short; nobody asked for graphs
            if self.limit != 'auto':
                raise
            self.limit = 0
            self._graphs.clear()
            message = f'cuda_graphs: none from here on, since a capture failed: {error}'
            print_log(message, 'current', logging.WARNING)
            return None
        self._graphs[kind] = graph
        return graph

    def _drop(self, kind: tuple) -> None:
        """Give up a graph; others take longer to come if it was of little use."""
        graph = self._graphs.pop(kind)
        self._calls[kind] = 0
        self._have_run.pop(kind, None)
        self._patience = CALLS if graph.replays >= WORTH else min(2 * self._patience, MOST_CALLS)
        if graph.is_refused:
            self._refused.add(kind)

    def _pools(self) -> set['Pool']:
        return {graph.pool for graph in self._graphs.values()}


def _is_plain(x: Tensor | None) -> bool:
    if (
        type(x) not in PLAIN_TENSORS
        or not x.is_cuda
        or not x.numel()
        or is_watched()
        or torch.cuda.is_current_stream_capturing()
    ):
        return False
    return not torch.is_grad_enabled() or not (torch.is_anomaly_enabled() or has_saved_tensors_hooks())


def _has_room(device: torch.device, pools: Iterable['Pool']) -> bool:
    """Whether passes without graphs find memory next to what graphs hold: twice as much as that."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused >= 2 * sum(pool.size for pool in pools)


def _kind_of(module: nn.Module, tensors: list[Tensor]) -> tuple:
    """What decides which graph a call can replay; first where it runs, whose graphs share a pool."""
    cudnn, device = torch.backends.cudnn, tensors[0].device
    return (
        (device, threading.get_ident(), torch.cuda.current_stream(device).cuda_stream),
        torch.is_grad_enabled(), *((x.shape, x.dtype, x.requires_grad) for x in tensors),
        module.training, autocast_dtype(),
        torch.are_deterministic_algorithms_enabled(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic,
        *_precisions(),
    )  # fmt: skip


def _details_of(module: nn.Module, tensors: list[Tensor]) -> tuple:
    """What besides the kind decides which kernels a pass and its gradients launch."""
    return [p.requires_grad for p in module.parameters()], [x.stride() for x in tensors]


def _precisions() -> tuple:
    """Whether products and convolutions in float32 take TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, 'fp32_precision'):  # PyTorch then refuses to read the older flags once these are set
        return matmul.fp32_precision, cudnn.conv.fp32_precision
    return matmul.allow_tf32, cudnn.allow_tf32
