"""Do one thing with one Python library: `python python.py LIBRARY BASE KEY MODEL WHAT`; prints what it saw as JSON.

Runs in the library's own environment, so it imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
from typing import Any

TOOLS = ("tool", "forced")
PARAMETERS: Any = {
    "type": "object",
    "properties": {"q": {"type": "string", "enum": ["ping", "pong"]}},
    "required": ["q"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": PARAMETERS}}
FORCED: Any = {"type": "function", "function": {"name": "look_up"}}
PROMPT = {"long": "word " * 45_000}


def messages(what: str) -> list[Any]:
    """One user turn."""
    return [{"role": "user", "content": PROMPT.get(what, "Say pong.")}]


def use_openai(base: str, key: str, model: str, what: str) -> dict[str, Any]:
    """The openai SDK."""
    import openai

    client = openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=8 if what == "limit" else 0)
    ask: dict[str, Any] = {"model": model, "messages": messages(what)}
    if what == "stream":
        chunks = client.chat.completions.create(**ask, stream=True)
        return pieces([chunk.choices[0].delta.content or "" for chunk in chunks])
    if what in TOOLS:
        ask |= {"tool_choice": FORCED} if what == "forced" else {}
        with client.chat.completions.stream(**ask, tools=[TOOL]) as stream:
            (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
        return {"tool": call.function.name, "arguments": json.loads(call.function.arguments)}
    return {"text": client.chat.completions.create(**ask).choices[0].message.content}


def use_anthropic(base: str, key: str, model: str, what: str) -> dict[str, Any]:
    """The anthropic SDK."""
    import anthropic

    client = anthropic.Anthropic(base_url=base, api_key=key, max_retries=8 if what == "limit" else 0)
    ask: dict[str, Any] = {"model": model, "max_tokens": 64, "messages": messages(what)}
    if what == "stream":
        with client.messages.stream(**ask) as stream:
            return pieces(list(stream.text_stream))
    if what in TOOLS:
        tools: Any = [{"name": "look_up", "input_schema": PARAMETERS}]
        ask |= {"tool_choice": {"type": "tool", "name": "look_up"}} if what == "forced" else {}
        with client.messages.stream(**ask, tools=tools) as stream:
            block = stream.get_final_message().content[-1]
        return {"tool": getattr(block, "name", ""), "arguments": getattr(block, "input", None)}
    return {"text": getattr(client.messages.create(**ask).content[0], "text", "")}


def use_langchain(base: str, key: str, model: str, what: str) -> dict[str, Any]:
    """LangChain's ChatOpenAI."""
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(model=model, base_url=f"{base}/v1", api_key=key, max_retries=8 if what == "limit" else 0)
    prompt = messages(what)[0]["content"]
    if what == "stream":
        return pieces([str(chunk.content) for chunk in llm.stream(prompt)])
    if what in TOOLS:
        choice = "any" if what == "forced" else "auto"
        (call,) = llm.bind_tools([TOOL], tool_choice=choice).invoke(prompt).tool_calls
        return {"tool": call["name"], "arguments": call["args"]}
    return {"text": llm.invoke(prompt).content}


def use_litellm(base: str, key: str, model: str, what: str) -> dict[str, Any]:
    """LiteLLM's own function, OpenAI route."""
    return litellm_route(f"openai/{model}", f"{base}/v1", key, what)


def use_litellm_anthropic(base: str, key: str, model: str, what: str) -> dict[str, Any]:
    """LiteLLM's own function, Anthropic route."""
    return litellm_route(f"anthropic/{model}", base, key, what)


def litellm_route(model: str, api_base: str, key: str, what: str) -> dict[str, Any]:
    """One call through LiteLLM."""
    import litellm

    ask: dict[str, Any] = {"model": model, "api_base": api_base, "api_key": key, "messages": messages(what)}
    ask["max_retries"] = 8 if what == "limit" else 0
    if what == "stream":
        return pieces([chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)])
    if what in TOOLS:
        ask |= {"tool_choice": FORCED} if what == "forced" else {}
        (call,) = litellm.completion(**ask, tools=[TOOL]).choices[0].message.tool_calls
        return {"tool": call.function.name, "arguments": json.loads(call.function.arguments)}
    return {"text": litellm.completion(**ask).choices[0].message.content}


def pieces(parts: list[str]) -> dict[str, Any]:
    """A streamed answer."""
    return {"text": "".join(parts), "pieces": len([part for part in parts if part])}


def main(library: str, base: str, key: str, model: str, what: str) -> dict[str, Any]:
    """Do it, and tell how it went."""
    use = {
        "openai": use_openai,
        "anthropic": use_anthropic,
        "langchain": use_langchain,
        "litellm": use_litellm,
        "litellm-anthropic": use_litellm_anthropic,
    }[library]
    try:
        return use(base, key, model, what)
    except Exception as error:  # noqa: BLE001 - which class it is, is the finding
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"error": kinds, "status": getattr(error, "status_code", None), "message": str(error)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
