// Command cloudos is the command line of the operating system and of clusters.
// Commands that link much are programs of their own beside it: "cloudos image"
// runs cloudos-image, "cloudos debug" runs servin.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"github.com/cloudos-io/cloudos/api"
)

const usage = `Usage: cloudos COMMAND

Commands:
  config     Show a machine's configuration, or give it another
  debug      Open a shell on a machine, in an emergency
  image      Build images of the operating system, sign them, and look into them
  status     Show a machine's slots, versions, and what became of the last upgrade
  upgrade    Upgrade a machine to a release; it goes back by itself if that does not come up
  rollback   Have a machine start the system in its other slot
  logs       Show a machine's logs: of its first process, kernel or engine
  reboot     Start a machine again
  recovery-key  Fetch the recovery key of a machine's encrypted data, once
  version    Print the version
`

func main() {
	code, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "cloudos:", err)
	}
	os.Exit(code)
}

func run(args []string) (int, error) {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return 2, nil
	}
	switch args[0] {
	case "debug":
		return debug(args[1:])
	case "image":
		return beside("cloudos-image", args[1:])
	case "status":
		return onMachine(statusCommand, args[1:])
	case "upgrade":
		return onMachine(upgradeCommand, args[1:])
	case "rollback":
		return onMachine(rollbackCommand, args[1:])
	case "config":
		return onMachine(configCommand, args[1:])
	case "logs":
		return onMachine(logsCommand, args[1:])
	case "recovery-key":
		return onMachine(recoveryCommand, args[1:])
	case "reboot":
		return onMachine(rebootCommand, args[1:])
	case "version", "--version":
		fmt.Println("cloudos", api.Version)
		return 0, nil
	case "help", "--help", "-h":
		fmt.Print(usage)
		return 0, nil
	}
	return 2, fmt.Errorf("there is no command %q\n\n%s", args[0], usage)
}

// beside runs a program from this one's folder, or else from the PATH.
func beside(name string, args []string) (int, error) {
	if runtime.GOOS == "windows" {
		name += ".exe"
	}
	path := ""
	if exe, err := os.Executable(); err == nil {
		if p := filepath.Join(filepath.Dir(exe), name); exists(p) {
			path = p
		}
	}
	if path == "" {
		var err error
		if path, err = exec.LookPath(name); err != nil {
			return 1, fmt.Errorf("cannot find the program %s: it is installed beside cloudos", name)
		}
	}
	cmd := exec.Command(path, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var ee *exec.ExitError
	if errors.As(err, &ee) && ee.ExitCode() > 0 {
		return ee.ExitCode(), nil // it has said why
	}
	if err != nil {
		return 1, err
	}
	return 0, nil
}

func exists(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.Mode().IsRegular()
}
