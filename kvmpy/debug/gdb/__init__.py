"""gdb's remote serial protocol (gdb manual, appendix E "gdb Remote Serial Protocol") for a machine.

`server.GdbServer` is what one uses. Below it: `socket_server` (one gdb at a time, one thread), `session` (what each
packet does), `link` and `packet` (bytes), `target_description` (what gdb is told of the registers), and `target`, the
interface to what is debugged, behind which `machine_target` puts a real machine.
"""
