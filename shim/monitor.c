/*
 * The per-container monitor: clones the stage child, relays plans to it, reads
 * all output, keeps the log and the exit record, and serves control sockets and
 * attached clients. One process, one poll loop, static buffers, no threads.
 *
 * Descriptors at start: 0 to 2 /dev/null, 3 the first control socket, 4 the
 * container's run directory, which becomes the working directory.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAXCTL 8
#define MAXCLIENT 32
#define MAXPROC 256
#define RBUF 16384
#define TAIL (4u << 20)      /* most that is read after the end for slow clients */
#define LAG_MS 2000          /* a client that takes nothing for so long is dropped */
#define LOG_RETRY_MS 100
#define LOG_GIVEUP_MS 5000   /* after the exit */
#define MAXFDS 253           /* SCM_MAX_FD */

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x1000
#endif
#define CLONE_INTO_CGROUP_ 0x200000000ull
#define NS_ALL 0x7e020080ull /* every CLONE_NEW*, time included */

struct clone3_args {
	uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

struct fds {
	int n;
	int v[MAXFDS];
};

enum { P_FREE = 0, P_INIT, P_EXEC };
enum { W_NONE = 0, W_PLAN, W_SETUP, W_EXEC, W_COMMAND }; /* what the stage is busy with */

static struct proc {
	pid_t pid;
	int sync, ctl, extra; /* extra: the pty master of an exec until it is handed on */
	uint32_t cookie, plan_cookie;
	uint8_t kind, wait, started, failed;
} procs[MAXPROC];
#define INIT (&procs[0])

static struct client {
	int in, out[2];
	uint32_t off[2]; /* of the stream's data */
	int64_t lag;     /* since when it takes nothing, 0 it does */
	bool used, lossless;
} clients[MAXCLIENT];

static struct stream {
	int fd;
	uint32_t len, fed; /* data[fed..len) has not gone to the log yet */
	char *data;
	char rbuf[RBUF];
} streams[2];

static struct {
	int ctl[MAXCTL], listen, sig, mntns, pty, stdin_fd;
	uint32_t state, flags, in_off, in_len;
	int32_t nice;
	bool pidns_entered, was_held, exited, recorded, stdin_client, stdin_close, log_opened, done;
	int status;
	uint64_t started_ns, exited_ns;
	int64_t log_deadline, log_retry;
	uint16_t width, height;
	char inbuf[RBUF + 1];
	char held[SYNC_MAXMSG];
	uint32_t held_len;
	char msg[CTL_MAXMSG];
} M;

/* ---- small things ---------------------------------------------------------- */

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void close_all(struct fds *f)
{
	for (int i = 0; i < f->n; i++)
		if (f->v[i] >= 0)
			close(f->v[i]);
	f->n = 0;
}

static int64_t now_ms(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static uint64_t wall_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_REALTIME, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void nonblock(int fd)
{
	int fl = fcntl(fd, F_GETFL);
	if (fl >= 0)
		fcntl(fd, F_SETFL, fl | O_NONBLOCK);
}

/* One datagram of up to three parts with descriptors; 0 or -errno. */
static int send_msg(int sock, struct iovec *iov, int niov, const int *fds, int nfds, int flags)
{
	union {
		struct cmsghdr h;
		char b[CMSG_SPACE(sizeof(int) * MAXFDS)];
	} c;
	struct msghdr m = { .msg_iov = iov, .msg_iovlen = (size_t)niov };

	if (nfds > 0) {
		m.msg_control = c.b;
		m.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)nfds);
		memset(c.b, 0, sizeof(struct cmsghdr));
		struct cmsghdr *h = CMSG_FIRSTHDR(&m);
		h->cmsg_level = SOL_SOCKET;
		h->cmsg_type = SCM_RIGHTS;
		h->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)nfds);
		memcpy(CMSG_DATA(h), fds, sizeof(int) * (size_t)nfds);
	}
	for (;;) {
		if (sendmsg(sock, &m, MSG_NOSIGNAL | flags) >= 0)
			return 0;
		if (errno != EINTR)
			return -errno;
	}
}

/* One datagram; its length, 0 at the end, -errno. Never more than size bytes:
 * a longer one is an error, like one with more descriptors than we take. */
static ssize_t recv_msg(int sock, void *buf, size_t size, struct fds *f)
{
	union {
		struct cmsghdr h;
		char b[CMSG_SPACE(sizeof(int) * MAXFDS)];
	} c;
	struct iovec iov = { buf, size };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = c.b, .msg_controllen = sizeof c.b };
	ssize_t n;

	f->n = 0;
	do
		n = recvmsg(sock, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	for (struct cmsghdr *h = CMSG_FIRSTHDR(&m); h; h = CMSG_NXTHDR(&m, h)) {
		if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS)
			continue;
		size_t cnt = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < cnt && f->n < MAXFDS; i++)
			memcpy(&f->v[f->n++], CMSG_DATA(h) + i * sizeof(int), sizeof(int));
	}
	if (m.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
		close_all(f);
		return -EMSGSIZE;
	}
	return n;
}

/* ---- answers and notices ----------------------------------------------------- */

static void drop_ctl(int i)
{
	close_fd(&M.ctl[i]);
	for (int k = 0; k < MAXPROC; k++)
		if (procs[k].ctl == i)
			procs[k].ctl = -1;
}

static void ctl_send(int i, uint16_t type, uint32_t cookie, const void *p, size_t n, const int *fds, int nfds)
{
	if (i < 0 || M.ctl[i] < 0)
		return;
	struct ctl_hdr h = { CTL_VERSION, type, cookie, (uint32_t)n };
	struct iovec iov[2] = { { &h, sizeof h }, { (void *)(uintptr_t)p, n } };
	/* An engine that does not read its notices loses its connection, not us. */
	if (send_msg(M.ctl[i], iov, n ? 2 : 1, fds, nfds, MSG_DONTWAIT) < 0)
		drop_ctl(i);
}

static void ctl_fail(int i, uint32_t cookie, int err, const char *name)
{
	char b[sizeof(struct sync_fail) + 255];
	struct sync_fail f = { ~0u, err, (uint8_t)strlen(name) };
	memcpy(b, &f, sizeof f);
	memcpy(b + sizeof f, name, f.name_len);
	ctl_send(i, CTL_FAILED, cookie, b, sizeof f + f.name_len, NULL, 0);
}

/* To the engine that asked, and if it has gone, to whoever is there. */
static void ctl_notice(int i, uint16_t type, uint32_t cookie, const void *p, size_t n, const int *fds, int nfds)
{
	if (i >= 0 && M.ctl[i] >= 0) {
		ctl_send(i, type, cookie, p, n, fds, nfds);
		return;
	}
	for (i = 0; i < MAXCTL; i++)
		ctl_send(i, type, cookie, p, n, fds, nfds);
}

static bool any_ctl(void)
{
	for (int i = 0; i < MAXCTL; i++)
		if (M.ctl[i] >= 0)
			return true;
	return false;
}

/* ---- starting processes ------------------------------------------------------ */

static void child_setup(int sync);

/*
 * Clones a child that runs the stage. The parent gets the pid, its end of the
 * sync socket and the pidfd.
 */
static pid_t spawn(uint64_t ns, int cgroup, int userns, bool foreign, int *sync, int *pidfd)
{
	int sp[2], back[2] = { -1, -1 };
	pid_t pid;
	struct clone3_args a = { .flags = (ns & NS_ALL) | CLONE_PIDFD, .exit_signal = SIGCHLD };

	*pidfd = -1;
	a.pidfd = (uint64_t)(uintptr_t)pidfd;
	if (cgroup >= 0) {
		a.flags |= CLONE_INTO_CGROUP_;
		a.cgroup = (uint64_t)cgroup;
	}
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sp) < 0)
		return -errno;
	if (userns >= 0) {
		/* To make namespaces that an existing user namespace owns one must be in
		 * it, for which there is no way back: a child goes there and makes its
		 * sibling, our child. */
		if (pipe2(back, O_CLOEXEC) < 0 || (pid = fork()) < 0) {
			int e = errno;
			close(sp[0]), close(sp[1]), close(back[0]), close(back[1]);
			return -e;
		}
		if (pid > 0) {
			int32_t r = -ECHILD;
			close(sp[1]);
			close(back[1]);
			while (read(back[0], &r, sizeof r) < 0 && errno == EINTR)
				;
			close(back[0]);
			if (r > 0)
				*pidfd = (int)syscall(SYS_pidfd_open, r, 0);
			if (r < 0)
				close(sp[0]);
			else
				*sync = sp[0];
			return r;
		}
		a.flags = (a.flags & ~(uint64_t)CLONE_PIDFD) | CLONE_PARENT;
		a.exit_signal = 0; /* the parent's */
		pid = setns(userns, CLONE_NEWUSER) < 0 ? -1 : (pid_t)syscall(SYS_clone3, &a, sizeof a);
		if (pid != 0) {
			int32_t r = pid < 0 ? -errno : pid;
			_exit(write(back[1], &r, sizeof r) != sizeof r);
		}
	} else {
		pid = (pid_t)syscall(SYS_clone3, &a, sizeof a);
	}
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		/* Born among the container's processes: they may not look at us. */
		if (foreign)
			prctl(PR_SET_DUMPABLE, 0);
		child_setup(sp[1]);
		stage_main(3);
	}
	int e = errno;
	close(sp[1]);
	if (pid < 0) {
		close(sp[0]);
		return -e;
	}
	*sync = sp[0];
	return pid;
}

/* What every child of ours does first. */
static void child_setup(int sync)
{
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	dup2(sync, 3);
	fcntl(3, F_SETFD, FD_CLOEXEC);
	if (syscall(SYS_close_range, 4u, ~0u, 0u) < 0)
		_exit(1);
}

#define MAXARGS 256

/* Splits NUL-terminated strings up to an empty one; the length used, 0 if bad. */
static size_t split(char *b, size_t n, char **out, bool last)
{
	size_t off = 0;
	int k = 0;

	while (off < n && b[off]) {
		if (k == MAXARGS)
			return 0;
		out[k++] = b + off;
		off += strnlen(b + off, n - off) + 1;
		if (off > n)
			return 0;
	}
	out[k] = NULL;
	return off < n ? off + 1 : last ? off : 0;
}

/* Runs a command with the three descriptors; its failure to begin comes as a
 * SYNC_FAIL, as a stage's would. */
static pid_t run_command(const char *b, size_t n, const int *std, int *sync)
{
	static char *argv[MAXARGS + 1], *envp[MAXARGS + 1];
	int sp[2];
	char *block = M.held; /* a command has no held plan */

	if (n > sizeof M.held)
		return -E2BIG;
	memcpy(block, b, n);
	size_t used = split(block, n, argv, false);
	if (!used || !argv[0] || argv[0][0] != '/' || !split(block + used, n - used, envp, true))
		if (!used || !argv[0] || argv[0][0] != '/' || used != n)
			return -EINVAL;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sp) < 0)
		return -errno;
	pid_t pid = fork();
	if (pid == 0) {
		for (int i = 0; i < 3; i++)
			if (dup2(std[i], i) < 0)
				_exit(1);
		child_setup(sp[1]);
		execve(argv[0], argv, envp);
		struct PACKED {
			struct sync_hdr h;
			struct sync_fail f;
			char name[255];
		} m = { .h = { SYNC_VERSION, SYNC_FAIL, 0 }, .f = { ~0u, errno, 0 } };
		int len = snprintf(m.name, sizeof m.name, "run %s", argv[0]);
		m.f.name_len = (uint8_t)(len > 254 ? 254 : len);
		m.h.len = (uint32_t)sizeof m.f + m.f.name_len;
		_exit(send(3, &m, sizeof m.h + m.h.len, MSG_NOSIGNAL) < 0 ? 1 : 127);
	}
	int e = errno;
	close(sp[1]);
	if (pid < 0) {
		close(sp[0]);
		return -e;
	}
	*sync = sp[0];
	return pid;
}

static int relay(struct proc *p, uint16_t type, const void *body, size_t n, const int *fds, int nfds)
{
	struct sync_hdr h = { SYNC_VERSION, type, (uint32_t)n };
	struct iovec iov[2] = { { &h, sizeof h }, { (void *)(uintptr_t)body, n } };
	if (p->sync < 0)
		return -ENOTCONN;
	/* May wait for the stage, which does nothing but read now. */
	return send_msg(p->sync, iov, 2, fds, nfds, 0);
}

/* Checks the head of a plan that n bytes begin with. */
static bool plan_ok(const char *b, size_t n)
{
	struct sync_plan p;
	if (n < sizeof p)
		return false;
	memcpy(&p, b, sizeof p);
	return n == sizeof p || n - sizeof p == p.plan_len;
}

static void on_clone(int c, uint32_t cookie, const char *b, size_t n, struct fds *f)
{
	struct ctl_clone cl;
	int cgroup = -1, userns = -1, k = 0, pidfd, err;

	if (n != sizeof cl || M.state != STATE_EMPTY) {
		ctl_fail(c, cookie, EINVAL, "clone");
		return;
	}
	memcpy(&cl, b, sizeof cl);
	if (cl.flags & CLONE_HAS_CGROUP)
		cgroup = k < f->n ? f->v[k++] : -1;
	if (cl.flags & CLONE_HAS_PIDNS) {
		if (k >= f->n || setns(f->v[k++], CLONE_NEWPID) < 0) {
			ctl_fail(c, cookie, errno, "join pid namespace");
			return;
		}
		M.pidns_entered = true;
	}
	if (cl.flags & CLONE_HAS_USERNS)
		userns = k < f->n ? f->v[k++] : -1;
	M.nice = cl.nice;
	err = spawn(cl.ns, cgroup, userns, (cl.flags & CLONE_HAS_PIDNS) != 0, &INIT->sync, &pidfd);
	if (err < 0) {
		ctl_fail(c, cookie, -err, "clone");
		return;
	}
	INIT->kind = P_INIT;
	INIT->pid = err;
	INIT->ctl = c;
	M.state = STATE_PARKED;
	uint32_t pid = (uint32_t)err;
	ctl_send(c, CTL_CLONED, cookie, &pid, sizeof pid, &pidfd, 1);
	close(pidfd);
}

static void serve(void)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX, .sun_path = "shim.sock" };

	unlink(a.sun_path);
	M.listen = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (M.listen < 0)
		return;
	mode_t old = umask(0177);
	if (bind(M.listen, (struct sockaddr *)&a, sizeof a) < 0 || listen(M.listen, 16) < 0)
		close_fd(&M.listen);
	umask(old);
}

static void kill_init(void)
{
	if (INIT->pid > 0 && !M.exited)
		kill(INIT->pid, SIGKILL);
}

static void set_size(int pty, uint16_t w, uint16_t h)
{
	struct winsize ws = { .ws_col = w, .ws_row = h };
	if (pty >= 0 && w && h)
		ioctl(pty, TIOCSWINSZ, &ws);
}

static int take(struct fds *f, int *k)
{
	int fd = *k < f->n ? f->v[*k] : -1;
	if (fd >= 0) {
		f->v[(*k)++] = -1;
		nonblock(fd);
	}
	return fd;
}

static void on_start(int c, uint32_t cookie, const char *b, size_t n, struct fds *f)
{
	struct ctl_start st;
	struct log_cfg lc = { .pipe_fd = -1 };
	int k = 0, err;

	if (n < sizeof st)
		goto bad;
	memcpy(&st, b, sizeof st);
	b += sizeof st, n -= sizeof st;
	bool command = (st.flags & START_COMMAND) != 0;
	if (M.state != (command ? STATE_EMPTY : STATE_PARKED) || INIT->wait != W_NONE || (command && st.hold_len) || st.path_len >= sizeof lc.path ||
	    st.hold_len > sizeof M.held || n < (size_t)st.path_len + st.hold_len ||
	    st.log_format > LOG_PIPE || memchr(b, 0, st.path_len))
		goto bad;
	memcpy(lc.path, b, st.path_len);
	lc.path[st.path_len] = 0;
	lc.format = st.log_format;
	lc.files = st.log_files < 1 ? 1 : st.log_files;
	lc.max = st.log_size;
	lc.nonblock = (st.flags & START_NONBLOCK) != 0;
	lc.buffer = st.log_buffer;
	if ((lc.format == LOG_JSON || lc.format == LOG_K8S) && lc.path[0] != '/')
		goto bad;
	memcpy(M.held, b + st.path_len, st.hold_len);
	M.held_len = st.hold_len;
	b += st.path_len + st.hold_len, n -= st.path_len + st.hold_len;
	if (!plan_ok(b, n) || (st.flags & START_HOLD && !plan_ok(M.held, M.held_len)))
		goto bad;
	if (st.flags & START_STDIN)
		M.stdin_fd = take(f, &k);
	if (st.flags & START_STDOUT)
		streams[0].fd = take(f, &k);
	if (st.flags & START_STDERR)
		streams[1].fd = take(f, &k);
	if (st.flags & START_LOGPIPE)
		lc.pipe_fd = take(f, &k);
	M.flags = st.flags;
	M.width = st.width, M.height = st.height;

	/* Set back what parking at low priority left behind, then let the stage work. */
	if (getpriority(PRIO_PROCESS, 0) != M.nice) {
		setpriority(PRIO_PROCESS, (id_t)INIT->pid, M.nice);
		setpriority(PRIO_PROCESS, 0, M.nice);
	}
	INIT->ctl = c;
	INIT->cookie = cookie;
	INIT->wait = command ? W_COMMAND : st.flags & START_HOLD ? W_SETUP : W_EXEC;
	M.state = STATE_STARTING;
	if (command) {
		err = f->n - k == 3 ? run_command(b + sizeof(struct sync_plan), n - sizeof(struct sync_plan), f->v + k, &INIT->sync) : -EINVAL;
		if (err > 0) {
			INIT->kind = P_INIT;
			INIT->pid = err;
		}
	} else {
		err = relay(INIT, SYNC_PLAN, b, n, f->v + k, f->n - k);
	}
	if (err < 0) {
		INIT->wait = W_NONE;
		INIT->failed = 1;
		kill_init();
		ctl_fail(c, cookie, -err, command ? "run command" : "send plan");
		return;
	}
	/* All the rest goes on beside the stage. */
	close_all(f);
	err = log_open(&lc);
	if (err < 0) {
		INIT->wait = W_NONE;
		INIT->failed = 1;
		kill_init();
		ctl_fail(c, cookie, -err, "open log");
		return;
	}
	M.log_opened = true;
	if (command) {
		serve();
		return;
	}
	char ns[40];
	snprintf(ns, sizeof ns, "/proc/%d/ns/mnt", (int)INIT->pid);
	M.mntns = open(ns, O_RDONLY | O_CLOEXEC);
	serve();
	return;
bad:
	ctl_fail(c, cookie, EINVAL, "start: malformed request");
}

static void on_started(struct proc *p);

static void on_release(int c, uint32_t cookie)
{
	int err;

	if (M.state != STATE_HELD) {
		ctl_fail(c, cookie, EALREADY, "release");
		return;
	}
	INIT->ctl = c;
	INIT->cookie = cookie;
	if (M.flags & START_COMMAND) {
		on_started(INIT);
		return;
	}
	INIT->wait = W_EXEC;
	M.state = STATE_STARTING;
	err = relay(INIT, SYNC_PLAN, M.held, M.held_len, NULL, 0);
	if (err < 0) {
		INIT->failed = 1;
		kill_init();
		ctl_fail(c, cookie, -err, "send plan");
	}
}

static void on_exec(int c, uint32_t cookie, const char *b, size_t n, struct fds *f)
{
	struct ctl_exec ex;
	struct proc *p = NULL;
	int cgroup = -1, k = 0, pidfd = -1, err;

	if (n < sizeof ex || !plan_ok(b + sizeof ex, n - sizeof ex) || cookie == 0) {
		ctl_fail(c, cookie, EINVAL, "exec: malformed request");
		return;
	}
	if ((M.state != STATE_RUNNING && M.state != STATE_HELD) || M.exited) {
		ctl_fail(c, cookie, ESRCH, "exec: the container is not running");
		return;
	}
	memcpy(&ex, b, sizeof ex);
	for (int i = 1; i < MAXPROC && !p; i++)
		if (procs[i].kind == P_FREE)
			p = &procs[i];
	if (!p) {
		ctl_fail(c, cookie, EAGAIN, "exec: too many processes at once");
		return;
	}
	if (!M.pidns_entered && M.flags & START_PIDNS) {
		/* From now on children are born in the container's pid namespace. */
		int fd = (int)syscall(SYS_pidfd_open, INIT->pid, 0);
		if (fd < 0 || setns(fd, CLONE_NEWPID) < 0) {
			ctl_fail(c, cookie, errno, "join pid namespace");
			close_fd(&fd);
			return;
		}
		close(fd);
		M.pidns_entered = true;
	}
	if (ex.flags & EXEC_HAS_CGROUP)
		cgroup = k < f->n ? f->v[k++] : -1;
	err = spawn(0, cgroup, -1, true, &p->sync, &pidfd);
	if (err < 0) {
		ctl_fail(c, cookie, -err, "clone");
		return;
	}
	close_fd(&pidfd);
	*p = (struct proc){ .pid = err, .sync = p->sync, .ctl = c, .extra = -1, .cookie = cookie, .kind = P_EXEC, .wait = W_EXEC };
	err = relay(p, SYNC_PLAN, b + sizeof ex, n - sizeof ex, f->v + k, f->n - k);
	if (err < 0) {
		p->failed = 1;
		kill(p->pid, SIGKILL);
		ctl_fail(c, cookie, -err, "send plan");
	}
}

/* A further part of a plan that does not fit one datagram: cookie tells whose. */
static void on_more(int c, uint32_t cookie, const char *b, size_t n, struct fds *f)
{
	for (int i = 0; i < MAXPROC; i++) {
		struct proc *p = &procs[i];
		if (p->kind == P_FREE || p->wait == W_NONE || p->ctl != c)
			continue;
		if ((p->wait == W_PLAN ? p->plan_cookie : p->cookie) == cookie && n == sizeof(struct sync_more)) {
			relay(p, SYNC_MORE, b, n, f->v, f->n);
			return;
		}
	}
}

static void on_plan(int c, uint32_t cookie, const char *b, size_t n, struct fds *f)
{
	int err = -EINVAL;

	if ((M.state == STATE_PARKED || M.state == STATE_HELD) && INIT->wait == W_NONE && plan_ok(b, n)) {
		INIT->ctl = c;
		INIT->plan_cookie = cookie;
		INIT->wait = W_PLAN;
		err = relay(INIT, SYNC_PLAN, b, n, f->v, f->n);
	}
	if (err < 0)
		ctl_fail(c, cookie, -err, "send plan");
}

/* ---- the stage's answers ------------------------------------------------------ */

static void take_pty(int fd)
{
	close_fd(&M.pty);
	nonblock(fd);
	M.pty = fd;
	streams[0].fd = fd;
	set_size(fd, M.width, M.height);
}

static void on_started(struct proc *p)
{
	struct ctl_started s = { (uint32_t)p->pid, wall_ns() };

	p->wait = W_NONE;
	p->started = 1;
	if (p->kind == P_INIT) {
		M.state = STATE_RUNNING;
		M.started_ns = s.at_ns;
	}
	ctl_notice(p->ctl, CTL_STARTED, p->cookie, &s, sizeof s, &p->extra, p->extra >= 0);
	close_fd(&p->extra);
}

static void on_sync(struct proc *p)
{
	struct {
		struct sync_hdr h;
		char b[512];
	} PACKED m;
	struct fds f;

	while (p->sync >= 0) {
		ssize_t n = recv_msg(p->sync, &m, sizeof m, &f);
		if (n == -EAGAIN)
			return;
		if (n <= 0) {
			close_fd(&p->sync);
			if (p->wait == W_EXEC && !p->failed)
				on_started(p);
			else if (p->wait != W_NONE && p->wait != W_COMMAND && !p->failed) {
				p->failed = 1;
				ctl_fail(p->ctl, p->wait == W_PLAN ? p->plan_cookie : p->cookie, EPIPE, "run plan: the stage died");
			}
			return;
		}
		size_t len = (size_t)n - sizeof m.h;
		if ((size_t)n < sizeof m.h || m.h.version != SYNC_VERSION || m.h.len != len) {
			close_all(&f);
			continue;
		}
		uint32_t cookie = p->wait == W_PLAN ? p->plan_cookie : p->cookie;
		switch (m.h.type) {
		case SYNC_DONE:
			if (p->wait == W_SETUP) {
				M.state = STATE_HELD;
				M.was_held = true;
			}
			if (p->wait != W_NONE) {
				p->wait = W_NONE;
				ctl_send(p->ctl, CTL_DONE, cookie, NULL, 0, f.v, f.n);
			}
			break;
		case SYNC_FAIL:
			if (len < sizeof(struct sync_fail))
				break;
			p->failed = 1;
			ctl_send(p->ctl, CTL_FAILED, cookie, m.b, len, NULL, 0);
			break;
		case SYNC_CHILD: {
			uint32_t pid;
			if (len != sizeof pid)
				break;
			memcpy(&pid, m.b, sizeof pid);
			/* A child of ours, not reaped yet: the number is safe. */
			int fd = (int)syscall(SYS_pidfd_open, pid, 0);
			p->pid = (pid_t)pid;
			if (fd >= 0 && p->kind == P_INIT)
				ctl_send(p->ctl, CTL_CLONED, 0, &pid, sizeof pid, &fd, 1);
			close_fd(&fd);
			break;
		}
		case SYNC_FD: {
			struct sync_fd s;
			if (len != sizeof s || f.n != 1)
				break;
			memcpy(&s, m.b, sizeof s);
			if (s.what == SYNC_FD_PTY && p->kind == P_INIT && M.flags & START_TERMINAL) {
				take_pty(f.v[0]);
				f.n = 0;
			} else if (s.what == SYNC_FD_PTY && p->kind == P_EXEC) {
				close_fd(&p->extra);
				p->extra = f.v[0];
				f.n = 0;
			} else {
				ctl_send(p->ctl, CTL_FD, cookie, m.b, len, f.v, f.n);
			}
			break;
		}
		}
		close_all(&f);
	}
}

/* ---- output ---------------------------------------------------------------------- */

static void drop_client(struct client *c)
{
	bool had_in = c->in >= 0;

	close_fd(&c->in);
	close_fd(&c->out[0]);
	close_fd(&c->out[1]);
	c->used = false;
	if (had_in && M.stdin_client && M.flags & START_STDIN_ONCE)
		M.stdin_close = true;
}

/* Gives each client what it has not got yet of the stream. */
static void deliver(int s)
{
	struct stream *st = &streams[s];

	for (int i = 0; i < MAXCLIENT; i++) {
		struct client *c = &clients[i];
		if (!c->used || c->out[s] < 0)
			continue;
		while (c->off[s] < st->len) {
			ssize_t n = write(c->out[s], st->data + c->off[s], st->len - c->off[s]);
			if (n > 0) {
				c->off[s] += (uint32_t)n;
				c->lag = 0;
				continue;
			}
			if (n < 0 && errno == EINTR)
				continue;
			if (n < 0 && errno == EAGAIN) {
				if (!c->lag)
					c->lag = now_ms();
			} else {
				close_fd(&c->out[s]); /* nobody reads any more */
				if (c->in < 0 && c->out[0] < 0 && c->out[1] < 0)
					drop_client(c);
			}
			break;
		}
	}
}

static bool lagging(int s)
{
	for (int i = 0; i < MAXCLIENT; i++)
		if (clients[i].used && clients[i].out[s] >= 0 && clients[i].off[s] < streams[s].len)
			return true;
	return false;
}

static void feed(int s)
{
	struct stream *st = &streams[s];

	if (st->fed < st->len)
		st->fed += (uint32_t)log_feed(s + 1, st->data + st->fed, st->len - st->fed);
}

static void reset(int s)
{
	streams[s].len = streams[s].fed = 0;
	for (int i = 0; i < MAXCLIENT; i++)
		clients[i].off[s] = 0;
}

static void end_stream(int s)
{
	if (streams[s].fd < 0)
		return;
	if (streams[s].fd == M.pty)
		M.pty = -1;
	close_fd(&streams[s].fd);
}

/* Reads once; false when there is nothing to read now or ever. */
static bool pump(int s)
{
	struct stream *st = &streams[s];
	ssize_t n;

	if (st->fd < 0)
		return false;
	if (st->fed == st->len && !lagging(s))
		reset(s);
	size_t room = (st->data == st->rbuf ? RBUF : TAIL) - st->len;
	if (room == 0 || (st->data == st->rbuf && st->len > 0))
		return false;
	do
		n = read(st->fd, st->data + st->len, room);
	while (n < 0 && errno == EINTR);
	if (n < 0 && errno == EAGAIN)
		return false;
	if (n <= 0) {
		end_stream(s);
		if (!M.exited)
			log_eof(s + 1);
		return false;
	}
	st->len += (uint32_t)n;
	deliver(s);
	feed(s);
	return true;
}

/*
 * After the end all that is left in the pipe is taken at once, wherever slow
 * clients may be, since the log and the exit record wait for it.
 */
static void drain(int s)
{
	struct stream *st = &streams[s];

	while (st->fd >= 0) {
		if (pump(s))
			continue;
		if (st->fd < 0)
			break;
		if (st->len > 0 && st->data == st->rbuf && (st->fed < st->len || lagging(s))) {
			char *t = mmap(NULL, TAIL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
			if (t != MAP_FAILED) {
				memcpy(t, st->rbuf, st->len);
				st->data = t;
				ssize_t n;
				while (st->len < TAIL && (n = read(st->fd, t + st->len, TAIL - st->len)) > 0)
					st->len += (uint32_t)n;
				deliver(s);
				feed(s);
			}
		}
		end_stream(s); /* what writers outside the container say now is lost */
	}
}

/* ---- standard input ------------------------------------------------------------- */

static void push_stdin(void)
{
	int fd = M.pty >= 0 ? M.pty : M.stdin_fd;

	while (M.in_off < M.in_len) {
		ssize_t n = fd < 0 ? (ssize_t)(M.in_len - M.in_off) : write(fd, M.inbuf + M.in_off, M.in_len - M.in_off);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return;
		if (n < 0) { /* the container closed it: swallow what comes */
			close_fd(&M.stdin_fd);
			break;
		}
		M.in_off += (uint32_t)n;
	}
	M.in_off = M.in_len = 0;
	if (M.stdin_close)
		close_fd(&M.stdin_fd);
}

static void on_client_in(struct client *c)
{
	ssize_t n = recv(c->in, M.inbuf, sizeof M.inbuf, MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		close_fd(&c->in);
		if (M.flags & START_STDIN_ONCE && M.stdin_client)
			M.stdin_close = true;
		if (c->out[0] < 0 && c->out[1] < 0)
			c->used = false;
	} else if (M.inbuf[0] == 0) {
		M.in_off = 1, M.in_len = (uint32_t)n;
	} else if (M.inbuf[0] == 1) {
		M.stdin_close = true;
	}
	push_stdin();
}

static void on_attach(int ctl, uint32_t cookie, const char *b, size_t n, struct fds *f)
{
	struct ctl_attach a;
	struct client *c = NULL;
	int k = 0;

	for (int i = 0; i < MAXCLIENT && !c; i++)
		if (!clients[i].used)
			c = &clients[i];
	if (n != sizeof a || !c) {
		ctl_fail(ctl, cookie, c ? EINVAL : EAGAIN, c ? "attach" : "attach: too many clients");
		return;
	}
	memcpy(&a, b, sizeof a);
	*c = (struct client){ .in = -1, .out = { -1, -1 }, .used = true, .lossless = (a.flags & ATTACH_LOSSLESS) != 0 };
	if (a.flags & ATTACH_STDIN && (c->in = take(f, &k)) >= 0)
		M.stdin_client = true;
	for (int s = 0; s < 2; s++)
		if (a.flags & (s ? ATTACH_STDERR : ATTACH_STDOUT)) {
			c->out[s] = take(f, &k);
			c->off[s] = streams[s].len;
		}
	ctl_send(ctl, CTL_DONE, cookie, NULL, 0, NULL, 0);
}

/* ---- the end ------------------------------------------------------------------------ */

static void write_record(void)
{
	char b[256];
	int n = snprintf(b, sizeof b, "{\"version\":1,\"pid\":%d,\"status\":%d,\"started\":%llu,\"exited\":%llu,\"dropped\":%llu}\n",
		(int)INIT->pid, M.status, (unsigned long long)M.started_ns, (unsigned long long)M.exited_ns,
		(unsigned long long)log_dropped());
	int fd = open("exit.tmp", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);

	if (fd < 0)
		return;
	bool ok = write(fd, b, (size_t)n) == n;
	bool sync = !(M.flags & START_EPHEMERAL);
	if (sync && ok)
		fsync(fd);
	close(fd);
	if (ok && rename("exit.tmp", "exit") == 0 && sync) {
		fd = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (fd >= 0) {
			fsync(fd);
			close(fd);
		}
	}
}

static void tell_exit(int ctl, uint32_t cookie)
{
	struct ctl_exited e = { M.status, M.exited_ns, log_dropped() };
	if (ctl >= 0)
		ctl_send(ctl, CTL_EXITED, cookie, &e, sizeof e, NULL, 0);
	else
		for (int i = 0; i < MAXCTL; i++)
			ctl_send(i, CTL_EXITED, cookie, &e, sizeof e, NULL, 0);
}

/* Once init has ended: when the log is whole, record and tell it, then let the
 * mount namespace go. */
static void finish(void)
{
	if (M.recorded)
		return;
	for (int s = 0; s < 2; s++) {
		drain(s);
		feed(s);
	}
	bool whole = streams[0].fed == streams[0].len && streams[1].fed == streams[1].len;
	if (whole) {
		log_eof(1);
		log_eof(2);
		whole = log_flush() == 0;
	}
	if (!whole) {
		if (!M.log_deadline)
			M.log_deadline = now_ms() + (M.flags & START_NONBLOCK ? LOG_GIVEUP_MS / 10 : LOG_GIVEUP_MS);
		if (now_ms() < M.log_deadline)
			return;
		log_abandon();
		streams[0].fed = streams[0].len;
		streams[1].fed = streams[1].len;
	}
	log_close();
	M.recorded = true;
	M.state = STATE_EXITED;
	if (M.flags & START_EPHEMERAL) {
		tell_exit(-1, 0);
		write_record();
	} else {
		write_record();
		tell_exit(-1, 0);
	}
	close_fd(&M.mntns);
	close_fd(&M.stdin_fd);
}

/* Children that ended before we knew whose they were. */
static struct { pid_t pid; int status; } strays[8];

static void on_child(pid_t pid, int status);

/* The command that makes the container has ended: its init is our child now. */
static void adopt(int status)
{
	char b[32] = "";
	int fd, pidfd;
	ssize_t n = 0;
	uint32_t pid = 0;

	if (WIFEXITED(status) && WEXITSTATUS(status) == 0 && !INIT->failed && (fd = open("pid", O_RDONLY | O_CLOEXEC | O_NOFOLLOW)) >= 0) {
		n = read(fd, b, sizeof b - 1);
		close(fd);
	}
	for (ssize_t i = 0; i < n && b[i] >= '0' && b[i] <= '9' && pid < 1u << 26; i++)
		pid = pid * 10 + (uint32_t)(b[i] - '0');
	int stray = -1;
	for (int i = 0; i < 8 && pid; i++)
		if (strays[i].pid == (pid_t)pid)
			stray = i;
	siginfo_t si;
	if (pid == 0 || (stray < 0 && waitid(P_PID, pid, &si, WEXITED | WNOHANG | WNOWAIT) < 0)) {
		if (!INIT->failed)
			ctl_fail(INIT->ctl, INIT->cookie, pid ? ECHILD : ECANCELED, "create container");
		INIT->failed = 1;
		M.exited = true;
		M.done = true;
		return;
	}
	INIT->pid = (pid_t)pid;
	INIT->wait = W_NONE;
	M.state = STATE_HELD;
	M.was_held = true;
	pidfd = stray < 0 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
	if (pidfd >= 0)
		ctl_send(INIT->ctl, CTL_CLONED, 0, &pid, sizeof pid, &pidfd, 1);
	close_fd(&pidfd);
	ctl_send(INIT->ctl, CTL_DONE, INIT->cookie, NULL, 0, NULL, 0);
	if (stray >= 0)
		on_child((pid_t)pid, strays[stray].status);
}

static void on_child(pid_t pid, int status)
{
	static unsigned next;

	for (int i = 0; i < MAXPROC; i++) {
		struct proc *p = &procs[i];
		if (p->kind == P_FREE || p->pid != pid)
			continue;
		on_sync(p); /* the start comes before the end */
		if (p->kind == P_INIT && p->wait == W_COMMAND) {
			adopt(status);
		} else if (p->kind == P_INIT) {
			M.status = status;
			M.exited_ns = wall_ns();
			M.exited = true;
			/* One that never ran is no container yet: the engine has been told. One
			 * that was held has been acknowledged, so its end is recorded. */
			if ((!p->started || p->failed) && !M.was_held)
				M.done = true;
		} else {
			struct ctl_exited e = { status, wall_ns(), 0 };
			if (p->started && !p->failed)
				ctl_notice(p->ctl, CTL_EXEC_EXITED, p->cookie, &e, sizeof e, NULL, 0);
			close_fd(&p->sync);
			close_fd(&p->extra);
			*p = (struct proc){ .sync = -1, .ctl = -1, .extra = -1 };
		}
		return;
	}
	strays[next % 8].pid = pid;
	strays[next++ % 8].status = status;
}

static void reap(void)
{
	struct signalfd_siginfo si[8];
	pid_t pid;
	int status;

	while (read(M.sig, si, sizeof si) > 0)
		;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		on_child(pid, status);
}

/* ---- control sockets ------------------------------------------------------------- */

static void on_accept(void)
{
	struct ucred cr;
	socklen_t len = sizeof cr;
	int fd = accept4(M.listen, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0)
		return;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cr, &len) == 0 && cr.uid == geteuid())
		for (int i = 0; i < MAXCTL; i++)
			if (M.ctl[i] < 0) {
				M.ctl[i] = fd;
				return;
			}
	close(fd);
}

static void on_signal(int c, uint32_t cookie, const char *b, size_t n)
{
	struct ctl_signal s;
	int err = ESRCH;

	if (n == sizeof s) {
		memcpy(&s, b, sizeof s);
		for (int i = 0; i < MAXPROC; i++)
			if (procs[i].kind != P_FREE && (s.target ? procs[i].cookie == s.target && i > 0 : i == 0) && !(i == 0 && M.exited))
				err = kill(procs[i].pid, s.sig) < 0 ? errno : 0;
	}
	if (err)
		ctl_fail(c, cookie, err, "signal");
	else
		ctl_send(c, CTL_DONE, cookie, NULL, 0, NULL, 0);
}

static void on_state(int c, uint32_t cookie)
{
	struct ctl_state s = { M.state, (uint32_t)INIT->pid, M.started_ns, log_dropped(), M.flags, 0 };

	for (int i = 0; i < MAXCLIENT; i++)
		s.clients += clients[i].used;
	ctl_send(c, CTL_STATE_IS, cookie, &s, sizeof s, NULL, 0);
	if (M.recorded)
		tell_exit(c, cookie);
}

static void on_ctl(int c)
{
	struct fds f;
	struct ctl_hdr h;
	ssize_t n = recv_msg(M.ctl[c], M.msg, sizeof M.msg, &f);

	if (n == -EAGAIN)
		return;
	if (n <= 0) {
		drop_ctl(c);
		return;
	}
	if ((size_t)n < sizeof h) {
		close_all(&f);
		return;
	}
	memcpy(&h, M.msg, sizeof h);
	const char *b = M.msg + sizeof h;
	size_t len = (size_t)n - sizeof h;
	if (h.version != CTL_VERSION || h.len != len) {
		ctl_fail(c, h.cookie, EPROTO, "read message");
		close_all(&f);
		return;
	}
	int err = 0;
	switch (h.type) {
	case CTL_CLONE: on_clone(c, h.cookie, b, len, &f); break;
	case CTL_PLAN: on_plan(c, h.cookie, b, len, &f); break;
	case CTL_MORE: on_more(c, h.cookie, b, len, &f); break;
	case CTL_START: on_start(c, h.cookie, b, len, &f); break;
	case CTL_RELEASE: on_release(c, h.cookie); break;
	case CTL_EXEC: on_exec(c, h.cookie, b, len, &f); break;
	case CTL_SIGNAL: on_signal(c, h.cookie, b, len); break;
	case CTL_ATTACH: on_attach(c, h.cookie, b, len, &f); break;
	case CTL_STATE: on_state(c, h.cookie); break;
	case CTL_RESIZE: {
		struct ctl_resize r;
		if (len == sizeof r) {
			memcpy(&r, b, sizeof r);
			M.width = r.width, M.height = r.height;
			set_size(M.pty, r.width, r.height);
			ctl_send(c, CTL_DONE, h.cookie, NULL, 0, NULL, 0);
		}
		break;
	}
	case CTL_REOPEN: {
		int k = 0, fd = take(&f, &k);
		err = log_reopen(fd);
		if (err < 0) {
			close_fd(&fd);
			ctl_fail(c, h.cookie, -err, "open log");
		} else
			ctl_send(c, CTL_DONE, h.cookie, NULL, 0, NULL, 0);
		break;
	}
	case CTL_TERMINAL: {
		int k = 0, fd = take(&f, &k);
		if (fd < 0 || M.pty >= 0 || !(M.flags & START_TERMINAL) || M.exited) {
			close_fd(&fd);
			ctl_fail(c, h.cookie, EINVAL, "take terminal");
		} else {
			take_pty(fd);
			ctl_send(c, CTL_DONE, h.cookie, NULL, 0, NULL, 0);
		}
		break;
	}
	case CTL_QUIT:
		if (M.recorded || M.state <= STATE_PARKED)
			M.done = true;
		else if (INIT->wait == W_COMMAND)
			kill_init(); /* the command that was to make the container */
		break;
	default:
		ctl_fail(c, h.cookie, ENOSYS, "read message: unknown type");
	}
	close_all(&f);
}

/* ---- the loop ------------------------------------------------------------------------ */

enum { K_SIG, K_CTL, K_LISTEN, K_SYNC, K_STREAM, K_STDIN, K_CLIN, K_CLOUT, K_LOG };

static struct pollfd pfd[MAXPROC + MAXCTL + MAXCLIENT * 3 + 8];
static struct { uint8_t kind; uint16_t idx; } what[sizeof pfd / sizeof pfd[0]];
static int npfd;

static void watch(int fd, short events, uint8_t kind, int idx)
{
	if (fd < 0)
		return;
	pfd[npfd] = (struct pollfd){ .fd = fd, .events = events };
	what[npfd].kind = kind;
	what[npfd++].idx = (uint16_t)idx;
}

/* Sets up what to poll for; returns the time to wait. */
static int prepare(void)
{
	int64_t wait = -1, now = 0;

	npfd = 0;
	for (int i = 0; i < MAXPROC; i++)
		if (procs[i].kind != P_FREE)
			watch(procs[i].sync, POLLIN, K_SYNC, i);
	watch(M.sig, POLLIN, K_SIG, 0);
	for (int i = 0; i < MAXCTL; i++)
		watch(M.ctl[i], POLLIN, K_CTL, i);
	watch(M.listen, POLLIN, K_LISTEN, 0);
	for (int s = 0; s < 2; s++)
		if (streams[s].fd >= 0 && streams[s].fed == streams[s].len && !lagging(s))
			watch(streams[s].fd, POLLIN, K_STREAM, s);
	if (M.in_off < M.in_len)
		watch(M.pty >= 0 ? M.pty : M.stdin_fd, POLLOUT, K_STDIN, 0);
	for (int i = 0; i < MAXCLIENT; i++) {
		struct client *c = &clients[i];
		if (!c->used)
			continue;
		if (M.in_off == M.in_len)
			watch(c->in, POLLIN, K_CLIN, i);
		for (int s = 0; s < 2; s++)
			watch(c->out[s], c->off[s] < streams[s].len ? POLLOUT : 0, K_CLOUT, i);
		if (c->lag && !c->lossless) {
			now = now ? now : now_ms();
			int64_t left = c->lag + LAG_MS - now;
			wait = wait < 0 || left < wait ? (left < 0 ? 0 : left) : wait;
		}
	}
	if (log_flush() < 0 || streams[0].fed < streams[0].len || streams[1].fed < streams[1].len) {
		watch(log_pollfd(), POLLOUT, K_LOG, 0);
		if (wait < 0 || wait > LOG_RETRY_MS)
			wait = LOG_RETRY_MS;
	}
	return (int)wait;
}

static bool clients_done(void)
{
	for (int i = 0; i < MAXCLIENT; i++)
		for (int s = 0; s < 2; s++)
			if (clients[i].used && clients[i].out[s] >= 0 && clients[i].off[s] < streams[s].len)
				return false;
	return true;
}

static void turn(void)
{
	int wait = prepare();
	int n = poll(pfd, (nfds_t)npfd, wait);

	if (n < 0 && errno != EINTR)
		_exit(1);
	bool child = false;
	for (int i = 0; i < npfd && n > 0; i++) {
		if (!pfd[i].revents)
			continue;
		n--;
		int x = what[i].idx;
		switch (what[i].kind) {
		case K_SYNC: on_sync(&procs[x]); break;
		case K_SIG: child = true; break;
		case K_CTL: if (M.ctl[x] >= 0) on_ctl(x); break;
		case K_LISTEN: on_accept(); break;
		case K_STREAM: pump(x); break;
		case K_STDIN: push_stdin(); break;
		case K_CLIN: if (clients[x].in >= 0) on_client_in(&clients[x]); break;
		case K_CLOUT:
			for (int s = 0; s < 2; s++)
				if (clients[x].used && clients[x].out[s] == pfd[i].fd && pfd[i].revents & POLLERR) {
					close_fd(&clients[x].out[s]);
					if (clients[x].in < 0 && clients[x].out[0] < 0 && clients[x].out[1] < 0)
						drop_client(&clients[x]);
				}
			deliver(0);
			deliver(1);
			break;
		case K_LOG: log_flush(); break;
		}
	}
	if (child)
		reap();
	for (int s = 0; s < 2; s++)
		feed(s);
	if (M.stdin_close || M.in_off < M.in_len)
		push_stdin();
	for (int i = 0; i < MAXCLIENT; i++)
		if (clients[i].used && clients[i].lag && !clients[i].lossless && now_ms() - clients[i].lag >= LAG_MS)
			drop_client(&clients[i]);
	if (M.exited && !M.done)
		finish();
}

int monitor_main(void)
{
	sigset_t all;

	for (int i = 0; i < MAXCTL; i++)
		M.ctl[i] = -1;
	for (int i = 0; i < MAXPROC; i++)
		procs[i].sync = procs[i].ctl = procs[i].extra = -1;
	for (int i = 0; i < MAXCLIENT; i++)
		clients[i].in = clients[i].out[0] = clients[i].out[1] = -1;
	for (int s = 0; s < 2; s++)
		streams[s].fd = -1, streams[s].data = streams[s].rbuf;
	M.listen = M.mntns = M.pty = M.stdin_fd = -1;
	M.ctl[0] = 3;
	if (fcntl(3, F_SETFD, FD_CLOEXEC) < 0 || fchdir(4) < 0)
		return 1;
	close(4);
	umask(022); /* the container's, too, unless it says otherwise */
	prctl(PR_SET_NAME, "servin-shim");
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	signal(SIGPIPE, SIG_IGN);
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigemptyset(&all);
	sigaddset(&all, SIGCHLD);
	M.sig = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
	if (M.sig < 0)
		return 1;
	while (!M.done) {
		turn();
		if (M.recorded && clients_done())
			break;
		if (!any_ctl() && M.state < STATE_STARTING)
			break; /* parked for an engine that is gone */
	}
	kill_init();
	return 0;
}
