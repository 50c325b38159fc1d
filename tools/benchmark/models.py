"""The models that `backbone.py` times, by name: ours, and their peers from timm or torchvision.

Each is a feature extractor without a classifier. Hierarchical ones return four maps, at strides 4 to 32, as
a detector takes them; plain ones return the last block's map at stride 16 after the final norm. Ours have
an output norm a map and copy it to contiguous NCHW; peers' hierarchical maps have neither, in their
favour. All have stochastic depth in training, and position embeddings and windows made for the image's
size. timm's transformers use PyTorch's fused attention.
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
HIERARCHICAL_STRIDES = (4, 8, 16, 32)
SIZES = {'T': 'tiny', 'S': 'small', 'B': 'base'}
# Sides that every model halves without a remainder, so that all have the same maps.
SIDE_MULTIPLE = 32


class Absent(Exception):
    """A peer whose package is not installed, or does not have it."""


@dataclass(frozen=True)
class Entry:
    """A model that can be built for an image size."""

    name: str  # the family's name, a dash, the size's letter
    ours: bool
    channels: tuple[int, ...]  # of its maps
    strides: tuple[int, ...]

    @property
    def family(self) -> str:
        """ViG-H, ViG, Swin, ConvNeXt or DeiT."""
        return self.name.rpartition('-')[0]

    @property
    def size(self) -> str:
        """T, S or B."""
        return self.name[-1]

    @property
    def plain(self) -> bool:
        """Whether it has one map at one stride."""
        return len(self.strides) == 1

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of weights and images; a ConvNeXt is several times slower in the default one."""
        return torch.channels_last if self.family == 'ConvNeXt' else torch.contiguous_format

    def shapes(self, batch: int, height: int, width: int) -> list[tuple[int, ...]]:
        """Shapes of the maps."""
        pairs = zip(self.channels, self.strides, strict=True)
        return [(batch, channels, height // stride, width // stride) for channels, stride in pairs]


def _registry() -> dict[str, Entry]:
    widths = {
        'Swin': (96, 96, 128),
        'ConvNeXt': (96, 96, 128),
        'ViG-H': (96, 96, 128),
        'DeiT': (192, 384, 768),
        'ViG': (192, 384, 768),
    }
    entries = {}
    for family, family_widths in widths.items():
        plain = family in ('ViG', 'DeiT')
        for size, width in zip(SIZES, family_widths, strict=True):
            channels = (width,) if plain else tuple(width * 2**i for i in range(4))
            strides = (16,) if plain else HIERARCHICAL_STRIDES
            entries[f'{family}-{size}'] = Entry(
                f'{family}-{size}', family.startswith('ViG'), channels, strides
            )
    return entries


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
    """A peer's maps as a tuple in NCHW, from NHWC as views."""

    def __init__(self, body: nn.Module, channels_last: bool):
        super().__init__()
        self.body = body
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.body(x)
        return tuple(x.permute(0, 3, 1, 2) for x in maps) if self.channels_last else tuple(maps)


class _LastMap(nn.Module):
    """The normalised map of a timm vision transformer's last block."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.body.forward_intermediates(x, indices=1, norm=True, intermediates_only=True))


class _Steps(nn.Module):
    """The outputs of a torchvision model's four stages, every second of its ``features``."""

    def __init__(self, features: nn.Sequential):
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2:
                maps.append(x)
        return tuple(maps)


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
    arch = SIZES[entry.size]
    if entry.ours:
        kind = ViG if entry.plain else ViGH
        model = kind(arch, drop_path_rate=DROP_PATH, backend=backend)
    elif importlib.util.find_spec(source) is None:
        raise Absent(f'{source} is not installed')
    else:
        model = {'timm': _from_timm, 'torchvision': _from_torchvision}[source](entry, arch, height, width)
    return model.to(memory_format=entry.memory_format)


def _from_timm(entry: Entry, arch: str, height: int, width: int) -> nn.Module:
    import timm

    size = {'img_size': (height, width)}
    if entry.family == 'DeiT':
        body = timm.create_model(
            f'deit_{arch}_patch16_224', num_classes=0, drop_path_rate=DROP_PATH, **size
        )
        return _LastMap(body)
    swin = entry.family == 'Swin'
    name = f'swin_{arch}_patch4_window7_224' if swin else f'convnext_{arch}'
    options = size if swin else {}
    body = timm.create_model(name, features_only=True, drop_path_rate=DROP_PATH, **options)
    return _Maps(body, channels_last=swin)


def _from_torchvision(entry: Entry, arch: str, height: int, width: int) -> nn.Module:
    from torchvision import models

    if entry.family == 'DeiT':
        raise Absent('torchvision has no DeiT')
    swin = entry.family == 'Swin'
    name = f'swin_{entry.size.lower()}' if swin else f'convnext_{arch}'
    # Its rates of stochastic depth are fixed, and cost the same as any other.
    model = getattr(models, name)()
    return _Maps(_Steps(model.features), channels_last=swin)
