"""The pytest plugin with real guests: each test here runs a session of its own and reads what it says."""

import re
from pathlib import Path

import pytest

from code_blocks import blocks

PAGE = Path(__file__).parents[2] / "docs" / "testing-kernels.md"

pytest_plugins = ("pytester",)

LEAN = ("-p", "no:hypothesispytest", "-p", "no:cacheprovider")
"""Without a plugin that costs half a second, and a folder that nobody needs."""


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return pytester


def run(session: pytest.Pytester, *options: str) -> pytest.RunResult:
    return session.runpytest_subprocess(*LEAN, *options, timeout=50)


def failure(result: pytest.RunResult, name: str) -> str:
    """What the session says about one failed test."""
    text = result.stdout.str()
    match = re.search(rf"^_+ {re.escape(name)} _+$(.*?)(?=^_+ [^\n]+ _+$|^=+ )", text, re.MULTILINE | re.DOTALL)
    assert match is not None, text
    return match[1]


GREEN = r"""
    import pytest
    from kvmpy import End, Hlt, IoOut, MiB
    from kvmpy.boot import FlatImage
    from kvmpy.devices import PostPort

    EXITS_WITH_9 = "mov al, 9; out 0xf4, al"
    made = []

    def test_boots_bytes(kvm_boot):
        result = kvm_boot(bytes.fromhex("b008 e6f4 f4"))  # mov al, 8; out 0xf4, al; hlt
        assert result.exit_code == 8
        assert result.outcome.end is End.EXITED

    def test_boots_bytes_in_a_mode(kvm_boot, kvm_guest_asm):
        image = kvm_guest_asm("mov rax, 0x1122334455; shr rax, 32; out 0xf4, al", bits=64).image
        assert kvm_boot(image, mode="long").exit_code == 0x11

    def test_boots_a_file(kvm_boot, kvm_guest_asm, kvm_guest_c, tmp_path):
        (tmp_path / "flat.bin").write_bytes(kvm_guest_asm(EXITS_WITH_9).image)
        assert kvm_boot(tmp_path / "flat.bin").exit_code == 9
        elf = kvm_guest_c("#include <kvmpy/exit.h>\nvoid _start(void) { kvmpy_exit(10); }").elf
        assert kvm_boot(str(elf)).exit_code == 10
        assert kvm_boot(elf.read_bytes()).exit_code == 10

    @pytest.mark.parametrize("bits", [16, 32, 64])
    def test_boots_a_program_in_its_mode(kvm_boot, kvm_guest_asm, bits):
        source = "mov cx, [number]; mov al, cl; out 0xf4, al; number: .byte 9, 0"
        assert kvm_boot(kvm_guest_asm(source, bits=bits, address=0x2000)).exit_code == 9

    def test_boots_an_image(kvm_boot, kvm_guest_asm):
        assert kvm_boot(FlatImage(kvm_guest_asm(EXITS_WITH_9).image)).exit_code == 9
        with pytest.raises(TypeError, match="mode"):
            kvm_boot(FlatImage(b"\xf4"), mode="long")

    def test_a_guest_that_halts_has_no_exit_code(kvm_boot):
        result = kvm_boot(b"\xfa\xf4")
        assert (result.outcome.end, result.exit_code, result.console) == (End.HALTED, None, "")
        assert result.outcome.ok

    def test_both_consoles(kvm_boot, kvm_guest_asm):
        result = kvm_boot(kvm_guest_asm("mov al, 'D'; out 0xe9, al; mov dx, 0x3f8; mov al, 'S'; out dx, al; cli; hlt"))
        assert (result.console, result.debug_console) == ("S", "D")
        assert "the console ends with 'S'" in repr(result)

    def test_options_of_the_machine_and_devices(kvm_boot, kvm_guest_asm):
        post = PostPort()
        result = kvm_boot(
            kvm_guest_asm("mov al, 0x42; out 0x80, al; hlt"),
            memory=1 * MiB, vcpus=2, irqchip=False, devices=[post],
        )
        assert result.outcome.end is End.HALTED
        assert list(post.codes) == [0x42]
        assert len(result.machine.vcpus) == 2
        assert sum(region.size for region in result.machine.memory.regions) == 1 * MiB

    def test_a_timeout_of_ones_own_is_an_outcome(kvm_boot, kvm_machine):
        assert kvm_boot(b"\xeb\xfe", timeout=0.05).outcome.end is End.TIMEOUT
        machine = kvm_machine()
        machine.load(FlatImage(b"\xeb\xfe"))
        machine.start(timeout=0.05)
        assert machine.wait().end is End.TIMEOUT

    def test_until(kvm_boot, kvm_guest_asm):
        program = kvm_guest_asm("mov dx, 0x3f8; mov al, 'a'; next: out dx, al; inc al; jmp next")
        result = kvm_boot(program, until="xyz")
        assert result.outcome.end is End.STOPPED
        assert result.console.startswith("abcdefghijklmnopqrstuvwxyz")

    def test_several_machines_and_runs(kvm_machine, kvm_guest_asm):
        program = kvm_guest_asm("mov al, 1; again: out 0xf4, al; inc al; jmp again")
        machines = [kvm_machine(memory=1 * MiB), kvm_machine(1 * MiB, 1, irqchip=False)]
        for machine in machines:
            assert machine.exit_code is None
            machine.load(FlatImage(program.image, program.address))
        assert [machine.run().code for machine in machines] == [3, 3]
        assert machines[1].run(check=False).code == 5
        assert [machine.exit_code for machine in machines] == [1, 2]
        made.extend(machines)

    def test_they_were_closed_at_the_end():
        assert ["closed" in repr(machine) for machine in made] == [True, True]

    def test_async(kvm_machine):
        import asyncio
        machine = kvm_machine()
        machine.load(FlatImage(b"\xfa\xf4"))
        assert asyncio.run(machine.run_async()).end is End.HALTED

    def test_a_bare_vcpu(kvm_vcpu, kvm_guest_asm):
        program = kvm_guest_asm("add al, bl; out 0x10, al; push ax; hlt")
        kvm_vcpu.vm.memory.write(program.address, program.image)
        kvm_vcpu.regs.rax, kvm_vcpu.regs.rbx = 40, 2
        seen = []
        for event in kvm_vcpu.exits():
            seen.append(event)
            if event == Hlt():
                break
        assert seen == [IoOut(0x10, 1, bytes([42])), Hlt()] or [type(event) for event in seen] == [IoOut, Hlt]
        assert kvm_vcpu.vm.memory.read(0xffe, 2) == bytes([42, 0])
        made[:] = [kvm_vcpu]

    def test_the_vcpu_was_closed():
        assert made[0].closed
"""


def test_guests_run_in_all_fixtures(session: pytest.Pytester) -> None:
    session.makepyfile(GREEN)
    result = run(session, "-W", "error")
    result.assert_outcomes(passed=17)


RED = r"""
    import pytest
    from kvmpy.boot import FlatImage

    def test_wrong_code(kvm_boot, kvm_guest_asm):
        prints = "mov dx, 0x3f8; mov al, 'N'; out dx, al; mov al, 0x1b; out dx, al; mov al, 'o'; out dx, al"
        result = kvm_boot(kvm_guest_asm(prints + "; out 0xe9, al; mov al, 3; out 0xf4, al"))
        assert result.exit_code == 0

    def test_wrong_text(kvm_boot, kvm_guest_asm):
        result = kvm_boot(kvm_guest_asm("mov dx, 0x3f8; mov al, 'N'; out dx, al; cli; hlt"))
        assert "Y" in result.console

    def test_triple_fault(kvm_boot, kvm_guest_asm):
        result = kvm_boot(kvm_guest_asm("lidt [limit]; ud2; limit: .word 0; .quad 0", bits=64))
        assert result.outcome.ok

    def test_two_machines(kvm_boot, kvm_guest_asm):
        for letter in "AB":
            kvm_boot(kvm_guest_asm(f"mov dx, 0x3f8; mov al, '{letter}'; out dx, al; cli; hlt"))
        assert False

    def test_never_said(kvm_boot):
        kvm_boot(b"\xfa\xf4", until="login: ")

    def test_still_running(kvm_machine, kvm_guest_asm):
        program = kvm_guest_asm("mov dx, 0x3f8; mov al, 'R'; out dx, al; wait: jmp wait")
        machine = kvm_machine()
        machine.load(FlatImage(program.image, program.address))
        machine.start()
        machine.console.expect("R")
        assert False

    def test_vcpu(kvm_vcpu):
        kvm_vcpu.vm.memory.write(0x1000, bytes([0xf4]))
        assert kvm_vcpu.run() is None

    @pytest.fixture
    def booted(kvm_boot):
        assert kvm_boot(bytes.fromhex("b007 e6f4")).exit_code == 0

    def test_in_set_up(booted): pass

    def test_much_text(kvm_boot, kvm_guest_asm):
        prints = "mov dx, 0x3f8; mov cx, 20000; mov al, 'x'; again: out dx, al; loop again; mov al, 'z'; out dx, al"
        assert not kvm_boot(kvm_guest_asm(prints + "; cli; hlt")).outcome.ok
"""


def test_a_failure_shows_consoles_and_how_the_guest_ended(session: pytest.Pytester) -> None:
    session.makepyfile(RED)
    result = run(session)
    result.assert_outcomes(failed=8, errors=1)

    code = failure(result, "test_wrong_code")
    assert "assert 3 == 0" in code
    assert re.search(r"where 3 = <BootResult exited with code 7: .*; the console ends with .*>\.exit_code", code)
    assert re.search(r"^-+ Captured kvm console -+\nN\\x1bo\n-+ Captured kvm debug console -+\no\n", code, re.MULTILINE)
    assert re.search(r"^-+ kvm outcome -+\nexited with code 7", code, re.MULTILINE)

    text = failure(result, "test_wrong_text")
    assert "assert 'Y' in 'N'" in text
    assert re.search(r"^-+ kvm outcome -+\nhalted", text, re.MULTILINE)

    crash = failure(result, "test_triple_fault")
    assert "triple fault" in crash.partition("kvm outcome")[2].lower()
    assert re.search(r"rip\W+(0x)?0*1008\b", crash), "registers at the instruction that faulted"

    both = failure(result, "test_two_machines")
    for number, letter in enumerate("AB", 1):
        assert re.search(rf"^-+ Captured kvm console of machine {number} -+\n{letter}\n", both, re.MULTILINE)

    assert "the guest never wrote 'login: ' to its serial port; it ended: halted" in failure(result, "test_never_said")

    running = failure(result, "test_still_running")
    assert re.search(r"^-+ Captured kvm console -+\nR\n-+ kvm outcome -+\nstopped", running, re.MULTILINE)

    vcpu = failure(result, "test_vcpu")
    assert re.search(r"^-+ kvm vCPU -+\nlast exit: Hlt\(\)\n", vcpu, re.MULTILINE)
    assert re.search(r"rip\W+(0x)?0*1001\b", vcpu)

    assert "exited with code 15" in failure(result, "ERROR at setup of test_in_set_up")

    much = failure(result, "test_much_text")
    assert "characters before]\n" in much
    assert "xxxz\n" in much
    assert len(much) < 25_000


HANGS = r"""
    import pytest
    from kvmpy.boot import FlatImage

    LOOP = b"\xeb\xfe"

    @pytest.mark.kvm(deadline=0.05)
    class TestMarked:
        def test_boot(self, kvm_boot):
            kvm_boot(LOOP)

        @pytest.mark.kvm  # the mark that is nearer says nothing of a deadline
        def test_longer_timeout(self, kvm_boot):
            kvm_boot(LOOP, timeout=500)

        def test_start_and_wait(self, kvm_machine):
            machine = kvm_machine(vcpus=2)
            machine.load(FlatImage(LOOP))
            machine.start()
            machine.wait()

        def test_async(self, kvm_machine):
            import asyncio
            machine = kvm_machine()
            machine.load(FlatImage(LOOP))
            asyncio.run(machine.run_async())

        def test_again_and_again(self, kvm_boot):
            while True:
                kvm_boot(LOOP, timeout=0.02)

        def test_vcpu(self, kvm_vcpu):
            kvm_vcpu.vm.memory.write(0x1000, LOOP)
            kvm_vcpu.run()

        def test_vcpu_with_exits(self, kvm_vcpu):
            kvm_vcpu.vm.memory.write(0x1000, bytes.fromhex("e610 ebfc"))
            for event in kvm_vcpu.exits():
                pass

        def test_until(self, kvm_boot):
            kvm_boot(LOOP, until="login: ")

    def test_default_of_the_session(kvm_boot):
        kvm_boot(LOOP)

    @pytest.mark.kvm(deadline=100)
    def test_one_with_more_time(kvm_boot):
        assert kvm_boot(LOOP, timeout=0.2).exit_code is None

    @pytest.mark.kvm(deadline="later")
    def test_when(kvm_boot):
        pass

    @pytest.mark.kvm(5)
    def test_five_of_what(kvm_boot):
        pass

    def test_the_session_goes_on(kvm_boot):
        assert kvm_boot(b"\xfa\xf4").outcome.ok
"""


def test_a_guest_that_hangs_fails_its_test_at_the_deadline_and_not_the_session(session: pytest.Pytester) -> None:
    session.makepyfile(HANGS)
    result = run(session, "-o", "kvm_deadline=0.1")
    result.assert_outcomes(failed=9, passed=2, errors=2)
    text = result.stdout.str()
    assert (
        len(re.findall(r"^E +Failed: timeout: the guest still ran when the 0\.05 s were over", text, re.MULTILINE)) == 8
    )
    assert "Failed: timeout: the guest still ran when the 0.1 s were over" in failure(
        result, "test_default_of_the_session"
    )
    assert "test_when: a positive number of seconds is needed, not 'later'" in text
    assert "pytest.mark.kvm takes deadline=seconds and nothing else; " in text
    boot = failure(result, "TestMarked.test_boot")
    assert re.search(r"^> +kvm_boot\(LOOP\)\nE ", boot, re.MULTILINE), "the line of the test, not one of the plugin"
    assert "timeout" in boot.partition("kvm outcome")[2].lower()
    assert re.search(r"rip\W+(0x)?0*1000\b", boot)


DEBUGGED = r"""
    import pytest
    from kvmpy import End

    @pytest.mark.kvm(deadline=0.02)
    def test_takes_long(kvm_boot):
        assert kvm_boot(b"\xeb\xfe", timeout=0.05).outcome.end is End.TIMEOUT
"""


def test_nobody_is_hurried_in_the_debugger(session: pytest.Pytester) -> None:
    session.makepyfile(DEBUGGED)
    run(session, "--pdb").assert_outcomes(passed=1)


AGAIN = """
    from _pytest.runner import runtestprotocol

    def pytest_runtest_protocol(item, nextitem):
        for log in (False, True):
            item._initrequest()
            runtestprotocol(item, log=log, nextitem=nextitem)
        return True
"""
"""A conftest that runs each test twice and shows the second time, as plugins do that repeat what failed."""


def test_a_test_that_is_run_again_has_all_its_time_and_its_own_machines(session: pytest.Pytester) -> None:
    session.makeconftest(AGAIN)
    session.makepyfile(
        r"""
        import pytest

        @pytest.mark.kvm(deadline=0.1)
        def test_takes_most_of_its_time(kvm_boot):
            kvm_boot(b"\xeb\xfe", timeout=0.06)
            assert False
        """
    )
    result = run(session)
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert "s were over" not in text
    assert "kvm outcome of machine" not in text, "one machine needs no number"
    assert "assert False" in text


TAP = r"""
    import pytest

    OUTPUT = (
        "TAP version 14\n1..5\nok 1 - adds\nnot ok 2 - divides\n  ---\n  got: 3\n  ...\n"
        "ok 3 - floats # SKIP no unit\nnot ok 4 - is fast # TODO later\nok 5 - ends\n"
    )

    def test_mixed(kvm_tap):
        kvm_tap(OUTPUT)

    def test_green(kvm_tap):
        report = kvm_tap("KTAP version 1\n1..2\nok 1 a\nok 2 b\n")
        assert report.ok
        assert [result.name for result in report.results] == ["a", "b"]

    def test_cut_off(kvm_tap):
        kvm_tap("KTAP version 1\n1..2\nok 1 a\n")

    def test_none(kvm_tap):
        kvm_tap("hello")

    def test_crash(kvm_boot, kvm_guest_c, kvm_tap):
        kvm_tap(kvm_boot(kvm_guest_c(r'''
            #include <kvmpy/serial.h>
            void _start(void) {
                kvmpy_print("KTAP version 1\n1..2\nok 1 a\n");
                __asm__ volatile("lidt (%0); ud2" : : "r"(0x2000));
            }
        ''')))

    def test_beginning_gone(kvm_boot, kvm_guest_asm, kvm_tap, monkeypatch):
        monkeypatch.setattr("kvmpy.pytest_plugin.machines.HISTORY", 16)
        source = "mov cx, 40; mov dx, 0x3f8; mov al, 10; again: out dx, al; loop again; cli; hlt"
        kvm_tap(kvm_boot(kvm_guest_asm(source)))
"""


def test_each_point_of_tap_output_is_a_result_of_its_own(session: pytest.Pytester) -> None:
    session.makepyfile(TAP)
    result = run(session, "-v", "-rsx")
    for name in ("mixed", "green", "cut_off", "none", "crash"):
        assert result.stdout.str().count(f"::test_{name} ") >= 1
    result.stdout.fnmatch_lines([
        "*::test_mixed SUBPASSED?adds?*",
        "*::test_mixed SUBFAILED?divides?*",
        "*::test_mixed SUBSKIPPED?floats?*no unit*",
        "*::test_mixed SUBXFAIL?is fast?*",
        "*::test_mixed SUBPASSED?ends?*",
        "*::test_mixed FAILED*",
        "*::test_green SUBPASSED?a?*",
        "*::test_green SUBPASSED?b?*",
        "*::test_green PASSED*",
        "*::test_cut_off FAILED*",
    ])  # fmt: skip
    divides = failure(result, "test_mixed [divides]")
    assert "not ok: divides\n  got: 3\n" in divides
    assert "contains 1 failed subtest" in failure(result, "test_mixed")
    assert "the plan was 1..2, but 1 came" in failure(result, "test_cut_off")
    assert "no TAP or KTAP output was found" in failure(result, "test_none")
    assert "the first 24 bytes of the console are lost" in failure(result, "test_beginning_gone")
    crash = failure(result, "test_crash")
    assert "the guest ended: triple fault" in crash
    assert re.search(r"^-+ Captured kvm console -+\nKTAP version 1\n1\.\.2\nok 1 a\n", crash, re.MULTILINE)
    assert "Captured kvm console" not in divides
    result.stdout.fnmatch_lines(
        ["SUBSKIPPED?floats? ?1? test_each_point_of_tap_output_is_a_result_of_its_own.py:*no unit"]
    )


def test_without_subtests_one_failure_shows_all_points_that_failed(session: pytest.Pytester) -> None:
    session.makepyfile(TAP)
    result = run(session, "-p", "no:subtests", "-k", "mixed or green or cut_off")
    result.assert_outcomes(failed=2, passed=1)
    mixed = failure(result, "test_mixed")
    assert "test points from the guest: 5, failed: 1\nnot ok: divides\n  got: 3\n" in mixed
    assert "sub_results.py" not in mixed


PARALLEL = r"""
    import os
    import pytest

    @pytest.mark.parametrize("number", range(8))
    def test_guest(kvm_boot, kvm_guest_c, kvm_tap, tmp_path, number):
        program = kvm_guest_c('''
            #include <kvmpy/ktap.h>
            static void passes(void) { }
            static const struct ktap_test tests[] = { KTAP_TEST(passes), { } };
            static const struct ktap_suite suites[] = { { "suite", tests }, { } };
            void _start(void) { kvmpy_exit(ktap_run(suites)); }
        ''')
        result = kvm_boot(program)
        kvm_tap(result)
        assert result.exit_code == 0
        print("made", program.elf)

    def test_red(kvm_boot):
        assert kvm_boot(bytes.fromhex("b007 e6f4")).exit_code == 0
"""


def test_workers_of_xdist_share_compiled_guests_and_report_as_one_process_does(session: pytest.Pytester) -> None:
    session.makepyfile(PARALLEL)
    result = run(session, "-n", "2", "-rP", "-v")
    result.assert_outcomes(passed=8, failed=1)
    result.stdout.fnmatch_lines(["*8 subtests passed*"])
    assert "exited with code 15" in failure(result, "test_red")
    programs = set(re.findall(r"^made (.*)", result.stdout.str(), re.MULTILINE))
    assert len(programs) == 1
    (folder,) = session.path.glob("runpytest-0/kvmpy-guests")
    assert len(list(folder.iterdir())) == 1


def test_the_programs_of_the_page_about_it_do_what_the_page_says(session: pytest.Pytester) -> None:
    page = [(block.language, block.text) for block in blocks(PAGE)]
    (kernel,) = (text for language, text in page if language == "c")
    first, second = (text for language, text in page if language == "python")
    (session.path / "kernel.c").write_text(kernel)
    (session.path / "test_kernel.py").write_text(first)
    (session.path / "test_sector.py").write_text(second)
    result = run(session, "-v", "-W", "error")
    result.assert_outcomes(passed=2)
    shown = next(text for language, text in page if language == "text")
    result.stdout.fnmatch_lines([line.replace("[", "?").replace("]", "?") + "*" for line in shown.splitlines()])
