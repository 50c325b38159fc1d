"""Parameters that are treated alike share a group of the optimiser, also where an older run is resumed."""

from itertools import chain

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, _ParamScheduler
from torch import nn

from mmvig.registry import OPTIM_WRAPPER_CONSTRUCTORS

# Which implementation takes the step: the config's choice, whatever the checkpoint was saved with.
IMPLEMENTATION = ('foreach', 'fused')
SHAPED = ('exp_avg', 'exp_avg_sq', 'momentum_buffer')  # what optimisers keep in a parameter's shape


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, with one group for all parameters that are treated alike.

    With a ``paramwise_cfg``, mmengine's makes a group of each parameter: about 400, through which every
    step, scheduler and hook walks, and for each of which a fused optimiser is launched. Settings are
    mmengine's. Groups are in the order of their first parameters, so the first group, whose learning rate
    is logged, is still that of the model's first parameter.

    The optimiser also loads the state of one group a parameter, and keeps its own ``fused`` and
    ``foreach``. The schedulers of such a run need :func:`renew_base_values`, which ``mmvig.Runner`` calls;
    without it cosine schedules are wrong where groups differ in learning rate.

    Args:
        optim_wrapper_cfg: config of the optimiser wrapper.
        paramwise_cfg: options by parameter, as in mmengine's DefaultOptimWrapperConstructor.

    Raises:
        ValueError: Modules share a parameter, and ``paramwise_cfg`` has no ``bypass_duplicate=True``.

    Example:
        >>> optim_wrapper = dict(
        ...     type='OptimWrapper',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05, fused=True),
        ...     constructor='mmvig.OptimWrapperConstructor',
        ...     paramwise_cfg=dict(flat_decay_mult=0.0),
        ... )
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimiser and its wrapper for a model."""
        self._merged = None
        optim_wrapper = super().__call__(model)
        groups = optim_wrapper.optimizer.param_groups
        groups[:] = map(dict, groups)  # PyTorch looks into them for each parameter, and ConfigDict is slow
        if self._merged is not None:
            optim_wrapper.optimizer.register_load_state_dict_pre_hook(_StateIntoGroups(self._merged))
        return optim_wrapper

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Append the parameter groups of ``module`` to ``params``; those of a whole model are merged."""
        super().add_params(params, module, prefix, **kwargs)
        if prefix:
            return  # mmengine walks through the submodules by this very method

        if len({group['params'][0] for group in params}) < len(params):
            raise ValueError(
                'modules of the model share a parameter: set paramwise_cfg.bypass_duplicate=True, '
                'which gives it to the first of them'
            )
        self.refine(params, module)
        alike: dict[str, list[int]] = {}
        for i, group in enumerate(params):
            settings = {**self.optimizer_cfg, **group, 'params': None}
            alike.setdefault(repr(sorted(settings.items())), []).append(i)
        self._merged = list(alike.values())
        params[:] = [{**params[same[0]], 'params': _parameters(params, same)} for same in self._merged]

    def refine(self, params: list[dict], model: nn.Module) -> None:
        """Change the groups, of one parameter each, before they are merged: for subclasses."""


class _StateIntoGroups:
    """A hook before ``Optimizer.load_state_dict``: it merges the state of one group a parameter.

    Args:
        merged: for each group, where its parameters are among all.
    """

    def __init__(self, merged: list[list[int]]):
        self.merged = merged

    def __call__(self, optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
        saved, own = state_dict['param_groups'], optimizer.param_groups
        lengths = [len(group['params']) for group in saved]
        total = sum(map(len, self.merged))
        if lengths == [1] * total:
            saved = [_alike(saved, same) for same in self.merged]
        elif lengths != [len(same) for same in self.merged]:
            raise _unfit(
                f'is of {sum(lengths)} parameters in {len(lengths)} groups, not {total} in {len(own)}'
            )
        for theirs, ours in zip(saved, own, strict=True):
            for index, parameter in zip(theirs['params'], ours['params'], strict=True):
                state = state_dict['state'].get(index, {})
                if any(key in state and state[key].shape != parameter.shape for key in SHAPED):
                    raise _unfit('has other parameters in its groups')
        chosen = [{key: group[key] for key in IMPLEMENTATION if key in group} for group in own]
        return {**state_dict, 'param_groups': [{**a, **b} for a, b in zip(saved, chosen, strict=True)]}


def _alike(groups: list[dict], same: list[int]) -> dict:
    """One group of some that must have the same settings."""
    first, *others = ({**groups[i], 'params': None} for i in same)
    for settings in others:
        differ = [key for key in first if settings.get(key) != first[key]]
        if differ:
            raise _unfit(f'has several values of {" and ".join(differ)} where the config has one')
    return {**first, 'params': _parameters(groups, same)}


def _parameters(groups: list[dict], same: list[int]) -> list:
    return [groups[i]['params'][0] for i in same]


def _unfit(what: str) -> ValueError:
    return ValueError(
        f'the saved state of the optimiser {what}: resume with the model and paramwise_cfg of that run'
    )


def renew_base_values(schedulers: list[_ParamScheduler] | dict[str, list[_ParamScheduler]]) -> None:
    """Give resumed schedulers the initial values of their optimiser's groups, where those were merged.

    A scheduler's state has one initial value a group, and its formula takes them by position.

    Args:
        schedulers: those of a Runner, by optimiser where it has several.
    """
    for scheduler in chain(*schedulers.values()) if isinstance(schedulers, dict) else schedulers:
        groups = scheduler.optimizer.param_groups
        if len(getattr(scheduler, 'base_values', groups)) != len(groups):
            scheduler.base_values = [group[f'initial_{scheduler.param_name}'] for group in groups]
