"""Opening what was saved."""

from __future__ import annotations

import os

from activation_extractor._arguments import check_flag
from activation_extractor._storage import located
from activation_extractor.store._store import Store


def open_store(path: str | os.PathLike[str], *, partial: bool = False) -> Store:
    """Open a folder that ``capture(..., sink=path)`` or ``extract(..., out=path)`` wrote.

    Only the manifest, the journal and the list of shards are read; shards are opened, and checked, when something in
    them is asked for. A store that is still being written, or whose writer was killed, opens to the units that are
    complete, as long as none is missing between them. Nothing in a store is trusted: its shards come from the folder's
    listing, links are refused, and every number is checked against the file that it is about.

    Args:
        path: the folder.
        partial: whether to open a store that lacks units, where several processes share a run that is not at its end,
            or a shard was lost: `Store.row_numbers` says which rows are there. By default that is an error, since the
            rows behind a missing unit would move up.

    Raises:
        StoreError: it is not a store, a newer version wrote it, or a unit is missing or damaged.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from activation_extractor import capture, open_store
        >>> model, folder = nn.Sequential(nn.Linear(4, 8)), tempfile.mkdtemp()
        >>> with capture(model, "0", sink=folder) as acts:
        ...     with acts.step(ids=["a", "b"]):
        ...         _ = model(torch.randn(2, 4))
        >>> store = open_store(folder)
        >>> store["0"]
        Column(('0', 'full'), (2, 8), float32)
        >>> store.ids
        ['a', 'b']
        >>> store["0"][store.row_of("b")].shape
        torch.Size([8])
    """
    check_flag("partial", partial)
    return Store(located(path), partial=partial)
