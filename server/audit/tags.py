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

    # An answer that its caller had kept, and what became of it.
    RESPONSE_STORED = "gateway:response:stored"
    RESPONSE_READ = "gateway:response:read"
    RESPONSE_DELETED = "gateway:response:deleted"

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
    WITNESS_REFUSED = "audit:witness:refused"
    WITNESS_LOST = "audit:witness:lost"
    WITNESS_RESUMED = "audit:witness:resumed"

    # Weights and their keys. The intent is durable before the key service is asked.
    KEY_REQUESTED = "weights:key:requested"
    KEY_RELEASED = "weights:key:released"
    KEY_REFUSED = "weights:key:refused"
    MODEL_SEALED = "weights:model:sealed"
    MODEL_LOADED = "weights:model:loaded"
    MODEL_REFUSED = "weights:model:refused"
    MODEL_UNSEALED = "weights:model:unsealed"
    MODEL_FLOOR_RAISED = "weights:floor:raised"
    MODEL_FLOOR_LOWERED = "weights:floor:lowered"

    # Processes.
    SERVER_STARTED = "supervisor:server:started"
    SERVER_STOPPED = "supervisor:server:stopped"
    ENGINE_STARTED = "supervisor:engine:started"
    ENGINE_STOPPED = "supervisor:engine:stopped"
    ENGINE_DIED = "supervisor:engine:died"
    ENGINE_UNHEALTHY = "supervisor:engine:unhealthy"
    ENGINE_GIVEN_UP = "supervisor:engine:given-up"
    GATEWAY_STARTED = "supervisor:gateway:started"
    GATEWAY_STOPPED = "supervisor:gateway:stopped"
    GATEWAY_DIED = "supervisor:gateway:died"
    GATEWAY_UNHEALTHY = "supervisor:gateway:unhealthy"
    GATEWAY_GIVEN_UP = "supervisor:gateway:given-up"
    GATEWAY_CONFIGURED = "gateway:service:configured"

    # Administration.
    API_KEY_CREATED = "admin:api-key:created"
    API_KEY_ROTATED = "admin:api-key:rotated"
    API_KEY_REVOKED = "admin:api-key:revoked"
    POLICY_CHANGED = "admin:policy:changed"
    TEMPLATE_CHANGED = "admin:template:changed"
    BUDGET_CHANGED = "admin:budget:changed"
    SETTINGS_CHANGED = "admin:settings:changed"
    RENDER_SHOWN = "admin:render:shown"
    ADMIN_REFUSED = "admin:request:refused"
    ACT_PERFORMED = "admin:act:performed"
    INCIDENT_OPENED = "admin:incident:opened"
    INCIDENT_CLOSED = "admin:incident:closed"

    # The guard.
    TEXT_SCANNED = "guard:text:scanned"
    ANSWER_SCANNED = "guard:answer:scanned"
    SCANNER_FAILED = "guard:scanner:failed"
