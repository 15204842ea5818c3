"""See inside a guest: crash reports, traces, breakpoints, a gdb server, coverage, symbols and disassembly.

`Machine` has a method for each of them; what stands here is for those who want the parts.
"""
