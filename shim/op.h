/* Generated from internal/plan/op.go by its test with -update. Do not edit. */
#ifndef SERVIN_OP_H
#define SERVIN_OP_H

#define PLAN_MAGIC "SVPL"
#define PLAN_VERSION 1
#define PLAN_CONTINUE 1
#define PLAN_MAX_OPS 16384
#define PLAN_MAX 8388608
#define NO_SLOT 0xffff

/* A payload follows the operation's name (s). h, i, q: 16, 32, 64 bits; s: u16 length, bytes, NUL;
   S: u32 length, bytes, NUL; b: u32 length, bytes; [..]: u16 count, then the types repeated. */
enum op {
	OP_PRIVATE = 1,         /* make every mount of the namespace private */
	OP_BASE = 2,            /* tmpfs as root, everything else detached */
	OP_CGROUP = 3,          /* slot:h; write 0 to the tasks file */
	OP_UNSHARE = 4,         /* flags:q; unshare(2) */
	OP_SETNS = 5,           /* slot:h flags:q; setns(2) with a namespace or pid descriptor */
	OP_ROOT = 6,            /* slot:h; attach the root file system */
	OP_MOUNT = 7,           /* target:s fstype:s source:s attr:q propagation:q params:[ss]; a new file system; an empty value is a flag */
	OP_MOVE = 8,            /* target:s slot:h; attach a detached mount */
	OP_ATTR = 9,            /* target:s set:q clear:q propagation:q; mount_setattr(2) */
	OP_READONLY = 10,       /* path:s; read-only bind of a path onto itself, if it exists */
	OP_MASK = 11,           /* path:s; hide a path, if it exists */
	OP_MKDIR = 12,          /* path:s mode:i uid:i gid:i; directory, if missing */
	OP_SYMLINK = 13,        /* target:s path:s; symlink, if nothing is there */
	OP_MKNOD = 14,          /* path:s mode:i major:i minor:i uid:i gid:i; device node */
	OP_DEVICE = 15,         /* path:s slot:h mode:i major:i minor:i; bind a detached mount of a device node */
	OP_PIVOT = 16,          /* pivot_root(2), detach the old root */
	OP_HOSTNAME = 17,       /* name:s */
	OP_DOMAINNAME = 18,     /* name:s */
	OP_SYSCTL = 19,         /* path:s value:s; write to a file under /proc/sys */
	OP_SELF = 20,           /* file:s fallback:s value:s; write to a file under /proc/self */
	OP_LOOPBACK = 21,       /* bring lo up */
	OP_KEYRING = 22,        /* name:s; join a session keyring */
	OP_RLIMITS = 23,        /* limits:[iqq]; resource, soft, hard */
	OP_SCHEDULER = 24,      /* policy:i flags:q nice:i priority:i runtime:q deadline:q period:q; sched_setattr(2) */
	OP_IOPRIO = 25,         /* value:i; ioprio_set(2) */
	OP_PERSONALITY = 26,    /* persona:i */
	OP_UMASK = 27,          /* mask:i; takes effect at exec */
	OP_STDIO = 28,          /* stdin:h stdout:h stderr:h; slots become descriptors 0, 1, 2 */
	OP_CONSOLE = 29,        /* width:h height:h uid:i; open a terminal, send its master */
	OP_NO_NEW_PRIVS = 30,
	OP_SECCOMP = 31,        /* flags:i program:b; load a filter */
	OP_CREDS = 32,          /* uid:i gid:i bounding:q effective:q permitted:q inheritable:q ambient:q groups:[i] */
	OP_CWD = 33,            /* path:s */
	OP_HOME = 34,           /* uid:i; set HOME from the container's /etc/passwd */
	OP_FDS = 35,            /* slots:[h]; slots become descriptors 3 and up */
	OP_HOOK = 36,           /* path:s timeout:i args:[S] env:[S] stdin:b; run a program to its end; timeout in seconds, 0 none */
	OP_EXEC = 37,           /* paths:[s] args:[S] env:[S]; paths are tried in order as execvpe does */
	OP_LOOKUP = 38,         /* paths:[s]; fail as EXEC would if no path can be executed */
	OP_BECOME_ROOT = 39,    /* ids 0 in the user namespace */
	OP_AFFINITY = 40,       /* cpus:b; sched_setaffinity(2) */
	OP_MEMPOLICY = 41,      /* mode:i nodes:b; set_mempolicy(2) */
	OP_PREPARE = 42,        /* fstype:s source:s attr:q params:[ss]; make a file system that a later MOUNT will use */
	OP_GATE = 43,           /* slot:h; answer, then wait for a byte in the pipe */
	OP_CLOSE = 44,          /* keep:h; close what the rest of the plan has no use for */
	OP_SOURCE = 45,         /* slot:h path:s flags:i set:q clear:q propagation:q; open_tree(2) of the host's path in the slot's place */
	OP_ROOT_AT = 46,        /* slot:h path:s; ROOT, at a path of the host's, which becomes the working directory */
	OP_RECEIVE = 47,        /* slot:h; ask for the slot's descriptor, now that its source is there */
};

#define F_MOUNT_NO_SYMLINKS 0x1
#define F_MOUNT_ON_PROC 0x2
#define F_MOUNT_IS_PROC 0x4
#define F_MOUNT_COPY_UP 0x8
#define F_MOUNT_KEEP_MODE 0x10
#define F_ATTR_RECURSIVE 0x1
#define F_SECCOMP_NOTIFY 0x1
#define F_CREDS_HAS_CAPS 0x1
#define F_CREDS_KEEP_GROUPS 0x2
#define F_CWD_CREATE 0x1
#define F_EXEC_INIT 0x1
#define F_HOOK_HOME 0x1
#define F_ROOT_SHARED 0x1
#define F_PIVOT_CHROOT 0x1
#define F_SOURCE_ATTR_TREE 0x1
#define F_SOURCE_PROP_TREE 0x2
#define F_CONSOLE_DEV 0x1
#define F_CONSOLE_PLAIN 0x2
#define F_OP_OPTIONAL 0x8000

#endif
