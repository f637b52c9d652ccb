/*
 * Messages of servin-shim. Two parties speak to the monitor: the engine over
 * control sockets (struct ctl_hdr) and the start-up stage over its sync socket
 * (struct sync_hdr). All sockets are SOCK_SEQPACKET: one message is one
 * datagram. Integers are little endian and structs packed; internal/shim holds
 * the same definitions for Go and a test compares the two.
 */
#ifndef SERVIN_SHIM_H
#define SERVIN_SHIM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire format is little endian and is read in place"
#endif

#define PACKED __attribute__((packed))

/* ---- sync: monitor <-> stage ------------------------------------------- */

#define SYNC_VERSION 1
#define SYNC_MAXFDS 250   /* descriptors a datagram, under SCM_MAX_FD (253) */
#define SYNC_INLINE 60000 /* a longer plan comes in a sealed memfd */
#define SYNC_MAXMSG 65536

enum {
	SYNC_PLAN = 1,
	SYNC_MORE = 2,
	SYNC_DONE = 3,
	SYNC_FAIL = 4,
	SYNC_FD = 5,    /* from the stage, in the midst of a plan: u32 what, one descriptor */
	SYNC_CHILD = 6, /* from the stage: u32 pid of the child that goes on in its place */
};

enum { SYNC_FD_PTY = 1, SYNC_FD_SECCOMP = 2 };

struct PACKED sync_hdr {
	uint16_t version;
	uint16_t type;
	uint32_t len; /* of what follows */
};

struct PACKED sync_plan {
	uint32_t plan_len; /* of the plan, inline or in the first descriptor */
	uint32_t nslots;   /* in all, the memfd not counted; the rest follows in MORE */
};

struct PACKED sync_more {
	uint32_t nslots;
};

struct PACKED sync_fail {
	uint32_t op_index;
	int32_t err;
	uint8_t name_len;
	/* name follows */
};

struct PACKED sync_fd {
	uint32_t what;
};

/*
 * Carries plans out until one ends in exec; never returns. Called in a freshly
 * cloned, single-threaded child: sync_fd is 3 and the only descriptor above 2.
 */
_Noreturn void stage_main(int sync_fd);

/* ---- control: engine <-> monitor ---------------------------------------- */

#define CTL_VERSION 1
#define CTL_MAXMSG (SYNC_MAXMSG + 8192)

enum {
	/* to the monitor */
	CTL_CLONE = 1,   /* ctl_clone; descriptors in the order of its flags */
	CTL_PLAN = 2,    /* sync_plan + plan; forwarded, answered DONE or FAILED */
	CTL_MORE = 3,    /* sync_more; further slots for the plan being sent */
	CTL_START = 4,   /* ctl_start + strings + sync_plan + plan */
	CTL_RELEASE = 5, /* lets a held start go on */
	CTL_EXEC = 6,    /* ctl_exec + sync_plan + plan */
	CTL_SIGNAL = 7,  /* ctl_signal */
	CTL_RESIZE = 8,  /* ctl_resize */
	CTL_ATTACH = 9,  /* ctl_attach; descriptors in the order of its flags */
	CTL_REOPEN = 10, /* opens the log again; with a descriptor: the new pipe */
	CTL_STATE = 11,  /* answered STATE */
	CTL_QUIT = 12,   /* drop clients of an ended container and exit */
	CTL_TERMINAL = 13, /* the pty master of a container that a command made */
	/* from the monitor */
	CTL_CLONED = 32, /* u32 pid; pidfd. Again, with cookie 0, after SYNC_CHILD */
	CTL_DONE = 33,   /* descriptors of the stage's answer */
	CTL_FAILED = 34, /* sync_fail + name; op_index ~0 when the monitor itself failed */
	CTL_STARTED = 35, /* ctl_started; for exec with a terminal: pty master */
	CTL_EXITED = 36,  /* ctl_exited of the container */
	CTL_EXEC_EXITED = 37, /* ctl_exited of the exec with this cookie */
	CTL_STATE_IS = 38,    /* ctl_state */
	CTL_FD = 39, /* sync_fd; a descriptor from the stage (seccomp notify) */
};

struct PACKED ctl_hdr {
	uint16_t version;
	uint16_t type;
	uint32_t cookie; /* of the request that this answers; for execs: the exec */
	uint32_t len;    /* of what follows */
};

#define CLONE_HAS_CGROUP 1u /* v2 cgroup directory for CLONE_INTO_CGROUP */
#define CLONE_HAS_PIDNS 2u  /* pid namespace to be born in */
#define CLONE_HAS_USERNS 4u /* user namespace that owns what is created */

struct PACKED ctl_clone {
	uint64_t ns;    /* CLONE_NEW* */
	uint32_t flags; /* CLONE_HAS_* */
	int32_t nice;   /* to return to when started; see setpriority */
};

/* ctl_start.flags; descriptors come first in this order, the slots after them */
#define START_STDIN 1u    /* write end of the standard input pipe */
#define START_STDOUT 2u   /* read end */
#define START_STDERR 4u   /* read end */
#define START_LOGPIPE 8u  /* write end of the log pipe, LOG_PIPE */
#define START_TERMINAL 16u  /* the stage sends the pty master: no stdio descriptors */
#define START_STDIN_ONCE 32u
#define START_NONBLOCK 64u  /* drop records instead of stopping the container */
#define START_EPHEMERAL 128u /* the exit record is not synced */
#define START_HOLD 256u /* a second plan follows the first: run it on RELEASE */
#define START_PIDNS 512u /* init has a pid namespace of its own */
/*
 * In the plan's place stands a command that makes the container (an OCI runtime's
 * create): NUL-terminated arguments, an empty string, the environment. The
 * slots are its three standard descriptors. When it ends well, the process that
 * the file "pid" names, by then the monitor's child, is the container's init,
 * told by CTL_CLONED with cookie 0; DONE follows and RELEASE says that it is
 * being started. It takes the place of CLONE as well.
 */
#define START_COMMAND 1024u
#define START_HOLDFILE 2048u /* the held plan is a memfd, after the log pipe; hold_len is its head's */

enum { LOG_NONE = 0, LOG_JSON = 1, LOG_K8S = 2, LOG_PIPE = 3 };

struct PACKED ctl_start {
	uint32_t flags;
	uint8_t log_format;
	uint8_t log_files; /* kept by rotation, at least 1 */
	uint16_t path_len; /* of the log's absolute path, which follows without NUL */
	uint64_t log_size; /* rotate at, 0 never */
	uint64_t log_buffer; /* of START_NONBLOCK */
	uint16_t width, height; /* of the terminal, 0 unknown */
	uint32_t hold_len; /* length of the held plan, which follows the path */
};

#define EXEC_HAS_CGROUP 1u
#define EXEC_TERMINAL 2u

struct PACKED ctl_exec {
	uint32_t flags;
};

struct PACKED ctl_signal {
	uint32_t target; /* cookie of an exec, 0 the container's init */
	int32_t sig;
};

struct PACKED ctl_resize {
	uint16_t width, height;
};

#define ATTACH_STDIN 1u  /* SEQPACKET socket: byte 0 and data, or byte 1: close */
#define ATTACH_STDOUT 2u /* write end of a pipe */
#define ATTACH_STDERR 4u
#define ATTACH_LOSSLESS 8u /* wait for a slow client instead of dropping it */

struct PACKED ctl_attach {
	uint32_t flags;
};

struct PACKED ctl_started {
	uint32_t pid;
	uint64_t at_ns; /* CLOCK_REALTIME */
};

struct PACKED ctl_exited {
	int32_t status; /* as wait(2) gives it */
	uint64_t at_ns;
	uint64_t dropped;
};

enum { STATE_EMPTY = 0, STATE_PARKED = 1, STATE_STARTING = 2, STATE_HELD = 3, STATE_RUNNING = 4, STATE_EXITED = 5 };

struct PACKED ctl_state {
	uint32_t state;
	uint32_t pid;
	uint64_t started_ns;
	uint64_t dropped;
	uint32_t flags; /* of ctl_start */
	uint32_t clients;
};

/* ---- log.c ---------------------------------------------------------------- */

struct log_cfg {
	int format;
	int files;
	int nonblock;
	uint64_t max;
	uint64_t buffer;
	int pipe_fd; /* LOG_PIPE */
	char path[4096];
};

/* Opens the log; 0 or -errno. */
int log_open(const struct log_cfg *c);
int log_reopen(int pipe_fd);
/* Takes output of stream (1, 2); returns how many bytes were taken: fewer than
 * n when the log is stalled. */
size_t log_feed(int stream, const char *p, size_t n);
/* End of a stream: what is left of a line becomes a partial record. */
void log_eof(int stream);
/* Tries to write what is pending; 0 when nothing is left, -1 when stalled. */
int log_flush(void);
/* The descriptor to poll for writing while stalled, -1: retry after a while. */
int log_pollfd(void);
/* Stop waiting: drop and count what cannot be written. */
void log_abandon(void);
void log_close(void);
uint64_t log_dropped(void);

/* For tests and fuzzing: escapes one record into out, returns its length. */
size_t log_encode(int format, char *out, int stream, uint64_t ns, const char *p, size_t n, int full);
#define LOG_LINE 16384
#define LOG_MAXREC (LOG_LINE * 6 + 256)

int monitor_main(void);

#endif
