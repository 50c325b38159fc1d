import pytest


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Do not ask compilers for their versions, and do not lay out the config in each checkpoint."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, False))
