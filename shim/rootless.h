/* The two entries of rootless mode; see rootless.c. Both return an exit status. */
#ifndef SERVIN_ROOTLESS_H
#define SERVIN_ROOTLESS_H

int rootless_hold(void);
int rootless_enter(int argc, char **argv); /* those of main: [2] is the pid, [3] the program */

#endif
