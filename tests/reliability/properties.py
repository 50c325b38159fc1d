"""Properties that every backbone has, checked on random architectures, options and image sizes.

    python tests/reliability/properties.py --cases 500 [--seed 0] [--case N] [--device cuda]

A case draws a family, widths, depths, heads, outputs, a batch and a size (sides from the smallest on,
mostly odd), and checks all of these:

- shapes: each map has the documented size, is contiguous and finite;
- repeatable: a second call gives the same bits;
- independent: an image by itself gives the map that it has in its batch;
- layout: an image of other strides (channels last, every second column) gives the same maps;
- outputs: fewer ``out_indices`` give the same maps;
- gradients: every parameter gets a finite gradient, not all zero; ``with_cp`` gives the same;
- frozen: ``frozen_stages`` leaves those parameters without gradient and their modules in evaluation mode;
- round trips: deepcopy, pickle, and a state dict with a detector's prefix through a file.

Prints a line for each failure, with what makes it again, and ends with status 1 if there was one.
"""

import argparse
import copy
import io
import pickle
import random
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from mmvig.backbones import ViG, ViGH
from mmvig.backbones.base import Backbone
from mmvig.backbones.vig import tokens_along


def draw_model(rng: random.Random) -> tuple[type, dict]:
    """A family, and arguments of a small model."""
    heads = rng.choice([1, 1, 2, 3])
    width = 2 * heads * rng.choice([2, 3, 4, 8])
    if rng.random() < 0.6:
        stages = rng.randint(1, 4)
        arch = {
            'embed_dims': width,
            'depths': [rng.randint(1, 2) for _ in range(stages)],
            'num_heads': [heads * 2 ** rng.randint(0, i) for i in range(stages)],
        }
        outputs = rng.sample(range(stages), rng.randint(1, stages))
        return ViGH, {'arch': arch, 'out_indices': outputs}
    depth = rng.randint(1, 3)
    arch = {'embed_dims': width, 'depth': depth, 'num_heads': heads}
    arch.update(conv_act=rng.random() < 0.5, out_act=rng.random() < 0.5)
    outputs = rng.sample(range(depth), rng.randint(1, depth))
    return ViG, {'arch': arch, 'out_indices': outputs, 'img_size': rng.choice([7, 32, 64])}


def expected_shapes(model: Backbone, x: Tensor) -> list[tuple[int, ...]]:
    """The maps' shapes by the documented formulas."""
    batch, _, *sides = x.shape
    if isinstance(model, ViG):
        return [(batch, model.num_features[0], *map(tokens_along, sides)) for _ in model.out_indices]
    return [
        (batch, model.num_features[i], *(-(-side // (4 * 2**i)) for side in sides))
        for i in model.out_indices
    ]


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Fail unless each pair differs by no more than a part of the largest element."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error, size = (a - e).abs().max().item(), max(e.abs().max().item(), 1e-3)
        assert error <= tolerance * size, (
            f'map or gradient {i} differs by {error / size:.2g} of its largest'
        )


def check(seed: int, device: str) -> None:
    """One case; AssertionError says which property fails."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind, options = draw_model(rng)
    options['in_channels'] = rng.choice([1, 3, 3, 4])
    model = kind(**options).to(device).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    sides = [rng.choice([model.min_side, rng.randint(model.min_side, 70)]) for _ in range(2)]
    x = torch.randn(rng.randint(1, 3), options['in_channels'], *sides, device=device)
    with torch.no_grad():
        maps = model(x)
        assert [tuple(y.shape) for y in maps] == expected_shapes(model, x), 'shapes'
        assert all(y.is_contiguous() and y.isfinite().all() for y in maps), 'contiguous and finite'
        assert all(map(torch.equal, model(x), maps)), 'repeatable'
        i = rng.randrange(len(x))
        assert_same([y[i : i + 1] for y in maps], model(x[i : i + 1]), 1e-4)
        assert_same(model(x.contiguous(memory_format=torch.channels_last)), maps, 1e-4)
        assert_same(model(x.repeat_interleave(2, dim=3)[..., ::2]), maps, 1e-4)
        assert_same(copy.deepcopy(model)(x), maps, 1e-6)
        assert_same(pickle.loads(pickle.dumps(model)).eval()(x), maps, 1e-6)

        file = io.BytesIO()
        torch.save({'state_dict': {f'backbone.{k}': v for k, v in model.state_dict().items()}}, file)
        file.seek(0)
        again = kind(**options).to(device).eval()
        again.load_state_dict(torch.load(file, weights_only=True))
        assert_same(again(x), maps, 1e-6)
        one = rng.choice(model.out_indices)
        fewer = kind(**{**options, 'out_indices': one}).to(device).eval()
        fewer.load_state_dict(model.state_dict())
        assert_same(fewer(x), [maps[model.out_indices.index(one)]], 1e-4)

    check_gradients(model, options, x, rng)


def check_gradients(model: Backbone, options: dict, x: Tensor, rng: random.Random) -> None:
    """The properties of training."""
    grads = gradients(model, x)
    assert all(g is not None and g.isfinite().all() for g in grads.values()), 'a gradient each'
    # One token attends to itself alone: its decay gates count for nothing.
    zero = [name for name, g in grads.items() if not g.any() and 'decay' not in name]
    assert not zero, f'gradients are all zero: {zero}'
    recomputed = type(model)(**options, with_cp=True).to(x.device)
    recomputed.load_state_dict(model.state_dict())
    assert_same([*gradients(recomputed, x).values()], [*grads.values()], 1e-4)

    units = len(getattr(model, model.units))
    stages = rng.randint(0, units)
    frozen = type(model)(**options, frozen_stages=stages).to(x.device).train()
    names = ['stem', 'pos_embed', *(f'{model.units}.{i}' for i in range(stages))]
    names += [f'norm{i}' for i in model.out_indices if i < stages]
    for name, weight in frozen.named_parameters():
        is_frozen = any(name == part or name.startswith(f'{part}.') for part in names)
        assert weight.requires_grad != is_frozen, f'frozen: {name}'
    assert not frozen.stem.training


def gradients(model: Backbone, x: Tensor) -> dict[str, Tensor | None]:
    """Of a loss that all pixels of all maps have a part in."""
    model.train()
    torch.manual_seed(0)
    maps = model(x)
    sum((y * torch.randn_like(y)).sum() for y in maps).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def main() -> None:
    """Run the cases and say what failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--cases', type=int, default=500, help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='of the first case; default: %(default)s')
    parser.add_argument('--case', type=int, help='only the case of this seed')
    parser.add_argument('--device', default='cpu', help='default: %(default)s')
    args = parser.parse_args()
    seeds = [args.case] if args.case is not None else range(args.seed, args.seed + args.cases)
    failed, start = 0, time.perf_counter()
    for seed in seeds:
        try:
            check(seed, args.device)
        except Exception:
            failed += 1
            reason = traceback.format_exc().strip().splitlines()[-1]
            print(f'--case {seed} --device {args.device}: {reason}', flush=True)
    print(f'{len(seeds)} cases on {args.device}, {failed} failed, {time.perf_counter() - start:.0f} s')
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
