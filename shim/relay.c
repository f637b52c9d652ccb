/* See relay.h. One thread, one epoll; data goes by splice and is never copied. */
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAXCTL 4
#define MAXCONNS 4096
#define CONNFDS 6       /* two sockets, two pipes */
#define RESERVED 64     /* descriptors kept for all else */
#define CHUNK 65536     /* most that waits in one direction */
#define TURNS 16        /* rounds of a connection before others have theirs */

/* What an epoll event is about: the first member of each of these. */
enum kind { KIND_DOOR, KIND_CTL, KIND_PORT, KIND_END };

struct end {
	enum kind kind;
	int fd;
	struct conn *conn;
	int pipe[2]; /* what came from here and was not yet passed on */
	unsigned held;
	bool eof, done;
};

struct conn {
	struct end end[2]; /* the client, the container */
	struct port *port;
	struct conn *prev, *next;
	bool connecting, dead;
};

struct port {
	enum kind kind;
	int fd;
	uint8_t host[16], to[16];
	uint16_t host_port, to_port;
	unsigned owner; /* control connection that last named it */
	bool dead;
	struct port *next;
};

struct ctl {
	enum kind kind;
	int fd; /* -1: free */
	unsigned id;
};

static int ep;
static enum kind door = KIND_DOOR;
static struct ctl ctls[MAXCTL];
static struct port *ports;
static struct conn *conns;
static unsigned nconns, nports, maxconns, ids;
static uint64_t maxfds;
static bool full; /* no more connections are accepted for now */
static time_t starved; /* when the host had no descriptors or memory left */

static int watch(int fd, uint32_t events, void *p)
{
	struct epoll_event e = {.events = events, .data.ptr = p};
	return epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
}

static void rewatch(int fd, uint32_t events, void *p)
{
	struct epoll_event e = {.events = events, .data.ptr = p};
	epoll_ctl(ep, EPOLL_CTL_MOD, fd, &e);
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void accepting(bool on)
{
	if (full == !on)
		return;
	full = !on;
	for (struct port *p = ports; p; p = p->next)
		if (!p->dead)
			rewatch(p->fd, on ? EPOLLIN : 0, p);
}

/* Memory is given back only between rounds: an event may still point there. */
static void drop(struct conn *c, bool reset)
{
	struct linger l = {.l_onoff = 1};

	if (c->dead)
		return;
	c->dead = true;
	nconns--;
	for (int i = 0; i < 2; i++) {
		struct end *e = &c->end[i];
		if (reset && e->fd >= 0)
			setsockopt(e->fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
		close_fd(&e->fd);
		close_fd(&e->pipe[0]);
		close_fd(&e->pipe[1]);
	}
}

static void drop_port(struct port *p)
{
	if (p->dead)
		return;
	p->dead = true;
	nports--;
	/* The engine may hold the socket too, so that closing does not end this. */
	epoll_ctl(ep, EPOLL_CTL_DEL, p->fd, NULL);
	close_fd(&p->fd);
	for (struct conn *c = conns; c; c = c->next)
		if (c->port == p)
			drop(c, true);
}

static void bury(void)
{
	for (struct conn *c = conns, *next; c; c = next) {
		next = c->next;
		if (!c->dead)
			continue;
		if (c->prev)
			c->prev->next = c->next;
		else
			conns = c->next;
		if (c->next)
			c->next->prev = c->prev;
		free(c);
	}
	for (struct port **p = &ports; *p;) {
		struct port *q = *p;
		if (q->dead)
			*p = q->next, free(q);
		else
			p = &q->next;
	}
}

/* To be a relay takes no privilege: the sockets come bound. */
static int humble(void)
{
	struct {
		uint32_t version;
		int pid;
	} h = {0x20080522, 0}; /* of capset(2), with 64 capabilities */
	uint32_t none[2][3] = {0};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
		return -1;
	return (int)syscall(SYS_capset, &h, &none);
}

static socklen_t address(struct sockaddr_storage *out, const uint8_t a[16], uint16_t port)
{
	static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

	memset(out, 0, sizeof *out);
	if (memcmp(a, mapped, 12) == 0) {
		struct sockaddr_in *s = (void *)out;
		s->sin_family = AF_INET;
		s->sin_port = htons(port);
		memcpy(&s->sin_addr, a + 12, 4);
		return sizeof *s;
	}
	struct sockaddr_in6 *s = (void *)out;
	s->sin6_family = AF_INET6;
	s->sin6_port = htons(port);
	memcpy(&s->sin6_addr, a, 16);
	return sizeof *s;
}

static void tune(int fd)
{
	int on = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
}

static time_t seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec;
}

/* Stops accepting for a second when the host is out of something. */
static void starve(int err)
{
	if (err != EMFILE && err != ENFILE && err != ENOBUFS && err != ENOMEM)
		return;
	starved = seconds();
	accepting(false);
}

static void enter(struct port *p)
{
	struct sockaddr_storage to;
	struct conn *c;
	int fd = accept4(p->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

	if (fd < 0) {
		starve(errno);
		return;
	}
	if ((c = calloc(1, sizeof *c)) == NULL) {
		close(fd);
		starve(ENOMEM);
		return;
	}
	for (int i = 0; i < 2; i++)
		c->end[i] = (struct end){.kind = KIND_END, .fd = -1, .conn = c, .pipe = {-1, -1}};
	c->port = p;
	c->end[0].fd = fd;
	c->next = conns;
	if (conns)
		conns->prev = c;
	conns = c;
	nconns++;
	socklen_t len = address(&to, p->to, p->to_port);
	int up = c->end[1].fd = socket(to.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (up < 0 || pipe2(c->end[0].pipe, O_NONBLOCK | O_CLOEXEC) || pipe2(c->end[1].pipe, O_NONBLOCK | O_CLOEXEC)) {
		starve(errno);
		drop(c, true);
		return;
	}
	tune(fd);
	tune(up);
	c->connecting = connect(up, (void *)&to, len) != 0;
	if ((c->connecting && errno != EINPROGRESS) ||
	    watch(up, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, &c->end[1]) ||
	    watch(fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, &c->end[0])) {
		drop(c, true);
		return;
	}
	if (nconns >= maxconns)
		accepting(false);
}

/* One round from one end to the other: 1 if anything moved, 0 if not, -1 when
 * the connection is broken. */
static int pass(struct end *from, struct end *to)
{
	int moved = 0;
	ssize_t n;

	if (!from->eof && from->held < CHUNK) {
		n = splice(from->fd, NULL, from->pipe[1], NULL, CHUNK - from->held, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
		if (n == 0)
			from->eof = true, moved = 1;
		else if (n > 0)
			from->held += (unsigned)n, moved = 1;
		else if (errno != EAGAIN && errno != EINTR)
			return -1;
	}
	if (from->held > 0) {
		n = splice(from->pipe[0], NULL, to->fd, NULL, from->held, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
		if (n > 0)
			from->held -= (unsigned)n, moved = 1;
		else if (n < 0 && errno != EAGAIN && errno != EINTR)
			return -1;
	}
	if (from->eof && from->held == 0 && !from->done) {
		from->done = true;
		shutdown(to->fd, SHUT_WR);
	}
	return moved;
}

static void carry(struct conn *c)
{
	struct end *a = &c->end[0], *b = &c->end[1];

	for (int turn = 0;; turn++) {
		int x = pass(a, b), y = x < 0 ? x : pass(b, a);
		if (x < 0 || y < 0) {
			drop(c, true);
			return;
		}
		if (a->done && b->done) {
			drop(c, false);
			return;
		}
		if (!x && !y)
			return;
		if (turn == TURNS) {
			/* There is more: to be told of it again. */
			rewatch(a->fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, a);
			return;
		}
	}
}

static void on_end(struct end *e, uint32_t events)
{
	struct conn *c = e->conn;

	if (c->dead)
		return;
	if (c->connecting) {
		int err = 0;
		socklen_t len = sizeof err;
		if (e != &c->end[1])
			return; /* kept until the other end is there */
		if (!(events & (EPOLLOUT | EPOLLERR | EPOLLHUP)))
			return;
		if (getsockopt(e->fd, SOL_SOCKET, SO_ERROR, &err, &len) || err) {
			drop(c, true); /* as a port that nobody listens on */
			return;
		}
		c->connecting = false;
	}
	carry(c);
}

static struct port *find(const struct relay_msg *m)
{
	for (struct port *p = ports; p; p = p->next)
		if (!p->dead && p->host_port == m->host_port && memcmp(p->host, m->host, 16) == 0)
			return p;
	return NULL;
}

static int add(struct ctl *ctl, const struct relay_msg *m, int *fd)
{
	struct port *p;
	int fl;

	if (*fd < 0)
		return EBADMSG;
	if (find(m))
		return EEXIST;
	if ((nports + 1) * 2 > maxfds)
		return EMFILE;
	if ((fl = fcntl(*fd, F_GETFL)) < 0 || fcntl(*fd, F_SETFL, fl | O_NONBLOCK) || listen(*fd, 1024))
		return errno;
	if ((p = calloc(1, sizeof *p)) == NULL)
		return ENOMEM;
	p->kind = KIND_PORT;
	p->fd = *fd;
	memcpy(p->host, m->host, 16);
	memcpy(p->to, m->to, 16);
	p->host_port = m->host_port;
	p->to_port = m->to_port;
	p->owner = ctl->id;
	if (watch(p->fd, full ? 0 : EPOLLIN, p)) {
		int err = errno;
		free(p);
		return err;
	}
	*fd = -1;
	p->next = ports;
	ports = p;
	nports++;
	return 0;
}

static void answer(struct ctl *ctl, int err, int fd)
{
	struct relay_answer a = {.err = err};
	struct iovec io = {&a, sizeof a};
	union {
		struct cmsghdr h;
		char b[CMSG_SPACE(sizeof(int))];
	} ctrl;
	struct msghdr msg = {.msg_iov = &io, .msg_iovlen = 1};

	if (fd >= 0) {
		msg.msg_control = ctrl.b;
		msg.msg_controllen = sizeof ctrl.b;
		struct cmsghdr *h = CMSG_FIRSTHDR(&msg);
		h->cmsg_level = SOL_SOCKET;
		h->cmsg_type = SCM_RIGHTS;
		h->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(h), &fd, sizeof fd);
	}
	if (sendmsg(ctl->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		close_fd(&ctl->fd);
}

static void on_ctl(struct ctl *ctl)
{
	struct relay_msg m;
	struct iovec io = {&m, sizeof m};
	union {
		struct cmsghdr h;
		char b[CMSG_SPACE(4 * sizeof(int))];
	} ctrl;
	struct msghdr msg = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = ctrl.b, .msg_controllen = sizeof ctrl.b};
	struct port *p;
	int fd = -1, give = -1, err = 0;

	if (ctl->fd < 0)
		return;
	ssize_t n = recvmsg(ctl->fd, &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		close_fd(&ctl->fd);
		return;
	}
	for (struct cmsghdr *h = CMSG_FIRSTHDR(&msg); h; h = CMSG_NXTHDR(&msg, h)) {
		if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS)
			continue;
		size_t got = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < got; i++) {
			close_fd(&fd);
			memcpy(&fd, CMSG_DATA(h) + i * sizeof(int), sizeof(int));
		}
	}
	if (n != sizeof m || m.version != RELAY_VERSION || (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC))) {
		close_fd(&fd);
		answer(ctl, EPROTO, -1);
		return;
	}
	switch (m.type) {
	case RELAY_ADD:
		err = add(ctl, &m, &fd);
		break;
	case RELAY_TAKE:
		if ((p = find(&m)) == NULL || p->to_port != m.to_port || memcmp(p->to, m.to, 16) != 0)
			err = ENOENT;
		else
			p->owner = ctl->id, give = p->fd;
		break;
	case RELAY_DEL:
		if ((p = find(&m)) == NULL)
			err = ENOENT;
		else
			drop_port(p);
		break;
	case RELAY_SWEEP:
		for (p = ports; p; p = p->next)
			if (p->owner != ctl->id)
				drop_port(p);
		break;
	case RELAY_QUIT:
		answer(ctl, 0, -1);
		_exit(0);
	default:
		err = EOPNOTSUPP;
	}
	close_fd(&fd);
	answer(ctl, err, give);
}

static void on_door(void)
{
	struct ucred u;
	socklen_t len = sizeof u;
	int fd = accept4(3, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

	if (fd < 0)
		return;
	for (int i = 0; i < MAXCTL; i++) {
		if (ctls[i].fd >= 0)
			continue;
		if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &u, &len) || u.uid != geteuid())
			break;
		ctls[i] = (struct ctl){.kind = KIND_CTL, .fd = fd, .id = ++ids};
		if (watch(fd, EPOLLIN | EPOLLRDHUP, &ctls[i])) {
			ctls[i].fd = -1;
			break;
		}
		return;
	}
	close(fd);
}

int relay_main(void)
{
	struct epoll_event ev[64];
	struct rlimit rl;

	signal(SIGPIPE, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	maxfds = 1024;
	if (getrlimit(RLIMIT_NOFILE, &rl) == 0) {
		rl.rlim_cur = rl.rlim_max;
		if (setrlimit(RLIMIT_NOFILE, &rl) == 0)
			maxfds = rl.rlim_cur;
	}
	uint64_t room = maxfds / 2 > RESERVED ? (maxfds / 2 - RESERVED) / CONNFDS : 1;
	maxconns = room < MAXCONNS ? (unsigned)room : MAXCONNS;
	for (int i = 0; i < MAXCTL; i++)
		ctls[i].fd = -1;
	if ((ep = epoll_create1(EPOLL_CLOEXEC)) < 0 || watch(3, EPOLLIN, &door) || humble())
		return 1;
	for (;;) {
		/* While full, look once a second: descriptors may be free again. */
		int n = epoll_wait(ep, ev, 64, full ? 1000 : -1);
		if (n < 0 && errno != EINTR)
			return 1;
		for (int i = 0; i < n; i++) {
			switch (*(enum kind *)ev[i].data.ptr) {
			case KIND_DOOR:
				on_door();
				break;
			case KIND_CTL:
				on_ctl(ev[i].data.ptr);
				break;
			case KIND_PORT:
				if (!((struct port *)ev[i].data.ptr)->dead && !full)
					enter(ev[i].data.ptr);
				break;
			case KIND_END:
				on_end(ev[i].data.ptr, ev[i].events);
				break;
			}
		}
		bury();
		if (full && nconns < maxconns && seconds() > starved)
			accepting(true);
	}
}
