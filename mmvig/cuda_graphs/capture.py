"""How a pass is captured and replayed: what it reads, and its gradients."""

import operator
import weakref
from collections.abc import Callable, Iterator
from itertools import chain, groupby

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmvig.cuda_graphs.memory import CAPTURING, Pool, alias, places
from mmvig.ops.plain import PLAIN_TENSORS, has_global_hooks, is_observed

_TRAINING, _REQUIRES_GRAD = operator.itemgetter('training'), operator.attrgetter('requires_grad')


def tensors_of(node) -> Iterator[Tensor | None]:
    """The tensors of nested tuples and lists in order; None for anything else."""
    if isinstance(node, Tensor):
        yield node
    elif type(node) in (tuple, list):
        for each in node:
            yield from tensors_of(each)
    else:
        yield None


def rebuilt(node, tensors: Iterator[Tensor]):
    """The same nesting with other tensors."""
    if isinstance(node, Tensor):
        return next(tensors)
    return type(node)(rebuilt(each, tensors) for each in node)


def autocast_dtype() -> torch.dtype | None:
    """What autocast computes in on a GPU; None where it is off."""
    return torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None


class State:
    """What a graph holds of a module: its submodules, and where parameters and buffers are."""

    def __init__(self, module: nn.Module):
        modules = list(module.modules())
        # Its own hooks and forward are outside of the graph, and holding it would make a cycle.
        self.inner = [each.__dict__ for each in modules[1:]]
        self.hooks = [
            hooks
            for each in modules[1:]
            for hooks in (
                each._forward_hooks,
                each._forward_pre_hooks,
                each._backward_hooks,
                each._backward_pre_hooks,
            )
        ]
        self.rated = [own for own in self.inner if 'rate' in own]
        self.norms = [own for own in self.inner if 'eps' in own]
        self.owners = [
            owner for each in modules for owner in (each._modules, each._parameters, each._buffers)
        ]
        self.objects = self._objects()  # held, so that identities stay theirs
        self.identities = list(map(id, self.objects))
        self.tensors = [x for x in self.objects if isinstance(x, Tensor)]
        self.values = self._values()

    @classmethod
    def of(cls, module: nn.Module) -> 'State | None':
        """A module's state.

        None if a replay would miss something: hooks of submodules or a ``forward`` of their own, subclasses
        of Tensor, or parameters that are elsewhere, as FSDP's.
        """
        if is_observed(module):
            return None
        state = cls(module)
        if not state.tensors or not all(type(x) in PLAIN_TENSORS for x in state.tensors):
            return None
        return state

    def _objects(self) -> list:
        return list(chain.from_iterable(map(dict.values, self.owners)))

    def _values(self) -> list:
        return [
            list(map(_TRAINING, self.inner)),
            [own['rate'] for own in self.rated],
            [own['eps'] for own in self.norms],
            list(map(Tensor.data_ptr, self.tensors)),
            list(map(_REQUIRES_GRAD, self.tensors)),
        ]

    def is_watched(self) -> bool:
        """Whether a submodule does more than its class now; asked at each replay, so without a walk."""
        return any(self.hooks) or has_global_hooks() or any('forward' in own for own in self.inner)

    def holds(self) -> bool:
        """Whether it is still the module's; asked at each replay."""
        return list(map(id, self._objects())) == self.identities and self._values() == self.values


def _dtype_of_leaf(learning: tuple) -> str:
    return str(learning[1].dtype)


class _Body(nn.Module):
    """What is captured, as a module for ``torch.func.functional_call``."""

    def __init__(self, module: nn.Module, call: Callable, inputs: tuple, dtype: torch.dtype | None):
        super().__init__()
        self.module = module
        self.call = call
        self.inputs = inputs
        self.dtype = dtype

    def forward(self, *tensors: Tensor):
        # The cache would hand out a weight's cast of another pass.
        with torch.autocast('cuda', self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            return self.call(*rebuilt(self.inputs, iter(tensors)))


class Graph:
    """The forward pass for one kind of input as a graph, and if anything is learned, the backward pass.

    Args:
        module: what ``call`` takes its parameters from.
        call: the pass.
        inputs: its arguments.
        tensors: the tensors in them.
        state: the module's.
        pool: where its memory is, of backward passes and without gradients the pool's lane.
        has_run: whether the same pass has run with its gradients; else one is run first, since what a first
            pass sets up cannot be captured.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable,
        inputs: tuple,
        tensors: list[Tensor],
        state: State,
        pool: Pool,
        has_run: bool,
    ):
        parameters = dict(module.named_parameters(prefix='module'))
        self.state, self.pool = state, pool
        self.learns = torch.is_grad_enabled() and any(
            p.requires_grad for p in (*tensors, *parameters.values())
        )
        self.replays = 0
        self.is_refused = False  # a pass came that graphs cannot do
        self._autocast = autocast_dtype()
        self._nesting = rebuilt(inputs, iter([torch.empty(0)] * len(tensors)))
        # Leaves of our own: those of the parameters may belong to a stream that takes no part in a capture.
        self._weights = {
            name: p.detach().requires_grad_(p.requires_grad and self.learns)
            for name, p in parameters.items()
        }
        device = tensors[0].device
        with (
            CAPTURING,
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),  # a capture that fails leaves its own
            torch.inference_mode(False),
            torch.set_grad_enabled(self.learns),
            torch.autocast('cuda', enabled=False),  # backward passes run without
        ):
            body = _Body(module, call, self._nesting, self._autocast)
            if not has_run:
                self._try(body, tensors)
            self._capture(body, parameters, tensors)

    def _try(self, body: _Body, tensors: list[Tensor]) -> None:
        """Run the pass and throw it away."""
        with torch.random.fork_rng([tensors[0].device]):
            inputs = [x.detach().requires_grad_(x.requires_grad and self.learns) for x in tensors]
            outputs = torch.func.functional_call(body, self._weights, tuple(inputs))
            if self.learns:
                outputs = [y for y in tensors_of(outputs) if y.requires_grad]
                leaves = [x for x in (*self._weights.values(), *inputs) if x.requires_grad]
                torch.autograd.grad(
                    outputs, leaves, list(map(torch.zeros_like, outputs)), allow_unused=True
                )

    def _capture(self, body: _Body, parameters: dict[str, nn.Parameter], tensors: list[Tensor]) -> None:
        free, total = torch.cuda.mem_get_info()
        if free < total // 2:  # a capture cannot take what is cached
            torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        lane = self.pool.lane
        self._forward = torch.cuda.CUDAGraph()
        with lane.recording(self._forward, self.pool.handle if self.learns else lane.handle):
            inputs = [
                place.requires_grad_(x.requires_grad and self.learns)
                for place, x in zip(places(tensors), tensors, strict=True)
            ]
            outputs = torch.func.functional_call(body, self._weights, tuple(inputs))
            flat_outputs = list(tensors_of(outputs))
        self._outputs_nesting = rebuilt(outputs, iter([torch.empty(0)] * len(flat_outputs)))
        self._is_learning = [y.requires_grad for y in flat_outputs]
        self._inputs = [alias(x) for x in inputs]
        self._learning_inputs = [x.requires_grad for x in inputs]
        self._outputs = [alias(y) for y in flat_outputs]
        self._parameters, self._leaves = [], []  # those that get a gradient
        if self.learns:
            self._backward = torch.cuda.CUDAGraph()
            learning_outputs = [y for y in flat_outputs if y.requires_grad]
            learning_inputs = [x for x in inputs if x.requires_grad]
            pairs = zip(parameters.values(), self._weights.values(), strict=True)
            # In the order of dtypes, of which each gets a buffer.
            pairs = sorted((pair for pair in pairs if pair[1].requires_grad), key=_dtype_of_leaf)
            with lane.recording(self._backward, lane.handle):
                given = places(learning_outputs)
                wanted = [leaf for _, leaf in pairs] + learning_inputs
                found = torch.autograd.grad(learning_outputs, wanted, given, allow_unused=True)
                input_gradients = found[len(pairs) :]
                learning = [(*pair, g) for pair, g in zip(pairs, found, strict=False) if g is not None]
                self._parameters = [p for p, *_ in learning]
                self._leaves = [leaf for _, leaf, _ in learning]
                buffers = []
                for _, group in groupby(learning, _dtype_of_leaf):
                    own = [g for *_, g in group]
                    buffers.append((torch.cat([g.reshape(-1) for g in own]), [g.shape for g in own]))
            self._given = [alias(g) for g in given]
            self._buffers = [(alias(buffer), shapes) for buffer, shapes in buffers]
            self._input_gradients = [g if g is None else alias(g) for g in input_gradients]
        self.pool.size += max(torch.cuda.memory_reserved() - before, 0)

    def __call__(self, module: nn.Module, call: Callable, tensors: list[Tensor]):
        """The outputs; nothing else writes to their memory."""
        if self.learns:
            outputs = _Replay.apply(self, module, call, len(tensors), *tensors, *self._parameters)
        else:
            with self.pool.lane.lock:
                outputs = self.forward(tensors)
        return rebuilt(self._outputs_nesting, iter(outputs))

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """The same without gradients, not nested."""
        for place, x in zip(self._inputs, tensors, strict=True):
            place.copy_(x)
        self._forward.replay()
        return tuple(y.clone() for y in self._outputs)

    def open(self, node: torch.autograd.function.FunctionCtx, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Note the node of a forward pass that has just run, and return the outputs without gradient."""
        self.pool.node = weakref.ref(node)
        return [y for y, learning in zip(outputs, self._is_learning, strict=True) if not learning]

    def versions(self) -> list[int]:
        """How often each weight has been changed."""
        return [weight._version for weight in self._weights.values()]

    def backward(
        self, node: torch.autograd.function.FunctionCtx, given: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of inputs and parameters from those of the outputs."""
        if node.versions != self.versions():
            raise RuntimeError('weights have been changed in place between a forward and its backward pass')
        given = [g for g, learning in zip(given, self._is_learning, strict=True) if learning]
        is_last = self.pool.node is not None and self.pool.node() is node
        try:
            if is_last and all(g is not None for g in given):
                of_inputs, of_parameters = self._replay_backward(given)
            else:
                self.is_refused = True
                of_inputs, of_parameters = self._recompute(node, given)
        finally:
            if is_last:  # not before: another thread's forward pass then takes the memory
                self.pool.node = None
        rest = iter(of_inputs)
        return *(next(rest) if learning else None for learning in self._learning_inputs), *of_parameters

    def _replay_backward(self, given: list[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        with self.pool.lane.lock:
            torch._foreach_copy_(self._given, given)
            self._backward.replay()
            of_inputs = [g if g is None else g.clone() for g in self._input_gradients]
            buffers = [buffer.clone() for buffer, _ in self._buffers]  # parameters keep what they get
        of_parameters = []
        for buffer, (_, shapes) in zip(buffers, self._buffers, strict=True):
            parts = buffer.split([shape.numel() for shape in shapes])
            of_parameters += [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return of_inputs, of_parameters

    def _recompute(
        self, node: torch.autograd.function.FunctionCtx, given: list[Tensor | None]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """What :meth:`backward` gives where graphs cannot: after one already, or not from all outputs."""
        inputs = [
            x.detach().requires_grad_(learning)
            for x, learning in zip(node.saved_tensors, self._learning_inputs, strict=True)
        ]
        with torch.random.fork_rng([inputs[0].device]), torch.enable_grad():
            torch.cuda.set_rng_state(node.random_state, inputs[0].device)
            body = _Body(node.module, node.call, self._nesting, self._autocast)
            with torch.autocast('cuda', enabled=False):
                outputs = torch.func.functional_call(body, self._weights, tuple(inputs))
                pairs = zip([y for y in tensors_of(outputs) if y.requires_grad], given, strict=True)
                outputs, given = zip(*[pair for pair in pairs if pair[1] is not None], strict=True)
                wanted = [x for x in inputs if x.requires_grad]
                found = torch.autograd.grad(outputs, wanted + self._leaves, given, allow_unused=True)
        return found[: len(wanted)], found[len(wanted) :]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph: Graph, module: nn.Module, call: Callable, count: int, *tensors: Tensor):
        inputs = tensors[:count]  # the rest are parameters
        ctx.graph, ctx.module, ctx.call, ctx.versions = graph, module, call, graph.versions()
        ctx.random_state = torch.cuda.get_rng_state(inputs[0].device)
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        outputs = graph.forward(inputs)
        ctx.mark_non_differentiable(*graph.open(ctx, outputs))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *given: Tensor | None):
        return None, None, None, None, *ctx.graph.backward(ctx, given)
