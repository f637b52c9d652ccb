/* What becomes of children: the stage's answers, adoption, the end and its record. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

void take_pty(int fd)
{
	shut(&M.pty);
	nonblock(fd);
	M.pty = fd;
	streams[0].fd = fd;
	set_size(fd, M.width, M.height);
}

void on_started(struct proc *p)
{
	struct ctl_started s = { (uint32_t)p->pid, wall_ns() };

	p->wait = W_NONE;
	p->started = 1;
	if (p->kind == P_INIT) {
		M.state = STATE_RUNNING;
		M.started_ns = s.at_ns;
	}
	ctl_notice(p->ctl, CTL_STARTED, p->cookie, &s, sizeof s, &p->extra, p->extra >= 0);
	shut(&p->extra);
}

void on_sync(struct proc *p)
{
	struct {
		struct sync_hdr h;
		char b[512];
	} PACKED m;
	struct fds f;

	while (p->sync >= 0) {
		ssize_t n = msg_recv(p->sync, &m, sizeof m, &f);
		if (n == -EAGAIN)
			return;
		if (n <= 0) {
			shut(&p->sync);
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
			shut(&fd);
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
				shut(&p->extra);
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

void tell_exit(int ctl, uint32_t cookie)
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
void finish(void)
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
	shut(&M.mntns);
	shut(&M.stdin_fd);
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
	shut(&pidfd);
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
			shut(&p->sync);
			shut(&p->extra);
			*p = (struct proc){ .sync = -1, .ctl = -1, .extra = -1 };
		}
		return;
	}
	strays[next % 8].pid = pid;
	strays[next++ % 8].status = status;
}

void reap(void)
{
	struct signalfd_siginfo si[8];
	pid_t pid;
	int status;

	while (read(M.sig, si, sizeof si) > 0)
		;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		on_child(pid, status);
}
