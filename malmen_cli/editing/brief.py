"""Values from a spec in error messages: as `repr` has them, but not endless."""

from __future__ import annotations

import reprlib

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 100
_BRIEF.maxlevel = 3


def brief(value: object) -> str:
    """`repr(value)`, its middle left out where it is long."""
    return _BRIEF.repr(value)
