"""ELF images (System V gABI, chapters 4 and 5): loading them, and their sections and symbols."""
