package apparmor

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// files lays out what sysfs and securityfs would show.
func files(t *testing.T, enabled string) (Config, string) {
	t.Helper()
	dir := t.TempDir()
	aa := filepath.Join(dir, "security/apparmor")
	for _, d := range []string{aa + "/policy/profiles", dir + "/module/parameters"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for p, s := range map[string]string{aa + "/.replace": "", aa + "/.remove": "", dir + "/module/parameters/enabled": enabled} {
		if err := os.WriteFile(p, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return Config{Module: dir + "/module", Security: dir + "/security", Parser: "-"}, aa
}

func TestSupported(t *testing.T) {
	on, _ := files(t, "Y\n")
	off, _ := files(t, "N\n")
	missing := on
	missing.Module = "/nonexistent"
	for name, c := range map[string]struct {
		cfg  Config
		want bool
	}{"on": {on, true}, "off": {off, false}, "missing": {missing, false}} {
		ok, reason := New(c.cfg).Supported()
		if ok != c.want || ok != (reason == "") {
			t.Errorf("%s: %v %q", name, ok, reason)
		}
	}
}

func TestEnsureLoadsOnceAndAgainWhenUnloaded(t *testing.T) {
	cfg, aa := files(t, "Y")
	l := New(cfg)
	written := func() int {
		t.Helper()
		b, err := os.ReadFile(aa + "/.replace")
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > 0 && !bytes.Equal(b, policy) {
			t.Fatal("what was written is not the policy")
		}
		if err := os.Truncate(aa+"/.replace", 0); err != nil {
			t.Fatal(err)
		}
		return len(b)
	}
	ensure := func() {
		t.Helper()
		if err := l.Ensure(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	loaded := aa + "/policy/profiles/" + DefaultProfile + ".12"
	if err := os.Mkdir(loaded, 0o755); err != nil {
		t.Fatal(err)
	}
	if ensure(); written() == 0 {
		t.Fatal("a profile of unknown origin was kept")
	}
	if ensure(); written() != 0 {
		t.Fatal("loaded twice")
	}
	if err := os.Remove(loaded); err != nil {
		t.Fatal(err)
	}
	if ensure(); written() == 0 {
		t.Fatal("not loaded again after it was unloaded")
	}
	if err := os.Remove(aa + "/.replace"); err != nil {
		t.Fatal(err)
	}
	if err := l.Ensure(t.Context()); !fault.Is(err, fault.Unsupported) {
		t.Fatalf("got %v", err)
	}
	if err := l.Unload(); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(aa + "/.remove"); string(b) != DefaultProfile {
		t.Fatalf("removed %q", b)
	}
}

func TestPolicyIsCompiledFromTheText(t *testing.T) {
	if !bytes.HasPrefix(policy, []byte("\x04\x08\x00version\x00")) || !bytes.Contains(policy, []byte(DefaultProfile)) {
		t.Fatal("servin-default.policy is no compiled policy of the profile")
	}
	if _, err := exec.LookPath("apparmor_parser"); err != nil {
		t.Skip("SKIP: no apparmor_parser here, cannot compile the text again")
	}
	if _, err := os.Stat("/etc/apparmor.d/abi/3.0"); err != nil {
		t.Skip("SKIP: no features of the 3.0 ABI here, cannot compile the text again")
	}
	v, _ := exec.Command("apparmor_parser", "--version").Output()
	if !bytes.Contains(v, []byte("version 3.")) {
		t.Skipf("SKIP: another apparmor_parser gives other bytes: %.60s", v)
	}
	out := filepath.Join(t.TempDir(), "policy")
	if b, err := exec.Command("./precompile.sh", out).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, policy) {
		t.Fatal("servin-default.policy is out of date: run precompile.sh")
	}
}

// The kernel of this host, if it has AppArmor, takes the policy.
func TestKernelTakesThePolicy(t *testing.T) {
	l := New(Config{Parser: "-"})
	if ok, reason := l.Supported(); !ok {
		t.Skip("SKIP: " + reason)
	}
	if err := l.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
}
