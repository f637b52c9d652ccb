#define _GNU_SOURCE
#include "stage_int.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef STAGE_HOSTED
/* The fuzzer's kernel: it never touches the system and answers at random. */
#include <stdlib.h>
static uint32_t fake_state = 1;
static bool failing; /* now and then; else every call succeeds, so that plans get far */
static void *given[4096];
static unsigned ngiven;
void fake_seed(uint32_t v)
{
	fake_state = v | 1;
	failing = v % 4 == 0;
	while (ngiven)
		free(given[--ngiven]);
}
long sys6(long n, long a, long b, long c, long d, long e, long f)
{
	(void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
	fake_state = fake_state * 1664525u + 1013904223u;
	switch (n) {
	case SYS_read: case SYS_readlinkat: case SYS_getdents64: case SYS_getcwd:
		return 0;
	case SYS_wait4: case SYS_clone:
		return -ECHILD;
	}
	return failing && fake_state >> 24 < 16 ? -EINVAL : (long)(fake_state >> 8 & 3);
}
void *map_memory(size_t len)
{
	if (len > 1 << 20 || ngiven == sizeof given / sizeof *given)
		return NULL;
	return given[ngiven++] = calloc(1, len);
}
#else
#include <sys/mman.h>
long sys6(long n, long a, long b, long c, long d, long e, long f)
{
	long r = syscall(n, a, b, c, d, e, f);
	return r < 0 ? -errno : r;
}

/* Memory lives until exec: nothing is ever freed but by it. */
void *map_memory(size_t len)
{
	long p = SYS(SYS_mmap, 0, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return p < 0 && p > -4096 ? NULL : (void *)p;
}
#endif
