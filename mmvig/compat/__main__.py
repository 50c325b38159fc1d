"""Run a script of mmdet, mmseg or mmpretrain with the stand-ins in place.

Why: several of their scripts import ``mmcv.ops`` before they read the config whose ``custom_imports`` would
put the stand-ins there. Can go with them. `python -m mmvig.compat --help` says more.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import mmvig.compat  # noqa: F401  the stand-ins

USAGE = """usage: python -m mmvig.compat TOOL [ARGUMENT ...]

Runs TOOL as `python TOOL ARGUMENT ...` does, with stand-ins for operators that mmcv was not compiled with.

TOOL is the file of a script, or PACKAGE/NAME for one that an installed package ships:
  python -m mmvig.compat mmdet/test CONFIG CHECKPOINT
  python -m mmvig.compat mmseg/analysis_tools/browse_dataset CONFIG
  torchrun --nproc-per-node 2 -m mmvig.compat mmdet/train CONFIG --launcher pytorch
`python -m mmvig.compat PACKAGE/` names the package's scripts."""


def find_script(tool: str) -> Path:
    """Find the script that TOOL means.

    Args:
        tool: A file, or PACKAGE/NAME: a script's path in the package's tools, or its end, ``.py`` or not.

    Raises:
        SystemExit: There is no such script, or there are several.
    """
    if Path(tool).is_file():
        return Path(tool)
    package, _, name = tool.partition('/')
    scripts = _scripts(package)
    if not scripts:
        raise SystemExit(f'{tool}: no such file, and {package!r} is no installed package with scripts')
    wanted = f'{name.removesuffix(".py")}.py'
    found = [wanted] if wanted in scripts else [key for key in scripts if key.endswith(f'/{wanted}')]
    if len(found) != 1:
        trouble = f'there are {len(found)} scripts of this name' if found else 'there is no such script'
        names = ', '.join(f'{package}/{key.removesuffix(".py")}' for key in found or scripts)
        raise SystemExit(f'{tool}: {trouble}; choose from {names}')
    return scripts[found[0]]


def _scripts(package: str) -> dict[str, Path]:
    """A package's scripts by their path in its tools, which are where mim looks for them."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.submodule_search_locations is None:
        return {}
    tools = Path(spec.submodule_search_locations[0], '.mim', 'tools')
    return {path.relative_to(tools).as_posix(): path for path in sorted(tools.rglob('*.py'))}


def _let_torch_load_mmengine_checkpoints() -> None:
    """Let ``torch.load`` read them: each package's publish_model.py calls it, and PyTorch 2.6 refuses."""
    import torch

    from mmvig.reading import safe_globals

    torch.serialization.add_safe_globals(safe_globals())


def main() -> None:
    """Run the script that the command line names."""
    words = sys.argv[1:]
    # torch.distributed.launch puts its own option first.
    options = [word for word in words[:1] if word.startswith(('--local-rank=', '--local_rank='))]
    words = words[len(options) :]
    if not words or words[0].startswith('-'):
        print(USAGE)
        sys.exit(words[:1] not in (['-h'], ['--help']) and 2)
    script = find_script(words[0])
    sys.argv[:] = [str(script), *options, *words[1:]]
    if not getattr(sys.flags, 'safe_path', False):
        sys.path[0] = str(script.resolve().parent)  # in the place of the current folder
    if script != Path(words[0]):  # a package's: some import `tools`, as the package's dist_*.sh let them
        sys.path.insert(1, str(next(folder for folder in script.parents if folder.name == '.mim')))
    if importlib.util.find_spec('mmengine') is not None:
        _let_torch_load_mmengine_checkpoints()
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
