"""The pictures of Tux Paint's stamps package with their English captions, where it is installed.

They are under the GPL and so not in this package; SVG stamps are left out, and those without a text, which are mirror
images and moods of others.
"""

from __future__ import annotations

import os

from dalle_fast.data.folder import list_pictures
from dalle_fast.data.images import BadImage, Pictures, decode, fit, read_caption_text, read_file
from dalle_fast.data.source import MAX_BAD_SHARE, DataError, Example

FOLDERS = ("/usr/share/tuxpaint/stamps", "/usr/local/share/tuxpaint/stamps")


class Stamps(Pictures):
    """The source "stamps": whole pictures on white, at `image_size`. See `open_source`.

    Raises:
        DataError: the package is not installed.
    """

    crop = grows = False

    def __init__(self, image_size: int, *, split: str = "train", max_bad_share: float = MAX_BAD_SHARE, folders=FOLDERS):
        self.image_size = image_size
        for self.path in folders:
            self._captioned = list_pictures(self.path)[1] if os.path.isdir(self.path) else {}
            if self._captioned:
                break
        else:
            raise DataError(
                f"stamps: no pictures with captions in {' or '.join(folders)}: install Tux Paint's stamps "
                "(the package tuxpaint-stamps-default of Debian and Ubuntu)"
            )
        super().__init__("stamps", sorted(self._captioned), split=split, max_bad_share=max_bad_share)

    def read(self, number: int) -> Example:
        caption = self.read_caption(number)
        if not caption:
            raise BadImage("it has no caption")
        data = read_file(os.path.join(self.path, self.names[number]))
        return Example(fit(decode(data), self.image_size), caption)

    def read_caption(self, number: int) -> str:
        lines = read_file(os.path.join(self.path, self._captioned[self.names[number]])).splitlines()
        return read_caption_text(lines[0] if lines else b"").lower()  # English, then translations
