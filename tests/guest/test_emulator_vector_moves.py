"""Moves of vectors and of their elements in software, against the processor, with what they raise."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from instruction_batch import Batch, assemble_each, compare_forms
from instruction_comparison import DATA, RAM, Comparison, Given, PlainProcessor, comparison
from instruction_forms import codes_of, states_of
from kvmpy.x86.emulator import GuestException, perform
from kvmpy.x86.page_tables import PageTables
from kvmpy.x86.paging import PagingMode
from vector_cases import listed, vector_state

pytestmark = pytest.mark.kvm

UD, NM, GP = 6, 7, 13

OTHERS = """
lddqu xmm1, [rsi + 1] | vlddqu xmm1, [rsi + 1] | vlddqu ymm1, [rsi + 1]
movntdqa xmm1, [rsi] | vmovntdqa xmm1, [rsi] | vmovntdqa ymm1, [rsi + 32]
movntps [rsi], xmm1 | vmovntps [rsi], xmm1 | vmovntps [rsi + 32], ymm1
movntpd [rsi], xmm1 | vmovntpd [rsi], xmm1 | vmovntpd [rsi + 32], ymm1
movntdq [rsi], xmm1 | vmovntdq [rsi], xmm1 | vmovntdq [rsi + 32], ymm1
movss xmm1, xmm12 | movss xmm1, [rsi + 1] | movss [rsi + 1], xmm1 | vmovss xmm1, xmm2, xmm3 | vmovss xmm1, [rsi]
| vmovss [rsi], xmm9
movsd xmm1, xmm12 | movsd xmm1, [rsi + 1] | movsd [rsi + 1], xmm1 | vmovsd xmm1, xmm2, xmm3 | vmovsd xmm1, [rsi]
| vmovsd [rsi], xmm9
.byte 0xf3, 0x0f, 0x11, 0xca | .byte 0xf2, 0x0f, 0x11, 0xca | .byte 0xc5, 0xea, 0x11, 0xcb
| .byte 0xc5, 0xeb, 0x11, 0xcb
movd xmm1, ebx | movd xmm1, [rsi + 1] | movd ebx, xmm1 | movd [rsi + 1], xmm1 | vmovd xmm1, r9d | vmovd xmm1, [rsi]
| vmovd r9d, xmm1 | vmovd [rsi], xmm1
movq xmm1, rbx | movq xmm1, [rsi + 1] | movq rbx, xmm1 | movq [rsi + 1], xmm1 | vmovq xmm1, r9 | vmovq xmm1, [rsi]
| vmovq r9, xmm1 | vmovq [rsi], xmm1
movq xmm9, xmm1 | .byte 0x66, 0x0f, 0xd6, 0xca | vmovq xmm9, xmm1 | .byte 0xc5, 0xf9, 0xd6, 0xca
| rex.w movq xmm1, [rsi]
movlps xmm1, [rsi + 1] | movlps [rsi + 1], xmm1 | vmovlps xmm1, xmm2, [rsi] | vmovlps [rsi], xmm9
movlpd xmm1, [rsi + 1] | movlpd [rsi + 1], xmm1 | vmovlpd xmm1, xmm2, [rsi] | vmovlpd [rsi], xmm9
movhps xmm1, [rsi + 1] | movhps [rsi + 1], xmm1 | vmovhps xmm1, xmm2, [rsi] | vmovhps [rsi], xmm9
movhpd xmm1, [rsi + 1] | movhpd [rsi + 1], xmm1 | vmovhpd xmm1, xmm2, [rsi] | vmovhpd [rsi], xmm9
movhlps xmm1, xmm12 | vmovhlps xmm1, xmm2, xmm3
movlhps xmm1, xmm12 | vmovlhps xmm1, xmm2, xmm3
pinsrb xmm1, ebx, 13 | pinsrb xmm1, [rsi + 3], 0 | vpinsrb xmm1, xmm2, ebx, 13 | vpinsrb xmm1, xmm2, [rsi + 3], 20
pinsrw xmm1, ebx, 5 | pinsrw xmm1, [rsi + 3], 0 | vpinsrw xmm1, xmm2, ebx, 13 | vpinsrw xmm1, xmm2, [rsi + 3], 2
pinsrd xmm1, ebx, 3 | pinsrd xmm1, [rsi + 3], 0 | vpinsrd xmm1, xmm2, ebx, 13 | vpinsrd xmm1, xmm2, [rsi + 3], 2
pinsrq xmm1, rbx, 1 | pinsrq xmm1, [rsi + 3], 0 | vpinsrq xmm1, xmm2, rbx, 13 | vpinsrq xmm1, xmm2, [rsi + 3], 2
pextrb ebx, xmm1, 13 | pextrb [rsi + 3], xmm1, 0 | vpextrb ebx, xmm2, 31 | vpextrb [rsi + 3], xmm2, 2
pextrw ebx, xmm1, 5 | pextrw [rsi + 3], xmm1, 0 | vpextrw ebx, xmm2, 13 | vpextrw [rsi + 3], xmm2, 2
| .byte 0x66, 0x0f, 0x3a, 0x15, 0xcb, 3
pextrd ebx, xmm1, 3 | pextrd [rsi + 3], xmm1, 0 | vpextrd ebx, xmm2, 13 | vpextrd [rsi + 3], xmm2, 2
pextrq rbx, xmm1, 1 | pextrq [rsi + 3], xmm1, 0 | vpextrq rbx, xmm2, 13 | vpextrq [rsi + 3], xmm2, 2
extractps ebx, xmm1, 3 | extractps [rsi + 3], xmm1, 0 | vextractps ebx, xmm2, 13 | vextractps [rsi + 3], xmm2, 2
insertps xmm1, xmm2, 0x9d | insertps xmm1, [rsi + 3], 0x62 | vinsertps xmm1, xmm2, xmm3, 0xf0
| vinsertps xmm1, xmm2, [rsi], 0x1e
movmskps ebx, xmm1 | movmskps r9, xmm12 | vmovmskps ebx, xmm1 | vmovmskps ebx, ymm1
movmskpd ebx, xmm1 | movmskpd r9, xmm12 | vmovmskpd ebx, xmm1 | vmovmskpd ebx, ymm1
pmovmskb ebx, xmm1 | pmovmskb r9, xmm12 | vpmovmskb ebx, xmm1 | vpmovmskb ebx, ymm1
ptest xmm1, xmm2 | ptest xmm1, [rsi] | vptest xmm1, [rsi + 1] | vptest ymm1, ymm2
vmaskmovps xmm1, xmm2, [rsi] | vmaskmovps ymm1, ymm2, [rsi + 1] | vmaskmovps [rsi], xmm2, xmm1
| vmaskmovps [rsi], ymm2, ymm1
vmaskmovpd xmm1, xmm2, [rsi] | vmaskmovpd ymm1, ymm2, [rsi + 1] | vmaskmovpd [rsi], xmm2, xmm1
| vmaskmovpd [rsi], ymm2, ymm1
vpmaskmovd xmm1, xmm2, [rsi] | vpmaskmovd ymm1, ymm2, [rsi + 1] | vpmaskmovd [rsi], xmm2, xmm1
| vpmaskmovd [rsi], ymm2, ymm1
vpmaskmovq xmm1, xmm2, [rsi] | vpmaskmovq ymm1, ymm2, [rsi + 1] | vpmaskmovq [rsi], xmm2, xmm1
| vpmaskmovq [rsi], ymm2, ymm1
vzeroupper
vzeroall
ldmxcsr [rsi] | vldmxcsr [rsi] | ldmxcsr [rsi + 64] | vldmxcsr [rsi + 64]
stmxcsr [rsi + 1] | vstmxcsr [rsi + 1]
"""

FORMS = listed(OTHERS)
for name in ["movups", "movupd", "movaps", "movapd", "movdqu", "movdqa"]:
    aligned = name in ("movaps", "movapd", "movdqa")
    memory = "[rsi + 32]" if aligned else "[rsi + rdi + 1]"
    FORMS[name] = [
        f"{name} xmm1, xmm12", f"{name} xmm9, {memory}", f"{name} {memory}, xmm9",
        f"v{name} xmm1, xmm2", f"v{name} ymm1, ymm12", f"v{name} ymm8, {memory}", f"v{name} {memory}, ymm8",
        f"v{name} xmm8, {memory}", f"v{name} {memory}, xmm8", f"v{name}.s ymm1, ymm2", f"{name}.s xmm1, xmm2",
    ]  # fmt: skip
MISALIGNED = [
    "movaps xmm1, [rsi + 1]", "movaps [rsi + 8], xmm1", "movdqa xmm1, [rsi + 1]", "vmovdqa ymm1, [rsi + 16]",
    "vmovaps [rsi + 16], ymm1", "movntdq [rsi + 1], xmm1", "vmovntdqa ymm1, [rsi + 16]", "pxor xmm1, [rsi + 1]",
    "paddb xmm1, [rsi + 8]", "pshufd xmm1, [rsi + 1], 3", "psllw xmm1, [rsi + 1]", "ptest xmm1, [rsi + 8]",
]  # fmt: skip


def state(chance: random.Random, number: int, place: int) -> Given:
    """As for all vectors; 64 bytes on there is what LDMXCSR takes."""
    given = vector_state(chance, number, place)
    data = bytearray(given.data)
    data[64:68] = (0x1F80 | chance.getrandbits(16) & 0xE07F).to_bytes(4, "little")
    given.data = bytes(data)
    return given


states = states_of(state, "vector moves")
codes = codes_of(FORMS, MISALIGNED)


@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])


def test_memory_that_has_to_be_aligned_is_checked(states: Batch, codes: dict[str, bytes]) -> None:
    compare_forms(states, codes, MISALIGNED)
    for form in MISALIGNED:
        assert states.software(codes[form], 0).exception == (GP, 0, None)


@pytest.fixture(scope="module")
def processors() -> Iterator[Comparison]:
    """Memory as it is, and three pages in a row: the middle one lies elsewhere, the last one is not there."""
    with comparison() as pair:
        pages = PageTables(pair.memory, PagingMode.LEVEL4, pair.state.sregs.cr3, size=0x8000)
        pages.map(0, 0, RAM, user=True, page_size=RAM)
        pages.map(PAGES, DATA, 0x1000, user=True)
        pages.map(PAGES + 0x1000, ELSEWHERE, 0x1000, user=True)
        yield pair


PAGES, ELSEWHERE = 0x4000_0000, DATA + 0x4000
ACROSS = listed("""
movups xmm1, [rsi] | movups [rsi], xmm1 | vmovdqu ymm1, [rsi] | vmovdqu [rsi], ymm1 | movq [rsi], xmm1
| movhps xmm1, [rsi]
pinsrq xmm1, [rsi], 1 | pmovzxbw xmm1, [rsi] | vpaddb ymm1, ymm2, [rsi] | vpmaskmovd ymm1, ymm2, [rsi]
| vpmaskmovd [rsi], ymm2, ymm1
""")


@pytest.mark.parametrize("form", [form for forms in ACROSS.values() for form in forms])
def test_operands_cross_pages_that_lie_apart_and_into_ones_that_are_not_there(
    processors: Comparison, form: str
) -> None:
    code, memory = assemble_each([form])[form], processors.memory
    chance = random.Random(form)
    faults = 0
    for number in range(64):
        given = vector_state(chance, number, 0)
        given.xsave += bytes(0x1000 - len(given.xsave))
        given.general[4] = PAGES + (0x1000, 0x2000)[number % 2] - number // 2 - 1
        given.data = chance.randbytes(0x1000)
        other = chance.randbytes(0x1000)
        memory.write(ELSEWHERE, other)
        native = processors.native(code, given)
        there = memory.read(ELSEWHERE, 0x1000)
        memory.write(ELSEWHERE, other)
        software = processors.software(code, given)
        assert memory.read(ELSEWHERE, 0x1000) == there
        native.xsave = software.xsave = b""
        assert software == native, (number, hex(given.general[4]))
        faults += software.exception is not None
    assert faults > 3


FORBIDDEN = listed("""
pxor xmm1, xmm2 | movups xmm1, [rsi] | movd eax, xmm1 | ldmxcsr [rsi]
vpxor xmm1, xmm2, xmm3 | vmovups ymm1, [rsi] | vzeroupper | vldmxcsr [rsi]
""")


@pytest.mark.parametrize("form", [form for forms in FORBIDDEN.values() for form in forms])
def test_control_registers_can_forbid_them(processors: Comparison, form: str) -> None:
    code = assemble_each([form])[form] + bytes(15)
    vex = form.startswith("v")

    processors.memory.write(DATA, bytes(64))

    def exception(cr0: int, cr4: int, xcr0: int) -> int | None:
        state = processors.state.copy()
        state.sregs.cr0, state.sregs.cr4 = cr0, cr4
        general = [DATA] * 16 + [0x1000, 2]
        cpu = PlainProcessor(processors.memory, state.sregs, general, bytes(0x1000))
        cpu.enabled = xcr0
        try:
            perform(cpu, code, 64)
        except GuestException as raised:
            return raised.event.vector
        return None

    pe, mp, em, ts = 1, 2, 4, 8
    pae, osfxsr, osxsave = 1 << 5, 1 << 9, 1 << 18
    usual = 1 << 31 | pe | mp
    all_on = pae | osfxsr | osxsave
    assert exception(usual, all_on, 7) is None
    assert exception(usual | ts, all_on, 7) == NM
    assert exception(usual | em, all_on, 7) == (None if vex else UD)
    assert exception(usual | em | ts, all_on, 7) == (NM if vex else UD)
    assert exception(usual, all_on & ~osfxsr, 7) == (None if vex else UD)
    assert exception(usual, all_on & ~osxsave, 7) == (UD if vex else None)
    assert exception(usual, all_on, 3) == (UD if vex else None)


@pytest.mark.parametrize(
    "code",
    ["c5 f1 10 06", "c5 f0 77", "c4 e2 69 30 c1", "c4 e2 75 41 c2", "c5 fc 16 06", "c4 e3 69 39 c8 01", "f0 0f 57 c1"],
)  # fmt: skip
def test_vex_fields_that_do_not_fit_are_an_undefined_opcode(processors: Comparison, code: str) -> None:
    """VEX.vvvv in use where there is no such source, VEX.L of a form that is not there, LOCK."""
    given = vector_state(random.Random(code), 0, DATA)
    given.xsave += bytes(0x1000 - len(given.xsave))
    native, software = (make(bytes.fromhex(code), given) for make in (processors.native, processors.software))
    assert software.exception == native.exception == (UD, None, None)
