"""Fuzz BiGLA, output and all five gradients, against its definition in float64.

    python tests/reliability/fuzz_bigla.py --cases 10000                      # 'chunked' on the CPU
    TRITON_INTERPRET=1 python tests/reliability/fuzz_bigla.py --backend triton --cases 500
    python tests/reliability/fuzz_bigla.py --backend triton --device cuda --cases 300

A case is drawn from --seed and its number alone: sizes, dtypes, strides, options, gates, magnitudes, and
for some NaN or inf in one head of one image. Compared are, in each tensor, for each head of each image:

    t, the definition (the loop over tokens) in float64 on the same numbers
    s, the same on absolute values: the sum of the magnitudes of what t sums up
    d, how far t moves if all log decays grow by 2^-23 of themselves; 0 unless float32 goes to 'triton'
    p, the plain form: the definition in the inputs' dtype, computed in float32 (float64) and rounded once
    a, the backend

    max|a - t| <= FACTOR * max(max|p - t|, ROUNDING * max|t| + SUMMING * max s + max d)   and so for the rms

or the difference is below the dtype's smallest normal number; for a gate, below that of its sigmoid's
derivative. The floor is a rounding of the result and three of its terms, products of up to five factors: p
may happen to be exact. FACTOR is 2; 2.2 for the rms of 'triton', and four times that for bfloat16 in the
interpreter, which cuts where a GPU rounds (as in tests/ops/test_bigla_triton.py). The kernels round a log
decay when they multiply by log2 e and by 1 / gate_normalizer, and a decay of 2^-20 is 14 times as sensitive
to that: where all others are smaller, that is d. They compute in q's dtype, whatever that of the gates.
Heads where p overflows are left out. Heads without the NaN or inf must be what they are without it, bit for
bit.

Prints the number of cases and failures, the worst ratio to what is allowed, and a line for each failure,
which --case runs again. The exit status is 1 if any failed.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from mmvig.ops import bigla, bigla_packed
from mmvig.ops.bigla import unpack

NAMES = 'o', 'q', 'k', 'v', 'g_fwd', 'g_bwd'
FACTOR = 2.0
ROUNDING = {torch.float64: 1e-14, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# float64: of the truth itself. The kernels' products round their factors, float32 in three terms of tf32.
SUMMING = {
    'chunked': {
        torch.float64: 1e-14,
        **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 3 * 2**-24),
    },
    'triton': {torch.float32: 2**-21, torch.bfloat16: 2**-9, torch.float16: 2**-12},
}
# What the kernels' log decays in float32 are out by, relative to themselves: a rounding or two.
DECAYS = 2**-23
GATES = 'mild', 'open', 'strong', 'rare strong', 'rare mild', 'closed', 'extreme', 'infinite', 'mixed'
LAYOUTS = 'contiguous', 'packed', 'transposed', 'sliced', 'expanded', 'strided'
# Around chunks of 8, 16, 32, 49 and 64 tokens, and groups of 16 and 32 chunks.
SEAMS = 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49, 50, 63, 64, 65, 98, 99, 127, 128, 129


def draw(seed: int, case: int, backend: str, device: str) -> dict:
    """What a case is, as plain values."""
    r = random.Random(f'{seed} {case}')
    triton, gpu = backend == 'triton', device == 'cuda'
    if gpu:  # few kernels to compile
        tokens = r.choice([r.randint(1, 64), r.choice(SEAMS), r.randint(65, 200)])
        key, value, layouts = 16, 32, ['contiguous', 'packed']
    else:
        tokens = r.choice([r.randint(1, 30)] * 3 + [r.choice(SEAMS[:9] if triton else SEAMS)])
        key, value = (r.choice([r.randint(1, 8), r.choice([1, 4, 16])]) for _ in range(2))
        layouts = LAYOUTS
        if not triton and r.random() < 0.05:
            tokens = r.randint(1, 200)
        if r.random() < 0.02:
            tokens, key, value = (
                r.randint(1, 20),
                r.randint(1, 48 if triton else 256),
                r.randint(1, 48 if triton else 256),
            )
    dtypes = ['float32', 'bfloat16', 'float16'] + ([] if triton else ['float32', 'float64'])
    dtype = r.choice(dtypes)
    spread = 3 if dtype == 'float16' else 9 if triton else 10
    sizes = [10 ** r.uniform(-spread, spread) if r.random() < 0.3 else 1.0 for _ in range(4)]
    if not triton and dtype != 'float16' and r.random() < 0.05:
        sizes = [r.choice([1e15, 1e-15]), r.choice([1e15, 1e-15]), 1.0, 1.0]
    batch, heads = (1, r.randint(1, 2)) if triton and not gpu else (r.randint(1, 3), r.randint(1, 3))
    where = r.randrange(batch), r.randrange(tokens), r.randrange(heads)
    poison = None
    if r.random() < 0.2 and batch * heads > 1:
        poison = r.choice([*[(i, 'nan') for i in range(5)], *[(i, 'inf') for i in range(3)]])
    return {
        'tokens': tokens, 'key': key, 'value': value, 'batch': batch, 'heads': heads, 'dtype': dtype,
        'float32_gates': not gpu and r.random() < 0.3 and dtype != 'float64', 'gates': r.choice(GATES),
        'layout': r.choice(layouts), 'sizes': sizes, 'scale': r.choice([None, None, 0.5, 1.0, -3.0]),
        'normalizer': r.choice([16.0, 16.0, 16.0, 1.0, 4.0, 100.0, 0.022]),
        'poison': poison, 'where': where, 'data': r.getrandbits(40),
    }  # fmt: skip


def make_gates(kind: str, shape: tuple, generator: torch.Generator) -> Tensor:
    g = torch.randn(shape, generator=generator)
    open_ones = 2 + 40 * torch.rand(1, generator=generator) ** 2
    rare = torch.rand(shape, generator=generator) < 0.03
    strong = -(10 ** (1 + 2 * torch.rand(shape, generator=generator)))
    extreme = torch.where(g.abs() > 0.7, 1000 * g.sign(), g)
    mixed = torch.where(
        torch.rand(shape, generator=generator) < 0.5, g, 100 * torch.randn(shape, generator=generator)
    )
    return {
        'mild': g,
        'open': g + open_ones,
        'strong': 100 * g,
        'rare strong': torch.where(rare, strong, g + open_ones),
        'rare mild': torch.where(rare, g - 2, g + open_ones),
        'closed': strong,
        'extreme': extreme,
        'infinite': torch.where(g.abs() > 1, math.inf * g.sign(), g),
        'mixed': torch.where(g > 2, -math.inf, torch.where(g < -2, math.inf, mixed)),
    }[kind]


def make_inputs(case: dict) -> tuple[list[Tensor], Tensor]:
    """q, k, v, g_fwd, g_bwd and the output's gradient, contiguous on the CPU."""
    generator = torch.Generator().manual_seed(case['data'])
    dtype = getattr(torch, case['dtype'])
    of_token = case['batch'], case['tokens'], case['heads']
    widths = case['key'], case['key'], case['value'], case['value']
    q, k, v, do = (
        (torch.randn(*of_token, width, generator=generator, dtype=torch.float64) * size).to(dtype)
        for width, size in zip(widths, case['sizes'], strict=True)
    )
    g = [make_gates(case['gates'], (*of_token, case['key']), generator) for _ in range(2)]
    inputs = [q, k, v, *(x.to(torch.float32 if case['float32_gates'] else dtype) for x in g)]
    if case['layout'] == 'expanded':
        inputs = [x[:1].expand(x.shape) for x in inputs]
    return inputs, do


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides."""
    if layout == 'transposed':
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == 'sliced':
        return F.pad(x, (1, 2, 0, 1, 1, 0))[:, 1:, :-1, 1:-2]
    if layout == 'strided':
        return torch.stack((x, x), -1)[..., 0]
    return x


def run(inputs: list[Tensor], do: Tensor, backend: str, case: dict) -> list[Tensor]:
    """The output and the five gradients, on the CPU."""
    options = {'scale': case['scale'], 'gate_normalizer': case['normalizer'], 'backend': backend}
    if case['layout'] == 'packed' and backend != 'reference':
        packed = [torch.cat([x.flatten(2) for x in part], -1) for part in (inputs[:3], inputs[3:])]
        packed = [x.detach().requires_grad_() for x in packed]
        o = bigla_packed(*packed, case['heads'], **options)
        grads = torch.autograd.grad(o, packed, do.flatten(2))
        return [x.cpu() for x in (o.detach().view(do.shape), *unpack(*grads, case['heads']))]
    inputs = [lay_out(x, case['layout']).detach().requires_grad_() for x in inputs]
    o = bigla(*inputs, **options)
    return [x.cpu() for x in (o.detach(), *torch.autograd.grad(o, inputs, do))]


def ratios(
    a: Tensor,
    p: Tensor,
    t: Tensor,
    s: Tensor,
    d: Tensor,
    sigmoid: Tensor | None,
    backend: str,
    dtype: torch.dtype,
    slack: float,
) -> Tensor:
    """Each head's errors as parts of what is allowed: the largest and the rms, ``[2, B, H]``.

    ``sigmoid``: that of the negative logits, for gates; ``dtype``: that of products; ``slack``: a factor.
    """
    tiny = torch.finfo(a.dtype).tiny
    if sigmoid is not None:  # of which the rest is a multiple, and which underflows first
        rest = torch.where(sigmoid > 0, s / sigmoid.clamp_min(1e-300), 0).amax((1, 3))
        tiny = tiny + torch.finfo(torch.float32).tiny * rest
    plain = (p.double() - t).abs()
    error = (a.double() - t).abs()
    usable = plain.isfinite().all(-1).all(1)
    result = []
    for factor, norm in (
        (FACTOR, lambda x: x.abs().amax((1, 3))),
        (2.2 if backend == 'triton' else FACTOR, lambda x: x.pow(2).mean((1, 3)).sqrt()),
    ):
        floor = ROUNDING[dtype] * norm(t) + SUMMING[backend][dtype] * norm(s) + norm(d)
        allowed = slack * factor * torch.maximum(norm(plain), floor)
        ratio = norm(error) / torch.maximum(allowed, allowed.new_zeros(()) + tiny)
        result.append(torch.where(usable, ratio.nan_to_num(math.inf), 0.0))
    return torch.stack(result)


def check(case: dict, backend: str, device: str) -> tuple[float, str]:
    """The worst ratio of a case, and what is wrong, '' if nothing."""
    inputs, do = make_inputs(case)
    there = [x.to(device) for x in inputs]
    actual = run(there, do.to(device), backend, case)
    with torch.no_grad():
        sigmoids = [torch.sigmoid(-x.double()) for x in inputs[3:]]
    plain = run(inputs, do, 'reference', case)
    # Both in one, side by side in the batch: the loops take the time.
    exact = [x.double() for x in (*inputs, do)]
    both = [torch.cat((x, x if i in (3, 4) else x.abs())) for i, x in enumerate(exact)]
    truth, sums = zip(*(x.chunk(2) for x in run(both[:5], both[5], 'reference', case)), strict=True)
    moved = truth
    if backend == 'triton' and case['dtype'] == 'float32':
        stronger = {**case, 'normalizer': case['normalizer'] / (1 + DECAYS)}
        moved = run(exact[:5], exact[5], 'reference', stronger)
    interpreted = backend == 'triton' and device == 'cpu'
    slack = 4.0 if interpreted and case['dtype'] == 'bfloat16' else 1.0
    worst, wrong = 0.0, []
    results = zip(NAMES, actual, plain, truth, sums, moved, [None] * 4 + sigmoids, strict=True)
    for name, a, p, t, s, m, sigmoid in results:
        if a.dtype != p.dtype or a.shape != p.shape:
            wrong.append(f'{name} is {a.dtype} {list(a.shape)}')
            continue
        found = ratios(
            a, p, t, s.abs(), (m - t).abs(), sigmoid, backend,
            inputs[0].dtype if backend == 'triton' else a.dtype, slack,
        )  # fmt: skip
        worst = max(worst, found.max().item())
        for kind, x in zip(('max', 'rms'), found, strict=True):
            if x.max() > 1:
                wrong.append(f'{name} {kind} {x.max().item():.3g}')
    if case['poison']:
        which, value = case['poison']
        image, token, head = case['where']
        there = [x.clone() for x in there]
        there[which][image, token, head, 0] = float(value)
        rest = torch.ones(case['batch'], case['heads'], dtype=torch.bool)
        rest[image, head] = False
        for name, a, c in zip(NAMES, run(there, do.to(device), backend, case), actual, strict=True):
            a, c = (x.transpose(1, 2)[rest] for x in (a, c))
            if not torch.equal(a.nan_to_num(), c.nan_to_num()):
                wrong.append(f'{name} of other heads changes')
    return worst, ', '.join(wrong)


def fuzz(numbers: range | list[int], seed: int, backend: str, device: str) -> dict:
    """Run the cases of these numbers; prints failures, returns what was found."""
    failures, worst, start = [], (0.0, None), time.time()
    for number in numbers:
        case = draw(seed, number, backend, device)
        ratio, wrong = check(case, backend, device)
        worst = max(worst, (ratio, number), key=lambda x: x[0])
        if wrong:
            failures.append({'case': number, 'wrong': wrong, **case})
            print(f'--seed {seed} --case {number}: {wrong}  {case}', flush=True)
    return {
        'cases': len(numbers), 'failures': failures, 'worst_ratio': worst[0], 'worst_case': worst[1],
        'seconds': round(time.time() - start, 1), 'seed': seed, 'backend': backend, 'device': device,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', type=int, default=10000)
    parser.add_argument('--case', type=int, help='run this one alone')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--backend', choices=('chunked', 'triton'), default='chunked')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--out', type=Path, help='a JSON file for what was found')
    args = parser.parse_args()
    if args.backend == 'triton' and args.device == 'cpu' and os.environ.get('TRITON_INTERPRET') != '1':
        parser.error('on a CPU, backend triton needs TRITON_INTERPRET=1')
    numbers = range(args.cases) if args.case is None else [args.case]
    found = fuzz(numbers, args.seed, args.backend, args.device)
    print(
        f'{found["cases"]} cases, {len(found["failures"])} failures, at worst {found["worst_ratio"]:.3f} '
        f'of what is allowed (case {found["worst_case"]}), {found["seconds"]} s'
    )
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    sys.exit(bool(found['failures']))


if __name__ == '__main__':
    main()
