"""What values are made of: `msgspec.Struct`, made in a fifth of the time that a frozen dataclass takes.

A base for each set of options, never compiled (docs/decisions.md): a compiled class statement knows no keywords, but
options are inherited. The keywords that a subclass repeats are for the type checker.
"""

import msgspec


class Value(msgspec.Struct, frozen=True, gc=False):
    """A value. A request has some 30; none is ever part of a reference cycle, so the garbage collector need not look at
    them.
    """


class Thing(msgspec.Struct, eq=False):
    """Something that changes, and is equal to itself only."""
