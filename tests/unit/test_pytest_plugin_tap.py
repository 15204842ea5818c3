"""TAP and KTAP output of guests: what the parser makes of it."""

import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz_settings import FUZZ_EXAMPLES
from kvmpy.pytest_plugin.tap import Status, TapReport, parse

PASSED, FAILED, SKIPPED, XFAILED = Status


def read(text: str) -> TapReport:
    return parse(textwrap.dedent(text).strip("\n"))


def outcomes(text: str) -> dict[str, Status]:
    """The results of an output that is in order."""
    report = read(text)
    assert report.problems == ()
    return {result.name: result.status for result in report.results}


def test_a_plain_document_of_each_dialect() -> None:
    for version in ("TAP version 13", "TAP version 14", "KTAP version 1"):
        assert outcomes(f"{version}\n1..2\nok 1 - adds\nnot ok 2 divides") == {"adds": PASSED, "divides": FAILED}


def test_tap_12_has_no_version_and_may_have_its_plan_at_the_end() -> None:
    assert outcomes("ok\nnot ok\nok - third\n1..3") == {
        "test point 1": PASSED,
        "test point 2": FAILED,
        "third": PASSED,
    }


def test_ok_says_so_only_when_nothing_failed_and_nothing_is_wrong() -> None:
    assert read("1..1\nok 1").ok
    assert not read("1..1\nnot ok 1").ok
    assert not read("1..2\nok 1").ok
    assert not read("").ok


@pytest.mark.parametrize(
    ("line", "status", "name", "reason"),
    [
        ("ok 1 a # SKIP no device", SKIPPED, "a", "no device"),
        ("ok 1 a # skip: no device", SKIPPED, "a", "no device"),
        ("ok 1 a # Skipped no device", SKIPPED, "a", "no device"),
        ("ok 1 # SKIP no device", SKIPPED, "test point 1", "no device"),
        ("not ok 1 a # SKIP no device", SKIPPED, "a", "no device"),
        ("not ok 1 a # TODO write it", XFAILED, "a", "write it"),
        ("ok 1 a # TODO write it", PASSED, "a", "write it"),
        ("ok 1 a # XFAIL known", XFAILED, "a", "known"),
        ("not ok 1 a # XFAIL known", XFAILED, "a", "known"),
        ("ok 1 a # XPASS known", PASSED, "a", "known"),
        ("not ok 1 a # TIMEOUT 45 seconds", FAILED, "a", "TIMEOUT 45 seconds"),
        ("ok 1 a # ERROR", FAILED, "a", "ERROR"),
        ("not ok 1 a # exit=1", FAILED, "a # exit=1", ""),
        ("ok 1 - issue #17 is gone", PASSED, "issue #17 is gone", ""),
        (r"ok 1 a \# SKIP not a directive", PASSED, "a # SKIP not a directive", ""),
        ("ok 1 a #17 # SKIP because", SKIPPED, "a #17", "because"),
        ("ok 1     wide      # SKIP", SKIPPED, "wide", ""),
        ("ok 1 -", PASSED, "test point 1", ""),
        ("ok 1 -1 is negative", PASSED, "-1 is negative", ""),
    ],
)
def test_a_directive_decides(line: str, status: Status, name: str, reason: str) -> None:
    for version in ("TAP version 14", "KTAP version 1"):
        report = parse(f"{version}\n1..1\n{line}\n")
        assert [(result.status, result.name, result.reason) for result in report.results] == [(status, name, reason)]
        assert report.problems == ()


KERNEL = """
    [    0.512004] Freeing unused kernel memory: 1024K
    [    0.512345] KTAP version 1
    [    0.512346] 1..2
    [    0.512400]     KTAP version 1
    [    0.512401]     # Subtest: list
    [    0.512402]     # module: list_test
    [    0.512403]     1..2
    [    0.512500]     ok 1 list_add
    [    0.512600]     # list_del: EXPECTATION FAILED at lib/list-test.c:42
    [    0.512601]     Expected list.next == &a, but
    [    0.512602]         list.next == 00000000deadbeef
    [    0.512700]     not ok 2 list_del
    [    0.512701] # list: pass:1 fail:1 skip:0 total:2
    [    0.512702] # Totals: pass:1 fail:1 skip:0 total:2
    [    0.512703] not ok 1 list
    [    0.512800]     KTAP version 1
    [    0.512801]     # Subtest: sort
    [    0.512802]     1..2
    [    0.512803]         KTAP version 1
    [    0.512804]         # Subtest: sort_param
    [    0.512900]         ok 1 three
    [    0.512901]         ok 2 four # SKIP no memory
    [    0.512950]     # sort_param: pass:1 fail:0 skip:1 total:2
    [    0.512951]     ok 1 sort_param
    [    0.512952] clocksource: tsc: mask: 0xffffffffffffffff
    [    0.513000]     ok 2 sort_big
    [    0.513001] ok 2 sort
    [    0.600000] reboot: Power down
"""


def test_the_output_of_a_kernel_with_kunit() -> None:
    report = read(KERNEL)
    assert report.problems == ()
    assert {result.name: result.status for result in report.results} == {
        "list > list_add": PASSED,
        "list > list_del": FAILED,
        "sort > sort_param > three": PASSED,
        "sort > sort_param > four": SKIPPED,
        "sort > sort_big": PASSED,
    }
    assert report.failed[0].diagnostics == (
        "list_del: EXPECTATION FAILED at lib/list-test.c:42",
        "Expected list.next == &a, but",
        "list.next == 00000000deadbeef",
    )


@pytest.mark.parametrize(
    "stamp", ["[    1.234567] ", "[12345.123456][    T1] ", "<6>[    0.000000] ", "[    2.5][  C12] ", "<5>", "init: "]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\r\n"])
def test_what_stands_before_and_after_each_line_does_not_matter(stamp: str, end: str) -> None:
    plain = textwrap.dedent("""
        KTAP version 1
        1..2
            KTAP version 1
            # Subtest: suite
            1..1
            # because
            not ok 1 case
        not ok 1 suite
        ok 2 other
    """).strip("\n")
    assert parse("".join(stamp + line + end for line in plain.split("\n"))) == parse(plain)
    assert [result.name for result in parse(plain).results] == ["suite > case", "other"]


def test_colours_do_not_matter() -> None:
    assert outcomes("TAP version 14\n1..1\n\x1b[1;32mok\x1b[0m 1 - \x1b[36mgreen\x1b[0m") == {"green": PASSED}


def test_a_version_line_may_follow_what_was_left_of_a_line() -> None:
    assert outcomes("Loading kernel...KTAP version 1\n1..1\nok 1 a") == {"a": PASSED}


def test_the_subtests_of_tap_14() -> None:
    report = read("""
        TAP version 14
        1..3
        # Subtest: first
            1..2
            ok 1 - a
            not ok 2 - b
              ---
              message: "not what was expected"
              at:
                line: 17
              ...
        not ok 1 - first
            ok 1 - c
            1..1
        ok 2 - second
        ok 3 - third
    """)
    assert report.problems == ()
    assert [(result.name, result.status) for result in report.results] == [
        ("first > a", PASSED),
        ("first > b", FAILED),
        ("second > c", PASSED),
        ("third", PASSED),
    ]
    assert report.failed[0].diagnostics == ('message: "not what was expected"', "at:", "  line: 17")


def test_nothing_in_a_yaml_block_is_a_result() -> None:
    report = read("""
        TAP version 13
        1..2
        not ok 1 - a
          ---
          output: |
            ok 17 - not a result
          1..9
          ...
        ok 2 - b
    """)
    assert report.problems == ()
    assert [result.name for result in report.results] == ["a", "b"]
    assert "ok 17 - not a result" in report.results[0].diagnostics[1]


def test_a_yaml_block_without_an_end_is_over_where_the_text_goes_back_to_the_left() -> None:
    assert outcomes("TAP version 13\n1..2\nnot ok 1 - a\n  ---\n  x: 1\nok 2 - b") == {"a": FAILED, "b": PASSED}


def test_comments_belong_to_the_result_before_them_in_tap_and_after_them_in_ktap() -> None:
    lines = "1..2\n# one\nnot ok 1 a\n# two\nnot ok 2 b\n# three"
    assert [result.diagnostics for result in parse(f"TAP version 13\n{lines}").results] == [("two",), ("three",)]
    assert [result.diagnostics for result in parse(f"KTAP version 1\n{lines}").results] == [("one",), ("two",)]


def test_a_result_keeps_only_the_last_lines() -> None:
    text = "KTAP version 1\n1..1\n" + "".join(f"line {number}\n" for number in range(1000)) + "not ok 1 a\n"
    (result,) = parse(text).results
    assert result.diagnostics[-1] == "line 999"
    assert len(result.diagnostics) < 100


def test_a_parent_that_fails_by_itself_is_a_failure() -> None:
    text = "KTAP version 1\n1..1\n  KTAP version 1\n  # Subtest: s\n  1..1\n  ok 1 a\nnot ok 1 s"
    assert outcomes(text) == {"s > a": PASSED, "s": FAILED}


def test_a_child_that_fails_counts_even_when_its_parent_says_ok() -> None:
    text = "KTAP version 1\n1..1\n  KTAP version 1\n  1..1\n  not ok 1 a\nok 1 s"
    assert outcomes(text) == {"s > a": FAILED}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no TAP or KTAP output was found"),
        ("the system is ready\n", "no TAP or KTAP output was found"),
        ("KTAP version 1\n", "no plan (1..N): the output may have been cut off"),
        ("KTAP version 1\nok 1 a\n", "no plan (1..N): the output may have been cut off"),
        ("KTAP version 1\n1..3\nok 1 a\nok 2 b\n", "the plan was 1..3, but 2 came"),
        ("TAP version 13\n1..1\nok 1 a\nok 2 b\n", "the plan was 1..1, but 2 came"),
        ("TAP version 13\n1..2\nok 1 a\nok 3 b\n", "test point 3 is number 2"),
        ("TAP version 13\n1..1\nok 1 a\n1..2\n", "a second plan, 1..2, after 1..1"),
        ("TAP version 13\n1..5\nok 1 a\nBail out! the disk is gone\nok 2 b\n", "Bail out! the disk is gone"),
        ("TAP version 14\n1..1\n    1..2\n    ok 1 a\n    Bail out!\n", "Bail out!"),
        (
            "KTAP version 1\n1..1\n  KTAP version 1\n  # Subtest: s\n  1..2\n  ok 1 a\nok 1 s\n",
            "s: the plan was 1..2, but 1 came",
        ),
    ],
)
def test_what_is_wrong_with_the_output_is_said(text: str, problem: str) -> None:
    assert parse(text).problems == (problem,)
    assert not parse(text).ok


def test_output_that_ends_within_a_subtest_shows_what_came_and_what_is_missing() -> None:
    report = read("""
        KTAP version 1
        1..2
            KTAP version 1
            # Subtest: memory
            1..3
            ok 1 allocates
            [   0.1] BUG: unable to handle page fault
    """)
    assert [(result.name, result.status) for result in report.results] == [("memory > allocates", PASSED)]
    assert report.problems == (
        "memory: the plan was 1..3, but 1 came",
        "memory has no result line of its own",
        "the plan was 1..2, but 0 came",
    )


def test_a_plan_of_nothing_is_one_skipped_result() -> None:
    (result,) = parse("TAP version 13\n1..0 # SKIP no hardware\n").results
    assert (result.status, result.reason) == (SKIPPED, "no hardware")
    assert parse("1..0\n").ok


def test_a_subtest_without_tests_is_skipped_by_its_parent() -> None:
    text = "KTAP version 1\n1..1\n  KTAP version 1\n  1..0\nok 1 s # SKIP nothing to do"
    assert outcomes(text) == {"s": SKIPPED}


def test_documents_may_follow_each_other() -> None:
    text = "KTAP version 1\n1..1\nok 1 a\nsome log\nTAP version 13\n1..1\nnot ok 1 b\n"
    assert outcomes(text) == {"a": PASSED, "b": FAILED}


def test_talk_before_the_output_is_no_result() -> None:
    text = "ok, booting\nok 1 of 3 disks\n1..9\nKTAP version 1\n1..1\nok 1 a"
    assert outcomes(text) == {"a": PASSED}


def test_talk_within_ktap_is_no_result() -> None:
    text = "KTAP version 1\n1..1\nok, then\nokay\nnot okay\nnot ok at all\nok 1 a\nusing TAP version 13\n"
    assert outcomes(text) == {"a": PASSED}


def test_deeply_indented_text_is_no_subtest() -> None:
    stairs = "".join(f"{' ' * depth}ok 1 step {depth}\n" for depth in range(1000))
    report = parse("KTAP version 1\n1..1\n" + stairs)
    assert len(report.results) < 50


LINES = st.sampled_from([
    "KTAP version 1", "TAP version 13", "TAP version 14", "1..2", "1..0 # skip", "ok 1 a", "not ok 2 b", "ok",
    "not ok", "ok 1 # SKIP x", "not ok 1 # TODO", "# Subtest: s", "# text", "---", "...", "Bail out!", "[ 1.0] x",
    "ok 99999999999999999999999999", "1..99999999999999999999999999", "", "\t", "\\#", "#" * 50,
])  # fmt: skip
INDENTED = st.tuples(st.integers(0, 9), LINES).map(lambda pair: " " * pair[0] + pair[1])


@settings(max_examples=FUZZ_EXAMPLES)
@given(st.one_of(st.text(), st.lists(st.one_of(INDENTED, st.text(max_size=20)), max_size=40).map("\n".join)))
def test_any_text_gives_a_report(text: str) -> None:
    report = parse(text)
    assert all(result.name for result in report.results)
    assert report.ok == (not report.problems and all(each.status is not FAILED for each in report.results))
    assert parse(text.replace("\n", "\r\n")) == report


@settings(max_examples=FUZZ_EXAMPLES)
@given(st.lists(st.tuples(st.sampled_from(["ok", "not ok"]), st.text("abc xyz", max_size=9)), max_size=9), st.data())
def test_what_is_printed_is_what_is_read(points: list[tuple[str, str]], data: st.DataObject) -> None:
    lines = ["KTAP version 1", f"1..{len(points)}"]
    for number, (verdict, name) in enumerate(points, 1):
        lines += data.draw(st.lists(st.text("# []:.", max_size=9), max_size=2))
        lines.append(f"{verdict} {number} {name}".rstrip())
    report = parse("\n".join(lines))
    assert report.problems == ()
    if points:
        assert [result.status for result in report.results] == [
            PASSED if verdict == "ok" else FAILED for verdict, _ in points
        ]
        assert [result.name for result in report.results] == [
            name.strip() or f"test point {number}" for number, (_, name) in enumerate(points, 1)
        ]
