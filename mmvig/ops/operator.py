"""Functions made PyTorch operators, with their gradients."""

import functools
from collections.abc import Callable, Iterable
from itertools import islice
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from mmvig.ops.plain import PLAIN_TENSORS, is_watched
from mmvig.ops.torch_private import device_of

# What annotations are in schemas. torch.library.infer_schema knows no NamedTuple, and PyTorch 2.4 not it.
SCHEMA = {Tensor: 'Tensor', Tensor | None: 'Tensor?', torch.dtype: 'ScalarType'}
SCHEMA |= {kind: kind.__name__ for kind in (int, float, bool, str)}
# Not custom_op: on a CPU, empty functions take 67 us so, forward and backward, and 102 with it.
_library = torch.library.Library('mmvig', 'FRAGMENT')
_functions: dict[str, Callable] = {}
_outputs: dict[str, int] = {}
_nodes: dict[str, type[torch.autograd.Function]] = {}  # of operators, in autograd's graph


def operator(fake: Callable, outputs: int | None = None) -> Callable:
    """Make a function the PyTorch operator that its annotations describe; ``norm_op`` is ``mmvig::norm``.

    A NamedTuple among the annotations stands for its fields, which calls and results have one by one.

    Args:
        fake: takes the same arguments and makes empty results.
        outputs: how many of the results are the caller's, where others are kept for the backward pass. The
            function has a first parameter ``keep`` then, without an annotation. Where no gradient is asked
            for, ``keep`` is False and there are no other results. That is an operator of its own,
            ``mmvig::<name>_inference``, as a compiled graph must have either. Default: all of them.

    What is returned calls the function itself where nothing watches PyTorch's operators (no compiler,
    tracer, dispatch mode, tensor subclass): the dispatcher took 40 to 120 us a call on an H200's host.
    """

    def register(function: Callable) -> Callable:
        name = function.__name__.removesuffix('_op')
        hints = get_type_hints(function)
        results = hints.pop('return')
        takes = ', '.join(f'{SCHEMA[hint]} {field}' for field, hint in _fields(hints.items()))
        gives = _tensors(len(_fields(enumerate(get_args(results) or [results]))))
        make, inference = _flat(fake, hints), None
        if outputs:
            _outputs[name] = outputs
            forget = _flat(functools.partial(function, False), hints)
            run = _flat(functools.partial(function, True), hints)
            # An operator with one result returns no tuple.
            first = (lambda results: results[0]) if outputs == 1 else (lambda results: results[:outputs])
            inference = _define(
                f'{name}_inference({takes}) -> {_tensors(outputs)}',
                lambda *args: first(forget(*args)),
                lambda *args: first(make(*args)),
            )
            refuse_gradients(f'{name}_inference')
        else:
            run = _flat(function, hints)
        return functools.wraps(function)(_define(f'{name}({takes}) -> {gives}', run, make, inference))

    return register


def _tensors(count: int) -> str:
    return f'({", ".join(["Tensor"] * count)})'


def _fields(parameters: Iterable[tuple]) -> list[tuple]:
    """Names and annotations of parameters; instead of a NamedTuple, those of its fields."""
    found = []
    for name, hint in parameters:
        found += get_type_hints(hint).items() if hasattr(hint, '_fields') else [(name, hint)]
    return found


def _flat(function: Callable, hints: dict) -> Callable:
    """A function that takes the fields of its NamedTuples one by one."""
    kinds = [hint if hasattr(hint, '_fields') else None for hint in hints.values()]

    def run(*args):
        rest = iter(args)
        return function(*[kind(*islice(rest, len(kind._fields))) if kind else next(rest) for kind in kinds])

    return run if any(kinds) else function


def _define(schema: str, function: Callable, fake: Callable, inference: Callable | None = None) -> Callable:
    """Register an operator, and return what calls it or ``inference``."""
    name = schema.split('(')[0]
    function = on_device(function)
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, function, 'CompositeExplicitAutograd')
    torch.library.register_fake(f'mmvig::{name}', fake, lib=_library)
    op = getattr(torch.ops.mmvig, name).default
    _functions[name] = function

    def call(*args):
        if inference and not torch.is_grad_enabled():
            return infer(*args)
        if torch.compiler.is_compiling() or is_watched() or not PLAIN.issuperset(map(type, args)):
            return op(*args)
        if torch.is_grad_enabled():
            for x in args:
                if type(x) in PLAIN_TENSORS and x.requires_grad:
                    return _nodes[name].apply(*args)
        return (infer if inference else function)(*args)

    def infer(*args):
        result = inference(*args)
        return result if isinstance(result, tuple) else (result,)

    call.op, call.inference = op, inference
    return call


def empty_like_each(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of the same shapes."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def on_device(function: Callable) -> Callable:
    """The function, run with the device of its first argument as the current one."""

    @functools.wraps(function)
    def run(*args):
        with device_of(args[0]):
            return function(*args)

    return run


PLAIN = PLAIN_TENSORS | {int, float, bool, str, torch.dtype, type(None)}


def keep_inputs(inputs: tuple, output: object) -> tuple[tuple, tuple]:
    """What an operator keeps for its backward one: its tensors and, after them, its options."""
    count = sum(x is None or isinstance(x, Tensor) for x in inputs)
    return inputs[:count], inputs[count:]


def differentiate(name: str, backward: Callable, keep: Callable = keep_inputs) -> None:
    """Make ``backward`` the gradients of the operator ``mmvig::<name>``; it has none itself.

    Args:
        name: the operator's; that of its gradients is ``<name>_backward``.
        backward: takes the gradients of the outputs, the tensors and options that ``keep`` returns, and
            returns the gradients of the operator's first arguments. Where others are kept, an output's
            gradient can be None.
        keep: takes the operator's arguments and result, and returns the tensors and the options kept.
    """
    outputs = _outputs.get(name)

    def save(ctx, inputs, output):
        tensors, ctx.options = keep(inputs, output)
        ctx.arguments = len(inputs)
        ctx.save_for_backward(*tensors)

    def run(ctx, *grads):
        result = backward(*grads[:outputs], *ctx.saved_tensors, *ctx.options)
        result = result if isinstance(result, tuple) else (result,)
        return *result, *[None] * (ctx.arguments - len(result))

    torch.library.register_autograd(f'mmvig::{name}', run, setup_context=save, lib=_library)
    _nodes[name] = _node(name, run, save, outputs)
    why = f"{name}'s Triton backend has no second derivative; choose another backend for one"
    refuse_gradients(f'{name}_backward', why)


NO_GRADIENT = 'this was computed, or its graph made, with gradients disabled, and nothing is kept for any'


def refuse_gradients(name: str, why: str = NO_GRADIENT) -> None:
    """Have the backward pass through the operator ``mmvig::<name>`` raise an error that says why."""

    def refuse(ctx, *grads):
        raise RuntimeError(why)

    torch.library.register_autograd(f'mmvig::{name}', refuse, lib=_library)
    _nodes[name] = _node(name, refuse, None, None)


def _node(name: str, run: Callable, save: Callable | None, outputs: int | None) -> type:
    """An operator's node in autograd's graph for calls that pass by PyTorch's dispatcher."""
    function = _functions[name]

    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = function(*inputs)
        if save:
            save(ctx, inputs, output)
        if outputs is not None:
            ctx.set_materialize_grads(False)
            output = output[:outputs]
        return output

    members = {'forward': staticmethod(forward), 'backward': staticmethod(run)}
    return type(name, (torch.autograd.Function,), members)
