"""Metafiles, model zoo page and configs say the same, and it is true of the models."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from modelindex.load_model_index import load as load_index

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob('configs/[!_]*/*.py'))
INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())
METAFILES = {path: yaml.safe_load((ROOT / path).read_text()) for path in INDEX['Import']}
ENTRIES = {model['Config']: model for content in METAFILES.values() for model in content['Models']}
# | [`name`](../config) | parameters | ... | result | whose |
ROW = re.compile(r'^\| \[`(\w+)`\]\(\.\./(\S+\.py)\) \| ([\d.]+) M \| (.+) \| (.+) \| (.+) \|$', re.M)
ROWS = {row[1]: row for row in ROW.findall((ROOT / 'docs/model_zoo.md').read_text())}


def test_every_config_is_listed_once_and_every_listed_one_exists():
    listed = [model['Config'] for content in METAFILES.values() for model in content['Models']]
    assert sorted(listed) == CONFIGS
    assert sorted(ROWS) == CONFIGS
    page = (ROOT / 'docs/model_zoo.md').read_text()
    assert page.count('.py)') == len(CONFIGS), 'a row that the test does not read'
    assert sorted(METAFILES) == sorted(
        str(path.relative_to(ROOT)) for path in ROOT.glob('configs/*/metafile.yml')
    )


def test_index_is_one_that_openmmlabs_reader_takes():
    index = load_index(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    models = [model.full_model for model in index.models]
    assert {model.config for model in models} == set(CONFIGS)
    assert all(model.paper['URL'] and model.metadata.parameters for model in models)


@pytest.mark.parametrize('config', CONFIGS)
def test_an_entry_agrees_with_its_config(config):
    entry, cfg = ENTRIES[config], Config.fromfile(ROOT / config)
    assert entry['Name'] == ROWS[config][0] == Path(config).stem
    (family,) = (content for path, content in METAFILES.items() if Path(path).parent == Path(config).parent)
    collections = {each['Name']: each for each in family['Collections']}
    title = collections[entry['In Collection']]['Paper']['Title']
    assert ('Swin' in title) == ('swin' in config)
    assert (ROOT / collections[entry['In Collection']]['README']).is_file()
    metadata = entry['Metadata']
    if 'Epochs' in metadata:
        assert metadata['Epochs'] == cfg.train_cfg.max_epochs
    else:  # ours may have been shorter than what the config now says, as the page then tells
        assert metadata['Iterations'] <= cfg.train_cfg.max_iters
        assert metadata['Iterations'] == cfg.train_cfg.max_iters or 'Results' in entry
    published = cfg.auto_scale_lr.base_batch_size
    assert metadata['Batch Size'] in (published, cfg.train_dataloader.batch_size)


@pytest.mark.parametrize('config', CONFIGS)
def test_parameters_are_those_of_the_built_model(config):
    cfg = Config.fromfile(ROOT / config)
    device = 'meta' if 'vig' in config else 'cpu'  # without memory or initialisation, which others cannot
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        model = MODELS.build(cfg.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert ENTRIES[config]['Metadata']['Parameters'] == parameters
    assert ROWS[config][2] == f'{parameters / 1e6:.2f}'


@pytest.mark.parametrize('config', CONFIGS)
def test_the_page_and_the_metafile_give_the_same_result_to_the_same_people(config):
    entry, (_, _, _, middle, result, whose) = ENTRIES[config], ROWS[config]
    metrics = [metric for each in entry.get('Results', []) for metric in each['Metrics'].values()]
    assert result == (' / '.join(map(str, metrics)) or '-')
    expected = 'official' if 'Converted From' in entry else 'ours' if metrics else 'not trained yet'
    address = entry.get('Converted From', {}).get('Weights', '')
    if address.endswith('.pth'):
        expected = f'official, [`{address.rpartition("/")[2]}`]({address})'
    if 'Training Log' in entry:
        log = ROOT / entry['Training Log']
        expected += f', [log]({log.relative_to(ROOT / "docs")})'
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert sum('loss' in line for line in lines) > 1
        logged = [scale * x for x in lines[-1].values() for scale in (1, 100)]  # APs are parts of 1 there
        assert all(any(metric == pytest.approx(x, abs=0.06) for x in logged) for metric in metrics)
    assert whose == expected
    assert 'Weights' not in entry, 'there is no file of ours to download'
    metadata = entry['Metadata']
    if 'FLOPs' in metadata:
        multiply_adds, _, middle = middle.partition(' | ')
        assert multiply_adds == f'{metadata["FLOPs"] / 1e9:.2f} G'
    assert ('FLOPs' in metadata) == (metadata.get('Training Data') in (None, 'COCO', 'ADE20K'))
    if 'Training Data' in metadata:
        length = (
            f'{metadata["Epochs"]} epochs'
            if 'Epochs' in metadata
            else f'{metadata["Iterations"]} iterations'
        )
        assert middle.startswith(f'{metadata["Training Data"]}, {length}')
        assert all(each['Dataset'] == metadata['Training Data'] for each in entry.get('Results', []))


def test_official_accuracies_are_those_of_the_readme():
    readme = (ROOT / 'README.md').read_text()
    published = dict(re.findall(r'^\| (ViG(?:-H)?-[TSB]) \| [\d.]+ M \| ([\d.]+) \|$', readme, re.M))
    stems = {name: name.replace('ViG-H', 'vigh').replace('-', '_').lower() for name in published}
    names = {name: f'configs/classification/{stem}_in1k.py' for name, stem in stems.items()}
    assert len(names) == 6
    assert {name: ROWS[config][4] for name, config in names.items()} == published
