"""Virtio's disk (virtio 1.2, section 5.2): the device, the image behind it, and threads that read and write it."""
