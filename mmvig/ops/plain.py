"""Whether modules, tensors and calls are what they seem, so that calling them may be left out."""

import torch
from torch import Tensor, nn

PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))
# A second call of other modules may be seen: they may count, communicate, or print.
_KNOWN = (
    'mmvig.',
    *(f'torch.nn.modules.{name}' for name in ('container', 'conv', 'linear', 'normalization')),
)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward()."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Whether calling any module does."""
    modules = nn.modules.module
    return bool(
        modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether calling a module is what its type ``kind`` does with plain tensors, and nothing else.

    Not so with hooks, a ``forward`` of the instance (as accelerate sets), parametrisations (which change
    the type) and weights of a subclass of Tensor (DTensor, torchao's).
    """
    if type(module) is not kind or has_own_forward(module) or has_hooks(module) or has_global_hooks():
        return False
    own = module.__dict__  # FSDP puts views of its flat parameter there
    weights = *module._parameters.values(), own.get('weight'), own.get('bias')
    return all(x is None or type(x) in PLAIN_TENSORS for x in weights)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's ``forward`` has been set in the instance, in place of its type's."""
    return 'forward' in module.__dict__


def is_observed(module: nn.Module) -> bool:
    """Whether a submodule does more than its class: it has hooks, or a ``forward`` of its own."""
    inner = list(module.modules())[1:]
    return has_global_hooks() or any(has_hooks(each) or has_own_forward(each) for each in inner)


def is_known(module: nn.Module) -> bool:
    """Whether a module's class is ours, or one of PyTorch's that does no more than compute."""
    return type(module).__module__.startswith(_KNOWN)


def leaves_no_trace(module: nn.Module) -> bool:
    """Whether a module's submodules can be called once more, unseen: ours or PyTorch's, and no more.

    Not so with hooks, a ``forward`` of the instance, or buffers, which a call may change.
    """
    return (
        not is_observed(module)
        and all(map(is_known, list(module.modules())[1:]))
        and not any(True for _ in module.buffers())
    )


def is_watched() -> bool:
    """Whether a dispatch mode, a tracer or a transform of torch.func must see each operator."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_traced() -> bool:
    """Whether a compiler, tracer or exporter looks on, for which sizes must stay open."""
    return torch.compiler.is_compiling() or is_watched() or torch.onnx.is_in_onnx_export()


def has_methods_of(module: nn.Module, kind: type, *names: str) -> bool:
    """Whether a module has these methods of a class, not a subclass's or ones set in the instance."""
    return all(
        getattr(getattr(module, name, None), '__func__', None) is getattr(kind, name) for name in names
    )


def has_saved_tensors_hooks() -> bool:
    """As of activation checkpointing."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks('there are some'):
            return False
    except RuntimeError:
        return True
