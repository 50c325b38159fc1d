"""Draw ViG-H, its pyramid above and its block below, as docs/architecture.svg.

python tools/analysis/draw_architecture.py [--arch small] [--out FILE.svg]
"""

import argparse
import io
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')  # a picture file, so no display is needed

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Circle, FancyBboxPatch, Polygon

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from mmvig.backbones.mixer import GATE_RANK
from mmvig.backbones.vig_h import ARCHS, ViGH
from mmvig.engine.files import write_whole
from mmvig.engine.preflight import SetupError, check_writable, one_line_errors

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 124, 87  # of the drawing; a unit is a twelfth of an inch
INK, FAINT = '#24313f', '#7d8a97'
GREY, BLUE, ORANGE, GREEN, VIOLET = '#e9edf1', '#cfe3f7', '#fbdcb8', '#d2ecd3', '#e2d8f3'
TIMES, MINUS = '\N{MULTIPLICATION SIGN}', '\N{MINUS SIGN}'
STYLE = {
    'font.family': 'sans-serif',
    'font.size': 9.5,
    'text.color': INK,
    'svg.fonttype': 'none',  # text stays text
    'svg.hashsalt': 'mmvig',  # and the same drawing the same file
}


class Canvas:
    """Boxes, arrows and words on one sheet."""

    def __init__(self):
        self.figure = plt.figure(figsize=(WIDTH / 12, HEIGHT / 12))
        self.axis = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axis.set_axis_off()

    def box(self, x: float, y: float, width: float, height: float, words: str, color: str) -> None:
        """A box around (x, y) with words in it."""
        corner = x - width / 2, y - height / 2
        style = 'round,pad=0,rounding_size=0.9'
        self.axis.add_patch(
            FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color, edgecolor=INK, lw=0.9)
        )
        self.words(x, y, words)

    def panel(self, left: float, bottom: float, right: float, top: float, title: str) -> None:
        """A frame with a title, under everything."""
        style = 'round,pad=0,rounding_size=1.5'
        self.axis.add_patch(
            FancyBboxPatch(
                (left, bottom), right - left, top - bottom, boxstyle=style, facecolor='#fafbfc',
                edgecolor='#c9d1d9', lw=0.9, zorder=0,
            )
        )  # fmt: skip
        self.words(left + 1.8, top - 2.3, title, ha='left', fontweight='bold', fontsize=10.5)

    def words(self, x: float, y: float, words: str, **style) -> None:
        """Words around (x, y); each line by itself, so that it is centred whatever the viewer's font."""
        style = {'ha': 'center', 'va': 'center', 'fontsize': STYLE['font.size'], **style}
        lines = words.split('\n')
        step = 1.25 * style['fontsize'] / 6  # a point is a sixth of a unit
        for i, line in enumerate(lines):
            self.axis.text(x, y + (len(lines) / 2 - 0.5 - i) * step, line, **style)

    def line(self, *points: tuple[float, float], arrow: bool = True, color: str = INK) -> None:
        """A line through points; its last part is an arrow."""
        if len(points) > 2 or not arrow:
            self.axis.plot(*zip(*(points if not arrow else points[:-1]), strict=True), color=color, lw=1.1)
        if arrow:
            style = {'arrowstyle': '-|>', 'color': color, 'lw': 1.1, 'shrinkA': 0, 'shrinkB': 0}
            self.axis.annotate('', points[-1], points[-2], arrowprops={**style, 'mutation_scale': 9})

    def join(self, x: float, y: float, sign: str) -> None:
        """A small circle where two lines become one."""
        self.axis.add_patch(Circle((x, y), 1.25, facecolor='white', edgecolor=INK, lw=0.9, zorder=3))
        self.words(x, y - 0.1, sign, zorder=4, fontsize=10)


def stages_of(arch: str) -> list[dict[str, int]]:
    """Stride, channels, blocks and heads of each stage, as the model has them."""
    model = ViGH(arch).eval()
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 64, 64))
    return [
        {'stride': 64 // y.shape[3], 'channels': y.shape[1], 'blocks': depth, 'heads': heads}
        for y, depth, heads in zip(maps, model.depths, ARCHS[arch]['num_heads'], strict=True)
    ]


def draw_pyramid(canvas: Canvas, arch: str) -> None:
    """Image, stem and stages from left to right, the maps that they give below."""
    canvas.panel(1, 49.5, 123, 86, f'The pyramid: ViG-H-{arch[0].upper()}')
    middle, out = 68.8, 54
    canvas.axis.add_patch(
        Polygon([(4.2, 59), (4.2, 74), (9.2, 78.6), (9.2, 63.6)], facecolor=GREY, edgecolor=INK, lw=0.9)
    )
    canvas.words(6.7, 80.6, f'3 {TIMES} H {TIMES} W', fontsize=8.5)
    canvas.line((9.2, middle), (12.4, middle))
    canvas.box(18.2, middle, 11.6, 17, f'Stem\n\nconv 3{TIMES}3,\nstride 2,\nLayerNorm,\ntwice', VIOLET)
    stages = stages_of(arch)
    step, width, right = 26.4, 13.6, 24
    for i, stage in enumerate(stages):
        x = 34.6 + step * i
        height = 22 - 3.2 * i
        if i:
            canvas.line((right, middle), (right + 1.2, middle))
            canvas.box(right + 5.2, middle, 8, 11, '', VIOLET)
            canvas.words(right + 5.2, middle, f'conv 3{TIMES}3,\nstride 2,\nLayerNorm', fontsize=8)
            right += 9.2
        canvas.line((right, middle), (x - width / 2, middle))
        numbers = f'{stage["blocks"]} blocks\n{stage["channels"]} channels\n{stage["heads"]} heads'
        canvas.box(x, middle, width, height, f'Stage {i + 1}\n{numbers}', BLUE)
        canvas.line((x, middle - height / 2), (x, out + 2.6))
        stride = stage['stride']
        canvas.words(
            x, out, f'LayerNorm\n{stage["channels"]} {TIMES} H/{stride} {TIMES} W/{stride}', fontsize=8.5
        )
        right = x + width / 2
    others = [name for name in ARCHS if name != arch]
    notes = [
        f'ViG-H-{name[0].upper()}: {", ".join(map(str, ARCHS[name]["depths"]))} blocks, '
        f'{ARCHS[name]["embed_dims"]} channels in stage 1'
        for name in others
    ]
    canvas.words(121.2, 83.7, '      '.join(notes), ha='right', fontsize=8.5, color=FAINT)
    canvas.words(18.2, out, 'feature maps for\na neck or head:', fontsize=8.5, color=FAINT)


def draw_block(canvas: Canvas) -> None:
    """A block, from the bottom to the top."""
    canvas.panel(1, 1, 31, 47.5, 'A block')
    x, aside = 18.5, 5.5
    parts = [
        (9.4, 'LayerNorm', GREY),
        (14.6, 'Token mixer', ORANGE),
        (26.4, 'LayerNorm', GREY),
        (31.6, 'SwiGLU', GREEN),
    ]
    for y, words, color in parts:
        canvas.box(x, y, 16, 3.4, words, color)
    canvas.words(x, 2.9, 'x', fontstyle='italic')
    canvas.line((x, 4), (x, 7.7))
    canvas.line((x, 11.1), (x, 12.9))
    canvas.line((x, 16.3), (x, 18.95))
    canvas.join(x, 20.2, '+')
    canvas.line((x, 21.45), (x, 24.7))
    canvas.line((x, 28.1), (x, 29.9))
    canvas.line((x, 33.3), (x, 35.95))
    canvas.join(x, 37.2, '+')
    canvas.line((x, 38.45), (x, 42))
    for start, end in ((5.8, 20.2), (22.8, 37.2)):
        canvas.line((x, start), (aside, start), (aside, end), (x - 1.25, end))


def draw_mixer(canvas: Canvas) -> None:
    """The token mixer, from left to right."""
    canvas.panel(33, 1, 123, 47.5, 'The token mixer')
    top, upper, lower, bottom = 38.6, 28.6, 17.6, 6.6
    canvas.line((34.6, 23.1), (37.4, 23.1))
    canvas.box(43, 23.1, 11.2, 8, f'Depthwise\nconv 3{TIMES}3', VIOLET)
    canvas.words(50.6, 24.8, 'u', fontstyle='italic')
    fork = 52.4
    canvas.line((48.6, 23.1), (fork, 23.1), arrow=False)
    canvas.line((fork, bottom), (fork, top), arrow=False)
    for y in (top, upper, lower):
        canvas.line((fork, y), (55.4, y))
    canvas.box(62.4, top, 14, 5.6, 'Linear,\nsigmoid', GREY)
    canvas.box(62.4, upper, 14, 5.6, 'Linear', GREY)
    canvas.box(62.4, lower, 14, 5.6, f'Linear,\nrank {GATE_RANK}', GREY)
    canvas.words(72.5, upper + 1.5, 'q, k, v', fontsize=8.5, fontstyle='italic')
    canvas.words(72.5, lower + 2.6, 'decay\ngates', fontsize=8.5)
    canvas.line((69.4, upper), (75.6, upper))
    canvas.line((69.4, lower), (75.6, lower))
    canvas.box(84.2, 23.1, 17.2, 17.4, '', ORANGE)
    canvas.words(84.2, 29.4, 'BiGLA', fontweight='bold')
    canvas.words(98.8, 28.2, 'long context', fontsize=8.5)
    canvas.words(84.2, 26.3, 'forward', fontsize=8.5)
    canvas.line((78, 24.3), (90.4, 24.3))
    canvas.line((90.4, 21.9), (78, 21.9))
    canvas.words(84.2, 19.9, 'backward', fontsize=8.5)
    canvas.words(84.2, 16.8, 'along all tokens', fontsize=8.5)
    canvas.line((92.8, 23.1), (94.6, 23.1))
    canvas.box(99.3, 23.1, 9.4, 7, 'RMSNorm\nper head', GREY)
    canvas.line((fork, bottom), (94.6, bottom))
    canvas.box(99.3, bottom, 9.4, 7, 'RMSNorm\nper head', GREY)
    canvas.words(73, bottom + 1.5, 'short context: u itself', fontsize=8.5)
    mix = 109.4
    canvas.line((104, 23.1), (106, 23.1))
    canvas.line((104, bottom), (mix, bottom), (mix, 19.2))
    canvas.line((69.4, top), (mix, top), (mix, 27))
    canvas.words(72.6, top + 1.5, 'g', fontstyle='italic')
    canvas.box(mix, 23.1, 6.8, 7.8, 'Mix', ORANGE)
    canvas.line((mix + 3.4, 23.1), (113.9, 23.1))
    canvas.box(116.7, 23.1, 5.6, 5.6, 'Linear', GREY)
    canvas.line((119.5, 23.1), (122, 23.1))
    formula = f'Mix: g {TIMES} long context + (1 {MINUS} g) {TIMES} short context'
    canvas.words(121, 44.2, formula, ha='right', fontsize=8.5, color=FAINT)


def draw(arch: str) -> bytes:
    """The picture as an SVG file."""
    with plt.rc_context(STYLE):
        canvas = Canvas()
        draw_pyramid(canvas, arch)
        draw_block(canvas)
        draw_mixer(canvas)
        buffer = io.BytesIO()
        # No date and no version: the same drawing is the same file.
        metadata = {'Date': None, 'Creator': None}
        canvas.figure.savefig(buffer, format='svg', facecolor='white', metadata=metadata)
        plt.close(canvas.figure)
    return b''.join(line.rstrip() + b'\n' for line in buffer.getvalue().splitlines())


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--arch', default='tiny', choices=ARCHS, help='whose pyramid; default: tiny')
    parser.add_argument(
        '--out', default=str(ROOT / 'docs/architecture.svg'), help='SVG to write; default: in docs'
    )
    return parser.parse_args()


def main() -> None:
    """Draw and print where the picture is."""
    args = parse_args()
    with one_line_errors():
        out = Path(args.out)
        if out.suffix != '.svg':
            raise SetupError(f'--out {out}: it must end in .svg')
        check_writable('--out', out)
        write_whole(out, draw(args.arch))
    print(out)


if __name__ == '__main__':
    main()
