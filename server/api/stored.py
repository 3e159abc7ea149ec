"""Stored responses: kept when an answer has ended, found again by `previous_response_id` and by their own routes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from server.api import fields
from server.api.responses import ResponseReply, parse_items
from server.errors import NotFoundError, RequestError
from server.types import Chat

if TYPE_CHECKING:
    from server.api.access import Access
    from server.api.wire import Reply
    from server.pipeline import Call
    from server.store.responses import ResponseStore
    from server.types import ModelRequest, Principal

READ = "model:response:read"
DELETE = "model:response:delete"
MAX_LISTED = 100


class StoredResponses:
    """Keeps the answers of `/v1/responses`; implements `exchange.Keeper`.

    What is kept is what the model was given (redacted where policy redacts) and what left, the instructions left out:
    they are for one request.

    Args:
        store: Where they are kept; each call names tenant and subject of the caller.
        access: Policy, and the audit log: a response is on record before it is kept, read or deleted.
    """

    def __init__(self, store: ResponseStore, access: Access) -> None:
        self._store = store
        self._access = access

    async def resume(self, request: ModelRequest, call: Call) -> ModelRequest:
        """Return the request with the conversation that it follows.

        Raises:
            NotFoundError: The caller has no such response.
            PermissionDeniedError: Policy does not let the caller read stored responses.
            RequestError: The conversation is too long, or was of another data class than the request says.
        """
        wanted, chat, principal = request.continuation, request.payload, call.principal
        if wanted is None or wanted.previous is None or principal is None or not isinstance(chat, Chat):
            return request
        self._access.check(principal, READ, call.client)
        try:
            record = await self._get(principal, wanted.previous)
        except NotFoundError as err:
            raise NotFoundError(str(err), param="previous_response_id", code="previous_response_not_found") from err
        first = wanted.num_instructions
        messages = (
            *chat.messages[:first],
            *record["messages"],
            *parse_items(record["response"]["output"]),
            *chat.messages[first:],
        )
        if len(messages) > fields.MAX_MESSAGES:
            raise RequestError(
                f"The stored conversation has more than {fields.MAX_MESSAGES} messages; begin a new one.",
                param="previous_response_id",
            )
        # What policy was told of the conversation's data stays true of it, header or not.
        data_class = record.get("classification") or request.classification
        if request.classification not in (None, data_class):
            raise RequestError(
                "The stored conversation has another data class. Send its own in 'x-data-classification', or none.",
                param="previous_response_id",
                code="data_class_mismatch",
            )
        return replace(request, payload=replace(chat, messages=messages), classification=data_class)

    def begin(self, reply: Reply, call: Call) -> None:
        """Tell the reply whether it will be kept: the caller asked for it, and policy permits it."""
        wanted = call.request.continuation if call.request is not None else None
        if isinstance(reply, ResponseReply):
            reply.stored = wanted is not None and wanted.store and call.may_store

    async def keep(self, reply: Reply, call: Call) -> None:
        """Keep the answer if it says that it is kept.

        Raises:
            PayloadTooLargeError: The conversation is too long to be kept.
            UnavailableError: The log or the store does not take it.
        """
        request, principal = call.request, call.principal
        if not isinstance(reply, ResponseReply) or not reply.stored or request is None or principal is None:
            return
        chat, wanted = request.payload, request.continuation
        if not isinstance(chat, Chat) or wanted is None:
            return
        response_id = reply.final["id"]
        record = {
            "messages": chat.messages[wanted.num_instructions :],
            "response": reply.final,
            "classification": request.classification,
        }
        await self._access.act("gateway:response:stored", principal, request=call.id, response=response_id)
        await asyncio.to_thread(self._store.put, principal.tenant, principal.subject, response_id, record)

    async def read(self, principal: Principal, response_id: str) -> dict[str, Any]:
        """Return one's own response as it was answered.

        Raises:
            NotFoundError: The caller has no such response.
        """
        record = await self._get(principal, response_id)
        await self._access.act("gateway:response:read", principal, response=response_id)
        response: dict[str, Any] = record["response"]
        return response

    async def list_items(self, principal: Principal, response_id: str, query: dict[str, str]) -> dict[str, Any]:
        """Return what one's own response answered, as items, newest first unless `order` is `asc`.

        Raises:
            NotFoundError: The caller has no such response.
            RequestError: A query parameter is wrong, by name.
        """
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 3 and 1 <= int(limit) <= MAX_LISTED):
            raise fields.wrong("limit", f"a whole number from 1 to {MAX_LISTED}")
        if order not in ("asc", "desc"):
            raise fields.wrong("order", "asc or desc")
        record = await self._get(principal, response_id)
        await self._access.act("gateway:response:read", principal, response=response_id)
        items = _items(record["messages"], response_id)
        if order == "desc":
            items.reverse()
        after = query.get("after")
        if after is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise fields.wrong("after", "the id of an item of this response")
            items = items[ids.index(after) + 1 :]
        page = items[: int(limit)]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > len(page),
        }

    async def delete(self, principal: Principal, response_id: str) -> dict[str, Any]:
        """Delete one's own response.

        Raises:
            NotFoundError: The caller has no such response.
        """
        await self._get(principal, response_id)
        await self._access.act("gateway:response:deleted", principal, response=response_id)
        await asyncio.to_thread(self._store.delete, principal.tenant, principal.subject, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def _get(self, principal: Principal, response_id: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._store.get, principal.tenant, principal.subject, response_id)


def _items(messages: list[dict[str, Any]], response_id: str) -> list[dict[str, Any]]:
    """Return a conversation as input items, in order, each with an id that stays the same."""
    suffix = response_id.removeprefix("resp_")
    items: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message.get("content")
        common = {"id": f"item_{suffix}_{len(items)}", "status": "completed"}
        if role == "tool":
            items.append(
                {**common, "type": "function_call_output", "call_id": message["tool_call_id"], "output": content}
            )
            continue
        if content:
            kind = "output_text" if role == "assistant" else "input_text"
            items.append({**common, "type": "message", "role": role, "content": [{"type": kind, "text": content}]})
        for call in message.get("tool_calls") or ():
            items.append(
                {
                    "id": f"item_{suffix}_{len(items)}",
                    "status": "completed",
                    "type": "function_call",
                    "call_id": call["id"],
                    "name": call["function"]["name"],
                    "arguments": call["function"]["arguments"],
                }
            )
    return items
