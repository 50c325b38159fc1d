"""Triton's interpreter in half the time."""

from triton.runtime import interpreter


def prepare_once_a_kernel() -> None:
    """Have it prepare a module's language once a kernel, and not at each call of a function of it."""
    prepare, run, prepared = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def prepare_once(function):
        module = id(function.__globals__)
        if module not in prepared:
            prepared.add(module)
            return prepare(function)

    def run_afresh(*arguments, **options):
        prepared.clear()  # what a kernel has prepared is undone at its end
        return run(*arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, run_afresh
