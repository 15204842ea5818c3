/* Which page frames are in use: one bit for each. */

#ifndef FRAMES_H
#define FRAMES_H

#define FRAMES 256
#define NO_FRAME (~0u)

extern unsigned long frames_in_use[FRAMES / 64];

/* The first of `count` adjacent free frames, which are in use then, or NO_FRAME. */
unsigned frames_allocate(unsigned count);
/* Returns how many of them were in use. */
unsigned frames_free(unsigned first, unsigned count);
unsigned frames_available(void);

#endif
