"""Devices that trap to the hypervisor: each a class of its own, with registers as its data sheet names them."""
