"""What S3 servers and botocore say, in the words of base.py; and what is worth another try."""

from __future__ import annotations

import datetime
import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import urllib3.exceptions
from botocore import exceptions as boto

from snapd.errors import (
    AuthError,
    CapacityError,
    ConfigError,
    IntegrityError,
    NotFoundError,
    SnapdError,
    UnavailableError,
)

# Whatever a request, or reading its answer, may raise.
RAISED = (
    boto.BotoCoreError,
    boto.ClientError,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
)

_TAKEN = {"PreconditionFailed", "412"}
_CONFLICT = {
    "ConditionalRequestConflict",
    "OperationAborted",
}  # another request for the same key is under way
_NO_OBJECT = {"NoSuchKey", "NoSuchUpload", "NoSuchVersion", "404", "NotFound"}
_BUCKET_GONE = {"NoSuchBucket", "NoSuchBucketPolicy"}
_CREDENTIALS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "ExpiredTokenException", "InvalidToken",
    "TokenRefreshRequired", "InvalidClientTokenId", "UnrecognizedClientException", "InvalidSecurity",
    "MissingSecurityHeader", "NotSignedUp", "AuthFailure",
}  # fmt: skip
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden", "401", "Unauthorized"}
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"}
_FULL = {
    "QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "XRGWQuotaExceeded", "StorageFull", "507",
    "XMinioAdminBucketQuotaExceeded", "ServiceQuotaExceededException",
}  # fmt: skip
_THROTTLED = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "RequestThrottled",
    "BandwidthLimitExceeded", "ProvisionedThroughputExceededException", "EC2ThrottledException", "429",
}  # fmt: skip
_SLOW = {"RequestTimeout", "RequestTimeoutException"}
_DAMAGED = {
    "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody",
    "InvalidChecksum",
}  # fmt: skip
_SHORT = {"InvalidRange", "416"}
# What OpenSSL says when another try cannot help: trust, names, versions, a server that does not speak TLS.
_NO_TLS = (
    "CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE",
    "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "HANDSHAKE_FAILURE", "ALERT_PROTOCOL_VERSION", "ALERT_UNKNOWN_CA",
)  # fmt: skip


class Refused(Exception):
    """The store says that the key is taken."""


@dataclass(frozen=True, slots=True)
class Failure:
    """`error` is raised when no more tries are left, at once unless `is_passing`."""

    error: SnapdError | Refused
    is_passing: bool


def code_of(error: BaseException) -> str:
    """The code in an answer; empty if there was none."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def status_of(error: BaseException) -> int:
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def date_of(answer: Mapping[str, Any]) -> float | None:
    """The Date header of an answer, in seconds."""
    text = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except (ValueError, TypeError):
        return None


def answer_of(error: BaseException) -> Mapping[str, Any]:
    return _answer(error)


def failure_of(error: BaseException, doing: str, wall_s: float) -> Failure:
    """What `error` means. `doing`: what was asked of which store, for the text."""
    if isinstance(error, boto.ClientError):
        return _of_answer(error, doing, wall_s)
    text = f"{doing}: {_words(error)}"
    if isinstance(
        error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError
    ):
        return Failure(no_credentials(text), False)
    if isinstance(error, boto.TokenRetrievalError | boto.SSOError | boto.ProfileNotFound | boto.LoginError):
        return Failure(no_credentials(text), False)
    if isinstance(error, boto.SSLError):
        if any(word in str(error).upper().replace(" ", "_") for word in _NO_TLS):
            hint = "tier.ca names the authority of the server's certificate; tier.endpoint says http or https"
            return Failure(UnavailableError(text, kind="store_tls", hint=hint), False)
        return Failure(UnavailableError(text, kind="store_unreachable"), True)
    if isinstance(error, boto.ReadTimeoutError | TimeoutError | urllib3.exceptions.TimeoutError):
        return Failure(UnavailableError(text, kind="store_slow"), True)
    if isinstance(error, boto.FlexibleChecksumError):
        return Failure(IntegrityError(text, kind="store_bytes"), True)
    if isinstance(error, boto.ParamValidationError | boto.DataNotFoundError | boto.InvalidRegionError):
        return Failure(ConfigError(text, kind="store"), False)
    if isinstance(error, boto.UnsupportedS3ConfigurationError | boto.MissingDependencyException):
        return Failure(ConfigError(text, kind="store"), False)
    if "ResponseParserError" in type(error).__name__:
        return Failure(UnavailableError(text, kind="store_failing"), True)
    return Failure(UnavailableError(text, kind="store_unreachable"), True)


def _of_answer(error: boto.ClientError, doing: str, wall_s: float) -> Failure:
    code, status = code_of(error), status_of(error)
    said = str(_answer(error).get("Error", {}).get("Message", ""))[:200]
    text = f"{doing}: {code or status}" + (f" ({said})" if said and said != code else "")
    if code in _TAKEN or status == 412:
        return Failure(Refused(), False)
    if code in _CONFLICT:
        return Failure(UnavailableError(text, kind="store_failing"), True)
    if code in _BUCKET_GONE:
        return Failure(NotFoundError(text, kind="bucket", hint="make it, or correct tier.shared"), False)
    if code in _CLOCK:
        return Failure(_clock_is_off(doing, code, date_of(_answer(error)), wall_s), False)
    if code in _CREDENTIALS:
        return Failure(no_credentials(text), False)
    if code in _THROTTLED or status == 429:
        return Failure(UnavailableError(text, kind="store_throttled"), True)
    if code in _FULL or status == 507:
        return Failure(
            CapacityError(text, kind="store_full", hint="raise the quota, or keep fewer snapshots"), False
        )
    if code in _SLOW:
        return Failure(UnavailableError(text, kind="store_slow"), True)
    if code in _DAMAGED:
        return Failure(IntegrityError(text, kind="store_bytes"), True)
    if code in _SHORT:
        return Failure(IntegrityError(text, kind="store_bytes"), False)
    if code in _DENIED or code.startswith("KMS.") or status in (401, 403):
        hint = "the credentials need the rights that docs/tiers.md lists"
        return Failure(AuthError(text, kind="store_denied", hint=hint), False)
    if code in _NO_OBJECT or status == 404:
        return Failure(NotFoundError(text, kind="object"), False)
    if status == 501 or not status >= 500:
        return Failure(ConfigError(text, kind="store"), False)
    return Failure(UnavailableError(text, kind="store_failing"), True)


def no_credentials(text: str) -> AuthError:
    return AuthError(
        text,
        kind="store_credentials",
        hint="credentials come from the usual chain of AWS, as the daemon sees it: environment, ~/.aws, instance",
    )


def _clock_is_off(doing: str, code: str, store_s: float | None, wall_s: float) -> ConfigError:
    how = ""
    if store_s is not None:
        off = datetime.timedelta(seconds=abs(round(wall_s - store_s)))
        how = f" this machine's clock is {off} {'ahead of' if wall_s > store_s else 'behind'} the store's"
    return ConfigError(f"{doing}: {code}:{how}", kind="store_clock", hint="set this machine's clock (NTP)")


def _answer(error: BaseException) -> Mapping[str, Any]:
    return error.response if isinstance(error, boto.ClientError) else {}


def _words(error: BaseException) -> str:
    text = str(error).replace("\n", " ")[:300]
    return text or type(error).__name__
