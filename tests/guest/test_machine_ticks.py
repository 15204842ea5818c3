"""What a machine does from time to time (look whether the guest can go on, arm repairs) it does among kicks, too."""

import threading
import time

from kvmpy import Machine
from kvmpy.boot import FlatImage
from kvmpy.machine.outcome import End

_CLI_HLT = b"\xfa\xf4"
_ORG = 0x7C00


def test_a_guest_that_halts_for_ever_is_noticed_among_kicks() -> None:
    done = threading.Event()
    with Machine() as machine:
        machine.load(FlatImage(_CLI_HLT, address=_ORG, mode="real"))

        def kick() -> None:
            while not done.is_set():
                machine.runners[0].post(lambda: None)
                time.sleep(0.001)

        kicker = threading.Thread(target=kick)
        kicker.start()
        try:
            outcome = machine.run(timeout=20)
        finally:
            done.set()
            kicker.join()
    assert outcome.end is End.HALTED
