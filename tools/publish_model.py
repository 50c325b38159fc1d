"""Make a training checkpoint ready to be published: weights and what is known of them alone.

Its name gets a part of its hash. The config, a program text that mmengine's inferencers would run, is left
out: give it beside the file.

    python tools/publish_model.py work_dirs/maskrcnn_vigh_t/epoch_12.pth maskrcnn_vigh_t.pth
    maskrcnn_vigh_t-5d0c1a7e.pth

The same weights and meta give the same name. torch.hub can check a download by such a name.
"""

import argparse
import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.utils import apply_to

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from mmvig import checkpoints, reading
from mmvig.engine import loading
from mmvig.engine.files import check_output, write_whole
from mmvig.engine.preflight import SetupError, check_file, one_line_errors

KEPT = ('meta', 'state_dict')
PROGRAMS = ('cfg', 'config')  # entries of meta that are text to be run


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('input', metavar='IN', help="checkpoint file of mmengine's")
    parser.add_argument('output', metavar='OUT', help='file to write; -HASH is added to its name')
    return parser.parse_args()


def read(path: str) -> dict:
    """Read what is kept of a training checkpoint, without running code from it.

    Raises:
        SetupError: It is missing, cannot be read, is no such checkpoint, or its weights are not whole.
    """
    check_file(path, 'checkpoint', 'give the path of one that training saved')
    try:
        content = reading.load(path)
        weights = checkpoints.state_dict_of(content, path)
        if any(not isinstance(content.get(key), dict) for key in KEPT):
            raise RuntimeError(f"{path} is no checkpoint of mmengine's: it must hold {' and '.join(KEPT)}")
        loading.check_shapes(weights, path)
    except (OSError, RuntimeError) as error:
        raise SetupError(str(error)) from error
    meta = {key: value for key, value in content['meta'].items() if key not in PROGRAMS}
    # Plain values: PyTorch alone reads no NumPy in a file.
    meta = apply_to(
        meta, lambda value: isinstance(value, (np.generic, np.ndarray)), lambda value: value.tolist()
    )
    return {'meta': meta, 'state_dict': content['state_dict']}


def publish(content: dict, output: Path) -> Path:
    """Write a checkpoint under ``output`` with the first 8 hexadecimal digits of its sha256 in its name."""
    buffer = io.BytesIO()  # a file would put its own name into what is hashed
    torch.save(content, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()[:8]
    path = output.with_name(f'{output.stem}-{digest}{output.suffix or ".pth"}')
    write_whole(path, buffer.getbuffer())
    return path


def main() -> None:
    """Publish a checkpoint and print its path."""
    with one_line_errors():
        args = parse_args()
        check_output(args.output)
        path = publish(read(args.input), Path(args.output))
    print(path)


if __name__ == '__main__':
    main()
