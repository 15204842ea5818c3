"""Machines made of vCPUs, memory and devices: buses, the run loop, threads, outcomes."""

from kvmpy.machine.machine import Machine
from kvmpy.machine.outcome import End, Outcome

__all__ = ["End", "Machine", "Outcome"]
