"""Virtio's console (virtio 1.2, section 5.3) and its ports."""
