"""Test helpers are importable by name, and mmcv's operators exist before anything imports them."""

import sys
from pathlib import Path

import mmvig.compat  # noqa: F401  must precede any import of mmcv.ops

sys.path.insert(0, str(Path(__file__).parent))
