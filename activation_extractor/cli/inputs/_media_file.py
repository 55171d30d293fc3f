"""A picture or a sound that was not read yet."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple


class MediaFile(NamedTuple):
    """A picture or a sound: what it is called, and its file, or the bytes of that."""

    name: str
    path: Path
    content: bytes | None = None

    def source(self) -> Any:
        """What Pillow and soundfile open."""
        return self.path if self.content is None else io.BytesIO(self.content)
