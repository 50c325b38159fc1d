"""One run in a work dir at a time, and which checkpoint of an earlier one a run continues from."""

import errno
import fcntl
import logging
import os
import time

import pytest
import torch
from mmengine.config import Config

from mmvig.engine import files, work_dir
from mmvig.engine.preflight import SetupError


def config(folder, **hook):
    return Config(dict(work_dir=str(folder), launcher='none', default_hooks=dict(checkpoint=hook)))


@pytest.fixture
def run(tmp_path):
    """The work dir of a run that has saved two epochs and a best file."""
    folder = tmp_path / 'run'
    folder.mkdir()
    for age, name in enumerate(['epoch_9.pth', 'epoch_10.pth', 'best_score_epoch_11.pth']):
        torch.save({'state_dict': {'weight': torch.arange(1000.0)}}, folder / name)
        os.utime(folder / name, (age, age))
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_10.pth'))
    return folder


def latest(folder, **hook):
    found = work_dir.latest_checkpoint(config(folder, **hook))
    return found and os.path.relpath(found, folder)


def cut(path, size):
    os.truncate(path, size)


@pytest.mark.parametrize('text', [b'', b'\0' * 40, b'\xc1' * 40, b'a/' * 5000, b'nothing.pth'])
def test_a_pointer_that_names_nothing(run, text, caplog):
    (run / 'last_checkpoint').write_bytes(text)
    with caplog.at_level(logging.WARNING):
        assert latest(run) == 'epoch_10.pth'
    assert 'epoch_10.pth is the newest' in caplog.text


def test_no_pointer(run):
    (run / 'last_checkpoint').unlink()
    assert latest(run) == 'epoch_10.pth'


def test_a_folder_that_was_moved_or_copied(run, tmp_path):
    copy = tmp_path / 'copy'
    copy.mkdir()
    for path in run.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert latest(copy) == 'epoch_10.pth'
    assert latest(run.rename(tmp_path / 'moved')) == 'epoch_10.pth'


@pytest.mark.parametrize('size', [0, 1, 2000, -1])
def test_a_broken_checkpoint_is_never_taken(run, size, caplog):
    newest = run / 'epoch_10.pth'
    cut(newest, newest.stat().st_size - 1 if size < 0 else size)
    with caplog.at_level(logging.WARNING):
        assert latest(run) == 'epoch_9.pth'
    assert 'epoch_10.pth is no whole checkpoint' in caplog.text
    assert 'epoch_9.pth is the newest whole checkpoint' in caplog.text
    cut(run / 'epoch_9.pth', 100)
    with pytest.raises(SetupError, match=r'epoch_9\.pth is no whole checkpoint'):
        latest(run)


def test_damage_within_a_file(run):
    with (run / 'epoch_10.pth').open('r+b') as file:
        file.seek(2000)
        file.write(b'\0\1\2')
    assert latest(run) == 'epoch_9.pth'
    with pytest.raises(SetupError, match='is damaged'):
        work_dir.check_whole(str(run / 'epoch_10.pth'))


def test_a_checkpoint_that_the_pointer_does_not_name_yet(run):
    (run / 'last_checkpoint').write_text(str(run / 'epoch_9.pth'))
    os.utime(run / 'last_checkpoint', (0.5, 0.5))
    assert latest(run) == 'epoch_10.pth'
    os.utime(run / 'last_checkpoint', (5, 5))  # someone's wish
    assert latest(run) == 'epoch_9.pth'


def test_other_names_and_folders(run, tmp_path):
    elsewhere = tmp_path / 'saved' / 'run'
    elsewhere.mkdir(parents=True)
    (run / 'epoch_10.pth').rename(elsewhere / 'it-4.pth')
    (run / 'last_checkpoint').unlink()
    hook = dict(out_dir=str(tmp_path / 'saved'), filename_tmpl='it-{}.pth')
    assert latest(run, **hook) == os.path.relpath(elsewhere / 'it-4.pth', run)


def test_nothing_there(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / 'none') is None


def test_an_earlier_run_is_spoken_of(run, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        work_dir.warn_of_earlier_run(config(tmp_path))
        assert not caplog.records
        work_dir.warn_of_earlier_run(config(run))
    assert len(caplog.records) == 1
    assert 'epoch_10.pth is its latest' in caplog.text
    assert '--resume' in caplog.text


def test_one_run_at_a_time(tmp_path):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with work_dir.taken(config(tmp_path)):
            os.write(told, b'!')
            time.sleep(60)
    os.read(ready, 1)
    with pytest.raises(SetupError, match='another run is at work in'), work_dir.taken(config(tmp_path)):
        pass
    os.kill(child, 9)
    os.waitpid(child, 0)
    part = tmp_path / '.epoch_3.pth.123'
    part.touch()
    with work_dir.taken(config(tmp_path)):
        assert not part.exists()


def test_other_processes_of_a_run_do_not_lock(tmp_path, monkeypatch):
    cfg = config(tmp_path / 'run')
    cfg.launcher = 'slurm'
    monkeypatch.setenv('SLURM_PROCID', '3')
    with work_dir.taken(cfg):
        assert not (tmp_path / 'run').exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, 'lockf', lockf)
    with caplog.at_level(logging.WARNING), work_dir.taken(config(tmp_path)):
        assert 'nothing would stop a second run' in caplog.text


@pytest.mark.parametrize('place', ['file', 'file/run', '/proc/run'])
def test_a_work_dir_that_cannot_be_made(tmp_path, place):
    (tmp_path / 'file').touch()
    with pytest.raises(SetupError, match='cannot be written to'), work_dir.taken(config(tmp_path / place)):
        pass


def test_a_full_disk(tmp_path, monkeypatch):
    said = 'No space left on device; the checkpoints in .* make room'
    full = pytest.raises(SetupError, match=said)
    with full, work_dir.taken(config(tmp_path)), open('/dev/full', 'w') as file:
        file.write('x')
        file.flush()

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, 'fsync', fsync)
    with pytest.raises(SetupError, match=f'iter_1.pth.*{said}'), work_dir.taken(config(tmp_path)):
        files.write_whole(tmp_path / 'iter_1.pth', b'x')
