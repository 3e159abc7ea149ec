"""Whose text a statement is made of is told from where each of its pieces comes from."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.guard import scan
from server.guard.assembled import Statements

PLPGSQL = """CREATE FUNCTION f(p_text text, p_number int, p_any t.name%TYPE, p_key t.owner_id%TYPE, p_kind shop.kind)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE v text := {value}; r record;
BEGIN
  {check}
  EXECUTE 'DROP TABLE x_' || v;
END $$;"""


def is_found(text: str) -> bool:
    return any(finding.cwe == "CWE-89" for finding in scan.scan_text(text, language="sql").findings)


@pytest.mark.parametrize(
    "value",
    [
        "p_text",
        "lower(trim(p_text))",
        "'a' || coalesce(p_text, 'b')",
        "p_any",
        "format('%s', p_text)",
        "format('%2$s %1$I', 'a', p_text)",
        "CASE WHEN p_number = 1 THEN 'a' ELSE p_text END",
        "(SELECT string_agg(p_text, ','))",
        "CAST(p_text AS varchar(20))",
        "f.p_text",
        "format(p_text, 'a')",
        "p_text::text",
        "NULL; v := p_text",
        "NULL; SELECT 1, p_text INTO r, v FROM t",
        "$1",
        "replace(p_text, 'a', 'b')",
        "$q$select $q$ || p_text",
        "unknown(p_text)",
        "public.identity(p_text)",
        "unchecked(p_text)",
        "checksum(p_text)",
        f"'{'a' * 6100}' || p_text",
        f"$q${'a ' * 6100}$q$ || p_text",
        "NULL;" + "v := 'a';" * 41 + "v := p_text",
        "NULL; v := v1;" + "".join(f"v{i} := v{i + 1};" for i in range(1, 30)) + "v30 := p_text",
    ],
)
def test_a_callers_text_is_found(value: str) -> None:
    assert is_found(PLPGSQL.format(value=value, check="NULL;"))


@pytest.mark.parametrize(
    "value",
    [
        "quote_ident(p_text)",
        "'a'",
        "p_number",
        "p_key",
        "p_kind",
        "p_text::regclass",
        "(p_text)::int",
        "CAST(p_text AS int)",
        "format('%I', p_text)",
        "format('%1$L %%s', p_text)",
        "CASE p_text WHEN 'a' THEN 'b' ELSE 'c' END",
        "to_char(now(), 'YYYY')",
        "r.name",
        "app.safe_name(p_text)",
        "replace(p_text, '''', '''''')",
        "length(p_text)",
        "NULL; SELECT name INTO v FROM pg_tables",
        "lower(p_text)::int",
    ],
)
def test_what_is_no_callers_text_is_not(value: str) -> None:
    assert not is_found(PLPGSQL.format(value=value, check="NULL;"))


@pytest.mark.parametrize(
    "check",
    [
        "IF p_text NOT IN ('a', 'b') THEN RAISE 'no'; END IF;",
        "IF lower(p_text) !~ '^[a-z]+$' THEN RAISE 'no'; END IF;",
        "PERFORM app.assert_known(p_text);",
        "PERFORM 1 FROM tenants WHERE name = p_text; IF NOT FOUND THEN RAISE 'no'; END IF;",
        "SELECT count(*) INTO n FROM tenants WHERE name = lower(p_text); IF n = 0 THEN RAISE 'no'; END IF;",
        "SELECT count(*) INTO n FROM tenants WHERE name = p_text; IF n <> 1 THEN RETURN; END IF;",
        "IF NOT p_text = ANY (ARRAY['a']) THEN RAISE 'no'; END IF;",
        "PERFORM 1 FROM pg_tables WHERE tablename = p_text;",
        "IF NOT EXISTS (SELECT 1 FROM reports WHERE code = p_text) THEN RAISE 'no'; END IF;",
        "IF p_text <> 'a' AND p_text <> 'b' THEN RAISE 'no'; END IF;",
    ],
)
def test_what_was_checked_is_not(check: str) -> None:
    assert not is_found(PLPGSQL.format(value="p_text", check=check))


@pytest.mark.parametrize(
    "check",
    [
        "RAISE NOTICE 'please check the p_text';",
        "RAISE NOTICE 'p_text = ANY (x) and p_text IN (y)';",
        "PERFORM 1 FROM t WHERE x = p_text; IF FOUND THEN END IF;",
        "PERFORM 1 FROM t WHERE x = p_text; IF NOT FOUND THEN RAISE NOTICE 'none'; END IF;",
        "PERFORM 1 FROM t WHERE x = p_text; IF FOUND THEN RETURN; END IF;",
        "SELECT count(*) INTO n FROM t WHERE x = p_text; IF n <> 0 THEN RETURN; END IF;",
        "PERFORM checkout(p_text);",
        "SELECT is_valid INTO ok FROM t WHERE x = p_text;",
    ],
)
def test_what_only_looks_like_a_check_is_none(check: str) -> None:
    assert is_found(PLPGSQL.format(value="p_text", check=check))


@pytest.mark.parametrize("value", [f"'{'a' * 6100}'", f"$q${'a ' * 6100}$q$ || quote_ident(p_text)"])
def test_a_long_text_is_read_over(value: str) -> None:
    assert not is_found(PLPGSQL.format(value=value, check="NULL;"))


def test_an_empty_text_is_no_check() -> None:
    assert is_found(PLPGSQL.format(value="p_text", check="IF p_text <> '' THEN NULL; END IF;"))


def test_a_parameter_without_the_head_of_its_routine_is_still_one() -> None:
    assert is_found("BEGIN\n  EXECUTE 'DROP TABLE ' || p_table;\nEND;")
    assert not is_found("BEGIN\n  EXECUTE 'DROP TABLE ' || tablename;\nEND;")


def test_each_routine_has_variables_of_its_own() -> None:
    one = "CREATE PROCEDURE a(p_x int) LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'x' || p_x; END $$;\n"
    other = "CREATE PROCEDURE b(p_x text) LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'x' || p_x; END $$;\n"
    assert not is_found(one)
    assert is_found(one + other)


def test_the_place_where_the_text_is_joined_is_reported() -> None:
    text = "CREATE PROC d @t varchar(50) AS\nDECLARE @q nvarchar(90) = N'DROP TABLE ' + @t;\nEXEC (@q);\nEXEC (@q);"
    found = [f for f in scan.scan_text(text, language="sql").findings if f.cwe == "CWE-89"]
    assert [text[f.start : f.end] for f in found] == ["N'DROP TABLE ' + @t"]


HEAD = "CREATE PROCEDURE p(a int) AS BEGIN\n" + "".join(f"EXECUTE v{i};\n" for i in range(60))


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "check" * 3800,
        HEAD + "check " * 3200,
        HEAD + "sys.=( " * 2600,
        HEAD + "EXISTS (SELECT x = " * 1000,
        "".join(f"CREATE PROCEDURE p{i}(a int) AS BEGIN EXECUTE v{i}; END;\n" for i in range(2000)),
        HEAD + "PERFORM a;IF THEN " * 1000,
        HEAD + "INTO " + "a," * 9000,
        HEAD + "v0 = " * 4000,
        HEAD + "v0" + " " * 18000 + "x",
        "\n" * 20000,
    ],
)
def test_every_name_is_looked_for_at_once(text: str) -> None:
    started = time.process_time()
    scan.scan_text(text[:120_000], language="sql")
    assert time.process_time() - started < 1


@given(st.text(alphabet="'()|+,;:@$[]x \nEXCAS", max_size=80))
def test_any_text_is_read_to_its_end(text: str) -> None:
    started = time.process_time()
    Statements(text, text).foreign_part(0)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "text",
    [
        "EXEC(" * 4000,
        "EXEC(lower" + "(" * 6000,
        "EXECUTE v;" + "SELECT a INTO v FROM " * 1000,
        "EXECUTE v0;" + "".join(f"v{i} := v{i + 1};" for i in range(3000)),
        "EXEC(" + "@a+" * 8000,
        "EXEC(@v);" + "SET @v = @v + 'a'" * 2000,
    ],
)
def test_no_text_is_slow(text: str) -> None:
    started = time.process_time()
    Statements(text, text).foreign_part(5)
    scan.scan_text(text[:20_000], language="sql")
    assert time.process_time() - started < 3
