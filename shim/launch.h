/* The launcher; see launch.c. Returns an exit status. */
#ifndef SERVIN_LAUNCH_H
#define SERVIN_LAUNCH_H

int launch_main(void);

#endif
