"""What an entry looks like to a SIEM: the entry itself, CEF, or OCSF. Pure."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from server.audit.tags import Event

if TYPE_CHECKING:
    from collections.abc import Callable

OCSF_VERSION = "1.4.0"
_WARNING, _NOTICE, _INFO = 4, 5, 6  # RFC 5424 severities
_LOUD = frozenset(
    {
        Event.LOG_RECOVERED,
        Event.LOG_INTERRUPTED,
        Event.KEY_REFUSED,
        Event.MODEL_REFUSED,
        Event.MODEL_FLOOR_LOWERED,
        Event.ENGINE_DIED,
        Event.GATEWAY_DIED,
        Event.INCIDENT_OPENED,
        Event.SCANNER_FAILED,
        Event.LOG_PRUNED,
        Event.TEXT_KEY_DESTROYED,
        Event.WITNESS_REFUSED,
    }
)
_LIFECYCLE = {"started": 3, "stopped": 4, "died": 4}


def severity(entry: dict[str, Any]) -> int:
    """Return the entry's RFC 5424 severity: 4 warning, 5 notice, 6 informational."""
    event, outcome = entry["event"], entry.get("outcome", "completed")
    if event in _LOUD or outcome in ("failed", "unknown") or _findings(entry):
        return _WARNING
    if event in (Event.CREDENTIAL_REFUSED, Event.REQUEST_REFUSED) or outcome in ("denied", "aborted"):
        return _NOTICE
    return _NOTICE if event.startswith(("admin:", "weights:")) else _INFO


def _findings(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [*entry.get("scan_input", {}).get("findings", ()), *entry.get("scan_output", {}).get("findings", ())]


def _milliseconds(entry: dict[str, Any]) -> int:
    return int(datetime.fromisoformat(entry["time"]).timestamp() * 1000)


def to_json(index: int, entry: dict[str, Any], data: bytes) -> str:
    """Return the index and the entry, byte for byte as it was hashed."""
    del entry
    return f'{{"index":{index},"entry":{data.decode()}}}'


def _cef_header(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def _cef_value(value: object) -> str:
    # Entries hold no line breaks, so backslash and equals sign are all that can end a value early.
    return str(value).replace("\\", "\\\\").replace("=", "\\=")


def to_cef(index: int, entry: dict[str, Any], data: bytes) -> str:
    """Return the entry in ArcSight's Common Event Format."""
    del data
    principal, client = entry.get("principal", {}), entry.get("client", {})
    level = {_WARNING: 7, _NOTICE: 5, _INFO: 2}[severity(entry)]
    event = entry["event"]
    rules = ",".join(str(finding.get("rule")) for finding in _findings(entry))
    fields = {
        "rt": _milliseconds(entry),
        "externalId": index,
        "src": client.get("address"),
        "requestClientApplication": client.get("agent"),
        "request": entry.get("route"),
        "suser": principal.get("subject"),
        "duser": principal.get("tenant"),
        "outcome": entry.get("outcome"),
        "reason": entry.get("code") or entry.get("reason"),
        "cs1Label": "model",
        "cs1": entry.get("model"),
        "cs2Label": "requestId",
        "cs2": entry.get("request_id"),
        "cs3Label": "findings",
        "cs3": rules or None,
        "cn1Label": "completionTokens",
        "cn1": entry.get("usage", {}).get("completion"),
    }
    extension = " ".join(
        f"{key}={_cef_value(value)}"
        for key, value in fields.items()
        if value is not None and (not key.endswith("Label") or fields[key.removesuffix("Label")] is not None)
    )
    name = event.replace(":", " ")
    return f"CEF:0|Strongroom|Strongroom|1|{_cef_header(event)}|{_cef_header(name)}|{level}|{extension}"


def to_ocsf(index: int, entry: dict[str, Any], data: bytes) -> str:
    """Return the entry as an OCSF event: API Activity, Authentication or Application Lifecycle."""
    del data
    event = entry["event"]
    principal, client = entry.get("principal", {}), entry.get("client", {})
    action = event.rpartition(":")[2]
    if event == Event.CREDENTIAL_REFUSED:
        category, class_uid, activity = 3, 3002, 1  # Identity & Access Management, Authentication, Logon
    elif action in _LIFECYCLE:
        category, class_uid, activity = 6, 6002, _LIFECYCLE[action]  # Application Activity, Application Lifecycle
    else:
        category, class_uid, activity = 6, 6003, 1 if event.startswith("gateway:request") else 99  # API Activity
    failed = entry.get("outcome", "completed") in ("denied", "failed", "unknown", "aborted") or action == "refused"
    shaped: dict[str, Any] = {
        "activity_id": activity,
        "category_uid": category,
        "class_uid": class_uid,
        "type_uid": class_uid * 100 + activity,
        "time": _milliseconds(entry),
        "severity_id": {_WARNING: 4, _NOTICE: 2, _INFO: 1}[severity(entry)],
        "status_id": 2 if failed else 1,
        "status_code": entry.get("code"),
        "metadata": {
            "version": OCSF_VERSION,
            "product": {"name": "Strongroom", "vendor_name": "Strongroom"},
            "uid": str(index),
            "event_code": event,
            "correlation_uid": entry.get("request_id"),
        },
        "api": {"operation": entry.get("route") or event, "request": {"uid": entry.get("request_id") or str(index)}},
        "actor": {"user": {"name": principal.get("subject"), "org": {"name": principal.get("tenant")}}},
        "user": {"name": principal.get("subject") or entry.get("key_id")},
        "app": {"name": "Strongroom", "vendor_name": "Strongroom"},
        "src_endpoint": {"ip": client.get("address")},
        "http_request": {"user_agent": client.get("agent")},
        "unmapped": entry,
    }
    if activity == 99:
        shaped["activity_name"] = event
    return json.dumps(_without_none(shaped), ensure_ascii=False, separators=(",", ":"))


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(item) if isinstance(item, dict) and key != "unmapped" else item
        for key, item in value.items()
        if item is not None
    }


SHAPES: dict[str, Callable[[int, dict[str, Any], bytes], str]] = {"json": to_json, "cef": to_cef, "ocsf": to_ocsf}
