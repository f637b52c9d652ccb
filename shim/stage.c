/* The start-up stage: sync messages, the plan parser, and operations that are
   one system call. Every length is checked before use; a plan that does not
   parse exactly is refused. */
#define _GNU_SOURCE
#include "stage_int.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef F_GET_SEALS
#define F_GET_SEALS 1034
#define F_SEAL_SHRINK 2
#define F_SEAL_GROW 4
#define F_SEAL_WRITE 8
#endif

static uint64_t rd_int(struct rd *r, unsigned n)
{
	uint64_t v = 0;
	if (r->bad || (size_t)(r->end - r->p) < n) {
		r->bad = true;
		return 0;
	}
	for (unsigned i = 0; i < n; i++)
		v |= (uint64_t)r->p[i] << 8 * i;
	r->p += n;
	return v;
}

uint16_t rd16(struct rd *r) { return (uint16_t)rd_int(r, 2); }
uint32_t rd32(struct rd *r) { return (uint32_t)rd_int(r, 4); }
uint64_t rd64(struct rd *r) { return rd_int(r, 8); }

static const char *rd_text(struct rd *r, uint32_t n)
{
	const uint8_t *p = r->p;
	if (r->bad || (size_t)(r->end - p) <= n || p[n] || memchr(p, 0, n)) {
		r->bad = true;
		return "";
	}
	r->p += n + 1;
	return (const char *)p;
}

const char *rd_str(struct rd *r) { uint32_t n = rd16(r); return rd_text(r, n); }
const char *rd_longstr(struct rd *r) { uint32_t n = rd32(r); return rd_text(r, n); }

struct bytes rd_bytes(struct rd *r)
{
	struct bytes b = { r->p, rd32(r) };
	b.p = r->p;
	if (r->bad || (size_t)(r->end - r->p) < b.len) {
		r->bad = true;
		b.len = 0;
		return b;
	}
	r->p += b.len;
	return b;
}

bool rd_end(const struct rd *r) { return !r->bad && r->p == r->end; }

void close_fd(int *fd)
{
	if (*fd >= 0)
		SYS(SYS_close, *fd);
	*fd = -1;
}

int slot_fd(const struct stage *s, uint16_t slot)
{
	return slot < s->nslots && s->slots[slot] >= 0 ? s->slots[slot] : -EBADF;
}

static int op_cgroup(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	int fd = slot_fd(s, rd16(r));
	if (!rd_end(r))
		return -EPROTO;
	long n = fd < 0 ? fd : SYS(SYS_write, fd, "0", 1);
	return n < 0 ? (int)n : 0;
}

static int op_unshare(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	uint64_t ns = rd64(r);
	return rd_end(r) ? (int)SYS(SYS_unshare, ns) : -EPROTO;
}

static int op_setns(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	int fd = slot_fd(s, rd16(r));
	uint64_t ns = rd64(r);
	if (!rd_end(r))
		return -EPROTO;
	int e = fd < 0 ? fd : (int)SYS(SYS_setns, fd, ns);
	if (!e && ns & 0x00020000 /* CLONE_NEWNS */) {
		s->foreign = true;
		s->proc_is_ours = false;
		close_fd(&s->root);
		close_fd(&s->proc);
	}
	return e;
}

static int op_name(struct stage *s, struct rd *r, long nr)
{
	(void)s;
	const char *name = rd_str(r);
	return rd_end(r) ? (int)SYS(nr, name, strlen(name)) : -EPROTO;
}
static int op_hostname(struct stage *s, struct rd *r, uint16_t f) { (void)f; return op_name(s, r, SYS_sethostname); }
static int op_domainname(struct stage *s, struct rd *r, uint16_t f) { (void)f; return op_name(s, r, SYS_setdomainname); }

static int op_sysctl(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	const char *path = rd_str(r), *value = rd_str(r);
	if (!rd_end(r))
		return -EPROTO;
	int proc = proc_fd(s);
	return proc < 0 ? proc : write_trusted(proc, path, value, true);
}

/* Files of the own process: labels, oom_score_adj. Before the container's
   mounts are entered that is the host's /proc, after that only a procfs that
   nobody else could alter. */
static int op_self(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	const char *file = rd_str(r), *fallback = rd_str(r), *value = rd_str(r);
	if (!rd_end(r))
		return -EPROTO;
	int proc = proc_fd(s), self, e;
	if (proc < 0)
		return proc;
	self = open_in(proc, "self", O_PATH | O_DIRECTORY, 0);
	if (self < 0)
		return self;
	e = write_trusted(self, file, value, false);
	if (e == -EACCES && !s->foreign) {
		/* In a user namespace of our own the files belong to the host's root
		   while we cannot be dumped; nobody else is in here yet to profit. */
		SYS(SYS_prctl, PR_SET_DUMPABLE, 1);
		e = write_trusted(self, file, value, false);
		SYS(SYS_prctl, PR_SET_DUMPABLE, 0);
	}
	if (e == -ENOENT && *fallback)
		e = write_trusted(self, fallback, value, false);
	close_fd(&self);
	return e;
}

static int op_loopback(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	struct ifreq ifr = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	if (!rd_end(r))
		return -EPROTO;
	int fd = (int)SYS(SYS_socket, AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return fd;
	int e = (int)SYS(SYS_ioctl, fd, SIOCSIFFLAGS, &ifr);
	close_fd(&fd);
	return e;
}

static int op_keyring(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	const char *name = rd_str(r);
	if (!rd_end(r))
		return -EPROTO;
	long key = SYS(SYS_keyctl, 1 /* JOIN_SESSION_KEYRING */, *name ? name : NULL);
	if (key == -ENOSYS)
		return 0;
	if (key < 0)
		return (int)key;
	/* Whoever possesses the keyring may search it, also after it changed its
	   user: without that bit the process could not use its own keys. */
	long perm = SYS(SYS_keyctl, 5 /* SETPERM */, key, 0x3f3f0000 | 0x00080000);
	return perm == -EACCES || perm >= 0 ? 0 : (int)perm;
}

static int op_ioprio(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	uint32_t v = rd32(r);
	return rd_end(r) ? (int)SYS(SYS_ioprio_set, 1 /* WHO_PROCESS */, 0, v) : -EPROTO;
}

static int op_personality(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	uint32_t v = rd32(r);
	long e = rd_end(r) ? SYS(SYS_personality, v) : -EPROTO;
	return e < 0 ? (int)e : 0;
}

static int op_umask(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	uint32_t v = rd32(r);
	if (!rd_end(r))
		return -EPROTO;
	s->umask = v & 0777;
	return 0;
}

static int op_no_new_privs(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	return rd_end(r) ? (int)SYS(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1) : -EPROTO;
}

static int op_become_root(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	if (!rd_end(r))
		return -EPROTO;
	int e = (int)SYS(SYS_setresgid, 0, 0, 0);
	if (!e)
		e = (int)SYS(SYS_setresuid, 0, 0, 0);
	return e;
}

static int op_affinity(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	struct bytes b = rd_bytes(r);
	long e = rd_end(r) ? SYS(SYS_sched_setaffinity, 0, b.len, b.p) : -EPROTO;
	return e < 0 ? (int)e : 0;
}

static int op_mempolicy(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	uint32_t mode = rd32(r);
	struct bytes b = rd_bytes(r);
	if (!rd_end(r))
		return -EPROTO;
	/* the kernel takes one bit less than it is told */
	return (int)SYS(SYS_set_mempolicy, mode, b.len ? b.p : NULL, b.len ? b.len * 8ul + 1 : 0);
}

typedef int handler(struct stage *, struct rd *, uint16_t);
static handler *const handlers[] = {
	[OP_PRIVATE] = op_private, [OP_BASE] = op_base, [OP_CGROUP] = op_cgroup,
	[OP_UNSHARE] = op_unshare, [OP_SETNS] = op_setns, [OP_ROOT] = op_root,
	[OP_MOUNT] = op_mount, [OP_MOVE] = op_move, [OP_ATTR] = op_attr,
	[OP_READONLY] = op_readonly, [OP_MASK] = op_mask, [OP_MKDIR] = op_mkdir,
	[OP_SYMLINK] = op_symlink, [OP_MKNOD] = op_mknod, [OP_DEVICE] = op_device,
	[OP_PIVOT] = op_pivot, [OP_HOSTNAME] = op_hostname, [OP_DOMAINNAME] = op_domainname,
	[OP_SYSCTL] = op_sysctl, [OP_SELF] = op_self, [OP_LOOPBACK] = op_loopback,
	[OP_KEYRING] = op_keyring, [OP_RLIMITS] = op_rlimits, [OP_SCHEDULER] = op_scheduler,
	[OP_IOPRIO] = op_ioprio, [OP_PERSONALITY] = op_personality, [OP_UMASK] = op_umask,
	[OP_STDIO] = op_stdio, [OP_CONSOLE] = op_console, [OP_NO_NEW_PRIVS] = op_no_new_privs,
	[OP_SECCOMP] = op_seccomp, [OP_CREDS] = op_creds, [OP_CWD] = op_cwd,
	[OP_HOME] = op_home, [OP_FDS] = op_fds, [OP_HOOK] = op_hook,
	[OP_EXEC] = op_exec, [OP_LOOKUP] = op_lookup, [OP_BECOME_ROOT] = op_become_root,
	[OP_AFFINITY] = op_affinity, [OP_MEMPOLICY] = op_mempolicy,
	[OP_PREPARE] = op_prepare, [OP_GATE] = op_gate,
	[OP_CLOSE] = op_close, [OP_SOURCE] = op_source, [OP_ROOT_AT] = op_root_at,
	[OP_RECEIVE] = op_receive,
};

#define PLAN_HEADER 12

int run_plan(struct stage *s, const uint8_t *plan, uint32_t len)
{
	struct rd r = { plan, plan + len, false };
	s->op = 0;
	s->name = "read the plan";
	if (len < PLAN_HEADER || memcmp(plan, PLAN_MAGIC, 4))
		return -EPROTO;
	r.p += 4;
	if (rd16(&r) != PLAN_VERSION)
		return -EPROTONOSUPPORT;
	if (rd16(&r) & ~PLAN_CONTINUE)
		return -EPROTO;
	uint32_t nops = rd32(&r);
	if (nops > PLAN_MAX_OPS)
		return -EPROTO;
	for (s->op = 0; s->op < nops; s->op++) {
		uint16_t kind = rd16(&r), flags = rd16(&r);
		struct bytes b = rd_bytes(&r);
		s->name = "read the plan";
		if (r.bad)
			return -EPROTO;
		struct rd in = { b.p, (const uint8_t *)b.p + b.len, false };
		s->name = rd_str(&in);
		if (in.bad || kind >= sizeof handlers / sizeof *handlers || !handlers[kind])
			return -EPROTO;
		int e = handlers[kind](s, &in, flags & ~F_OP_OPTIONAL);
		if (e < 0 && (!(flags & F_OP_OPTIONAL) || e == -EPROTO))
			return e;
	}
	s->name = "read the plan";
	return rd_end(&r) ? 0 : -EPROTO;
}

#ifndef STAGE_HOSTED
struct fd_msg {
	struct sync_hdr h;
	uint32_t v;
};

int send_fd(int sync, uint32_t what, int fd)
{
	struct fd_msg m = { { SYNC_VERSION, SYNC_FD, 4 }, what };
	struct iovec v = { &m, sizeof m };
	union { struct cmsghdr h; char b[CMSG_SPACE(sizeof(int))]; } c = { 0 };
	struct msghdr h = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c };
	struct cmsghdr *cm = CMSG_FIRSTHDR(&h);
	cm->cmsg_level = SOL_SOCKET;
	cm->cmsg_type = SCM_RIGHTS;
	cm->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cm), &fd, sizeof fd);
	long n = SYS(SYS_sendmsg, sync, &h, MSG_NOSIGNAL);
	return n < 0 ? (int)n : 0;
}

/* write(2), not sendmsg(2): the filter may be loaded already. Behind the gate
   nobody listens: the process's own standard error has to do. */
void send_fail(const struct stage *s, int err)
{
	if (s->sync < 0) {
		char text[512];
		int len = snprintf(text, sizeof text, "%.255s: %s\n", s->name, strerror(err < 0 ? -err : err));
		SYS(SYS_write, 2, text, len);
		return;
	}
	uint8_t m[sizeof(struct sync_hdr) + 9 + 255];
	size_t n = strlen(s->name), at = sizeof(struct sync_hdr);
	if (n > 255)
		n = 255;
	struct sync_hdr h = { SYNC_VERSION, SYNC_FAIL, (uint32_t)(9 + n) };
	int32_t e = err < 0 ? -err : err;
	memcpy(m, &h, sizeof h);
	memcpy(m + at, &s->op, 4);
	memcpy(m + at + 4, &e, 4);
	m[at + 8] = (uint8_t)n;
	memcpy(m + at + 9, s->name, n);
	SYS(SYS_write, s->sync, m, at + 9 + n);
}

/* One datagram: its length, and its descriptors appended at fds. */
static long receive(int sync, uint8_t *buf, size_t cap, int *fds, uint32_t room, uint32_t *nfds)
{
	struct iovec v = { buf, cap };
	union { struct cmsghdr h; char b[CMSG_SPACE(253 * sizeof(int))]; } c;
	struct msghdr h = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c };
	long n;
	*nfds = 0;
	do
		n = SYS(SYS_recvmsg, sync, &h, MSG_CMSG_CLOEXEC);
	while (n == -EINTR);
	if (n <= 0)
		return n;
	for (struct cmsghdr *cm = CMSG_FIRSTHDR(&h); cm; cm = CMSG_NXTHDR(&h, cm)) {
		if (cm->cmsg_level != SOL_SOCKET || cm->cmsg_type != SCM_RIGHTS)
			continue;
		uint32_t k = (uint32_t)((cm->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		if (k > room - *nfds)
			return -EPROTO;
		memcpy(fds + *nfds, CMSG_DATA(cm), k * sizeof(int));
		*nfds += k;
	}
	return h.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? -EPROTO : n;
}

int want_fd(struct stage *s, uint16_t slot)
{
	struct fd_msg m = { { SYNC_VERSION, SYNC_WANT, 4 }, slot };
	uint32_t got = 0;
	int fd = -1;
	long n = SYS(SYS_sendto, s->sync, &m, sizeof m, MSG_NOSIGNAL, NULL, 0);
	if (n >= 0)
		n = receive(s->sync, (uint8_t *)&m, sizeof m, &fd, 1, &got);
	if (n >= 0 && (n != sizeof m || m.h.version != SYNC_VERSION || m.h.type != SYNC_MORE || m.v != 1 || got != 1)) {
		close_fd(&fd);
		n = -EPROTO;
	}
	return n < 0 ? (int)n : fd;
}

static const uint8_t *map_plan(int fd, uint32_t len)
{
	struct stat st;
	const long seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
	if (len > PLAN_MAX || (SYS(SYS_fcntl, fd, F_GET_SEALS) & seals) != seals)
		return NULL;
	if (fstat(fd, &st) || st.st_size < (off_t)len)
		return NULL;
	void *p = mmap(NULL, len, PROT_READ, MAP_PRIVATE, fd, 0);
	return p == MAP_FAILED ? NULL : p;
}

static struct stage st;
static uint8_t datagram[64 << 10];
static int arrived[SYNC_SLOTS_MAX + 1];

/* Receives one plan with its slots; 0 at end of file. */
static int next_plan(struct stage *s, const uint8_t **plan, uint32_t *plan_len, bool *mapped)
{
	struct sync_hdr h;
	uint32_t nslots, nfds, got, first = 0, head = sizeof h + 8;
	long n = receive(s->sync, datagram, sizeof datagram, arrived, SYNC_SLOTS_MAX + 1, &got);
	if (n <= 0)
		return (int)n;
	if ((size_t)n < head)
		return -EPROTO;
	memcpy(&h, datagram, sizeof h);
	memcpy(plan_len, datagram + sizeof h, 4);
	memcpy(&nslots, datagram + sizeof h + 4, 4);
	if (h.version != SYNC_VERSION || h.type != SYNC_PLAN || h.len != n - (long)sizeof h || nslots > SYNC_SLOTS_MAX)
		return -EPROTO;
	*mapped = *plan_len > SYNC_INLINE_MAX;
	if (*mapped) {
		first = 1;
		if (n != (long)head || got < 1 || !(*plan = map_plan(arrived[0], *plan_len)))
			return -EPROTO;
	} else {
		if (*plan_len != n - head)
			return -EPROTO;
		*plan = datagram + head;
	}
	while (got - first < nslots) {
		/* further slots; the plan itself stays where it is */
		uint8_t more[sizeof h + 4];
		uint32_t k;
		n = receive(s->sync, more, sizeof more, arrived + got, SYNC_SLOTS_MAX + 1 - got, &nfds);
		if (n != sizeof more)
			return n < 0 ? (int)n : -EPROTO;
		memcpy(&h, more, sizeof h);
		memcpy(&k, more + sizeof h, 4);
		if (h.version != SYNC_VERSION || h.type != SYNC_MORE || h.len != 4 || k != nfds || !k)
			return -EPROTO;
		got += nfds;
	}
	if (got - first != nslots)
		return -EPROTO;
	bool keep = *plan_len >= 8 && (*plan)[6] & PLAN_CONTINUE;
	if (keep && nslots)
		return -EPROTO;
	if (!keep) {
		for (uint32_t i = 0; i < s->nslots; i++)
			if (s->slots[i] != s->root && s->slots[i] != s->proc)
				close_fd(&s->slots[i]);
		memcpy(s->slots, arrived + first, nslots * sizeof(int));
		s->nslots = nslots;
	}
	if (*mapped)
		SYS(SYS_close, arrived[0]);
	return 1;
}

_Noreturn void stage_main(int sync_fd)
{
	/* what the container's processes must not inherit from us */
	struct { void *handler; unsigned long flags; void *restorer; unsigned long mask; } dfl = { 0 };
	uint64_t none = 0;
	SYS(SYS_prctl, PR_SET_DUMPABLE, 0);
	SYS(SYS_prctl, PR_GET_PDEATHSIG, &st.deathsig);
	for (int sig = 1; sig <= 64; sig++)
		SYS(SYS_rt_sigaction, sig, &dfl, NULL, 8);
	SYS(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, 8);
	SYS(SYS_setsid);
	SYS(SYS_umask, 0);
	st.sync = sync_fd;
	st.root = st.proc = st.null = st.mask = st.parent = -1;
	st.umask = 022;
	st.status = 1;
	for (;;) {
		const uint8_t *plan = NULL;
		uint32_t len = 0;
		bool mapped = false;
		st.op = 0;
		st.name = "receive the plan";
		int e = next_plan(&st, &plan, &len, &mapped);
		if (e == 0)
			_exit(0); /* whoever made us has gone, or has no use for us */
		if (e > 0)
			e = run_plan(&st, plan, len);
		if (e < 0) {
			send_fail(&st, e);
			_exit(st.status);
		}
		if (mapped)
			munmap((void *)plan, len);
		struct fd_msg done = { { SYNC_VERSION, SYNC_DONE, 4 }, 0 };
		if (SYS(SYS_sendto, st.sync, &done, sizeof done, MSG_NOSIGNAL, NULL, 0) < 0)
			_exit(1);
	}
}
#else
int send_fd(int sync, uint32_t what, int fd) { (void)sync, (void)what, (void)fd; return 0; }
int want_fd(struct stage *s, uint16_t slot) { (void)s, (void)slot; return 0; }
void send_fail(const struct stage *s, int err) { (void)s, (void)err; }
#endif
