/* What a second thread adds to a call, for `bsrgen doctor --calibrate`: a region of two parts, each as long as `work_s`
   from when it begins, ends late by the time to wake the worker and to wait for it.  After `pause_s` without work the
   worker sleeps, as it does between the layers of a program that also does other things. */
#include "bsrgen_parallel.h"
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void spin(void *context, int part, int parts)
{
    const double end = now() + *(const double *)context;
    (void)part, (void)parts;
    while (now() < end)
        ;
}

double fork_delay(double work_s, double pause_s);
double fork_delay(double work_s, double pause_s)
{
    const struct timespec pause = {.tv_nsec = (long)(1e9 * pause_s)};
    nanosleep(&pause, NULL);
    const double start = now();
    bsrgen_parallel(2, spin, &work_s);
    return now() - start - work_s;
}
