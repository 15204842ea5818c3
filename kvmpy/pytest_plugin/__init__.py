"""The pytest plugin: fixtures that run guests, the marker `kvm`, and failures that show why a guest ended.

Loaded by every pytest of an environment that kvmpy is installed in, so all that costs anything is imported when a
fixture is used. docs/testing-kernels.md shows how the parts go together; `pytest --fixtures` lists the fixtures.

The names `Kvm...` are the types of the fixtures, for annotations.
"""

from __future__ import annotations

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from kvmpy.kvm import Vcpu
    from kvmpy.pytest_plugin.boot import BootResult as BootResult
    from kvmpy.pytest_plugin.boot import KvmBoot as KvmBoot
    from kvmpy.pytest_plugin.guest_programs import KvmGuestAsm as KvmGuestAsm
    from kvmpy.pytest_plugin.guest_programs import KvmGuestC as KvmGuestC
    from kvmpy.pytest_plugin.guests import Guests
    from kvmpy.pytest_plugin.machines import FixtureMachine as FixtureMachine
    from kvmpy.pytest_plugin.machines import KvmMachine as KvmMachine
    from kvmpy.pytest_plugin.sub_results import KvmTap as KvmTap

__all__ = ["BootResult", "FixtureMachine", "KvmBoot", "KvmGuestAsm", "KvmGuestC", "KvmMachine", "KvmTap"]

_HOMES = {
    "BootResult": "boot",
    "FixtureMachine": "machines",
    "KvmBoot": "boot",
    "KvmGuestAsm": "guest_programs",
    "KvmGuestC": "guest_programs",
    "KvmMachine": "machines",
    "KvmTap": "sub_results",
}

_RUN_GUESTS = frozenset(("kvm_boot", "kvm_machine", "kvm_vcpu"))
"""Fixtures whose tests need KVM, marked or not."""

_guests = pytest.StashKey["Guests"]()

if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("kvmpy", "guests on KVM").addoption(
        "--require-kvm",
        action="store_true",
        help="fail tests that would be skipped because /dev/kvm or a tool is missing (as KVMPY_REQUIRE_KVM=1 does)",
    )
    parser.addini("kvm_deadline", "seconds that the guests of one test may run (default 60)", default="60")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "kvm(deadline=None): runs a guest on /dev/kvm: skipped, saying why, where that is not possible; "
        "deadline: seconds that the guests of the test may run (default: ini option kvm_deadline)",
    )
    _seconds(config.getini("kvm_deadline"), "ini option kvm_deadline", pytest.UsageError)


def _seconds(value: object, what: str, error: type[Exception]) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = 0.0
    if not seconds > 0:
        raise error(f"{what}: a positive number of seconds is needed, not {value!r}")
    return seconds


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not _RUN_GUESTS.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.kvm)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if _guests in item.stash:  # the test runs once more
        del item.stash[_guests]
    if item.get_closest_marker("kvm") is not None:
        from kvmpy.pytest_plugin.requirement import require_kvm

        require_kvm(item.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (guests := item.stash.get(_guests, None)) is not None:
        guests.describe(report)
    return report


def _guests_of(request: pytest.FixtureRequest) -> Guests:
    """What the plugin knows of the guests of this test."""
    item: pytest.Item = request.node
    if _guests not in item.stash:
        from kvmpy.pytest_plugin.deadline import Deadline
        from kvmpy.pytest_plugin.guests import Guests

        debugged = any(item.config.getoption(name, default=False) for name in ("usepdb", "trace"))
        item.stash[_guests] = Guests(Deadline(float("inf") if debugged else _seconds_of(item)))
    return item.stash[_guests]


def _seconds_of(item: pytest.Item) -> float:
    """What the nearest marker says that says something, or the ini option."""
    value: object = None
    for marker in item.iter_markers("kvm"):
        if marker.args or marker.kwargs.keys() - {"deadline"}:
            raise ValueError(f"pytest.mark.kvm takes deadline=seconds and nothing else; {item.nodeid} has {marker}")
        value = marker.kwargs.get("deadline") if value is None else value
    value = item.config.getini("kvm_deadline") if value is None else value
    return _seconds(value, f"deadline of {item.nodeid}", ValueError)


@pytest.fixture
def kvm_machine(request: pytest.FixtureRequest) -> Iterator[KvmMachine]:
    """Makes machines: `machine = kvm_machine(memory=16 * MiB, vcpus=1)`.

    Each is a `kvmpy.Machine` with a serial port (`machine.console`), a debug console at port 0xE9
    (`machine.debug_console`) and a debug-exit port at 0xF4 (`machine.exit_code`), closed at the end of the test.
    """
    from kvmpy.pytest_plugin.machines import KvmMachine
    from kvmpy.pytest_plugin.requirement import require_kvm

    require_kvm(request.config)
    with KvmMachine(_guests_of(request)) as factory:
        yield factory


@pytest.fixture
def kvm_boot(kvm_machine: KvmMachine) -> KvmBoot:
    """Runs a guest to its end: `result = kvm_boot("kernel.elf")`; then `assert result.exit_code == 0`."""
    from kvmpy.pytest_plugin.boot import KvmBoot

    return KvmBoot(kvm_machine)


@pytest.fixture
def kvm_vcpu(request: pytest.FixtureRequest) -> Iterator[Vcpu]:
    """A bare vCPU, in real mode at 0x1000, in a VM with 1 MiB of RAM.

    Write a program with `kvm_vcpu.vm.memory.write(0x1000, code)`, then `kvm_vcpu.run()`.
    """
    from kvmpy.pytest_plugin.requirement import require_kvm
    from kvmpy.pytest_plugin.vcpus import bare_vcpu

    require_kvm(request.config)
    with bare_vcpu(_guests_of(request)) as vcpu:
        yield vcpu


@pytest.fixture
def kvm_guest_asm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KvmGuestAsm:
    """Assembles a guest with GNU as, in Intel syntax: `kvm_guest_asm("hlt", bits=16, address=0x1000)`."""
    from kvmpy.pytest_plugin.guest_programs import KvmGuestAsm, session_toolchain

    return KvmGuestAsm(request, session_toolchain(request.config, tmp_path_factory))


@pytest.fixture
def kvm_guest_c(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KvmGuestC:
    """Compiles a freestanding guest with gcc: `kvm_guest_c("kernel/main.c", "kernel/idt.c", bits=64)`."""
    from kvmpy.pytest_plugin.guest_programs import KvmGuestC, session_toolchain

    return KvmGuestC(request, session_toolchain(request.config, tmp_path_factory))


@pytest.fixture
def kvm_tap(request: pytest.FixtureRequest) -> KvmTap:
    """Shows each test point of TAP or KTAP output as a result of its own: `kvm_tap(result)`."""
    from kvmpy.pytest_plugin.sub_results import KvmTap

    return KvmTap(request, _guests_of(request))
