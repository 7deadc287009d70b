"""Errors that a user can act on. The command prints them without a traceback and exits with code 2.

A message says what was given, where, the rule it breaks, and the remedy.
"""


class MoeNvfp4Error(ValueError):
    """Base of all errors caused by input: a checkpoint, a config, a request, or the machine's limits."""


class CheckpointError(MoeNvfp4Error):
    """A checkpoint that is damaged, incomplete, contradictory, or of an unsupported kind."""


class RequestError(MoeNvfp4Error):
    """A prompt or sampling setting that cannot be served."""


class DeadlineError(RequestError):
    """A request's timeout has passed before its answer was complete."""


class EngineError(MoeNvfp4Error):
    """The engine cannot take or finish a request: it is closed, broken, or out of room."""


class QueueFullError(EngineError):
    """As many requests wait as may. Try again later."""


class MemoryPlanError(MoeNvfp4Error):
    """The closed-form memory plan does not fit the device."""
