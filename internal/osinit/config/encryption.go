package config

import (
	"bytes"
	"errors"
	"slices"

	"go.yaml.in/yaml/v3"

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

// secrets are a document's fields that are not shown.
var secrets = [...][2]string{{"encryption", "passphrase"}, {"tls", "key"}}

// notShown stands for a secret.
const notShown = "(not shown)"

// Redacted is a document to be shown: without its passphrase, and without the key of its listeners.
func Redacted(b []byte) []byte {
	if !bytes.Contains(b, []byte("passphrase")) && !bytes.Contains(b, []byte("tls")) {
		return b
	}
	unreadable := []byte("version: 1 # the document has a secret and cannot be shown\n")
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil || len(n.Content) != 1 || n.Content[0].Kind != yaml.MappingNode {
		return unreadable
	}
	hidden := false
	for _, s := range secrets {
		if section := field(n.Content[0], s[0]); section != nil {
			if v := field(section, s[1]); v != nil {
				*v, hidden = yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: notShown}, true
			}
		}
	}
	if !hidden {
		return b
	}
	out, err := yaml.Marshal(&n)
	if err != nil {
		return unreadable
	}
	return out
}

// Filled is a document that was shown without its secrets, with those of the first of others that has them.
func Filled(b []byte, others ...[]byte) ([]byte, error) {
	if !bytes.Contains(b, []byte(notShown)) {
		return b, nil
	}
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil || len(n.Content) != 1 {
		return b, nil // whoever parses it says why
	}
	filled := false
	for _, s := range secrets {
		section := field(n.Content[0], s[0])
		if section == nil {
			continue
		}
		v := field(section, s[1])
		if v == nil || v.Value != notShown {
			continue
		}
		for _, o := range others {
			if have := secret(o, s); have != nil && v.Value == notShown {
				*v, filled = *have, true
			}
		}
		if v.Value == notShown {
			return nil, fault.New(fault.Invalid, "%s.%s is %q, and no document of this machine has it: give it in full", s[0], s[1], notShown)
		}
	}
	if !filled {
		return b, nil
	}
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := errors.Join(e.Encode(&n), e.Close()); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// secret is one of a document's, as a value that nothing else refers to.
func secret(b []byte, of [2]string) *yaml.Node {
	var n yaml.Node
	if yaml.Unmarshal(b, &n) != nil || len(n.Content) != 1 {
		return nil
	}
	if section := field(n.Content[0], of[0]); section != nil {
		v := field(section, of[1])
		if v != nil && v.Kind == yaml.AliasNode {
			v = v.Alias
		}
		if v != nil && v.Kind == yaml.ScalarNode && v.Value != "" {
			return &yaml.Node{Kind: yaml.ScalarNode, Tag: v.Tag, Style: v.Style, Value: v.Value}
		}
	}
	return nil
}
