package script

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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

// alone needs an engine that the script may kill: there, another process starts it again.
var alone = regexp.MustCompile(`(?m)^engine `)

// setupShared empties the engine for a script.
func setupShared(t *testing.T, env *testscript.Env, bin string) error {
	name := strings.TrimPrefix(filepath.Base(env.WorkDir), "script-")
	src, err := os.ReadFile(filepath.Join("testdata", name+".txtar"))
	if err != nil {
		return err
	}
	if m := alone.Find(src); m != nil {
		env.T().Skip(fmt.Sprintf("SKIP: it uses %q, which the engine in a machine does not have", strings.TrimSpace(string(m))))
	}
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
	env.Setenv("HOME", env.WorkDir)
	env.Setenv("TZ", "UTC")
	env.Setenv("SERVIN_HOST", "unix://"+sharedSocket)
	env.Setenv("PATH", env.WorkDir+"/bin"+string(os.PathListSeparator)+bin+string(os.PathListSeparator)+env.Getenv("PATH"))
	return nil
}
