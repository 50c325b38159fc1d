"""What the backbones share: checked options, freezing, and strict loading of checkpoints."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor

from mmvig import checkpoints
from mmvig.backbones.block import recomputing
from mmvig.cuda_graphs import CudaGraphs
from mmvig.first_use import FirstUse


class Backbone(BaseModule):
    """A stem, then a list of units (stages or blocks), with a norm ``norm{i}`` for each that is an output.

    A subclass builds ``stem``, the list that ``units`` names, up to the last output, and the norms. It ends
    its ``__init__`` with :meth:`_freeze`. Its ``_compute`` makes the maps of checked images.

    Args:
        num_units: units of the whole network, built or not.
        in_channels: channels of the image.
        out_indices: units that are outputs.
        drop_path_rate: stochastic depth of the last block.
        frozen_stages: -1 freezes nothing, 0 the stem, i > 0 also the first i units.
        with_cp: whether the subclass recomputes its blocks in the backward pass.
        cuda_graphs: how many kinds of input to run as CUDA graphs, or 'auto'.
        init_cfg: mmengine's initialisation.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of its range.
    """

    units: str  # name of the list of units, 'stages' or 'blocks'
    min_side = 1  # the smallest image side that the stem takes
    # Official names of the classification model's last norm and classifier.
    official_norm: str
    official_head: str
    # Whether that norm is the backbone's own, after its last unit, whatever the outputs.
    owns_final_norm = False

    def __init__(
        self,
        num_units: int,
        in_channels: int,
        out_indices: Sequence[int],
        drop_path_rate: float,
        frozen_stages: int,
        with_cp: bool,
        cuda_graphs: int | str,
        init_cfg: dict | list[dict] | None,
    ):
        _check_init_cfg(init_cfg)
        super().__init__(init_cfg=init_cfg)
        if not isinstance(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
        check_positive_ints(in_channels=[in_channels])
        if not isinstance(with_cp, bool):
            raise TypeError(f'with_cp must be True or False, got {with_cp!r}')
        self.in_channels = in_channels
        self.num_units = num_units
        self.out_indices = self._parse_out_indices(out_indices)
        num_built = max(self.out_indices) + 1
        if type(frozen_stages) is not int or not -1 <= frozen_stages <= num_built:
            raise ValueError(f'frozen_stages must be in -1..{num_built}, got {frozen_stages!r}')
        self.frozen_stages = frozen_stages
        self.graphs = CudaGraphs(cuda_graphs, with_cp)
        self.first_use = FirstUse()

    def _parse_out_indices(self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        indices = [out_indices] if type(out_indices) is int else out_indices
        if not isinstance(indices, (list, tuple, range)) or any(type(i) is not int for i in indices):
            raise TypeError(f'out_indices must be an int or a list of ints, got {out_indices!r}')
        if not all(-self.num_units <= i < self.num_units for i in indices):
            raise ValueError(
                f'out_indices must be in {-self.num_units}..{self.num_units - 1}, got {out_indices}'
            )
        parsed = tuple(sorted(i % self.num_units for i in indices))
        if not parsed or len(set(parsed)) != len(parsed):
            unit = self.units.removesuffix('s')
            raise ValueError(f'out_indices must name at least one {unit}, each once, got {out_indices}')
        return parsed

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f'images must be a floating-point torch.Tensor, got {found}')
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < self.min_side:
            raise ValueError(
                f'images must be [B, {self.in_channels}, H, W] with H, W >= {self.min_side}, '
                f'got {list(x.shape)}'
            )

    def _run(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps of images: on a GPU, kernels are compiled first, and passes may be CUDA graphs."""
        self._check(x)
        self.first_use.prepare(self, self._compute, x)
        return self.graphs.run(self, self._compute, x, lean=self._compute_lean)

    def _compute_lean(self, x: Tensor) -> tuple[Tensor, ...]:
        """What ``_compute`` gives, with blocks that are recomputed in the backward pass."""
        with recomputing():
            return self._compute(x)

    def train(self, mode: bool = True) -> 'Backbone':
        """Set the training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.stem]
        for i in range(self.frozen_stages):
            frozen.append(getattr(self, self.units)[i])
            if i in self.out_indices:
                frozen.append(getattr(self, f'norm{i}'))
        for module in frozen:
            module.eval().requires_grad_(False)

    def init_weights(self) -> None:
        """Apply ``init_cfg``; a 'Pretrained' entry is loaded last and strictly.

        Raises:
            FileNotFoundError: the checkpoint does not exist.
            RuntimeError: its keys or shapes do not match this backbone.
        """
        cfgs = self.init_cfg or []
        cfgs = [cfgs] if isinstance(cfgs, dict) else cfgs
        pretrained = [cfg for cfg in cfgs if cfg['type'] in ('Pretrained', PretrainedInit)]
        self.init_cfg, original = [cfg for cfg in cfgs if cfg not in pretrained], self.init_cfg
        super().init_weights()
        self.init_cfg = original
        for cfg in pretrained:
            options = {key: value for key, value in cfg.items() if key != 'type'}
            self.load_state_dict(checkpoints.read(**options))

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """Load official or our own names, also when wrapped as a checkpoint file holds them.

        Args:
            state_dict: the state dict, or what a checkpoint file holds.
            strict: whether missing and unexpected keys are an error. Default: True.
            assign: see ``torch.nn.Module.load_state_dict``.

        Returns:
            ``missing_keys`` and ``unexpected_keys``, by our names.

        Raises:
            TypeError: it maps no names to tensors.
            RuntimeError: a shape does not match, or with ``strict`` anything else.
        """
        if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
            raise TypeError(f'state_dict must map names to tensors, got {type(state_dict).__name__}')
        content = checkpoints.unwrap(state_dict)
        state_dict = OrderedDict(content)
        if hasattr(content, '_metadata'):  # the versions of its layers, which quantised ones need
            state_dict._metadata = content._metadata
        self._adapt(state_dict, '', strict)
        return super().load_state_dict(state_dict, strict, assign)

    def _adapt(self, state_dict: dict, prefix: str, strict: bool) -> None:
        """Give what is to be loaded our names, in place; see :func:`mmvig.checkpoints.adapt`."""
        checkpoints.adapt(self, state_dict, prefix, strict)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Reached on every way to load, also as a part of a detector. Who loads hears of what does not fit.
        self._adapt(state_dict, prefix, strict=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _checkpoint_filter(self, state_dict: dict, prefix: str, *args) -> None:
        # The name that mmpretrain's ImageClassifier calls whenever it is loaded.
        checkpoints.adapt_classifier(self, state_dict, prefix)


def parse_arch(arch: str | dict, archs: dict[str, dict]) -> tuple[str | None, dict]:
    """The name of an architecture in ``archs``, None for one of the user's own, and its settings."""
    if isinstance(arch, str) and arch.lower() in archs:
        return arch.lower(), archs[arch.lower()]
    if isinstance(arch, dict):
        return None, dict(arch)
    kind = ValueError if isinstance(arch, str) else TypeError
    raise kind(f'arch must be one of {list(archs)} or a dict, got {arch!r}')


def check_positive_ints(**values: Sequence[int]) -> None:
    """Raise an error that names the first of the arguments with an entry that is no int of at least 1."""
    for name, entries in values.items():
        for value in entries:
            if type(value) is not int:
                raise TypeError(f'{name} must be int, got {value!r}')
            if value < 1:
                raise ValueError(f'{name} must be positive, got {value}')


def _check_init_cfg(init_cfg: dict | list[dict] | None) -> None:
    """Raise TypeError unless mmengine can read it: it looks at it only once weights are initialised."""
    if init_cfg is None:
        return
    for cfg in init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]:
        pretrained = isinstance(cfg, dict) and cfg.get('type') in ('Pretrained', PretrainedInit)
        if not isinstance(cfg, dict) or 'type' not in cfg or (pretrained and 'checkpoint' not in cfg):
            example = "dict(type='Pretrained', checkpoint=FILE)"
            raise TypeError(
                f'init_cfg must be a dict such as {example}, or a list of them, got {init_cfg!r}'
            )
