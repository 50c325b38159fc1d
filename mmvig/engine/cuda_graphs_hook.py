"""CUDA graphs for parts of a model that are not ours, and what became of all of them."""

from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmvig.cuda_graphs import CudaGraphs
from mmvig.registry import HOOKS


@HOOKS.register_module()
class CudaGraphsHook(Hook):
    """Runs parts of a model as CUDA graphs, and logs at the end of a run how often graphs were replayed.

    Args:
        modules: names of submodules, such as 'neck' or 'roi_head.mask_head', whose ``forward`` takes and
            returns tensors, alone or nested in tuples and lists, and depends on nothing else. Our backbones
            and RPNHead have graphs of their own, and are left alone. One that the model does not have, or
            that has buffers, as BatchNorm's statistics, which a capture would change, runs without graphs,
            and a warning says so. Default: none.
        limit: of :class:`mmvig.cuda_graphs.CudaGraphs`. Default: 'auto'.
    """

    def __init__(self, modules: str | Sequence[str] = (), limit: int | str = 'auto'):
        CudaGraphs(limit)  # checks it
        self.modules = [modules] if isinstance(modules, str) else modules
        self.limit = limit

    def before_run(self, runner: Runner) -> None:
        """Wrap the modules' forward passes."""
        modules = dict(_unwrapped(runner.model).named_modules())
        for name in self.modules:
            module = modules.get(name)
            why = None
            if module is None:
                why = 'the model has no such module'
            elif buffers := [key for key, _ in module.named_buffers()]:
                why = f'it has buffers ({buffers[0]}), which a capture would change'
            if why:
                runner.logger.warning(f'CudaGraphsHook: no graphs of {name}: {why}')
            elif not isinstance(_graphs_of(module), CudaGraphs):
                module.forward = _Graphed(module, self.limit)

    def after_run(self, runner: Runner) -> None:
        """Log what became of the graphs."""
        for name, module in _unwrapped(runner.model).named_modules():
            graphs = _graphs_of(module)
            if isinstance(graphs, CudaGraphs) and graphs.counts:
                runner.logger.info(f'CUDA graphs of {name}: {summary(graphs)}')


def _graphs_of(module: nn.Module) -> object:
    return getattr(module.__dict__.get('forward', module), 'graphs', None)


def _unwrapped(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def summary(graphs: CudaGraphs) -> str:
    """What became of a module's passes, in a line."""
    outcomes = graphs.outcomes()
    sizes = {size for size, _ in graphs.counts}
    return (
        f'{outcomes["replay"]} of {outcomes.total()} passes replayed, {outcomes["capture"]} captured, '
        f'{outcomes["eager"]} eager; {len(sizes)} sizes'
    )


class _Graphed:
    """A module's ``forward`` that goes through graphs."""

    def __init__(self, module: nn.Module, limit: int | str):
        self.module = module
        self.call = module.forward
        self.graphs = CudaGraphs(limit)

    def __call__(self, *args, **kwargs):
        if kwargs:
            return self.call(*args, **kwargs)
        return self.graphs.run(self.module, self.call, *args)
