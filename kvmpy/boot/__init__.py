"""Guest images: one module per format. The names here are imported when they are first used."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.boot.elf.image import ElfImage
    from kvmpy.boot.firmware import FirmwareImage
    from kvmpy.boot.flat import FlatImage
    from kvmpy.boot.image import Entry, Image, LoadedRange, RomMapping
    from kvmpy.boot.initramfs import Initramfs
    from kvmpy.boot.linux import LinuxKernel
    from kvmpy.boot.multiboot.kernel import MultibootKernel, MultibootModule

__all__ = [
    "ElfImage",
    "Entry",
    "FirmwareImage",
    "FlatImage",
    "Image",
    "Initramfs",
    "LinuxKernel",
    "LoadedRange",
    "MultibootKernel",
    "MultibootModule",
    "RomMapping",
]

_MODULES = {
    "ElfImage": "elf.image",
    "Entry": "image",
    "FirmwareImage": "firmware",
    "FlatImage": "flat",
    "Image": "image",
    "Initramfs": "initramfs",
    "LinuxKernel": "linux",
    "LoadedRange": "image",
    "MultibootKernel": "multiboot.kernel",
    "MultibootModule": "multiboot.kernel",
    "RomMapping": "image",
}


if not TYPE_CHECKING:  # a type checker that saw it would take every misspelt name for one of ours

    def __getattr__(name: str) -> object:
        module = _MODULES.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
