"""The models that `backbone.py` times, by name: ours, and their peers from timm or torchvision.

Each is a feature extractor without a classifier. Hierarchical ones return four maps, at strides 4 to 32, as
a detector takes them; plain ones return the last block's map at stride 16 after the final norm. Ours have
an output norm a map and copy it to contiguous NCHW; peers' hierarchical maps have neither, in their
favour. All but EfficientViT have stochastic depth in training; position embeddings and windows are made for
the image's size. timm's transformers use PyTorch's fused attention.

A size is that of our model beside which a peer's ratio is shown. Accuracies are top-1 on ImageNet-1k at
224 x 224 without other labelled data, as each model's authors published them; Hiera's has MAE before.
"""

import fnmatch
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmvig.backbones import ViG, ViGH
from mmvig.engine.preflight import SetupError

DROP_PATH = 0.1
STRIDES, PLAIN_STRIDE = (4, 8, 16, 32), 16
SIZES = {'T': 'tiny', 'S': 'small', 'B': 'base'}
# Sides that every model halves without a remainder, so that all have the same maps.
SIDE_MULTIPLE = 32


class Absent(Exception):
    """A peer whose package is not installed, or does not have it."""


@dataclass(frozen=True)
class Entry:
    """A model that can be built for an image size."""

    name: str  # the family's name, a dash, the size's own name
    size: str  # T, S or B
    top1: float
    timm: str | None = None  # its name there; None: ours
    plain: bool = False  # whether it has one map, at one stride
    channels_last: bool = True  # weights and images; convolutions are several times slower in NCHW
    drop_path: bool = True  # whether it takes a rate of stochastic depth
    sized: bool = False  # whether it is built for an image size

    @property
    def ours(self) -> bool:
        """Whether it is of this project."""
        return self.timm is None

    @property
    def family(self) -> str:
        """ViG-H, ViG, Swin, ConvNeXt, DeiT, ..."""
        return self.name.rpartition('-')[0]

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def shapes(self, model: nn.Module, batch: int, height: int, width: int) -> list[tuple[int, ...]]:
        """Shapes of the maps of the model from :func:`build`."""
        pairs = zip(model.num_features, [PLAIN_STRIDE] if self.plain else STRIDES, strict=True)
        return [(batch, channels, height // stride, width // stride) for channels, stride in pairs]


def _registry() -> dict[str, Entry]:
    entries = []

    def add(
        family: str, names: str, accuracies: Sequence[float], timm: Sequence[str | None], **options
    ) -> None:
        sizes = options.pop('sizes', 'TSB')
        for name, size, top1, each in zip(names.split(), sizes, accuracies, timm, strict=True):
            entries.append(Entry(f'{family}-{name}', size, top1, each, **options))

    def arches(form: str) -> list[str]:
        return [form.format(arch) for arch in SIZES.values()]

    windows = {'channels_last': False, 'sized': True}
    add('ResNet', '50', [80.4], ['resnet50.a1_in1k'], sizes='T')
    add('Swin', 'T S B', [81.3, 83.0, 83.5], arches('swin_{}_patch4_window7_224'), **windows)
    add('ConvNeXt', 'T S B', [82.1, 83.1, 83.8], arches('convnext_{}'))
    add('InceptionNeXt', 'T S B', [82.3, 83.5, 84.0], arches('inception_next_{}'))
    add('Next-ViT', 'S B L', [82.5, 83.2, 83.6], [f'nextvit_{x}' for x in ('small', 'base', 'large')])
    add('MambaOut', 'T S B', [82.7, 84.1, 84.2], arches('mambaout_{}'))
    add('RDNet', 'T S B', [82.8, 83.7, 84.4], arches('rdnet_{}'))
    add('DaViT', 'T S B', [82.8, 84.2, 84.6], arches('davit_{}'), channels_last=False)
    add('Hiera', 'T S B', [82.8, 83.8, 84.5], arches('hiera_{}_224'), **windows)
    add('CAFormer', 'S18', [83.6], ['caformer_s18'], sizes='S')
    names = ['efficientvit_l1', 'efficientvit_l2']
    add('EfficientViT', 'L1 L2', [84.5, 85.0], names, sizes='SB', drop_path=False)
    add('ViG-H', 'T S B', [82.8, 83.8, 84.2], [None] * 3, channels_last=False)
    add('DeiT', 'T S B', [72.2, 79.9, 81.8], arches('deit_{}_patch16_224'), plain=True, **windows)
    add('ViG', 'T S B', [77.2, 81.7, 82.6], [None] * 3, plain=True, channels_last=False)
    return {entry.name: entry for entry in entries}


# Peers come before ours, whose rows show ratios to them.
MODELS = _registry()


def choose(patterns: Sequence[str]) -> list[Entry]:
    """The models that match any of some names or patterns (``ViG-H-*``), in the registry's order.

    Raises:
        SetupError: A pattern matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(MODELS, pattern):
            raise SetupError(f'--models: no model matches {pattern!r}; there is {", ".join(MODELS)}')
    return [m for m in MODELS.values() if any(fnmatch.fnmatch(m.name, pattern) for pattern in patterns)]


class _Maps(nn.Module):
    """A peer's maps as a tuple in NCHW, from NHWC as views.

    Args:
        body: from an image to its maps.
        num_features: the maps' channels.
        nhwc: whether the maps are. Default: they are NCHW.
    """

    def __init__(self, body: nn.Module, num_features: Sequence[int], nhwc: bool = False):
        super().__init__()
        self.body = body
        self.num_features = num_features
        self.nhwc = nhwc

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.body(x)
        return tuple(x.permute(0, 3, 1, 2) for x in maps) if self.nhwc else tuple(maps)


class _LastMap(nn.Module):
    """The normalised map of a timm vision transformer's last block."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.body.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)


class _Steps(nn.Module):
    """The outputs of a torchvision model's four stages, every second of its ``features``."""

    def __init__(self, features: nn.Sequential):
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2:
                maps.append(x)
        return maps


def build(entry: Entry, height: int, width: int, source: str = 'timm', backend: str = 'auto') -> nn.Module:
    """Build a model for images of a size, on the CPU, with random weights.

    Args:
        entry: which one.
        height, width: size of the images.
        source: where peers come from, 'timm' or 'torchvision'.
        backend: BiGLA backend of ours.

    Raises:
        Absent: The peer's source is not installed or does not have it.
    """
    if entry.ours:
        kind = ViG if entry.plain else ViGH
        model = kind(SIZES[entry.size], drop_path_rate=DROP_PATH, backend=backend)
    elif importlib.util.find_spec(source) is None:
        raise Absent(f'{source} is not installed')
    elif source == 'timm':
        model = _from_timm(entry, height, width)
    else:
        model = _from_torchvision(entry)
    return model.to(memory_format=entry.memory_format)


def _from_timm(entry: Entry, height: int, width: int) -> nn.Module:
    import timm

    if not timm.is_model(entry.timm):
        raise Absent(f'timm {timm.__version__} has no {entry.timm}')
    options = {'drop_path_rate': DROP_PATH} if entry.drop_path else {}
    if entry.sized:
        options['img_size'] = height, width
    if entry.plain:
        body = timm.create_model(entry.timm, num_classes=0, **options)
        return _Maps(_LastMap(body), [body.num_features])
    options['features_only'] = True
    body = timm.create_model(entry.timm, **options)
    strides = body.feature_info.reduction()
    if tuple(strides) != STRIDES:  # as of those whose stem has a map too
        body = timm.create_model(entry.timm, out_indices=[*map(strides.index, STRIDES)], **options)
    return _Maps(body, body.feature_info.channels(), body.output_fmt.value == 'NHWC')


def _from_torchvision(entry: Entry) -> nn.Module:
    from torchvision import models

    names = {'Swin': f'swin_{entry.size.lower()}', 'ConvNeXt': f'convnext_{SIZES[entry.size]}'}
    if entry.family not in names:
        raise Absent(f'{entry.name} is timed from timm alone')
    # Its rates of stochastic depth are fixed, and cost the same as any other.
    model = getattr(models, names[entry.family])()
    width = 128 if entry.size == 'B' else 96
    channels = [width * 2**i for i in range(4)]
    return _Maps(_Steps(model.features), channels, entry.family == 'Swin')
