"""What a guest does, event by event, with times: recorded in memory or written as text, JSON lines, for Perfetto, or as
a page for the browser. `Machine.trace` and `kvmpy trace` make a `Tracer`; docs/tracing.md explains the formats."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.debug.trace.event import KINDS as KINDS
    from kvmpy.debug.trace.event import TraceEvent as TraceEvent
    from kvmpy.debug.trace.selection import Selection as Selection
    from kvmpy.debug.trace.tracer import TraceError as TraceError
    from kvmpy.debug.trace.tracer import Tracer as Tracer

__all__ = ["KINDS", "Selection", "TraceError", "TraceEvent", "Tracer"]

_MODULE_OF = {
    "KINDS": "event", "Selection": "selection", "TraceError": "tracer", "TraceEvent": "event", "Tracer": "tracer",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"kvmpy.debug.trace.{_MODULE_OF[name]}"), name)
