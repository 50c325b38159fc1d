"""What the backbones share: checked options, freezing, and strict loading of checkpoints."""

from collections.abc import Sequence

from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor

from mmvig import checkpoints
from mmvig.backbones.graphs import Graphs


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
        super().__init__(init_cfg=init_cfg)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate}')
        self.in_channels = in_channels
        self.num_units = num_units
        self.out_indices = self._parse_out_indices(out_indices)
        num_built = max(self.out_indices) + 1
        if not -1 <= frozen_stages <= num_built:
            raise ValueError(f'frozen_stages must be in -1..{num_built}, got {frozen_stages}')
        self.frozen_stages = frozen_stages
        self._strict_loading = True
        self._graphs = Graphs(cuda_graphs, with_cp)

    def _parse_out_indices(self, out_indices: Sequence[int]) -> tuple[int, ...]:
        out_indices = tuple(sorted(out_indices))
        if not out_indices or len(set(out_indices)) != len(out_indices):
            unit = self.units.removesuffix('s')
            raise ValueError(f'out_indices must name at least one {unit}, each once, got {out_indices}')
        if not all(0 <= i < self.num_units for i in out_indices):
            raise ValueError(f'out_indices must be in 0..{self.num_units - 1}, got {out_indices}')
        return out_indices

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < self.min_side:
            raise ValueError(
                f'images must be [B, {self.in_channels}, H, W] with H, W >= {self.min_side}, '
                f'got {list(x.shape)}'
            )

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

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """Load official or our own names, also when wrapped as a checkpoint file holds them."""
        state_dict = dict(checkpoints.unwrap(state_dict))
        if not strict:
            checkpoints.adapt(self, state_dict, prefix='', strict=False)
        self._strict_loading, previous = strict, self._strict_loading
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._strict_loading = previous

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Reached on every way to load: also as a part of a detector, and by mmengine, which only warns.
        if self._strict_loading:
            checkpoints.adapt(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _checkpoint_filter(self, state_dict: dict, prefix: str, *args) -> None:
        # The name that mmpretrain's ImageClassifier calls whenever it is loaded.
        checkpoints.adapt_classifier(self, state_dict, prefix)
