"""`python -m mmvig.compat TOOL`: scripts of the packages, with the stand-ins in place."""

import json
import subprocess
import sys
from pathlib import Path

from mmvig.compat import __main__ as compat

import pytest
import torch

# Says what a script can see of how it was started.
SCRIPT = """
import json, sys
import mmcv.ops
seen = [sys.argv, sys.path[0], __name__, __file__, mmcv.ops.nms.__module__]
print(json.dumps(seen))
if __name__ == '__main__' and 'fail' in sys.argv:
    raise SystemExit(3)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts/tool.py').write_text(SCRIPT)
    return tmp_path / 'scripts/tool.py'


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Runs the command in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', ['', *sys.path])

    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['__main__.py', *words])
        compat.main()

    return run


def test_a_new_interpreter_runs_a_script_with_mmcvs_operators(script):
    words = ['-m', 'mmvig.compat', 'scripts/tool.py', 'CONFIG', '--out', 'a b', 'fail']
    folder = script.parent.parent
    result = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 3, result.stderr
    argv, path, name, file, module = json.loads(result.stdout.splitlines()[-1])
    assert argv == [
        'scripts/tool.py',
        'CONFIG',
        '--out',
        'a b',
        'fail',
    ]  # as `python scripts/tool.py` has it
    assert (path, name, module) == (str(script.parent), '__main__', 'mmcv.ops.nms')
    assert Path(folder, file) == script


def test_an_option_that_a_launcher_puts_first_goes_to_the_script(main, script, capsys):
    main('--local-rank=1', str(script), '--launcher', 'pytorch')
    argv = json.loads(capsys.readouterr().out)[0]
    assert argv == [str(script), '--local-rank=1', '--launcher', 'pytorch']


@pytest.mark.parametrize(
    'tool, path',
    [
        ('mmdet/test', 'test.py'),
        ('mmdet/test.py', 'test.py'),
        ('mmdet/confusion_matrix', 'analysis_tools/confusion_matrix.py'),
        ('mmdet/analysis_tools/browse_dataset', 'analysis_tools/browse_dataset.py'),
        ('mmseg/misc/browse_dataset', 'misc/browse_dataset.py'),
        ('mmpretrain/vis_cam', 'visualization/vis_cam.py'),
    ],
)
def test_a_script_of_a_package_is_found_by_its_name(tool, path):
    found = compat.find_script(tool)
    assert found.is_file()
    assert found.as_posix().endswith(f'{tool.partition("/")[0]}/.mim/tools/{path}')


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    (tmp_path / 'mmdet').mkdir()
    (tmp_path / 'mmdet/test').touch()
    monkeypatch.chdir(tmp_path)
    assert compat.find_script('mmdet/test') == Path('mmdet/test')


@pytest.mark.parametrize(
    'tool, said',
    [
        (
            'mmdet/browse_dataset',
            '2 scripts of this name; choose from mmdet/analysis_tools/browse_dataset, mm',
        ),
        ('mmdet/no_such_tool', 'no such script; choose from mmdet/analysis_tools/analyze_logs, '),
        ('mmseg/', 'no such script; choose from mmseg/analysis_tools/analyze_logs, '),
        ('no_such_package/test', "'no_such_package' is no installed package"),
        ('torch/test', "'torch' is no installed package with scripts"),
        ('json/test', "'json' is no installed package with scripts"),
        ('mmdet.apis/test', "'mmdet.apis' is no installed package"),
        ('/no/such/tool.py', 'no such file'),
        ('tool.py', 'no such file'),
    ],
)
def test_a_tool_that_is_not_there_gets_one_line(tool, said, main):
    with pytest.raises(SystemExit) as error:
        main(tool, 'CONFIG')
    assert said in error.value.code and '\n' not in error.value.code


@pytest.mark.parametrize('words, status', [([], 2), (['-x'], 2), (['--help'], 0), (['-h'], 0)])
def test_usage(words, status, main, capsys):
    with pytest.raises(SystemExit) as error:
        main(*words)
    assert (error.value.code or 0) == status
    assert 'python -m mmvig.compat mmdet/test CONFIG CHECKPOINT' in capsys.readouterr().out


def test_a_packages_script_reads_mmengines_checkpoints_and_can_import_its_sisters(main, tmp_path):
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer()
    history.update(0.5)
    content = {'state_dict': {'weight': torch.ones(2)}, 'optimizer': {}, 'message_hub': {'loss': history}}
    torch.save(content, tmp_path / 'it.pth')
    before = torch.serialization.get_safe_globals()
    try:
        main('mmseg/publish_model', 'it.pth', 'published.pth')
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    (published,) = tmp_path.glob('published*.pth')
    state_dict = torch.load(published, weights_only=False)['state_dict']
    assert state_dict['weight'].tolist() == [1, 1]
    # mmdet's test_robustness.py imports `tools.analysis_tools`
    assert Path(sys.path[1], 'tools/misc/publish_model.py').is_file()
