#include <kvmpy/ktap.h>

#include "../kernel/frames.h"

static void frames_are_given_out_once(void)
{
    unsigned first = frames_allocate(1), second = frames_allocate(1);

    KTAP_EXPECT(first != second);
    KTAP_EXPECT_EQUAL(frames_available(), FRAMES - 2);
    KTAP_EXPECT_EQUAL(frames_free(first, 1) + frames_free(second, 1), 2);
    KTAP_EXPECT_EQUAL(frames_available(), FRAMES);
}

static void a_run_may_cross_words(void)
{
    unsigned most = frames_allocate(60), run = frames_allocate(10);

    KTAP_EXPECT_EQUAL(run, 60);
    KTAP_EXPECT_EQUAL(frames_in_use[0], ~0ul);
    KTAP_EXPECT_EQUAL(frames_in_use[1], 0x3f);
    frames_free(most, 60);
    frames_free(run, 10);
}

static void a_gap_that_is_too_small_is_passed_over(void)
{
    unsigned low = frames_allocate(4), gap = frames_allocate(2), high = frames_allocate(1);

    frames_free(gap, 2);
    KTAP_EXPECT_EQUAL(frames_allocate(3), high + 1);
    KTAP_EXPECT_EQUAL(frames_allocate(2), gap);
    frames_free(low, FRAMES);
    KTAP_EXPECT_EQUAL(frames_available(), FRAMES);
}

static void more_than_there_is_cannot_be_had(void)
{
    KTAP_EXPECT_EQUAL(frames_allocate(FRAMES + 1), NO_FRAME);
    KTAP_EXPECT_EQUAL(frames_allocate(0), NO_FRAME);
    KTAP_EXPECT_EQUAL(frames_available(), FRAMES);
}

static void freeing_twice_frees_once(void)
{
    unsigned first = frames_allocate(3);

    KTAP_EXPECT_EQUAL(frames_free(first, 3), 3);
    KTAP_EXPECT_EQUAL(frames_free(first, 3), 0);
}

static void frames_of_another_node(void)
{
    KTAP_SKIP("this kernel knows one memory node");
}

static const struct ktap_test allocator[] = {
    KTAP_TEST(frames_are_given_out_once),
    KTAP_TEST(a_run_may_cross_words),
    KTAP_TEST(a_gap_that_is_too_small_is_passed_over),
    KTAP_TEST(more_than_there_is_cannot_be_had),
    KTAP_TEST(freeing_twice_frees_once),
    KTAP_TEST(frames_of_another_node),
    { },
};
static const struct ktap_suite suites[] = { { "allocator", allocator }, { } };

void _start(void)
{
    unsigned failed = ktap_run(suites);

    frames_allocate(5); /* for test_kernel.py, which looks at the bitmap from outside */
    kvmpy_exit(failed);
}
