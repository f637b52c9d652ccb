package osimage

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api/debugshell"
	"github.com/cloudos-io/cloudos/internal/osimage"
)

// shells asks the machine about its debug shell.
func (m *machine) shells() (s debugshell.Status) {
	m.t.Helper()
	if err := json.Unmarshal([]byte(m.must("system", "debug-shell", "status", "--json")), &s); err != nil {
		m.t.Fatal(err)
	}
	return s
}

// shellsUntil waits until ok says yes.
func (m *machine) shellsUntil(what string, ok func(debugshell.Status) bool) {
	m.t.Helper()
	var s debugshell.Status
	for range 100 {
		if s = m.shells(); ok(s) {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
	m.t.Fatalf("%s: %+v", what, s)
}

func none(s debugshell.Status) bool { return len(s.Sessions) == 0 }

// TestDebugShell opens shells on a machine: not before that is switched on, not after; each
// is in the audit log and on the console.
func TestDebugShell(t *testing.T) {
	long(t)
	m := vm(t, vmImage(t), disk(t, 2<<30), "")
	if out, err := m.servin("debug", "-T", "@host", "id"); err == nil || !strings.Contains(out, "debug shell of this machine is off") {
		t.Fatalf("a shell that was not switched on: %q, %v", out, err)
	}
	if out, err := m.servin("system", "debug-shell", "enable"); err == nil || !strings.Contains(out, "reason") {
		t.Fatalf("without a reason: %q, %v", out, err)
	}
	m.must("system", "debug-shell", "enable", "--for", "30m", "--reason", "see whether it works")
	if s := m.shells(); !s.On || s.Reason != "see whether it works" || !strings.HasPrefix(s.By, "uid 0") {
		t.Fatalf("%+v", s)
	}
	// The machine's processes, files, kernel log and network.
	out := m.must("debug", "-T", "@host", "sh", "-c",
		"cat /proc/1/comm; ls /target/system/bin; cat /target/etc/os-release; dmesg >/dev/null && echo dmesg; ip -o link show eth0; hostname; grep -qx servind /proc/[0-9]*/comm && echo engine; touch /target/run/was-here && echo wrote")
	for _, want := range []string{"init", "servind", "NAME=CloudOS", "dmesg", "eth0", "cloudos", "engine", "wrote"} {
		if !strings.Contains(out, want) {
			t.Fatalf("the shell says %q, without %q", out, want)
		}
	}
	m.shellsUntil("the session is not closed", none)
	m.await("OPENED by uid 0", 10*time.Second)
	m.await("CLOSED after", 10*time.Second)

	// One that goes on is ended with the permission.
	m.must("run", "-d", "--name", "bystander", "servin/hello", "serve")
	done := make(chan string, 1)
	go func() {
		out, err := m.servin("debug", "-T", "@host", "sleep", "1000")
		if err == nil {
			out += " (it succeeded)"
		}
		done <- out
	}()
	m.shellsUntil("no session", func(s debugshell.Status) bool { return len(s.Sessions) == 1 })
	m.must("system", "debug-shell", "disable")
	select {
	case out := <-done:
		if strings.Contains(out, "succeeded") {
			t.Fatalf("the shell ended with %q", out)
		}
	case <-time.After(time.Minute):
		t.Fatal("the shell goes on")
	}
	m.shellsUntil("the session is not closed", none)
	m.await("switched off, by uid 0", 10*time.Second)
	if out, err := m.servin("debug", "-T", "@host", "id"); err == nil {
		t.Fatalf("a shell after it was switched off: %q", out)
	}
	if out := m.must("ps", "--format", "{{.Names}}"); strings.TrimSpace(out) != "bystander" {
		t.Fatalf("the containers are %q", out)
	}

	// A short time ends by itself.
	m.must("system", "debug-shell", "enable", "--for", "3s", "--reason", "briefly")
	m.await("switched off, its time is over", time.Minute)

	var opened, refused, closed, on, off int
	for line := range strings.Lines(m.must("system", "audit", "--json")) {
		var r struct {
			Event, Method, Object, Error string
			Attrs                        map[string]string
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		begin := r.Event == "begin"
		switch r.Method {
		case "POST /servin/debug-shell/run":
			if begin {
				opened++
			} else if strings.Contains(r.Error, "debug shell of this machine is off") {
				refused++
			}
		case "DELETE /servin/debug-shell/{id}":
			if begin && len(r.Object) > 12 {
				closed++
			}
		case "DELETE /servin/debug-shell":
			if begin {
				off++
			}
		case "POST /servin/debug-shell":
			if r.Attrs["reason"] != "" {
				on++
			}
		}
	}
	if opened != 4 || refused != 2 || closed != 2 || on != 2 || off != 1 {
		t.Fatalf("the audit log has opened %d, refused %d, closed %d, on %d, off %d:\n%s", opened, refused, closed, on, off, m.must("system", "audit", "--json"))
	}
	m.off()
}

// TestDebugShellByConfiguration switches it on by the document that the image carries.
func TestDebugShellByConfiguration(t *testing.T) {
	long(t)
	image := build(t, "vm", func(o *osimage.Options) {
		o.Config = []byte("version: 1\ndebugShell: {on: true, for: 2h, reason: lab machine}\n")
	})
	m := vm(t, image, "", "")
	if out := m.must("debug", "-T", "@host", "cat", "/target/etc/cloudos/config.yaml"); !strings.Contains(out, "lab machine") {
		t.Fatalf("the shell says %q", out)
	}
	if s := m.shells(); !s.On || s.By != "the configuration" || s.Reason != "lab machine" || s.Until.Sub(s.Since) > 2*time.Hour {
		t.Fatalf("%+v", s)
	}
	m.await("debug    ON until", 10*time.Second)
	m.off()
}
