"""--cfg-options: values as mmengine documents them, and what its own reading of them loses."""

from argparse import ArgumentParser

import pytest
from mmengine.config import Config, DictAction

from mmvig.engine.options import CfgOptions, merge_options, parse_value
from mmvig.engine.preflight import SetupError

DOCUMENTED = """
1|-1|-0.5|1e-3|true|False|None||word|x/y.pth|a=b=c|'abc'|1,2,3|-1,2|1,|1,,2|,|[a, b, c]|[ 1 , 2 ]|[]|()|(1,)
(a)|[[1]]|[(1, 2, 3), [a, b], c]|[(a,b), [1,2], false]|((1,2),(3,4))|[1, [2, (3, [4.])]]|"[1,2]"
"""


@pytest.mark.parametrize('text', DOCUMENTED.strip().replace('\n', '|').split('|'))
def test_values_that_mmengine_reads_rightly_are_read_alike(text):
    assert repr(parse_value(text)) == repr(DictAction._parse_iterable(text))


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('/d/my set', '/d/my set'),
        ('[/d/my set, b c]', ['/d/my set', 'b c']),
        (r'C:\data\new', r'C:\data\new'),
        (r"['C:\data\new', 'it''s']", [r'C:\data\new', "'it''s'"]),
        ("it's", "it's"),
        ('/d/run (1)/[old]', '/d/run (1)/[old]'),
        ('iter_{}.pth', 'iter_{}.pth'),
        ("'a, b'", 'a, b'),
        ('["1", \'(\', "None"]', ['1', '(', 'None']),
        ('(1,2),(3,4)', [(1, 2), (3, 4)]),
        (
            "dict(type=SGD, lr=1e-3, betas=(0.9, 0.99), of=dict(a=[1, x=y]), s='a, b=c')",
            {'type': 'SGD', 'lr': 1e-3, 'betas': (0.9, 0.99), 'of': {'a': [1, 'x=y']}, 's': 'a, b=c'},
        ),
        ("{a: 1, 'b c': {d: C:\\x}, e: http://x}", {'a': 1, 'b c': {'d': 'C:\\x'}, 'e': 'http://x'}),
        ('[dict(type=A), {}]', [{'type': 'A'}, {}]),
        ('dict()', {}),
    ],
)
def test_spaces_strings_and_dicts(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ('option', 'reason'),
    [
        ('a=[1', 'a: [ is not closed'),
        ('a=[1)]', 'a: ) closes nothing'),
        ("a=['x, 1]", "a: ' is not closed"),
        ('a=dict(1)', "entries KEY=VALUE, not '1'"),
        ('a={x}', "entries KEY: VALUE, not 'x'"),
        ('a=' + 1100 * '[' + 1100 * ']', 'a: '),
        ('a', "takes KEY=VALUE, got 'a'"),
        ('=a', "takes KEY=VALUE, got '=a'"),
    ],
)
def test_what_is_no_value_is_said_in_one_line(option, reason):
    parser = ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, default={})
    with pytest.raises(SetupError) as error:
        parser.parse_args(['--cfg-options', option])
    assert reason in str(error.value)
    assert len(str(error.value)) < 500 and '\n' not in str(error.value)


def merged(options):
    cfg = Config(
        {
            'model': {'backbone': {'type': 'A', 'depth': 1, 'init_cfg': None}, 'heads': [{'type': 'B'}, 5]},
            'train_dataloader': {'shapes': ({'size': 1}, 2)},
            'data_root': 'data/set',
            'val_dataloader': {'root': 'data/set/val', 'other': 'data/settings'},
        }
    )
    merge_options(cfg, options)
    return cfg


def test_dicts_are_merged_or_put_in_the_place_of_something_else():
    cfg = merged({'model.backbone': parse_value('dict(depth=2, new=[1])')})
    assert cfg.model.backbone == {'type': 'A', 'depth': 2, 'init_cfg': None, 'new': [1]}
    cfg = merged({'model.backbone': parse_value('dict(_delete_=True, type=C)')})
    assert cfg.model.backbone == {'type': 'C'}
    cfg = merged({'model.backbone.init_cfg': parse_value('dict(type=Pretrained)')})
    assert cfg.model.backbone.init_cfg.type == 'Pretrained'
    assert merged({'model.backbone.init_cfg.type': 'P'}).model.backbone.init_cfg.type == 'P'
    assert merged({'strategy.type': 'S'}).strategy == {'type': 'S'}


def test_keys_go_through_lists_and_tuples():
    cfg = merged({'model.heads.0.type': 'C', 'model.heads.1': 6, 'train_dataloader.shapes.0.size': 3})
    assert cfg.model.heads == [{'type': 'C'}, 6]
    assert cfg.train_dataloader.shapes == ({'size': 3}, 2)
    assert merged({'model.heads.0': {'x': 1}}).model.heads[0] == {'type': 'B', 'x': 1}


@pytest.mark.parametrize(
    ('key', 'reason'),
    [
        ('model.heads.2.type', "list of 2, which has no '2'"),
        ('model.heads.-1', "list of 2, which has no '-1'"),
        ('model.heads.type', "list of 2, which has no 'type'"),
        ('model.backbone.type.name', "there is 'A', which has no 'name'"),
        ('modle.type', "did you mean 'model'"),
    ],
)
def test_keys_that_do_not_fit(key, reason):
    with pytest.raises(SetupError) as error:
        merged({key: 1})
    assert reason in str(error.value) and key in str(error.value)


def test_paths_move_with_the_data_root():
    cfg = merged({'data_root': parse_value('/d/my set')})
    assert cfg.val_dataloader == {'root': '/d/my set/val', 'other': 'data/settings'}
    assert cfg.data_root == '/d/my set'
    with pytest.raises(SetupError, match='must be one path'):
        merged({'data_root': parse_value('/d/a, b')})
