/*
 * The container's log: cuts output into lines, frames them as records, appends
 * them to a file or pipe and rotates it. Never blocks the monitor's loop: what
 * cannot be written stays in the buffer, and log_feed takes less until it can.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef F_SETPIPE_SZ
#define F_SETPIPE_SZ 1031
#endif

#define OBUF (LOG_MAXREC + 32768)

static struct {
	struct log_cfg c;
	pid_t writer;   /* of the non-blocking mode */
	uint64_t size;  /* of the file */
	uint64_t rotate_at; /* no rotation below this size: backs off after a failure */
	uint64_t dropped;
	bool broken;    /* the pipe's reader is gone */
	size_t len, off; /* obuf[off..len) is pending */
	size_t torn;     /* bytes in the file of the record that obuf begins in the midst of */
	size_t line_len[2];
	char line[2][LOG_LINE];
	char obuf[OBUF];
} L;

static int sink = -1; /* file or pipe; apart, so that the buffers stay in .bss */

static char *put_uint(char *o, unsigned v, int width)
{
	for (int i = width - 1; i >= 0; i--) {
		o[i] = (char)('0' + v % 10);
		v /= 10;
	}
	return o + width;
}

/* RFC 3339 with nanoseconds in UTC; with trim, trailing zeros go, as Go's
 * time.RFC3339Nano has it. */
static char *put_time(char *o, uint64_t ns, bool trim)
{
	/* Days to civil date: shift the era so that years begin in March. */
	uint64_t secs = ns / 1000000000u;
	unsigned frac = (unsigned)(ns % 1000000000u);
	uint32_t days = (uint32_t)(secs / 86400), rest = (uint32_t)(secs % 86400);
	uint32_t z = days + 719468, era = z / 146097, doe = z % 146097;
	uint32_t yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
	uint32_t doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
	uint32_t mp = (5 * doy + 2) / 153, d = doy - (153 * mp + 2) / 5 + 1;
	uint32_t m = mp < 10 ? mp + 3 : mp - 9, y = yoe + era * 400 + (m <= 2);

	o = put_uint(o, y, 4), *o++ = '-';
	o = put_uint(o, m, 2), *o++ = '-';
	o = put_uint(o, d, 2), *o++ = 'T';
	o = put_uint(o, rest / 3600, 2), *o++ = ':';
	o = put_uint(o, rest / 60 % 60, 2), *o++ = ':';
	o = put_uint(o, rest % 60, 2);
	if (!trim || frac) {
		*o++ = '.';
		o = put_uint(o, frac, 9);
		while (trim && o[-1] == '0')
			o--;
	}
	*o++ = 'Z';
	return o;
}

/* Length of the well-formed UTF-8 sequence at p (Unicode table 3-7), 0 if none. */
static size_t utf8_len(const unsigned char *p, size_t n)
{
	unsigned char a = p[0], lo = 0x80, hi = 0xbf;
	size_t want;

	if (a >= 0xc2 && a <= 0xdf)
		want = 2;
	else if (a >= 0xe0 && a <= 0xef)
		want = 3, lo = a == 0xe0 ? 0xa0 : 0x80, hi = a == 0xed ? 0x9f : 0xbf;
	else if (a >= 0xf0 && a <= 0xf4)
		want = 4, lo = a == 0xf0 ? 0x90 : 0x80, hi = a == 0xf4 ? 0x8f : 0xbf;
	else
		return 0;
	if (n < want || p[1] < lo || p[1] > hi)
		return 0;
	for (size_t i = 2; i < want; i++)
		if (p[i] < 0x80 || p[i] > 0xbf)
			return 0;
	return want;
}

static char *put_json(char *o, const unsigned char *p, size_t n)
{
	static const char hex[] = "0123456789abcdef";

	for (size_t i = 0; i < n;) {
		unsigned char c = p[i];
		if (c >= 0x80) {
			size_t u = utf8_len(p + i, n - i);
			if (u == 0) {
				memcpy(o, "\\ufffd", 6), o += 6, i++;
			} else if (u == 3 && c == 0xe2 && p[i + 1] == 0x80 && (p[i + 2] & 0xfe) == 0xa8) {
				/* U+2028 and U+2029 break JavaScript readers */
				memcpy(o, "\\u202", 5), o[5] = hex[p[i + 2] & 0xf], o += 6, i += 3;
			} else {
				memcpy(o, p + i, u), o += u, i += u;
			}
			continue;
		}
		i++;
		if (c == '"' || c == '\\')
			*o++ = '\\', *o++ = (char)c;
		else if (c == '\n')
			*o++ = '\\', *o++ = 'n';
		else if (c == '\r')
			*o++ = '\\', *o++ = 'r';
		else if (c < 0x20 || c == '<' || c == '>' || c == '&') {
			memcpy(o, "\\u00", 4), o[4] = hex[c >> 4], o[5] = hex[c & 15], o += 6;
		} else
			*o++ = (char)c;
	}
	return o;
}

size_t log_encode(int format, char *out, int stream, uint64_t ns, const char *p, size_t n, int full)
{
	char *o = out;

	switch (format) {
	case LOG_JSON:
		memcpy(o, "{\"log\":\"", 8), o += 8;
		o = put_json(o, (const unsigned char *)p, n);
		if (full)
			*o++ = '\\', *o++ = 'n';
		memcpy(o, "\",\"stream\":\"std", 15), o += 15;
		memcpy(o, stream == 2 ? "err" : "out", 3), o += 3;
		memcpy(o, "\",\"time\":\"", 10), o += 10;
		o = put_time(o, ns, true);
		memcpy(o, "\"}\n", 3), o += 3;
		break;
	case LOG_K8S:
		o = put_time(o, ns, false);
		memcpy(o, stream == 2 ? " stderr " : " stdout ", 8), o += 8;
		*o++ = full ? 'F' : 'P', *o++ = ' ';
		memcpy(o, p, n), o += n;
		*o++ = '\n';
		break;
	case LOG_PIPE: {
		uint32_t len = (uint32_t)(12 + n);
		memcpy(o, &len, 4), o[4] = (char)stream, o[5] = (char)!full, o[6] = o[7] = 0;
		memcpy(o + 8, &ns, 8), memcpy(o + 16, p, n), o += 16 + n;
		break;
	}
	}
	return (size_t)(o - out);
}

static int open_file(void)
{
	struct stat st;
	char last = '\n';
	/* O_RDWR to look whether a crash left half a record at the end. */
	int fd = open(L.c.path, O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY, 0640);

	if (fd < 0)
		return -errno;
	if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
		close(fd);
		return -EINVAL;
	}
	L.size = (uint64_t)st.st_size;
	L.rotate_at = L.c.max;
	if (st.st_size > 0 && pread(fd, &last, 1, st.st_size - 1) == 1 && last != '\n' && write(fd, "\n", 1) == 1)
		L.size++;
	return fd;
}

static void rotate(void)
{
	char from[sizeof(L.c.path) + 16], to[sizeof(L.c.path) + 16];
	int fd;

	if (L.c.files <= 1) {
		if (ftruncate(sink, 0) == 0)
			L.size = 0;
		else
			L.rotate_at = L.size + L.c.max;
		return;
	}
	for (int i = L.c.files - 1; i > 0; i--) {
		if (i == 1)
			snprintf(from, sizeof from, "%s", L.c.path);
		else
			snprintf(from, sizeof from, "%s.%d", L.c.path, i - 1);
		snprintf(to, sizeof to, "%s.%d", L.c.path, i);
		if (rename(from, to) < 0 && i == 1) {
			L.rotate_at = L.size + L.c.max;
			return;
		}
	}
	/* Should opening fail (no space for an inode), the renamed file goes on. */
	uint64_t size = L.size;
	fd = open_file();
	if (fd < 0) {
		L.size = size;
		L.rotate_at = size + L.c.max;
		return;
	}
	close(sink);
	sink = fd;
}

int log_flush(void)
{
	while (L.off < L.len) {
		if (sink < 0 || L.broken)
			return -1;
		ssize_t n = write(sink, L.obuf + L.off, L.len - L.off);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EPIPE)
			L.broken = true;
		if (n <= 0)
			return -1;
		L.off += (size_t)n;
		L.size += (uint64_t)n;
	}
	L.off = L.len = L.torn = 0;
	return 0;
}

/* Bytes of the record written in part that are in the file. */
static size_t torn(void)
{
	for (size_t i = L.off; i > 0; i--)
		if (L.obuf[i - 1] == '\n')
			return L.off - i;
	return L.torn + L.off;
}

static void compact(void)
{
	if (L.off == 0)
		return;
	L.torn = torn();
	memmove(L.obuf, L.obuf + L.off, L.len - L.off);
	L.len -= L.off, L.off = 0;
}

/* Appends one record to the buffer; false when there is no room. */
static bool record(int stream, uint64_t ns, const char *p, size_t n, int full)
{
	if (sizeof L.obuf - L.len < n * 6 + 256 && log_flush() < 0) {
		compact();
		if (sizeof L.obuf - L.len < n * 6 + 256) {
			L.dropped += L.c.nonblock != 0;
			return L.c.nonblock != 0;
		}
	}
	size_t before = L.len;
	size_t rec = log_encode(L.c.format, L.obuf + before, stream, ns, p, n, full);
	uint64_t total = L.size + (before - L.off);
	if (L.rotate_at && L.writer == 0 && L.c.format != LOG_PIPE && total > 0 && total + rec > L.rotate_at) {
		if (log_flush() < 0) {
			L.dropped += L.c.nonblock != 0;
			return L.c.nonblock != 0;
		}
		rotate();
		memmove(L.obuf, L.obuf + before, rec);
		before = 0;
	}
	L.len = before + rec;
	return true;
}

size_t log_feed(int stream, const char *p, size_t n)
{
	struct timespec ts;
	int s = stream == 2;
	size_t done = 0;

	if (L.c.format == LOG_NONE)
		return n;
	clock_gettime(CLOCK_REALTIME, &ts);
	uint64_t ns = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
	while (done < n) {
		size_t have = L.line_len[s], room = LOG_LINE - have;
		size_t left = n - done, look = left < room ? left : room;
		const char *nl = memchr(p + done, '\n', look);
		size_t take = nl ? (size_t)(nl - (p + done)) : look;
		const char *src = p + done;

		if (!nl && have + take < LOG_LINE) { /* a line yet to be ended */
			memcpy(L.line[s] + have, src, take);
			L.line_len[s] += take;
			done = n;
			break;
		}
		if (have) {
			memcpy(L.line[s] + have, src, take);
			src = L.line[s];
		}
		if (!record(stream, ns, src, have + take, nl != NULL))
			break;
		L.line_len[s] = 0;
		done += take + (nl != NULL);
	}
	log_flush();
	return done;
}

void log_eof(int stream)
{
	struct timespec ts;
	int s = stream == 2;

	if (L.c.format == LOG_NONE || L.line_len[s] == 0)
		return;
	clock_gettime(CLOCK_REALTIME, &ts);
	if (record(stream, (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec, L.line[s], L.line_len[s], 0))
		L.line_len[s] = 0;
	log_flush();
}

/*
 * Non-blocking mode: a child of ours does the writing, which may stall, and
 * the pipe between us is the ring that fills up meanwhile.
 */
static _Noreturn void writer_main(int in)
{
	size_t n = 0;
	int patience = 20; /* tries after the end */
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	for (;;) {
		ssize_t r = read(in, L.obuf + n, sizeof L.obuf - n);
		if (r < 0 && errno == EINTR)
			continue;
		if (r > 0)
			n += (size_t)r;
		size_t end = n, cut = 0;
		while (end > 0 && L.obuf[end - 1] != '\n')
			end--;
		if (r <= 0)
			end = n;
		while (cut < end) {
			/* As many whole records as fit, at least one. */
			size_t stop = end;
			if (L.rotate_at && L.size + (end - cut) > L.rotate_at) {
				char *nl = memchr(L.obuf + cut, '\n', end - cut);
				stop = nl ? (size_t)(nl - L.obuf) + 1 : end;
				if (L.size > 0 && L.size + (stop - cut) > L.rotate_at)
					rotate();
			}
			while (cut < stop) {
				ssize_t w = write(sink, L.obuf + cut, stop - cut);
				if (w > 0) {
					cut += (size_t)w, L.size += (uint64_t)w;
					continue;
				}
				if (errno == EINTR)
					continue;
				nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
				struct pollfd p = { .fd = in, .events = POLLIN };
				if (poll(&p, 1, 0) > 0 && p.revents & POLLHUP && patience-- <= 0) {
					L.off = cut, L.len = stop, L.torn = 0;
					size_t half = torn();
					_exit(ftruncate(sink, (off_t)(L.size - half)) < 0);
				}
			}
		}
		if (r <= 0)
			_exit(0);
		memmove(L.obuf, L.obuf + end, n - end);
		n -= end;
	}
}

static int start_writer(void)
{
	int p[2], fd = open_file();
	uint64_t size = L.c.buffer ? L.c.buffer : 1 << 20;

	if (fd < 0)
		return fd;
	if (pipe2(p, O_CLOEXEC) < 0) {
		int e = errno;
		close(fd);
		return -e;
	}
	/* Over the limit for pipes: as large as is permitted. */
	while (size >= 65536 && fcntl(p[1], F_SETPIPE_SZ, (int)(size > 1 << 30 ? 1 << 30 : size)) < 0)
		size /= 2;
	fcntl(p[1], F_SETFL, O_WRONLY | O_NONBLOCK);
	pid_t pid = fork();
	if (pid == 0) {
		/* Nothing of the monitor's may stay open here: it waits for hang-ups. */
		sink = fcntl(fd, F_DUPFD, 200);
		int in = fcntl(p[0], F_DUPFD, 200);
		for (int i = 3; i < 200; i++)
			close(i);
		syscall(SYS_close_range, 202u, ~0u, 0u);
		L.len = L.off = 0;
		writer_main(in);
	}
	int e = errno;
	close(fd);
	close(p[0]);
	if (pid < 0) {
		close(p[1]);
		return -e;
	}
	L.writer = pid;
	return p[1];
}

static int sink_open(void)
{
	if (L.c.format == LOG_NONE)
		return -1;
	if (L.c.format == LOG_PIPE) {
		fcntl(L.c.pipe_fd, F_SETFL, O_WRONLY | O_NONBLOCK);
		return L.c.pipe_fd;
	}
	return L.c.nonblock ? start_writer() : open_file();
}

int log_open(const struct log_cfg *c)
{
	if (c)
		L.c = *c;
	int fd = sink_open();
	if (fd < 0 && L.c.format != LOG_NONE)
		return fd;
	sink = fd;
	return 0;
}

int log_reopen(int pipe_fd)
{
	int old = sink, fd;

	if (L.c.format == LOG_NONE)
		return 0;
	if (L.c.format == LOG_PIPE) {
		if (pipe_fd < 0)
			return -EBADF;
		L.c.pipe_fd = pipe_fd;
	}
	log_flush();
	fd = sink_open(); /* a former writer ends when its pipe is closed */
	if (fd < 0)
		return fd;
	sink = fd;
	L.broken = false;
	if (old >= 0)
		close(old);
	log_flush();
	return 0;
}

int log_pollfd(void)
{
	return L.off < L.len && !L.broken && (L.c.format == LOG_PIPE || L.writer) ? sink : -1;
}

void log_abandon(void)
{
	/* Records are not counted apart any more: at least one is lost. */
	if (L.off < L.len || L.line_len[0] || L.line_len[1])
		L.dropped++;
	/* Half a record would make the next one unreadable. */
	size_t half = torn();
	if (L.off < L.len && half > 0 && !L.writer && L.c.format != LOG_PIPE && sink >= 0 && half <= L.size &&
	    ftruncate(sink, (off_t)(L.size - half)) == 0)
		L.size -= half;
	L.off = L.len = L.line_len[0] = L.line_len[1] = 0;
	L.c.format = LOG_NONE;
}

void log_close(void)
{
	if (sink >= 0)
		close(sink);
	sink = -1;
	if (L.writer > 0) {
		/* It empties its pipe; a stalled disk must not hold the exit back. */
		for (int i = 0; i < 350; i++) {
			if (waitpid(L.writer, NULL, WNOHANG) != 0)
				break;
			nanosleep(&(struct timespec){ .tv_nsec = i < 50 ? 200000 : 10000000 }, NULL);
		}
		L.writer = 0;
	}
}

uint64_t log_dropped(void)
{
	return L.dropped;
}
