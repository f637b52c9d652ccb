package osinit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/osinit/seal"
	"github.com/cloudos-io/cloudos/internal/osinit/source"
)

// outsideFile says, on encrypted data, which document from outside they are opened with.
const outsideFile = "/var/lib/cloudos/outside"

// believe refuses a document that somebody put beside a machine whose data the TPM opens by
// itself: the registers are the same with any stick and in any network, so the
// document could open a shell on what was just decrypted. The first one is noted on the data; another is
// taken with a key of theirs in it, or where a person gave one at this start.
func (m *machine) believe(f source.Found, doc *config.Document) error {
	m.mu.Lock()
	mounted, by := m.trust.Encrypted && m.dataKind == "disk", m.trust.OpenedBy
	m.mu.Unlock()
	if !mounted {
		return nil
	}
	return believe(outsideFile, f, by != openedByTPM, func() bool {
		if doc.Encryption.Passphrase == "" {
			return false
		}
		h, err := m.data.Header()
		if err != nil {
			return false
		}
		defer h.Close()
		key, _, err := m.openWith(h, doc.Encryption.Passphrase)
		clear(key)
		return err == nil
	})
}

// believe compares with the note; shown says that a person has shown a key, knows that the document has one.
func believe(note string, f source.Found, shown bool, knows func() bool) error {
	this := "none"
	if f.Outside && len(f.Document) > 0 {
		sum := sha256.Sum256(f.Document)
		this = hex.EncodeToString(sum[:])
	}
	noted, err := os.ReadFile(note)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot tell which configuration belongs to the data: %w", err)
	}
	switch was := strings.TrimSpace(string(noted)); {
	case was == this, was != "" && this == "none":
		return nil
	case was != "" && !shown && !knows():
		return fault.New(fault.Forbidden, "cannot use the configuration (from %s): it is not the one that the encrypted data know, and the TPM opened them without a person. Keep it on the disk (cloudos config set), put it on the command line, or give it with the recovery key as encryption.passphrase once", f.Source)
	}
	if err := durable.WriteFile(note, []byte(this+"\n"), 0o600, durable.Everything); err != nil {
		return fmt.Errorf("cannot note which configuration belongs to the data: %w", err)
	}
	return nil
}

// closing are registers of which each seal that the system makes by itself has one. Register 7
// is not among them: loosen seals to it while the system runs.
var closing = []int{4, 8, 9, 11}

// encrypted tells whether the data that were found are.
func (m *machine) encrypted() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.trust.Encrypted
}

// closeRegisters has the TPM give out nothing until the next start, whichever disk was found:
// somebody could have put in one of his own, with a configuration that opens a shell, to
// ask the TPM for the key of the disk that belongs here.
func (m *machine) closeRegisters(ctx context.Context) <-chan error {
	done := make(chan error, 1)
	if !hasTPM() || !canEncrypt() {
		done <- nil
		return done
	}
	go func() {
		_, err := m.ask(ctx, seal.Request{Op: seal.Cap, PCRs: closing})
		done <- err
	}()
	return done
}
