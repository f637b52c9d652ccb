package osinit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/osimage/pe"
	"github.com/cloudos-io/cloudos/internal/osinit/measure"
	"github.com/cloudos-io/cloudos/internal/osinit/seal"
	"github.com/cloudos-io/cloudos/internal/osinit/upgrade"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/slots"
)

// startLog is the firmware's log of what it, and the boot loaders, measured.
const startLog = "/sys/kernel/security/tpm0/binary_bios_measurements"

// announced is the token of seals to starts that are about to come.
type announced struct {
	Sealed []seal.Sealed `json:"sealed"`
}

// announce has the TPM give out the key of the data to the starts that follow a change: those of the slot, and those of
// the running one that the boot loader makes where the other does not come up. Where it cannot be told what they
// will be measured as, the key is sealed to Secure Boot's keys alone until the change is over (loosen).
func (c *changes) announce(ctx context.Context, running, slot string) error {
	c.m.mu.Lock()
	sealed := c.m.dataSecret != nil
	c.m.mu.Unlock()
	if !sealed {
		return nil
	}
	if c.owners() {
		return c.m.loosen(ctx) // the keys are the owner's
	}
	next, err := c.nextStarts(running, slot)
	if err == nil {
		err = c.m.sealTo(ctx, next)
	}
	if err == nil {
		c.m.log.Printf("the key of the data is sealed to the starts that are to come, too")
		return nil
	}
	c.m.log.Printf("cannot tell what the next starts will be measured as: %v", err)
	return c.m.loosen(ctx)
}

// sealedNow is what the key of the data is sealed to: the registers at this start.
func (m *machine) sealedNow() (*seal.Sealed, error) {
	m.mu.Lock()
	slot, dev := m.dataSlot, m.data
	m.mu.Unlock()
	h, err := dev.Header()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	s := new(seal.Sealed)
	if err := json.Unmarshal(h.Tokens(tokenTPM)[slot], s); err != nil {
		return nil, fmt.Errorf("cannot read what the key of the data is sealed to: %w", err)
	}
	return s, nil
}

// nextStarts tells the registers at each start that may follow.
func (c *changes) nextStarts(running, slot string) ([]seal.Sealed, error) {
	now, err := c.m.sealedNow()
	if err != nil {
		return nil, err
	}
	if err := measure.Known(now.PCRs); err != nil {
		return nil, err
	}
	log, err := os.ReadFile(startLog)
	if err != nil {
		return nil, err
	}
	esp := ""
	if c.m.esp != (gpt.GUID{}) {
		esp = c.m.esp.String()
	}
	this, other := new(measure.System), new(measure.System)
	kernels := [2]string{}
	err = c.boot.With(false, func(dir string) (err error) {
		if *this, kernels[0], err = systemIn(dir, running); err == nil && slot != "" {
			*other, kernels[1], err = systemIn(dir, slot)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if slot != "" && series(kernels[0]) != series(kernels[1]) {
		// What kernels measure themselves changes between series.
		return nil, fault.New(fault.Unsupported, "the kernel is of another series (%s, and %s runs)", kernels[1], kernels[0])
	}
	start, err := measure.Understand(log, *this, esp, now.PCRs, now.Values)
	if err != nil {
		return nil, err
	}
	type next struct {
		state  slots.State
		system *measure.System
	}
	list := []next{{slots.State{Good: running}, this}}
	if slot != "" {
		for left := slots.Tries; left > 0; left-- {
			list = append(list, next{slots.State{Good: running, Try: slot, Left: left}, other})
		}
		list = append(list, next{slots.State{Good: running, Try: slot}, this}, next{slots.State{Good: slot}, other})
	}
	var out []seal.Sealed
	for _, n := range list {
		values, err := start.Registers(n.state, *n.system, now.PCRs)
		if err != nil {
			return nil, err
		}
		if !sameValues(values, now.Values) {
			out = append(out, seal.Sealed{PCRs: now.PCRs, Values: values})
		}
	}
	return out, nil
}

func sameValues(a, b [][]byte) bool {
	return bytes.Equal(bytes.Join(a, nil), bytes.Join(b, nil))
}

// series of a kernel: 6.1 of 6.1.0-56-cloud-amd64.
func series(kernel string) string {
	f := strings.SplitN(kernel, ".", 3)
	return strings.Join(f[:min(2, len(f))], ".")
}

// systemIn reads what GRUB starts of a slot, and which kernel that is.
func systemIn(dir, slot string) (s measure.System, kernel string, err error) {
	fail := func(err error) (measure.System, string, error) {
		return s, "", fmt.Errorf("cannot tell what slot %s is measured as: %w", slot, err)
	}
	sealed, err := upgrade.Sealed(dir, slot)
	if err == nil && sealed == nil {
		err = fault.New(fault.NotFound, "there is no whole system in it")
	}
	if err != nil {
		return fail(err)
	}
	m, _, err := release.Open(sealed, nil)
	if err != nil {
		return fail(err)
	}
	s.Slot = slot
	folder := filepath.Join(dir, slots.Folder(slot))
	if s.Config, err = os.ReadFile(filepath.Join(folder, "boot.cfg")); err != nil {
		return fail(err)
	}
	b, err := os.ReadFile(filepath.Join(folder, "kernel"))
	if err != nil {
		return fail(err)
	}
	s.Kernel = sha256.Sum256(b)
	if s.Image, err = pe.Digest(b); err != nil {
		return fail(err)
	}
	f, err := os.Open(filepath.Join(folder, "initrd"))
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return fail(err)
	}
	h.Sum(s.Initrd[:0])
	return s, m.Kernel, nil
}

// sealTo has the TPM give out the key with registers as they will be, beside as they are.
func (m *machine) sealTo(ctx context.Context, next []seal.Sealed) error {
	m.mu.Lock()
	secret, slot, dev := m.dataSecret, m.dataSlot, m.data
	m.mu.Unlock()
	for i, s := range next {
		r, err := m.ask(ctx, seal.Request{Op: seal.Seal, PCRs: s.PCRs, Values: s.Values, Secret: secret})
		if err != nil {
			return err
		}
		next[i] = *r.Sealed
	}
	h, err := dev.Header()
	if err != nil {
		return err
	}
	defer h.Close()
	h.DropTokens(tokenLoose)
	if err := h.SetToken(tokenNext, slot, announced{next}); err != nil {
		return err
	}
	return h.Write(h.Disk)
}
