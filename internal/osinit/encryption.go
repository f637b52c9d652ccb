package osinit

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base32"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/osinit/data"
	"github.com/cloudos-io/cloudos/internal/osinit/luks"
	"github.com/cloudos-io/cloudos/internal/osinit/process"
	"github.com/cloudos-io/cloudos/internal/osinit/seal"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Tokens of key slots.
const (
	tokenTPM      = "cloudos-tpm2"
	tokenRecovery = "cloudos-recovery"
	// tokenLoose is there while another system is to start (see loosen).
	tokenLoose = "cloudos-tpm2-change"
	// tokenNext is there, too: what the starts that are about to come will be measured as (see announce).
	tokenNext = "cloudos-tpm2-next"
	// tokenInstalled is there between an installation and the first start of what was installed.
	tokenInstalled = "cloudos-installed"
)

// Ways in which data were opened.
const (
	openedByTPM        = "tpm2"
	openedByPassphrase = "passphrase"
	openedByRecovery   = "recovery"
)

// sealedPCRs are the registers that a key is sealed to unless the configuration says
// otherwise. PCR 7 tells whose keys started the machine. Behind Debian's boot
// loaders that is everybody's, so what they started, read and were told is added.
func (m *machine) sealedPCRs(e config.Encryption) []int {
	switch {
	case len(e.PCRs) > 0:
		return slices.Sorted(slices.Values(e.PCRs))
	case m.chain() == chainOwner:
		return []int{7, 11}
	}
	return []int{4, 7, 8, 9}
}

// canEncrypt reports whether the image has what encryption needs.
func canEncrypt() bool {
	_, err := os.Stat(seal.Program)
	return err == nil
}

// openData returns the device to mount: of encrypted data the one that is read
// through encryption, which is made where the configuration asks for it and the disk is empty.
func (m *machine) openData(ctx context.Context, dev data.Device) (data.Device, error) {
	sealed, empty, err := dev.Encrypted()
	switch {
	case err != nil:
		return dev, err
	case sealed:
		return m.unlock(ctx, dev)
	case empty && canEncrypt():
		// The disk has no configuration yet: what is outside says how it is to be.
		doc, err := m.configure(ctx)
		if err != nil {
			return dev, errors.New("the data disk is not prepared before the configuration is right")
		}
		if doc.Encryption.Key != "" {
			return m.encrypt(ctx, dev, doc.Encryption)
		}
	}
	if empty {
		m.renewDisk()
	}
	if m.cmdline["encryption"] == "required" {
		return dev, errors.New("the data are not encrypted, but the command line requires it (cloudos.encryption=required): give an empty disk and a configuration with encryption")
	}
	return dev, nil
}

// checkEncryption compares the data with what the configuration asks for.
func (m *machine) checkEncryption(doc *config.Document) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if doc.Encryption.Key == "" || m.trust.Encrypted || m.dataKind != "disk" {
		return nil
	}
	if !canEncrypt() {
		return errors.New("the configuration asks for encryption: an image of the format vm has none, its disk is the host's to encrypt")
	}
	return errors.New("the configuration asks for encryption, but the data are not encrypted: data that are there are not encrypted afterwards; give an empty disk")
}

func (m *machine) cryptModules() error {
	names := []string{"dm_crypt", "xts", "ecb"}
	for _, n := range []string{"aesni_intel", "aes_ce_blk"} {
		if m.modules.Has(n) {
			// Faster where the processor can; otherwise the kernel's own does it.
			if err := m.modules.Load(n); err != nil {
				m.log.Printf("%v", err)
			}
		}
	}
	return m.modules.LoadAll(names...)
}

// ask runs the program that talks to the TPM.
func (m *machine) ask(ctx context.Context, r seal.Request) (*seal.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	in, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	out, err := m.table.Ask(ctx, process.Program{Path: seal.Program, Dir: "/", NewSession: true}, in)
	if err != nil {
		return nil, err
	}
	a := new(seal.Response)
	if err := json.Unmarshal(out, a); err != nil {
		return nil, fmt.Errorf("cannot read what %s says: %w", seal.Program, err)
	}
	return a, nil
}

// encrypt makes an empty disk an encrypted one.
func (m *machine) encrypt(ctx context.Context, dev data.Device, e config.Encryption) (data.Device, error) {
	if e.Key == config.KeyTPM && !hasTPM() {
		return dev, fault.New(fault.Unsupported, "cannot encrypt the data: this machine has no TPM 2.0; use encryption.key passphrase, or no encryption")
	}
	if err := m.cryptModules(); err != nil {
		return dev, err
	}
	if err := dev.GrowPartition(); err != nil {
		return dev, err
	}
	recovery := ""
	out, err := dev.Encrypt(func(h *data.Header, key []byte) error {
		if e.Passphrase != "" {
			if _, err := h.Add(h.Disk, key, []byte(e.Passphrase), luks.Chosen); err != nil {
				return err
			}
		}
		if e.Key != config.KeyTPM {
			return nil
		}
		if e.Recovery != config.RecoveryNone {
			var err error
			if recovery, err = addRecovery(h, key); err != nil {
				return err
			}
		}
		return m.sealKey(ctx, h, key, m.sealedPCRs(e))
	})
	if err != nil {
		return dev, err
	}
	by := openedByPassphrase
	if e.Key == config.KeyTPM {
		by = openedByTPM
	}
	m.log.Printf("the data disk %s is encrypted now", dev.Path)
	m.showRecovery(recovery, e.Recovery)
	var pcrs []int
	if e.Key == config.KeyTPM {
		pcrs = m.sealedPCRs(e)
	}
	return out, m.isOpen(ctx, by, pcrs)
}

// addRecovery adds a slot for a new recovery key. The header is to be written then.
func addRecovery(h *data.Header, key []byte) (string, error) {
	recovery := newRecoveryKey()
	n, err := h.Add(h.Disk, key, []byte(recovery), luks.Random)
	if err != nil {
		return "", err
	}
	return recovery, h.SetToken(tokenRecovery, n, struct{}{})
}

// showRecovery has a recovery key that was just made shown where the configuration says.
func (m *machine) showRecovery(key, where string) {
	m.mu.Lock()
	m.trust.RecoveryKey, m.recovery, m.recoveryShown = key != "", key, where != config.RecoveryAPI
	m.mu.Unlock()
}

// newRecoveryKey has 256 bits, in groups that people can copy.
func newRecoveryKey() string {
	b := make([]byte, 32)
	rand.Read(b)
	s := strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b))
	var groups []string
	for ; len(s) > 4; s = s[4:] {
		groups = append(groups, s[:4])
	}
	return strings.Join(append(groups, s), "-")
}

// sealKey adds a slot whose secret only the TPM has. The header is to be written then.
func (m *machine) sealKey(ctx context.Context, h *data.Header, key []byte, pcrs []int) error {
	secret := make([]byte, 32)
	rand.Read(secret)
	r, err := m.ask(ctx, seal.Request{Op: seal.Seal, PCRs: pcrs, Secret: secret})
	if err != nil {
		return err
	}
	if r.Sealed == nil || len(r.Sealed.Values) != len(pcrs) {
		return errors.New("the TPM sealed nothing")
	}
	if err := measured(r.Sealed); err != nil {
		return err
	}
	n, err := h.Add(h.Disk, key, []byte(hex.EncodeToString(secret)), luks.Random)
	if err != nil {
		return err
	}
	m.keepSecret(secret, n)
	return h.SetToken(tokenTPM, n, r.Sealed)
}

// measured refuses registers that nobody measured into: a key that is sealed to them
// opens for everybody.
func measured(s *seal.Sealed) error {
	for i, v := range s.Values {
		if len(bytes.Trim(v, "\x00")) == 0 || len(bytes.Trim(v, "\xff")) == 0 {
			return fault.New(fault.Unsupported, "cannot seal the key to the TPM's register %d (%s): nothing was measured into it; start with UEFI, or name others in encryption.pcrs", s.PCRs[i], seal.Means(s.PCRs[i]))
		}
	}
	return nil
}

func (m *machine) keepSecret(secret []byte, slot int) {
	m.mu.Lock()
	m.dataSecret, m.dataSlot = secret, slot
	m.mu.Unlock()
}

// isOpen notes how the data were opened, and closes what the TPM sealed until the
// next start: what runs from here on has no business with it.
func (m *machine) isOpen(ctx context.Context, by string, pcrs []int) error {
	m.mu.Lock()
	m.trust.Encrypted, m.trust.OpenedBy, m.trust.PCRs = true, by, pcrs
	m.mu.Unlock()
	m.log.Printf("the encrypted data are open (%s)", by)
	if len(pcrs) == 0 || !hasTPM() {
		return nil
	}
	_, err := m.ask(ctx, seal.Request{Op: seal.Cap, PCRs: pcrs[len(pcrs)-1:]})
	return err
}

// unlock opens encrypted data: with the TPM, or with what a configuration outside of
// the disk has.
func (m *machine) unlock(ctx context.Context, dev data.Device) (data.Device, error) {
	m.mu.Lock()
	m.trust.Encrypted = true
	m.mu.Unlock()
	if !canEncrypt() {
		return dev, fault.New(fault.Unsupported, "the data are encrypted: an image of the format vm cannot open them")
	}
	if err := m.cryptModules(); err != nil {
		return dev, err
	}
	h, err := dev.Header()
	if err != nil {
		return dev, err
	}
	defer h.Close()
	key, pcrs, why := m.unseal(ctx, h)
	by := openedByTPM
	if key != nil {
		if err := m.settleInstalled(ctx, h, key, pcrs); err != nil {
			m.problem(err)
		}
	}
	if key == nil {
		doc, err := m.configure(ctx)
		if err != nil || doc.Encryption.Passphrase == "" {
			return dev, fmt.Errorf("the data are encrypted and stay closed: %w. Give the recovery key or a passphrase: as encryption.passphrase of a configuration outside of the disk (a NoCloud volume), or over the control API of the machine's host (POST /v1/encryption/unlock)", why)
		}
		if key, by, err = m.openWith(h, doc.Encryption.Passphrase); err != nil {
			return dev, fmt.Errorf("the data are encrypted and stay closed: %w; and the configuration's passphrase: %w", why, err)
		}
		switch first := len(h.Tokens(tokenInstalled)) > 0; {
		case first && hasTPM():
			pcrs = m.sealedPCRs(doc.Encryption)
			if err := m.settleInstalled(ctx, h, key, pcrs); err != nil {
				m.problem(err)
			}
		case doc.Encryption.Key == config.KeyTPM && hasTPM():
			pcrs = m.sealedPCRs(doc.Encryption)
			if err := m.reseal(ctx, h, key, pcrs); err != nil {
				m.problem(err)
			}
		}
	}
	out, err := h.Attach(key)
	if err != nil {
		return dev, err
	}
	return out, m.isOpen(ctx, by, pcrs)
}

// unseal has the TPM open a slot; otherwise it says why it does not.
func (m *machine) unseal(ctx context.Context, h *data.Header) (key []byte, pcrs []int, why error) {
	tokens := h.Tokens(tokenTPM)
	switch {
	case len(tokens) == 0:
		return nil, nil, errors.New("no key of theirs is sealed to a TPM")
	case !hasTPM():
		return nil, nil, errors.New("their key is sealed to a TPM, and this machine has none")
	}
	for slot, raw := range tokens {
		var s seal.Sealed
		if err := json.Unmarshal(raw, &s); err != nil {
			why = fmt.Errorf("their sealed key is damaged: %w", err)
			continue
		}
		installed := h.Tokens(tokenInstalled)[slot] != nil
		if !installed {
			if key, why = m.unsealWith(ctx, h, slot, &s); key != nil {
				return key, s.PCRs, nil
			}
		}
		var whyNext error
		if key, whyNext = m.unsealNext(ctx, h, slot); key == nil {
			if installed {
				why = whyNext
			}
			continue
		}
		if installed {
			return key, s.PCRs, nil // the key is sealed when the rest of the first start is done
		}
		// Another system than before, as was announced: it is the one from now on.
		r, err := m.ask(ctx, seal.Request{Op: seal.Seal, PCRs: s.PCRs, Secret: m.dataSecret})
		if err == nil {
			if err = h.SetToken(tokenTPM, slot, r.Sealed); err == nil {
				err = h.Write(h.Disk)
			}
		}
		if err != nil {
			m.problem(fmt.Errorf("cannot seal the key of the data to this system: %w", err))
		}
		return key, s.PCRs, nil
	}
	return nil, nil, why
}

// unsealNext opens a slot at a start that was announced.
func (m *machine) unsealNext(ctx context.Context, h *data.Header, slot int) (key []byte, why error) {
	var next announced
	if raw := h.Tokens(tokenNext)[slot]; raw != nil {
		if err := json.Unmarshal(raw, &next); err != nil {
			why = fmt.Errorf("their sealed key is damaged: %w", err)
		}
	}
	for i := range next.Sealed {
		if changedPCRs(&next.Sealed[i]) != "" {
			continue
		}
		if key, why = m.unsealWith(ctx, h, slot, &next.Sealed[i]); key != nil {
			return key, nil
		}
	}
	var loose seal.Sealed
	if raw := h.Tokens(tokenLoose)[slot]; raw != nil {
		if err := json.Unmarshal(raw, &loose); err != nil {
			return nil, fmt.Errorf("their sealed key is damaged: %w", err)
		}
		return m.unsealWith(ctx, h, slot, &loose)
	}
	return nil, why
}

// unsealWith opens a slot with what the TPM gives out for one sealed key.
func (m *machine) unsealWith(ctx context.Context, h *data.Header, slot int, s *seal.Sealed) ([]byte, error) {
	r, err := m.ask(ctx, seal.Request{Op: seal.Unseal, Sealed: s})
	if err == nil {
		var key []byte
		if key, _, err = h.Open(h.Disk, []byte(hex.EncodeToString(r.Secret))); err == nil {
			m.keepSecret(r.Secret, slot)
			return key, nil
		}
	}
	if changed := changedPCRs(s); changed != "" {
		err = errors.New("what the machine started from is not what their key is sealed to: " + changed)
	}
	return nil, err
}

// changedPCRs says which registers are not as they were.
func changedPCRs(s *seal.Sealed) string {
	var out []string
	for i, n := range s.PCRs {
		now, err := hex.DecodeString(strings.TrimSpace(readFile(fmt.Sprintf("/sys/class/tpm/tpm0/pcr-%s/%d", seal.Bank, n))))
		if err == nil && i < len(s.Values) && !bytes.Equal(now, s.Values[i]) {
			out = append(out, fmt.Sprintf("register %d differs (%s)", n, seal.Means(n)))
		}
	}
	return strings.Join(out, ", ")
}

func readFile(p string) string {
	b, err := os.ReadFile(p)
	if err != nil {
		return ""
	}
	return string(b)
}

// openWith opens the data with what a person gave.
func (m *machine) openWith(h *data.Header, secret string) ([]byte, string, error) {
	secret = strings.TrimSpace(secret)
	key, n, err := h.Open(h.Disk, []byte(secret))
	if err != nil {
		return nil, "", err
	}
	if _, ok := h.Tokens(tokenRecovery)[n]; ok {
		return key, openedByRecovery, nil
	}
	return key, openedByPassphrase, nil
}

// reseal seals the key to what the machine started from now, instead of to what it was.
func (m *machine) reseal(ctx context.Context, h *data.Header, key []byte, pcrs []int) error {
	fail := func(err error) error { return fmt.Errorf("cannot seal the key of the data again: %w", err) }
	old := h.Tokens(tokenTPM)
	if err := m.sealKey(ctx, h, key, pcrs); err != nil {
		return fail(err)
	}
	if err := h.Write(h.Disk); err != nil {
		return fail(err)
	}
	for n := range old {
		if err := h.Remove(h.Disk, n); err != nil {
			return fail(err)
		}
	}
	m.log.Printf("the key of the data is sealed to what the machine started from now")
	return nil
}

// Unlock takes a recovery key or a passphrase in safe mode: the key is sealed anew
// and the machine starts again.
func (m *machine) Unlock(ctx context.Context, secret string) error {
	m.mu.Lock()
	locked := m.trust.Encrypted && m.dataKind != "disk"
	spec := m.cmdline["data"]
	m.mu.Unlock()
	if !locked {
		return fault.New(fault.Conflict, "there are no encrypted data that are closed")
	}
	dev, ok, err := m.dataDevice(spec)
	if err != nil {
		return err
	}
	if !ok {
		return fault.New(fault.NotFound, "there is no data disk")
	}
	if !hasTPM() {
		return fault.New(fault.Unsupported, "this machine has no TPM that could keep the key: give it as encryption.passphrase of a configuration outside of the disk")
	}
	h, err := dev.Header()
	if err != nil {
		return err
	}
	defer h.Close()
	m.unlockMu.Lock() // one guess at a time
	defer m.unlockMu.Unlock()
	key, _, err := m.openWith(h, secret)
	if err != nil {
		return err
	}
	defer clear(key)
	pcrs := m.sealedPCRs(config.Encryption{})
	for _, raw := range h.Tokens(tokenTPM) {
		var s seal.Sealed
		if json.Unmarshal(raw, &s) == nil && len(s.PCRs) > 0 {
			pcrs = s.PCRs
		}
	}
	if err := m.reseal(ctx, h, key, pcrs); err != nil {
		return err
	}
	// The answer is to leave the machine before the port does.
	time.AfterFunc(500*time.Millisecond, func() { m.Shutdown(true, 5*time.Second) })
	return nil
}

// RecoveryKey gives out the key that was made in this boot, once.
func (m *machine) RecoveryKey() (vmwire.Recovery, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.recovery == "" {
		return vmwire.Recovery{}, fault.New(fault.NotFound, "there is no recovery key to be fetched: it is there once, in the boot that encrypted the data")
	}
	r := vmwire.Recovery{Key: m.recovery}
	m.recovery, m.trust.RecoveryKey = "", false
	return r, nil
}

// shownRecovery is the recovery key while the console shows it.
func (m *machine) shownRecovery() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.recoveryShown {
		return ""
	}
	return m.recovery
}
