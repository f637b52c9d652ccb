/*
 * The per-container monitor: clones the stage child, relays plans to it, reads
 * all output, keeps the log and the exit record, and serves control sockets and
 * attached clients. One process, one poll loop, static buffers, no threads.
 *
 * Descriptors at start: 0 to 2 /dev/null, 3 the first control socket, 4 the
 * container's run directory, which becomes the working directory.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

struct monitor M;
struct proc procs[MAXPROC];
struct client clients[MAXCLIENT];
struct stream streams[2];

static void on_accept(void)
{
	struct ucred cr;
	socklen_t len = sizeof cr;
	int fd = accept4(M.listen, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0)
		return;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cr, &len) == 0 && cr.uid == geteuid())
		for (int i = 0; i < MAXCTL; i++)
			if (M.ctl[i] < 0) {
				M.ctl[i] = fd;
				return;
			}
	close(fd);
}

static void on_signal(int c, uint32_t cookie, const char *b, size_t n)
{
	struct ctl_signal s;
	int err = ESRCH;

	if (n == sizeof s) {
		memcpy(&s, b, sizeof s);
		for (int i = 0; i < MAXPROC; i++)
			if (procs[i].kind != P_FREE && (s.target ? procs[i].cookie == s.target && i > 0 : i == 0) && !(i == 0 && M.exited))
				err = kill(procs[i].pid, s.sig) < 0 ? errno : 0;
	}
	if (err)
		ctl_fail(c, cookie, err, "signal");
	else
		ctl_send(c, CTL_DONE, cookie, NULL, 0, NULL, 0);
}

static void on_state(int c, uint32_t cookie)
{
	struct ctl_state s = { M.state, (uint32_t)INIT->pid, M.started_ns, log_dropped(), M.flags, 0 };

	for (int i = 0; i < MAXCLIENT; i++)
		s.clients += clients[i].used;
	ctl_send(c, CTL_STATE_IS, cookie, &s, sizeof s, NULL, 0);
	if (M.recorded)
		tell_exit(c, cookie);
}

static void on_ctl(int c)
{
	struct fds f;
	struct ctl_hdr h;
	ssize_t n = msg_recv(M.ctl[c], M.msg, sizeof M.msg, &f);

	if (n == -EAGAIN)
		return;
	if (n <= 0) {
		drop_ctl(c);
		return;
	}
	if ((size_t)n < sizeof h) {
		close_all(&f);
		return;
	}
	memcpy(&h, M.msg, sizeof h);
	const char *b = M.msg + sizeof h;
	size_t len = (size_t)n - sizeof h;
	if (h.version != CTL_VERSION || h.len != len) {
		ctl_fail(c, h.cookie, EPROTO, "read message");
		close_all(&f);
		return;
	}
	int err = 0;
	switch (h.type) {
	case CTL_CLONE: on_clone(c, h.cookie, b, len, &f); break;
	case CTL_PLAN: on_plan(c, h.cookie, b, len, &f); break;
	case CTL_MORE: on_more(c, h.cookie, b, len, &f); break;
	case CTL_START: on_start(c, h.cookie, b, len, &f); break;
	case CTL_RELEASE: on_release(c, h.cookie); break;
	case CTL_EXEC: on_exec(c, h.cookie, b, len, &f); break;
	case CTL_SIGNAL: on_signal(c, h.cookie, b, len); break;
	case CTL_ATTACH: on_attach(c, h.cookie, b, len, &f); break;
	case CTL_STATE: on_state(c, h.cookie); break;
	case CTL_RESIZE: {
		struct ctl_resize r;
		if (len == sizeof r) {
			memcpy(&r, b, sizeof r);
			M.width = r.width, M.height = r.height;
			set_size(M.pty, r.width, r.height);
			ctl_send(c, CTL_DONE, h.cookie, NULL, 0, NULL, 0);
		}
		break;
	}
	case CTL_REOPEN: {
		int k = 0, fd = take(&f, &k);
		err = log_reopen(fd);
		if (err < 0) {
			shut(&fd);
			ctl_fail(c, h.cookie, -err, "open log");
		} else
			ctl_send(c, CTL_DONE, h.cookie, NULL, 0, NULL, 0);
		break;
	}
	case CTL_TERMINAL: {
		int k = 0, fd = take(&f, &k);
		if (fd < 0 || M.pty >= 0 || !(M.flags & START_TERMINAL) || M.exited) {
			shut(&fd);
			ctl_fail(c, h.cookie, EINVAL, "take terminal");
		} else {
			take_pty(fd);
			ctl_send(c, CTL_DONE, h.cookie, NULL, 0, NULL, 0);
		}
		break;
	}
	case CTL_QUIT:
		if (M.state <= STATE_PARKED)
			M.done = true;
		else if (M.recorded) {
			/* All that is to be told has been told, but a client may not have
			 * read everything yet: it gets the rest, and then we end. */
			shut(&M.listen);
			for (int i = 0; i < MAXCTL; i++)
				drop_ctl(i);
		}
		else if (INIT->wait == W_COMMAND)
			kill_init(); /* the command that was to make the container */
		break;
	default:
		ctl_fail(c, h.cookie, ENOSYS, "read message: unknown type");
	}
	close_all(&f);
}

enum { K_SIG, K_CTL, K_LISTEN, K_SYNC, K_STREAM, K_STDIN, K_CLIN, K_CLOUT, K_LOG };

static struct pollfd pfd[MAXPROC + MAXCTL + MAXCLIENT * 3 + 8];
static struct { uint8_t kind; uint16_t idx; } what[sizeof pfd / sizeof pfd[0]];
static int npfd;

static void watch(int fd, short events, uint8_t kind, int idx)
{
	if (fd < 0)
		return;
	pfd[npfd] = (struct pollfd){ .fd = fd, .events = events };
	what[npfd].kind = kind;
	what[npfd++].idx = (uint16_t)idx;
}

/* Sets up what to poll for; returns the time to wait. */
static int prepare(void)
{
	int64_t wait = -1, now = 0;

	npfd = 0;
	for (int i = 0; i < MAXPROC; i++)
		if (procs[i].kind != P_FREE)
			watch(procs[i].sync, POLLIN, K_SYNC, i);
	watch(M.sig, POLLIN, K_SIG, 0);
	for (int i = 0; i < MAXCTL; i++)
		watch(M.ctl[i], POLLIN, K_CTL, i);
	watch(M.listen, POLLIN, K_LISTEN, 0);
	for (int s = 0; s < 2; s++)
		if (streams[s].fd >= 0 && streams[s].fed == streams[s].len && !lagging(s))
			watch(streams[s].fd, POLLIN, K_STREAM, s);
	if (M.in_off < M.in_len)
		watch(M.pty >= 0 ? M.pty : M.stdin_fd, POLLOUT, K_STDIN, 0);
	for (int i = 0; i < MAXCLIENT; i++) {
		struct client *c = &clients[i];
		if (!c->used)
			continue;
		if (M.in_off == M.in_len)
			watch(c->in, POLLIN, K_CLIN, i);
		for (int s = 0; s < 2; s++)
			watch(c->out[s], c->off[s] < streams[s].len ? POLLOUT : 0, K_CLOUT, i);
		if (c->lag && !c->lossless) {
			now = now ? now : now_ms();
			int64_t left = c->lag + LAG_MS - now;
			wait = wait < 0 || left < wait ? (left < 0 ? 0 : left) : wait;
		}
	}
	if (log_flush() < 0 || streams[0].fed < streams[0].len || streams[1].fed < streams[1].len) {
		watch(log_pollfd(), POLLOUT, K_LOG, 0);
		if (wait < 0 || wait > LOG_RETRY_MS)
			wait = LOG_RETRY_MS;
	}
	return (int)wait;
}

static bool clients_done(void)
{
	for (int i = 0; i < MAXCLIENT; i++)
		for (int s = 0; s < 2; s++)
			if (clients[i].used && clients[i].out[s] >= 0 && clients[i].off[s] < streams[s].len)
				return false;
	return true;
}

static void turn(void)
{
	int wait = prepare();
	int n = poll(pfd, (nfds_t)npfd, wait);

	if (n < 0 && errno != EINTR)
		_exit(1);
	bool child = false;
	for (int i = 0; i < npfd && n > 0; i++) {
		if (!pfd[i].revents)
			continue;
		n--;
		int x = what[i].idx;
		switch (what[i].kind) {
		case K_SYNC: on_sync(&procs[x]); break;
		case K_SIG: child = true; break;
		case K_CTL: if (M.ctl[x] >= 0) on_ctl(x); break;
		case K_LISTEN: on_accept(); break;
		case K_STREAM: pump(x); break;
		case K_STDIN: push_stdin(); break;
		case K_CLIN: if (clients[x].in >= 0) on_client_in(&clients[x]); break;
		case K_CLOUT:
			for (int s = 0; s < 2; s++)
				if (clients[x].used && clients[x].out[s] == pfd[i].fd && pfd[i].revents & POLLERR) {
					shut(&clients[x].out[s]);
					if (clients[x].in < 0 && clients[x].out[0] < 0 && clients[x].out[1] < 0)
						drop_client(&clients[x]);
				}
			deliver(0);
			deliver(1);
			break;
		case K_LOG: log_flush(); break;
		}
	}
	if (child)
		reap();
	for (int s = 0; s < 2; s++)
		feed(s);
	if (M.stdin_close || M.in_off < M.in_len)
		push_stdin();
	for (int i = 0; i < MAXCLIENT; i++)
		if (clients[i].used && clients[i].lag && !clients[i].lossless && now_ms() - clients[i].lag >= LAG_MS)
			drop_client(&clients[i]);
	if (M.exited && !M.done)
		finish();
}

int monitor_main(void)
{
	sigset_t all;

	for (int i = 0; i < MAXCTL; i++)
		M.ctl[i] = -1;
	for (int i = 0; i < MAXPROC; i++)
		procs[i].sync = procs[i].ctl = procs[i].extra = -1;
	for (int i = 0; i < MAXCLIENT; i++)
		clients[i].in = clients[i].out[0] = clients[i].out[1] = -1;
	for (int s = 0; s < 2; s++)
		streams[s].fd = -1, streams[s].data = streams[s].rbuf;
	M.held_fd = M.listen = M.mntns = M.pty = M.stdin_fd = -1;
	M.ctl[0] = 3;
	if (fcntl(3, F_SETFD, FD_CLOEXEC) < 0 || fchdir(4) < 0)
		return 1;
	close(4);
	umask(022); /* the container's, too, unless it says otherwise */
	prctl(PR_SET_NAME, "servin-shim");
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	signal(SIGPIPE, SIG_IGN);
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigemptyset(&all);
	sigaddset(&all, SIGCHLD);
	M.sig = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
	if (M.sig < 0)
		return 1;
	while (!M.done) {
		turn();
		if (M.recorded && clients_done())
			break;
		if (!any_ctl() && M.state < STATE_STARTING)
			break; /* parked for an engine that is gone */
	}
	kill_init();
	return 0;
}
