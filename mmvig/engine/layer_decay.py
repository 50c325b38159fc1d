"""Layer-wise decay of the learning rate, for any model whose backbone knows the depth of its parameters."""

from mmengine.logging import print_log
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mmvig.engine.optim import OptimWrapperConstructor
from mmvig.registry import OPTIM_WRAPPER_CONSTRUCTORS

OPTIONS = {'decay_rate', 'custom_keys'}
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # _NormBase: batch and instance norms
POSITION_EMBEDDINGS = ('pos_embed', 'position_embed', 'relative_position')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(OptimWrapperConstructor):
    """Earlier layers of the backbone learn more slowly: layer i of L at ``lr * decay_rate ** (L - 1 - i)``.

    The layers are what ``model.backbone.get_layer_depth(parameter_name, prefix)`` says; a model without
    ``backbone`` is taken to be one itself. All other parameters get the full learning rate, and frozen ones
    are left out. Norm weights, biases, position embeddings and all one-dimensional parameters get no weight
    decay. Parameters that are treated alike share a group, as in OptimWrapperConstructor.

    Args:
        optim_wrapper_cfg: config of the optimiser wrapper; its ``optimizer`` must give ``lr``.
        paramwise_cfg: ``decay_rate``, in (0, 1], and optionally ``custom_keys`` as in mmengine's
            DefaultOptimWrapperConstructor: a parameter whose name contains a key (the longest counts) gets
            ``lr_mult`` (default: 1) times its layer's learning rate, and ``decay_mult`` (default: 1) times
            the weight decay, whatever was said of norms and the like.

    Raises:
        TypeError: the backbone has no ``get_layer_depth``, or an option is of another type.
        ValueError: an option is unknown, missing or out of its range.

    Example:
        >>> optim_wrapper = dict(
        ...     type='OptimWrapper',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     constructor='mmvig.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(decay_rate=0.8),
        ... )
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        # mmengine's option for parameters that two modules share.
        self.paramwise_cfg = {**self.paramwise_cfg, 'bypass_duplicate': True}

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        unknown = set(self.paramwise_cfg) - OPTIONS
        if unknown:
            raise ValueError(
                f'paramwise_cfg takes {sorted(OPTIONS)} with {type(self).__name__}, got {sorted(unknown)}'
            )
        rate = self.paramwise_cfg.get('decay_rate')
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f'paramwise_cfg.decay_rate must be in (0, 1], got {rate!r}')
        if self.base_lr is None:
            raise ValueError('optimizer must give lr, of which the layers get their parts')

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Append the parameter groups of ``module`` to ``params``."""
        backbone = getattr(module, 'backbone', module)
        if not prefix and not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(
                f'the backbone {type(backbone).__name__} has no get_layer_depth(parameter_name, prefix), '
                'which layer-wise learning-rate decay needs'
            )
        super().add_params(params, module, prefix, **kwargs)
        if prefix:
            return  # mmengine walks through the submodules by this very method
        rates = [group['lr'] for group in params]
        print_log(
            f'Layer-wise decay over {type(backbone).__name__}: learning rates from {min(rates):.3g} to '
            f'{max(rates):.3g} in {len(params)} groups.',
            logger='current',
        )

    def refine(self, params: list[dict], model: nn.Module) -> None:
        """Set the learning rate of each parameter's layer, and no weight decay for norms and the like."""
        backbone = getattr(model, 'backbone', model)
        backbone_prefix = '' if backbone is model else 'backbone.'
        names = {parameter: name for name, parameter in model.named_parameters()}
        norms = (each for each in model.modules() if isinstance(each, NORMS))
        norm_parameters = {parameter for norm in norms for parameter in norm.parameters(recurse=False)}
        for group in params:
            (parameter,) = group['params']
            name = names[parameter]
            not_decayed = (
                parameter.ndim <= 1
                or parameter in norm_parameters
                or any(part in name for part in POSITION_EMBEDDINGS)
            )
            # Of the options allowed here, mmengine sets a learning rate for custom keys alone.
            if not_decayed and 'lr' not in group:
                group['weight_decay'] = 0.0
            lr = group.get('lr', self.base_lr)
            if name.startswith(backbone_prefix):
                layer, num_layers = backbone.get_layer_depth(name, backbone_prefix)
                lr *= self.paramwise_cfg['decay_rate'] ** (num_layers - 1 - layer)
            group['lr'] = lr
