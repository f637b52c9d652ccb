package config

import (
	"strings"
	"testing"
)

// TestNotShown: no secret is shown, however the document says it, and each comes back where it was.
func TestNotShown(t *testing.T) {
	for name, c := range map[string]struct {
		document string
		fillable bool
	}{
		"plain":             {"version: 1\nencryption: {key: passphrase, passphrase: geheimgeheim}\n", true},
		"an escaped name":   {"version: 1\nencryption:\n  key: passphrase\n  \"pass\\x70hrase\": geheimgeheim\n", true},
		"merged in":         {"version: 1\nencryption:\n  <<: {key: passphrase, passphrase: geheimgeheim}\n", false},
		"a section merged":  {"version: 1\n<<: {encryption: {key: passphrase, passphrase: geheimgeheim}}\n", false},
		"an anchor":         {"version: 1\nhostname: &h geheimgeheim\nencryption:\n  key: passphrase\n  passphrase: *h\n", false},
		"a name's anchor":   {"version: 1\nengine:\n  labels: [&p passphrase]\nencryption:\n  key: passphrase\n  *p : geheimgeheim\n", false},
		"a trace's header":  {"version: 1\nengine:\n  tracing:\n    endpoint: https://traces.example\n    headers: {authorization: Bearer geheim}\n", true},
		"a mirror's login":  {"version: 1\nengine:\n  registries:\n    docker.io: {mirrors: [\"https://me:geheim@mirror.example\"]}\n", true},
		"a broken document": {"version: 1\nencryption: {passphrase: geheim", false},
	} {
		t.Run(name, func(t *testing.T) {
			shown := Redacted([]byte(c.document))
			if strings.Contains(string(shown), "geheim") {
				t.Fatalf("it shows\n%s", shown)
			}
			// What could not be shown does not come back as a document with nothing in it.
			back, err := Filled(shown, []byte(c.document))
			if (err == nil) != c.fillable || c.fillable && !strings.Contains(string(back), "geheim") {
				t.Errorf("it comes back as %v\n%s", err, back)
			}
		})
	}
	plain := "version: 1   # as it was written\nhostname:   box\n"
	if got := string(Redacted([]byte(plain))); got != plain {
		t.Errorf("without a secret it is shown as\n%s", got)
	}
}
