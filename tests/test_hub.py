"""Checkpoints from the Hugging Face hub, of which a server on this machine stands in."""

import json
import subprocess
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from mmvig import checkpoints, hub
from mmvig.backbones import ViGH
from mmvig.reading import load_from_hub

constants = pytest.importorskip('huggingface_hub.constants')
hf_api = pytest.importorskip('huggingface_hub.hf_api')
ARCH = {'embed_dims': 32, 'depths': [1, 1, 1, 1], 'num_heads': [1, 2, 4, 8]}
COMMITS = {'main': 'a' * 40, 'old': 'b' * 40}


class Hub(BaseHTTPRequestHandler):
    """Files of one repository, ``server.files``, as the hub serves large ones; it knows two revisions."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        parts = self.path.partition('?')[0].strip('/').split('/')
        if parts[:2] == ['api', 'models']:
            files = [
                {'type': 'file', 'path': name, 'size': len(body), 'oid': '0' * 40}
                for name, body in self.server.files.items()
            ]
            body = json.dumps(files).encode()
            return self.answer(200, body, {'Content-Type': 'application/json'})
        repository, revision, name = '/'.join(parts[:2]), parts[3], '/'.join(parts[4:])
        commit = COMMITS.get(revision, revision)
        if repository != 'owner/name':
            return self.answer(401, b'', {'X-Error-Code': 'RepoNotFound'})
        if commit not in COMMITS.values():
            return self.answer(404, b'', {'X-Error-Code': 'RevisionNotFound'})
        if name not in self.server.files:
            return self.answer(404, b'', {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': commit})
        body = self.server.files[name]
        headers = {'ETag': f'"{sha256(body).hexdigest()}"', 'X-Repo-Commit': commit}
        headers['Accept-Ranges'] = 'bytes'
        start = int(self.headers.get('Range', 'bytes=0-')[6:].partition('-')[0])
        if start:
            headers['Content-Range'] = f'bytes {start}-{len(body) - 1}/{len(body)}'
        self.answer(206 if start else 200, body[start:], headers)

    do_HEAD = do_GET

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': len(body)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET':
            if self.server.is_cut and len(body) > 2**16:
                body, self.server.is_cut, self.close_connection = body[: len(body) // 2], False, True
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The stand-in, and an empty cache."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.files, server.asked, server.is_cut = {'README.md': b'text'}, [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_address[1]}'
    monkeypatch.setattr(constants, 'ENDPOINT', address)
    monkeypatch.setattr(
        constants,
        'HUGGINGFACE_CO_URL_TEMPLATE',
        address + '/{repo_id}/resolve/{revision}/{filename}',
    )
    monkeypatch.setattr(hf_api.api, 'endpoint', address)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    yield server
    server.shutdown()
    server.server_close()


def put(server, name, content, folder):
    torch.save(content, folder / 'file')
    server.files[name] = (folder / 'file').read_bytes()


def test_a_backbone_starts_from_the_hub(server, tmp_path):
    torch.manual_seed(0)
    there = ViGH(ARCH)
    put(server, 'vig.pth', {'state_dict': there.state_dict()}, tmp_path)
    address = 'hf://owner/name/vig.pth'
    for _ in range(2):
        model = ViGH(ARCH, init_cfg=dict(type='Pretrained', checkpoint=address))
        model.init_weights()
        assert all(map(torch.equal, model.parameters(), there.parameters()))
    assert server.asked.count(('GET', '/owner/name/resolve/main/vig.pth')) == 1  # then it is in the cache


def test_mmengine_reads_from_the_hub(server, tmp_path):
    put(server, 'folder/model.pth', {'state_dict': {'weight': torch.ones(2, 2)}}, tmp_path)
    address = 'hf://owner/name@old/folder/model.pth'
    model = nn.Linear(2, 2, bias=False)
    load_checkpoint(model, address)
    assert model.weight.eq(1).all() and '/resolve/old/' in server.asked[0][1]
    assert CheckpointLoader._get_checkpoint_loader(address) is load_from_hub

    class Part(BaseModule):
        def __init__(self):
            super().__init__(dict(type='Pretrained', checkpoint=address))
            self.weight = nn.Parameter(torch.zeros(2, 2))

    part = Part()
    part.init_weights()
    assert part.weight.eq(1).all()


def test_a_download_that_is_cut_off_is_tried_again(server, tmp_path):
    put(server, 'model.pth', {'weight': torch.rand(2**16)}, tmp_path)
    server.is_cut = True
    assert hub.fetch('hf://owner/name/model.pth').read_bytes() == server.files['model.pth']
    assert not server.is_cut


def test_damaged_copies_are_not_read(server, tmp_path):
    put(server, 'model.pth', {'weight': torch.ones(9)}, tmp_path)
    copy = hub.fetch('hf://owner/name/model.pth').resolve()
    copy.write_bytes(copy.read_bytes()[:-1] + b'x')
    with pytest.raises(RuntimeError, match=r'is damaged; delete it, and hf:.* is downloaded again'):
        checkpoints.read('hf://owner/name/model.pth')
    copy.unlink()
    assert checkpoints.read('hf://owner/name/model.pth')['weight'].eq(1).all()


def test_small_files_have_gits_hash(tmp_path):
    name = subprocess.run(['git', 'hash-object', '--stdin'], input=b'text', capture_output=True, check=True)
    path = tmp_path / name.stdout.decode().strip()
    for content in (b'text', b'test'):
        path.write_bytes(content)
        assert hub._is_whole(path) == (content == b'text')


def test_files_that_cannot_be_listed(server, monkeypatch):
    monkeypatch.setattr('huggingface_hub.list_repo_files', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(RuntimeError, match=r'cannot be downloaded: owner/name has no such file$'):
        hub.fetch('hf://owner/name/no.pth')


def test_code_is_not_run(server, tmp_path):
    put(server, 'model.pth', {'weight': print}, tmp_path)
    with pytest.raises(RuntimeError, match=r'it asks for print, which could run code'):
        checkpoints.read('hf://owner/name/model.pth')


@pytest.mark.parametrize(
    ('address', 'kind', 'message'),
    [
        ('hf://owner', ValueError, 'must be hf://OWNER/NAME/FILE'),
        ('hf://owner/name', ValueError, 'must be hf://OWNER/NAME/FILE'),
        ('hf://owner/name/no.pth', RuntimeError, r'owner/name has no such file, but vig\.pth$'),
        ('hf://owner/other/vig.pth', RuntimeError, 'cannot be downloaded: RepositoryNotFoundError: 401'),
        ('hf://owner/name@new/vig.pth', RuntimeError, 'cannot be downloaded: RevisionNotFoundError: 404'),
    ],
)
def test_wrong_addresses_are_named(server, tmp_path, address, kind, message):
    put(server, 'vig.pth', {}, tmp_path)
    with pytest.raises(kind, match=message) as found:
        hub.fetch(address)
    assert '\n' not in str(found.value)


def test_without_network_there_is_what_the_cache_has(server, tmp_path, monkeypatch):
    put(server, 'model.pth', {'weight': torch.ones(9)}, tmp_path)
    hub.fetch('hf://owner/name/model.pth')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)  # else it tries for 20 seconds
    assert checkpoints.read('hf://owner/name/model.pth')['weight'].eq(1).all()
    with pytest.raises(RuntimeError, match='the hub cannot be reached, and there is no copy in the cache'):
        hub.fetch('hf://owner/name/other.pth')


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'huggingface_hub', None)
    with pytest.raises(RuntimeError, match=r"needs huggingface_hub: pip install 'mmvig\[hub\]'"):
        hub.fetch('hf://owner/name/vig.pth')
