"""Triton's interpreter in half of the time, for test processes whose kernels are interpreted.

It does much again, or for nothing, and what it does here is what it does without this:

- For every call of a function within a kernel it looks through its whole language again for what is not the
  interpreter's yet, and there is nothing: all of it was replaced as the kernel began, until its end.
- It computes every sum, difference and product of integers a second time in 64 bits, to assert that it fits into its
  type. The assertion is left out unless kernels are debugged.
- It makes a table of all dtypes whenever it asks for one of them.
"""

import dataclasses

import triton.language as tl
from triton.runtime import interpreter


def look_once():
    """Let functions within a kernel find the language as the kernel left it."""
    patch = interpreter._patch_lang

    def patch_once(function):
        seen = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        return patch(function) if any(tl.core.is_builtin(x.load) for x in seen) else None

    interpreter._patch_lang = patch_once


def check_no_overflow():
    """Leave out what is computed for an assertion that is not made."""
    builder = interpreter.interpreter_builder
    options = getattr(builder, "options", None)
    if hasattr(options, "sanitize_overflow") and not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)


def keep_dtypes():
    """Look each dtype up once."""
    numpy_dtype, found = interpreter._get_np_dtype, {}

    def kept(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = numpy_dtype(dtype)
        return found[name]

    interpreter._get_np_dtype = kept


def make_faster():
    """All of it, as far as this Triton has it: the last two were written for 3.8."""
    look_once()
    check_no_overflow()
    if hasattr(interpreter, "_get_np_dtype"):
        keep_dtypes()
