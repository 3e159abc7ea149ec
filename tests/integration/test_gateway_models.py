"""Several models behind one address: ids, aliases and adapters, each found by the `model` field and by nothing else."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest

from benchmarks.gateway.kit import EMBEDDER, MODEL, make_kit, wait_until
from server.errors import ConfigError, StartError
from server.host import Host
from server.registry.adapters import digest_adapter, stage_adapters, verify_adapters
from server.registry.source import open_model
from server.sealed.memory import is_tmpfs
from server.sealed.signature import public_path
from server.sealed.stage import staging_folder
from server.settings import parse_settings

FILES = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": b"\x00" * 64}


def write_adapter(folder, **changes):
    folder.mkdir(parents=True)
    for name, content in (FILES | changes).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    state = tmp_path_factory.mktemp("models")
    adapter = write_adapter(state / "house-style")
    models = [
        {
            "id": MODEL, "path": f"models/{MODEL}", "aliases": ["default"], "engine": {"max_model_len": 4096},
            "adapters": [
                {"id": "house-style", "path": str(adapter), "sha256": digest_adapter(adapter), "aliases": ["house"]},
                {"id": "trial", "path": str(adapter), "sha256": digest_adapter(adapter), "stage": "candidate"},
            ],
        },
        {"id": EMBEDDER, "path": f"models/{EMBEDDER}", "optional": True,
         "engine": {"runner": "pooling", "max_model_len": 256}},
    ]  # fmt: skip
    with make_kit(state / "gw", models=models) as kit:
        yield kit


@pytest.fixture(scope="module")
def keys(kit):
    return {name: kit.working_key(groups={name}, subject=name) for name in ("developers", "leads")}


def chat(kit, key, model):
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    return httpx.post(kit.base + "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})


@pytest.mark.parametrize(
    ("name", "served"),
    [(MODEL, MODEL), ("default", MODEL), ("house-style", "house-style"), ("house", "house-style")],
)
def test_the_engine_is_asked_for_the_model_that_was_named(kit, keys, name, served):
    response = chat(kit, keys["developers"], name)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == served
    assert kit.stats()["last_body"]["model"] == served
    request_id = response.headers["x-request-id"]
    accepted = next(e for e in kit.entries() if e.get("request_id") == request_id)
    assert accepted["model"] == served
    model = kit.settings.models[0]
    digest = open_model(model, kit.settings.seal, floor=0).digest
    both = hashlib.sha256(f"{digest}+{model.adapters[0].sha256}".encode()).hexdigest()
    assert accepted["model_digest"] == (both if served == "house-style" else digest)


@pytest.mark.parametrize("name", ["House", " house", "house/", "", "trial2", "../house"])
def test_no_other_name_is_a_model(kit, keys, name):
    assert chat(kit, keys["developers"], name).status_code in (400, 404)


def test_an_adapter_has_a_stage_of_its_own(kit, keys):
    assert chat(kit, keys["developers"], "trial").status_code == 403
    assert chat(kit, keys["leads"], "trial").status_code == 200
    assert chat(kit, keys["leads"], "house-style").status_code == 403

    def names(key):
        answer = httpx.get(kit.base + "/v1/models", headers={"authorization": f"Bearer {key}"}).json()
        return {model["id"] for model in answer["data"]}

    assert names(keys["developers"]) == {MODEL, "default", "house-style", "house", EMBEDDER}
    assert names(keys["leads"]) == {"trial"}


def test_the_engine_s_metrics_stand_once(kit):
    key = kit.new_key(groups={"operators"}, subject="op")
    headers = {"authorization": f"Bearer {key}"}
    wait_until(lambda: httpx.get(kit.admin + "/metrics", headers=headers).status_code == 200, pause_s=0.3)
    text = httpx.get(kit.admin + "/metrics", headers=headers).text
    assert text.count(f'vllm:num_requests_running{{model_name="{MODEL}"}}') == 1


def test_an_optional_model_that_is_down_keeps_nobody_waiting(kit, keys):
    headers = {"authorization": f"Bearer {keys['developers']}"}
    kit.kill(f"engine-{EMBEDDER}")
    body = {"model": EMBEDDER, "input": "x"}

    def down():
        return httpx.post(kit.base + "/v1/embeddings", json=body, headers=headers).status_code == 503

    wait_until(down)
    assert httpx.get(kit.base + "/readyz").status_code == 200
    assert chat(kit, keys["developers"], MODEL).status_code == 200
    kit.start_engine(EMBEDDER)
    wait_until(lambda: httpx.post(kit.base + "/v1/embeddings", json=body, headers=headers).status_code == 200)


def test_the_digest_is_what_two_shell_commands_say(tmp_path):
    folder = write_adapter(tmp_path / "a")
    command = "sha256sum adapter_config.json adapter_model.safetensors | sha256sum"
    said = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert digest_adapter(folder) == said.split()[0]


def test_other_bytes_other_files_and_missing_ones_are_refused_by_name(tmp_path, make_gateway):
    with pytest.raises(ConfigError, match=r"'adapter_model\.bin'"):
        digest_adapter(write_adapter(tmp_path / "pickle", **{"adapter_model.bin": b"x"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="can't be read"):
        digest_adapter(tmp_path / "empty")
    folder = write_adapter(tmp_path / "other")
    adapters = [{"id": "house-style", "path": str(folder), "sha256": hashlib.sha256(b"approved").hexdigest()}]
    engine = {"max_model_len": 4096}
    kit = make_gateway(models=[{"id": MODEL, "path": f"models/{MODEL}", "adapters": adapters, "engine": engine}])
    kit.start_writer()
    with pytest.raises(TimeoutError):
        wait_until_gateway_is_up(kit)
    assert kit.processes["gateway"].poll() == 78
    assert "is not the one that the settings approve" in (kit.state / "logs" / "gateway.log").read_text()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def exchange(folder, adapter):
    """Put other bytes in an adapter's place, by a new file and in the old one."""
    (folder / "adapter_config.json").write_bytes(b'{"r": 99}')
    (folder / "new").write_bytes(b"\x01" * 64)
    (folder / "new").rename(folder / "adapter_model.safetensors")
    assert digest_adapter(folder) != adapter["sha256"]


async def test_the_engine_reads_copies_that_no_exchange_on_the_disk_reaches(tmp_path, make_gateway):
    """As the supervisor starts an engine: what it is told to load is what was checked, as long as it runs."""
    folder = write_adapter(tmp_path / "house-style")
    adapter = {"id": "house-style", "path": str(folder), "sha256": digest_adapter(folder)}
    models = [{"id": MODEL, "path": f"models/{MODEL}", "adapters": [adapter], "engine": {"max_model_len": 4096}}]
    kit = make_gateway(models=models)
    keys = kit.state / "keys"
    seal = {"kms": (f"file:{keys / 'kms.key'}",), "trusted_signers": (public_path(keys / "signing.pem"),)}
    settings = kit.settings.model_copy(update={"seal": kit.settings.seal.model_copy(update=seal)})
    kit.start_writer()
    host = Host(settings, print)
    model = settings.models[0]
    spec = host._engine_spec(model, open_model(model, settings.seal, floor=0), ())
    name, _, path = spec.argv[spec.argv.index("--lora-modules") + 1].partition("=")
    staged = Path(path)
    assert name == "house-style"
    assert not any(str(folder) in argument for argument in spec.argv)
    assert spec.before_start is not None
    assert spec.after_exit is not None
    handed = await spec.before_start()
    assert handed is not None
    try:
        for descriptor in handed.fds:
            os.close(descriptor)
        assert is_tmpfs(staged)
        assert [one.stat().st_mode & 0o777 for one in (staged.parent, staged)] == [0o700, 0o700]
        assert contents(staged) == FILES
        exchange(folder, adapter)
        assert digest_adapter(staged) == adapter["sha256"]
    finally:
        await spec.after_exit()
    assert not staged.parent.exists()
    with pytest.raises(ConfigError, match="not the one that the settings approve"):
        await spec.before_start()  # the next start finds the exchange
    assert not staged.parent.exists()


def test_an_exchange_while_an_adapter_is_copied_is_found(tmp_path, monkeypatch):
    """Checked are the bytes of the copy, whatever stood in the folder a moment before."""
    folder = write_adapter(tmp_path / "house-style")
    adapter = {"id": "house-style", "path": str(folder), "sha256": digest_adapter(folder)}
    raw = {"state": str(tmp_path), "models": [{"id": MODEL, "path": "m", "adapters": [adapter]}]}
    model = parse_settings(raw, base=tmp_path).models[0]
    staged = staging_folder(tmp_path / "adapters")
    stage_adapters(model, staged)
    assert contents(staged / "house-style") == FILES
    verify_adapters(model)
    exchange(folder, adapter)
    with pytest.raises(ConfigError, match="not the one that the settings approve"):
        stage_adapters(model, staged)
    assert not staged.exists()
    with pytest.raises(StartError, match="not a tmpfs"):
        stage_adapters(model, Path("/") / "adapters")


def wait_until_gateway_is_up(kit):
    resolved = kit.state / "settings.json"
    resolved.write_text(kit.settings.model_dump_json())
    kit._spawn("gateway", "-m", "server.gateway", "--settings", str(resolved))
    kit.processes["gateway"].wait(60)
    wait_until(lambda: httpx.get(kit.base + "/livez").status_code == 200, limit_s=0.1)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([{"id": "a", "path": "m", "adapters": [{"id": "a", "path": "x", "sha256": "0" * 64}]}], "'a'"),
        ([{"id": "a", "path": "m", "aliases": ["b"]}, {"id": "b", "path": "m"}], "'b'"),
        ([{"id": "a", "path": "m", "adapters": [{"id": "b", "sha256": "0" * 64}]}], "needs a path"),
        ([{"id": "a", "path": "m", "adapters": [{"id": "b", "path": "x"}]}], "sha256"),
    ],
)
def test_names_that_clash_and_adapters_without_approval_are_refused(tmp_path, models, words):
    with pytest.raises(ConfigError, match=words):
        parse_settings(json.loads(json.dumps({"models": models})), base=tmp_path)
