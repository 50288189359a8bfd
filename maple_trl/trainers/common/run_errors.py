"""Why a run ends before its end, or ends with nothing."""


class RunStoppedError(RuntimeError):
    """A run that was stopped, or that came to nothing; the message says why, and what to do."""


class TooManyQuarantinedError(RunStoppedError):
    """More rows cannot be used than `max_quarantined_share` allows; the message counts them by reason."""


class NoStepError(RunStoppedError):
    """A run that ended without an optimizer step."""


class EngineLostError(RunStoppedError):
    """The engine that samples completions has gone; the message says where the run's checkpoint is."""
