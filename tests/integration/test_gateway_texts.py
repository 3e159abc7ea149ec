"""Where policy asks for texts, they are kept encrypted, without secrets, and only there."""

import shutil
from pathlib import Path

import httpx

from benchmarks.gateway.kit import MODEL
from server.audit.texts import TenantKeys, TextStore
from server.auth.pepper import load_secret

CANARY = "the canary prompt of this test"
SECRET = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"


def test_texts_are_kept_encrypted_where_policy_asks(make_gateway, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(Path("configs/policy"), policy)
    file = policy / "10-developers.cedar"
    text = file.read_text()
    file.write_text(text.replace('@id("developers-chat")', '@id("developers-chat")\n@audit_text("yes")', 1))
    kit = make_gateway(policy={"directory": str(policy)})
    kit.start()
    key = kit.new_key(groups={"developers"})
    kit.wait_for_key(key)
    response = httpx.post(
        kit.base + "/v1/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": f"{CANARY} {SECRET}"}]},
        headers={"authorization": f"Bearer {key}"},
        timeout=20,
    )
    assert response.status_code == 200, response.text
    keys = TenantKeys(kit.state / "texts" / "keys", load_secret(kit.settings.keys_dir / "audit-text", "text key"))
    store = TextStore(kit.state / "texts", keys, redact=str)
    kept = list(store.read("a", response.headers["x-request-id"]))
    assert any(CANARY in one.text for one in kept)
    assert not any(SECRET in one.text for one in kept)
    for path in kit.state.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert CANARY.encode() not in data, path
            assert SECRET.encode() not in data, path
    keys.destroy("a")
    assert not keys.exists("a")
