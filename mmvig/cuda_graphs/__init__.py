"""A module's passes as CUDA graphs, which the host launches at once instead of kernel by kernel.

Not by ``torch.cuda.make_graphed_callables``: it takes one size, the gradients that it returns are
overwritten by the next replay, so that accumulated ones are wrong (pytorch/pytorch#181723), it cannot
capture once DDP holds the parameters, and where it takes no ``capture_error_mode``, its captures fail if
another thread pins memory.
"""

from mmvig.cuda_graphs.policy import AGE, CALLS, WORTH, CudaGraphs

__all__ = ['AGE', 'CALLS', 'WORTH', 'CudaGraphs']
