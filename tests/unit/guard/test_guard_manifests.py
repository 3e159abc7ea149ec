"""Vulnerable versions and refused licences: what the operator's offline database says of generated manifests."""

from __future__ import annotations

import json
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ConfigError
from server.guard import advisories, manifests, packages, scan, versions

RECORDS = [
    {
        "id": "GHSA-test-0001",
        "summary": "Requests leak a header",
        "database_specific": {"severity": "MODERATE"},
        "affected": [
            {
                "package": {"ecosystem": "PyPI", "name": "Requests"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "2.3.0"}, {"fixed": "2.31.0"}]}],
            }
        ],
    },
    {
        "id": "GHSA-test-0002",
        "database_specific": {"severity": "CRITICAL"},
        "affected": [
            {
                "package": {"ecosystem": "npm", "name": "lodash"},
                "ranges": [{"type": "SEMVER", "events": [{"introduced": "0"}, {"fixed": "4.17.21"}]}],
            },
            {
                "package": {"ecosystem": "Maven", "name": "org.apache.logging.log4j:log4j-core"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "2.0-beta9"}, {"fixed": "2.15.0"}]}],
            },
        ],
    },
    {
        "id": "GO-test-0003",
        "affected": [
            {
                "package": {"ecosystem": "Go", "name": "golang.org/x/text"},
                "ranges": [{"type": "SEMVER", "events": [{"introduced": "0"}, {"last_affected": "0.3.7"}]}],
            }
        ],
    },
    {
        "id": "PYSEC-old",
        "withdrawn": "2024-01-01T00:00:00Z",
        "affected": [{"package": {"ecosystem": "PyPI", "name": "flask"}, "versions": ["3.0.0"]}],
    },
]
POM = """<project>
  <properties><log4j.version>2.14.1</log4j.version></properties>
  <dependencies>
    <dependency>
      <groupId>org.apache.logging.log4j</groupId>
      <artifactId>log4j-core</artifactId>
      <version>${log4j.version}</version>
    </dependency>
  </dependencies>
</project>
"""


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from server.guard import rules

    folder = tmp_path / "advisories"
    folder.mkdir()
    (folder / "one.json").write_text(json.dumps(RECORDS[0]))
    (folder / "two.jsonl").write_text("\n".join(json.dumps(r) for r in RECORDS[1:3]))
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("PYSEC-old.json", json.dumps(RECORDS[3]))
    (tmp_path / "licences.json").write_text(
        json.dumps(
            {
                "refused": ["AGPL-3.0*", "SSPL-1.0"],
                "packages": {"PyPI": {"Some_Lib": "AGPL-3.0-only", "dual": "MIT OR AGPL-3.0-only"}},
            }
        )
    )
    (tmp_path / "rules").symlink_to(rules.rules_folder())
    monkeypatch.setattr(advisories, "rules_folder", lambda: tmp_path / "rules")
    caches = (advisories.database, advisories.licences, packages.allowed)
    for cache in caches:
        cache.cache_clear()
    yield folder
    for cache in caches:
        cache.cache_clear()


def found(text: str, **kinds: str) -> list[tuple[str, str]]:
    return [(f.rule, text[f.start : f.end]) for f in scan.scan_text(text, **kinds).findings]


@pytest.mark.usefixtures("database")
def test_vulnerable_versions_are_found_in_every_manifest() -> None:
    text = "# web\nrequests[socks]==2.30.0  # pinned\nrequests==2.31.0\nflask==3.0.0\nurllib3>=1\n"
    assert found(text, path="requirements-dev.txt") == [("vulnerable-package", "requests[socks]==2.30.0  # pinned")]
    text = '{"dependencies": {"lodash": "^4.17.20", "express": "4.19.0"}, "devDependencies": {"lodash": "4.17.21"}}'
    assert found(text, path="package.json") == [("vulnerable-package", '"lodash": "^4.17.20"')]
    assert [rule for rule, _ in found(POM, path="pom.xml")] == ["vulnerable-package"]
    assert found(POM.replace("2.14.1", "2.15.0"), path="pom.xml") == []
    text = "module example.com/a\n\nrequire (\n\tgolang.org/x/text v0.3.7\n\tgolang.org/x/net v0.20.0 // indirect\n)\n"
    assert found(text, path="go.mod") == [("vulnerable-package", "golang.org/x/text v0.3.7")]
    assert found(text.replace("0.3.7", "0.3.8"), path="go.mod") == []
    text = "FROM python:3.12.3-slim\nRUN pip install --no-cache-dir requests==2.30.0\nUSER app\n"
    assert ("vulnerable-package", "requests==2.30.0") in found(text, path="Dockerfile")
    assert ("vulnerable-package", "lodash@4.17.20") in found("npm install lodash@4.17.20\n", language="bash")


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("label", ["requirements.txt", "text", ""])
def test_a_manifest_in_an_answer_is_found_by_its_label_or_its_look(label: str) -> None:
    text = f"Install this:\n```{label}\nrequests==2.30.0\nrich==13.7.0\n```\n"
    assert found(text) == [("vulnerable-package", "requests==2.30.0")]
    text = "```json\n" + '{"dependencies": {"lodash": "4.17.20"}}' + "\n```\n"
    assert [rule for rule, _ in found(text)] == ["vulnerable-package"]
    assert [rule for rule, _ in found(f"```xml\n{POM}```\n")] == ["vulnerable-package"]


@pytest.mark.usefixtures("database")
def test_refused_licences_are_found_and_a_choice_of_licences_is_one() -> None:
    assert found("some.lib==1.0\ndual==2.0\nother==1.0\n", path="requirements.txt") == [
        ("refused-licence", "some.lib==1.0")
    ]


def test_without_a_database_nothing_is_said() -> None:
    assert found("requests==2.30.0\n", path="requirements.txt") == []


def test_a_broken_database_names_its_file(database: Path) -> None:
    (database / "bad.json").write_text('{"summary": "no id"}')
    advisories.database.cache_clear()
    with pytest.raises(ConfigError, match=r"bad\.json"):
        advisories.database()


ORDERS = {
    "PyPI": ["1.0.dev1", "1.0a1", "1.0b2", "1.0rc1", "1.0", "1.0.post1", "1.0.1", "1.2", "1.10", "1!0.1"],
    "npm": [
        "1.0.0-alpha",
        "1.0.0-alpha.1",
        "1.0.0-alpha.beta",
        "1.0.0-beta.2",
        "1.0.0-beta.11",
        "1.0.0-rc.1",
        "1.0.0",
        "1.2.0",
        "1.10.0",
    ],
    "Maven": ["1.0-alpha1", "1.0-beta2", "1.0-rc1", "1.0-SNAPSHOT", "1.0", "1.0-sp1", "1.0.1", "1.2", "1.10"],
}


@pytest.mark.parametrize("ecosystem", ORDERS)
def test_versions_are_in_the_order_of_their_ecosystem(ecosystem: str) -> None:
    for low, high in pairwise(ORDERS[ecosystem]):
        one, other = versions.key(ecosystem, low), versions.key(ecosystem, high)
        assert one is not None
        assert other is not None
        assert one < other, (low, high)


@given(
    st.sampled_from(sorted(advisories.ECOSYSTEMS)),
    st.text(max_size=30),
    st.text(alphabet="0123456789.-abrc+v", max_size=20),
)
def test_any_two_versions_compare(ecosystem: str, one: str, other: str) -> None:
    keys = [key for key in (versions.key(ecosystem, one), versions.key(ecosystem, other)) if key is not None]
    assert sorted(keys)[0] == min(keys) if keys else True


@given(st.sampled_from(manifests.KINDS), st.text(max_size=200))
def test_no_text_breaks_a_manifest(kind: str, text: str) -> None:
    for wanted in manifests.dependencies(text, kind):
        assert 0 <= wanted.start < wanted.end <= len(text)
