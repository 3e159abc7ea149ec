"""Every error of Strongroom, as one tree; a class says what went wrong and who can mend it.

    StrongroomError
    ├─ RequestError                 400  the caller's request; the caller mends it
    │  ├─ AuthenticationError       401  no valid credential
    │  ├─ PermissionDeniedError     403  no policy permits it
    │  ├─ ContentBlockedError       403  the guard blocked the text
    │  ├─ NotFoundError             404  no such route or object, or not yours
    │  │  └─ ModelNotFoundError     404  no such model, or not yours
    │  ├─ MethodNotAllowedError     405
    │  ├─ RequestTimeoutError       408  the body did not arrive in time
    │  ├─ ConflictError             409  the object is in another state
    │  ├─ SupersededError           410  a newer request of the caller made this one useless
    │  ├─ PayloadTooLargeError      413  the body passes a limit
    │  ├─ UnsupportedMediaTypeError 415  the body is not JSON
    │  ├─ ContextLengthError        400  the prompt does not fit the model
    │  └─ RateLimitedError          429  a limit or a budget is spent; waiting mends it
    ├─ UnavailableError             503  the server cannot answer now; waiting mends it
    │  ├─ EngineUnavailableError    503  the engine is down or starting
    │  └─ AuditUnavailableError     503  the audit log cannot be written, so nothing is answered
    ├─ EngineError                  502  the engine failed on this request
    └─ StartError                        the process must not start; the operator mends it
       ├─ ConfigError                    a setting, policy, template or key is missing or wrong
       ├─ SealError                      a sealed model was refused
       ├─ KMSError                       a key service did not release a key
       │  ├─ KMSDeniedError              the key service said no (policy, wrong context, wrong key)
       │  ├─ KMSDisabledError            the key is disabled, revoked or destroyed
       │  └─ KMSUnreachableError         no answer in time; retried already
       └─ AuditLogError                  the log on disk is damaged or held by another writer

A message is written for the person who reads it: what happened, what was expected, what to do. It never holds text of a
prompt, a completion, a credential or a key.
"""

from __future__ import annotations


class StrongroomError(Exception):
    """Base of all errors that are part of the product's contract."""

    code: str = "internal_error"
    status: int = 500


class RequestError(StrongroomError):
    """The request is wrong; the caller can mend it.

    Args:
        message: What was wrong, what was expected, what to do.
        param: Path of the field at fault (`messages[2].role`), or None.
        code: A more precise stable code than the class's own.
    """

    code = "invalid_request"
    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class AuthenticationError(RequestError):
    """No credential, or one that is unknown, expired or revoked. One public text for every cause.

    Args:
        reason: The precise cause, for the audit log only.
        key_id: The public id of the key that was offered, where one could be parsed.
    """

    code = "invalid_api_key"
    status = 401

    def __init__(self, reason: str, *, key_id: str | None = None) -> None:
        super().__init__(
            "The API key is missing or not valid. Send a valid key as 'Authorization: Bearer <key>'; "
            "ask your administrator for one."
        )
        self.reason = reason
        self.key_id = key_id


class PermissionDeniedError(RequestError):
    """No policy permits this; whoever owns the policy can change it."""

    code = "permission_denied"
    status = 403


class ContentBlockedError(RequestError):
    """The guard found something that policy says must not pass.

    Args:
        message: What was found, by rule; never the text itself.
        findings: One JSON-ready dict a finding.
    """

    code = "content_blocked"
    status = 403

    def __init__(self, message: str, *, findings: tuple[dict[str, object], ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings


class NotFoundError(RequestError):
    """No such route or object, or it belongs to somebody else: the caller can't tell which."""

    code = "not_found"
    status = 404


class ModelNotFoundError(NotFoundError):
    """No such model, or the caller may not see it."""

    code = "model_not_found"


class MethodNotAllowedError(RequestError):
    """The route exists, the method does not."""

    code = "method_not_allowed"
    status = 405


class RequestTimeoutError(RequestError):
    """The request's body did not arrive in time."""

    code = "request_timeout"
    status = 408


class ConflictError(RequestError):
    """The object is not in the state that this action needs."""

    code = "conflict"
    status = 409


class SupersededError(RequestError):
    """A newer completion of the same caller, at the same place of the same text, made this one useless.

    410, because no client tries it again, as they do after 409 and 429: a stale request would come back and make the
    newer one stale.
    """

    code = "superseded"
    status = 410

    def __init__(self) -> None:
        super().__init__(
            "A newer completion request of yours for the same place in the text came in, so this one was ended."
        )


class PayloadTooLargeError(RequestError):
    """The body passes the configured limit."""

    code = "payload_too_large"
    status = 413


class UnsupportedMediaTypeError(RequestError):
    """The body is not JSON."""

    code = "unsupported_media_type"
    status = 415


class ContextLengthError(RequestError):
    """The prompt alone does not fit the model's context.

    Args:
        limit_tokens: The model's context length.
        prompt_tokens: What the prompt came to, template included.
    """

    code = "context_length_exceeded"

    def __init__(self, *, limit_tokens: int, prompt_tokens: int) -> None:
        # Clients match these words (LiteLLM, LangChain, Cline, Continue); see docs/clients.md.
        super().__init__(
            f"This model's maximum context length is {limit_tokens} tokens. However, your request came to "
            f"{prompt_tokens} tokens, security template included: the prompt is too long. Please shorten it.",
            param="messages",
        )


class RateLimitedError(RequestError):
    """A limit or a budget is spent.

    Args:
        message: Which limit, and when it is free again.
        retry_after_s: Whole seconds to wait, at least 1.
        headers: Further `x-ratelimit-*` headers to send.
    """

    code = "rate_limit_exceeded"
    status = 429

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: int,
        headers: dict[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = max(1, retry_after_s)
        self.headers = headers or {}


class ThrottledError(RateLimitedError):
    """Too many callers of one address had no valid credential; the audit log has them in sums."""

    code = "authentication_throttled"


class UnavailableError(StrongroomError):
    """The server cannot answer now; waiting mends it."""

    code = "service_unavailable"
    status = 503

    def __init__(self, message: str, *, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = max(1, retry_after_s)


class EngineUnavailableError(UnavailableError):
    """The engine of this model is down, starting or draining."""

    code = "engine_unavailable"


class AuditUnavailableError(UnavailableError):
    """The audit log cannot be written; nothing is answered until it can.

    Attributes:
        is_refusal: Whether the writer would refuse this entry always, as one that ends what is not open.
    """

    code = "audit_unavailable"
    is_refusal = False


class EngineError(StrongroomError):
    """The engine failed on this request; the request may be tried again."""

    code = "engine_error"
    status = 502


class StartError(StrongroomError):
    """The process must not start, or not go on; the operator can mend it."""

    code = "start_refused"


class ConfigError(StartError):
    """A setting, policy, template or key is missing or wrong."""

    code = "config_invalid"


class SealError(StartError):
    """A sealed model was refused. One public text; `detail` is for the log.

    Args:
        detail: Which check failed, with file and chunk.
        kind: The kind of failure, as in `tests/vectors/`: header, signature, payload, key, version.
    """

    code = "model_refused"

    def __init__(self, detail: str, *, kind: str) -> None:
        super().__init__("The sealed model was refused.")
        self.detail = detail
        self.kind = kind


class KMSError(StartError):
    """A key service did not release a key."""

    code = "kms_error"


class KMSDeniedError(KMSError):
    """The key service refused: policy, wrong context or wrong key."""

    code = "kms_denied"


class KMSDisabledError(KMSError):
    """The key is disabled, revoked or destroyed."""

    code = "kms_disabled"


class KMSUnreachableError(KMSError):
    """The key service gave no answer in time, retries included."""

    code = "kms_unreachable"


class AuditLogError(StartError):
    """The log on disk is damaged, or another writer holds it."""

    code = "audit_log_refused"
