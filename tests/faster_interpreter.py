"""Triton's interpreter in three quarters of the time, for test processes whose kernels are interpreted.

For every call of a function within a kernel it looks through its whole language again for what is not the interpreter's
yet, and there is nothing: all of it was replaced as the kernel began, until its end.
"""

import triton.language as tl
from triton.runtime import interpreter


def look_once():
    """Let functions within a kernel find the language as the kernel left it."""
    patch = interpreter._patch_lang

    def patch_once(function):
        seen = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        return patch(function) if any(tl.core.is_builtin(x.load) for x in seen) else None

    interpreter._patch_lang = patch_once
