/* The process itself: limits, ids, capabilities, the filter, hooks, the reaper
   and exec. */
#define _GNU_SOURCE
#include "stage_int.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int op_rlimits(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	int e = 0;
	uint16_t n = rd16(r);
	if (r->bad || (size_t)(r->end - r->p) != n * 20u)
		return -EPROTO;
	for (; n && !e; n--) {
		uint32_t which = rd32(r);
		uint64_t lim[2] = { rd64(r), 0 };
		lim[1] = rd64(r);
		e = (int)SYS(SYS_prlimit64, 0, which, lim, NULL);
	}
	return e;
}

int op_scheduler(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	struct {
		uint32_t size, policy;
		uint64_t flags;
		int32_t nice;
		uint32_t priority;
		uint64_t runtime, deadline, period;
	} a = { .size = sizeof a };
	a.policy = rd32(r);
	a.flags = rd64(r);
	a.nice = (int32_t)rd32(r);
	a.priority = rd32(r);
	a.runtime = rd64(r);
	a.deadline = rd64(r);
	a.period = rd64(r);
	return rd_end(r) ? (int)SYS(SYS_sched_setattr, 0, &a, 0) : -EPROTO;
}

/* The notification descriptor cannot be sent by the filtered thread: its filter
   may ask for permission to send, from a listener that is not there yet. So a
   second thread, started before, sends it. It shares memory and descriptors,
   not the filter, and ends before anything else happens. */
#ifndef STAGE_HOSTED
static struct courier {
	volatile int fd; /* -1 until the filter is loaded, -2 to give up */
	volatile int done;
	int sync, result;
} courier;
static _Alignas(16) char courier_stack[16 << 10];

static int courier_run(void *arg)
{
	struct courier *c = arg;
	while (c->fd == -1)
		syscall(SYS_sched_yield);
	if (c->fd >= 0)
		c->result = send_fd(c->sync, SYNC_FD_SECCOMP, c->fd);
	c->done = 1;
	for (;;)
		syscall(SYS_exit, 0); /* this thread alone */
	return 0;
}

static int load_notifying(struct stage *s, uint32_t flags, void *prog)
{
	courier = (struct courier){ .fd = -1, .sync = s->sync };
	int tid = clone(courier_run, courier_stack + sizeof courier_stack,
		CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM, &courier);
	if (tid < 0)
		return -errno;
	long fd = SYS(SYS_seccomp, 1, flags | 8 /* NEW_LISTENER */, prog);
	courier.fd = fd < 0 ? -2 : (int)fd;
	while (!courier.done)
		__asm__ volatile("" ::: "memory");
	/* the process must not own its own listener: it is close-on-exec */
	return fd < 0 ? (int)fd : courier.result;
}
#else
static int load_notifying(struct stage *s, uint32_t flags, void *prog)
{
	(void)s, (void)flags, (void)prog;
	return 0;
}
#endif

/* The last preparations that are system calls of their own: before the filter,
   which may know nothing but what the program needs. */
static int seal(struct stage *s)
{
	static char cwd[4096];
	if (s->sealed)
		return 0;
	/* "(unreachable)…": the directory lies outside the root */
	long n = SYS(SYS_getcwd, cwd, sizeof cwd);
	if (n < 0 && n != -ERANGE)
		return (int)n;
	if (n >= 0 && cwd[0] != '/')
		return -EXDEV;
	SYS(SYS_umask, s->umask);
	n = SYS(SYS_close_range, 3 + s->kept, ~0u, 4 /* CLOEXEC */);
	s->sealed = n >= 0;
	return n < 0 ? (int)n : 0;
}

int op_seccomp(struct stage *s, struct rd *r, uint16_t flags)
{
	uint32_t f = rd32(r);
	struct bytes b = rd_bytes(r);
	struct { uint16_t len; const void *filter; } prog = { (uint16_t)(b.len / 8), b.p };
	if (!rd_end(r) || b.len % 8 || b.len / 8 > 4096 || !b.len)
		return -EPROTO;
	int e = seal(s);
	if (e < 0)
		return e;
	if (flags & F_SECCOMP_NOTIFY)
		return load_notifying(s, f, &prog);
	return (int)SYS(SYS_seccomp, 1 /* SET_MODE_FILTER */, f, &prog);
}

static int change_directory(struct stage *s, const char *path)
{
	int fd = open_in(root_fd(s), path, O_PATH | O_DIRECTORY, 0x10 | 0x02 /* IN_ROOT, NO_MAGICLINKS */);
	if (fd < 0)
		return fd;
	int e = (int)SYS(SYS_fchdir, fd);
	close_fd(&fd);
	return e;
}

int op_creds(struct stage *s, struct rd *r, uint16_t flags)
{
	uint32_t uid = rd32(r), gid = rd32(r), groups[1024], n;
	uint64_t bounding = rd64(r), effective = rd64(r), permitted = rd64(r), inheritable = rd64(r), ambient = rd64(r);
	n = rd16(r);
	if (n > 1024)
		return -EINVAL;
	for (uint32_t i = 0; i < n; i++)
		groups[i] = rd32(r);
	if (!rd_end(r))
		return -EPROTO;
	long e = 0;
	/* first as who starts the container, whom every directory of it is open to;
	   what only its user may enter (on a file system that knows no other) later */
	int entered = s->cwd ? change_directory(s, s->cwd) : 0;
	if (entered < 0 && entered != -EACCES && entered != -EPERM)
		return entered;
	if (flags & F_CREDS_HAS_CAPS) {
		for (int c = 0; c < 64; c++) {
			if (bounding >> c & 1)
				continue;
			e = SYS(SYS_prctl, PR_CAPBSET_DROP, c);
			if (e == -EINVAL)
				break; /* past the last capability of this kernel */
			if (e < 0)
				return (int)e;
		}
		if (uid)
			e = SYS(SYS_prctl, PR_SET_KEEPCAPS, 1);
		else
			e = 0;
	}
	if (e >= 0 && !(flags & F_CREDS_KEEP_GROUPS))
		e = SYS(SYS_setgroups, n, groups);
	if (e >= 0)
		e = SYS(SYS_setresgid, gid, gid, gid);
	if (e >= 0)
		e = SYS(SYS_setresuid, uid, uid, uid);
	if (e >= 0 && flags & F_CREDS_HAS_CAPS) {
		struct { uint32_t version; int pid; } h = { 0x20080522, 0 };
		uint32_t d[6] = { (uint32_t)effective, (uint32_t)permitted, (uint32_t)inheritable,
			(uint32_t)(effective >> 32), (uint32_t)(permitted >> 32), (uint32_t)(inheritable >> 32) };
		e = SYS(SYS_capset, &h, d);
		if (e >= 0 && uid)
			e = SYS(SYS_prctl, PR_SET_KEEPCAPS, 0);
		if (e >= 0)
			e = SYS(SYS_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
		for (int c = 0; c < 64 && e >= 0; c++)
			if (ambient >> c & 1)
				e = SYS(SYS_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, c, 0, 0);
	}
	/* changing ids makes a process dumpable as the sysctl says: not before exec */
	if (e >= 0)
		e = SYS(SYS_prctl, PR_SET_DUMPABLE, 0);
	/* it also forgets what signal the death of the monitor brings */
	if (e >= 0 && s->deathsig)
		e = SYS(SYS_prctl, PR_SET_PDEATHSIG, s->deathsig);
	if (e >= 0 && entered < 0)
		e = change_directory(s, s->cwd);
	return e < 0 ? (int)e : 0;
}

/* Magic links are refused, so that no open descriptor can serve as a way out. */
int op_cwd(struct stage *s, struct rd *r, uint16_t flags)
{
	const char *path = rd_str(r);
	if (!rd_end(r))
		return -EPROTO;
	int root = root_fd(s), e;
	if (root < 0)
		return root;
	e = change_directory(s, path);
	if (e == -ENOENT && flags & F_CWD_CREATE) {
		int fd = target_fd(s, path, true, 0);
		e = fd < 0 ? fd : change_directory(s, path);
		close_fd(&fd);
	}
	if (e == -EACCES) {
		/* root may be squashed where the user is not; the plan may be gone by then */
		size_t n = strlen(path) + 1;
		char *copy = map_memory(n);
		if (!copy)
			return -ENOMEM;
		s->cwd = memcpy(copy, path, n);
		e = 0;
	}
	return e;
}

/* The home directory of uid in the container's passwd file, "/" if unknown. */
int op_home(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	static char buf[64 << 10];
	struct stat st = { 0 };
	uint32_t uid = rd32(r);
	if (!rd_end(r))
		return -EPROTO;
	memcpy(s->home, "HOME=/", 7);
	int root = root_fd(s);
	if (root < 0)
		return root;
	int fd = open_in(root, "/etc/passwd", O_RDONLY | O_NONBLOCK | O_NOCTTY, 0x10 | 0x02);
	if (fd < 0)
		return 0;
	long n = fstat(fd, &st) || !S_ISREG(st.st_mode) ? 0 : SYS(SYS_read, fd, buf, sizeof buf - 1);
	close_fd(&fd);
	buf[n < 0 ? 0 : n] = 0;
	for (char *line = buf; line && *line;) {
		char *end = strchr(line, '\n'), *f[6];
		int k = 0;
		if (end)
			*end = 0;
		for (char *p = line; k < 6 && p; k++) {
			f[k] = p;
			if ((p = strchr(p, ':')))
				*p++ = 0;
		}
		uint64_t v = 0;
		const char *d = k == 6 ? f[2] : "";
		bool digits = *d != 0;
		for (; *d && digits; d++) {
			digits = *d >= '0' && *d <= '9' && v < 1ull << 33;
			v = v * 10 + (uint64_t)(*d - '0');
		}
		if (digits && v == uid && f[5][0] == '/' && strlen(f[5]) < sizeof s->home - 5) {
			memcpy(s->home + 5, f[5], strlen(f[5]) + 1);
			return 0;
		}
		line = end ? end + 1 : NULL;
	}
	return 0;
}

static int move_up(int *fd, uint32_t least)
{
	if (*fd < 0 || *fd >= (int)least)
		return 0;
	long n = SYS(SYS_fcntl, *fd, F_DUPFD_CLOEXEC, least);
	if (n < 0)
		return (int)n;
	SYS(SYS_close, *fd);
	*fd = (int)n;
	return 0;
}

int op_fds(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	uint32_t n = rd16(r), top = 3 + n;
	struct rd list = *r;
	if ((size_t)(r->end - r->p) != n * 2u || r->bad)
		return -EPROTO;
	int e = move_up(&s->sync, top), root = s->root;
	for (uint32_t i = 0; i < s->nslots && !e; i++) {
		bool is_root = root >= 0 && s->slots[i] == root;
		e = move_up(&s->slots[i], top);
		if (is_root)
			s->root = s->slots[i];
	}
	int *own[] = { &s->proc, &s->null, &s->mask, &s->parent, &s->root };
	for (size_t i = 0; i < sizeof own / sizeof *own && !e; i++)
		e = move_up(own[i], top);
	for (uint32_t i = 0; i < n && !e; i++) {
		int fd = slot_fd(s, rd16(&list));
		e = fd < 0 ? fd : (int)SYS(SYS_dup3, fd, 3 + i, 0);
		e = e > 0 ? 0 : e;
	}
	s->kept = n;
	return e;
}

/* Reads "[type]" into a vector ending in NULL, with room for one more. */
static char **rd_vector(struct rd *r, const char *(*next)(struct rd *))
{
	uint32_t n = rd16(r);
	if (r->bad || n > (size_t)(r->end - r->p))
		return r->bad = true, NULL;
	char **v = map_memory((n + 2) * sizeof *v);
	if (!v)
		return NULL;
	for (uint32_t i = 0; i < n; i++)
		v[i] = (char *)next(r);
	return v;
}

static int not_executed(struct stage *s, int e)
{
	s->status = e == -ENOENT || e == -ENOTDIR ? 127 : 126;
	return e;
}

/* Tries each path as execvpe does: what may not be executed is passed over, but
   remembered if nothing better follows. */
static int exec_first(char **paths, char **argv, char **envp)
{
	int e = -ENOENT;
	for (; *paths; paths++) {
		long r = SYS(SYS_execve, *paths, argv, envp);
		if (r == -EACCES)
			e = -EACCES;
		else if (r != -ENOENT && r != -ENOTDIR)
			return (int)r;
	}
	return e;
}

int op_lookup(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	char **paths = rd_vector(r, rd_str);
	int e = -ENOENT;
	if (!rd_end(r) || !paths)
		return -EPROTO;
	for (; *paths; paths++) {
		struct stat st = { 0 };
		/* with the rights that exec will have: capabilities count */
		long a = SYS(SYS_faccessat2, AT_FDCWD, *paths, X_OK, 0x200 /* AT_EACCESS */);
		if (a == -ENOSYS || a == -EPERM)
			a = SYS(SYS_faccessat, AT_FDCWD, *paths, X_OK);
		if (!a && !fstatat(AT_FDCWD, *paths, &st, 0)) {
			if (!S_ISDIR(st.st_mode))
				return 0;
			e = -EACCES;
		} else if (a == -EACCES)
			e = -EACCES;
	}
	return not_executed(s, e);
}

/* The reaper: process 1 that forwards signals, buries the dead and ends as its
   child does. */
#ifndef STAGE_HOSTED
static _Noreturn void reap(long child)
{
	/* What exec would have taken from an ordinary user; root needs no more than
	   to signal a child that changed its user. The filter may deny it: then the
	   reaper keeps what the process was allowed in the first place. */
	struct { uint32_t version; int pid; } h = { 0x20080522, 0 };
	uint32_t d[6] = { 0 };
	if (!SYS(SYS_capget, &h, d)) {
		uint32_t kill = getuid() ? 0 : d[1] & 1u << 5 /* CAP_KILL */;
		memset(d, 0, sizeof d);
		d[0] = d[1] = kill;
		SYS(SYS_capset, &h, d);
	}
	SYS(SYS_prctl, PR_SET_NAME, "init");
	uint64_t all = ~0ull;
	int code = -1, st;
	siginfo_t si;
	for (;;) {
		long sig = SYS(SYS_rt_sigtimedwait, &all, &si, NULL, 8);
		if (sig > 0 && sig != SIGCHLD)
			SYS(SYS_kill, child, sig);
		if (sig != SIGCHLD)
			continue;
		long pid;
		while ((pid = SYS(SYS_wait4, -1, &st, WNOHANG, NULL)) > 0)
			if (pid == child)
				code = WIFSIGNALED(st) ? 128 + WTERMSIG(st) : WEXITSTATUS(st);
		if (code >= 0)
			_exit(code);
	}
}

static void split_reaper(void)
{
	uint64_t all = ~0ull, none = 0;
	SYS(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, 8);
	long child = SYS(SYS_clone, SIGCHLD);
	if (child > 0) {
		SYS(SYS_close_range, 0, ~0u, 0);
		reap(child);
	}
	if (child == 0) {
		/* a group of its own, in the foreground of the terminal if there is one */
		int pid = getpid();
		SYS(SYS_setpgid, 0, 0);
		SYS(SYS_ioctl, 0, TIOCSPGRP, &pid);
		SYS(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, 8);
		return;
	}
	SYS(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, 8);
}
#else
static void split_reaper(void) {}
#endif

int op_exec(struct stage *s, struct rd *r, uint16_t flags)
{
	char **paths = rd_vector(r, rd_str), **argv = rd_vector(r, rd_longstr), **envp = rd_vector(r, rd_longstr);
	if (!rd_end(r) || !paths || !argv || !envp || !argv[0])
		return -EPROTO;
	if (s->home[0]) {
		char **end = envp;
		while (*end)
			end++;
		*end = s->home;
	}
	int e = seal(s);
	if (e < 0)
		return e;
	if (flags & F_EXEC_INIT)
		split_reaper();
	return not_executed(s, exec_first(paths, argv, envp));
}

/* Process 1 of a pid namespace ignores what it has no handler for; one that only
   waits shall be as mortal as any other. exec forgets it. */
#ifndef STAGE_HOSTED
static void die(int sig) { _exit(128 + sig); }

static void mortal(void)
{
	static const int sigs[] = { SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGALRM, SIGUSR1, SIGUSR2 };
	struct sigaction sa = { .sa_handler = die };
	for (size_t i = 0; i < sizeof sigs / sizeof *sigs; i++)
		sigaction(sigs[i], &sa, NULL);
}
#else
static void mortal(void) {}
#endif

/* Closes all but the standard descriptors, the kept ones, the way back and the one
   slot: a process that waits shall hold nothing of the host. Before the filter,
   which may not know close_range. */
int op_close(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	uint16_t slot = rd16(r);
	int gate = slot_fd(s, slot), root = s->cwd ? s->root : -1;
	if (!rd_end(r))
		return -EPROTO;
	if (gate < 0)
		return gate;
	uint32_t from = 3 + s->kept;
	while (from != ~0u) {
		uint32_t next = ~0u; /* the lowest to be kept from here on */
		int keep[] = { s->sync, gate, root };
		for (size_t i = 0; i < sizeof keep / sizeof *keep; i++)
			if (keep[i] >= (int)from && (uint32_t)keep[i] < next)
				next = (uint32_t)keep[i];
		if (next != from) {
			long e = SYS(SYS_close_range, from, next == ~0u ? ~0u : next - 1, 0);
			if (e < 0)
				return (int)e;
		}
		from = next == ~0u ? next : next + 1;
	}
	for (uint32_t i = 0; i < s->nslots; i++)
		if (i != slot)
			s->slots[i] = -1;
	mortal();
	for (int i = 0; i < s->nprepared; i++)
		s->prepared[i].fd = -1;
	s->root = root;
	s->proc = s->null = s->mask = s->parent = -1;
	return 0;
}

/* Answers like the end of a plan, then waits until it is let go on: by a byte in
   a pipe, since reading and writing are what any filter allows. Whoever sent the
   plan may have ended meanwhile. */
int op_gate(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	int fd = slot_fd(s, rd16(r));
	struct { struct sync_hdr h; uint32_t v; } done = { { SYNC_VERSION, SYNC_DONE, 4 }, 0 };
	char byte;
	if (!rd_end(r))
		return -EPROTO;
	long n = fd < 0 ? fd : seal(s);
	if (n >= 0)
		n = SYS(SYS_write, s->sync, &done, sizeof done);
	if (n < 0)
		return (int)n;
	close_fd(&s->sync);
	do
		n = SYS(SYS_read, fd, &byte, 1);
	while (n == -EINTR);
	return n == 1 ? 0 : n < 0 ? (int)n : -ECANCELED;
}

/* Runs a hook and waits for it; what it reads is the container's state. */
#ifndef STAGE_HOSTED
static int run_hook(const char *path, uint32_t timeout, char **argv, char **envp, struct bytes in)
{
	int pipe[2];
	long e = SYS(SYS_pipe2, pipe, O_CLOEXEC), pid;
	if (e < 0)
		return (int)e;
	pid = SYS(SYS_clone, SIGCHLD);
	if (pid == 0) {
		SYS(SYS_dup3, pipe[0], 0, 0);
		SYS(SYS_close_range, 3, ~0u, 4);
		SYS(SYS_umask, 022);
		SYS(SYS_execve, path, argv, envp);
		_exit(127);
	}
	SYS(SYS_close, pipe[0]);
	if (pid < 0) {
		SYS(SYS_close, pipe[1]);
		return (int)pid;
	}
	int pidfd = (int)SYS(SYS_pidfd_open, pid, 0), st = 0;
	struct timespec now, end;
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += timeout;
	SYS(SYS_fcntl, pipe[1], F_SETFL, O_NONBLOCK);
	uint64_t pipe_mask = 1ull << (SIGPIPE - 1);
	SYS(SYS_rt_sigprocmask, SIG_BLOCK, &pipe_mask, NULL, 8);
	for (uint32_t done = 0;;) {
		struct pollfd p[2] = { { pidfd, POLLIN, 0 }, { done < in.len ? pipe[1] : -1, POLLOUT, 0 } };
		clock_gettime(CLOCK_MONOTONIC, &now);
		int left = timeout ? (int)((end.tv_sec - now.tv_sec) * 1000) : -1;
		if (timeout && left <= 0) {
			SYS(SYS_kill, pid, SIGKILL);
			SYS(SYS_wait4, pid, NULL, 0, NULL);
			e = -ETIMEDOUT;
			break;
		}
		poll(p, 2, left);
		if (p[1].revents) {
			long n = SYS(SYS_write, pipe[1], (const char *)in.p + done, in.len - done);
			done = n > 0 ? done + (uint32_t)n : n == -EAGAIN ? done : in.len;
		}
		if (done >= in.len && pipe[1] >= 0)
			close_fd(&pipe[1]);
		if (p[0].revents) {
			SYS(SYS_wait4, pid, &st, 0, NULL);
			e = st ? -(HOOK_FAILED | (st & 0xffff)) : 0;
			break;
		}
	}
	close_fd(&pipe[1]);
	close_fd(&pidfd);
	struct timespec zero = { 0 };
	SYS(SYS_rt_sigtimedwait, &pipe_mask, NULL, &zero, 8);
	SYS(SYS_rt_sigprocmask, SIG_UNBLOCK, &pipe_mask, NULL, 8);
	return (int)e;
}
#else
static int run_hook(const char *path, uint32_t timeout, char **argv, char **envp, struct bytes in)
{
	(void)path, (void)timeout, (void)argv, (void)envp, (void)in;
	return 0;
}
#endif

int op_hook(struct stage *s, struct rd *r, uint16_t flags)
{
	const char *path = rd_str(r);
	uint32_t timeout = rd32(r);
	char **argv = rd_vector(r, rd_longstr), **envp = rd_vector(r, rd_longstr);
	struct bytes in = rd_bytes(r);
	if (!rd_end(r) || !argv || !envp)
		return -EPROTO;
	if (flags & F_HOOK_HOME && s->home[0]) {
		char **end = envp;
		while (*end)
			end++;
		*end = s->home;
	}
	return run_hook(path, timeout, argv, envp, in);
}
