"""The option --cpu: a CPU template by name, or a JSON file that holds one."""

import argparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.x86.cpu_templates import CpuTemplate

__all__ = ["HELP", "cpu"]

HELP = "host (the default), portable, plain, or a JSON file that holds a template; see `kvmpy cpu --help`"


def cpu(text: str) -> "str | CpuTemplate":
    """What `Machine` takes as `cpu`. A name comes before a file of that name."""
    if text == "host":  # without loading what only templates need
        return text
    from kvmpy.errors import UsageError
    from kvmpy.x86.cpu_templates import TEMPLATES, load

    if text in TEMPLATES:
        return TEMPLATES[text]
    try:
        return load(text)
    except FileNotFoundError:
        names = ", ".join(TEMPLATES)
        raise argparse.ArgumentTypeError(f"{text!r} is neither a CPU template ({names}) nor a file") from None
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
