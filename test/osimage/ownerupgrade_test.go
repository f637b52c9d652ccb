package osimage

import (
	"bytes"
	"crypto/ed25519"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api/system"
	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/slots"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// owned is a machine with a disk that its owner signed, with encrypted data.
type owned struct {
	t          *testing.T
	disk, next string
	key        ed25519.PrivateKey
	vars       string
	of         func(*osimage.Options)
	args       []string
	firmware   []string
}

// newOwned builds system 1.0.0 on a disk, and 1.1.0 as a release.
func newOwned(t *testing.T) *owned {
	t.Helper()
	long(t)
	needs(t, emptyVars, "swtpm", "xorriso")
	o := &owned{t: t, key: signer(t)}
	var owner *osimage.Owner
	owner, o.vars = ownersKeys(t)
	o.of = func(b *osimage.Options) { b.Owner, b.Sign = owner, []ed25519.PrivateKey{o.key} }
	o.disk = filepath.Join(build(t, "disk", func(b *osimage.Options) { o.of(b); b.DiskFormat, b.Version = "raw", "1.0.0" }), "disk.raw")
	o.next = releaseOf(t, "1.1.0", o.of)
	o.args = append([]string{"-action", "reboot=reset"}, cidata(t, map[string]string{"user-data": "version: 1\nencryption: {key: tpm2, recovery: api}\n", "meta-data": ""})...)
	o.firmware = secure(t, o.vars)
	return o
}

func (o *owned) boot(chip string) *machine {
	o.t.Helper()
	// Without bootindex: QEMU's order would be OVMF's, over its own.
	m := start(o.t, 25*time.Minute, append(append(append(drive("d", o.disk), o.args...), tpm(o.t, chip)...), o.firmware...)...)
	m.connect()
	return m
}

// at expects a system to run, and to start next.
func (m *machine) at(version, slot string) system.Status {
	m.t.Helper()
	s := m.os("up", func(s system.Status) bool { return s.State == "ready" && s.Next == slot })
	if s.Version != version {
		m.t.Fatalf("the machine is %+v", s)
	}
	return s
}

// TestUpgradeOwner upgrades a disk that its owner signed, with encrypted data, and goes back: firmware chooses. What
// does not come up, or is no image that the owner signed, is given up.
func TestUpgradeOwner(t *testing.T) {
	o := newOwned(t)
	dead := releaseOf(t, "1.2.0", func(b *osimage.Options) { o.of(b); b.Programs = broken(t) })
	unsigned := resealed(t, dead, func(m *release.Manifest, content map[string][]byte) {
		b := bytes.Clone(content[slots.UnifiedFile])
		b[len(b)/2] ^= 1
		m.Version, content[slots.UnifiedFile] = "1.3.0", b
	}, o.key)
	m := o.boot(chipDir(t))
	if s := m.sealed("tpm2"); s.Trust.Chain != "owner" || s.Trust.SecureBoot != vmwire.SecureBootOn {
		t.Fatalf("trust is %+v", s.Trust)
	}
	if s := m.at("1.0.0", "a"); len(s.Slots) != 2 || s.Slots[0].Version != "1.0.0" || s.Slots[0].SignedBy == "" {
		t.Fatalf("the machine is %+v", s)
	}
	m.keep()
	debian := resealed(t, o.next, func(m *release.Manifest, _ map[string][]byte) { m.Parts[0].Use = release.Boot }, o.key)
	if out, err := m.cloudos("upgrade", debian); err == nil || !strings.Contains(out, "signed by its owner") {
		t.Errorf("a release that the owner did not sign: %v, %s", err, out)
	}
	m.upgradeSealed(o.next)
	for _, c := range []struct{ release, want string }{{dead, "the engine does not stay up"}, {unsigned, "never came up"}} {
		if out, err := m.cloudos("upgrade", "--wait", "0", c.release); err != nil {
			t.Fatal(out)
		}
		m.went()
		said := strings.Count(m.said(), "slot a runs instead")
		for end := time.Now().Add(6 * time.Minute); strings.Count(m.said(), "slot a runs instead") == said; time.Sleep(200 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the machine does not go back from %s", c.want)
			}
		}
		m.restarts = strings.Count(m.said(), "the machine is down")
		m.connect()
		s := m.os("back", func(s system.Status) bool { return s.Last != nil && s.Last.Outcome == system.RolledBack })
		if s.Version != "1.0.0" || s.Next != "a" || !strings.Contains(s.Last.Reason, c.want) || !s.Slots[1].Failed {
			t.Fatalf("the machine is %+v, %+v", s, s.Last)
		}
	}
	m.off()
}

// TestPowerCutOwner cuts the power while an upgrade of such a disk is written, before it starts, and before it is kept: a good
// system starts with its data, and so it does on firmware that lost its entries.
func TestPowerCutOwner(t *testing.T) {
	o, chip := newOwned(t), chipDir(t)
	m := o.boot(chip)
	m.sealed("tpm2")
	m.keep()
	m.at("1.0.0", "a")
	m.off()
	for _, after := range []string{"writing system", "starts next", "engine answers"} {
		m := o.boot(chip)
		m.at("1.0.0", "a")
		seen := strings.Count(m.said(), after)
		done := make(chan struct{})
		go func() { defer close(done); m.cloudos("upgrade", "--wait", "0", o.next) }()
		for end := time.Now().Add(3 * time.Minute); strings.Count(m.said(), after) <= seen && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		}
		m.cut()
		<-done
		m = o.boot(chip)
		if out := m.must("run", "--rm", "-v", "kept:/v", "servin/hello", "cat", "/v/f"); !strings.Contains(out, "x") {
			t.Fatalf("what was kept is %q", out)
		}
		s := m.os("settled", func(s system.Status) bool {
			return s.State == "ready" && (s.Last == nil || s.Last.Outcome != system.Pending)
		})
		t.Logf("after the cut after %q: %s in slot %s, %+v", after, s.Version, s.Next, s.Last)
		if s.Version == "1.1.0" {
			if out, err := m.cloudos("rollback", "--wait", "0"); err != nil {
				t.Fatal(out)
			}
			m.again()
			m.at("1.0.0", "a")
		}
		m.os("at rest", func(s system.Status) bool { return s.Last == nil || s.Last.Outcome != system.Pending })
		m.off()
	}

	m = o.boot(chip)
	if out, err := m.cloudos("upgrade", "--wait", "0", o.next); err != nil {
		t.Fatal(out)
	}
	m.again()
	m.at("1.1.0", "b")
	m.await("is sealed to this system alone again", time.Minute)
	m.off()
	o.firmware = secure(t, o.vars)
	m = o.boot(chip)
	m.at("1.1.0", "b")
	m.sealed("tpm2")
	m.off()
}
