"""POPCNT, LZCNT, BMI, ADX, CRC32, MOVBE and CMPXCHG16B in software, against the processor."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from gnu_toolchain import assemble
from instruction_batch import Batch, assemble_each, batch, compare_batch, xsave_image
from instruction_comparison import DATA, Comparison, Given, compare, comparison
from kvmpy.x86.emulator import GuestException, decode

pytestmark = pytest.mark.kvm

FORMS = """
popcnt ax, bx | popcnt eax, ebx | popcnt r9, r10 | popcnt eax, [rsi] | popcnt rax, [rsi + rdi * 8 + 5]
lzcnt ax, bx | lzcnt eax, r9d | lzcnt rax, rbx | lzcnt rax, [rsi]
tzcnt ax, bx | tzcnt r8d, ebx | tzcnt rax, rbx | tzcnt eax, [rsi + 1]
andn eax, ebx, ecx | andn r8, r9, [rsi]
bextr eax, ebx, ecx | bextr rax, [rsi], rcx
blsr eax, ebx | blsr r11, [rsi]
blsmsk eax, ebx | blsmsk rax, [rsi + 3]
blsi eax, ebx | blsi rax, r15
bzhi eax, ebx, ecx | bzhi rax, [rsi], rcx
pdep eax, ebx, ecx | pdep rax, rbx, [rsi]
pext eax, ebx, ecx | pext rax, rbx, [rsi]
mulx eax, ebx, ecx | mulx rax, rax, [rsi] | mulx r8, r9, r10
rorx eax, ebx, 13 | rorx rax, [rsi], 77
sarx eax, ebx, ecx | sarx rax, [rsi], rcx
shlx eax, ebx, ecx | shlx rax, rbx, rcx
shrx eax, ebx, ecx | shrx rax, rbx, rcx
adcx eax, ebx | adcx rax, [rsi] | adox eax, ebx | adox rax, [rsi]
crc32 eax, bl | crc32 eax, bh | crc32 r8d, r9b | crc32 eax, sil | crc32 eax, bx | crc32 eax, ebx | crc32 rax, rbx
crc32 eax, byte ptr [rsi] | crc32 rax, qword ptr [rsi + 1]
movbe ax, [rsi] | movbe eax, [rsi] | movbe rax, [rsi + 1] | movbe [rsi], bx | movbe [rsi], ebx | movbe [rsi + 7], rbx
popcnt eax, fs:[rsi] | popcnt eax, [esi]
"""

CASES = 1000
SOURCES = [form.strip() for form in FORMS.replace("\n", "|").split("|") if form.strip()]
EXCHANGES = ["lock cmpxchg16b [rsi + 16]", "cmpxchg16b [rsi + 16]"]


@pytest.fixture(scope="module")
def codes() -> dict[str, bytes]:
    return assemble_each([*SOURCES, *EXCHANGES])


@pytest.fixture(scope="module")
def states() -> Iterator[Batch]:
    def given(chance: random.Random, number: int, place: int) -> Given:
        given = Given.random(chance)
        given.general[4] = place  # RSI
        given.general[5] = number % 4  # RDI
        given.xsave = xsave_image(chance, 1)
        return given

    with batch(given, "bit manipulation", CASES) as made:
        yield made


@pytest.mark.parametrize("source", SOURCES)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], source: str) -> None:
    code = codes[source]
    compare_batch(states, code, undefined=decode(code + bytes(15), 64)[0].undefined)


@pytest.fixture(scope="module")
def processors() -> Iterator[Comparison]:
    with comparison() as pair:
        yield pair


def test_an_operand_may_be_addressed_by_rip(processors: Comparison) -> None:
    compare(processors, "popcnt eax, [rip + 0x6ff8]", 100, lambda number, given: None)


def test_cmpxchg16b_exchanges_when_equal_and_loads_when_not(codes: dict[str, bytes]) -> None:
    def given(chance: random.Random, number: int, place: int) -> Given:
        given = Given.random(chance)
        given.general[4] = place
        if number % 2:
            given.general[0] = int.from_bytes(given.data[16:24], "little")
            given.general[3] = int.from_bytes(given.data[24:32], "little")
        given.xsave = xsave_image(chance, 1)
        return given

    with batch(given, "cmpxchg16b", CASES) as states:
        for source in EXCHANGES:
            compare_batch(states, codes[source])


def test_cmpxchg16b_at_an_odd_place_is_a_general_protection_fault(processors: Comparison) -> None:
    given = Given([0] * 16)
    given.general[4] = DATA
    fault = processors.fault(assemble("cmpxchg16b [rsi + 8]", bits=64), given)
    assert isinstance(fault, GuestException)
    assert (fault.event.vector, fault.event.error_code) == (13, 0)
