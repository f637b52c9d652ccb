/*
 * The first stage of a machine of VM mode, as /init of its initial file system: finds
 * the root, starts the engine, and becomes cloudos-init. It is the shortest way from the
 * kernel to the engine's first instruction, with nothing in it that can wait (ADR 57).
 *
 * /first has a line for each chain of kernel modules: their paths, each after those it
 * needs; and behind an @ a line for each part of a program that is worth reading at once:
 * path, offset, length. The disk with the serial number cloudos-root has two partitions, the root and
 * the programs of a start (package osimage). The engine gets the pipe of package
 * internal/daemon/await at descriptor 3. cloudos-init finds in CLOUDOS_FIRST the engine's
 * process id, and at the descriptors
 *   3  where the engine's order goes
 *   4  where the engine's output comes from, 5 its other end
 *   6  the initial file system's root
 * What is wrong is said on the console; the kernel then starts the machine again.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "first.h"

#define SERIAL "cloudos-root"
#define PLACE "/new"

enum { PATIENCE = 30, FIRST_FREE = 10, AHEAD = 1 << 20 };

static _Noreturn void die(const char *what, const char *on)
{
	int err = errno;

	dprintf(2, "cloudos: cannot %s %s: %s\n", what, on, strerror(err));
	sleep(2);
	_exit(1);
}

static void must_mount(const char *source, const char *at, const char *kind, unsigned long flags, const char *options)
{
	if (mount(source, at, kind, flags, options) < 0)
		die("mount", at);
}

/* Loads a chain's modules. One that is there already is none of its errors. */
static int load(char *chain)
{
	for (char *at, *path = strtok_r(chain, " ", &at); path; path = strtok_r(NULL, " ", &at)) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)) {
			dprintf(2, "cloudos: cannot load the module %s: %s\n", path, strerror(errno));
			return 1;
		}
		close(fd);
	}
	return 0;
}

/* Has the kernel patch its allocators now, for the memory controller that the engine is about
 * to use, while nothing else runs: QEMU before 8.1 can lose a processor that runs through code
 * while it is patched (ADR 56). Nothing depends on it. */
static void settle_kernel(void)
{
	if (mount("cgroup2", "/run", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, "") < 0)
		return;
	int fd = open("/run/cgroup.subtree_control", O_WRONLY | O_CLOEXEC);

	if (fd >= 0 && write(fd, "+memory", 7) == 7 && mkdir("/run/first", 0755) == 0)
		rmdir("/run/first");
	close(fd);
	umount2("/run", MNT_DETACH);
}

enum { LINES = 32 };

/* The lines of /first; the last is NULL. */
static char *lines[LINES + 1];

static void read_plan(void)
{
	static char text[16384];
	int fd = open("/first", O_RDONLY | O_CLOEXEC), n = 0;
	ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	char *at;

	if (size < 0)
		die("read", "/first");
	close(fd);
	errno = E2BIG; /* a part of it would be found out later, if at all */
	if (size == sizeof text - 1)
		die("read", "/first");
	for (char *line = strtok_r(text, "\n", &at); line; line = strtok_r(NULL, "\n", &at)) {
		if (n == LINES)
			die("read", "/first");
		lines[n++] = line;
	}
}

/* Loads all chains, each in a process of its own but the first. What could not be loaded
 * was said; whether it is missed shows soon. */
static void load_all(void)
{
	char *mine = NULL;

	for (int i = 0; lines[i]; i++) {
		if (lines[i][0] == '@')
			continue;
		if (!mine) {
			mine = lines[i];
			continue;
		}
		pid_t pid = fork();

		if (pid == 0)
			_exit(load(lines[i]));
		if (pid < 0)
			load(lines[i]);
	}
	if (mine)
		load(mine);
	while (wait(NULL) > 0)
		;
}

/* Reads what the programs will need, beside them: else each first touch of a part waits for the
 * disk. A process of its own does it. */
static void read_ahead(void)
{
	for (int i = 0; lines[i]; i++) {
		unsigned long long at, end, size;
		char path[64];

		if (sscanf(lines[i], "@%63s %llu %llu", path, &at, &size) != 3)
			continue;
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		/* One call reads two megabytes at most, and they are to come in this order. */
		for (end = at + size; fd >= 0 && at < end; at += AHEAD)
			readahead(fd, (off_t)at, end - at < AHEAD ? end - at : AHEAD);
		close(fd);
	}
}

/* Whether the disk with a name under /sys/block is the root's. */
static int is_root(const char *disk)
{
	char path[320], serial[sizeof SERIAL + 1] = "";
	int fd;

	snprintf(path, sizeof path, "/sys/block/%s/serial", disk);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t n = read(fd, serial, sizeof serial - 1);
	close(fd);
	if (n > 0 && serial[n - 1] == '\n')
		serial[n - 1] = 0;
	return strcmp(serial, SERIAL) == 0;
}

/* Finds the root's disk whose second partition is there: writes its device's path. */
static int find(char *path, size_t size)
{
	DIR *d = opendir("/sys/block");
	int found = 0;

	if (!d)
		die("read", "/sys/block");
	for (struct dirent *e; !found && (e = readdir(d));) {
		if (e->d_name[0] == '.' || !is_root(e->d_name))
			continue;
		snprintf(path, size, "/dev/%s2", e->d_name);
		found = access(path, F_OK) == 0;
		path[strlen(path) - 1] = 0;
	}
	closedir(d);
	return found;
}

static void mount_root(void)
{
	static const char *const dirs[] = {"/system", "/proc", "/sys", "/dev", "/mnt"};
	static const char *const moved[] = {"/dev", "/sys", "/proc"};
	static const char *const programs[] = {"servind", "cloudos-init"};
	const struct timespec moment = {.tv_nsec = 2000000};
	char disk[300], path[320], from[64], to[64];
	time_t begin = time(NULL);

	while (!find(disk, sizeof disk)) {
		if (time(NULL) - begin > PATIENCE) {
			errno = ENODEV;
			die("find a disk with two partitions and the serial number", SERIAL);
		}
		nanosleep(&moment, NULL);
	}
	must_mount("root", PLACE, "tmpfs", MS_NODEV | MS_NOATIME, "mode=755,size=16m");
	for (size_t i = 0; i < sizeof dirs / sizeof *dirs; i++) {
		snprintf(to, sizeof to, PLACE "%s", dirs[i]);
		if (mkdir(to, 0755) < 0)
			die("make", to);
	}
	snprintf(path, sizeof path, "%s1", disk);
	must_mount(path, PLACE "/system", "squashfs", MS_RDONLY | MS_NODEV, "");
	snprintf(path, sizeof path, "%s2", disk);
	must_mount(path, PLACE "/mnt", "squashfs", MS_RDONLY | MS_NODEV, "");
	for (size_t i = 0; i < sizeof programs / sizeof *programs; i++) {
		snprintf(from, sizeof from, PLACE "/mnt/%s", programs[i]);
		snprintf(to, sizeof to, PLACE "/system/bin/%s", programs[i]);
		must_mount(from, to, NULL, MS_BIND, NULL);
	}
	/* It stays for as long as they do. */
	if (umount2(PLACE "/mnt", MNT_DETACH) < 0)
		die("let go of", PLACE "/mnt");
	for (size_t i = 0; i < sizeof moved / sizeof *moved; i++) {
		snprintf(to, sizeof to, PLACE "%s", moved[i]);
		must_mount(moved[i], to, NULL, MS_MOVE, NULL);
	}
	if (chdir(PLACE) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
		die("enter", "the root");
}

/* A descriptor out of the way of those that programs are given. */
static int away(int fd)
{
	int up = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, FIRST_FREE);

	if (up < 0)
		die("open", "a descriptor");
	close(fd);
	return up;
}

/* What the engine and its containers may have; the kernel's limits are those of a single program. Go does the
 * same for all formats (internal/osinit/limits.go), and says what is wrong with it. */
static void raise_limits(void)
{
	const struct rlimit files = {1 << 20, 1 << 20}, processes = {RLIM_INFINITY, RLIM_INFINITY};

	setrlimit(RLIMIT_NOFILE, &files);
	setrlimit(RLIMIT_NPROC, &processes);
}

static void give(int fd, int as)
{
	if (dup2(fd, as) < 0)
		die("pass", "a descriptor");
}

int first_main(void)
{
	static char *const engine[] = {"/bin/servind", NULL};
	static char *const engine_env[] = {"PATH=/bin", "HOME=/var/root", "TMPDIR=/var/tmp", "SERVIND_AWAIT=3", NULL};
	static char *const next[] = {"/bin/cloudos-init", NULL};
	int order[2], output[2], initial;
	char pid[16];

	must_mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
	must_mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
	must_mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=755");
	settle_kernel();
	read_plan();
	load_all();
	initial = away(open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
	mount_root();
	raise_limits();
	if (pipe2(order, O_CLOEXEC) < 0 || pipe2(output, O_CLOEXEC) < 0)
		die("make", "a pipe");
	for (int i = 0; i < 2; i++) {
		order[i] = away(order[i]);
		output[i] = away(output[i]);
	}
	pid_t child = fork();
	if (child == 0) {
		int null = away(open("/dev/null", O_RDWR | O_CLOEXEC));

		setsid();
		give(null, 0);
		give(output[1], 1);
		give(output[1], 2);
		give(order[0], 3);
		execve("/system/bin/servind", engine, engine_env);
		die("start", "/system/bin/servind");
	}
	if (child > 0 && fork() == 0) {
		close(order[1]); /* its end is a word, too */
		read_ahead();
		_exit(0);
	}
	/* Without one, cloudos-init starts it when it is its turn. */
	snprintf(pid, sizeof pid, "%d", child > 0 ? (int)child : 0);
	if (setenv("CLOUDOS_FIRST", pid, 1) < 0)
		die("name", "the engine");
	give(order[1], 3);
	give(output[0], 4);
	give(output[1], 5);
	give(initial, 6);
	execv("/system/bin/cloudos-init", next);
	die("start", "/system/bin/cloudos-init");
}
