package osinit

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/cloudos-io/cloudos/internal/osinit/luks"
	"github.com/cloudos-io/cloudos/internal/osinit/seal"
)

// loosen has the TPM give out the key to any system of the same Secure Boot keys,
// beside the one that it is sealed to: another system is about to start, or the same one by another way of
// the boot loader's, and what it will be measured as cannot be told. A start that is opened so
// seals the key to itself (unlock), and when that is one like those that will follow, tighten ends it.
func (m *machine) loosen(ctx context.Context) error {
	m.mu.Lock()
	secret, slot, dev := m.dataSecret, m.dataSlot, m.data
	m.mu.Unlock()
	if secret == nil {
		return nil
	}
	fail := func(err error) error {
		return fmt.Errorf("cannot have the encrypted data open for another system: %w", err)
	}
	r, err := m.ask(ctx, seal.Request{Op: seal.Seal, PCRs: []int{7}, Secret: secret})
	if err != nil {
		return fail(err)
	}
	h, err := dev.Header()
	if err != nil {
		return fail(err)
	}
	defer h.Close()
	if err := h.SetToken(tokenLoose, slot, r.Sealed); err != nil {
		return fail(err)
	}
	if err := h.Write(h.Disk); err != nil {
		return fail(err)
	}
	m.log.Printf("the next start may be of another system: until then the key of the data is sealed to Secure Boot's keys alone")
	return nil
}

// tighten ends what loosen and announce began: the key is sealed with a new secret to what the machine started from, and the slot of
// the old one is gone, so that who kept what loosen sealed has nothing.
func (m *machine) tighten(ctx context.Context) error {
	m.mu.Lock()
	secret, slot, dev := m.dataSecret, m.dataSlot, m.data
	m.mu.Unlock()
	if secret == nil {
		return nil
	}
	h, err := dev.Header()
	if err != nil {
		return err
	}
	defer h.Close()
	if len(h.Tokens(tokenLoose))+len(h.Tokens(tokenNext)) == 0 {
		return nil
	}
	fail := func(err error) error {
		return fmt.Errorf("cannot seal the key of the data to this system alone again: %w", err)
	}
	var s seal.Sealed
	if err := json.Unmarshal(h.Tokens(tokenTPM)[slot], &s); err != nil {
		return fail(err)
	}
	key, _, err := h.Open(h.Disk, []byte(hex.EncodeToString(secret)))
	if err != nil {
		return fail(err)
	}
	defer clear(key)
	fresh := make([]byte, 32)
	rand.Read(fresh)
	// The registers are not any more what they were at the start (see isOpen).
	r, err := m.ask(ctx, seal.Request{Op: seal.Seal, PCRs: s.PCRs, Values: s.Values, Secret: fresh})
	if err != nil {
		return fail(err)
	}
	n, err := h.Add(h.Disk, key, []byte(hex.EncodeToString(fresh)), luks.Random)
	if err == nil {
		err = h.SetToken(tokenTPM, n, r.Sealed)
	}
	if err != nil {
		return fail(err)
	}
	h.DropTokens(tokenLoose)
	h.DropTokens(tokenNext)
	if err := h.Remove(h.Disk, slot); err != nil { // this writes all of it at once
		return fail(err)
	}
	m.keepSecret(fresh, n)
	m.log.Printf("the key of the data is sealed to this system alone again")
	return nil
}
