#include <kvmpy/ktap.h>

#include "../kernel/string.h"

static unsigned char room[64];

static void fill_room(void)
{
    for (unsigned index = 0; index < sizeof room; index++)
        room[index] = (unsigned char)index;
}

static void memset_fills_exactly(void)
{
    fill_room();
    KTAP_EXPECT(memset(room + 1, 0xa5, 3) == room + 1);
    KTAP_EXPECT_EQUAL(room[0], 0);
    KTAP_EXPECT_EQUAL(room[1], 0xa5);
    KTAP_EXPECT_EQUAL(room[3], 0xa5);
    KTAP_EXPECT_EQUAL(room[4], 4);
}

static void memcpy_of_nothing_changes_nothing(void)
{
    fill_room();
    memcpy(room, room + 8, 0);
    KTAP_EXPECT_EQUAL(room[0], 0);
}

static void memmove_up_and_down_within_a_buffer(void)
{
    fill_room();
    memmove(room + 4, room, 16);
    KTAP_EXPECT_EQUAL(room[3], 3);
    KTAP_EXPECT_EQUAL(room[4], 0);
    KTAP_EXPECT_EQUAL(room[19], 15);
    KTAP_EXPECT_EQUAL(room[20], 20);
    fill_room();
    memmove(room, room + 4, 16);
    KTAP_EXPECT_EQUAL(room[0], 4);
    KTAP_EXPECT_EQUAL(room[15], 19);
    KTAP_EXPECT_EQUAL(room[16], 16);
}

static void memcmp_orders_bytes_as_unsigned(void)
{
    KTAP_EXPECT_EQUAL(memcmp("same", "same", 4), 0);
    KTAP_EXPECT(memcmp("\x7f", "\x80", 1) < 0);
    KTAP_EXPECT(memcmp("b", "a", 1) > 0);
    KTAP_EXPECT_EQUAL(memcmp("left", "right", 0), 0);
}

static void strlcpy_always_ends_the_text(void)
{
    char small[4];

    KTAP_EXPECT_EQUAL(strlcpy(small, "kernel", sizeof small), 6);
    KTAP_EXPECT_EQUAL(memcmp(small, "ker", 4), 0);
    KTAP_EXPECT_EQUAL(strlcpy(small, "os", sizeof small), 2);
    KTAP_EXPECT_EQUAL(memcmp(small, "os", 3), 0);
}

static const struct ktap_test memory[] = {
    KTAP_TEST(memset_fills_exactly),
    KTAP_TEST(memcpy_of_nothing_changes_nothing),
    KTAP_TEST(memmove_up_and_down_within_a_buffer),
    KTAP_TEST(memcmp_orders_bytes_as_unsigned),
    { },
};
static const struct ktap_test text[] = { KTAP_TEST(strlcpy_always_ends_the_text), { } };
static const struct ktap_suite suites[] = { { "memory", memory }, { "text", text }, { } };

void _start(void)
{
    kvmpy_exit(ktap_run(suites));
}
