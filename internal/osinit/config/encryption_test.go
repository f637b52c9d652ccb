package config

import (
	"strings"
	"testing"
)

func TestEncryption(t *testing.T) {
	for doc, want := range map[string]string{
		"encryption: {key: tpm2}":                                           "",
		"encryption: {key: tpm2, pcrs: [7, 11], recovery: api}":             "",
		"encryption: {key: passphrase, passphrase: correct horse}":          "",
		"encryption: {passphrase: correct horse}":                           "",
		"encryption: {key: disk}":                                           "not known",
		"encryption: {key: passphrase}":                                     "needs a passphrase",
		"encryption: {key: tpm2, pcrs: [24]}":                               "no register",
		"encryption: {key: tpm2, pcrs: [7, 7]}":                             "twice",
		"encryption: {key: tpm2, passphrase: short}":                        "8 to 512",
		"encryption: {key: tpm2, recovery: mail}":                           "not known",
		"encryption: {recovery: api}":                                       "need the key",
		"encryption: {key: tpm2, cipher: rot13}":                            "field cipher not found",
		"encryption: {key: passphrase, passphrase: long enough, pcrs: [7]}": "need the key",
	} {
		_, err := Parse([]byte("version: 1\n" + doc + "\n"))
		switch {
		case want == "" && err != nil:
			t.Errorf("%s: %v", doc, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s: %v, not %q", doc, err, want)
		case err != nil && strings.Contains(err.Error(), "correct horse"):
			t.Errorf("the error tells the passphrase: %v", err)
		}
	}
}

func TestRedacted(t *testing.T) {
	for _, doc := range []string{
		"version: 1\nencryption:\n  key: tpm2\n  passphrase: correct horse\n",
		"{version: 1, encryption: {passphrase: correct horse}}",
		"version: 1\nencryption:\n  passphrase: |\n    correct horse\n",
		"version: 1\nencryption: {passphrase: correct horse", // cannot be read
	} {
		if out := string(Redacted([]byte(doc))); strings.Contains(out, "correct horse") || !strings.Contains(out, "version") {
			t.Errorf("%q became %q", doc, out)
		}
	}
	if doc := "version: 1 # mine\n"; string(Redacted([]byte(doc))) != doc {
		t.Error("a document without one was changed")
	}
}
