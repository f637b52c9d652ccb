/*
 * The launcher: it clones the start-up stage as its own sibling and ends, so that
 * a container's init is the child of whoever ran the launcher and, when that ends
 * too, of its subreaper. No monitor stands between. See PROTOCOL.md.
 *
 * Descriptor 3 is the sync socket, with a CLONE message waiting in it; the stage
 * goes on with it.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "monitor.h"

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x1000
#endif
#define CLONE_INTO_CGROUP_ 0x200000000ull

/* Enters what can be entered; what is left takes the privileges of the user
 * namespace that comes next. The first refusal is kept in errno. */
static bool join(int *ns, int n, int pidns)
{
	bool all = true;

	for (int i = 0; i < n; i++) {
		if (ns[i] < 0)
			continue;
		if (setns(ns[i], i == pidns ? CLONE_NEWPID : 0) < 0)
			all = false;
		else
			shut(&ns[i]);
	}
	return all;
}

int launch_main(void)
{
	struct {
		struct ctl_hdr h;
		struct ctl_clone c;
	} PACKED m;
	struct fds f;
	int cgroup = -1, userns = -1, pidfd = -1, k = 0, pidns = -1;
	struct clone3_args a = { .flags = CLONE_PARENT | CLONE_PIDFD, .pidfd = (uint64_t)(uintptr_t)&pidfd };

	/* Whoever ran the command may have left descriptors open to it: none of
	 * them may stay with a process that waits inside a container. What is meant
	 * for it comes in messages. */
	if (syscall(SYS_close_range, 4, ~0U, 0) < 0)
		return 1;
	for (int i = 0; i < MAXCTL; i++)
		M.ctl[i] = -1;
	M.ctl[0] = 3;
	if (fcntl(3, F_SETFD, FD_CLOEXEC) < 0 || msg_recv(3, &m, sizeof m, &f) != (ssize_t)sizeof m || m.h.version != CTL_VERSION ||
	    m.h.type != CTL_CLONE)
		return 1;
	if (m.c.flags & CLONE_HAS_CGROUP && k < f.n) {
		cgroup = f.v[k++];
		a.flags |= CLONE_INTO_CGROUP_;
		a.cgroup = (uint64_t)cgroup;
	}
	int *rest = f.v + k;
	if (m.c.flags & CLONE_HAS_PIDNS && k < f.n) {
		pidns = 0;
		k++;
	}
	if (m.c.flags & CLONE_HAS_USERNS && k < f.n) {
		userns = f.v[k];
		f.v[k] = -1;
	}
	int nrest = f.n - (int)(rest - f.v);
	if (!join(rest, nrest, pidns) && userns < 0) {
		ctl_fail(0, 0, errno, "join namespace");
		return 1;
	}
	if (userns >= 0) {
		if (setns(userns, CLONE_NEWUSER) < 0) {
			ctl_fail(0, 0, errno, "join user namespace");
			return 1;
		}
		if (!join(rest, nrest, pidns)) {
			ctl_fail(0, 0, errno, "join namespace");
			return 1;
		}
	}
	a.flags |= m.c.ns & NS_ALL;
	/* Born among others it must not be looked at; only an ordinary user has to, to map ids. */
	if (!(m.c.ns & CLONE_NEWUSER) || geteuid() == 0)
		prctl(PR_SET_DUMPABLE, 0);
	pid_t pid = (pid_t)syscall(SYS_clone3, &a, sizeof a);
	if (pid == 0) {
		char go;
		/* ids are mapped from outside while we can still be looked at */
		if (m.c.ns & CLONE_NEWUSER && read(3, &go, 1) != 1)
			_exit(1);
		child_setup(3);
		stage_main(3);
	}
	if (pid < 0) {
		ctl_fail(0, 0, errno, "clone");
		return 1;
	}
	uint32_t p = (uint32_t)pid;
	ctl_send(0, CTL_CLONED, 0, &p, sizeof p, &pidfd, 1);
	return 0;
}
