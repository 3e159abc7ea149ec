# ruff: noqa: E501  # lists of names
"""A name or a value that only resembles an innocent one is no reason to keep silent about a credential."""

from __future__ import annotations

import pytest

from server.guard import scan

VALUE = "q8Zr4Tn7" + "Wx2Lk9Pd5Vb3Hs6"


@pytest.mark.parametrize(
    "name",
    [
        "CURSOR_API_KEY", "SYNC_PASSWORD", "SYNC_API_KEY", "sync_gateway_password", "DELTA_SHARING_TOKEN", "resume_parser_api_key",
        "designer_secret", "stopwatch_api_key", "paginationSecret", "pagination_hmac_key", "cursor_secret",
        "VERCEL_AUTOMATION_BYPASS_SECRET", "passport_secret", "PASSPORT_SESSION_SECRET", "bypass_token", "ENCOMPASS_API_KEY",
        "S3_KEY", "REDIS_KEY", "unlock_key", "INNGEST_EVENT_KEY", "cosmos_document_key", "registry_key", "config_key", "project_key",
        "upload_key", "state_key", "map_key", "MINIO_SECRET_KEY", "NOTION_TOKEN", "HASURA_ADMIN_SECRET", "NEXTAUTH_SECRET", "csrf_secret",
    ],
)  # fmt: skip
def test_a_word_within_a_name_hides_no_credential(name: str) -> None:
    assert scan.find_anywhere(f'{name} = "{VALUE}"')


@pytest.mark.parametrize(
    "name",
    ["nextPageToken", "sync_token", "nextSyncToken", "cursor_key", "pad_token", "csrf_token", "page_token", "stop_token",
     "compass_heading", "passenger_id", "cache_key", "sortKey", "figma_file_key", "isPassword", "has_token", "pass_rate"],
)  # fmt: skip
def test_a_name_of_no_credential_is_not(name: str) -> None:
    assert not scan.find_anywhere(f'{name} = "{VALUE}"')


@pytest.mark.parametrize(
    "value",
    ["Winter2024Password", "Sup3rS3cr3tPassword", "Xk29dLq81Secret", "_Hunter2Token", "Password123!", "secret2024!", "test1234",
     "bad-9Xk2mQ8z", "wrong_Q8zr4Tn7!", "SHA256:" + VALUE],
)  # fmt: skip
def test_a_value_with_digits_is_no_word(value: str) -> None:
    assert scan.find_anywhere(f'db_password = "{value}"')


@pytest.mark.parametrize(
    "line",
    [
        "password: passwordQ8zr" + "4Tn7",
        "secret_key: secret_keyQ8zr" + "4Tn7Wx2",
        "tool --secret prod/ab12" + "cd34ef56",
        "Authorization: Bearer qhzrtnwx" + "lkpdvbhsqjmcf",
        'RECAPTCHA_SECRET_KEY = "6LOvopIGbO3rE2fc' + 'yZ0zLZuLKBfyIlumiWVE0I2o"',
    ],
)
def test_a_value_that_begins_like_a_word_is_found(line: str) -> None:
    assert scan.find_anywhere(line)


@pytest.mark.parametrize(
    "line",
    [
        'password = "password123"',
        'token = "wrong-password"',
        "authToken: authTokenOfHeader2",
        "private_key: Ed25519PrivateKey | Ed448PrivateKey",
        '"""Basic infrastructure for services."""',
        "tool --secret=db-password-prod2",
    ],
)
def test_a_word_is_no_value(line: str) -> None:
    assert not scan.find_anywhere(line)
