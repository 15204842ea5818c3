/* The functions that gcc expects even of a freestanding program, and two more. */

#ifndef STRING_H
#define STRING_H

#include <stddef.h>

void *memcpy(void *restrict to, const void *restrict from, size_t count);
void *memmove(void *to, const void *from, size_t count);
void *memset(void *to, int value, size_t count);
int memcmp(const void *left, const void *right, size_t count);
size_t strlen(const char *text);
/* Copies as much of `from` as fits into `size` bytes, and always ends it. Returns strlen(from). */
size_t strlcpy(char *to, const char *from, size_t size);

#endif
