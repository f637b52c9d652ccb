/* Output to the log and to clients, standard input from clients. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "monitor.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

void drop_client(struct client *c)
{
	bool had_in = c->in >= 0;

	shut(&c->in);
	shut(&c->out[0]);
	shut(&c->out[1]);
	c->used = false;
	if (had_in && M.stdin_client && M.flags & START_STDIN_ONCE)
		M.stdin_close = true;
}

/* Gives each client what it has not got yet of the stream. */
void deliver(int s)
{
	struct stream *st = &streams[s];

	for (int i = 0; i < MAXCLIENT; i++) {
		struct client *c = &clients[i];
		if (!c->used || c->out[s] < 0)
			continue;
		while (c->off[s] < st->len) {
			ssize_t n = write(c->out[s], st->data + c->off[s], st->len - c->off[s]);
			if (n > 0) {
				c->off[s] += (uint32_t)n;
				c->lag = 0;
				continue;
			}
			if (n < 0 && errno == EINTR)
				continue;
			if (n < 0 && errno == EAGAIN) {
				if (!c->lag)
					c->lag = now_ms();
			} else {
				shut(&c->out[s]); /* nobody reads any more */
				if (c->in < 0 && c->out[0] < 0 && c->out[1] < 0)
					drop_client(c);
			}
			break;
		}
	}
}

bool lagging(int s)
{
	for (int i = 0; i < MAXCLIENT; i++)
		if (clients[i].used && clients[i].out[s] >= 0 && clients[i].off[s] < streams[s].len)
			return true;
	return false;
}

void feed(int s)
{
	struct stream *st = &streams[s];

	if (st->fed < st->len)
		st->fed += (uint32_t)log_feed(s + 1, st->data + st->fed, st->len - st->fed);
}

static void reset(int s)
{
	streams[s].len = streams[s].fed = 0;
	for (int i = 0; i < MAXCLIENT; i++)
		clients[i].off[s] = 0;
}

static void end_stream(int s)
{
	if (streams[s].fd < 0)
		return;
	if (streams[s].fd == M.pty)
		M.pty = -1;
	shut(&streams[s].fd);
}

/* Reads once; false when there is nothing to read now or ever. */
bool pump(int s)
{
	struct stream *st = &streams[s];
	ssize_t n;

	if (st->fd < 0)
		return false;
	if (st->fed == st->len && !lagging(s))
		reset(s);
	size_t room = (st->data == st->rbuf ? RBUF : TAIL) - st->len;
	if (room == 0 || (st->data == st->rbuf && st->len > 0))
		return false;
	do
		n = read(st->fd, st->data + st->len, room);
	while (n < 0 && errno == EINTR);
	if (n < 0 && errno == EAGAIN)
		return false;
	if (n <= 0) {
		end_stream(s);
		if (!M.exited)
			log_eof(s + 1);
		return false;
	}
	st->len += (uint32_t)n;
	deliver(s);
	feed(s);
	return true;
}

/*
 * After the end all that is left in the pipe is taken at once, wherever slow
 * clients may be, since the log and the exit record wait for it.
 */
void drain(int s)
{
	struct stream *st = &streams[s];

	while (st->fd >= 0) {
		if (pump(s))
			continue;
		if (st->fd < 0)
			break;
		if (st->len > 0 && st->data == st->rbuf && (st->fed < st->len || lagging(s))) {
			char *t = mmap(NULL, TAIL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
			if (t != MAP_FAILED) {
				memcpy(t, st->rbuf, st->len);
				st->data = t;
				ssize_t n;
				while (st->len < TAIL && (n = read(st->fd, t + st->len, TAIL - st->len)) > 0)
					st->len += (uint32_t)n;
				deliver(s);
				feed(s);
			}
		}
		end_stream(s); /* what writers outside the container say now is lost */
	}
}

void push_stdin(void)
{
	int fd = M.pty >= 0 ? M.pty : M.stdin_fd;

	while (M.in_off < M.in_len) {
		ssize_t n = fd < 0 ? (ssize_t)(M.in_len - M.in_off) : write(fd, M.inbuf + M.in_off, M.in_len - M.in_off);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return;
		if (n < 0) { /* the container closed it: swallow what comes */
			shut(&M.stdin_fd);
			break;
		}
		M.in_off += (uint32_t)n;
	}
	M.in_off = M.in_len = 0;
	if (M.stdin_close)
		shut(&M.stdin_fd);
}

void on_client_in(struct client *c)
{
	ssize_t n = recv(c->in, M.inbuf, sizeof M.inbuf, MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		shut(&c->in);
		if (M.flags & START_STDIN_ONCE && M.stdin_client)
			M.stdin_close = true;
		if (c->out[0] < 0 && c->out[1] < 0)
			c->used = false;
	} else if (M.inbuf[0] == 0) {
		M.in_off = 1, M.in_len = (uint32_t)n;
	} else if (M.inbuf[0] == 1) {
		M.stdin_close = true;
	}
	push_stdin();
}

void on_attach(int ctl, uint32_t cookie, const char *b, size_t n, struct fds *f)
{
	struct ctl_attach a;
	struct client *c = NULL;
	int k = 0;

	for (int i = 0; i < MAXCLIENT && !c; i++)
		if (!clients[i].used)
			c = &clients[i];
	if (n != sizeof a || !c) {
		ctl_fail(ctl, cookie, c ? EINVAL : EAGAIN, c ? "attach" : "attach: too many clients");
		return;
	}
	memcpy(&a, b, sizeof a);
	*c = (struct client){ .in = -1, .out = { -1, -1 }, .used = true, .lossless = (a.flags & ATTACH_LOSSLESS) != 0 };
	if (a.flags & ATTACH_STDIN && (c->in = take(f, &k)) >= 0)
		M.stdin_client = true;
	for (int s = 0; s < 2; s++)
		if (a.flags & (s ? ATTACH_STDERR : ATTACH_STDOUT)) {
			c->out[s] = take(f, &k);
			c->off[s] = streams[s].len;
		}
	ctl_send(ctl, CTL_DONE, cookie, NULL, 0, NULL, 0);
}
