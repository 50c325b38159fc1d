"""What the tools share: which runner trains."""

import pytest
from mmengine.config import Config
from mmengine.runner import FlexibleRunner

from mmvig.engine import cli
from mmvig.engine.runner import Runner


@pytest.mark.parametrize(
    ('options', 'expected'), [({}, Runner), ({'runner_type': 'FlexibleRunner'}, FlexibleRunner)]
)
def test_the_runner_is_the_one_asked_for(tmp_path, options, expected):
    """FlexibleRunner brings mmengine's strategies, FSDP among them; both keys may come by --cfg-options."""
    cfg = Config({'model': {'type': 'mmvig.ViGH', 'out_indices': (0,)}, 'launcher': 'none', 'env_cfg': {}})
    cfg.work_dir, cfg.experiment_name = str(tmp_path), expected.__name__
    cli.merge_options(cfg, options and {**options, 'strategy.type': 'SingleDeviceStrategy'})
    assert type(cli.build_runner(cfg)) is expected
