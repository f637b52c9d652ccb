/* Feeds what comes on standard input to the log: per chunk u8 stream (0 is its
   end), u32 length, bytes. Arguments: format, path, rotate at, files. */
#include "../../../shim/shim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv)
{
	static struct log_cfg c = { .pipe_fd = -1 };
	static char buf[1 << 20];

	if (argc != 5)
		return 2;
	c.format = atoi(argv[1]);
	snprintf(c.path, sizeof c.path, "%s", argv[2]);
	c.max = strtoull(argv[3], NULL, 10);
	c.files = atoi(argv[4]);
	if (log_open(&c) < 0)
		return 3;
	for (;;) {
		unsigned char stream;
		uint32_t n;
		if (fread(&stream, 1, 1, stdin) != 1 || fread(&n, 4, 1, stdin) != 1)
			break;
		if (n > sizeof buf || fread(buf, 1, n, stdin) != n)
			return 4;
		for (size_t done = 0; done < n;)
			done += log_feed(stream, buf + done, n - done);
	}
	log_eof(1);
	log_eof(2);
	if (log_flush() < 0)
		return 5;
	log_close();
	return 0;
}
