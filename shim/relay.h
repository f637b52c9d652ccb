/*
 * The relay: one process of an engine that carries connections made to published
 * ports over IPv6 to containers, where the kernel cannot translate them: from
 * ::1, and to containers that have IPv4 alone. It outlives the engine.
 *
 * Descriptor 3 is a listening SEQPACKET socket. A message is a struct relay_msg;
 * each is answered by a struct relay_answer.
 */
#ifndef SERVIN_RELAY_H
#define SERVIN_RELAY_H

#include <stdint.h>

#define RELAY_VERSION 1

enum {
	RELAY_ADD = 1,   /* with the bound socket: listen, and carry on to the target */
	RELAY_TAKE = 2,  /* answered with the socket of a port that is being relayed */
	RELAY_DEL = 3,   /* stop listening, drop the port's connections */
	RELAY_SWEEP = 4, /* DEL of all that was neither added nor taken on this connection */
	RELAY_QUIT = 5,
};

/* A port as the host knows it. The target is for ADD and TAKE. */
struct __attribute__((packed)) relay_msg {
	uint16_t version;
	uint16_t type;
	uint8_t host[16]; /* IPv6 */
	uint8_t to[16];   /* IPv6, or IPv4 mapped into it */
	uint16_t host_port;
	uint16_t to_port;
};

struct __attribute__((packed)) relay_answer {
	int32_t err; /* 0 or an errno */
};

int relay_main(void);

#endif
