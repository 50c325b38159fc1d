"""Triton's interpreter in a third of its time, with the same results."""

import dataclasses

import triton
from triton.runtime import interpreter


def hurry() -> None:
    """Leave out what has no effect, in versions of Triton where that was tried; to be called once."""
    if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 6):
        return
    options = interpreter.interpreter_builder.options
    if getattr(options, 'sanitize_overflow', False) and not options.debug:
        # Each sum is done again in 64 bits, for an assertion that is made with `debug` alone.
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)

    # The language is prepared again at each call of a device function: once a kernel and module is enough.
    prepare, run, prepared = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def prepare_once(function):
        module = id(function.__globals__)
        if module not in prepared:
            prepared.add(module)
            return prepare(function)

    def run_afresh(*arguments, **keywords):
        prepared.clear()  # the end of a kernel undoes what its beginning prepared
        return run(*arguments, **keywords)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, run_afresh
