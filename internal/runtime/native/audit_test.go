package native

import (
	"fmt"
	"os"
	osexec "os/exec"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// TestAuditStatus: a process that was brought back may do no more than the spec's.
func TestAuditStatus(t *testing.T) {
	status := func(prm, bnd, amb uint64, nnp, seccomp int) string {
		return fmt.Sprintf("Name:\tx\nCapInh:\t%016x\nCapPrm:\t%016x\nCapEff:\t%016x\nCapBnd:\t%016x\nCapAmb:\t%016x\nNoNewPrivs:\t%d\nSeccomp:\t%d\nSeccomp_filters:\t1\n", 0, prm, prm, bnd, amb, nnp, seccomp)
	}
	s := &start{spec: &specs.Spec{
		Process: &specs.Process{NoNewPrivileges: true, Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN", "CAP_KILL"}}},
		Linux:   &specs.Linux{Seccomp: &specs.LinuxSeccomp{}},
	}}
	const chown, kill, admin = 1 << 0, 1 << 5, 1 << 21
	for name, c := range map[string]struct{ status, want string }{
		"as it is to be": {status(chown, chown|kill, 0, 1, 2), ""},
		"less":           {status(0, 0, 0, 1, 2), ""},
		"permitted":      {status(chown|admin, chown|kill, 0, 1, 2), "CapPrm has 0x200000 more"},
		"bounding":       {status(0, admin, 0, 1, 2), "CapBnd has 0x200000 more"},
		"ambient":        {status(0, 0, admin, 1, 2), "CapAmb has 0x200000 more"},
		"privileges":     {status(0, 0, 0, 0, 2), "may gain privileges"},
		"no filter":      {status(0, 0, 0, 1, 0), "no system call filter"},
		"nothing":        {"Name:\tx\n", "cannot be read"},
		"no number":      {strings.Replace(status(0, 0, 0, 1, 2), "CapBnd:\t0", "CapBnd:\tz", 1), "invalid syntax"},
	} {
		err := s.auditStatus(c.status)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	s.spec = &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}
	if err := s.auditStatus(status(0, 0, 0, 0, 0)); err != nil {
		t.Errorf("a spec without a filter: %v", err)
	}
	if err := s.auditStatus(status(chown, chown, 0, 0, 0)); err == nil {
		t.Error("a spec without capabilities gives some")
	}
}

// TestDescendants: children of children are found, and others are not.
func TestDescendants(t *testing.T) {
	cmd := osexec.Command("sh", "-c", "sleep 100 & sleep 100 & wait")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if pids, err := descendants(cmd.Process.Pid); err == nil {
			for _, p := range pids {
				if q, err := os.FindProcess(p); err == nil {
					_ = q.Kill()
				}
			}
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	for {
		pids, err := descendants(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(pids, os.Getpid()) || slices.Contains(pids, cmd.Process.Pid) {
			t.Fatalf("%v", pids)
		}
		if len(pids) == 2 {
			all, err := descendants(os.Getpid())
			if err != nil || !slices.Contains(all, pids[0]) || !slices.Contains(all, cmd.Process.Pid) {
				t.Errorf("%v, %v", all, err)
			}
			return
		}
	}
}
