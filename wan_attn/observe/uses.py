# SPDX-License-Identifier: Apache-2.0
"""uses.py - what watches the calls of this process: by the environment, or by a use() in Python."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from wan_attn.observe import place

W = TypeVar("W")


class Uses(Generic[W]):
    """Those of one package.

    Args:
        who: what place.want() knows it by.
        at_exit: called at exit with what was active last, if anything was.

    Attributes:
        active: None where nothing is watched: a plain run looks at it once a call, and does nothing
            more.
        last: what was active last, whose report there is.
    """

    def __init__(self, who: str, at_exit: Callable[[W], None]) -> None:
        self.active: W | None = None
        self.last: W | None = None
        self._who, self._at_exit = who, at_exit
        self._begun: list[AnyUse[W]] = []
        self.by_environment: W | None = None
        self._is_registered = False

    def obey(self, watch: W | None) -> None:
        """What the environment asks for, from now on."""
        self.by_environment = watch
        self._choose()

    def begin(self, use: AnyUse[W]) -> None:
        """It goes before all others."""
        self.end(use)
        self._begun.append(use)
        self._choose()

    def end(self, use: AnyUse[W]) -> None:
        """Back to what was before; twice is once."""
        if use in self._begun:
            self._begun.remove(use)
            self._choose()

    def forget(self) -> None:
        """As in a new process."""
        self.by_environment = self.last = None
        self._begun.clear()
        self._choose()

    def _choose(self) -> None:
        """The innermost use() decides; without one, the environment."""
        self.active = self._begun[-1].watch if self._begun else self.by_environment
        place.want(self._who, self.active is not None)
        if self.active is not None:
            self.last = self.active
            if not self._is_registered:
                self._is_registered = True
                atexit.register(self._tell)

    def _tell(self) -> None:
        if self.last is not None:
            self._at_exit(self.last)


class AnyUse(Generic[W]):
    """What a use() has begun; end() ends it, and so does leaving `with`."""

    def __init__(self, uses: Uses[W], watch: W | None) -> None:
        self._uses, self.watch = uses, watch

    def __enter__(self) -> AnyUse[W]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def begin(self) -> None:
        """Once more, with what is known from before; use() has done it the first time."""
        self._uses.begin(self)

    def end(self) -> None:
        """Back to what was before; twice is once."""
        self._uses.end(self)
