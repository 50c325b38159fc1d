"""``--cfg-options KEY=VALUE``: what mmengine documents, and spaces, strings and dicts in values."""

import difflib
import inspect
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.runner import Runner

from mmvig.engine.preflight import SetupError

logger = logging.getLogger(__name__)

# Top-level config keys that mmengine's runners read: Runner's own arguments, and what they look up.
RUNNER_KEYS = {
    *inspect.signature(Runner.__init__).parameters,
    *('activation_checkpointing', 'compile', 'efficient_conv_bn_eval', 'find_unused_parameters'),
    *('model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn', 'tta_model', 'tta_pipeline'),
}
_CLOSING = {'(': ')', '[': ']', '{': '}'}
_QUOTES = '\'"'


class CfgOptions(DictAction):
    """mmengine's DictAction with :func:`parse_value`, and an error of one line for what is no KEY=VALUE."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: list[str],
        option_string: str | None = None,
    ) -> None:
        """Add the options of ``values``."""
        options = dict(getattr(namespace, self.dest) or {})
        for each in values:
            key, equals, text = each.partition('=')
            if not (equals and key.strip()):
                raise SetupError(
                    f'--cfg-options takes KEY=VALUE, got {each!r}; put a value with spaces into quotes'
                )
            try:
                options[key.strip()] = parse_value(text)
            except (ValueError, RecursionError) as error:
                raise SetupError(f'--cfg-options {key}: {error}; got {text[:200]}') from error
        setattr(namespace, self.dest, options)


def parse_value(text: str) -> Any:
    r"""A value from its text; no code in it is run.

    ======================================  =====================================================
    ``1``, ``-0.5``, ``true``, ``None``     a number, a bool, None
    ``/d/my set``, ``C:\data``, ``a=b``       the text as it is
    ``1,2``, ``[1, (a, b)]``, ``(1,)``      lists and tuples of values
    ``dict(a=1)``, ``{a: 1, 'b c': 2}``     dicts of values; with ``_delete_=True`` nothing is kept
    ``'a, b'``, ``["1", '(']``              within quotes: strings, with all that is in them
    ======================================  =====================================================

    Quotes round a whole list, tuple or dict are those of a shell that left them there.

    Raises:
        ValueError: brackets or quotes are not closed, or an entry of a dict has no key.
    """
    word = text.strip()
    if len(word) > 1 and word[0] in _QUOTES and word.find(word[0], 1) == len(word) - 1:
        inner = word[1:-1]
        return parse_value(inner) if _is_bracketed(inner.strip()) else inner
    if ',' in word or word.startswith((*_CLOSING, 'dict(')):
        parts = _split(word, ',')
        if len(parts) > 1:
            return [parse_value(part.strip()) for part in _elements(parts)]
        if _is_bracketed(word):
            return _bracketed(word)
    value = DictAction._parse_int_float_bool(word)
    return text if isinstance(value, str) else value


def _is_bracketed(word: str) -> bool:
    """Whether a word looks like a list, tuple or dict."""
    start = word.removeprefix('dict')[:1]
    return start in _CLOSING and word.endswith(_CLOSING[start]) and (word[0] == start or start == '(')


def _bracketed(word: str) -> list | tuple | ConfigDict:
    is_call = word.startswith('dict(')
    parts = _elements(_split(word.removeprefix('dict')[1:-1], ','))
    if not (is_call or word[0] == '{'):
        values = [parse_value(part.strip()) for part in parts]
        return tuple(values) if word[0] == '(' else values
    result = ConfigDict()
    for part in parts:
        key, *value = _split(part, '=' if is_call else ':', most=2)
        name = parse_value(key.strip())
        if not value or not isinstance(name, str) or (is_call and not name.isidentifier()):
            raise ValueError(f'a dict has entries {"KEY=VALUE" if is_call else "KEY: VALUE"}, not {part!r}')
        result[name] = parse_value(value[0].strip())
    return result


def _elements(parts: list[str]) -> list[str]:
    """Parts without the empty one after a last comma."""
    return parts if parts[-1].strip() else parts[:-1]


def _split(text: str, separator: str, most: int | None = None) -> list[str]:
    """Split a text into ``most`` parts at the separators that are in no brackets and no quotes."""
    parts, opened, start = [], [], 0
    for index, char in _outside_quotes(text):
        if char in _CLOSING:
            opened.append(char)
        elif char in _CLOSING.values():
            if not opened or _CLOSING[opened.pop()] != char:
                raise ValueError(f'{char} closes nothing')
        elif char == separator and not opened and len(parts) + 1 != most:
            parts.append(text[start:index])
            start = index + 1
    if opened:
        raise ValueError(f'{opened[-1]} is not closed')
    return [*parts, text[start:]]


def _outside_quotes(text: str) -> Iterator[tuple[int, str]]:
    """The characters that are in no quotes, with their places; a quote opens where a value begins."""
    quote = ''
    before = ','
    for index, char in enumerate(text):
        if quote:
            quote = '' if char == quote else quote
        elif char in _QUOTES and before in ',=:([{':
            quote = char
        else:
            yield index, char
        before = before if char.isspace() else char
    if quote:
        raise ValueError(f'{quote} is not closed')


def merge_options(cfg: Config, options: dict) -> None:
    """Merge --cfg-options into a config.

    ``data_root`` moves all paths under the config's ``data_root``: mmengine would set the variable
    alone, which nothing reads once the config has been evaluated.

    Raises:
        SetupError: A key's first part is unknown, or a key does not fit the config's structure.
    """
    known = RUNNER_KEYS | set(cfg)
    for key in options:
        first = key.partition('.')[0]
        if first not in known:
            close = difflib.get_close_matches(first, known, n=1)
            hint = f'; did you mean {close[0]!r}?' if close else ''
            raise SetupError(f'--cfg-options {key}: {cfg.filename} has no {first!r}{hint}')
        if first not in RUNNER_KEYS and key != 'data_root':
            logger.warning(
                '--cfg-options %s: %r is a variable of the config file, read when the file was '
                'evaluated; set what was made from it instead.',
                key,
                first,
            )
    if 'data_root' in options:
        _move_data(cfg, options['data_root'])
    for key, value in options.items():
        first, *rest = key.split('.')
        old = cfg.get(first)
        try:
            cfg[first] = _with(_or_dict(old), rest, value) if rest else _merged(old, value)
        except TypeError as error:
            raise SetupError(
                f'--cfg-options {key} does not fit {cfg.filename}: {str(error)[:300]}'
            ) from error


def _merged(old: Any, value: Any) -> Any:
    """A value merged into what is there: a dict into a dict, as mmengine does, else instead of it."""
    if not isinstance(value, dict):
        return value
    value = value.copy()
    if value.pop('_delete_', False) or not isinstance(old, dict):
        return value
    merged = Config({'it': old})
    merged.merge_from_dict({'it': value})
    return merged.it


def _with(node: Any, parts: list[str], value: Any) -> Any:
    """A copy of a part of a config, with a value merged in at a key below it."""
    first, *rest = parts
    if isinstance(node, (list, tuple)):
        if not first.isdigit() or int(first) >= len(node):
            raise TypeError(f'there is a {type(node).__name__} of {len(node)}, which has no {first!r}')
        copy, at = [*node], int(first)
        old = copy[at]
    elif isinstance(node, dict):
        copy, at = node.copy(), first
        old = copy.get(at)
    else:
        raise TypeError(f'there is {node!r}, which has no {first!r}')
    copy[at] = _with(_or_dict(old), rest, value) if rest else _merged(old, value)
    return tuple(copy) if isinstance(node, tuple) else copy


def _or_dict(node: Any) -> Any:
    return ConfigDict() if node is None else node


def _move_data(cfg: Config, folder: Any) -> None:
    """Put every path under the config's ``data_root`` under another folder."""
    if isinstance(folder, (list, tuple, dict)) or folder in (None, ''):
        raise SetupError(
            f'--cfg-options data_root must be one path, got {folder!r}; put a path with commas or brackets '
            'into quotes of its own'
        )
    old, new = cfg.data_root, str(folder).rstrip('/') or '/'
    if isinstance(old, str):
        for key, value in cfg.items():
            cfg[key] = _moved(value, old.rstrip('/'), new)


def _moved(value: Any, old: str, new: str) -> Any:
    """A copy of a config value with every path under ``old`` put under ``new``."""
    if isinstance(value, dict):
        return {key: _moved(each, old, new) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(each, old, new) for each in value)
    if isinstance(value, str) and (value == old or value.startswith(f'{old}/')):
        return new + value[len(old) :]
    return value
