"""Pictures and captions: where they come from, how batches are made of them, and the tokenizer.

`open_source(spec)` opens drawn scenes, a folder, tar shards, emoji or stamps behind one small interface; `batches`
makes a stream of it that can be resumed anywhere. Nothing is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors, which do not see what is imported when it is used
    from dalle_fast.data.loading import Batch as Batch
    from dalle_fast.data.loading import batches as batches
    from dalle_fast.data.shapes import Scene as Scene
    from dalle_fast.data.shapes import all_scenes as all_scenes
    from dalle_fast.data.shapes import caption_of_scene as caption_of_scene
    from dalle_fast.data.shapes import draw as draw
    from dalle_fast.data.shapes import read_caption as read_caption
    from dalle_fast.data.shapes import read_captions as read_captions
    from dalle_fast.data.shapes import scene_of_caption as scene_of_caption
    from dalle_fast.data.source import DataError as DataError
    from dalle_fast.data.source import Example as Example
    from dalle_fast.data.source import Source as Source
    from dalle_fast.data.source import open_source as open_source
    from dalle_fast.data.text import Tokenizer as Tokenizer

_HOMES = {
    "Batch": "loading",
    "DataError": "source",
    "Example": "source",
    "Scene": "shapes",
    "Source": "source",
    "Tokenizer": "text",
    "all_scenes": "shapes",
    "batches": "loading",
    "caption_of_scene": "shapes",
    "draw": "shapes",
    "open_source": "source",
    "read_caption": "shapes",
    "read_captions": "shapes",
    "scene_of_caption": "shapes",
}
_PARTS = ("crops", "emoji", "folder", "images", "loading", "shapes", "source", "stamps", "tar", "text")

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOMES, *_PARTS])
