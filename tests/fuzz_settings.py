"""How many examples Hypothesis tries, by profile.

HYPOTHESIS_PROFILE chooses "dev" (the default) or "ci". Tests under tests/fuzz/ get `FUZZ_EXAMPLES` each without asking
(tests/conftest.py loads a profile of their own while it imports them); KVMPY_FUZZ_EXAMPLES overrides that number, for a
long night or for bisecting. A test elsewhere that wants as many says `@settings(max_examples=FUZZ_EXAMPLES)`.
"""

import os

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "dev")
"""The name of the profile in force."""

PROPERTY_EXAMPLES = {"dev": 50, "ci": 300}
"""Examples of an ordinary property test, by profile."""

if PROFILE not in PROPERTY_EXAMPLES:
    raise ValueError(f"HYPOTHESIS_PROFILE={PROFILE!r}: choose one of {', '.join(PROPERTY_EXAMPLES)}")

_ASKED_FOR = os.environ.get("KVMPY_FUZZ_EXAMPLES")

FUZZ_EXAMPLES = int(_ASKED_FOR or {"dev": 200, "ci": 2_000}[PROFILE])
"""Examples of a test under tests/fuzz/."""

DEVICE_EXAMPLES = int(_ASKED_FOR or {"dev": 200, "ci": 10_000}[PROFILE])
"""Accesses of a guest to one device, of which there are more ways to go wrong, and which are quick."""
