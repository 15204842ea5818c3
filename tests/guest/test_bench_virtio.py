"""kvmpy bench counts the exits of virtio requests, and finds its targets met: counts are no timings."""

import pytest

from kvmpy.bench import virtio_requests
from kvmpy.bench.contenders import Contenders
from kvmpy.bench.session import Session
from kvmpy.pytest_plugin.requirement import skip_or_fail


@pytest.mark.parametrize("work", virtio_requests.WORKS, ids=lambda work: work.name)
def test_a_round_of_requests_takes_the_exits_that_it_should(
    work: virtio_requests.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtio_requests, "WORKS", (work,))
    with Contenders(qemu=False) as contenders:
        if contenders.no_c:
            skip_or_fail(contenders.no_c)
        exits, microseconds = virtio_requests.measure(Session(contenders, rounds=1, scale=0.01))
    assert (exits.unit, exits.samples.values, exits.met) == ("exits", (work.exits,), True)
    assert microseconds.samples.median > 0
