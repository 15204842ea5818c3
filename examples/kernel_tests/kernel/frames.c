#include "frames.h"

unsigned long frames_in_use[FRAMES / 64];

static int in_use(unsigned frame)
{
    return frames_in_use[frame / 64] >> (frame % 64) & 1;
}

unsigned frames_allocate(unsigned count)
{
    unsigned run = 0;

    if (count == 0)
        return NO_FRAME;
    for (unsigned frame = 0; frame < FRAMES; frame++) {
        run = in_use(frame) ? 0 : run + 1;
        if (run == count) {
            for (unsigned each = frame + 1 - count; each <= frame; each++)
                frames_in_use[each / 64] |= 1ul << (each % 64);
            return frame + 1 - count;
        }
    }
    return NO_FRAME;
}

unsigned frames_free(unsigned first, unsigned count)
{
    unsigned freed = 0;

    for (unsigned frame = first; frame < FRAMES && frame - first < count; frame++) {
        freed += in_use(frame);
        frames_in_use[frame / 64] &= ~(1ul << (frame % 64));
    }
    return freed;
}

unsigned frames_available(void)
{
    unsigned available = 0;

    for (unsigned frame = 0; frame < FRAMES; frame++)
        available += !in_use(frame);
    return available;
}
