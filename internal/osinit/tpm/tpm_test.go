package tpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/cloudos-io/cloudos/internal/osinit/seal"
)

// chip starts an emulated TPM.
func chip(t *testing.T) transport.TPM {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Skip("SKIP: swtpm is not installed")
	}
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	sock := filepath.Join(dir, "s")
	cmd := exec.CommandContext(ctx, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir, "--server", "type=unixio,path="+sock,
		"--ctrl", "type=unixio,path="+filepath.Join(dir, "c"), "--flags", "not-need-init,startup-clear")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		cmd.Wait()
		os.RemoveAll(dir)
	})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := linuxudstpm.Open(sock)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			return c
		}
		if time.Now().After(end) {
			t.Fatalf("swtpm: %v: %s", err, out.String())
		}
	}
}

func sum(s string) []byte {
	b := sha256.Sum256([]byte(s))
	return b[:]
}

// TestSeal opens what was sealed, until a register changes.
func TestSeal(t *testing.T) {
	c := chip(t)
	secret := bytes.Repeat([]byte{7}, 32)
	seals := map[string]*seal.Sealed{}
	for name, pcrs := range map[string][]int{"both": {7, 9}, "other": {7}} {
		a, err := Answer(c, seal.Request{Op: seal.Seal, PCRs: pcrs, Secret: secret})
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(a.Sealed.Private, secret) || bytes.Contains(a.Sealed.Public, secret) || len(a.Sealed.Values) != len(pcrs) {
			t.Fatal("what is sealed is readable, or has no values")
		}
		seals[name] = a.Sealed
	}
	open := func(s *seal.Sealed) ([]byte, error) {
		a, err := Answer(c, seal.Request{Op: seal.Unseal, Sealed: s})
		if err != nil {
			return nil, err
		}
		return a.Secret, nil
	}
	for range 5 { // sessions and keys are not left in the chip: it has room for three
		for name, s := range seals {
			if b, err := open(s); err != nil || !bytes.Equal(b, secret) {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	if _, err := Answer(c, seal.Request{Op: seal.Cap, PCRs: []int{9}}); err != nil {
		t.Fatal(err)
	}
	if _, err := open(seals["both"]); err == nil {
		t.Fatal("it was given out after the register changed")
	}
	if b, err := open(seals["other"]); err != nil || !bytes.Equal(b, secret) {
		t.Fatalf("a register that it is not sealed to: %v", err)
	}
	// Sealed to what a register was before, or will be, it is given out then alone.
	old := seals["both"]
	a, err := Answer(c, seal.Request{Op: seal.Seal, PCRs: old.PCRs, Values: old.Values, Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(a.Sealed); err == nil {
		t.Fatal("it was given out while the register was another")
	}
	capped := sha256.Sum256(append(bytes.Clone(old.Values[1]), sum(capText)...))
	a, err = Answer(c, seal.Request{Op: seal.Seal, PCRs: old.PCRs, Values: [][]byte{old.Values[0], capped[:]}, Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := open(a.Sealed); err != nil || !bytes.Equal(b, secret) {
		t.Fatalf("sealed to values that the registers have: %v", err)
	}
	for _, bad := range [][][]byte{{}, {old.Values[0]}, {old.Values[0], {1}}} {
		if _, err := Answer(c, seal.Request{Op: seal.Seal, PCRs: old.PCRs, Values: bad, Secret: secret}); err == nil {
			t.Errorf("sealed to %d values", len(bad))
		}
	}
	damaged := *seals["other"]
	damaged.Private = bytes.Clone(damaged.Private)
	damaged.Private[len(damaged.Private)-1] ^= 1
	if _, err := open(&damaged); err == nil {
		t.Fatal("a damaged one was opened")
	}
	// Another chip has another key.
	if _, err := Answer(chip(t), seal.Request{Op: seal.Unseal, Sealed: seals["other"]}); err == nil {
		t.Fatal("another chip opened it")
	}
	for _, bad := range []seal.Request{{Op: "x"}, {Op: seal.Unseal}, {Op: seal.Seal, Secret: secret}, {Op: seal.Seal, PCRs: []int{99}, Secret: secret}, {Op: seal.Seal, PCRs: []int{7}}} {
		if _, err := Answer(c, bad); err == nil {
			t.Errorf("%+v was answered", bad)
		}
	}
}
