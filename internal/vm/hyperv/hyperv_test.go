package hyperv

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vm/vmtest"
)

// host is a simulated Hyper-V: it does what each script asks for, and checks what it is given.
type host struct {
	t  *testing.T
	mu sync.Mutex
	vm map[string]string // states
}

func (h *host) run(_ context.Context, script string, env map[string]string) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for k, v := range env {
		if v != "" && len(v) > 3 && strings.Contains(script, v) {
			h.t.Errorf("the value of %s is in the script", k)
		}
	}
	name := env["SERVIN_NAME"]
	st := h.vm[name]
	answer := func(state string) ([]byte, error) {
		return fmt.Appendf(nil, "\xef\xbb\xbf{\"State\":%q,\"Id\":\"7b1f0a52-0000-4000-8000-000000000000\"}\r\n", state), nil
	}
	switch script {
	case probeScript:
		return []byte(`{"Version":"Microsoft Windows NT 10.0.26100.0","Host":"PC"}`), nil
	case stateScript:
		if st == "" {
			return []byte("{}\r\n"), nil
		}
		return answer(st)
	case startScript:
		if st != "" && st != "Off" {
			return nil, errors.New("the machine runs already")
		}
		for _, k := range []string{"SERVIN_IMAGE", "SERVIN_BOOT", "SERVIN_DATA", "SERVIN_DISK", "SERVIN_CPUS", "SERVIN_MEMORY", "SERVIN_SERVICE"} {
			if env[k] == "" {
				h.t.Errorf("no %s", k)
			}
		}
		h.vm[name] = "Running"
		return answer("Running")
	case pauseScript:
		h.vm[name] = "Paused"
	case resumeScript:
		h.vm[name] = "Running"
	case killScript:
		delete(h.vm, name)
	case growScript:
	default:
		h.t.Errorf("an unknown script: %s", script)
	}
	return []byte("{}"), nil
}

func (h *host) dial(_ context.Context, id string, port uint32) (net.Conn, error) {
	if id == "" || port != Port {
		h.t.Errorf("dialled %q port %d", id, port)
	}
	a, b := net.Pipe()
	b.Close()
	return a, nil
}

func TestDriver(t *testing.T) {
	h := &host{t: t, vm: map[string]string{}}
	d := New(Config{Run: h.run, Dial: h.dial})
	n := 0
	spec := func(t *testing.T) vm.Spec {
		dir := t.TempDir()
		n++
		disk := filepath.Join(dir, "disk.vhdx")
		if err := os.WriteFile(disk, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		return vm.Spec{Name: fmt.Sprintf("t%d", n), CPUs: 2, Memory: 1 << 30, Disk: 1 << 30, Data: filepath.Join(dir, "data.img"), Run: dir, State: dir, Image: vm.Image{Disk: disk}}
	}
	hst, err := d.Probe(t.Context(), vm.Image{}, "")
	if err != nil || !strings.Contains(hst.Version, "Windows") {
		t.Fatalf("%+v %v", hst, err)
	}
	vmtest.Suite{Driver: d, Host: hst, Spec: spec}.Run(t)
	bad := spec(t)
	bad.Image.Disk = ""
	if _, err := d.Start(t.Context(), bad, hst, func(string) {}); err == nil || !strings.Contains(err.Error(), "--format disk") {
		t.Errorf("an image without a disk: %v", err)
	}
}
