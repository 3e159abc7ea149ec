"""What rendering costs: microseconds a request for short and long chats, warm and cold, beside the stock renderer.

Run: python benchmarks/template/render.py MODEL_DIR   (a folder with the model's tokenizer files)
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.template.prompt import PromptBuilder
from server.template.registry import TemplateRegistry
from server.types import Chat, ModelRequest, Obligations, Principal, SubjectId, TenantId, WireFormat

if TYPE_CHECKING:
    from collections.abc import Callable

PRINCIPAL = Principal(SubjectId("bench"), TenantId("bench"), frozenset(), frozenset(), "api_key", "k")
CODE = "def parse(text: str) -> list[int]:\n    return [int(x) for x in text.split(',') if x.strip()]\n\n"


def turns(number: int, rounds: int, size: int) -> list[dict[str, Any]]:
    """A conversation of `rounds` questions and answers with `size` repeats of some code; `number` makes it new."""
    history = []
    for n in range(rounds):
        history.append({"role": "user", "content": f"Question {n}:\n{CODE * size}"})
        history.append({"role": "assistant", "content": f"Answer {n}:\n{CODE * size}"})
    return [
        *history,
        {"role": "user", "content": f"Write function {number} that parses a date and returns None if wrong."},
    ]


def measure(call: Callable[[int], object], repeats: int) -> dict[str, float]:
    times = []
    for number in range(repeats):
        start = time.perf_counter()
        call(number)
        times.append((time.perf_counter() - start) * 1e6)
    cuts = statistics.quantiles(times, n=100)
    return {"p50_us": round(cuts[49], 1), "p90_us": round(cuts[89], 1), "p99_us": round(cuts[98], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--templates", type=Path, default=Path("configs/templates"))
    parser.add_argument("--stock", action="store_true", help="measure transformers' renderer as well")
    args = parser.parse_args()
    registry = TemplateRegistry.load(args.templates, args.templates / "templates.lock")
    builder = PromptBuilder.load(registry, args.model_dir)
    obligations = Obligations(templates=("secure-coding",))
    block = registry.compose(["secure-coding"]).text

    def ours(messages: list[dict[str, Any]]) -> list[int]:
        request = ModelRequest(WireFormat.CHAT, "m", Chat(tuple(messages)), {})
        return builder.render(request, obligations, PRINCIPAL).token_ids

    shapes = {"short chat": (0, 0, 2000), "10 turns, 5k tokens": (5, 15, 300), "40 turns, 40k tokens": (20, 30, 40)}
    system = {"role": "system", "content": block}
    stock = None
    if args.stock:
        from transformers import AutoTokenizer

        stock = AutoTokenizer.from_pretrained(str(args.model_dir))
    for name, (rounds, size, repeats) in shapes.items():
        num_tokens = len(ours(turns(-1, rounds, size)))
        row: dict[str, Any] = {"shape": name, "tokens": num_tokens, "machine": platform.machine()}
        row["ours"] = measure(lambda n, r=rounds, s=size: ours(turns(n, r, s)), repeats)
        row["building the messages"] = measure(lambda n, r=rounds, s=size: turns(n, r, s), repeats)
        if stock is not None:
            row["stock"] = measure(
                lambda n, r=rounds, s=size: stock.apply_chat_template(
                    [system, *turns(n, r, s)], add_generation_prompt=True
                ),
                max(10, repeats // 10),
            )
        print(json.dumps(row))


if __name__ == "__main__":
    main()
