/* Starting processes: the stage, and commands that make a container. */
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
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x1000
#endif
#define CLONE_INTO_CGROUP_ 0x200000000ull

/* What every child of ours does first. */
void child_setup(int sync)
{
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	if (sync != 3)
		dup2(sync, 3);
	fcntl(3, F_SETFD, FD_CLOEXEC);
	if (syscall(SYS_close_range, 4u, ~0u, 0u) < 0)
		_exit(1);
}

/*
 * Clones a child that runs the stage. The parent gets the pid, its end of the
 * sync socket and the pidfd. pidns is not negative where the child is born among
 * others' processes; with a user namespace, it is the pid namespace to enter.
 */
pid_t spawn(uint64_t ns, int cgroup, int userns, int pidns, int *sync, int *pidfd)
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
		pid = (pidns >= 0 && setns(pidns, CLONE_NEWPID) < 0) || setns(userns, CLONE_NEWUSER) < 0 ? -1 :
			(pid_t)syscall(SYS_clone3, &a, sizeof a);
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
		if (pidns >= 0)
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
pid_t run_command(const char *b, size_t n, const int *std, int *sync)
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
