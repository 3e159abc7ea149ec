"""A repair asks the model again within what limits hold, and no further; real sockets."""

import shutil
from pathlib import Path

import httpx
import pytest
import yaml

from benchmarks.gateway.kit import MODEL, make_kit, wait_until
from server.audit.tags import Event

POLICY = Path(__file__).parents[2] / "configs" / "policy"
BAD = "```python\nimport os\nos.system('ping ' + input())\n```\n"
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A gateway that repairs what developers are told; the engine never writes anything better."""
    folder = tmp_path_factory.mktemp("repair")
    shutil.copytree(POLICY, folder / "policy")
    path = folder / "policy" / "10-developers.cedar"
    path.write_text(path.read_text().replace('@scan_output("annotate")', '@scan_output("repair")'))
    limits = folder / "limits.yaml"
    limits.write_text(yaml.safe_dump({"limits": [], "max_wait_s": 0}))
    with make_kit(folder / "gw", policy={"directory": str(folder / "policy")}, limits={"file": str(limits)}) as made:
        made.control(text=BAD, num_tokens=8)
        yield made


def ask(kit, tenant, **fields):
    """Return the answer, how often the engine was asked, and the record of the end."""
    key = kit.working_key(groups={"developers"}, tenant=tenant)
    before = kit.stats()["finished"]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": MAX_TOKENS, **fields}
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.post(kit.base + "/v1/chat/completions", json=body, headers=headers, timeout=60)
    entry = [e for e in kit.entries() if e.get("request_id") == answer.headers["x-request-id"]][-1]
    return answer, kit.stats()["finished"] - before, entry


def used(entry):
    return entry["usage"]["prompt"] + entry["usage"]["completion"]


@pytest.fixture(scope="module")
def costs(kit):
    """What the request alone may cost, and what it used with two repairs."""
    answer, num_asked, entry = ask(kit, "free")
    assert (answer.status_code, num_asked) == (403, 3), answer.text
    (accepted,) = [
        e for e in kit.entries() if e["event"] == Event.REQUEST_ACCEPTED and e["request_id"] == entry["request_id"]
    ]
    return accepted["prompt"]["tokens"] + MAX_TOKENS, used(entry)


@pytest.mark.parametrize(("tenant", "rounds"), [("narrow", 0), ("middle", 1), ("wide", 2)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_repair_that_no_budget_holds_is_not_asked_for(kit, costs, tenant, rounds, stream):
    alone, whole = costs
    # A repair's prompt is longer than the first one, by less than the whole: so much lets in `rounds` and no more.
    budget = {0: alone + alone // 2, 1: 2 * alone + alone // 2, 2: 2 * whole}[rounds]
    name = f"{tenant}-{stream}"
    rule = {"per": "tenant", "name": name, "tokens_per_day": budget}
    book = {"limits": [rule], "max_wait_s": 0}
    before = sum(e["event"] == Event.BUDGET_CHANGED for e in kit.entries())
    kit.settings.limits.file.write_text(yaml.safe_dump(book))
    wait_until(lambda: sum(e["event"] == Event.BUDGET_CHANGED for e in kit.entries()) > before)
    answer, num_asked, entry = ask(kit, name, stream=stream)
    assert answer.status_code == 403, answer.text
    assert answer.json()["error"]["code"] == "content_blocked"
    assert num_asked == 1 + rounds
    assert used(entry) <= budget
