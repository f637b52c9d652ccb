/* The start-up stage: carries plans out inside fresh namespaces. Sync messages
   and the duties of whoever clones the stage are listed in PROTOCOL.md. */
#ifndef SERVIN_STAGE_H
#define SERVIN_STAGE_H

#define SYNC_VERSION 1

enum sync_type {
	SYNC_PLAN = 1,  /* to stage: u32 plan_len, u32 nslots, inline plan */
	SYNC_MORE = 2,  /* to stage: u32 nslots */
	SYNC_DONE = 3,  /* from stage: u32 0 */
	SYNC_FAIL = 4,  /* from stage: u32 op_index, i32 errno, u8 name_len, name */
	SYNC_FD = 5,    /* from stage, before DONE or the end: u32 what, one descriptor */
	SYNC_WANT = 7,  /* from stage, while a plan is carried out: u32 slot; answered by MORE with it */
};

enum sync_fd { SYNC_FD_TERMINAL = 1, SYNC_FD_SECCOMP = 2 };

#define SYNC_INLINE_MAX 60000 /* longer plans come in a sealed memfd */
#define SYNC_FDS_MAX 250      /* descriptors in one datagram */
#define SYNC_SLOTS_MAX 4096   /* descriptors of one plan */

struct sync_hdr {
	unsigned short version, type;
	unsigned int len; /* bytes after the header */
};

/* Receives plans from sync_fd until one ends in EXEC or fails. */
_Noreturn void stage_main(int sync_fd);

#endif
