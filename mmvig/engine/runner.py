"""mmengine's Runner, with checkpoints that are read safely and written whole."""

from mmengine.runner import Runner as _Runner

from mmvig.registry import RUNNERS


@RUNNERS.register_module()
class Runner(_Runner):
    """The Runner of the programs in ``tools/``. Arguments are mmengine's."""
