"""How an operation is made known to torch: its schema, one kernel for every device, and what a compiler sees of it."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("dalle_fast", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def register(schema, kernel, fake, *, tags=TAGS):
    """Register `schema` for every device, as who serves which is decided in `kernel`; returns the operation."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dalle_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.dalle_fast, name).default
