/* Preloaded: sends the process a signal, or returns an errno, at the n-th call that changes a watched folder.
 *
 * Armed by `faults_arm`, through ctypes, in a process that was forked for it. Each call that counts
 * is written to a log: number, name, path, second path. What is written through a mapping is not
 * seen; nothing of ours writes so.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char watched[PATH_MAX];
static size_t length;
static long then;       /* so many calls after it a kill; 0 is none */
static long point;      /* number of the call, from 0; negative only records */
static int mode;        /* 0 signal, 1 this call fails, 2 this and all later ones fail */
static int number;      /* the signal, or the errno */
static int growing;     /* only calls that take space count */
static int exchanging;  /* whether renameat2 can exchange names */
static int log_fd = -1;
static atomic_long count;
static atomic_int armed;

void faults_arm(const char *folder, long at, int how, int error, int only_growing, int exchange,
                long then_kill, const char *log) {
    strncpy(watched, folder, PATH_MAX - 1);
    length = strlen(watched);
    point = at, mode = how, number = error, growing = only_growing, exchanging = exchange, then = then_kill;
    log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    atomic_store(&count, 0);
    atomic_store(&armed, 1);
}

static int within(const char *path) {
    return !strncmp(path, watched, length) && (path[length] == '/' || !path[length]);
}

static void name_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[size < 0 ? 0 : size] = 0;
}

static void absolute(int folder, const char *given, char *path) {
    if (given[0] == '/') {
        snprintf(path, PATH_MAX, "%s", given);
        return;
    }
    char above[PATH_MAX] = "";
    if (folder == AT_FDCWD) {
        if (!getcwd(above, sizeof above)) above[0] = 0;
    } else {
        name_of(folder, above);
    }
    if (snprintf(path, PATH_MAX, "%s/%s", above, given) >= PATH_MAX) path[0] = 0;
}

/* 0 to go on, -1 with errno set to fail. */
static int before(const char *name, const char *path, const char *second, int grows) {
    if (!within(path) && !(second && within(second))) return 0;
    if (growing && !grows) return 0;
    long mine = atomic_fetch_add(&count, 1);
    char line[3 * PATH_MAX];
    int size = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", mine, name, path,
                        second ? second : "");
    if (log_fd >= 0) syscall(SYS_write, log_fd, line, size);
    if (point >= 0 && then && mine == point + then) {
        syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    }
    if (point < 0 || mine < point || (mode != 2 && mine > point)) return 0;
    if (mode == 0) {
        syscall(SYS_kill, syscall(SYS_getpid), number);
        return 0;
    }
    errno = number;
    return -1;
}

static int on_path(const char *name, int folder, const char *given, int grows) {
    if (!atomic_load(&armed) || !given) return 0;
    char path[PATH_MAX];
    absolute(folder, given, path);
    return before(name, path, NULL, grows);
}

static int on_two(const char *name, int folder, const char *given, int folder2, const char *given2,
                  int grows) {
    if (!atomic_load(&armed)) return 0;
    char path[PATH_MAX], second[PATH_MAX];
    absolute(folder, given, path);
    absolute(folder2, given2, second);
    return before(name, path, second, grows);
}

static int on_fd(const char *name, int fd, int grows) {
    if (!atomic_load(&armed)) return 0;
    char path[PATH_MAX];
    name_of(fd, path);
    return before(name, path, NULL, grows);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define CHANGES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if ((flags & CHANGES) && on_path("open", AT_FDCWD, path, flags & O_CREAT)) return -1; \
        return real(path, flags, bits); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if ((flags & CHANGES) && on_path("open", folder, path, flags & O_CREAT)) return -1; \
        return real(folder, path, flags, bits); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *how) { \
        REAL(name); \
        if (strpbrk(how, "wa+") && on_path("open", AT_FDCWD, path, 1)) return NULL; \
        return real(path, how); \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define PATH(result, name, parameters, arguments, folder, path, grows) \
    result name parameters { \
        REAL(name); \
        if (on_path(#name, folder, path, grows)) return -1; \
        return real arguments; \
    }
PATH(int, creat, (const char *p, mode_t m), (p, m), AT_FDCWD, p, 1)
PATH(int, creat64, (const char *p, mode_t m), (p, m), AT_FDCWD, p, 1)
PATH(int, mkdir, (const char *p, mode_t m), (p, m), AT_FDCWD, p, 1)
PATH(int, mkdirat, (int d, const char *p, mode_t m), (d, p, m), d, p, 1)
PATH(int, rmdir, (const char *p), (p), AT_FDCWD, p, 0)
PATH(int, unlink, (const char *p), (p), AT_FDCWD, p, 0)
PATH(int, unlinkat, (int d, const char *p, int f), (d, p, f), d, p, 0)
PATH(int, symlink, (const char *t, const char *p), (t, p), AT_FDCWD, p, 1)
PATH(int, symlinkat, (const char *t, int d, const char *p), (t, d, p), d, p, 1)
PATH(int, truncate, (const char *p, off_t n), (p, n), AT_FDCWD, p, 0)
PATH(int, chmod, (const char *p, mode_t m), (p, m), AT_FDCWD, p, 0)
PATH(int, fchmodat, (int d, const char *p, mode_t m, int f), (d, p, m, f), d, p, 0)

#define TWO(name, parameters, arguments, d, p, d2, p2, grows) \
    int name parameters { \
        REAL(name); \
        if (on_two(#name, d, p, d2, p2, grows)) return -1; \
        return real arguments; \
    }
TWO(rename, (const char *p, const char *q), (p, q), AT_FDCWD, p, AT_FDCWD, q, 0)
TWO(renameat, (int d, const char *p, int e, const char *q), (d, p, e, q), d, p, e, q, 0)
TWO(link, (const char *p, const char *q), (p, q), AT_FDCWD, p, AT_FDCWD, q, 1)
TWO(linkat, (int d, const char *p, int e, const char *q, int f), (d, p, e, q, f), d, p, e, q, 1)

int renameat2(int d, const char *p, int e, const char *q, unsigned flags) {
    REAL(renameat2);
    if (atomic_load(&armed) && (flags & 2) && !exchanging) {
        errno = EINVAL;
        return -1;
    }
    if (on_two(flags & 2 ? "exchange" : "renameat2", d, p, e, q, 0)) return -1;
    return real(d, p, e, q, flags);
}

#define FD(result, name, parameters, arguments, fd, grows) \
    result name parameters { \
        REAL(name); \
        if (on_fd(#name, fd, grows)) return -1; \
        return real arguments; \
    }
FD(ssize_t, write, (int f, const void *b, size_t n), (f, b, n), f, 1)
FD(ssize_t, pwrite, (int f, const void *b, size_t n, off_t o), (f, b, n, o), f, 1)
FD(ssize_t, pwrite64, (int f, const void *b, size_t n, off64_t o), (f, b, n, o), f, 1)
FD(ssize_t, writev, (int f, const struct iovec *v, int n), (f, v, n), f, 1)
FD(ssize_t, pwritev, (int f, const struct iovec *v, int n, off_t o), (f, v, n, o), f, 1)
FD(int, fsync, (int f), (f), f, 1)
FD(int, fdatasync, (int f), (f), f, 1)
FD(int, ftruncate, (int f, off_t n), (f, n), f, 0)
FD(int, ftruncate64, (int f, off64_t n), (f, n), f, 0)
FD(int, fallocate, (int f, int m, off_t o, off_t n), (f, m, o, n), f, 1)
FD(int, fallocate64, (int f, int m, off64_t o, off64_t n), (f, m, o, n), f, 1)
FD(int, fchmod, (int f, mode_t m), (f, m), f, 0)
FD(ssize_t, sendfile, (int f, int s, off_t *o, size_t n), (f, s, o, n), f, 1)
FD(ssize_t, sendfile64, (int f, int s, off64_t *o, size_t n), (f, s, o, n), f, 1)
FD(ssize_t, copy_file_range, (int s, off64_t *i, int f, off64_t *o, size_t n, unsigned g),
   (s, i, f, o, n, g), f, 1)

int posix_fallocate(int f, off_t o, off_t n) {
    REAL(posix_fallocate);
    return on_fd("posix_fallocate", f, 1) ? number : real(f, o, n);
}
