package script

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// sharedSocket is an engine that all scripts use, one after the other
// (-parallel 1), instead of one of their own: the one in a virtual machine.
var sharedSocket = os.Getenv("SERVIN_TEST_SOCKET")

// sharedHost is how that engine reaches this host's loopback, where the registries are; it takes plain HTTP
// from every one. sharedCDI is where it looks for specs of devices.
var sharedHost, sharedCDI = os.Getenv("SERVIN_TEST_HOST"), os.Getenv("SERVIN_TEST_CDI")

// setupShared empties the engine for a script.
func setupShared(t *testing.T, env *testscript.Env, bin string) error {
	d := &daemon{bin: bin, dir: env.WorkDir, shared: sharedSocket}
	clean := exec.Command("sh", "-c", `set -e
ids=$(servin ps -aq); [ -z "$ids" ] || servin rm -f $ids >/dev/null
servin system prune -a -f --volumes >/dev/null
ids=$(servin volumes ls -q); [ -z "$ids" ] || servin volumes rm -f $ids >/dev/null
ids=$(servin images ls -q); [ -z "$ids" ] || servin rmi -f $ids >/dev/null || true
for s in $(servin secrets ls -q); do servin secrets rm $s >/dev/null; done
for s in $(servin configs ls -q); do servin configs rm $s >/dev/null; done`)
	clean.Env = append(os.Environ(), "SERVIN_HOST=unix://"+sharedSocket, "PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH"))
	if out, err := clean.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot empty the engine: %w: %s", err, out)
	}
	if err := importBusybox(d); err != nil {
		return err
	}
	if err := os.RemoveAll(sharedCDI); err != nil {
		return err
	}
	env.Values[daemonKey{}] = d
	at := func(address string) string {
		_, port, _ := net.SplitHostPort(address)
		return net.JoinHostPort(sharedHost, port)
	}
	open, locked := registries(env)
	env.Setenv("REGISTRY", at(open))
	env.Setenv("LOCKED", at(locked))
	env.Setenv("CDI", sharedCDI)
	env.Setenv("RUNTIME", otherRuntime())
	env.Setenv("HOME", env.WorkDir)
	env.Setenv("TZ", "UTC")
	env.Setenv("SERVIN_HOST", "unix://"+sharedSocket)
	env.Setenv("PATH", env.WorkDir+"/bin"+string(os.PathListSeparator)+bin+string(os.PathListSeparator)+env.Getenv("PATH"))
	return nil
}

// engineProcess writes the engine's process id in its machine: the servind that the first process looks after.
const engineProcess = `for p in /proc/[0-9]*; do
	read -r pid name state parent rest < $p/stat || continue
	[ "$name $parent" = "(servind) 1" ] && break
	pid=
done 2>/dev/null
[ -n "$pid" ] || exit 1
`

// command does something to an engine that somebody else looks after: a container that sees the
// machine's processes ends it, and it is back when another one answers.
func (d *daemon) command(ts *testscript.TestScript, what string) {
	inside := func(script string) (string, error) {
		cmd := exec.Command(filepath.Join(d.bin, "servin"), "--host", "unix://"+d.shared, "run", "--rm", "--pid", "host", "--privileged", "bb", "sh", "-c", engineProcess+script)
		var errs strings.Builder
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, errs.String())
		}
		return strings.TrimSpace(string(out)), err
	}
	var err error
	switch what {
	case "kill":
		d.killed, err = inside("echo $pid")
		ts.Check(err)
		// Its own exit code is gone with that engine, which would have removed it: start tells whether it did it.
		_, _ = inside("kill -9 $pid")
	case "start":
		pid, err := inside("echo $pid")
		ts.Check(err)
		if pid == d.killed {
			ts.Fatalf("the engine has the process id %s as before it was killed", pid)
		}
	default:
		ts.Fatalf("engine kill or start")
	}
}
