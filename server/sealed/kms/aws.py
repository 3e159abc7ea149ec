"""AWS KMS: Encrypt and Decrypt with the encryption context (URI `aws:KEY-ARN`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import boto3.session
import botocore.config
import botocore.exceptions

from server.errors import ConfigError, KMSDeniedError, KMSDisabledError, KMSError, KMSUnreachableError
from server.sealed.format import Recipient
from server.sealed.kms.base import DataKey, call_with_retries, wrong_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.sealed.kms.base import KeyContext

MECHANISM: Final = "aws"
_TIMEOUT_S: Final = 5
_DISABLED: Final = frozenset(
    {"DisabledException", "KMSInvalidStateException", "NotFoundException", "KeyUnavailableException"}
)
_UNREACHABLE: Final = frozenset({"DependencyTimeoutException", "KMSInternalException", "ThrottlingException"})
_WRONG: Final = frozenset({"InvalidCiphertextException", "IncorrectKeyException"})


class AWSKMS:
    """One symmetric KMS key.

    Args:
        arn: Of the key; an alias would let whoever may move aliases choose another key.
        client: A boto3 KMS client, without retries of its own.
        sleep: Waits between attempts.
    """

    mechanism = MECHANISM

    def __init__(self, arn: str, client: Any, *, sleep: Callable[[float], None] | None = None) -> None:
        self.key_id = arn
        self._client = client
        self._retry: dict[str, Any] = {} if sleep is None else {"sleep": sleep}

    def wrap(self, data_key: DataKey, context: KeyContext) -> Recipient:
        """Encrypt the data key under the KMS key."""
        answer = self._call(
            lambda: self._client.encrypt(
                KeyId=self.key_id, Plaintext=bytes(data_key.reveal()), EncryptionContext=context.as_dict()
            )
        )
        return Recipient(MECHANISM, self.key_id, answer["CiphertextBlob"])

    def unwrap(self, recipient: Recipient, context: KeyContext) -> DataKey:
        """Decrypt what `wrap` made, with this key and no other."""
        answer = self._call(
            lambda: self._client.decrypt(
                KeyId=self.key_id, CiphertextBlob=recipient.wrapped, EncryptionContext=context.as_dict()
            )
        )
        if answer.get("KeyId") != self.key_id:
            raise wrong_key("another key answered")
        return DataKey(answer["Plaintext"])

    def _call(self, request: Callable[[], Any]) -> dict[str, Any]:
        return call_with_retries(lambda: self._attempt(request), **self._retry)

    def _attempt(self, request: Callable[[], Any]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = request()
        except botocore.exceptions.ClientError as err:
            raise self._refusal(str(err.response.get("Error", {}).get("Code", "")), err) from err
        except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as err:
            raise KMSDeniedError(
                "There are no AWS credentials. Give this process a role that may use the key."
            ) from err
        except botocore.exceptions.BotoCoreError as err:
            raise KMSUnreachableError(f"AWS KMS does not answer ({type(err).__name__}).") from err
        return answer

    def _refusal(self, code: str, err: botocore.exceptions.ClientError) -> KMSError:
        code = code.rpartition(".")[2]
        if code in _DISABLED:
            return KMSDisabledError(f"The key {self.key_id} is disabled, deleted or unavailable in AWS KMS ({code}).")
        if code in _WRONG:
            return wrong_key(f"wrong context, another key or a damaged wrapped key ({code})")
        status = err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _UNREACHABLE or status >= 500:
            return KMSUnreachableError(f"AWS KMS failed on its side ({code or status}).")
        return KMSDeniedError(f"AWS KMS refused the use of {self.key_id} ({code or status}).")


def from_environment(arn: str) -> AWSKMS:
    """Return the key that `aws:KEY-ARN` names; credentials come from where boto3 finds them (a role, best).

    Raises:
        ConfigError: Not the ARN of a key.
    """
    parts = arn.split(":")
    if len(parts) != 6 or parts[0] != "arn" or parts[2] != "kms" or not parts[5].startswith("key/"):
        raise ConfigError(f"The KMS URI 'aws:{arn}' must hold the ARN of a key (arn:aws:kms:REGION:ACCOUNT:key/ID).")
    return AWSKMS(arn, new_client(parts[3], endpoint=os.environ.get("STRONGROOM_AWS_KMS_ENDPOINT")))


def new_client(region: str, *, endpoint: str | None = None) -> Any:
    """Return a boto3 KMS client with short time-outs; retries are ours, so that all services behave alike."""
    config = botocore.config.Config(
        connect_timeout=_TIMEOUT_S, read_timeout=_TIMEOUT_S, retries={"total_max_attempts": 1}, proxies={}
    )
    return boto3.session.Session().client("kms", region_name=region, endpoint_url=endpoint, config=config)
