"""Virtio's network device (virtio 1.2, section 5.1), and what can be at the other end of its cable."""
