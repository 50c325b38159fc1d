"""Bad inputs to all public functions; `tests/reliability/bad_inputs.py` has those to the tools, too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / 'reliability'))

import bad_calls


def test_functions_name_the_argument_that_is_wrong():
    outcomes = [(call, *bad_calls.outcome(call)) for call in bad_calls.calls()]
    wrong = [
        f'{call.subject}({call.argument}={call.value!r}): {said}' for call, ok, said in outcomes if not ok
    ]
    assert len(outcomes) > 1000
    assert not wrong, '\n'.join(wrong)
