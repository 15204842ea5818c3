/*
 * Tests inside a guest, their results as KTAP (the kernel's dialect of TAP) on the serial port.
 *
 *     #include <kvmpy/ktap.h>
 *
 *     static void adds(void) { KTAP_EXPECT_EQUAL(2 + 2, 4); }
 *     static void divides(void) { KTAP_SKIP("no divider here"); }
 *
 *     static const struct ktap_test arithmetic[] = { KTAP_TEST(adds), KTAP_TEST(divides), { } };
 *     static const struct ktap_suite suites[] = { { "arithmetic", arithmetic }, { } };
 *
 *     void _start(void) { kvmpy_exit(ktap_run(suites)); }
 *
 * Lists end with an empty element. A test goes on after an expectation that failed; KTAP_REQUIRE leaves the function
 * that it stands in. Any number of files may include this: all share one state.
 */

#ifndef KVMPY_KTAP_H
#define KVMPY_KTAP_H

#include <kvmpy/exit.h>
#include <kvmpy/serial.h>

struct ktap_test {
    const char *name;
    void (*run)(void);
};

struct ktap_suite {
    const char *name;
    const struct ktap_test *tests;
};

#define KTAP_TEST(function) { #function, function }

/* The test that runs now. Weak, like the functions below, so that the linker keeps one for all files. */
struct ktap_present {
    unsigned failures;
    const char *skipped;
};
__attribute__((weak)) struct ktap_present ktap_present;

/* Note that an expectation failed, and where. */
__attribute__((weak)) void ktap_failed(const char *file, unsigned line, const char *expectation)
{
    ktap_present.failures++;
    kvmpy_print("    # ");
    kvmpy_print(file);
    kvmpy_put(':');
    kvmpy_print_unsigned(line);
    kvmpy_print(": expected ");
    kvmpy_print(expectation);
    kvmpy_put('\n');
}

__attribute__((weak)) void ktap_show(const char *expression, unsigned long value)
{
    kvmpy_print("    #   ");
    kvmpy_print(expression);
    kvmpy_print(" is ");
    kvmpy_print_hex(value);
    kvmpy_put('\n');
}

#define KTAP_EXPECT(condition) \
    do { \
        if (!(condition)) \
            ktap_failed(__FILE__, __LINE__, #condition); \
    } while (0)

#define KTAP_REQUIRE(condition) \
    do { \
        if (!(condition)) { \
            ktap_failed(__FILE__, __LINE__, #condition); \
            return; \
        } \
    } while (0)

/* Integers and pointers, which are shown when they differ. */
#define KTAP_EXPECT_EQUAL(actual, expected) \
    do { \
        unsigned long ktap_actual = (unsigned long)(actual), ktap_expected = (unsigned long)(expected); \
        if (ktap_actual != ktap_expected) { \
            ktap_failed(__FILE__, __LINE__, #actual " == " #expected); \
            ktap_show(#actual, ktap_actual); \
            ktap_show(#expected, ktap_expected); \
        } \
    } while (0)

/* Leave the test, which counts as skipped unless an expectation has failed already. */
#define KTAP_SKIP(reason) \
    do { \
        ktap_present.skipped = (reason); \
        return; \
    } while (0)

__attribute__((weak)) void ktap_result(const char *indent, unsigned failures, unsigned number, const char *name)
{
    kvmpy_print(indent);
    kvmpy_print(failures ? "not ok " : "ok ");
    kvmpy_print_unsigned(number);
    kvmpy_put(' ');
    kvmpy_print(name);
}

__attribute__((weak)) void ktap_plan(const char *indent, unsigned count)
{
    kvmpy_print(indent);
    kvmpy_print("1..");
    kvmpy_print_unsigned(count);
    kvmpy_put('\n');
}

/* Run the tests of one suite; answers how many failed. */
__attribute__((weak)) unsigned ktap_run_suite(const struct ktap_suite *suite)
{
    unsigned count = 0, failed = 0;

    while (suite->tests[count].run)
        count++;
    kvmpy_print("    KTAP version 1\n    # Subtest: ");
    kvmpy_print(suite->name);
    kvmpy_put('\n');
    ktap_plan("    ", count);
    for (unsigned number = 0; number < count; number++) {
        ktap_present.failures = 0;
        ktap_present.skipped = 0;
        suite->tests[number].run();
        failed += ktap_present.failures != 0;
        ktap_result("    ", ktap_present.failures, number + 1, suite->tests[number].name);
        if (ktap_present.skipped && !ktap_present.failures) {
            kvmpy_print(" # SKIP ");
            kvmpy_print(ktap_present.skipped);
        }
        kvmpy_put('\n');
    }
    return failed;
}

/* Run all suites; answers how many tests failed. */
__attribute__((weak)) unsigned ktap_run(const struct ktap_suite *suites)
{
    unsigned count = 0, failed = 0;

    while (suites[count].tests)
        count++;
    kvmpy_print("KTAP version 1\n");
    ktap_plan("", count);
    for (unsigned number = 0; number < count; number++) {
        unsigned failed_here = ktap_run_suite(&suites[number]);

        ktap_result("", failed_here, number + 1, suites[number].name);
        kvmpy_put('\n');
        failed += failed_here;
    }
    return failed;
}

#endif
