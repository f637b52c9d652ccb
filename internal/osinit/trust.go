package osinit

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/osinit/dm"
	"github.com/cloudos-io/cloudos/internal/osinit/modules"
	"github.com/cloudos-io/cloudos/internal/slots"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Chains of trust.
const (
	chainDebian = "debian"
	chainOwner  = "owner"
)

// chain is who vouches for the kernel. The word is part of a unified kernel image,
// which the firmware checks as a whole.
func (m *machine) chain() string {
	if m.cmdline["boot"] == "unified" {
		return chainOwner
	}
	return chainDebian
}

// firmware finds out about Secure Boot and the TPM.
func (m *machine) firmware() {
	t := vmwire.Trust{SecureBoot: vmwire.SecureBootNone, Verity: m.cmdline["verity"] != "", TPM: hasTPM()}
	if _, err := os.Stat("/sys/firmware/efi"); err == nil {
		on, err := m.secureBoot()
		switch {
		case err != nil:
			m.log.Printf("cannot tell whether Secure Boot is on: %v", err)
		case on:
			t.SecureBoot, t.Chain = vmwire.SecureBootOn, m.chain()
		default:
			t.SecureBoot = vmwire.SecureBootOff
		}
	}
	m.mu.Lock()
	m.trust = t
	m.mu.Unlock()
	m.log.Printf("secure boot: %s %s", t.SecureBoot, t.Chain)
}

func hasTPM() bool {
	_, err := os.Stat("/dev/tpmrm0")
	return err == nil
}

// secureBoot reads the firmware's variable (UEFI specification, 3.3).
func (m *machine) secureBoot() (bool, error) {
	const at = "/sys/firmware/efi/efivars"
	if err := m.modules.LoadAll("efivarfs"); err != nil {
		return false, err
	}
	if err := unix.Mount("efivarfs", at, "efivarfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return false, fmt.Errorf("cannot mount the firmware's variables: %w", err)
	}
	defer unix.Unmount(at, unix.MNT_DETACH)
	b, err := os.ReadFile(at + "/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
	if os.IsNotExist(err) {
		return false, nil
	}
	return len(b) == 5 && b[4] == 1, err // after four bytes of attributes
}

// slotOfRoot finds the slot whose root has the hash that the command line names.
func (m *machine) slotOfRoot(set *modules.Set, v dm.Verity) (string, error) {
	begin := time.Now()
	for {
		found := 0
		for _, slot := range []string{"a", "b"} {
			path, ok := m.rootOn(slots.Partition(slot), v)
			if !ok {
				continue
			}
			found++
			if hasRoot(path, v) {
				m.cmdline["slot"] = slot
				return path, nil
			}
		}
		late := time.Since(begin) > patience
		if found == 2 && (late || m.esp != (gpt.GUID{})) { // else another disk may come
			return "", fmt.Errorf("neither slot has the root that belongs to this kernel (%s)", v.Hash)
		}
		if late {
			_, err := m.startDisk(slots.Partition("a"))
			return "", errors.Join(fmt.Errorf("no disk with the root came within %v", patience), err)
		}
		if err := set.Devices(); err != nil {
			m.log.Printf("%v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// hasRoot looks at the top of the tree of hashes alone; reading checks the rest.
func hasRoot(path string, v dm.Verity) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	b := make([]byte, 4096)
	if _, err := f.ReadAt(b, int64(v.Blocks+1)*4096); err != nil {
		return false
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]) == v.Hash
}

// checkedRoot makes a device of the root on which what was changed cannot be read.
func (m *machine) checkedRoot(set *modules.Set, v dm.Verity, source string) (string, error) {
	if err := set.LoadAll("dm_verity"); err != nil {
		return "", err
	}
	path, err := v.Open("cloudos-root", source)
	if err != nil {
		return "", fmt.Errorf("cannot check the root %s: %w", source, err)
	}
	return path, nil
}
