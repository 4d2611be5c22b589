"""The recordings of one problem on batches of several shapes: those used last."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from unbatch.problem.known_forms import KnownForms
from unbatch.problem.session import Session

# Of so many shapes a recording is kept, by default.
MOST = 16


class Recordings:
    """Sessions by what decides which computation runs on a batch (``Batch.signature``).

    Shared by all problems that were made from one by ``with_batch``. ``most``: of so many shapes
    one is kept; of those that have not been used for longest, none. ``known``: what was found out
    about recordings that may be gone.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.known = KnownForms(most)
        self._sessions: OrderedDict[Any, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, signature: Any) -> Session | None:
        """Return the session of the last batch like this one."""
        return self._sessions.get(signature)

    def put(self, signature: Any, session: Session) -> None:
        """Keep the session of a batch, as the one used last."""
        before = self._sessions.pop(signature, None)
        if before is None and self._sessions:
            # The one used last so far: another batch may never come back to it.
            next(reversed(self._sessions.values())).put_aside()
        self._sessions[signature] = session
        while len(self._sessions) > self.most:
            self._sessions.popitem(last=False)

    def clear(self) -> None:
        """Forget all, as something has changed that nobody watches."""
        self._sessions.clear()
        self.known = KnownForms(self.most)
