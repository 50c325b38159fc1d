"""A backbone's passes as CUDA graphs, which the host launches at once instead of kernel by kernel.

Not by ``torch.cuda.make_graphed_callables``: the gradients that it returns are overwritten by the next
replay, so that accumulated ones are wrong (pytorch/pytorch#181723); it cannot capture once DDP holds the
parameters; and where it takes no ``capture_error_mode``, its captures fail if another thread pins memory.
"""

import functools
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmvig.ops.choice import (
    PLAIN_TENSORS,
    has_global_hooks,
    has_hooks,
    has_own_forward,
    is_watched,
)

CALLS = 3  # the call with a kind of input that captures
CALLS_IN_A_ROW = 5  # with 'auto', and no other kind may come between
WORTH = 50  # replays for which a capture was worth its time
WARM_UPS = 3  # as many as PyTorch's own function runs before a capture
_capturing = threading.Lock()  # on one stream


class Graphs:
    """The graphs of one backbone, one for each kind of input; a copied or unpickled one starts with none.

    A kind is shape, dtype, training mode, whether gradients are recorded and the image gets one, autocast's
    dtype, PyTorch's settings of precision, and thread and stream. With a number, the first that many kinds
    that are called CALLS times are captured at the last of these calls and replayed from then on. With
    'auto', a kind that comes CALLS_IN_A_ROW times in a row is, one with and one without gradients at a
    time: a graph goes when another kind takes its place, or comes while memory is short. Nothing is
    captured so where several processes train, since DDP would send gradients later, or if it fails, which
    is logged. Any other call runs as without graphs, and so does

    - one before the backward pass of the last replay, unless the maps of that are gone;
    - one with hooks on submodules or of saved tensors, in anomaly mode, on a CPU, in torch.compile, a
      tracer, torch.func or another capture.

    Where DropPath's rates have changed, or parameters have moved, been replaced or frozen, a graph is
    dropped, and made anew after as many calls. Changed values are seen. DropPath draws as without graphs.
    Maps and gradients are the caller's own memory. A second backward pass through the maps of a replay, or
    one that does not use all of them, recomputes them, and the kind gets no graph again. FSDP may not wrap
    parts of a backbone that is given a number.

    Args:
        limit: the most kinds, 0 for no graphs, or 'auto'.
        with_cp: whether the backbone recomputes its blocks, which no graph can.

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
        self._graphs: dict[tuple, _Graph] = {}
        self._state: tuple | None = None
        self._calls: Counter = Counter()  # by kind of input, since the state is this one
        self._runs = _Run(), _Run()  # without and with gradients
        self._refused: set[tuple] = set()

    def __reduce__(self):
        return Graphs, (self.limit,)

    def run(self, backbone: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """``backbone._compute(x)``, replayed where that gives the same."""
        # The first two in this order: torch.compile must meet nothing else.
        if not self.limit or torch.compiler.is_compiling() or not _is_plain(x):
            return backbone._compute(x)
        if self.limit == 'auto' and _is_distributed():
            return backbone._compute(x)
        kind = _kind_of(backbone, x)
        graph = self._graphs.get(kind)
        if graph is not None and graph.is_refused:
            del self._graphs[kind]
            self._refused.add(kind)
        if kind in self._refused:
            return backbone._compute(x)
        graph = (self._of_run if self.limit == 'auto' else self._of_places)(backbone, x, kind)
        if graph is None or graph.is_needed():
            return backbone._compute(x)
        return graph(backbone, x)

    def _of_places(self, backbone: nn.Module, x: Tensor, kind: tuple) -> '_Graph | None':
        """A kind's graph where the number of graphs is given."""
        state = _state_of(backbone)
        if state is None:
            return None
        graph = self._graphs.get(kind)
        if graph is not None and graph.state != state:
            del self._graphs[kind]
            graph = None
        if graph is None and len(self._graphs) < self.limit:
            if state != self._state:
                self._state, self._calls = state, Counter()
            self._calls[kind] += 1
            if self._calls[kind] >= CALLS:
                graph = self._graphs[kind] = _Graph(backbone, x, state)
        return graph

    def _of_run(self, backbone: nn.Module, x: Tensor, kind: tuple) -> '_Graph | None':
        """A kind's graph with 'auto'."""
        run, graph = self._runs[kind[0]], self._graphs.get(kind)
        if kind != run.kind:
            run.kind, run.calls = kind, 0
            if graph is None and self._graphs and not _has_room(x.device, self._graphs.values()):
                self._drop(*self._graphs)
        run.calls += 1
        if graph is None and run.calls < run.patience - 1:
            return None
        state, before = _state_of(backbone), run.state
        if graph is not None and graph.state == state:
            graph.replays += 1
            return graph
        run.state = state
        if graph is not None:
            self._drop(kind)
            run.calls = 1
        elif run.calls >= run.patience and state is not None and state == before:
            self._drop(*[other for other in self._graphs if other[0] == kind[0]])
            try:
                graph = self._graphs[kind] = _Graph(backbone, x, state)
                return graph
            except RuntimeError as error:  # as where memory is short; nobody asked for graphs
                self.limit = 0
                message = f'cuda_graphs: none from here on, since a capture failed: {error}'
                print_log(message, 'current', logging.WARNING)
        return None

    def _drop(self, *kinds: tuple) -> None:
        """Give up graphs; the next takes longer to come if they were of little use."""
        for kind in kinds:
            run, graph = self._runs[kind[0]], self._graphs.pop(kind)
            run.patience = CALLS_IN_A_ROW if graph.replays >= WORTH else 2 * run.patience


@dataclass
class _Run:
    """Calls with one kind of input in a row."""

    kind: tuple | None = None
    calls: int = 0
    state: tuple | None = None  # after the last call but one that a capture takes
    patience: int = CALLS_IN_A_ROW


def _is_plain(x: Tensor) -> bool:
    if (
        type(x) not in PLAIN_TENSORS
        or not x.is_cuda
        or is_watched()
        or torch.cuda.is_current_stream_capturing()
    ):
        return False
    return not torch.is_grad_enabled() or not (torch.is_anomaly_enabled() or _has_saved_tensors_hooks())


def _has_saved_tensors_hooks() -> bool:
    """As of activation checkpointing."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks('there are some'):
            return False
    except RuntimeError:
        return True


def _is_distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _has_room(device: torch.device, graphs: Iterable['_Graph']) -> bool:
    """Whether passes without graphs find memory next to what graphs hold, for two as large as theirs."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused >= 3 * sum(graph.size for graph in graphs)


def _kind_of(backbone: nn.Module, x: Tensor) -> tuple:
    """What decides which graph a call can replay, whether gradients are recorded first."""
    cudnn = torch.backends.cudnn
    return (
        torch.is_grad_enabled(), x.shape, x.dtype, x.requires_grad, backbone.training, _autocast_dtype(),
        threading.get_ident(), torch.cuda.current_stream(x.device).cuda_stream,
        torch.are_deterministic_algorithms_enabled(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic,
        *_precisions(),
    )  # fmt: skip


def _precisions() -> tuple:
    """Whether products and convolutions in float32 take TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, 'fp32_precision'):  # PyTorch then refuses to read the older flags once these are set
        return matmul.fp32_precision, cudnn.conv.fp32_precision
    return matmul.allow_tf32, cudnn.allow_tf32


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None


def _state_of(backbone: nn.Module) -> tuple[list, list] | None:
    """What a graph holds of a backbone: its modules, and where parameters and buffers are.

    None if a replay would miss something: hooks of submodules or a ``forward`` of their own, subclasses of
    Tensor, or parameters that are elsewhere, as FSDP's.
    """
    if has_global_hooks():
        return None
    modules, tensors, rest = [], [], [backbone]
    while rest:
        module = rest.pop()
        if module is not backbone:  # its own hooks are called outside, and holding it would make a cycle
            if has_hooks(module) or has_own_forward(module):
                return None
            own = module.__dict__
            modules += module, module.training, own.get('rate'), own.get('eps')
        for members in (module._parameters, module._buffers):
            for tensor in members.values():
                if tensor is None:
                    continue
                if type(tensor) not in PLAIN_TENSORS:
                    return None
                tensors += id(tensor), tensor.data_ptr(), tensor.requires_grad
        rest += [child for child in module._modules.values() if child is not None]
    return (modules, tensors) if tensors else None


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps memory for each stream, for good."""
    return torch.cuda.Stream(device)


class _Body(nn.Module):
    """What is captured, as a module for ``torch.func.functional_call``."""

    def __init__(self, backbone: nn.Module, dtype: torch.dtype | None):
        super().__init__()
        self.backbone = backbone
        self.dtype = dtype

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # The cache would hand out a weight's cast of another pass.
        with torch.autocast('cuda', self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            return self.backbone._compute(x)


class _Graph:
    """The forward pass for one kind of input as a graph, and if anything is learned, the backward pass."""

    def __init__(self, backbone: nn.Module, x: Tensor, state: tuple):
        parameters = dict(backbone.named_parameters(prefix='backbone'))
        self.state = state
        self.learns = torch.is_grad_enabled() and any(p.requires_grad for p in (x, *parameters.values()))
        self.replays = 0
        self.is_refused = False  # a pass came that graphs cannot do
        self._autocast = _autocast_dtype()
        self._node: weakref.ref | None = None
        # Leaves of our own: those of the parameters may belong to a stream that takes no part in a capture.
        self._weights = {
            name: p.detach().requires_grad_(p.requires_grad and self.learns)
            for name, p in parameters.items()
        }
        with (
            _capturing,
            torch.cuda.device(x.device),
            torch.cuda.stream(torch.cuda.current_stream(x.device)),  # a capture that fails leaves its own
            torch.inference_mode(False),
            torch.set_grad_enabled(self.learns),
            torch.autocast('cuda', enabled=False),  # backward passes run without
        ):
            self._capture(_Body(backbone, self._autocast), parameters, x)

    def _capture(self, body: _Body, parameters: dict[str, nn.Parameter], x: Tensor) -> None:
        learns = x.requires_grad and self.learns
        # What autocast would make of the image; where it gets a gradient, in the graph.
        dtype = self._autocast if self._autocast and x.dtype == torch.float32 and not learns else x.dtype
        self._x = torch.empty_like(x, dtype=dtype).copy_(x.detach())
        self._x.requires_grad_(learns)
        sources = [(x, self._x), *((parameters[name], weight) for name, weight in self._weights.items())]
        sources = [(source, leaf) for source, leaf in sources if leaf.requires_grad]

        self._given: list[Tensor] = []
        stream = _side_stream(x.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.random.fork_rng([x.device]):
            for _ in range(WARM_UPS):
                maps = torch.func.functional_call(body, self._weights, (self._x,))
                if self.learns:
                    learning = [y for y in maps if y.requires_grad]
                    self._given = self._given or [torch.zeros_like(y) for y in learning]
                    leaves = [leaf for _, leaf in sources]
                    found = torch.autograd.grad(learning, leaves, self._given, allow_unused=True)
                    pairs = zip(sources, found, strict=True)
                    sources = [source for source, gradient in pairs if gradient is not None]
                maps = learning = found = pairs = None  # as large as what the next pass needs
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()

        # Not the mode 'global': other threads may pin memory for the next batches.
        pool = torch.cuda.graph_pool_handle()
        capture = functools.partial(
            torch.cuda.graph, pool=pool, stream=stream, capture_error_mode='thread_local'
        )
        self._forward = torch.cuda.CUDAGraph()
        with capture(self._forward):
            maps = torch.func.functional_call(body, self._weights, (self._x,))
        if self.learns:
            self._backward = torch.cuda.CUDAGraph()
            learning = [y for y in maps if y.requires_grad]
            self._leaves = [leaf for _, leaf in sources]
            with capture(self._backward):
                self._gradients = torch.autograd.grad(learning, self._leaves, self._given)
            self._parameters = [source for source, leaf in sources if leaf is not self._x]
        self._is_learning = [y.requires_grad for y in maps]
        self._maps = [y.detach() for y in maps]
        self.size = torch.cuda.memory_reserved() - before  # bytes that nothing else can use

    def is_needed(self) -> bool:
        """Whether a backward pass may still come that needs what the last forward pass has left."""
        return self._node is not None and self._node() is not None

    def __call__(self, backbone: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """The maps; nothing else writes to their memory."""
        return _Replay.apply(self, backbone, x, *self._parameters) if self.learns else self.forward(x)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The same without gradients."""
        self._x.copy_(x)
        self._forward.replay()
        return tuple(y.clone() for y in self._maps)

    def open(self, node: torch.autograd.function.FunctionCtx, maps: tuple[Tensor, ...]) -> list[Tensor]:
        """Note the node of a forward pass that has just run, and return the maps without gradient."""
        self._node = weakref.ref(node)
        return [y for y, learning in zip(maps, self._is_learning, strict=True) if not learning]

    def versions(self) -> list[int]:
        """How often each weight has been changed."""
        return [weight._version for weight in self._weights.values()]

    def backward(
        self, node: torch.autograd.function.FunctionCtx, given: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the image and the parameters from those of the maps."""
        if node.versions != self.versions():
            raise RuntimeError('weights have been changed in place between a forward and its backward pass')
        given = [g for g, learning in zip(given, self._is_learning, strict=True) if learning]
        is_last = self._node is not None and self._node() is node
        if is_last:
            self._node = None
        if is_last and all(g is not None for g in given):
            torch._foreach_copy_(self._given, given)
            self._backward.replay()
            gradients = torch._foreach_mul(self._gradients, 1)  # copies: parameters keep what they get
        else:
            self.is_refused = True
            gradients = self._recompute(node, given)
        return tuple(gradients) if self._x.requires_grad else (None, *gradients)

    def _recompute(
        self, node: torch.autograd.function.FunctionCtx, given: list[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """What :meth:`backward` gives where the graphs cannot: after one already, or not from all maps."""
        (x,) = node.saved_tensors
        x = x.detach().requires_grad_(self._x.requires_grad)
        with torch.random.fork_rng([x.device]), torch.enable_grad(), torch.autocast('cuda', enabled=False):
            torch.cuda.set_rng_state(node.random_state, x.device)
            maps = torch.func.functional_call(_Body(node.backbone, self._autocast), self._weights, (x,))
            pairs = zip([y for y in maps if y.requires_grad], given, strict=True)
            outputs, given = zip(*[pair for pair in pairs if pair[1] is not None], strict=True)
            leaves = [x if leaf is self._x else leaf for leaf in self._leaves]
            return torch.autograd.grad(outputs, leaves, given, allow_unused=True)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph: _Graph, backbone: nn.Module, x: Tensor, *parameters: Tensor):
        ctx.graph, ctx.backbone, ctx.versions = graph, backbone, graph.versions()
        ctx.random_state = torch.cuda.get_rng_state(x.device)
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        maps = graph.forward(x)
        ctx.mark_non_differentiable(*graph.open(ctx, maps))
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx, *given: Tensor | None):
        return None, None, *ctx.graph.backward(ctx, given)
