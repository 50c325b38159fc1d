"""Make a training checkpoint ready to be published: weights and meta alone, a part of its hash in its name.

    python tools/publish_model.py work_dirs/maskrcnn_vigh_t/epoch_12.pth maskrcnn_vigh_t.pth
    maskrcnn_vigh_t-5d0c1a7e.pth

The same weights and meta give the same name. torch.hub can check a download by such a name.
"""

import argparse
import hashlib
import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from mmvig.checkpoints import message_hub_globals
from mmvig.engine.files import write_whole
from mmvig.engine.preflight import SetupError, check_file, one_line_errors

KEPT = ('meta', 'state_dict')


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
        SetupError: It is missing, cannot be read or is no such checkpoint.
    """
    check_file(path, 'checkpoint', 'give the path of one that training saved')
    torch.serialization.add_safe_globals(message_hub_globals())
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # of many types, by what is wrong with the file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SetupError(f'{path} cannot be read as a checkpoint of tensors: {reason}') from error
    if not isinstance(content, dict) or not set(KEPT) <= set(content):
        raise SetupError(f"{path} is no checkpoint of mmengine's: it must hold {' and '.join(KEPT)}")
    return {key: content[key] for key in KEPT}


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
        path = publish(read(args.input), Path(args.output))
    print(path)


if __name__ == '__main__':
    main()
