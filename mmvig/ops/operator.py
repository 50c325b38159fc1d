"""Functions made PyTorch operators, with their gradients."""

import functools
from collections.abc import Callable, Iterable
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
        schema = ', '.join(f'{SCHEMA[hint]} {field}' for field, hint in _fields(hints.items()))
        count = len(list(_fields(enumerate(get_args(results) or [results]))))
        make = _flat(fake, hints.values())
        if outputs is None:
            call = _define(name, schema, count, _flat(function, hints.values()), make)
            return functools.wraps(function)(call)
        _outputs[name] = outputs
        keeps, forgets = (_flat(functools.partial(function, x), hints.values()) for x in (True, False))
        # An operator with one result returns no tuple.
        first = (lambda results: results[0]) if outputs == 1 else (lambda results: results[:outputs])
        inference = _define(
            f'{name}_inference', schema, outputs,
            lambda *args: first(forgets(*args)), lambda *args: first(make(*args)),
        )  # fmt: skip
        refuse_gradients(f'{name}_inference')
        call = _define(
            name, schema, count, keeps, make,
            inference if outputs > 1 else lambda *args: (inference(*args),),
        )  # fmt: skip
        return functools.wraps(function)(call)

    return register


def _fields(parameters: Iterable[tuple]) -> Iterable[tuple]:
    """Names and annotations of parameters; instead of a NamedTuple, those of its fields."""
    for name, hint in parameters:
        yield from get_type_hints(hint).items() if hasattr(hint, '_fields') else [(name, hint)]


def _flat(function: Callable, hints: Iterable) -> Callable:
    """A function that takes the fields of its NamedTuples one by one."""
    parts, start = [], 0
    for hint in hints:
        grouped = hasattr(hint, '_fields')
        stop = start + (len(hint._fields) if grouped else 1)
        parts.append((hint._make if grouped else None, slice(start, stop)))
        start = stop
    if start == len(parts):
        return function

    def run(*args):
        return function(*[make(args[place]) if make else args[place.start] for make, place in parts])

    return run


def _define(
    name: str,
    schema: str,
    count: int,
    function: Callable,
    fake: Callable,
    inference: Callable | None = None,
) -> Callable:
    """Register an operator with ``count`` results, and return what calls it or ``inference``."""
    results = f'({", ".join(["Tensor"] * count)})'
    _library.define(f'{name}({schema}) -> {results}', tags=torch.Tag.pt2_compliant_tag)
    function = on_device(function)
    _library.impl(name, function, 'CompositeExplicitAutograd')
    torch.library.register_fake(f'mmvig::{name}', fake, lib=_library)
    op = getattr(torch.ops.mmvig, name).default
    _functions[name] = function

    def call(*args):
        if inference and not torch.is_grad_enabled():
            return inference(*args)
        if torch.compiler.is_compiling() or is_watched() or not PLAIN.issuperset(map(type, args)):
            return op(*args)
        if torch.is_grad_enabled():
            for x in args:
                if type(x) in PLAIN_TENSORS and x.requires_grad:
                    return _nodes[name].apply(*args)
        return (inference or function)(*args)

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
