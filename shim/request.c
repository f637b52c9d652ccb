/* What the engine asks for: clone, plans, start, exec. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static int relay(struct proc *p, uint16_t type, const void *body, size_t n, const int *fds, int nfds)
{
	struct sync_hdr h = { SYNC_VERSION, type, (uint32_t)n };
	struct iovec iov[2] = { { &h, sizeof h }, { (void *)(uintptr_t)body, n } };
	if (p->sync < 0)
		return -ENOTCONN;
	/* May wait for the stage, which does nothing but read now. */
	return msg_send(p->sync, iov, 2, fds, nfds, 0);
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

void on_clone(int c, uint32_t cookie, const char *b, size_t n, struct fds *f)
{
	struct ctl_clone cl;
	int cgroup = -1, userns = -1, pidns = -1, k = 0, pidfd, err;

	if (n != sizeof cl || M.state != STATE_EMPTY) {
		ctl_fail(c, cookie, EINVAL, "clone");
		return;
	}
	memcpy(&cl, b, sizeof cl);
	if (cl.flags & CLONE_HAS_CGROUP)
		cgroup = k < f->n ? f->v[k++] : -1;
	if (cl.flags & CLONE_HAS_PIDNS)
		pidns = k < f->n ? f->v[k++] : -1;
	if (cl.flags & CLONE_HAS_USERNS)
		userns = k < f->n ? f->v[k++] : -1;
	/* Where a child of ours makes the stage, it must number it as we do: then
	 * that child enters the pid namespace, and we do behind it. */
	if (cl.flags & CLONE_HAS_PIDNS && userns < 0 && setns(pidns, CLONE_NEWPID) < 0) {
		ctl_fail(c, cookie, errno, "join pid namespace");
		return;
	}
	M.nice = cl.nice;
	err = spawn(cl.ns, cgroup, userns, pidns, &INIT->sync, &pidfd);
	if (err >= 0 && pidns >= 0 && userns >= 0 && setns(pidns, CLONE_NEWPID) < 0) {
		int e = errno;
		kill(err, SIGKILL);
		close(pidfd);
		shut(&INIT->sync);
		err = -e;
	}
	if (err < 0) {
		ctl_fail(c, cookie, -err, "clone");
		return;
	}
	M.pidns_entered = pidns >= 0;
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
		shut(&M.listen);
	umask(old);
}

void kill_init(void)
{
	if (INIT->pid > 0 && !M.exited)
		kill(INIT->pid, SIGKILL);
}

void set_size(int pty, uint16_t w, uint16_t h)
{
	struct winsize ws = { .ws_col = w, .ws_row = h };
	if (pty >= 0 && w && h)
		ioctl(pty, TIOCSWINSZ, &ws);
}

int take(struct fds *f, int *k)
{
	int fd = *k < f->n ? f->v[*k] : -1;
	if (fd >= 0) {
		f->v[(*k)++] = -1;
		nonblock(fd);
	}
	return fd;
}

void on_start(int c, uint32_t cookie, const char *b, size_t n, struct fds *f)
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
	if (st.flags & START_HOLDFILE)
		M.held_fd = take(f, &k);
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
		M.done = command; /* there is no child whose end would end us */
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

void on_release(int c, uint32_t cookie)
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
	err = relay(INIT, SYNC_PLAN, M.held, M.held_len, &M.held_fd, M.held_fd >= 0);
	shut(&M.held_fd);
	if (err < 0) {
		INIT->failed = 1;
		kill_init();
		ctl_fail(c, cookie, -err, "send plan");
	}
}

void on_exec(int c, uint32_t cookie, const char *b, size_t n, struct fds *f)
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
			shut(&fd);
			return;
		}
		close(fd);
		M.pidns_entered = true;
	}
	if (ex.flags & EXEC_HAS_CGROUP)
		cgroup = k < f->n ? f->v[k++] : -1;
	err = spawn(0, cgroup, -1, 0, &p->sync, &pidfd);
	if (err < 0) {
		ctl_fail(c, cookie, -err, "clone");
		return;
	}
	shut(&pidfd);
	*p = (struct proc){ .pid = err, .sync = p->sync, .ctl = c, .extra = -1, .cookie = cookie, .kind = P_EXEC, .wait = W_EXEC };
	err = relay(p, SYNC_PLAN, b + sizeof ex, n - sizeof ex, f->v + k, f->n - k);
	if (err < 0) {
		p->failed = 1;
		kill(p->pid, SIGKILL);
		ctl_fail(c, cookie, -err, "send plan");
	}
}

/* A further part of a plan that does not fit one datagram: cookie tells whose. */
void on_more(int c, uint32_t cookie, const char *b, size_t n, struct fds *f)
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

void on_plan(int c, uint32_t cookie, const char *b, size_t n, struct fds *f)
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
