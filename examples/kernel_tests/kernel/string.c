#include "string.h"

void *memcpy(void *restrict to, const void *restrict from, size_t count)
{
    void *start = to;

    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    return start;
}

void *memmove(void *to, const void *from, size_t count)
{
    unsigned char *last_to = (unsigned char *)to + count - 1;
    const unsigned char *last_from = (const unsigned char *)from + count - 1;

    if ((size_t)to - (size_t)from >= count) /* wraps around when `to` lies before `from` */
        return memcpy(to, from, count);
    __asm__ volatile("std; rep movsb; cld" : "+D"(last_to), "+S"(last_from), "+c"(count) : : "memory");
    return to;
}

void *memset(void *to, int value, size_t count)
{
    void *start = to;

    __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(value) : "memory");
    return start;
}

int memcmp(const void *left, const void *right, size_t count)
{
    const unsigned char *a = left, *b = right;

    for (; count; a++, b++, count--)
        if (*a != *b)
            return *a - *b;
    return 0;
}

size_t strlen(const char *text)
{
    const char *end = text;

    while (*end)
        end++;
    return (size_t)(end - text);
}

size_t strlcpy(char *to, const char *from, size_t size)
{
    size_t length = strlen(from);

    if (size) {
        size_t copied = length < size ? length : size - 1;

        memcpy(to, from, copied);
        to[copied] = 0;
    }
    return length;
}
