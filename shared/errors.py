"""One small hierarchy of errors, each with a stable code, an HTTP status and a message that names the mend.

Raised anywhere; at the edge of a service they become OpenAI-style error bodies (`as_openai`), on Kafka they
travel as a `Fault`. A message says what was wrong and what would be right; it never holds a traceback.
"""

from __future__ import annotations

from typing import ClassVar


class OutriderError(Exception):
    """Base of every error that a user may see."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def as_openai(self) -> dict[str, dict[str, str | None]]:
        """The body of an OpenAI error response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class InvalidRequest(OutriderError):
    """The request can never succeed as it stands (HTTP 400)."""

    code = "invalid_request"
    status = 400
    kind = "invalid_request_error"


class UnsupportedParameter(InvalidRequest):
    """A parameter, or a value of one, that is not served."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer don't fit into the target's context."""

    code = "context_length_exceeded"


class ModelNotFound(OutriderError):
    """No such model is served here (HTTP 404)."""

    code = "model_not_found"
    status = 404
    kind = "invalid_request_error"


class SessionNotFound(OutriderError):
    """No such session, or it has expired (HTTP 404)."""

    code = "session_not_found"
    status = 404
    kind = "invalid_request_error"


class StaleEpoch(OutriderError):
    """The message carries an epoch older than the session's (HTTP 409)."""

    code = "stale_epoch"
    status = 409
    kind = "conflict_error"


class SessionTaken(OutriderError):
    """Another connection has taken the session over (HTTP 409)."""

    code = "session_taken"
    status = 409
    kind = "conflict_error"


class Overloaded(OutriderError):
    """No room now; try again after `retry_after_s` (HTTP 429)."""

    code = "overloaded"
    status = 429
    kind = "rate_limit_error"


class Unavailable(OutriderError):
    """Something this service depends on doesn't answer (HTTP 503)."""

    code = "unavailable"
    status = 503


class BrokerUnavailable(Unavailable):
    """Kafka can't be reached, or lacks a topic."""

    code = "broker_unavailable"


class StoreUnavailable(Unavailable):
    """Redis can't be reached."""

    code = "store_unavailable"


class ProtocolError(OutriderError):
    """A message that cannot be read: malformed, of an unknown kind or of an unknown major version."""

    code = "protocol_error"
    status = 400
    kind = "invalid_request_error"


class EngineError(OutriderError):
    """The engine failed, or is not the one that was built for."""

    code = "engine_error"


class ModelFilesError(OutriderError):
    """Weights, tokenizer or exit modules are missing, corrupt or made for something else."""

    code = "model_files"


def _subclasses(cls: type[OutriderError]) -> list[type[OutriderError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _subclasses(child))]


def error_for(code: str, message: str, *, retry_after_s: float | None = None) -> OutriderError:
    """The error that a `Fault` or `Refused` with this code stands for; unknown codes become `OutriderError`."""
    for cls in _subclasses(OutriderError):
        if cls.code == code:
            return cls(message, retry_after_s=retry_after_s)
    return OutriderError(message, retry_after_s=retry_after_s)
