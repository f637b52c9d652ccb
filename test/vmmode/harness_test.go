// Package vmmode drives VM mode as a user does: the shipped command line and
// servin-vmd on folders of their own, a real image in a real machine under QEMU.
package vmmode

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api"
)

var long = os.Getenv("SERVIN_LONG") != ""

// image builds the image once for all tests.
var image = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("SERVIN_TEST_VM_IMAGE"); dir != "" {
		return dir, nil
	}
	dir, err := os.MkdirTemp("", "vmimage")
	if err != nil {
		return "", err
	}
	out, err := exec.Command(filepath.Join(programs(), "cloudos"), "image", "build", "-q", "--format", "vm", "-o", filepath.Join(dir, "vm")).CombinedOutput()
	if err != nil {
		return dir, fmt.Errorf("%v: %s", err, out)
	}
	return filepath.Join(dir, "vm"), nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if os.Getenv("SERVIN_TEST_VM_IMAGE") == "" {
		if dir, _ := image2(); dir != "" {
			os.RemoveAll(filepath.Dir(dir))
		}
	}
	os.Exit(code)
}

var built bool

// image2 is image, if a test asked for it.
func image2() (string, error) {
	if !built {
		return "", nil
	}
	return image()
}

func programs() string {
	if bin := os.Getenv("SERVIN_BIN"); bin != "" {
		return bin
	}
	bin, _ := filepath.Abs("../../bin")
	return bin
}

// machine is VM mode on folders of its own.
type machine struct {
	t    *testing.T
	root string // sockets and state
	home string // the shared folder
}

func newMachine(t *testing.T, settings ...string) *machine {
	t.Helper()
	for _, tool := range []string{"qemu-system-x86_64", "apt-get"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIP: %s is not installed", tool)
		}
	}
	for _, p := range []string{"servin", "servin-vmd", "cloudos", "cloudos-image"} {
		if _, err := os.Stat(filepath.Join(programs(), p)); err != nil {
			t.Fatalf("no %s in %s: run make build first", p, programs())
		}
	}
	built = true
	if _, err := image(); err != nil {
		t.Fatal(err)
	}
	root, err := os.MkdirTemp("", "vm") // sockets want a short path
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, root: root, home: filepath.Join(root, "home")}
	if err := os.Mkdir(m.home, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, f := range []string{"state/vmd.log", "state/console.log"} {
				b, _ := os.ReadFile(filepath.Join(root, f))
				t.Logf("%s:\n%s", f, b[max(0, len(b)-6000):])
			}
		}
		m.try("vm", "stop", "--force")
		if pid := m.vmd(); pid > 0 {
			syscall.Kill(pid, syscall.SIGTERM)
			for range 100 {
				if m.vmd() == 0 {
					break
				}
				time.Sleep(50 * time.Millisecond)
			}
		}
		os.RemoveAll(root)
	})
	m.must(append([]string{"vm", "config", "--cpus", "2", "--memory", "1g", "--disk", "4g", "--idle-time", "0"}, settings...)...)
	return m
}

func (m *machine) env() []string {
	img, _ := image()
	return append(os.Environ(), "SERVIN_VM_ROOT="+m.root, "SERVIN_VM_IMAGE="+img, "HOME="+m.home, "SERVIN_CONFIG="+filepath.Join(m.root, "config"), "SERVIN_HOST=", "SERVIN_CONTEXT=")
}

// try runs the command line.
func (m *machine) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(programs(), "servin"), args...)
	cmd.Env = m.env()
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("servin %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return out.String(), err
}

func (m *machine) must(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatalf("%v", err)
	}
	return out
}

// want runs the command line until its output holds the text.
func (m *machine) want(text string, args ...string) string {
	m.t.Helper()
	var out string
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if out, err = m.try(args...); err == nil && strings.Contains(out, text) {
			return out
		}
	}
	m.t.Fatalf("servin %s never said %q: %s %v", strings.Join(args, " "), text, out, err)
	return ""
}

func (m *machine) status() api.VMStatus {
	m.t.Helper()
	out, err := m.try("vm", "status", "--json")
	var st api.VMStatus
	if jerr := json.Unmarshal([]byte(out), &st); jerr != nil {
		m.t.Fatalf("vm status: %v: %v: %s", err, jerr, out)
	}
	return st
}

// state waits for a state.
func (m *machine) state(want string, patience time.Duration) api.VMStatus {
	m.t.Helper()
	var st api.VMStatus
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if st = m.status(); st.State == want {
			return st
		}
	}
	m.t.Fatalf("the machine is %s (%s), not %s", st.State, st.Error, want)
	return st
}

// vmd is the process id of its servin-vmd, 0 without one.
func (m *machine) vmd() int {
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		exe, _ := os.ReadFile(p + "/cmdline")
		if !strings.HasSuffix(strings.TrimRight(string(exe), "\x00"), "servin-vmd") {
			continue
		}
		env, _ := os.ReadFile(p + "/environ")
		if bytes.Contains(env, []byte("SERVIN_VM_ROOT="+m.root+"\x00")) {
			pid, _ := strconv.Atoi(filepath.Base(p))
			return pid
		}
	}
	return 0
}

// get fetches a page, again and again until the time is over.
func get(url string, patience time.Duration) (string, error) {
	var err error
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		var resp *http.Response
		c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		if resp, err = c.Get(url); err == nil {
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			return string(b), err
		}
		if time.Now().After(deadline) {
			return "", err
		}
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	// Outside of what the kernel gives to others, and another at each run.
	return strconv.Itoa(20000 + os.Getpid()%9000)
}
