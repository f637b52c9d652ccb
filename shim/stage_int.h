/* What the files of the start-up stage share. Every function that can fail
   returns a negative errno. */
#ifndef SERVIN_STAGE_INT_H
#define SERVIN_STAGE_INT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "op.h"
#include "stage.h"

/* A reader of a payload: past the end it yields zeros and remembers that. */
struct rd {
	const uint8_t *p, *end;
	bool bad;
};

/* The errno of a hook that failed, with its wait status. */
#define HOOK_FAILED 0x10000

struct bytes {
	const void *p;
	uint32_t len;
};

uint16_t rd16(struct rd *r);
uint32_t rd32(struct rd *r);
uint64_t rd64(struct rd *r);
const char *rd_str(struct rd *r);      /* type s */
const char *rd_longstr(struct rd *r);  /* type S */
struct bytes rd_bytes(struct rd *r);   /* type b */
bool rd_end(const struct rd *r);       /* all read, nothing wrong */

#define PREPARED_MAX 32
struct prepared {
	uint8_t *key; /* fstype, source, attr as encoded, then params; memory of its own */
	uint32_t attr_len, len;
	int fd;
};

struct stage {
	int sync;
	int slots[SYNC_SLOTS_MAX];
	uint32_t nslots;
	int root;     /* O_PATH of the container's root; -1 before it is known */
	int proc;     /* a procfs mount of this pid namespace that nobody else can have altered */
	bool proc_is_ours; /* …and it is what the container has on /proc */
	int null;     /* the container's verified /dev/null, O_PATH */
	int mask;     /* an attached empty file system to hide directories with */
	int parent;   /* directory last resolved for a node, with its path */
	char parent_path[256];
	uint32_t umask;
	const char *cwd; /* to be tried again after the ids changed */
	char home[1024]; /* "HOME=…" or empty */
	uint32_t kept;   /* descriptors from 3 on that the process inherits */
	uint32_t op;     /* being carried out */
	const char *name;
	int status;      /* to exit with on failure */
	int deathsig;    /* what the parent's death brings; an id change forgets it */
	bool sealed;     /* nothing but exec is left to prepare */
	bool foreign;    /* inside somebody else's namespaces: nothing there is trusted */
	struct prepared prepared[PREPARED_MAX];
	int nprepared;
};

/* stage_sys.c: the only door to the kernel, so that a hosted build can close it */
long sys6(long n, long a, long b, long c, long d, long e, long f);
#define SYS(...) SYS_(__VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define SYS_(n, a, b, c, d, e, f, ...) \
	sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
void *map_memory(size_t len);

/* Carries a whole plan out; s->op and s->name tell what failed. */
int run_plan(struct stage *s, const uint8_t *plan, uint32_t len);
int slot_fd(const struct stage *s, uint16_t slot); /* -EBADF if there is none */
int want_fd(struct stage *s, uint16_t slot); /* asks for a slot's descriptor anew */
int send_fd(int sync, uint32_t what, int fd);
void send_fail(const struct stage *s, int err);
void close_fd(int *fd);

/* stage_mount.c */
int open_in(int dir, const char *path, uint64_t flags, uint64_t resolve);
int root_fd(struct stage *s);
int write_trusted(int dir, const char *path, const char *value, bool proc_sys);
int proc_fd(struct stage *s);
int verified_null(struct stage *s);
int op_private(struct stage *s, struct rd *r, uint16_t flags);
int op_base(struct stage *s, struct rd *r, uint16_t flags);
int op_root(struct stage *s, struct rd *r, uint16_t flags);
int op_mount(struct stage *s, struct rd *r, uint16_t flags);
int op_prepare(struct stage *s, struct rd *r, uint16_t flags);
int op_root_at(struct stage *s, struct rd *r, uint16_t flags);
int op_receive(struct stage *s, struct rd *r, uint16_t flags);
int op_source(struct stage *s, struct rd *r, uint16_t flags);
int op_move(struct stage *s, struct rd *r, uint16_t flags);
int op_attr(struct stage *s, struct rd *r, uint16_t flags);
int op_readonly(struct stage *s, struct rd *r, uint16_t flags);
int op_mask(struct stage *s, struct rd *r, uint16_t flags);
int op_pivot(struct stage *s, struct rd *r, uint16_t flags);
int target_fd(struct stage *s, const char *path, bool dir, uint64_t resolve);
int attach(int mnt, int target);

/* stage_node.c */
int copy_up(int from, int to);
int op_mkdir(struct stage *s, struct rd *r, uint16_t flags);
int op_symlink(struct stage *s, struct rd *r, uint16_t flags);
int op_mknod(struct stage *s, struct rd *r, uint16_t flags);
int op_device(struct stage *s, struct rd *r, uint16_t flags);
int op_stdio(struct stage *s, struct rd *r, uint16_t flags);
int op_console(struct stage *s, struct rd *r, uint16_t flags);

/* stage_exec.c */
int op_rlimits(struct stage *s, struct rd *r, uint16_t flags);
int op_scheduler(struct stage *s, struct rd *r, uint16_t flags);
int op_seccomp(struct stage *s, struct rd *r, uint16_t flags);
int op_creds(struct stage *s, struct rd *r, uint16_t flags);
int op_cwd(struct stage *s, struct rd *r, uint16_t flags);
int op_home(struct stage *s, struct rd *r, uint16_t flags);
int op_fds(struct stage *s, struct rd *r, uint16_t flags);
int op_hook(struct stage *s, struct rd *r, uint16_t flags);
int op_close(struct stage *s, struct rd *r, uint16_t flags);
int op_gate(struct stage *s, struct rd *r, uint16_t flags);
int op_exec(struct stage *s, struct rd *r, uint16_t flags);
int op_lookup(struct stage *s, struct rd *r, uint16_t flags);

#endif
