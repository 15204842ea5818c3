"""A server for 9P2000.L, the file protocol that Linux's v9fs speaks: one folder of the host, which cannot be left.

`messages` is the wire format, `folder` the one door to the host's files, `fids` what a client has open; the modules
`*_requests` have a function for each request, and `session` is the server. None of them knows virtio: the device
`kvmpy.virtio.Plan9` carries the messages.

The protocol is that of the Plan 9 manual, section 5 ("intro(5)"), with the requests that 9P2000.L replaces or adds, as
the protocol description of the server diod and Linux's include/net/9p/9p.h have them.
"""
