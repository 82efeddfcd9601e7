/* Simulates that a machine's clock is set: the realtime clock of every process that preloads this is off by the number
 * of seconds in the file $CHAOS_CLOCK, a binary int64 that may change at any moment. Monotonic clocks are unchanged.
 * Deadlines that are times of day, not uptimes, are converted to the kernel's time. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offset;
#define EPOCH_S 1000000000 /* a larger deadline is a time of day */

__attribute__((constructor)) static void open_clock(void) {
    const char *path = getenv("CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *place = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (place != MAP_FAILED) offset = place;
}

static int64_t off(void) { return offset ? *offset : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += off();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed && now) now->tv_sec += off();
    return failed;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

static struct timespec real(const struct timespec *deadline) {
    struct timespec told = *deadline;
    if (told.tv_sec > EPOCH_S) told.tv_sec -= off();
    return told;
}

#define WAIT(name, type)                                                                      \
    int name(type *one, const struct timespec *deadline) {                                    \
        static int (*next)(type *, const struct timespec *);                                  \
        if (!next) next = (int (*)(type *, const struct timespec *))dlsym(RTLD_NEXT, #name);  \
        struct timespec told = real(deadline);                                                \
        return next(one, &told);                                                              \
    }
WAIT(sem_timedwait, sem_t)
WAIT(pthread_mutex_timedlock, pthread_mutex_t)

int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *deadline) {
    static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!next) next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    struct timespec told = real(deadline);
    return next(cond, mutex, &told);
}
