package main

import (
	"fmt"
	"slices"
)

const debugUsage = `Usage: cloudos debug [COMMAND [ARG...]]
       cloudos debug enable [--for DURATION] --reason TEXT
       cloudos debug disable
       cloudos debug status [--json]

Opens a shell on the machine (or runs COMMAND) with its namespaces and the tools of the engine's
toolbox; the machine's files are at /target. It has to be switched on, for 24 hours at most, or in
the machine's configuration (debugShell). All of it is recorded in the engine's audit log and on
the machine's console. The machine is that of SERVIN_HOST or of the context in use.
`

// debug has servin do it, which knows contexts, TLS and terminals.
func debug(args []string) (int, error) {
	if len(args) > 0 && slices.Contains([]string{"help", "--help", "-h"}, args[0]) {
		fmt.Print(debugUsage)
		return 0, nil
	}
	if len(args) > 0 && slices.Contains([]string{"enable", "disable", "status"}, args[0]) {
		return beside("servin", append([]string{"system", "debug-shell"}, args...))
	}
	return beside("servin", append([]string{"debug", "@host"}, args...))
}
