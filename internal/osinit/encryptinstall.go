package osinit

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/osinit/data"
	"github.com/cloudos-io/cloudos/internal/osinit/luks"
	"github.com/cloudos-io/cloudos/internal/osinit/seal"
)

// An installation makes the encrypted data, but it runs from a medium: what the installed system
// will be measured as is not known to it. So it seals the key to Secure Boot's keys alone, and the
// first start of the installed system seals it to itself (settleInstalled). Until then the data are
// the document and nothing else. The recovery key is made at that first start, too, since nobody
// looks at an installation.

// firstStart is what the token says of that start.
type firstStart struct {
	// Recovery is where the recovery key is shown, as in the configuration.
	Recovery string `json:"recovery"`
}

// canInstallEncrypted refuses what could not be encrypted, before anything is written.
func (m *machine) canInstallEncrypted(e config.Encryption) error {
	if e.Key == "" {
		return nil
	}
	if !canEncrypt() {
		return fault.New(fault.Unsupported, "cannot install with encryption: this image has no program for it")
	}
	if e.Key == config.KeyTPM {
		if !hasTPM() {
			return fault.New(fault.Unsupported, "cannot install with encryption: this machine has no TPM 2.0; use encryption.key passphrase, or no encryption")
		}
		if _, err := os.Stat("/sys/firmware/efi"); err != nil {
			return fault.New(fault.Unsupported, "cannot install with encryption: a BIOS does not measure what it starts; start with UEFI, or use encryption.key passphrase")
		}
	}
	return m.cryptModules()
}

// encryptForInstalled makes an empty partition an encrypted one whose key the first start of the
// installed system will have.
func (m *machine) encryptForInstalled(ctx context.Context, dev data.Device, e config.Encryption) (data.Device, error) {
	return dev.Encrypt(func(h *data.Header, key []byte) error {
		if e.Passphrase != "" {
			if _, err := h.Add(h.Disk, key, []byte(e.Passphrase), luks.Chosen); err != nil {
				return err
			}
		}
		if e.Key != config.KeyTPM {
			return nil
		}
		secret := make([]byte, 32)
		rand.Read(secret)
		r, err := m.ask(ctx, seal.Request{Op: seal.Seal, PCRs: []int{7}, Secret: secret})
		if err != nil {
			return err
		}
		if err := measured(r.Sealed); err != nil {
			return err
		}
		n, err := h.Add(h.Disk, key, []byte(hex.EncodeToString(secret)), luks.Random)
		if err != nil {
			return err
		}
		if err := h.SetToken(tokenLoose, n, r.Sealed); err != nil {
			return err
		}
		// Which registers it will be sealed to; not sealed yet.
		if err := h.SetToken(tokenTPM, n, seal.Sealed{PCRs: m.sealedPCRs(e)}); err != nil {
			return err
		}
		return h.SetToken(tokenInstalled, n, firstStart{Recovery: e.Recovery})
	})
}

// settleInstalled ends an installation with encryption: the recovery key is made, and the key is sealed to this
// system with a new secret, so that what the installation sealed opens nothing any more. Cut off before
// its end, the next start does it again.
func (m *machine) settleInstalled(ctx context.Context, h *data.Header, key []byte, pcrs []int) error {
	tokens := h.Tokens(tokenInstalled)
	if len(tokens) == 0 {
		return nil
	}
	var first firstStart
	for _, raw := range tokens {
		if err := json.Unmarshal(raw, &first); err != nil {
			return fmt.Errorf("cannot read what the installation noted with the encrypted data: %w", err)
		}
	}
	for n := range h.Tokens(tokenRecovery) { // of a start that was cut off: nobody has it
		if err := h.Remove(h.Disk, n); err != nil {
			return err
		}
	}
	recovery := ""
	if first.Recovery != config.RecoveryNone {
		var err error
		if recovery, err = addRecovery(h, key); err != nil {
			return fmt.Errorf("cannot make a recovery key: %w", err)
		}
	}
	if err := m.reseal(ctx, h, key, pcrs); err != nil {
		return err
	}
	m.showRecovery(recovery, first.Recovery)
	return nil
}
