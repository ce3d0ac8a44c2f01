"""What a person did wrong, told apart from what went wrong.

A `UserError` says which field has which value, what the rule is and what to do; the command line prints it as one line
and ends with code 2. Everything else (no memory on the device, a lost connection between processes, a bug of ours)
keeps its traceback. Each class is a built-in error too, so that code which catches `ValueError` goes on working.
"""


class UserError(Exception):
    """A mistake that its message explains to the person who made it.

    Attributes:
        everywhere: all processes of a run raise it at the same place, so that one may save while the others wait.
    """

    everywhere = False


class InvalidValue(UserError, ValueError):
    """A value outside its range, or values that do not fit together."""


class InvalidType(UserError, TypeError):
    """A value of another type than the one that is needed."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that should be there is not."""


class FileThere(UserError, FileExistsError):
    """A file or folder is there already and would be lost."""


class NotWritten(UserError, OSError):
    """Something could not be written, for example because the disk is full."""


class Unusable(UserError, RuntimeError):
    """The surroundings do not allow it: processes that did not find each other, a folder that another run holds."""


class NotFinite(UserError, FloatingPointError):
    """Numbers became NaN or infinite; the message says where, and what to change."""


class NotFiniteScores(NotFinite):
    """What became NaN or infinite is the answer of a judge, and not the model."""


class GateFailed(UserError, RuntimeError):
    """A run is not worth going on with; the message names the gate, what was measured and what to look at.

    Attributes:
        found: the measurement that it failed by, for the log; empty where the log has it already.
    """

    def __init__(self, message: str, found: dict[str, float] | None = None, everywhere: bool = False):
        super().__init__(message)
        self.found, self.everywhere = dict(found or {}), everywhere
