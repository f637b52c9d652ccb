/* Sockets: datagrams with descriptors, answers and notices to the engine. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

void shut(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

void close_all(struct fds *f)
{
	for (int i = 0; i < f->n; i++)
		if (f->v[i] >= 0)
			close(f->v[i]);
	f->n = 0;
}

int64_t now_ms(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

uint64_t wall_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_REALTIME, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

void nonblock(int fd)
{
	int fl = fcntl(fd, F_GETFL);
	if (fl >= 0)
		fcntl(fd, F_SETFL, fl | O_NONBLOCK);
}

/* One datagram of up to three parts with descriptors; 0 or -errno. */
int msg_send(int sock, struct iovec *iov, int niov, const int *fds, int nfds, int flags)
{
	union {
		struct cmsghdr h;
		char b[CMSG_SPACE(sizeof(int) * MAXFDS)];
	} c;
	struct msghdr m = { .msg_iov = iov, .msg_iovlen = (size_t)niov };

	if (nfds > 0) {
		m.msg_control = c.b;
		m.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)nfds);
		memset(c.b, 0, sizeof(struct cmsghdr));
		struct cmsghdr *h = CMSG_FIRSTHDR(&m);
		h->cmsg_level = SOL_SOCKET;
		h->cmsg_type = SCM_RIGHTS;
		h->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)nfds);
		memcpy(CMSG_DATA(h), fds, sizeof(int) * (size_t)nfds);
	}
	for (;;) {
		if (sendmsg(sock, &m, MSG_NOSIGNAL | flags) >= 0)
			return 0;
		if (errno != EINTR)
			return -errno;
	}
}

/* One datagram; its length, 0 at the end, -errno. Never more than size bytes:
 * a longer one is an error, like one with more descriptors than we take. */
ssize_t msg_recv(int sock, void *buf, size_t size, struct fds *f)
{
	union {
		struct cmsghdr h;
		char b[CMSG_SPACE(sizeof(int) * MAXFDS)];
	} c;
	struct iovec iov = { buf, size };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = c.b, .msg_controllen = sizeof c.b };
	ssize_t n;

	f->n = 0;
	do
		n = recvmsg(sock, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	for (struct cmsghdr *h = CMSG_FIRSTHDR(&m); h; h = CMSG_NXTHDR(&m, h)) {
		if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS)
			continue;
		size_t cnt = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < cnt && f->n < MAXFDS; i++)
			memcpy(&f->v[f->n++], CMSG_DATA(h) + i * sizeof(int), sizeof(int));
	}
	if (m.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
		close_all(f);
		return -EMSGSIZE;
	}
	return n;
}

void drop_ctl(int i)
{
	shut(&M.ctl[i]);
	for (int k = 0; k < MAXPROC; k++)
		if (procs[k].ctl == i)
			procs[k].ctl = -1;
}

void ctl_send(int i, uint16_t type, uint32_t cookie, const void *p, size_t n, const int *fds, int nfds)
{
	if (i < 0 || M.ctl[i] < 0)
		return;
	struct ctl_hdr h = { CTL_VERSION, type, cookie, (uint32_t)n };
	struct iovec iov[2] = { { &h, sizeof h }, { (void *)(uintptr_t)p, n } };
	/* An engine that does not read its notices loses its connection, not us. */
	if (msg_send(M.ctl[i], iov, n ? 2 : 1, fds, nfds, MSG_DONTWAIT) < 0)
		drop_ctl(i);
}

void ctl_fail(int i, uint32_t cookie, int err, const char *name)
{
	char b[sizeof(struct sync_fail) + 255];
	struct sync_fail f = { ~0u, err, (uint8_t)strlen(name) };
	memcpy(b, &f, sizeof f);
	memcpy(b + sizeof f, name, f.name_len);
	ctl_send(i, CTL_FAILED, cookie, b, sizeof f + f.name_len, NULL, 0);
}

/* To the engine that asked, and if it has gone, to whoever is there. */
void ctl_notice(int i, uint16_t type, uint32_t cookie, const void *p, size_t n, const int *fds, int nfds)
{
	if (i >= 0 && M.ctl[i] >= 0) {
		ctl_send(i, type, cookie, p, n, fds, nfds);
		return;
	}
	for (i = 0; i < MAXCTL; i++)
		ctl_send(i, type, cookie, p, n, fds, nfds);
}

bool any_ctl(void)
{
	for (int i = 0; i < MAXCTL; i++)
		if (M.ctl[i] >= 0)
			return true;
	return false;
}
