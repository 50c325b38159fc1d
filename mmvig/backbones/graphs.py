"""A backbone's passes as CUDA graphs, which the host launches at once instead of kernel by kernel.

Not by ``torch.cuda.make_graphed_callables``: the gradients that it returns are overwritten by the next
replay, so that accumulated ones are wrong (pytorch/pytorch#181723); it cannot capture once DDP holds the
parameters; and where it takes no ``capture_error_mode``, its captures fail if another thread pins memory.
"""

import functools
import weakref
from collections import Counter

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmvig.ops.choice import is_watched

CALLS = 3  # the call with a kind of input that captures
WARM_UPS = 3  # as many as PyTorch's own function runs before a capture
PLAIN = frozenset((Tensor, nn.Parameter))


class Graphs:
    """The graphs of one backbone, one for each kind of input; a copied or unpickled one starts with none.

    A kind is shape, dtype, training mode, whether gradients are recorded and the image gets one, and
    autocast's dtype. The first ``limit`` kinds that are called CALLS times, while parameters stay the same
    tensors in the same memory, are captured at the last of these calls and replayed from then on. Any other
    call runs as without graphs, and so does

    - one before the backward pass of the last replay, unless the maps of that are gone;
    - one with hooks on submodules, on a CPU, in torch.compile, a tracer, torch.func or another capture.

    Where parameters have moved, or have been replaced or frozen, a graph is dropped, and made anew after
    as many calls. Changed values are seen, other changes (DropPath's rate, PyTorch's settings) are not.
    DropPath draws anew in each replay. Maps and gradients are the caller's own memory. The maps of a replay
    allow one backward pass, and one that is not used gives gradients of zero instead of none. One thread
    and stream at a time may call a backbone with graphs, and FSDP may not wrap parts of it.

    Args:
        limit: the most kinds, 0 for no graphs.
        with_cp: whether the backbone recomputes its blocks, which no graph can.

    Raises:
        ValueError: the limit is no int of at least 0, or meets ``with_cp``.
    """

    def __init__(self, limit: int, with_cp: bool = False):
        if type(limit) is not int or limit < 0:
            raise ValueError(f'cuda_graphs must be an int of at least 0, got {limit!r}')
        if limit and with_cp:
            raise ValueError(
                'cuda_graphs and with_cp exclude each other: blocks are not recomputed in a graph'
            )
        self.limit = limit
        self._graphs: dict[tuple, _Graph] = {}
        self._state: tuple | None = None
        self._calls: Counter = Counter()  # by kind of input, since the state is this one

    def __reduce__(self):
        return Graphs, (self.limit,)

    def run(self, backbone: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """``backbone._compute(x)``, replayed where that gives the same."""
        # The first two in this order: torch.compile must meet nothing else.
        if not self.limit or torch.compiler.is_compiling() or not _is_plain(x):
            return backbone._compute(x)
        state = _state_of(backbone)
        if state is None:
            return backbone._compute(x)
        autocast = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None
        kind = x.shape, x.dtype, backbone.training, x.requires_grad, torch.is_grad_enabled(), autocast
        graph = self._graphs.get(kind)
        if graph is not None and graph.state != state:
            del self._graphs[kind]
            graph = None
        if graph is None and len(self._graphs) < self.limit:
            if state != self._state:
                self._state, self._calls = state, Counter()
            self._calls[kind] += 1
            if self._calls[kind] >= CALLS:
                graph = self._graphs[kind] = _Graph(backbone, x, state, autocast)
        if graph is None or graph.is_needed():
            return backbone._compute(x)
        return graph(x)


def _is_plain(x: Tensor) -> bool:
    return (
        type(x) in PLAIN and x.is_cuda and not is_watched() and not torch.cuda.is_current_stream_capturing()
    )


def _state_of(backbone: nn.Module) -> tuple[list, list] | None:
    """What a graph holds of a backbone: its modules, and where parameters and buffers are.

    None if a replay would miss something: hooks of submodules, subclasses of Tensor, or parameters that are
    elsewhere, as FSDP's.
    """
    if nn.modules.module._has_any_global_hook():
        return None
    modules, tensors, rest = [], [], [backbone]
    while rest:
        module = rest.pop()
        if module is not backbone:  # its own hooks are called outside, and holding it would make a cycle
            if module._forward_hooks or module._forward_pre_hooks:
                return None
            if module._backward_hooks or module._backward_pre_hooks:
                return None
            modules += module, module.training
        for members in (module._parameters, module._buffers):
            for tensor in members.values():
                if tensor is None:
                    continue
                if type(tensor) not in PLAIN:
                    return None
                tensors += id(tensor), tensor.data_ptr(), tensor.requires_grad
        rest += [child for child in module._modules.values() if child is not None]
    return (modules, tensors) if tensors else None


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

    def __init__(self, backbone: nn.Module, x: Tensor, state: tuple, autocast: torch.dtype | None):
        parameters = dict(backbone.named_parameters(prefix='backbone'))
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in (x, *parameters.values()))
        with torch.autograd.graph.disable_saved_tensors_hooks(  # raises where there are some
            'activation checkpointing and other hooks of saved tensors allow no capture; set cuda_graphs=0'
        ):
            pass
        self.state = state
        self.learns = learns
        self._node: weakref.ref | None = None
        with (
            torch.cuda.device(x.device),
            torch.inference_mode(False),
            torch.set_grad_enabled(learns),
            torch.autocast('cuda', enabled=False),  # backward passes run without
        ):
            self._capture(_Body(backbone, autocast), parameters, x)

    def _capture(self, body: _Body, parameters: dict[str, nn.Parameter], x: Tensor) -> None:
        # Leaves of our own: those of the parameters may belong to a stream that takes no part in a capture.
        weights = {
            name: p.detach().requires_grad_(p.requires_grad and self.learns)
            for name, p in parameters.items()
        }
        self._memory = [weight.untyped_storage() for weight in weights.values()]
        self._x = torch.empty_like(x, memory_format=torch.channels_last).copy_(x.detach())
        self._x.requires_grad_(x.requires_grad and self.learns)
        sources = [(x, self._x), *((parameters[name], weight) for name, weight in weights.items())]
        sources = [(source, leaf) for source, leaf in sources if leaf.requires_grad]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                maps = torch.func.functional_call(body, weights, (self._x,))
                if not self.learns:
                    continue
                learning = [y for y in maps if y.requires_grad]
                self._given = [torch.zeros_like(y) for y in learning]
                leaves = [leaf for _, leaf in sources]
                found = torch.autograd.grad(learning, leaves, self._given, allow_unused=True)
                sources = [
                    pair for pair, gradient in zip(sources, found, strict=True) if gradient is not None
                ]
        torch.cuda.current_stream().wait_stream(stream)

        # Not the mode 'global': other threads may pin memory for the next batches.
        pool = torch.cuda.graph_pool_handle()
        capture = functools.partial(
            torch.cuda.graph, pool=pool, stream=stream, capture_error_mode='thread_local'
        )
        self._forward = torch.cuda.CUDAGraph()
        with capture(self._forward):
            maps = torch.func.functional_call(body, weights, (self._x,))
        if self.learns:
            self._backward = torch.cuda.CUDAGraph()
            learning = [y for y in maps if y.requires_grad]
            leaves = [leaf for _, leaf in sources]
            with capture(self._backward):
                self._gradients = torch.autograd.grad(learning, leaves, self._given)
            self._parameters = [source for source, leaf in sources if leaf is not self._x]
        self._is_learning = [y.requires_grad for y in maps]
        self._maps = [y.detach() for y in maps]

    def is_needed(self) -> bool:
        """Whether a backward pass may still come that needs what the last forward pass has left."""
        return self._node is not None and self._node() is not None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps; nothing else writes to their memory."""
        return _Replay.apply(self, x, *self._parameters) if self.learns else self.forward(x)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The same without gradients."""
        self._x.copy_(x)
        self._forward.replay()
        return tuple(y.clone() for y in self._maps)

    def open(self, node: torch.autograd.function.FunctionCtx, maps: tuple[Tensor, ...]) -> list[Tensor]:
        """Note the node of a forward pass that has just run, and return the maps without gradient."""
        self._node = weakref.ref(node)
        return [y for y, learning in zip(maps, self._is_learning, strict=True) if not learning]

    def backward(
        self, node: torch.autograd.function.FunctionCtx, given: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the image and the parameters from those of the maps."""
        if not self.is_needed() or self._node() is not node:
            raise RuntimeError(
                'maps of a CUDA graph allow one backward pass; set cuda_graphs=0 for another'
            )
        self._node = None
        given = [g for g, learning in zip(given, self._is_learning, strict=True) if learning]
        torch._foreach_copy_(self._given, given)
        self._backward.replay()
        gradients = torch._foreach_mul(self._gradients, 1)  # copies: parameters keep what they are given
        return tuple(gradients) if self._x.requires_grad else (None, *gradients)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph: _Graph, x: Tensor, *parameters: Tensor):
        ctx.graph = graph
        maps = graph.forward(x)
        ctx.mark_non_differentiable(*graph.open(ctx, maps))
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx, *given: Tensor):
        return None, *ctx.graph.backward(ctx, given)
