"""Triton's interpreter in a fraction of its time, with the same results."""

import dataclasses

import numpy as np
import triton
from triton.runtime import interpreter

scan_numbers = interpreter.ScanOps.generic_scan  # as Triton has it


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

    # NumPy's type of each of Triton's is looked up in a table that is made at each call.
    look_up, found = interpreter._get_np_dtype, {}

    def look_up_once(kind):
        name = kind.scalar.name
        if name not in found:
            found[name] = look_up(kind)
        return found[name]

    interpreter._get_np_dtype = look_up_once
    interpreter.ScanOps.generic_scan = scan_slices


def scan_slices(self, inputs: tuple) -> list:
    """Combine whole slices along the axis, where Triton combines one number with one other at a time."""
    sources = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    results = [source.copy() for source in sources]
    dtypes = [x.dtype for x in inputs]
    for i in range(1, len(results[0])):
        parts = [result[i - 1] for result in results] + [source[i] for source in sources]
        combined = self.combine_fn.fn(*map(self.to_tensor, parts, dtypes * 2))
        combined = combined if isinstance(combined, tuple) else (combined,)
        for result, part in zip(results, combined, strict=True):
            result[i] = part.handle.data.reshape(result[i].shape)
    return [self.to_tensor(np.moveaxis(y, 0, self.axis), t) for y, t in zip(results, dtypes, strict=True)]
