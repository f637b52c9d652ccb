package config

import (
	"slices"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Encryption says how what is kept is encrypted. It is looked at when an empty disk is
// prepared, so it has to be where the machine finds it before: in the image, on the command line,
// on a NoCloud volume, or with the cloud.
type Encryption struct {
	// Key is where the key comes from: tpm2 seals it to what the machine started from,
	// passphrase takes it from Passphrase at each start. Empty is no encryption.
	Key string `yaml:"key"`
	// PCRs are the TPM's registers that the key is sealed to (default: 4, 7, 8, 9 behind
	// Debian's boot loaders; 7, 11 with a unified kernel image).
	PCRs []int `yaml:"pcrs"`
	// Passphrase opens the data: also the recovery key, where the TPM does not.
	Passphrase string `yaml:"passphrase"`
	// Recovery is where the recovery key is shown once, when it is made: console
	// (default), api, none.
	Recovery string `yaml:"recovery"`
}

// Sources of keys.
const (
	KeyTPM        = "tpm2"
	KeyPassphrase = "passphrase"
)

// Places for recovery keys.
const (
	RecoveryConsole = "console"
	RecoveryAPI     = "api"
	RecoveryNone    = "none"
)

const minPassphrase = 8

func (e *Encryption) check() error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "encryption: "+format, args...)
	}
	if !slices.Contains([]string{"", KeyTPM, KeyPassphrase}, e.Key) {
		return bad("key %q is not known: it is tpm2 or passphrase", e.Key)
	}
	if !slices.Contains([]string{"", RecoveryConsole, RecoveryAPI, RecoveryNone}, e.Recovery) {
		return bad("recovery %q is not known: it is console, api or none", e.Recovery)
	}
	if e.Key == KeyPassphrase && e.Passphrase == "" {
		return bad("key passphrase needs a passphrase")
	}
	if e.Passphrase != "" && (len(e.Passphrase) < minPassphrase || len(e.Passphrase) > 512) {
		return bad("the passphrase must have %d to 512 bytes", minPassphrase)
	}
	if e.Key == "" && e.Recovery != "" || e.Key != KeyTPM && len(e.PCRs) > 0 {
		return bad("pcrs and recovery need the key tpm2")
	}
	seen := map[int]bool{}
	for _, n := range e.PCRs {
		if n < 0 || n > 15 || seen[n] {
			return bad("pcrs: %d is no register from 0 to 15, or is there twice", n)
		}
		seen[n] = true
	}
	return nil
}
