"""What `kvmpy bench` runs: kvmpy against a plain C loop and QEMU, in one run, in turns."""
