"""Whether a module was put into another one, anywhere in the process, since somebody last looked."""

from __future__ import annotations

import threading
from itertools import count
from typing import Any

from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle


class ModuleRegistrations:
    """Numbers registrations of modules in other modules, as by ``model.head = ...``, while it has users.

    Attributes:
        latest: the number of the latest one. No number comes twice, so that one which another thread writes late is
            still a change.
    """

    def __init__(self) -> None:
        self.latest = 0
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._users: set[int] = set()
        self._handle: RemovableHandle | None = None

    def enter(self, user: object) -> None:
        """Count for this user too."""
        with self._lock:
            self._users.add(id(user))
            if self._handle is None:
                self._handle = register_module_module_registration_hook(self._count)

    def leave(self, user: object) -> None:
        """Count no longer for this user; a second time nothing happens."""
        with self._lock:
            self._users.discard(id(user))
            if not self._users and self._handle is not None:
                self._handle.remove()
                self._handle = None

    def _count(self, *_: Any) -> None:
        self.latest = next(self._numbers)


module_registrations = ModuleRegistrations()
