"""Framing of gdb's remote protocol: packets out of a stream of bytes, checksums, escapes, acknowledgements."""

from __future__ import annotations

import pytest

from kvmpy.debug.gdb.link import Link
from kvmpy.debug.gdb.packet import PACKET_SIZE, Mark, PacketReader, encode


def read_all(*pieces: bytes) -> list[bytes | Mark]:
    reader = PacketReader()
    items: list[bytes | Mark] = []
    for piece in pieces:
        reader.feed(piece)
        while (item := reader.next()) is not None:
            items.append(item)
    return items


def test_a_packet_is_its_payload_between_dollar_and_checksum() -> None:
    assert encode(b"OK") == b"$OK#9a"
    assert read_all(b"$OK#9a") == [b"OK"]
    assert read_all(b"$#00") == [b""]
    assert encode(b"") == b"$#00"


def test_the_checksum_may_be_in_upper_case() -> None:
    assert read_all(b"$OK#9A") == [b"OK"]


@pytest.mark.parametrize("damaged", [b"$OK#9b", b"$OK#zz", b"$OK# a", b"$ok}#57", b"$OK#+a"])
def test_a_wrong_checksum_and_a_lone_escape_are_damage(damaged: bytes) -> None:
    assert read_all(damaged, b"$OK#9a") == [Mark.DAMAGED, b"OK"]


def test_bytes_with_a_meaning_are_escaped() -> None:
    packet = encode(b"a#b$c}d*e")
    assert packet.startswith(b"$a}\x03b}\x04c}]d}\x0ae#")
    assert read_all(packet) == [b"a#b$c}d*e"]


def test_packets_arrive_in_any_pieces() -> None:
    stream = encode(b"qC") + b"+" + encode(b"X1,3:}\x03\x04") + b"\x03" + encode(b"g")
    expected: list[bytes | Mark] = [b"qC", Mark.ACK, b"X1,3:}\x03\x04", Mark.INTERRUPT, b"g"]
    assert read_all(stream) == expected
    assert read_all(*(bytes([byte]) for byte in stream)) == expected


def test_ctrl_c_within_a_packet_is_data() -> None:
    assert read_all(encode(b"X0,1:\x03")) == [b"X0,1:\x03"]


def test_noise_between_packets_is_skipped() -> None:
    assert read_all(b"\0\xffnoise", b"more" + encode(b"g"), b"%nothing") == [b"g"]


def test_a_packet_that_begins_again_counts_from_there() -> None:
    assert read_all(b"$m1000,4" + encode(b"g")) == [b"g"]


def test_the_longest_packet_fits_and_one_byte_more_does_not() -> None:
    assert read_all(encode(b"m" * PACKET_SIZE)) == [b"m" * PACKET_SIZE]
    assert read_all(encode(b"m" * (PACKET_SIZE + 1)), encode(b"g")) == [Mark.TOO_LONG, b"g"]


def test_a_packet_without_end_is_not_kept() -> None:
    reader = PacketReader()
    reader.feed(b"$")
    for _ in range(200):
        reader.feed(b"m" * 0x1000)
        assert reader.next() is None
        assert len(reader) <= PACKET_SIZE + 0x1000
    reader.feed(b"#00")
    assert reader.next() is Mark.TOO_LONG
    reader.feed(encode(b"g"))
    assert reader.next() == b"g"
    assert len(reader) == 0


def test_an_endless_packet_ends_where_another_begins() -> None:
    assert read_all(b"$" + b"m" * (PACKET_SIZE + 5), b"mm" + encode(b"g")) == [b"g"]


def exchange(link: Link, data: bytes) -> list[bytes | Mark | None]:
    link.feed(data)
    items = []
    while (item := link.next()) is not None:
        items.append(item)
    return list(items)


def test_packets_are_acknowledged() -> None:
    link = Link()
    assert exchange(link, encode(b"g")) == [b"g"]
    assert link.output == b"+"


def test_damage_is_asked_for_again() -> None:
    link = Link()
    exchange(link, b"$g#00")
    assert link.output == b"-"


def test_a_packet_that_gdb_did_not_get_is_sent_again() -> None:
    link = Link()
    link.send(b"OK")
    link.send(b"T05")
    link.output.clear()
    exchange(link, b"+-")
    assert link.output == encode(b"T05")


def test_nothing_is_acknowledged_any_more_when_both_sides_agreed() -> None:
    link = Link()
    link.send(b"OK")
    link.stop_acknowledging()
    link.output.clear()
    assert exchange(link, b"+-" + encode(b"g")) == [Mark.ACK, Mark.ACK, b"g"]
    assert link.output == b""
    assert exchange(link, b"$g#00") == [Mark.DAMAGED], "else gdb would wait for ever"
