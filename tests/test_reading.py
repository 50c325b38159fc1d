"""Reading checkpoint files: addresses, downloads, and no code, in this process and in all of mmengine."""

import functools
import multiprocessing
import os
import socket
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModule
from mmengine.optim import OneCycleLR
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn

from mmvig import checkpoints, reading
from mmvig.engine import cli, loading
from mmvig.engine.preflight import SetupError

FORK = multiprocessing.get_context('fork')


class Code:
    """What leaves a mark where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('mark',)


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path):
    """Nothing of a file's code may have run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    yield
    assert not Path('mark').exists()


# Files from the web.


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder; `cut` in a name ends it half-way, `chunked` gives no length."""

    def send_header(self, name, value):
        if name == 'Content-Length' and 'chunked' in self.path:
            return
        super().send_header(
            name, str(2 * int(value)) if name == 'Content-Length' and 'cut' in self.path else value
        )

    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path):
    """A server on this machine: (its folder, its address, what was asked for)."""
    folder = tmp_path / 'web'
    folder.mkdir()
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(folder)))
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_address[1]}', server.asked
    server.shutdown()
    server.server_close()


def put(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'weight': torch.full((3,), float(value))}, path)
    return path


def kept():
    folder = Path('torch/hub/checkpoints')
    return [path for path in folder.rglob('*') if path.is_file()]


def test_files_of_one_name_are_kept_apart(web):
    folder, address, asked = web
    for value, place in enumerate(('a/model.pth', 'b/model.pth')):
        put(folder, place, value)
    for _ in range(2):
        for value, place in enumerate(('a/model.pth', 'b/model.pth', 'a/model.pth?version=2')):
            assert checkpoints.read(f'{address}/{place}')['weight'][0] == value % 2
    assert len(asked) == 3 and len(kept()) == 3


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('cut.pth', None, 'the connection ended after'),
        ('chunked.pth', b'PK\x03\x04 half a file', 'cannot be read as a checkpoint'),
        ('page.pth', b'<html>Sign in</html>', 'cannot be read as a checkpoint'),
        ('model-0123abcd.pth', None, 'its name has hash 0123abcd, its content'),
        ('code.pth', Code(), 'it asks for posix.mkdir'),
    ],
)
def test_what_is_not_whole_is_not_kept(web, name, content, message):
    folder, address, _ = web
    path = put(folder, name, 1)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message) as error:
            checkpoints.read(f'{address}/{name}')
        assert '\n' not in str(error.value) and f'{address}/{name}' in str(error.value)
    assert not kept()


def test_missing_and_unreachable_addresses(web):
    _, address, _ = web
    with pytest.raises(RuntimeError, match=r'no\.pth cannot be downloaded: HTTP Error 404'):
        checkpoints.read(f'{address}/no.pth')
    with pytest.raises(RuntimeError, match='cannot be downloaded'):
        checkpoints.read('http://127.0.0.1:1/no.pth')


def test_hashes_in_names(web):
    folder, address, asked = web
    path = put(folder, 'model.pth', 5)
    digits = sha256(path.read_bytes()).hexdigest()[:8]
    name = f'model-{digits}.pth'
    path.rename(folder / name)
    assert checkpoints.read(f'{address}/{name}')['weight'][0] == 5
    # What torch.hub has is taken by its name where its hash is right.
    hub = Path('torch/hub/checkpoints', name)
    hub.write_bytes((folder / name).read_bytes())
    assert checkpoints.read(f'{address}/elsewhere/{name}')['weight'][0] == 5
    assert len(asked) == 1
    hub.write_bytes(b'half')
    with pytest.raises(RuntimeError, match='404'):
        checkpoints.read(f'{address}/somewhere/{name}')


def test_downloads_at_the_same_time(web):
    folder, address, _ = web
    put(folder, 'model.pth', 7)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(reading.download, [f'{address}/model.pth'] * 4))
    assert {torch.load(path)['weight'][0].item() for path in paths} == {7}
    assert kept() == [Path.cwd() / paths[0]] or len(kept()) == 1


def be_a_rank(rank, port, folder, addresses, pipe):
    """One of two processes that read the same files."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', TORCH_HOME=f'{folder}/torch')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=60))
    for address in addresses:
        try:
            pipe.send(checkpoints.read(address)['weight'].tolist())
        except RuntimeError as error:
            pipe.send(str(error))
    torch.distributed.destroy_process_group()


def test_two_processes_of_a_node_download_once_and_fail_together(web):
    folder, address, asked = web
    put(folder, 'model.pth', 7)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    addresses = [f'{address}/no.pth', f'{address}/model.pth']
    pipes = [FORK.Pipe(duplex=False) for _ in range(2)]
    ranks = [
        FORK.Process(target=be_a_rank, args=(rank, port, str(Path.cwd()), addresses, pipe))
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for rank, (_, pipe) in zip(ranks, pipes, strict=True):
        rank.start()
        pipe.close()  # so that its end is seen
    said = [[pipe.recv() for _ in addresses] for pipe, _ in pipes]
    for rank in ranks:
        rank.join()
    assert said[0] == [f'{address}/no.pth cannot be downloaded: HTTP Error 404: File not found', [7, 7, 7]]
    assert "see the error of this node's first process" in said[1][0] and said[1][1] == [7, 7, 7]
    assert asked == ['/no.pth', '/model.pth']


# Other addresses, and parts of files.


def test_addresses_that_mmengine_knows(tmp_path, monkeypatch):
    path = put(tmp_path, 'model.pth', 2)
    assert checkpoints.read(f'local://{path}')['weight'][0] == 2
    CheckpointLoader.register_scheme(
        'mine://', lambda name, map_location=None: torch.load(name[7:], map_location)
    )
    assert checkpoints.read('mine://model.pth')['weight'][0] == 2
    torch.save(Code(), 'code.pth')
    with pytest.raises(RuntimeError, match=r'code\.pth cannot be read: .*it asks for posix\.mkdir'):
        checkpoints.read('mine://code.pth')
    with pytest.raises(FileNotFoundError, match='no loader of that scheme'):
        checkpoints.read('yours://model.pth')
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')  # users set it for mmengine's sake
    with pytest.raises(RuntimeError, match='it asks for posix'):
        checkpoints.read('code.pth')


@pytest.mark.parametrize('prefix', ['backbone', 'backbone.'])
def test_prefixes_with_and_without_a_dot(prefix):
    torch.save({'backbone.a': torch.ones(1), 'backbone2.a': torch.zeros(1)}, 'model.pth')
    assert list(checkpoints.read('model.pth', prefix)) == ['a']


# What is read and what is refused.


@pytest.mark.parametrize(
    ('state_dict', 'message'),
    [
        ({1: torch.ones(1)}, 'got 1 for a name'),
        ({'a': 1.0}, "got float for 'a'"),
        ({'a': np.ones(1)}, "got ndarray for 'a'"),
        ({'a': torch.tensor([1, torch.nan])}, "NaN or infinite values in 'a'"),
        ({'a': torch.tensor(torch.inf, dtype=torch.float16)}, "NaN or infinite values in 'a'"),
        ({'a': torch.tensor(torch.nan).to(torch.float8_e4m3fn)}, "NaN or infinite values in 'a'"),
        ({}, 'an empty one'),
    ],
)
def test_state_dicts_that_are_none(state_dict, message):
    for content in (state_dict, {'state_dict': state_dict, 'meta': {}}):
        torch.save(content, 'model.pth')
        for prefix in (None, ''):
            with pytest.raises(RuntimeError, match=message):
                checkpoints.read('model.pth', prefix)


def test_files_that_are_none():
    Path('empty.pth').touch()
    with pytest.raises(
        RuntimeError, match=r'empty\.pth cannot be read as a checkpoint of tensors: it is empty'
    ):
        checkpoints.read('empty.pth')
    put(Path(), 'model.pth', 1)
    data = Path('model.pth').read_bytes()
    for end in (1, 30, len(data) // 2, len(data) - 1):
        Path('cut.pth').write_bytes(data[:end])
        with pytest.raises(RuntimeError, match='it is cut off, or no such file'):
            checkpoints.read('cut.pth')
    Path('folder').mkdir()
    with pytest.raises(FileNotFoundError, match='is a folder'):
        checkpoints.read('folder')


def test_what_training_saves_is_read():
    """Classes, palettes and seeds as data sets leave them, and a schedule with a method in it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    arrays = {name: np.ones(2, name) for name in ('bool', 'uint8', 'int16', 'float16', 'complex64')}
    dataset_meta = ConfigDict(
        classes=('a',), palette=np.array([[1, 2, 3]]), names=np.array(['a']), **arrays
    )
    content = {
        'meta': OrderedDict(dataset_meta=dataset_meta, seed=np.int32(1), size=torch.Size([1])),
        'state_dict': {'weight': torch.ones(1)},
        'param_schedulers': [OneCycleLR(optimizer, eta_max=1.0, total_steps=5).state_dict()],
    }
    torch.save(content, 'model.pth')
    loaded = reading.load('model.pth')
    assert loaded['meta']['dataset_meta'].palette.tolist() == [[1, 2, 3]]
    assert loaded['param_schedulers'][0]['anneal_func'] is OneCycleLR._annealing_cos


# All that mmengine reads in a tool's process.


def test_mmengine_runs_no_code_once_guarded():
    torch.save({'state_dict': Code()}, 'code.pth')
    loading.guard()
    with pytest.raises(RuntimeError, match=r'it asks for posix\.mkdir'):
        load_checkpoint(nn.Linear(1, 1), 'code.pth')
    with pytest.raises(Exception, match=r'posix\.mkdir'):
        torch.load('code.pth', weights_only=False)
    with pytest.raises(Exception, match=r'posix\.mkdir'):  # what its remote loaders call
        getattr(mmengine_checkpoint, '_safe_torch_load', torch.load)('code.pth')


def test_programs_in_meta_do_not_reach_mmengine():
    torch.save({'meta': {'config': 'import os', 'epoch': 1}, 'state_dict': {}}, 'model.pth')
    loading.guard()
    assert CheckpointLoader.load_checkpoint('model.pth')['meta'] == {'epoch': 1}


def test_trusted_files_are_read_whole():
    torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': {'path': Path('x')}}, 'old.pth')
    loading.guard()
    with pytest.raises(RuntimeError, match=r'it asks for pathlib\S*PosixPath, .* with --trust-checkpoint'):
        reading.load('old.pth')
    reading.trust()
    loading.guard()
    assert reading.load('old.pth')['meta'] == {'path': Path('x')}
    assert load_checkpoint(nn.Linear(1, 1), 'old.pth')['meta'] == {'path': Path('x')}


def test_init_cfg_of_any_module_must_fit():
    class Neck(BaseModule):
        def __init__(self, width, **options):
            super().__init__(init_cfg=dict(type='Pretrained', checkpoint='neck.pth', **options))
            self.conv = nn.Conv2d(width, 1, 1)

    loading.guard()
    neck = Neck(2)
    torch.save({f'neck.{key}': value for key, value in Neck(2).state_dict().items()}, 'neck.pth')
    for prefix in ('neck', 'neck.'):
        neck = Neck(2, prefix=prefix)
        neck.init_weights()
        assert torch.equal(neck.conv.bias, torch.load('neck.pth')['neck.conv.bias'])
    with pytest.raises(
        RuntimeError, match=r"has nothing of this Neck: it begins with 'neck\.conv\.weight'"
    ):
        Neck(2).init_weights()
    with pytest.raises(RuntimeError, match=r'conv\.weight is \[1, 2, 1, 1\], expected \[1, 3, 1, 1\]'):
        Neck(3, prefix='neck').init_weights()


def test_yaml_runs_no_code():
    Path('base.yaml').write_text('a: !!python/object/apply:os.mkdir [mark]\n')
    Path('config.py').write_text("_base_ = './base.yaml'\n")
    for name in ('base.yaml', 'config.py'):
        with pytest.raises(SetupError, match=r'python/object/apply:os\.mkdir'):
            cli.read_config_file(name)
    Path('base.yaml').write_text('a: !!python/tuple [1, 2]\nb: {c: x}\n')
    assert cli.read_config_file('config.py').to_dict() == Config(dict(a=(1, 2), b=dict(c='x'))).to_dict()
