"""Every private name of another library that this package uses: one module a library, each name with its reason.

tests/test_private.py fails, naming it, where the installed version lacks one, and where another module uses one.
"""

from typing import NamedTuple


class Used(NamedTuple):
    """A name that a library does not promise to keep.

    Attributes:
        owner: "package.module:Class", or "package.module".
        name: as the library writes it.
        why: what it is used for, and why nothing public serves.
        hook: whether our subclasses define it, because the library calls or reads it there.
    """

    owner: str
    name: str
    why: str
    hook: bool = False
