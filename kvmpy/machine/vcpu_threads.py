"""The threads that vCPUs run in."""

import threading

from kvmpy.machine.run_control import RunControl
from kvmpy.machine.vcpu_runner import VcpuRunner

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal  # see kvmpy.kvm.kick

__all__ = ["run_in_thread"]

# Signals of the process are the main thread's; those that a thread causes itself must stay open.
_OWN = {
    signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS,
}  # fmt: skip


def run_in_thread(runner: VcpuRunner, control: RunControl) -> threading.Thread:
    """Start a thread that runs one vCPU; what it raises ends the run of the whole machine."""

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _OWN)
        try:
            runner.run()
        except BaseException as error:
            control.fail(error)

    thread = threading.Thread(target=run, name=f"kvmpy vCPU {runner.vcpu.id}", daemon=True)
    thread.start()
    return thread
