"""Mixed precision where mmengine's own optimiser wrapper refuses to run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from torch import nn


class CpuAmpOptimWrapper(OptimWrapper):
    """An OptimWrapper whose forward passes run under bfloat16 autocast on the CPU.

    mmengine's AmpOptimWrapper demands a GPU. bfloat16 has float32's range, so there is no loss to
    scale. Arguments are OptimWrapper's.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast around the forward pass, within OptimWrapper's own context."""
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield
