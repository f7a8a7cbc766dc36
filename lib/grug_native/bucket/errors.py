"""What goes wrong with a store, told from TensorStore's words, which are all that it gives, and the way out."""

import re
from typing import Literal, final

from grug_native.checkpoint.digest import is_trouble

_SHOWN = 300
"""Characters of TensorStore's words in a message."""
_TOKEN = re.compile(r"ExpiredToken|InvalidToken|RequestTimeTooSkewed|TokenRefreshRequired")


class StoreError(RuntimeError):
    """A store could not do what it was asked. Nothing is said of what is in it."""


@final
class NoSuchBucketError(StoreError):
    """The bucket is not there."""


@final
class CredentialsError(StoreError):
    """The credentials are missing, wrong or expired, or may not do this."""


@final
class UnreachableError(StoreError):
    """The store does not answer, or is overloaded."""


@final
class NoConditionsError(StoreError):
    """The store ignores the conditions of writes, so that two processes could both own a run."""


def explained(url: str, what: Literal["read", "write", "list", "delete"], key: str, error: Exception) -> Exception:
    """Returns the error to raise for one of TensorStore's: ours if it is trouble or tells of a bucket, else itself."""
    words = words_of(error)
    doing = f"{what} {key}: {words}"
    if (what == "write" and words.startswith("NOT_FOUND: ")) or "NoSuchBucket" in words:
        return no_bucket(url, doing)
    if what == "list" and "Malformed List response" in words:
        return no_bucket(url, doing)
    if not is_trouble(error):
        return error
    if words.startswith(("PERMISSION_DENIED: ", "UNAUTHENTICATED: ")) or _TOKEN.search(str(error)):
        return CredentialsError(
            f"{url}: the credentials may not do this, or are missing, wrong or expired: {doing}. {_credentials(url)}"
        )
    return UnreachableError(
        f"{url}: the store does not answer, or not in time: {doing}. Look at the network and, if you have set"
        f" it, at {_endpoint(url)}"
    )


def words_of(error: Exception) -> str:
    """Returns what TensorStore says, without where in its source it says so."""
    words = re.split(r"\[(?:source locations|tensorstore_spec)=", str(error))[0]
    return " ".join(words.split())[:_SHOWN] or repr(error)


def no_bucket(url: str, detail: str) -> NoSuchBucketError:
    """Returns the error of a bucket that is not there."""
    bucket = url.split("/")[2]
    return NoSuchBucketError(f"{url}: there is no bucket {bucket!r} ({detail}): make it, or mend the URL")


def _credentials(url: str) -> str:
    if url.startswith("s3:"):
        return (
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), or AWS_PROFILE, to a key that may"
            " read, write, list and delete there"
        )
    return (
        "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS, for an account that may"
        " read, write, list and delete there"
    )


def _endpoint(url: str) -> str:
    return "AWS_ENDPOINT_URL" if url.startswith("s3:") else "TENSORSTORE_GCS_HTTP_URL or STORAGE_EMULATOR_HOST"
