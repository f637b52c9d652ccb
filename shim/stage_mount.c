/* Mounts. Sources arrive as descriptors or are made here; targets are resolved
   inside the new root, and every mount lands on a descriptor, so that nothing
   can be exchanged between the check and the use. */
#define _GNU_SOURCE
#include "stage_int.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <sys/vfs.h>

#define PROC_MAGIC 0x9fa0

#define NO_XDEV 0x01
#define NO_MAGICLINKS 0x02
#define NO_SYMLINKS 0x04
#define BENEATH 0x08
#define IN_ROOT 0x10

#define T_EMPTY_PATH 0x40
#define F_EMPTY_PATH 0x04
#define TREE_CLONE 1
#define TREE_CLOEXEC O_CLOEXEC
#define RECURSIVE 0x8000 /* AT_RECURSIVE */
#define EMPTY_PATH 0x1000 /* AT_EMPTY_PATH */
#define ATTR_RDONLY 1
#define ATTR_NOSUID 2
#define ATTR_NODEV 4
#define ATTR_NOEXEC 8

struct open_how {
	uint64_t flags, mode, resolve;
};
struct attr {
	uint64_t set, clear, propagation, userns;
};

int open_in(int dir, const char *path, uint64_t flags, uint64_t resolve)
{
	struct open_how how = { flags | O_CLOEXEC, 0, resolve };
	long fd;
	int tries = 128; /* a rename or mount elsewhere can make in-root lookups fail */
	do
		fd = SYS(SYS_openat2, dir, *path ? path : ".", &how, sizeof how);
	while (fd == -EAGAIN && tries--);
	return (int)fd;
}

int root_fd(struct stage *s)
{
	if (s->root < 0)
		s->root = (int)SYS(SYS_openat, AT_FDCWD, "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	return s->root;
}

static int set_attr(int fd, uint64_t set, uint64_t clear, uint64_t propagation, unsigned flags)
{
	struct attr a = { set, clear, propagation, 0 };
	return (int)SYS(SYS_mount_setattr, fd, "", EMPTY_PATH | flags, &a, sizeof a);
}

int attach(int mnt, int target)
{
	return (int)SYS(SYS_move_mount, mnt, "", target, "", F_EMPTY_PATH | T_EMPTY_PATH);
}

static int clone_of(int fd, unsigned flags)
{
	return (int)SYS(SYS_open_tree, fd, "", TREE_CLONE | TREE_CLOEXEC | EMPTY_PATH | flags);
}

static bool on_proc(int fd)
{
	struct statfs f;
	return SYS(SYS_fstatfs, fd, &f) == 0 && f.f_type == PROC_MAGIC;
}

/* Makes what is missing of path, component by component, inside the root. A
   dangling symlink is followed as the kernel would, within the root. */
static int make_path(int root, const char *path, bool dir)
{
	char buf[4096], link[4096];
	size_t len = strlen(path);
	if (len >= sizeof buf)
		return -ENAMETOOLONG;
	memcpy(buf, path, len + 1);
	for (int links = 0; links < 16; links++) {
		size_t at = 0;
		int parent = open_in(root, "/", O_PATH | O_DIRECTORY, IN_ROOT | NO_MAGICLINKS);
		bool again = false;
		while (!again) {
			if (parent < 0)
				return parent;
			while (buf[at] == '/')
				at++;
			size_t start = at;
			while (buf[at] && buf[at] != '/')
				at++;
			if (start == at) {
				close_fd(&parent);
				return 0;
			}
			size_t rest = at;
			while (buf[rest] == '/')
				rest++;
			bool last = !buf[rest];
			char was = buf[at];
			buf[at] = 0;
			int fd = open_in(root, buf, last ? O_PATH : O_PATH | O_DIRECTORY, IN_ROOT | NO_MAGICLINKS);
			if (fd == -ENOENT) {
				const char *name = buf + start;
				long e = last && !dir
					? SYS(SYS_mknodat, parent, name, S_IFREG | 0644, 0)
					: SYS(SYS_mkdirat, parent, name, 0755);
				if (e == -EEXIST) {
					long n = SYS(SYS_readlinkat, parent, name, link, sizeof link - 1);
					if (n > 0) {
						/* the link takes the place of its name, before the rest */
						buf[at] = was;
						size_t tail = strlen(buf + at), keep = link[0] == '/' ? 0 : start;
						if (keep + (size_t)n + tail >= sizeof buf)
							e = -ENAMETOOLONG;
						else {
							memmove(buf + keep + n, buf + at, tail + 1);
							memcpy(buf + keep, link, (size_t)n);
							close_fd(&parent);
							again = true;
							continue;
						}
					} else if (n == -EINVAL)
						e = 0; /* somebody else has just made it */
				}
				if (e < 0) {
					close_fd(&parent);
					return (int)e;
				}
				fd = open_in(root, buf, last ? O_PATH : O_PATH | O_DIRECTORY, IN_ROOT | NO_MAGICLINKS);
			}
			buf[at] = was;
			close_fd(&parent);
			parent = fd;
		}
	}
	return -ELOOP;
}

int target_fd(struct stage *s, const char *path, bool dir, uint64_t resolve)
{
	int root = root_fd(s);
	if (root < 0)
		return root;
	resolve |= IN_ROOT | NO_MAGICLINKS;
	int fd = open_in(root, path, O_PATH, resolve);
	if (fd != -ENOENT)
		return fd;
	int e = make_path(root, path, dir);
	return e < 0 ? e : open_in(root, path, O_PATH, resolve);
}

/* A procfs of this pid namespace that only we have had a hand on. */
int proc_fd(struct stage *s)
{
	if (s->proc >= 0)
		return s->proc;
	if (!s->foreign && s->root < 0) {
		int fd = open_in(AT_FDCWD, "/proc", O_PATH | O_DIRECTORY, NO_SYMLINKS);
		if (fd >= 0 && on_proc(fd))
			return s->proc = fd;
		close_fd(&fd);
	}
	for (int i = 0; i < s->nprepared; i++)
		if (s->prepared[i].fd >= 0 && on_proc(s->prepared[i].fd))
			return s->prepared[i].fd;
	int fs = (int)SYS(SYS_fsopen, "proc", 1);
	if (fs < 0)
		return fs;
	int e = (int)SYS(SYS_fsconfig, fs, 6 /* CREATE */, NULL, NULL, 0);
	if (!e)
		e = s->proc = (int)SYS(SYS_fsmount, fs, 1, ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC);
	close_fd(&fs);
	return e < 0 ? e : s->proc;
}

/* Writes to a file of a trusted procfs, and checks that it is one. */
int write_trusted(int dir, const char *path, const char *value, bool proc_sys)
{
	char buf[512];
	size_t n = strlen(path);
	if (n + 5 > sizeof buf)
		return -ENAMETOOLONG;
	memcpy(buf, "sys/", 4);
	memcpy(buf + (proc_sys ? 4 : 0), path, n + 1);
	int fd = open_in(dir, buf, O_WRONLY, BENEATH | NO_XDEV | NO_SYMLINKS);
	if (fd < 0)
		return fd;
	long e = on_proc(fd) ? SYS(SYS_write, fd, value, strlen(value)) : -EXDEV;
	close_fd(&fd);
	return e < 0 ? (int)e : 0;
}

/* The container's /dev/null, if it is one. */
int verified_null(struct stage *s)
{
	struct stat st = { 0 };
	if (s->null >= 0)
		return s->null;
	int root = root_fd(s);
	if (root < 0)
		return root;
	int fd = open_in(root, "/dev/null", O_PATH, IN_ROOT | NO_MAGICLINKS);
	if (fd < 0)
		return fd;
	if (fstat(fd, &st) || !S_ISCHR(st.st_mode) || st.st_rdev != makedev(1, 3)) {
		close_fd(&fd);
		return -ENODEV;
	}
	return s->null = fd;
}

int op_private(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	return rd_end(r) ? (int)SYS(SYS_mount, NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) : -EPROTO;
}

static int pivot_to(int dir)
{
	int e = (int)SYS(SYS_fchdir, dir);
	if (!e)
		e = (int)SYS(SYS_pivot_root, ".", ".");
	/* the old root now lies on top of the new one */
	if (!e)
		e = (int)SYS(SYS_umount2, ".", MNT_DETACH);
	if (!e)
		e = (int)SYS(SYS_chdir, "/");
	return e;
}

static int put_on_root(int mnt)
{
	return (int)SYS(SYS_move_mount, mnt, "", AT_FDCWD, "/", F_EMPTY_PATH);
}

/* The parked root: an empty file system that nothing of the host is left in. */
int op_base(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)s, (void)flags;
	if (!rd_end(r))
		return -EPROTO;
	int fs = (int)SYS(SYS_fsopen, "tmpfs", 1), mnt = -1;
	if (fs < 0)
		return fs;
	int e = (int)SYS(SYS_fsconfig, fs, 1, "mode", "0", 0);
	if (!e)
		e = (int)SYS(SYS_fsconfig, fs, 6, NULL, NULL, 0);
	if (!e)
		e = mnt = (int)SYS(SYS_fsmount, fs, 1, ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC);
	if (mnt >= 0 && !(e = put_on_root(mnt)))
		e = pivot_to(mnt);
	close_fd(&mnt);
	close_fd(&fs);
	return e;
}

int op_root(struct stage *s, struct rd *r, uint16_t flags)
{
	int fd = slot_fd(s, rd16(r));
	if (!rd_end(r))
		return -EPROTO;
	int e = fd < 0 ? fd : flags & F_ROOT_SHARED ? 0 : put_on_root(fd);
	if (!e)
		s->root = fd;
	return e;
}

int op_root_at(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	int fd = slot_fd(s, rd16(r));
	const char *path = rd_str(r);
	if (!rd_end(r))
		return -EPROTO;
	int e = fd < 0 ? fd : (int)SYS(SYS_move_mount, fd, "", AT_FDCWD, path, F_EMPTY_PATH);
	if (!e)
		e = (int)SYS(SYS_fchdir, fd);
	if (!e)
		s->root = fd;
	return e;
}

/* Reads "source:s attr:q [..] params" and makes the file system of it. */
static int make_fs(const char *type, const char *source, uint64_t attr, struct rd *params, const char *mode)
{
	int fs = (int)SYS(SYS_fsopen, type, 1), e = 0;
	if (fs < 0)
		return fs;
	if (*source)
		e = (int)SYS(SYS_fsconfig, fs, 1, "source", source, 0);
	for (uint16_t n = rd16(params); n && !e; n--) {
		const char *k = rd_str(params), *v = rd_str(params);
		if (params->bad)
			e = -EPROTO;
		else if (*v)
			e = (int)SYS(SYS_fsconfig, fs, 1 /* SET_STRING */, k, v, 0);
		else
			e = (int)SYS(SYS_fsconfig, fs, 0 /* SET_FLAG */, k, NULL, 0);
	}
	if (!e && mode)
		e = (int)SYS(SYS_fsconfig, fs, 1, "mode", mode, 0);
	if (!e)
		e = (int)SYS(SYS_fsconfig, fs, 6, NULL, NULL, 0);
	if (!e)
		e = (int)SYS(SYS_fsmount, fs, 1, attr);
	close_fd(&fs);
	return e;
}

/* What tells one file system from another lies in two places of a MOUNT: the
   strings and attributes, and the parameters. */
static int take_prepared(struct stage *s, const uint8_t *a, uint32_t na, const uint8_t *b, uint32_t nb)
{
	for (int i = 0; i < s->nprepared; i++) {
		struct prepared *p = &s->prepared[i];
		if (p->fd >= 0 && p->attr_len == na && p->len == na + nb && !memcmp(p->key, a, na) && !memcmp(p->key + na, b, nb)) {
			int fd = p->fd;
			p->fd = -1;
			return fd;
		}
	}
	return -1;
}

static bool skip_params(struct rd *r)
{
	for (uint16_t n = rd16(r); n && !r->bad; n--)
		rd_str(r), rd_str(r);
	return rd_end(r);
}

int op_prepare(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	const uint8_t *start = r->p;
	const char *type = rd_str(r), *source = rd_str(r);
	uint64_t attr = rd64(r);
	const uint8_t *mid = r->p;
	struct rd params = *r;
	if (!skip_params(r))
		return -EPROTO;
	if (s->nprepared == PREPARED_MAX)
		return -ENOSPC;
	struct prepared *p = &s->prepared[s->nprepared];
	p->attr_len = (uint32_t)(mid - start);
	p->len = (uint32_t)(r->end - start);
	if (!(p->key = map_memory(p->len)))
		return -ENOMEM;
	memcpy(p->key, start, p->len);
	if ((p->fd = make_fs(type, source, attr, &params, NULL)) < 0)
		return p->fd;
	s->nprepared++;
	return 0;
}

int op_mount(struct stage *s, struct rd *r, uint16_t flags)
{
	const char *target = rd_str(r);
	const uint8_t *start = r->p;
	const char *type = rd_str(r), *source = rd_str(r);
	uint64_t attr = rd64(r);
	const uint8_t *mid = r->p;
	uint64_t propagation = rd64(r);
	struct rd params = *r;
	if (!skip_params(r))
		return -EPROTO;
	int root = root_fd(s), to;
	struct stat st = { 0 };
	char text[8], *mode = NULL;
	uint64_t how = flags & F_MOUNT_NO_SYMLINKS ? NO_SYMLINKS : 0;
	if (root < 0)
		return root;
	to = open_in(root, target, O_PATH, IN_ROOT | NO_MAGICLINKS | how);
	if (to >= 0 && flags & F_MOUNT_KEEP_MODE && !fstat(to, &st)) {
		mode = text;
		for (int i = 0; i < 4; i++)
			text[i] = (char)('0' + (st.st_mode >> (9 - 3 * i) & 7));
		text[4] = 0;
	} else if (to == -ENOENT)
		to = target_fd(s, target, true, how);
	if (to < 0)
		return to;
	int e = !(flags & F_MOUNT_ON_PROC) && on_proc(to) ? -EPERM : 0, mnt = -1;
	if (!e) {
		if (!mode)
			mnt = take_prepared(s, start, (uint32_t)(mid - start), params.p, (uint32_t)(params.end - params.p));
		if (mnt < 0)
			mnt = make_fs(type, source, attr, &params, mode);
		if (mnt < 0)
			e = mnt;
	}
	if (!e && flags & F_MOUNT_COPY_UP) {
		int from = open_in(to, ".", O_RDONLY | O_DIRECTORY, BENEATH);
		e = from < 0 ? from : copy_up(from, mnt);
		close_fd(&from);
	}
	if (!e)
		e = attach(mnt, to);
	if (!e && propagation)
		e = set_attr(mnt, 0, 0, propagation & ~(uint64_t)MS_REC, propagation & MS_REC ? RECURSIVE : 0);
	close_fd(&to);
	close_fd(&s->parent);
	if (!e && flags & F_MOUNT_IS_PROC && on_proc(mnt)) {
		close_fd(&s->proc);
		s->proc = mnt;
		s->proc_is_ours = true;
		return 0;
	}
	close_fd(&mnt);
	return e;
}

/* Opens what a slot stands for, where whoever sent the plan could not: with the
   stage's own privileges over a copy of its mount namespace. */
int op_source(struct stage *s, struct rd *r, uint16_t flags)
{
	uint16_t slot = rd16(r);
	const char *path = rd_str(r);
	uint32_t recursive = rd32(r);
	uint64_t set = rd64(r), clear = rd64(r), propagation = rd64(r);
	if (!rd_end(r))
		return -EPROTO;
	int old = slot_fd(s, slot);
	if (old < 0)
		return old;
	int fd = (int)SYS(SYS_open_tree, AT_FDCWD, path, TREE_CLONE | TREE_CLOEXEC | (recursive ? RECURSIVE : 0)), e = fd;
	if (fd >= 0 && propagation)
		e = set_attr(fd, 0, 0, propagation, flags & F_SOURCE_PROP_TREE ? RECURSIVE : 0);
	if (e >= 0 && (set || clear))
		e = set_attr(fd, set, clear, 0, flags & F_SOURCE_ATTR_TREE ? RECURSIVE : 0);
	if (e < 0) {
		close_fd(&fd);
		return e;
	}
	close_fd(&s->slots[slot]);
	s->slots[slot] = fd;
	return 0;
}

int op_receive(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	uint16_t slot = rd16(r);
	if (!rd_end(r))
		return -EPROTO;
	int old = slot_fd(s, slot), fd = old < 0 ? old : want_fd(s, slot);
	if (fd < 0)
		return fd;
	close_fd(&s->slots[slot]);
	s->slots[slot] = fd;
	return 0;
}

int op_move(struct stage *s, struct rd *r, uint16_t flags)
{
	const char *target = rd_str(r);
	uint16_t slot = rd16(r);
	struct stat st = { 0 };
	if (!rd_end(r))
		return -EPROTO;
	int fd = slot_fd(s, slot);
	if (fd < 0)
		return fd;
	if (fstat(fd, &st))
		return -errno;
	int to = target_fd(s, target, S_ISDIR(st.st_mode), 0);
	if (to < 0)
		return to;
	int e = !(flags & F_MOUNT_ON_PROC) && on_proc(to) ? -EPERM : attach(fd, to);
	close_fd(&to);
	close_fd(&s->parent);
	if (!e && fd != s->root)
		close_fd(&s->slots[slot]);
	return e;
}

int op_attr(struct stage *s, struct rd *r, uint16_t flags)
{
	const char *target = rd_str(r);
	uint64_t set = rd64(r), clear = rd64(r), propagation = rd64(r);
	if (!rd_end(r))
		return -EPROTO;
	int root = root_fd(s);
	if (root < 0)
		return root;
	int fd = open_in(root, target, O_PATH, IN_ROOT | NO_MAGICLINKS);
	if (fd < 0)
		return fd;
	int e = set_attr(fd, set, clear, propagation, flags & F_ATTR_RECURSIVE ? RECURSIVE : 0);
	close_fd(&fd);
	return e;
}

/* The path to be hidden or write-protected. Below /proc it is looked up in our
   own mount of it, where no symlink of an image leads astray. */
static int protected_fd(struct stage *s, const char *path)
{
	if (s->proc_is_ours && !strncmp(path, "/proc/", 6))
		return open_in(s->proc, path + 6, O_PATH, BENEATH | NO_SYMLINKS);
	int root = root_fd(s);
	return root < 0 ? root : open_in(root, path, O_PATH, IN_ROOT | NO_MAGICLINKS);
}

int op_readonly(struct stage *s, struct rd *r, uint16_t flags)
{
	const char *path = rd_str(r);
	if (!rd_end(r))
		return -EPROTO;
	int fd = protected_fd(s, path);
	if (fd == -ENOENT)
		return 0;
	if (fd < 0)
		return fd;
	int tree = clone_of(fd, RECURSIVE), e = tree;
	if (tree >= 0)
		e = set_attr(tree, ATTR_RDONLY, 0, 0, flags & F_ATTR_RECURSIVE ? RECURSIVE : 0);
	if (e == 0)
		e = attach(tree, fd);
	close_fd(&tree);
	close_fd(&fd);
	return e;
}

/* One empty read-only file system serves every directory: the first hides with
   the mount itself, the others with clones of it. */
static int empty_dir(struct stage *s)
{
	if (s->mask >= 0)
		return clone_of(s->mask, 0);
	static const uint8_t params[] = { 2, 0, 9, 0, 'n', 'r', '_', 'b', 'l', 'o', 'c', 'k', 's', 0, 1, 0, '1', 0,
		9, 0, 'n', 'r', '_', 'i', 'n', 'o', 'd', 'e', 's', 0, 1, 0, '1', 0 };
	struct rd r = { params, params + sizeof params, false };
	return make_fs("tmpfs", "tmpfs", ATTR_RDONLY, &r, NULL);
}

int op_mask(struct stage *s, struct rd *r, uint16_t flags)
{
	(void)flags;
	const char *path = rd_str(r);
	struct stat st = { 0 };
	if (!rd_end(r))
		return -EPROTO;
	int fd = protected_fd(s, path), with = -1, e = 0;
	if (fd == -ENOENT)
		return 0;
	if (fd < 0)
		return fd;
	if (fstat(fd, &st))
		e = -errno;
	else if (S_ISDIR(st.st_mode))
		with = empty_dir(s);
	else {
		int null = verified_null(s);
		with = null < 0 ? null : clone_of(null, 0);
	}
	if (!e)
		e = with < 0 ? with : attach(with, fd);
	close_fd(&fd);
	if (!e && S_ISDIR(st.st_mode) && s->mask < 0)
		s->mask = with;
	else
		close_fd(&with);
	return e;
}

int op_pivot(struct stage *s, struct rd *r, uint16_t flags)
{
	if (!rd_end(r))
		return -EPROTO;
	if (s->root < 0)
		return -EBADF;
	if (!(flags & F_PIVOT_CHROOT))
		return pivot_to(s->root);
	int e = (int)SYS(SYS_fchdir, s->root);
	return e ? e : (int)SYS(SYS_chroot, ".");
}
