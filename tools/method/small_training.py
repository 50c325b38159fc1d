"""Small trainings of ViG-T's steps and DeiT-T, many on a GPU: what `roadmap.py` and `resolution.py` share.

The pictures stay on the device as bytes and are cropped, flipped and enlarged there, so that a run needs no
data workers and several can share a GPU. mmengine's Runner trains mmpretrain's classifier by the schedule
of configs/_base_/schedules/adamw_16e.py, with bf16 AMP on a GPU and without mixed precision on a CPU.
"""

import io
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context, get_start_method
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not
sys.path.append(str(Path(__file__).resolve().parents[1] / 'benchmark'))  # common

import mmvig.compat  # noqa: F401  before what imports mmcv.ops

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from common import Clock, autocast, spread, warm_up
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.datasets import CustomDataset
from mmpretrain.models import ImageClassifier, VisionTransformer
from mmpretrain.structures import DataSample
from roadmap_steps import build_backbone
from scipy import stats
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from mmvig.engine.files import write_whole
from mmvig.engine.preflight import SetupError, check_writable
from mmvig.engine.runner import Runner

DEIT = 'deit'
WIDTH = 192  # of both models
SCHEDULE = Path(__file__).resolve().parents[2] / 'configs/_base_/schedules/adamw_16e.py'
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
CROPS, ASPECTS = (0.4, 1.0), (3 / 4, 4 / 3)  # as in configs/_base_/datasets/tiny_imagenet40.py
WARM_UP = 2  # epochs, the schedule's
EVALUATED_PIXELS = 2**25  # a batch, whatever the pictures' size: 32 of 1024 x 1024
WARM_UP_SECONDS = 0.2
ROUNDS = 10


def add_shared_arguments(parser: ArgumentParser) -> None:
    """Add what both tools take."""
    parser.add_argument(
        '--data',
        default='data/tin40',
        help='folder with {train,val}/CLASS/PICTURE, all of one size; default: data/tin40',
    )
    parser.add_argument('--size', type=int, default=128, help='side to train at, from 16; default: 128')
    parser.add_argument('--epochs', type=int, default=16, help=f'more than {WARM_UP}; default: 16')
    parser.add_argument('--batch', type=int, default=256, help='default: 256')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument(
        '--at-once', type=int, default=1, help='trainings side by side on the device; default: 1'
    )
    parser.add_argument(
        '--weights',
        default='work_dirs/method/weights',
        help='folder for weights and logs; runs whose weights are there are not trained again; '
        'default: work_dirs/method/weights',
    )
    parser.add_argument(
        '--out', default='work_dirs/method', help='folder for the results; default: work_dirs/method'
    )


def check_shared_arguments(args: Namespace) -> None:
    """Check what :func:`add_shared_arguments` added; set ``device``, as mmengine chooses it.

    Raises:
        SetupError: A number is out of its range, the data are missing, or a folder cannot be written.
    """
    check_least(args, {'size': 16, 'epochs': WARM_UP + 1, 'batch': 1, 'at_once': 1})
    if len(set(args.seeds)) != len(args.seeds):
        raise SetupError(f'--seeds takes numbers, each once, got {args.seeds}')
    for split in ('train', 'val'):
        if not Path(args.data, split).is_dir():
            raise SetupError(
                f'pictures are missing: expected {Path(args.data, split).absolute()}/CLASS/PICTURE; '
                'get Tiny-ImageNet, or name another folder with --data'
            )
    for option in ('weights', 'out'):
        check_writable(f'--{option}', getattr(args, option), folder=True)
    args.device = 'cuda' if torch.cuda.is_available() else 'cpu'


def check_least(args: Namespace, least: dict[str, int]) -> None:
    """Check that numbers of the command line are not below these.

    Raises:
        SetupError: One is.
    """
    for name, value in least.items():
        if getattr(args, name) < value:
            option = name.replace('_', '-')
            raise SetupError(f'--{option} must be at least {value}, got {getattr(args, name)}')


class Pictures(Dataset):
    """A folder of classes as bytes on a device; one item is a whole batch.

    Args:
        folder: with a folder a class, as mmpretrain's CustomDataset takes it.
        device: where the pictures are.
        size: side of the batches' pictures, which are random crops, flipped at random.

    Attributes:
        pixels: ``[n, 3, h, w]`` uint8, RGB.
        labels: ``[n]``.

    Raises:
        SetupError: A picture cannot be read, or is of another size than the first.
    """

    def __init__(self, folder: str | Path, device: str, size: int):
        listed = CustomDataset(data_prefix=str(folder), pipeline=[])
        self.metainfo = listed.metainfo  # read by mmengine too
        self.classes = self.metainfo['classes']
        records = [listed.get_data_info(i) for i in range(len(listed))]
        with ThreadPoolExecutor() as pool:  # OpenCV lets other threads run
            images = list(pool.map(_read, (record['img_path'] for record in records)))
        for record, image in zip(records, images, strict=True):
            if image.shape != images[0].shape:
                found = ' and '.join('x'.join(map(str, x.shape[:2])) for x in (images[0], image))
                raise SetupError(f'{record["img_path"]}: all pictures must have one size, found {found}')
        self.pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(device)
        self.labels = torch.tensor([record['gt_label'] for record in records], device=device)
        self.size = size
        # Made once: a run takes each picture once an epoch.
        self.samples = [DataSample().set_gt_label(label[None]) for label in self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> dict:
        """``inputs`` [B, 3, size, size], from 0 to 255, and ``data_samples`` of the pictures of a batch."""
        pixels = self.pixels[torch.tensor(indices, device=self.pixels.device)]
        return {
            'inputs': random_crops(pixels.float(), self.size),
            'data_samples': [self.samples[i] for i in indices],
        }


def _read(path: str) -> np.ndarray:
    """[h, w, 3] uint8, RGB."""
    image = cv2.imread(path)
    if image is None:
        raise SetupError(f'{path} cannot be read as a picture')
    return image[..., ::-1]


def random_crops(pixels: Tensor, size: int) -> Tensor:
    """A crop of each picture, enlarged (bilinear) to ``size``, half of them flipped.

    A crop has an area of :data:`CROPS` of the picture and a width by height of :data:`ASPECTS`, is cut
    where it would be longer than the picture, and lies anywhere in it.

    Args:
        pixels: ``[B, C, h, w]``, floating point.
        size: side of the result.

    Returns:
        ``[B, C, size, size]``.
    """
    draws = torch.rand(5, len(pixels), device=pixels.device)
    area = CROPS[0] + (CROPS[1] - CROPS[0]) * draws[0]
    low, high = map(math.log, ASPECTS)
    aspect = torch.exp(low + (high - low) * draws[1])
    # Sides as parts of the picture's, centres between -1 and 1: affine_grid's coordinates.
    width, height = ((area * factor).sqrt().clamp(max=1) for factor in (aspect, 1 / aspect))
    x, y = ((2 * draw - 1) * (1 - side) for draw, side in ((draws[2], width), (draws[3], height)))
    flip, zero = torch.where(draws[4] < 0.5, -1.0, 1.0), torch.zeros_like(x)
    rows = torch.stack([width * flip, zero, x]), torch.stack([zero, height, y])
    theta = torch.stack(rows).permute(2, 0, 1)
    grid = F.affine_grid(theta, [*pixels.shape[:2], size, size], align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode='border', align_corners=False)


@lru_cache(maxsize=4)
def pictures(data: str, split: str, device: str, size: int) -> Pictures:
    """Those of a split, read once a process."""
    return Pictures(Path(data, split), device, size)


def build_classifier(name: str, size: int, num_classes: int, **options) -> ImageClassifier:
    """A classifier of mmpretrain's on a backbone, not yet initialised as its ``init_cfg`` says.

    Args:
        name: a step of :data:`roadmap_steps.STEPS`, or 'deit', mmpretrain's DeiT-T.
        size: side that the position embedding is made for.
        num_classes: number of classes.
        options: of the backbone.
    """
    init_default_scope('mmpretrain')
    head = {
        'num_classes': num_classes,
        'in_channels': WIDTH,
        'loss': {'type': 'LabelSmoothLoss', 'label_smooth_val': 0.1, 'mode': 'original'},
    }
    preprocessor = {'mean': MEAN, 'std': STD, 'num_classes': num_classes}
    if name == DEIT:  # as mmpretrain's configs/deit/deit-tiny_4xb256_in1k.py has it
        return ImageClassifier(
            VisionTransformer(arch='deit-tiny', img_size=size, patch_size=16, **options),
            head={'type': 'VisionTransformerClsHead', **head},
            data_preprocessor=preprocessor,
            init_cfg=[
                {'type': 'TruncNormal', 'layer': 'Linear', 'std': 0.02},
                {'type': 'Constant', 'layer': 'LayerNorm', 'val': 1.0, 'bias': 0.0},
            ],
        )
    init = {'type': 'Normal', 'layer': 'Linear', 'std': 0.02}
    return ImageClassifier(  # as configs/_base_/models/vig_classifier.py
        build_backbone(name, img_size=size, **options),
        neck={'type': 'GlobalAveragePooling'},
        head={'type': 'LinearClsHead', 'init_cfg': init, **head},
        data_preprocessor=preprocessor,
    )


@dataclass(frozen=True)
class Job:
    """One training."""

    name: str
    seed: int
    size: int
    epochs: int
    batch: int
    data: str
    weights: str
    device: str

    @property
    def path(self) -> Path:
        """The file of its weights, which names all that they depend on but the data."""
        return Path(
            self.weights, f'{self.name}_{self.size}px_{self.epochs}e_b{self.batch}_seed{self.seed}.pth'
        )


def jobs_of(args: Namespace, names: Iterable[str]) -> list[Job]:
    """The trainings of these models, all models of a seed before the next seed."""
    shared = args.size, args.epochs, args.batch, args.data, args.weights, args.device
    names = list(names)
    return [Job(name, seed, *shared) for seed in args.seeds for name in names]


def train_all(jobs: Sequence[Job], at_once: int) -> Iterator[Job]:
    """Train what has no weights yet, ``at_once`` processes side by side; give each as it is there."""
    yield from (job for job in jobs if job.path.is_file())
    missing = [job for job in jobs if not job.path.is_file()]
    if at_once == 1 or len(missing) < 2:
        for job in missing:
            train(job)
            yield job
        return
    # spawn: CUDA does not survive a fork.
    with ProcessPoolExecutor(min(at_once, len(missing)), get_context('spawn')) as pool:
        futures = {pool.submit(train, job): job for job in missing}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(cancel_futures=True)


def train(job: Job) -> None:
    """Train and write the weights.

    Raises:
        SetupError: a batch has more pictures than there are.
        FloatingPointError: weights are not finite at the end.
    """
    data = pictures(job.data, 'train', job.device, job.size)
    if job.batch > len(data):
        raise SetupError(f'--batch {job.batch}: {job.data}/train has only {len(data)} pictures')
    sampler = BatchSampler(RandomSampler(data), job.batch, drop_last=True)
    schedule = Config.fromfile(SCHEDULE)
    amp = {'type': 'AmpOptimWrapper', 'dtype': 'bfloat16', 'loss_scale': 1.0}  # bf16 needs no scaling
    optimiser = schedule.optim_wrapper.to_dict() | (amp if job.device == 'cuda' else {})
    for name in ('pos_embed', 'cls_token'):  # as both models' published recipes
        optimiser['paramwise_cfg']['custom_keys'][name] = {'decay_mult': 0.0}
    torch.manual_seed(job.seed)  # the backbone draws its weights as it is built, before the Runner's seed
    runner = Runner(
        model=build_classifier(job.name, job.size, len(data.classes)).to(job.device),
        work_dir=str(Path(job.weights, 'logs', job.path.stem)),
        experiment_name=job.path.stem,
        train_dataloader=DataLoader(data, sampler=sampler, batch_size=None, collate_fn=_as_it_is),
        train_cfg={'by_epoch': True, 'max_epochs': job.epochs},
        optim_wrapper=optimiser,
        param_scheduler=[dict(each) for each in schedule.param_scheduler],
        # No checkpoints but the last, written below; the sampler has no batches to be shared out.
        default_hooks={
            'checkpoint': None,
            'sampler_seed': None,
            'logger': {'type': 'LoggerHook', 'interval': 20},
        },
        # As it is: mmengine would set it for all that comes later in this process.
        env_cfg={'cudnn_benchmark': True, 'mp_cfg': {'mp_start_method': get_start_method()}},
        randomness={'seed': job.seed},
        log_level='WARNING',
        default_scope='mmpretrain',
    )
    runner.train()
    if not all(bool(x.isfinite().all()) for x in runner.model.parameters()):
        raise FloatingPointError(f'{job.path.stem}: the trained weights are not finite')
    buffer = io.BytesIO()
    torch.save({name: x.cpu() for name, x in runner.model.state_dict().items()}, buffer)
    write_whole(job.path, buffer.getbuffer())


def _as_it_is(batch: dict) -> dict:
    return batch


def load(job: Job, num_classes: int) -> ImageClassifier:
    """The trained classifier, in evaluation mode."""
    model = build_classifier(job.name, job.size, num_classes)
    model.load_state_dict(torch.load(job.path, weights_only=True))
    return model.to(job.device).eval()


@torch.no_grad()
def top1(model: ImageClassifier, data: Pictures, size: int) -> float:
    """Top-1 in percent on whole pictures that are enlarged (bilinear) to a side."""
    device = data.pixels.device.type
    batch = max(1, EVALUATED_PIXELS // size**2)
    correct = 0
    for pixels, labels in zip(data.pixels.split(batch), data.labels.split(batch), strict=True):
        inputs = F.interpolate(pixels.float(), (size, size), mode='bilinear', align_corners=False)
        inputs = model.data_preprocessor({'inputs': inputs})['inputs']
        with autocast(device, 'bf16' if device == 'cuda' else 'fp32'):
            scores = model(inputs, mode='tensor')
        correct += (scores.argmax(1) == labels).sum().item()
    return 100 * correct / len(data)


def interval(values: Sequence[float], pictures: int) -> dict[str, float | str]:
    """Mean of top-1 in percent, and half the width of its 95 % confidence interval.

    Of several seeds by Student's t, for the mean over seeds on these pictures; of one seed the normal
    approximation of the binomial interval, for this one model on other pictures.

    Args:
        values: a seed's each.
        pictures: how many there were in each.
    """
    mean = float(np.mean(values))
    if len(values) == 1:
        error = 100 * math.sqrt(mean / 100 * (1 - mean / 100) / pictures)
        return {'mean': mean, 'half': stats.norm.ppf(0.975) * error, 'of': 'pictures'}
    return {'mean': mean, 'half': _half(values), 'of': 'seeds'}


def _half(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % interval by Student's t."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def gain(after: Sequence[float], before: Sequence[float]) -> dict[str, float] | None:
    """Mean difference of two models' top-1 by seed and half its 95 % interval; None for one seed."""
    if len(after) < 2:
        return None
    differences = [a - b for a, b in zip(after, before, strict=True)]
    return {'mean': float(np.mean(differences)), 'half': _half(differences)}


def with_interval(found: dict | None, form: str = '.2f') -> str:
    """Mean and half an interval's width as text; a dash for None."""
    return '-' if found is None else f'{found["mean"]:{form}} ± {found["half"]:.2f}'


def in_turns(functions: dict[str, Callable], device: str) -> dict[str, dict[str, float]]:
    """Time functions in turns, so that what changes during the measurement is in all of them.

    Returns:
        Seconds of a call: median, p10 and p90 of :data:`ROUNDS` turns.
    """
    clock = Clock(device)
    repeats = {}
    for name, function in functions.items():
        seconds = warm_up(function, device, WARM_UP_SECONDS)
        repeats[name] = max(1, min(20, round(0.02 / seconds)))
    times = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            first = clock.mark()
            for _ in range(repeats[name]):
                function()
            last = clock.mark()
            clock.wait()
            times[name].append(clock.seconds(first, last) / repeats[name])
    return {name: spread(each) for name, each in times.items()}


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=150)
    write_whole(path, buffer.getbuffer())
