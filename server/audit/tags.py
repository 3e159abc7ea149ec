"""Every event that can stand in the audit log; nothing else names one."""

from __future__ import annotations

from enum import StrEnum


class Event(StrEnum):
    """Read as `source:subject:action`; each value is documented by the comment of its group."""

    # One request: either accepted and finished, or refused, or turned away at the door.
    REQUEST_ACCEPTED = "gateway:request:accepted"
    REQUEST_FINISHED = "gateway:request:finished"
    REQUEST_REFUSED = "gateway:request:refused"
    CREDENTIAL_REFUSED = "gateway:credential:refused"

    # The log itself; only the writer appends these.
    LOG_STARTED = "audit:log:started"
    LOG_STOPPED = "audit:log:stopped"
    LOG_RECOVERED = "audit:log:recovered"
    LOG_INTERRUPTED = "audit:log:interrupted"
    LOG_HEARTBEAT = "audit:log:heartbeat"
    SEGMENT_OPENED = "audit:segment:opened"

    # What operators do to the log and its texts.
    LOG_PRUNED = "audit:log:pruned"
    TEXT_KEY_DESTROYED = "audit:text-key:destroyed"
    EXPORT_DELAYED = "audit:export:delayed"
    EXPORT_RESUMED = "audit:export:resumed"

    # Weights and their keys. The intent is durable before the key service is asked.
    KEY_REQUESTED = "weights:key:requested"
    KEY_RELEASED = "weights:key:released"
    KEY_REFUSED = "weights:key:refused"
    MODEL_SEALED = "weights:model:sealed"
    MODEL_LOADED = "weights:model:loaded"
    MODEL_REFUSED = "weights:model:refused"
    MODEL_UNSEALED = "weights:model:unsealed"
    MODEL_FLOOR_LOWERED = "weights:floor:lowered"

    # Processes.
    SERVER_STARTED = "supervisor:server:started"
    SERVER_STOPPED = "supervisor:server:stopped"
    ENGINE_STARTED = "supervisor:engine:started"
    ENGINE_STOPPED = "supervisor:engine:stopped"
    ENGINE_DIED = "supervisor:engine:died"
    GATEWAY_DIED = "supervisor:gateway:died"

    # Administration.
    API_KEY_CREATED = "admin:api-key:created"
    API_KEY_ROTATED = "admin:api-key:rotated"
    API_KEY_REVOKED = "admin:api-key:revoked"
    POLICY_CHANGED = "admin:policy:changed"
    TEMPLATE_CHANGED = "admin:template:changed"
    MODEL_CHANGED = "admin:model:changed"
    RULES_CHANGED = "admin:rules:changed"
    BUDGET_CHANGED = "admin:budget:changed"
    SETTINGS_CHANGED = "admin:settings:changed"
    RENDER_SHOWN = "admin:render:shown"
    ADMIN_REFUSED = "admin:request:refused"
    ACT_PERFORMED = "admin:act:performed"
    INCIDENT_OPENED = "admin:incident:opened"
    INCIDENT_CLOSED = "admin:incident:closed"

    # The guard.
    SCANNER_FAILED = "guard:scanner:failed"
    REVIEW_FINISHED = "guard:review:finished"
