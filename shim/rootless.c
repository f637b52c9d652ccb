/*
 * Rootless mode: an ordinary user's engine lives in a user namespace of its
 * own. That namespace, with its mount, network and ipc namespaces, has to outlive
 * the engine, since containers do: a holder keeps it, a process that does
 * nothing. A single-threaded program is needed to enter a user namespace, which
 * a Go program is not.
 *
 *   servin-shim rootless-hold            descriptor 3: a socket to the engine
 *   servin-shim rootless-enter PID PROGRAM ARGS...
 *
 * The dialogue on descriptor 3, one byte each: holder says 'u' (user namespace
 * made), engine answers 'm' (ids mapped), holder says 'r' (ready) or ends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "rootless.h"

static int fail(const char *what)
{
	fprintf(stderr, "servin-shim: cannot %s: %s\n", what, strerror(errno));
	return 1;
}

static int become_root(void)
{
	/* Groups cannot be dropped where setgroups is denied (a single mapped id). */
	if (setgroups(0, NULL) < 0 && errno != EPERM)
		return -1;
	if (setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0)
		return -1;
	return 0;
}

static int loopback_up(void)
{
	struct ifreq ifr;
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (s < 0)
		return -1;
	memset(&ifr, 0, sizeof ifr);
	memcpy(ifr.ifr_name, "lo", 3);
	ifr.ifr_flags = IFF_UP | IFF_RUNNING;
	int r = ioctl(s, SIOCSIFFLAGS, &ifr);
	close(s);
	return r;
}

int rootless_hold(void)
{
	char c;

	if (unshare(CLONE_NEWUSER) < 0)
		return fail("make a user namespace (is kernel.unprivileged_userns_clone or user.max_user_namespaces 0?)");
	if (write(3, "u", 1) != 1)
		return fail("tell the engine");
	if (read(3, &c, 1) != 1 || c != 'm')
		return 1; /* the engine gave up, and says why */
	if (become_root() < 0)
		return fail("become root of the user namespace");
	if (unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC) < 0)
		return fail("make mount, network and ipc namespaces");
	if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0)
		return fail("keep mounts from spreading to the host");
	if (loopback_up() < 0)
		return fail("bring the loopback link up");
	if (prctl(PR_SET_DUMPABLE, 1) < 0 || setsid() < 0)
		return fail("detach");
	if (write(3, "r", 1) != 1)
		return fail("tell the engine");
	close(3);

	/* Reap whatever is reparented here and wait to be told to end. */
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGCHLD, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	signal(SIGINT, SIG_IGN);
	for (;;) {
		int sig = sigwaitinfo(&set, NULL);
		if (sig == SIGTERM)
			return 0;
	}
}

static int join(const char *pid, const char *name, int type)
{
	char path[64];

	/* pid was checked to be digits, at most ten of them. */
	snprintf(path, sizeof path, "/proc/%s/ns/%s", pid, name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	int r = setns(fd, type);
	close(fd);
	return r;
}

int rootless_enter(int argc, char **argv)
{
	const char *pid = argc > 3 ? argv[2] : "";
	char cwd[4096];

	if (!*pid || strspn(pid, "0123456789") != strlen(pid) || strlen(pid) > 10) {
		fputs("servin-shim: usage: rootless-enter PID PROGRAM [ARGS...]\n", stderr);
		return 2;
	}
	/* Joining a mount namespace leads to its root. */
	if (!getcwd(cwd, sizeof cwd))
		strcpy(cwd, "/");
	if (join(pid, "user", CLONE_NEWUSER) < 0)
		return fail("enter the user namespace");
	if (join(pid, "mnt", CLONE_NEWNS) < 0 || join(pid, "net", CLONE_NEWNET) < 0 || join(pid, "ipc", CLONE_NEWIPC) < 0)
		return fail("enter the namespaces");
	if (become_root() < 0)
		return fail("become root of the user namespace");
	if (chdir(cwd) < 0 && chdir("/") < 0)
		return fail("change to the directory that it was started in");
	execv(argv[3], argv + 3);
	return fail("execute the engine");
}
