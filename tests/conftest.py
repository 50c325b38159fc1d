"""Test helpers are importable by name, and mmcv's operators exist before anything imports them."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # kernels run on the CPU; must precede any import of triton

import mmvig.compat  # noqa: F401  must precede any import of mmcv.ops

sys.path.insert(0, str(Path(__file__).parent))
