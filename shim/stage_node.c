/* What lies in the container's /dev: nodes, links, standard descriptors and the
   terminal; and the copy that tmpcopyup asks for. */
#define _GNU_SOURCE
#include "stage_int.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <termios.h>

#define IN_ROOT_ONLY (0x10 | 0x02) /* IN_ROOT, NO_MAGICLINKS */
#define DEVPTS_MAGIC 0x1cd1
#define TREE_CLONE (1 | O_CLOEXEC | 0x1000) /* CLONE, CLOEXEC, EMPTY_PATH */

#ifndef TIOCGPTPEER
#define TIOCGPTPEER 0x5441
#endif

/* The directory of path, kept open for the next node in it, and the last name. */
static int parent_of(struct stage *s, const char *path, const char **name)
{
	char dir[sizeof s->parent_path];
	const char *slash = strrchr(path, '/');
	size_t n = slash ? (size_t)(slash - path) : 0;
	if (!slash || !slash[1] || n + 1 > sizeof dir || !strcmp(slash, "/..") || !strcmp(slash, "/."))
		return -EINVAL;
	*name = slash + 1;
	memcpy(dir, path, n);
	dir[n] = 0;
	if (s->parent >= 0 && !strcmp(dir, s->parent_path))
		return s->parent;
	close_fd(&s->parent);
	memcpy(s->parent_path, dir, n + 1);
	return s->parent = target_fd(s, n ? dir : "/", true, 0);
}

int op_mkdir(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	const char *path = rd_str(r), *name;
	uint32_t mode = rd32(r), uid = rd32(r), gid = rd32(r);
	if (!rd_end(r))
		return -EPROTO;
	int dir = parent_of(s, path, &name);
	if (dir < 0)
		return dir;
	long e = SYS(SYS_mkdirat, dir, name, mode & 07777);
	if (!e && (uid || gid))
		e = SYS(SYS_fchownat, dir, name, uid, gid, AT_SYMLINK_NOFOLLOW);
	return e == -EEXIST ? 0 : (int)e;
}

int op_symlink(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	const char *target = rd_str(r), *path = rd_str(r), *name;
	if (!rd_end(r))
		return -EPROTO;
	int dir = parent_of(s, path, &name);
	if (dir < 0)
		return dir;
	long e = SYS(SYS_symlinkat, target, dir, name);
	return e == -EEXIST ? 0 : (int)e;
}

static bool is_device(int fd, uint32_t mode, uint32_t major, uint32_t minor)
{
	struct stat st = { 0 };
	return !fstat(fd, &st) && (st.st_mode & S_IFMT) == (mode & S_IFMT) &&
		(S_ISFIFO(mode) || st.st_rdev == makedev(major, minor));
}

int op_mknod(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	const char *path = rd_str(r), *name;
	uint32_t mode = rd32(r), major = rd32(r), minor = rd32(r), uid = rd32(r), gid = rd32(r);
	if (!rd_end(r))
		return -EPROTO;
	int dir = parent_of(s, path, &name);
	if (dir < 0)
		return dir;
	/* the kernel's own encoding of the number, which mknod(2) takes */
	uint32_t dev = (minor & 0xff) | (major << 8) | ((minor & ~0xffu) << 12);
	long e = SYS(SYS_mknodat, dir, name, mode, dev);
	if (e == -EEXIST) {
		/* there before us: only the very same device will do */
		int fd = (int)SYS(SYS_openat, dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
		if (fd < 0)
			return fd;
		e = is_device(fd, mode, major, minor) ? 0 : -EEXIST;
		close_fd(&fd);
		return (int)e;
	}
	if (!e && (uid || gid)) {
		e = SYS(SYS_fchownat, dir, name, uid, gid, AT_SYMLINK_NOFOLLOW);
		if (!e && mode & 06000)
			e = SYS(SYS_fchmodat, dir, name, mode & 07777);
	}
	return (int)e;
}

/* A file in dir to mount onto, without following what may lie there. */
static int file_in(int dir, const char *name)
{
	long e = SYS(SYS_mknodat, dir, name, S_IFREG | 0600, 0);
	if (e < 0 && e != -EEXIST)
		return (int)e;
	return (int)SYS(SYS_openat, dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
}

int op_device(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	const char *path = rd_str(r), *name;
	int mnt = slot_fd(s, rd16(r));
	uint32_t mode = rd32(r), major = rd32(r), minor = rd32(r);
	if (!rd_end(r))
		return -EPROTO;
	if (mnt < 0)
		return mnt;
	if (!is_device(mnt, mode, major, minor))
		return -ENODEV;
	int dir = parent_of(s, path, &name);
	if (dir < 0)
		return dir;
	int to = file_in(dir, name), e = to;
	if (to >= 0)
		e = attach(mnt, to);
	close_fd(&to);
	return e;
}

/* The host's /dev/null is exchanged for the container's: its inode is not ours
   to hand out. Where the container has none, the process keeps the host's. */
static int stdio_fd(struct stage *s, int fd, bool write)
{
	struct stat st = { 0 };
	if (fstat(fd, &st) || !S_ISCHR(st.st_mode) || st.st_rdev != makedev(1, 3) || verified_null(s) < 0)
		return fd;
	char path[32] = "/dev/null";
	int null = open_in(root_fd(s), path, (write ? O_RDWR : O_RDONLY) | O_NOCTTY, IN_ROOT_ONLY);
	if (null >= 0 && is_device(null, S_IFCHR, 1, 3))
		return null;
	close_fd(&null);
	return fd;
}

int op_stdio(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	uint16_t slots[3] = { rd16(r), 0, 0 };
	slots[1] = rd16(r);
	slots[2] = rd16(r);
	if (!rd_end(r))
		return -EPROTO;
	for (int i = 0; i < 3; i++) {
		int from = slot_fd(s, slots[i]);
		if (from < 0)
			return from;
		int fd = stdio_fd(s, from, i > 0);
		long e = SYS(SYS_dup3, fd, i, 0);
		if (fd != from)
			close_fd(&fd);
		if (e < 0)
			return (int)e;
	}
	for (int i = 0; i < 3; i++) {
		bool again = false;
		for (int k = 0; k < i; k++)
			again |= slots[k] == slots[i];
		if (!again)
			close_fd(&s->slots[slots[i]]);
	}
	return 0;
}

/* The terminal comes from the container's own devpts, checked by type and
   number, and is handled by descriptors from there on. */
int op_console(struct stage *s, struct rd *r, uint16_t flags)
{
	struct { uint16_t row, col, x, y; } size = { 0 };
	uint32_t uid;
	struct statfs fs;
	int unlock = 0, master, peer = -1, e;
	size.col = rd16(r);
	size.row = rd16(r);
	uid = rd32(r);
	if (!rd_end(r))
		return -EPROTO;
	int root = root_fd(s);
	if (root < 0)
		return root;
	master = open_in(root, "/dev/pts/ptmx", O_RDWR | O_NOCTTY, IN_ROOT_ONLY);
	if (master < 0)
		return master;
	if (!is_device(master, S_IFCHR, 5, 2) || SYS(SYS_fstatfs, master, &fs) || fs.f_type != DEVPTS_MAGIC) {
		close_fd(&master);
		return -ENODEV;
	}
	e = (int)SYS(SYS_ioctl, master, TIOCSPTLCK, &unlock);
	if (!e)
		e = peer = (int)SYS(SYS_ioctl, master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (peer >= 0 && (size.row || size.col))
		e = (int)SYS(SYS_ioctl, peer, TIOCSWINSZ, &size);
	if (e >= 0 && flags & F_CONSOLE_PLAIN) {
		struct termios t;
		e = (int)SYS(SYS_ioctl, peer, TCGETS, &t);
		t.c_oflag &= ~(tcflag_t)ONLCR;
		if (!e)
			e = (int)SYS(SYS_ioctl, peer, TCSETS, &t);
	}
	if (e >= 0 && uid)
		e = (int)SYS(SYS_fchown, peer, uid, -1);
	if (e >= 0)
		e = (int)SYS(SYS_ioctl, peer, TIOCSCTTY, 0);
	if (e >= 0 && flags & F_CONSOLE_DEV) {
		const char *name;
		int dir = parent_of(s, "/dev/console", &name), to = dir < 0 ? dir : file_in(dir, name);
		int tree = to < 0 ? to : (int)SYS(SYS_open_tree, peer, "", TREE_CLONE);
		e = tree < 0 ? tree : attach(tree, to);
		if (tree >= 0)
			close_fd(&tree);
		if (to >= 0)
			close_fd(&to);
	}
	if (e >= 0)
		e = send_fd(s->sync, SYNC_FD_TERMINAL, master);
	for (int i = 0; i < 3 && e >= 0; i++)
		e = (int)SYS(SYS_dup3, peer, i, 0);
	close_fd(&peer);
	close_fd(&master);
	return e < 0 ? e : 0;
}

struct dent {
	uint64_t ino, off;
	uint16_t len;
	uint8_t type;
	char name[];
};

static int copy_file(int from, int to, const struct stat *st, const char *name)
{
	static char buf[64 << 10];
	int in = (int)SYS(SYS_openat, from, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	if (in < 0)
		return in;
	int out = (int)SYS(SYS_openat, to, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	long n = out;
	while (out >= 0 && (n = SYS(SYS_read, in, buf, sizeof buf)) > 0)
		for (long done = 0; done < n;) {
			long w = SYS(SYS_write, out, buf + done, n - done);
			if (w < 0) {
				n = w;
				break;
			}
			done += w;
		}
	if (n >= 0)
		n = SYS(SYS_fchown, out, st->st_uid, st->st_gid);
	if (n >= 0)
		n = SYS(SYS_fchmod, out, st->st_mode & 07777);
	close_fd(&in);
	close_fd(&out);
	return (int)n;
}

static int copy_tree(int from, int to, int depth);

static int copy_entry(int from, int to, const char *name, int depth)
{
	struct stat st = { 0 };
	char link[4096];
	if (fstatat(from, name, &st, AT_SYMLINK_NOFOLLOW))
		return -errno;
	if (S_ISREG(st.st_mode))
		return copy_file(from, to, &st, name);
	long e;
	if (S_ISLNK(st.st_mode)) {
		e = SYS(SYS_readlinkat, from, name, link, sizeof link - 1);
		if (e < 0)
			return (int)e;
		link[e] = 0;
		e = SYS(SYS_symlinkat, link, to, name);
	} else if (S_ISDIR(st.st_mode)) {
		e = SYS(SYS_mkdirat, to, name, 0700);
		int in = e ? -1 : (int)SYS(SYS_openat, from, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		int out = in < 0 ? -1 : (int)SYS(SYS_openat, to, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		if (!e)
			e = out < 0 ? -EIO : copy_tree(in, out, depth + 1);
		close_fd(&in);
		close_fd(&out);
	} else
		e = SYS(SYS_mknodat, to, name, st.st_mode, (uint32_t)((minor(st.st_rdev) & 0xff) |
			(major(st.st_rdev) << 8) | ((minor(st.st_rdev) & ~0xffu) << 12)));
	if (!e)
		e = SYS(SYS_fchownat, to, name, st.st_uid, st.st_gid, AT_SYMLINK_NOFOLLOW);
	if (!e && !S_ISLNK(st.st_mode))
		e = SYS(SYS_fchmodat, to, name, st.st_mode & 07777);
	return (int)e;
}

static int copy_tree(int from, int to, int depth)
{
	_Alignas(8) char buf[2048];
	long n;
	if (depth > 64)
		return -ELOOP;
	while ((n = SYS(SYS_getdents64, from, buf, sizeof buf)) > 0)
		for (long at = 0; at < n;) {
			struct dent *d = (void *)(buf + at);
			at += d->len;
			if (!strcmp(d->name, ".") || !strcmp(d->name, ".."))
				continue;
			int e = copy_entry(from, to, d->name, depth);
			if (e < 0)
				return e;
		}
	return (int)n;
}

/* Copies what from holds, and its owner and mode, to the file system to. */
int copy_up(int from, int to)
{
	struct stat st = { 0 };
	int e = copy_tree(from, to, 0);
	if (e < 0)
		return e;
	if (fstat(from, &st))
		return -errno;
	int dir = open_in(to, ".", O_RDONLY | O_DIRECTORY, 0);
	if (dir < 0)
		return dir;
	e = (int)SYS(SYS_fchown, dir, st.st_uid, st.st_gid);
	if (!e)
		e = (int)SYS(SYS_fchmod, dir, st.st_mode & 07777);
	close_fd(&dir);
	return e;
}
