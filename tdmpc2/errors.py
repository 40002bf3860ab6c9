"""What a user can do wrong, by name. Every message is one line: what was wrong and what to do."""


class TDMPC2Error(Exception):
    """Base of all errors that the user can mend; scripts print its message and exit with status 1."""


class ConfigError(TDMPC2Error):
    """A setting that does not exist or cannot hold the value it was given."""


class TaskError(TDMPC2Error):
    """A task name that no environment answers to."""


class CheckpointError(TDMPC2Error):
    """A checkpoint that is missing, damaged, foreign, unsafe, or made for other shapes."""


class DataError(TDMPC2Error):
    """A shard of corrector data that is damaged or belongs to another teacher."""


class ObservationError(TDMPC2Error):
    """An observation that is not finite or has the wrong shape."""


class EnvironmentFailure(TDMPC2Error):
    """An environment that raised while it was being reset or stepped."""


class FileError(TDMPC2Error):
    """A file or folder that cannot be read or written: missing, no permission, a full disk."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP came, which ask a script to end; raised where it is, as Ctrl-C is."""
