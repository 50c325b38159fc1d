"""The backend 'chunked': which of its forms computes a head, and what training keeps."""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from mmvig.ops.bigla.chunked import general_forward
from mmvig.ops.bigla.mild import FORMS, GRADIENT_FORMS, mild_backward, mild_forward
from mmvig.ops.plain import PLAIN_TENSORS, is_watched


def bigla_chunked(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float, normalizer: float
) -> Tensor:
    """Both directions in one pass over chunks of tokens.

    Arguments and result are those of :func:`mmvig.ops.bigla.bigla`, already validated. Computes in
    float32 (float64 if ``v`` is float64), under autocast too. Training keeps only the inputs and
    computes the rest again in the backward pass.
    """
    inputs = q, k, v, g_fwd, g_bwd
    options = scale, normalizer
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    with without_autocast(v):
        if torch.compiler.is_compiling():
            if not trained or _is_exporting():
                return general_forward(*inputs, *options)
            return checkpoint(
                general_forward, *inputs, *options, use_reentrant=False, preserve_rng_state=False
            )
        if _is_seen_through(inputs):
            return general_forward(*inputs, *options)
        return _Chunked.apply(*inputs, *options) if trained else _forward(*inputs, *options)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Products in the dtypes that they are given; PyTorch has no autocast for the meta device."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _is_exporting() -> bool:
    """Whether this is torch.export, whose programs cannot run a checkpoint."""
    return hasattr(torch.compiler, 'is_exporting') and torch.compiler.is_exporting()


def _is_seen_through(inputs: tuple[Tensor, ...]) -> bool:
    """Whether something must see each operator: then no value decides, and autograd does the rest.

    Tracers, transforms of torch.func, forward-mode derivatives, dispatch modes, tensors without values.
    """
    return (
        is_watched()
        or forward_ad._current_level >= 0
        or any(x.is_meta or type(x) not in PLAIN_TENSORS for x in inputs)
    )


class _Chunked(torch.autograd.Function):
    """Keeps the inputs and nothing else."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:5])
        ctx.options = arguments[5:]
        return _forward(*arguments)

    @staticmethod
    def backward(ctx, do):
        inputs, options = ctx.saved_tensors, ctx.options
        with without_autocast(do):
            if torch.is_grad_enabled():  # for second derivatives
                grads = _general_backward(do, *inputs, *options, create_graph=True)
            else:
                grads = _backward(do, *inputs, *options)
        return *grads, None, None


def _forward(*arguments) -> Tensor:
    """The output in v's dtype, for plain tensors with values."""
    v = arguments[2]
    if not _reads_gates(v):
        return general_forward(*arguments)
    forms = [partial(mild_forward, *arguments, form) for form in FORMS]
    general = _for_all_heads(lambda: (general_forward(*arguments),))
    return _by_head([*forms, general], v)[0]


def _backward(*arguments) -> tuple[Tensor, ...]:
    """The five gradients in their inputs' dtypes, given the output's and the arguments of _forward()."""
    do, *inputs = arguments[:6]
    if not _reads_gates(do):
        return _general_backward(*arguments)
    forms = [partial(mild_backward, *arguments, form) for form in GRADIENT_FORMS]
    general = _for_all_heads(lambda: _general_backward(*arguments))
    return _by_head([*forms, general], *inputs)


def _for_all_heads(function: Callable) -> Callable:
    return lambda wanted: (function(), torch.ones_like(wanted))


def _reads_gates(x: Tensor) -> bool:
    """Whether values of the gates decide, which costs nothing on a CPU alone."""
    return x.device.type == 'cpu' and x.dtype != torch.float64 and x.numel() > 0


def _general_backward(do: Tensor, *arguments, create_graph: bool = False) -> tuple[Tensor, ...]:
    inputs, options = arguments[:5], arguments[5:]
    if not create_graph:
        inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        o = general_forward(*inputs, *options)
    wanted = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(o, wanted, do, create_graph=create_graph))
    return tuple(next(grads) if x.requires_grad else None for x in inputs)


def _by_head(forms: list[Callable], *like: Tensor) -> tuple[Tensor, ...]:
    """Results of the first form that fits a head, of each head by itself: no other decides for it.

    A form computes all heads, though, as products of matrices round by how many there are.

    Args:
        forms: functions of which heads are wanted, ``[B, H]``. They return results ``[B, N, H, D]``, or
            None if they fit no such head; and which heads they fit. The last fits all.
        like: tensors of the results' shapes and dtypes.
    """
    batch, _, heads, _ = like[0].shape
    wanted = torch.ones(batch, heads, dtype=torch.bool)
    results = None
    for form in forms:
        found, fits = form(wanted)
        if found is None:
            continue
        found = [x.to(y.dtype) for x, y in zip(found, like, strict=True)]
        if results:
            found = [
                torch.where(wanted[:, None, :, None], x, y) for x, y in zip(found, results, strict=True)
            ]
        results = found
        wanted = wanted & ~fits
        if not wanted.any():
            break
    return tuple(results)
