/* servin-shim: the monitor of one container, the launcher of the OCI command line, the
 * relay of an engine, the entries of rootless mode, the pause of a pod, and the first
 * stage of a machine of VM mode. */
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "first.h"
#include "launch.h"
#include "relay.h"
#include "rootless.h"
#include "shim.h"

/* The init of a pod whose containers share processes: reaps what they orphan. It
 * has no right and no file, and is started with an empty root. */
static int pause_main(void)
{
	sigset_t set;
	int sig;

	sigfillset(&set);
	sigprocmask(SIG_BLOCK, &set, NULL);
	for (;;) {
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		if (sigwait(&set, &sig) == 0 && (sig == SIGTERM || sig == SIGINT))
			return 0;
	}
}

int main(int argc, char **argv)
{
	/* What the kernel does not know of its command line comes as arguments. */
	if (argc >= 1 && strcmp(argv[0], "/init") == 0 && getpid() == 1)
		return first_main();
	if (argc == 2 && strcmp(argv[1], "pause") == 0)
		return pause_main();
	if (argc == 2 && strcmp(argv[1], "monitor") == 0)
		return monitor_main();
	if (argc == 2 && strcmp(argv[1], "launch") == 0)
		return launch_main();
	if (argc == 2 && strcmp(argv[1], "relay") == 0)
		return relay_main();
	if (argc == 2 && strcmp(argv[1], "rootless-hold") == 0)
		return rootless_hold();
	if (argc >= 4 && strcmp(argv[1], "rootless-enter") == 0)
		return rootless_enter(argc, argv);
	return 2;
}
