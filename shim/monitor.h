/* What the files of the monitor share. */
#ifndef SERVIN_MONITOR_H
#define SERVIN_MONITOR_H

#include "shim.h"

#include <stdbool.h>
#include <sys/uio.h>

#define MAXCTL 8
#define MAXCLIENT 32
#define MAXPROC 256
#define RBUF 16384
#define TAIL (4u << 20)      /* most that is read after the end for slow clients */
#define LAG_MS 2000          /* a client that takes nothing for so long is dropped */
#define LOG_RETRY_MS 100
#define LOG_GIVEUP_MS 5000   /* after the exit */
#define MAXFDS 253           /* SCM_MAX_FD */

struct fds {
	int n;
	int v[MAXFDS];
};

enum { P_FREE = 0, P_INIT, P_EXEC };
enum { W_NONE = 0, W_PLAN, W_SETUP, W_EXEC, W_COMMAND }; /* what the stage is busy with */

struct proc {
	pid_t pid;
	int sync, ctl, extra; /* extra: the pty master of an exec until it is handed on */
	uint32_t cookie, plan_cookie;
	uint8_t kind, wait, started, failed;
};

struct client {
	int in, out[2];
	uint32_t off[2]; /* of the stream's data */
	int64_t lag;     /* since when it takes nothing, 0 it does */
	bool used, lossless;
};

struct stream {
	int fd;
	uint32_t len, fed; /* data[fed..len) has not gone to the log yet */
	char *data;
	char rbuf[RBUF];
};

struct monitor {
	int ctl[MAXCTL], listen, sig, mntns, pty, stdin_fd;
	uint32_t state, flags, in_off, in_len;
	int32_t nice;
	bool pidns_entered, was_held, exited, recorded, stdin_client, stdin_close, log_opened, done;
	int status;
	uint64_t started_ns, exited_ns;
	int64_t log_deadline, log_retry;
	uint16_t width, height;
	char inbuf[RBUF + 1];
	char held[SYNC_MAXMSG];
	uint32_t held_len;
	int held_fd;
	char msg[CTL_MAXMSG];
};

extern struct monitor M;
extern struct proc procs[MAXPROC];
extern struct client clients[MAXCLIENT];
extern struct stream streams[2];
#define INIT (&procs[0])

/* message.c */
void shut(int *fd);
void close_all(struct fds *f);
int64_t now_ms(void);
uint64_t wall_ns(void);
void nonblock(int fd);
int msg_send(int sock, struct iovec *iov, int niov, const int *fds, int nfds, int flags);
ssize_t msg_recv(int sock, void *buf, size_t size, struct fds *f);
void drop_ctl(int i);
void ctl_send(int i, uint16_t type, uint32_t cookie, const void *p, size_t n, const int *fds, int nfds);
void ctl_fail(int i, uint32_t cookie, int err, const char *name);
void ctl_notice(int i, uint16_t type, uint32_t cookie, const void *p, size_t n, const int *fds, int nfds);
bool any_ctl(void);

/* spawn.c */
#define NS_ALL 0x7e020080ull /* every CLONE_NEW*, time included */

struct clone3_args {
	uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

void child_setup(int sync);
pid_t spawn(uint64_t ns, int cgroup, int userns, int pidns, int *sync, int *pidfd);
pid_t run_command(const char *b, size_t n, const int *std, int *sync);

/* request.c */
void on_clone(int c, uint32_t cookie, const char *b, size_t n, struct fds *f);
void kill_init(void);
void set_size(int pty, uint16_t w, uint16_t h);
int take(struct fds *f, int *k);
void on_start(int c, uint32_t cookie, const char *b, size_t n, struct fds *f);
void on_release(int c, uint32_t cookie);
void on_exec(int c, uint32_t cookie, const char *b, size_t n, struct fds *f);
void on_more(int c, uint32_t cookie, const char *b, size_t n, struct fds *f);
void on_plan(int c, uint32_t cookie, const char *b, size_t n, struct fds *f);

/* child.c */
void take_pty(int fd);
void on_started(struct proc *p);
void on_sync(struct proc *p);
void tell_exit(int ctl, uint32_t cookie);
void finish(void);
void reap(void);

/* stream.c */
void drop_client(struct client *c);
void deliver(int s);
bool lagging(int s);
void feed(int s);
bool pump(int s);
void drain(int s);
void push_stdin(void);
void on_client_in(struct client *c);
void on_attach(int ctl, uint32_t cookie, const char *b, size_t n, struct fds *f);

#endif
