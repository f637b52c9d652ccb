package osimage

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api/system"
	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/osinit/seal"
	"github.com/cloudos-io/cloudos/internal/vmwire"
	"github.com/cloudos-io/cloudos/test/harness"
)

// chipDir is a folder for the state of a TPM, with a short path.
func chipDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// onDisk tells whether a text is anywhere on a disk.
func onDisk(t *testing.T, disk, text string) bool {
	t.Helper()
	err := exec.Command("grep", "-aqF", text, disk).Run()
	if e, ok := err.(*exec.ExitError); ok && e.ExitCode() == 1 {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	return true
}

// sealed expects encrypted data that were opened in a way.
func (m *machine) sealed(by string) vmwire.Status {
	m.t.Helper()
	s := m.settled()
	if s.State != vmwire.StateReady || len(s.Problems) > 0 || !s.Trust.Encrypted || s.Trust.OpenedBy != by {
		m.t.Fatalf("the machine is %+v", s)
	}
	return s
}

// tokens are the types of the tokens of a disk's encrypted data.
func tokens(t *testing.T, disk string) string {
	t.Helper()
	head := region(t, disk, espEnd+2*slotLen+4096, 12<<10)
	var meta struct {
		Tokens map[string]struct {
			Type string `json:"type"`
		} `json:"tokens"`
	}
	if err := json.Unmarshal(head[:bytes.IndexByte(head, 0)], &meta); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, x := range meta.Tokens {
		out = append(out, x.Type)
	}
	return strings.Join(out, " ")
}

// registersClosed looks for the registers' values from within a container: those that the data are sealed to have passed
// when the first one runs, so that nobody in this start is given the key once more.
func (m *machine) registersClosed(disk string) {
	m.t.Helper()
	head := region(m.t, disk, espEnd+2*slotLen+4096, 12<<10)
	var meta struct {
		Tokens map[string]json.RawMessage `json:"tokens"`
	}
	if err := json.Unmarshal(head[:bytes.IndexByte(head, 0)], &meta); err != nil {
		m.t.Fatal(err)
	}
	passed := 0
	for _, raw := range meta.Tokens {
		var s struct {
			Type string `json:"type"`
			seal.Sealed
		}
		if json.Unmarshal(raw, &s) != nil || s.Type != "cloudos-tpm2" {
			continue
		}
		for i, n := range s.PCRs {
			if n == 7 { // stays: the system seals to it while it runs
				continue
			}
			now := m.must("run", "--rm", "servin/hello", "cat", fmt.Sprintf("/sys/class/tpm/tpm0/pcr-%s/%d", seal.Bank, n))
			if b, err := hex.DecodeString(strings.TrimSpace(now)); err != nil || bytes.Equal(b, s.Values[i]) {
				m.t.Errorf("register %d still has the value that the data are sealed to: %q, %v", n, now, err)
			}
			passed++
		}
	}
	if passed == 0 {
		m.t.Error("the data are sealed to no register that closes")
	}
}

// TestInstallEncrypted installs with data that are encrypted and sealed to the TPM, with Secure Boot: nothing of
// the document is readable on the disk, the installed system opens its data by itself, and so
// does the next system after an upgrade, and the first again after going back. Copies of the disk in
// another machine, and a changed system, do not.
func TestInstallEncrypted(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage", "xorriso", "swtpm")
	target, chip, firmware := disk(t, 3<<30), chipDir(t), secure(t, microsoftVars)
	document := volume(t, "hostname: box-of-secrets\ninstall: {then: poweroff}\nencryption: {key: tpm2, recovery: api, passphrase: from-outside-alone}\n")
	m := installer(t, document, drive("target", target), tpm(t, chip), firmware)
	m.await("is installed on", 8*time.Minute)
	m.ended(time.Minute)
	for _, secret := range []string{"box-of-secrets", "from-outside-alone"} {
		if onDisk(t, target, secret) {
			t.Fatalf("%q is readable on the disk", secret)
		}
	}
	if got := tokens(t, target); !strings.Contains(got, "cloudos-installed") || strings.Contains(got, "recovery") {
		t.Fatalf("the tokens are %s", got)
	}
	boot := func() *machine {
		args := append([]string{"-action", "reboot=reset"}, drive("target", target)...)
		args[len(args)-1] += ",bootindex=0"
		m := start(t, 20*time.Minute, append(append(args, tpm(t, chip)...), firmware...)...)
		m.connect()
		return m
	}
	m = boot()
	s := m.sealed("tpm2")
	if s.Hostname != "box-of-secrets" || s.ConfigSource != "disk" || !s.Trust.RecoveryKey || s.Trust.SecureBoot != vmwire.SecureBootOn {
		t.Fatalf("the first start: %+v", s)
	}
	var recovery vmwire.Recovery
	if err := m.ctl("GET", "/v1/encryption/recovery", nil, &recovery); err != nil || len(recovery.Key) < 52 {
		t.Fatalf("the recovery key: %v", err)
	}
	var kept string
	if err := m.ctl("GET", "/v1/config", nil, &kept); err != nil || strings.Contains(kept, "passphrase") || strings.Contains(kept, "install") || !strings.Contains(kept, "tpm2") {
		t.Fatalf("the document is %q, %v", kept, err)
	}
	m.keep()
	m.off()
	if got := tokens(t, target); strings.Contains(got, "installed") || strings.Contains(got, "change") || !strings.Contains(got, "recovery") {
		t.Fatalf("the tokens are %s", got)
	}

	m = boot()
	if s := m.sealed("tpm2"); s.Trust.RecoveryKey {
		t.Fatalf("the second start: %+v", s)
	}
	m.upgradeSealed(releaseOf(t, "1.1.0", func(o *osimage.Options) { o.Platform, o.Sign = "metal", []ed25519.PrivateKey{isoOnce.key} }))
	m.off()
	m.neverLoose()
	if got := tokens(t, target); strings.Contains(got, "change") || strings.Contains(got, "next") {
		t.Fatalf("the tokens are %s", got)
	}
	// Another chip has nothing to open it with.
	m = start(t, 8*time.Minute, append(append(append([]string{}, drive("target", target)...), tpm(t, chipDir(t))...), firmware...)...)
	m.connect()
	if s := m.settled(); s.State != vmwire.StateSafe || s.Trust.OpenedBy != "" {
		t.Fatalf("with another chip: %+v", s)
	}
	m.cut()
	m = boot()
	m.sealed("tpm2")
	m.off()
}

// upgradeSealed upgrades a machine with encrypted data, which has a volume with a file, starts the new system once
// more, and goes back: the data open by themselves all the time.
func (m *machine) upgradeSealed(next string) {
	m.t.Helper()
	const tight = "is sealed to this system alone again"
	told := strings.Count(m.said(), tight)
	before := m.os("up", func(s system.Status) bool { return s.State == "ready" && s.Next != "" })
	other := map[string]string{"a": "b", "b": "a"}[before.Next]
	file := func() {
		m.t.Helper()
		m.sealed("tpm2")
		if out := m.must("run", "--rm", "-v", "kept:/v", "servin/hello", "cat", "/v/f"); !strings.Contains(out, "x") {
			m.t.Fatalf("what was kept is %q", out)
		}
	}
	if out, err := m.cloudos("upgrade", "--wait", "0", next); err != nil {
		m.t.Fatal(out)
	}
	m.again()
	s := m.os("upgraded", func(s system.Status) bool { return s.Last != nil && s.Last.Outcome == system.Succeeded })
	if s.Version == before.Version || s.Next != other {
		m.t.Fatalf("the machine is %+v", s)
	}
	file()
	if out, err := m.cloudos("reboot"); err != nil {
		m.t.Fatal(out)
	}
	m.again()
	file()
	if out, err := m.cloudos("rollback", "--wait", "0"); err != nil {
		m.t.Fatal(out)
	}
	m.again()
	s = m.os("back", func(s system.Status) bool { return s.Last.Kind == "rollback" && s.Last.Outcome == system.Succeeded })
	if s.Version != before.Version || s.Next != before.Next {
		m.t.Fatalf("the machine is %+v", s)
	}
	file()
	if out, err := m.cloudos("reboot"); err != nil {
		m.t.Fatal(out)
	}
	m.again()
	file()
	m.os("at rest", func(s system.Status) bool { return s.State == "ready" })
	// After each of the two changes: by the start that keeps the system in the owner's mode, by the one after it in Debian's.
	harness.Eventually(m.t, tight, time.Minute, func() bool { return strings.Count(m.said(), tight) == told+2 })
}

// neverLoose expects that an upgrade and going back were told beforehand: at no time did Secure Boot's keys alone open the data.
func (m *machine) neverLoose() {
	m.t.Helper()
	if said := m.said(); strings.Count(said, "is sealed to the starts that are to come, too") != 2 || strings.Contains(said, "cannot tell what the next starts") {
		m.t.Error("it was not told beforehand what the next starts will be measured as")
	}
}

// TestInstallPassphrase installs on a machine without a TPM: the passphrase opens the data at each
// start, from outside of the disk, and without it they stay closed.
func TestInstallPassphrase(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage", "xorriso")
	target := disk(t, 3<<30)
	refused := installer(t, volume(t, "install: {then: poweroff}\nencryption: {key: tpm2}\n"), drive("target", target))
	refused.connect()
	if s := refused.settled(); s.State != vmwire.StateSafe || !strings.Contains(strings.Join(s.Problems, ""), "no TPM") {
		t.Fatalf("without a TPM: %+v", s)
	}
	refused.cut()
	if b := make([]byte, 4096); !readsAt(t, target, b, 0) || len(bytes.Trim(b, "\x00")) > 0 {
		t.Fatal("the disk was written to")
	}
	m := installer(t, volume(t, "hostname: box-of-secrets\ninstall: {then: poweroff}\nencryption: {key: passphrase, passphrase: from-outside-alone}\n"), drive("target", target))
	m.await("is installed on", 8*time.Minute)
	m.ended(time.Minute)
	if onDisk(t, target, "box-of-secrets") || onDisk(t, target, "from-outside-alone") {
		t.Fatal("the document is readable on the disk")
	}
	key := volume(t, "encryption: {key: passphrase, passphrase: from-outside-alone}\n")
	for range 2 {
		m = start(t, 8*time.Minute, append(drive("target", target), key...)...)
		m.connect()
		if s := m.sealed("passphrase"); s.Hostname != "box-of-secrets" || s.ConfigSource != "disk" {
			t.Fatalf("the machine is %+v", s)
		}
		m.off()
	}
	m = start(t, 8*time.Minute, drive("target", target)...)
	m.connect()
	if s := m.settled(); s.State != vmwire.StateSafe || s.Trust.OpenedBy != "" {
		t.Fatalf("without the passphrase: %+v", s)
	}
	m.cut()
}

// TestUpgradeEncrypted upgrades a machine without Secure Boot whose image has the configuration, and goes back.
func TestUpgradeEncrypted(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage", "swtpm")
	key, chip := signer(t), chipDir(t)
	of := func(o *osimage.Options) {
		o.Sign, o.Config = []ed25519.PrivateKey{key}, []byte("version: 1\nencryption: {key: tpm2, recovery: none}\n")
	}
	disk := filepath.Join(build(t, "disk", func(o *osimage.Options) { of(o); o.DiskFormat, o.Version = "raw", "1.0.0" }), "disk.raw")
	next := releaseOf(t, "1.1.0", of)
	args := append([]string{"-action", "reboot=reset", "-drive", "file=" + disk + ",format=raw,if=none,id=d,discard=unmap", "-device", "virtio-blk-pci,drive=d,bootindex=0"}, tpm(t, chip)...)
	m := start(t, 25*time.Minute, append(args, secure(t, emptyVars)...)...)
	m.connect()
	if s := m.sealed("tpm2"); s.Trust.SecureBoot != vmwire.SecureBootOff || s.Trust.RecoveryKey {
		t.Fatalf("trust is %+v", s.Trust)
	}
	m.keep()
	m.upgradeSealed(next)
	m.off()
	if !strings.Contains(m.said(), "cannot tell what the next starts will be measured as") {
		t.Error("without Secure Boot there is a log of the start now: expect what is told from it")
	}
	if got := tokens(t, disk); got != "cloudos-tpm2" {
		t.Fatalf("the tokens are %s", got)
	}
}

// TestBrokenUpgradeEncrypted upgrades a machine with encrypted data and Secure Boot to a system whose engine does not run, and
// then to one that does: the way back, and the one on from there, were told beforehand, and the data open by themselves.
func TestBrokenUpgradeEncrypted(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage", "swtpm")
	key := signer(t)
	of := func(o *osimage.Options) {
		o.Sign, o.Config = []ed25519.PrivateKey{key}, []byte("version: 1\nencryption: {key: tpm2, recovery: none}\n")
	}
	disk := filepath.Join(build(t, "disk", func(o *osimage.Options) { of(o); o.DiskFormat, o.Version = "raw", "1.0.0" }), "disk.raw")
	dead := releaseOf(t, "1.1.0", func(o *osimage.Options) { of(o); o.Programs = broken(t) })
	next := releaseOf(t, "1.2.0", of)
	args := append([]string{"-action", "reboot=reset", "-drive", "file=" + disk + ",format=raw,if=none,id=d,discard=unmap", "-device", "virtio-blk-pci,drive=d,bootindex=0"}, tpm(t, chipDir(t))...)
	m := start(t, 25*time.Minute, append(args, secure(t, microsoftVars)...)...)
	m.connect()
	m.sealed("tpm2")
	m.at("1.0.0", "a")
	m.keep()
	if out, err := m.cloudos("upgrade", "--wait", "0", dead); err != nil {
		t.Fatal(out)
	}
	m.went()
	m.await("slot a runs instead (the engine", 8*time.Minute)
	m.restarts = strings.Count(m.said(), "the machine is down")
	m.connect()
	if s := m.settled(); s.State != vmwire.StateReady || s.Trust.OpenedBy != "tpm2" {
		t.Fatalf("the machine is %+v", s)
	}
	if s := m.os("back", func(s system.Status) bool { return s.Last != nil && s.Last.Outcome == system.RolledBack }); s.Version != "1.0.0" || !s.Slots[1].Failed {
		t.Fatalf("the machine is %+v", s)
	}
	if out, err := m.cloudos("upgrade", "--wait", "0", next); err != nil {
		t.Fatal(out)
	}
	m.again()
	m.sealed("tpm2")
	m.at("1.2.0", "b")
	if out := m.must("run", "--rm", "-v", "kept:/v", "servin/hello", "cat", "/v/f"); !strings.Contains(out, "x") {
		t.Fatalf("what was kept is %q", out)
	}
	m.off()
	if said := m.said(); strings.Contains(said, "cannot tell what the next starts") || strings.Count(said, "is sealed to the starts that are to come, too") != 3 {
		t.Error("it was not told beforehand what the next starts will be measured as")
	}
}
