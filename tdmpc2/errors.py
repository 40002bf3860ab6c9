"""Errors that a user can fix. Every message is one line: what is wrong, and what to do."""


class TDMPC2Error(Exception):
    """Base of all errors that a user can fix; commands print the message and exit with status 1."""


class ConfigError(TDMPC2Error):
    """An unknown setting, or an invalid value."""


class TaskError(TDMPC2Error):
    """A task that has no environment, or an environment that cannot be used."""


class CheckpointError(TDMPC2Error):
    """A checkpoint that is missing, damaged, foreign, unsafe, or made for other shapes."""


class DataError(TDMPC2Error):
    """A shard of corrector data that is damaged or belongs to another teacher."""


class ObservationError(TDMPC2Error):
    """An observation that is not finite, or has a wrong type or shape."""


class EnvironmentFailure(TDMPC2Error):
    """An environment that raised an error in `reset` or `step`."""


class FileError(TDMPC2Error):
    """A file or folder that cannot be read or written: missing, no permission, a full disk."""


class Stopped(KeyboardInterrupt):
    """The process received SIGTERM or SIGHUP; raised at the current line, like Ctrl-C."""
