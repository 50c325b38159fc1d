"""Functions made PyTorch operators, with their gradients."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mmvig.ops.plain import PLAIN_TENSORS, is_watched
from mmvig.ops.torch_private import device_of

# Not custom_op: on a CPU, empty functions take 67 us so, forward and backward, and 102 with it.
_library = torch.library.Library('mmvig', 'FRAGMENT')
_functions: dict[str, Callable] = {}
_nodes: dict[str, type[torch.autograd.Function]] = {}  # of operators, in autograd's graph


def operator(schema: str, fake: Callable, inference: Callable | None = None) -> Callable:
    """Make a function the PyTorch operator ``mmvig::<schema>``; ``fake`` makes its empty results.

    ``inference`` takes its place where no gradient is asked for, and returns the first of its results as a
    tuple. It is another operator (see :func:`refuse_gradients`), as a compiled graph must have either.

    What is returned calls the function itself where nothing watches PyTorch's operators (no compiler,
    tracer, dispatch mode, tensor subclass): the dispatcher took 40 to 120 us a call on an H200's host.
    """

    def register(function: Callable) -> Callable:
        name = schema.split('(')[0]
        function = on_device(function)
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, 'CompositeExplicitAutograd')
        torch.library.register_fake(f'mmvig::{name}', fake, lib=_library)
        op = getattr(torch.ops.mmvig, name).default
        _functions[name] = function

        @functools.wraps(function)
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

        call.op = op
        return call

    return register


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


def differentiate(
    name: str, backward: Callable, keep: Callable = keep_inputs, outputs: int | None = None
) -> None:
    """Make ``backward`` the gradients of the operator ``mmvig::<name>``; it has none itself.

    Args:
        name: the operator's; that of its gradients is ``<name>_backward``.
        backward: takes the gradients of the outputs, the tensors and options that ``keep`` returns, and
            returns the gradients of the operator's first arguments.
        keep: takes the operator's arguments and result, and returns the tensors and the options kept.
        outputs: how many of the results have gradients (the others are there to be kept); theirs can be
            None then. Default: all of them.
    """

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
