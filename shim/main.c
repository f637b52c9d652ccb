/* servin-shim: the monitor of one container, the launcher of the OCI command line, the
 * relay of an engine, and the entries of rootless mode. */
#include <string.h>

#include "launch.h"
#include "relay.h"
#include "rootless.h"
#include "shim.h"

int main(int argc, char **argv)
{
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
