"""Virtio's sockets between guest and host (virtio 1.2, section 5.10)."""
